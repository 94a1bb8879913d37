package main

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
)

const goodRegistrations = `# a comment
registrations:
  - name: frontend
    spiffe_id: spiffe://example.org/ns/shop/sa/frontend
    agents: [node-1, "2"]
    selectors:
      - unix:uid:1000
      - unix:gid:1000
    ttl: 90s
    priority: -3
  - { name: "42", spiffe_id: spiffe://example.org/x, agents: ['1'], selectors: [a:b] }
`

func TestRegistrationsAreReadAsTheyStand(t *testing.T) {
	got, err := parseRegistrations("f", []byte(goodRegistrations))
	if err != nil {
		t.Fatal(err)
	}
	want := []*signetv1.Registration{
		{
			Name: "frontend", SpiffeId: "spiffe://example.org/ns/shop/sa/frontend", Agents: []string{"node-1", "2"},
			Selectors: []string{"unix:uid:1000", "unix:gid:1000"}, TtlSeconds: 90, Priority: -3,
		},
		{Name: "42", SpiffeId: "spiffe://example.org/x", Agents: []string{"1"}, Selectors: []string{"a:b"}},
	}
	for i := range want {
		if len(got) != len(want) || !proto.Equal(got[i], want[i]) {
			t.Errorf("read %v, want %v", got, want)
		}
	}
	if got, err := parseRegistrations("f", []byte("registrations: []")); err != nil || len(got) != 0 {
		t.Errorf("none: %v, %v", got, err)
	}
}

func TestAWrongRegistrationIsNamedWithItsPlace(t *testing.T) {
	for _, bad := range []struct{ text, want string }{
		{"", "f: the file is empty"},
		{"registration: []", `f:1:1: unknown key "registration"; did you mean "registrations"?`},
		{"registrations:\n- agentz: [a]", `f:2:3: unknown key "agentz"; did you mean "agents"?`},
		{"registrations:\n- entirely: 1", `f:2:3: unknown key "entirely"`},
		{"registrations:\n- name: a\n  name: b", "f:3:3: registrations[0].name is given twice, first in line 2"},
		{"registrations:\n- name: a", "f:2:3: registrations[0].spiffe_id is missing\nf:2:3: registrations[0].agents is missing"},
		{"registrations:\n- name:", "f:2:8: registrations[0].name has no value"},
		{"registrations:\n- name: [a]", "f:2:9: registrations[0].name: want text, got a list"},
		{"registrations:\n- name: 42", `f:2:9: registrations[0].name: want text, got "42"; put it in quotes`},
		{"registrations:\n- name: ''", "f:2:3: registrations[0].name has no value"},
		{"registrations:\n-", "f:2:2: registrations[0] has no value"},
		{"registrations:", "f:1:15: registrations has no value"},
		{"registrations:\n- agents: a", "f:2:11: registrations[0].agents: want a list"},
		{"registrations: x", "f:1:16: registrations: want a list"},
		{"registrations:\n- x", "f:2:3: registrations[0]: want keys"},
		{"- x", "f:1:1: the file: want keys"},
		{"registrations:\n- ttl: 10", "want whole seconds"},
		{"registrations:\n- ttl: 1500ms", "want whole seconds"},
		{"registrations:\n- ttl: -10s", "want whole seconds"},
		{"registrations:\n- priority: high", "want a whole number"},
		{"registrations:\n- priority: 3000000000", "want a whole number from -2147483648 to 2147483647"},
		{"registrations:\n- &a { name: b }\n- *a", "f:2:3: registrations[0]: anchors and aliases are not used here"},
		{"registrations: []\n---\nregistrations: []", "f:2:1: a second document begins here"},
		{"registrations: [", "f:1: this is not YAML"},
		{"a: &a x\nregistrations: *a", "unknown key"},
	} {
		_, err := parseRegistrations("f", []byte(bad.text))
		if err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("%q: error is %v, want %q", bad.text, err, bad.want)
		}
	}
}

func FuzzParseRegistrations(f *testing.F) {
	f.Add([]byte(goodRegistrations))
	f.Add([]byte("registrations:\n- &a {name: b}\n- *a"))
	f.Add([]byte("? [x]\n: y"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if _, err := parseRegistrations("f", text); err != nil && len(err.Error()) > 1<<16 {
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
	})
}
