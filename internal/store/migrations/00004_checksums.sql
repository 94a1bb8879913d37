-- Checksums of rows, see sums.go. SQLite's own: PostgreSQL has checksums of pages. A row that is written has none until the
-- end of its transaction. A later migration that adds a column with a default other than NULL sets the checksums NULL.

-- +goose Up
ALTER TABLE meta ADD COLUMN checksum BYTEA;
CREATE INDEX meta_unsealed ON meta (key) WHERE checksum IS NULL;
-- +goose StatementBegin
CREATE TRIGGER meta_changed AFTER UPDATE ON meta WHEN NEW.checksum IS NOT NULL AND NEW.checksum IS OLD.checksum
BEGIN UPDATE meta SET checksum = NULL WHERE rowid = NEW.rowid; END;
-- +goose StatementEnd
ALTER TABLE revisions ADD COLUMN checksum BYTEA;
CREATE INDEX revisions_unsealed ON revisions (name) WHERE checksum IS NULL;
-- +goose StatementBegin
CREATE TRIGGER revisions_changed AFTER UPDATE ON revisions WHEN NEW.checksum IS NOT NULL AND NEW.checksum IS OLD.checksum
BEGIN UPDATE revisions SET checksum = NULL WHERE rowid = NEW.rowid; END;
-- +goose StatementEnd
ALTER TABLE agents ADD COLUMN checksum BYTEA;
CREATE INDEX agents_unsealed ON agents (name) WHERE checksum IS NULL;
-- +goose StatementBegin
CREATE TRIGGER agents_changed AFTER UPDATE ON agents WHEN NEW.checksum IS NOT NULL AND NEW.checksum IS OLD.checksum
BEGIN UPDATE agents SET checksum = NULL WHERE rowid = NEW.rowid; END;
-- +goose StatementEnd
ALTER TABLE join_tokens ADD COLUMN checksum BYTEA;
CREATE INDEX join_tokens_unsealed ON join_tokens (id) WHERE checksum IS NULL;
-- +goose StatementBegin
CREATE TRIGGER join_tokens_changed AFTER UPDATE ON join_tokens WHEN NEW.checksum IS NOT NULL AND NEW.checksum IS OLD.checksum
BEGIN UPDATE join_tokens SET checksum = NULL WHERE rowid = NEW.rowid; END;
-- +goose StatementEnd
ALTER TABLE registrations ADD COLUMN checksum BYTEA;
CREATE INDEX registrations_unsealed ON registrations (name) WHERE checksum IS NULL;
-- +goose StatementBegin
CREATE TRIGGER registrations_changed AFTER UPDATE ON registrations WHEN NEW.checksum IS NOT NULL AND NEW.checksum IS OLD.checksum
BEGIN UPDATE registrations SET checksum = NULL WHERE rowid = NEW.rowid; END;
-- +goose StatementEnd
ALTER TABLE registration_agents ADD COLUMN checksum BYTEA;
CREATE INDEX registration_agents_unsealed ON registration_agents (registration) WHERE checksum IS NULL;
-- +goose StatementBegin
CREATE TRIGGER registration_agents_changed AFTER UPDATE ON registration_agents WHEN NEW.checksum IS NOT NULL AND NEW.checksum IS OLD.checksum
BEGIN UPDATE registration_agents SET checksum = NULL WHERE rowid = NEW.rowid; END;
-- +goose StatementEnd
ALTER TABLE registration_selectors ADD COLUMN checksum BYTEA;
CREATE INDEX registration_selectors_unsealed ON registration_selectors (registration) WHERE checksum IS NULL;
-- +goose StatementBegin
CREATE TRIGGER registration_selectors_changed AFTER UPDATE ON registration_selectors WHEN NEW.checksum IS NOT NULL AND NEW.checksum IS OLD.checksum
BEGIN UPDATE registration_selectors SET checksum = NULL WHERE rowid = NEW.rowid; END;
-- +goose StatementEnd
ALTER TABLE authorities ADD COLUMN checksum BYTEA;
CREATE INDEX authorities_unsealed ON authorities (id) WHERE checksum IS NULL;
-- +goose StatementBegin
CREATE TRIGGER authorities_changed AFTER UPDATE ON authorities WHEN NEW.checksum IS NOT NULL AND NEW.checksum IS OLD.checksum
BEGIN UPDATE authorities SET checksum = NULL WHERE rowid = NEW.rowid; END;
-- +goose StatementEnd
ALTER TABLE authority_certificates ADD COLUMN checksum BYTEA;
CREATE INDEX authority_certificates_unsealed ON authority_certificates (authority) WHERE checksum IS NULL;
-- +goose StatementBegin
CREATE TRIGGER authority_certificates_changed AFTER UPDATE ON authority_certificates WHEN NEW.checksum IS NOT NULL AND NEW.checksum IS OLD.checksum
BEGIN UPDATE authority_certificates SET checksum = NULL WHERE rowid = NEW.rowid; END;
-- +goose StatementEnd
ALTER TABLE bundles ADD COLUMN checksum BYTEA;
CREATE INDEX bundles_unsealed ON bundles (trust_domain) WHERE checksum IS NULL;
-- +goose StatementBegin
CREATE TRIGGER bundles_changed AFTER UPDATE ON bundles WHEN NEW.checksum IS NOT NULL AND NEW.checksum IS OLD.checksum
BEGIN UPDATE bundles SET checksum = NULL WHERE rowid = NEW.rowid; END;
-- +goose StatementEnd
ALTER TABLE bundle_roots ADD COLUMN checksum BYTEA;
CREATE INDEX bundle_roots_unsealed ON bundle_roots (trust_domain) WHERE checksum IS NULL;
-- +goose StatementBegin
CREATE TRIGGER bundle_roots_changed AFTER UPDATE ON bundle_roots WHEN NEW.checksum IS NOT NULL AND NEW.checksum IS OLD.checksum
BEGIN UPDATE bundle_roots SET checksum = NULL WHERE rowid = NEW.rowid; END;
-- +goose StatementEnd
ALTER TABLE outbox ADD COLUMN checksum BYTEA;
CREATE INDEX outbox_unsealed ON outbox (change) WHERE checksum IS NULL;
-- +goose StatementBegin
CREATE TRIGGER outbox_changed AFTER UPDATE ON outbox WHEN NEW.checksum IS NOT NULL AND NEW.checksum IS OLD.checksum
BEGIN UPDATE outbox SET checksum = NULL WHERE rowid = NEW.rowid; END;
-- +goose StatementEnd
