package config

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/strictyaml"
	"github.com/signet-ca/signet/keystore"
)

const fullServer = `# all of it
trust_domain: example.org
cluster: east
instance: east-7
state_dir: ./st
keystore:
  passphrase_file: ./east.pass
  algorithm: ecdsa-p384
listen:
  enrol: 0.0.0.0:7441
  agents: "[::1]:7442"
  http: 127.0.0.1:7440
  advertise_enrol: ca.example.org:443
  advertise_agents: ""
admin_socket: /run/signet/admin.sock
leaf: { ttl: 12h, max_ttl: 24h, min_useful_life: 0s, backdate: 1s }
control: { ttl: 168h }
limits: { burst: 60 }
rotation:
  automatic: false
  quorum: 95
  delay: 1h
  skew: 0s
  prepare_at: 0.4
  switch_at: 0.6
  report_life: 12h
  reissue_rate: 50
  peers:
    - { cluster: west, log_verifier_key: "example.org/west/west-1+68b877ca+ATtqJ7zOtqQtYqOo0CpvDXNlMhV3HeJDpjrASKGLWdop" }
log: { checkpoint_interval: 500ms }
logging: { level: debug, format: json }
`

const westKey = "example.org/west/west-1+68b877ca+ATtqJ7zOtqQtYqOo0CpvDXNlMhV3HeJDpjrASKGLWdop"

const fullAgent = `state_dir: ./agent
join_token_file: ./node-1.token
seal: { passphrase_file: "", passphrase_credential: node }
socket: ./agent/agent.sock
sockets:
  - { name: frontend, path: ./run/frontend.sock }
  - name: backend
    path: /run/backend.sock
sds: { validator: trusted_ca }
http: 127.0.0.1:7450
logging: { level: info, format: auto }
`

func write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestAServerFileIsReadWhole(t *testing.T) {
	path := write(t, "east.yaml", fullServer)
	dir := filepath.Dir(path)
	s, err := LoadServer(path)
	if err != nil {
		t.Fatal(err)
	}
	s.origin = origin{}
	td, err := identity.ParseTrustDomain("example.org")
	if err != nil {
		t.Fatal(err)
	}
	want := &Server{
		TrustDomain: td, Cluster: "east", Instance: "east-7", StateDir: dir + "/st",
		Keystore: Keystore{PassphraseFile: dir + "/east.pass", Algorithm: keystore.ECDSAP384, ControlCA: KeysFile, Intermediates: KeysFile},
		Listen: Listen{
			Enrol: "0.0.0.0:7441", Agents: "[::1]:7442", HTTP: "127.0.0.1:7440",
			AdvertiseEnrol: "ca.example.org:443", AdvertiseAgents: "[::1]:7442",
		},
		AdminSocket: "/run/signet/admin.sock",
		Leaf:        Leaf{TTL: 12 * time.Hour, MaxTTL: 24 * time.Hour, MinUsefulLife: 450 * time.Second, Backdate: time.Second},
		Control:     Control{TTL: 168 * time.Hour},
		Limits:      Limits{CertificatesPerSecond: 200, Burst: 60},
		Rotation: Rotation{
			Quorum: 95, Delay: time.Hour, PrepareAt: 0.4, SwitchAt: 0.6, ReportLife: 12 * time.Hour, ReissueRate: 50,
			Peers: []Peer{{"west", westKey}},
		},
		Log:     Log{CheckpointInterval: 500 * time.Millisecond},
		Logging: Logging{Level: "debug", Format: "json"},
	}
	if !reflect.DeepEqual(s, want) {
		t.Errorf("got  %+v\nwant %+v", s, want)
	}
}

func TestAnAgentFileIsReadWhole(t *testing.T) {
	path := write(t, "node-1.yaml", fullAgent)
	dir := filepath.Dir(path)
	a, err := LoadAgent(path)
	if err != nil {
		t.Fatal(err)
	}
	a.origin = origin{}
	want := &Agent{
		StateDir: dir + "/agent", JoinTokenFile: dir + "/node-1.token",
		Seal:    Seal{PassphraseCredential: "node"},
		Socket:  dir + "/agent/agent.sock",
		Sockets: []Socket{{"frontend", dir + "/run/frontend.sock"}, {"backend", "/run/backend.sock"}},
		SDS:     SDS{Validator: "trusted_ca"}, HTTP: "127.0.0.1:7450",
		Logging: Logging{Level: "info", Format: "auto"},
	}
	if !reflect.DeepEqual(a, want) {
		t.Errorf("got  %+v\nwant %+v", a, want)
	}
}

func TestWhatAFileLeavesOutHasTheDocumentedDefault(t *testing.T) {
	path := write(t, "east.yaml", "trust_domain: example.org\ncluster: east\nleaf:\n  # ttl: 1h\n")
	s, err := LoadServer(path)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(path)
	want := map[string]string{
		"trust_domain": "example.org", "cluster": "east", "instance": "east-1",
		"state_dir": dir + "/state", "keystore.passphrase_file": "", "keystore.passphrase_credential": "",
		"keystore.algorithm": "ecdsa-p256", "keystore.control_ca": "file", "keystore.intermediates": "file",
		"listen.enrol": "127.0.0.1:7441", "listen.agents": "127.0.0.1:7442", "listen.http": "127.0.0.1:7440",
		"listen.advertise_enrol": "127.0.0.1:7441", "listen.advertise_agents": "127.0.0.1:7442",
		"admin_socket": dir + "/state/admin.sock",
		"leaf.ttl":     "24h", "leaf.max_ttl": "24h", "leaf.min_useful_life": "15m", "leaf.backdate": "5m",
		"control.ttl": "168h", "limits.certificates_per_second": "200", "limits.burst": "5000",
		"rotation.automatic": "true", "rotation.quorum": "100", "rotation.delay": "0s", "rotation.skew": "5m", "rotation.prepare_at": "0.5",
		"rotation.switch_at": "0.67", "rotation.report_life": "24h", "rotation.reissue_rate": "200", "rotation.peers": "",
		"log.checkpoint_interval": "1s", "logging.level": "info", "logging.format": "auto",
	}
	compare(t, s.Settings(), want)

	agent := write(t, "node.yaml", "")
	a, err := LoadAgent(agent)
	if err != nil {
		t.Fatal(err)
	}
	dir = filepath.Dir(agent)
	compare(t, a.Settings(), map[string]string{
		"state_dir": dir + "/agent", "join_token_file": "", "seal.passphrase_file": "", "seal.passphrase_credential": "",
		"socket": dir + "/agent/agent.sock", "sockets": "", "sds.validator": "spiffe", "http": "127.0.0.1:7450",
		"logging.level": "info", "logging.format": "auto",
	})
}

func compare(t *testing.T, got []Setting, want map[string]string) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%d settings, want %d", len(got), len(want))
	}
	for _, s := range got {
		if w, ok := want[s.Key]; !ok || w != s.Value {
			t.Errorf("%s = %q, want %q", s.Key, s.Value, w)
		}
	}
}

func TestEveryValueKnowsItsSource(t *testing.T) {
	path := write(t, "east.yaml", fullServer)
	s, err := LoadServer(path)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, one := range s.Settings() {
		got[one.Key] = one.Source
	}
	for key, want := range map[string]string{
		"trust_domain": path + ":2", "keystore.algorithm": path + ":8", "leaf.backdate": path + ":16",
		"keystore.passphrase_credential": "default", "listen.advertise_agents": "default", "listen.advertise_enrol": path + ":13",
	} {
		if got[key] != want {
			t.Errorf("source of %s: %q, want %q", key, got[key], want)
		}
	}
	a, err := LoadAgent(write(t, "node.yaml", fullAgent))
	if err != nil {
		t.Fatal(err)
	}
	last := a.Settings()
	if got := last[8]; got.Key != "sockets[1].path" || !strings.HasSuffix(got.Source, "node.yaml:8") {
		t.Errorf("got %+v", got)
	}
}

// A server's file that is right but for the lines given.
func server(lines string) string { return "trust_domain: example.org\ncluster: east\n" + lines }

func TestWhatIsWrongIsNamedWithPlaceAndRemedy(t *testing.T) {
	for name, c := range map[string]struct {
		agent bool
		text  string
		want  []string // each one finding, as "line:column: words", in order; 0:0 = no place
	}{
		"unknown key":            {text: server("lisen:\n  enrol: 127.0.0.1:1\n"), want: []string{`3:1: unknown key "lisen"; did you mean "listen"?`}},
		"unknown nested key":     {text: server("listen:\n  enroll: 127.0.0.1:1\n"), want: []string{`4:3: unknown key "enroll"; did you mean "enrol"?`}},
		"swapped letters":        {text: server("lefa: {}\n"), want: []string{`3:1: unknown key "lefa"; did you mean "leaf"?`}},
		"hyphens":                {text: server("state-dir: x\n"), want: []string{`did you mean "state_dir"?`}},
		"key of another section": {text: server("max_ttl: 24h\n"), want: []string{`3:1: unknown key "max_ttl"; did you mean leaf.max_ttl?`}},
		"key of two sections":    {text: server("ttl: 24h\n"), want: []string{`did you mean leaf.ttl or control.ttl?`}},
		"key of the other role":  {text: server("sockets: []\n"), want: []string{`it belongs into the configuration of the agent`}},
		"a foreign word":         {text: server("completely_else: 1\n"), want: []string{`3:1: unknown key "completely_else"`}},
		"escapes in a key":       {text: server("\"a\\e[31m\": 1\n"), want: []string{`unknown key "a\x1b[31m"`}},
		"misspelled, not missing as well": {
			text: "trust_domain: example.org\nclustr: east\n",
			want: []string{`2:1: unknown key "clustr"; did you mean "cluster"?`},
		},
		"given twice":              {text: server("cluster: west\n"), want: []string{`3:1: cluster is given twice, first in line 2: keep one of them`}},
		"given twice, deep":        {text: server("leaf:\n  ttl: 1h\n  ttl: 2h\n"), want: []string{`5:3: leaf.ttl is given twice, first in line 4`}},
		"number for text":          {text: "trust_domain: example.org\ncluster: 12\n", want: []string{`2:10: cluster: want text, got "12"; put it in quotes`}},
		"list for text":            {text: server("state_dir: [a]\n"), want: []string{`3:12: state_dir: want text, got a list`}},
		"text for keys":            {text: server("leaf: 24h\n"), want: []string{`3:7: leaf: want keys with values, got "24h"`}},
		"keys for list":            {agent: true, text: "sockets: {name: a}\n", want: []string{`1:10: sockets: want a list, got keys with values`}},
		"no unit":                  {text: server("leaf: {ttl: 24}\n"), want: []string{`3:13: leaf.ttl: want a duration such as 90s, 15m or 24h, got "24"`}},
		"days":                     {text: server("leaf: {ttl: 1d}\n"), want: []string{`want a duration`}},
		"no value":                 {text: server("state_dir:\n"), want: []string{`state_dir has no value: give it one or remove the key`}},
		"list as the whole":        {text: "- a\n", want: []string{`0:0: trust_domain is missing`, `0:0: cluster is missing`, `1:1: the configuration: want keys with values, got a list`}},
		"alias":                    {text: server("leaf: &l {ttl: 1h}\ncontrol: *l\n"), want: []string{`3:7: leaf: anchors and aliases are not used here`, `4:10: control: anchors and aliases`}},
		"merge key":                {text: server("leaf: {<<: {ttl: 1h}}\n"), want: []string{`3:8: unknown key "<<"`}},
		"a tag":                    {text: "trust_domain: !!binary ZXhhbXBsZS5vcmc=\ncluster: east\n", want: []string{`trust_domain: want text`}},
		"two documents":            {text: server("---\ncluster: west\n"), want: []string{`a second document begins here`}},
		"not YAML":                 {text: server("leaf: {ttl: 1h\n"), want: []string{`: this is not YAML: `}},
		"a tab":                    {text: server("leaf:\n\tttl: 1h\n"), want: []string{`4:0: this is not YAML: found character that cannot start any token`}},
		"nothing":                  {text: "", want: []string{`0:0: trust_domain is missing: name the trust domain`, `0:0: cluster is missing: name the cluster`}},
		"trust domain with scheme": {text: "trust_domain: spiffe://example.org\ncluster: east\n", want: []string{`1:15: trust_domain: trust domain "spiffe://example.org": give the bare name`}},
		"trust domain in capitals": {text: "trust_domain: Example.org\ncluster: east\n", want: []string{`1:15: trust_domain: `}},
		"empty trust domain":       {text: "trust_domain: \"\"\ncluster: east\n", want: []string{`trust_domain`}},
		"bad cluster":              {text: "trust_domain: example.org\ncluster: East\n", want: []string{`2:1: cluster name "East"`}},
		"bad instance":             {text: server("instance: a/b\n"), want: []string{`3:1: instance name "a/b"`}},
		"tilde":                    {text: server("state_dir: ~/x\n"), want: []string{`3:12: state_dir "~/x": ~ is not expanded here`}},
		"control characters":       {text: server("state_dir: \"a\\nb\"\n"), want: []string{`state_dir: control characters`}},
		"both passphrases":         {text: server("keystore: {passphrase_file: a, passphrase_credential: b}\n"), want: []string{`3:32: keystore names both a passphrase_file and a passphrase_credential: keep one of them`}},
		"credential is a path":     {text: server("keystore: {passphrase_credential: a/b}\n"), want: []string{`give the bare name of a systemd credential`}},
		"unknown algorithm":        {text: server("keystore: {algorithm: ecdsa}\n"), want: []string{`3:12: key algorithm "ecdsa" is unknown: use one of`}},
		"Ed25519":                  {text: server("keystore: {algorithm: ed25519}\n"), want: []string{`Envoy takes no Ed25519 certificates`}},
		"ttl over max":             {text: server("leaf:\n  ttl: 25h\n"), want: []string{`4:3: leaf.ttl 25h0m0s is longer than leaf.max_ttl 24h0m0s: lower the one or raise the other`}},
		"ttl under least":          {text: server("leaf: {ttl: 4s}\n"), want: []string{`3:8: leaf.ttl 4s is shorter than the least useful life of 5s`}},
		"zero ttl":                 {text: server("leaf: {ttl: 0s}\n"), want: []string{`leaf.ttl 0s is shorter`}},
		"broken seconds":           {text: server("leaf: {ttl: 10500ms}\n"), want: []string{`leaf.ttl 10.5s: X.509 counts in whole seconds`}},
		"useless useful life":      {text: server("leaf: {ttl: 10s, min_useful_life: 11s}\n"), want: []string{`leaf.min_useful_life 11s is longer than leaf.ttl 10s`}},
		"negative useful life":     {text: server("leaf: {min_useful_life: -1s}\n"), want: []string{`leaf.min_useful_life -1s is negative`}},
		"negative backdate":        {text: server("leaf: {backdate: -1s}\n"), want: []string{`leaf.backdate -1s: want 1s to 1h`}},
		"long backdate":            {text: server("leaf: {backdate: 2h}\n"), want: []string{`leaf.backdate 2h0m0s: want 1s to 1h`}},
		"short control":            {text: server("control: {ttl: 30s}\n"), want: []string{`control.ttl 30s is shorter than the least useful 1m0s`}},
		"small burst":              {text: server("limits: {burst: 49}\n"), want: []string{`limits.burst 49: want 50 to 1000000`}},
		"negative rate":            {text: server("limits: {certificates_per_second: -1}\n"), want: []string{`limits.certificates_per_second -1: want 1 to 1000000`}},
		"nobody's quorum":          {text: server("rotation: {quorum: 0}\n"), want: []string{`3:12: rotation.quorum 0: want 1 to 100`}},
		"more than all":            {text: server("rotation: {quorum: 101}\n"), want: []string{`rotation.quorum 101: want 1 to 100`}},
		"negative skew":            {text: server("rotation: {skew: -1s}\n"), want: []string{`rotation.skew -1s is negative`}},
		"skew over reports":        {text: server("rotation: {skew: 1h, report_life: 2h}\n"), want: []string{`3:12: rotation.skew 1h0m0s is not less than half of rotation.report_life 2h0m0s`}},
		"short reports":            {text: server("rotation: {report_life: 9m}\n"), want: []string{`3:12: rotation.skew 5m0s is not less than half of rotation.report_life 9m0s`}},
		"prepared too late":        {text: server("rotation: {prepare_at: 0.67}\n"), want: []string{`3:12: rotation.prepare_at 0.67 is not before rotation.switch_at 0.67`}},
		"switched too early":       {text: server("rotation: {switch_at: 0.5}\n"), want: []string{`3:12: rotation.prepare_at 0.5 is not before rotation.switch_at 0.5`}},
		"switched at the end":      {text: server("rotation: {switch_at: 1}\n"), want: []string{`rotation.switch_at 1: want a fraction`}},
		"prepared from birth":      {text: server("rotation: {prepare_at: 0}\n"), want: []string{`rotation.prepare_at 0: want a fraction`}},
		"not a number":             {text: server("rotation: {switch_at: .inf}\n"), want: []string{`3:23: rotation.switch_at: want a number such as 0.5, got`}},
		"half automatic":           {text: server("rotation: {automatic: yes}\n"), want: []string{`3:23: rotation.automatic: want true or false, got`}},
		"no reissue":               {text: server("rotation: {reissue_rate: 0}\n"), want: []string{`rotation.reissue_rate 0: want 1 to 1000000`}},
		"negative delay":           {text: server("rotation: {delay: -1s}\n"), want: []string{`rotation.delay -1s: want 0s to 720h`}},
		"its own peer":             {text: server("rotation: {peers: [{cluster: east, log_verifier_key: \"" + westKey + "\"}]}\n"), want: []string{`rotation.peers[0]: east is this cluster itself`}},
		"a peer twice":             {text: server("rotation:\n  peers:\n  - {cluster: west, log_verifier_key: \"" + westKey + "\"}\n  - {cluster: west, log_verifier_key: \"" + westKey + "\"}\n"), want: []string{`6:6: rotation.peers[1]: cluster west is listed already`}},
		"a peer without a key":     {text: server("rotation: {peers: [{cluster: west}]}\n"), want: []string{`rotation.peers[0].log_verifier_key is missing`}},
		"no verifier key":          {text: server("rotation: {peers: [{cluster: west, log_verifier_key: abc}]}\n"), want: []string{`rotation.peers[0].log_verifier_key is no verifier key: give the one that `}},
		"another's verifier key":   {text: server("rotation: {peers: [{cluster: north, log_verifier_key: \"" + westKey + "\"}]}\n"), want: []string{`is of the log "example.org/west/west-1", and a log of cluster north begins with "example.org/north/"`}},
		"fast checkpoints":         {text: server("log: {checkpoint_interval: 10ms}\n"), want: []string{`log.checkpoint_interval 10ms: want 100ms to 1m`}},
		"level":                    {text: server("logging: {level: warning}\n"), want: []string{`3:11: logging.level "warning" is unknown: use debug, info, warn, error`}},
		"format":                   {text: server("logging: {format: jsno}\n"), want: []string{`did you mean "json"?`}},
		"address without port":     {text: server("listen: {enrol: 127.0.0.1}\n"), want: []string{`3:10: listen.enrol: "127.0.0.1" is not host:port`}},
		"port 0":                   {text: server("listen: {enrol: \"127.0.0.1:0\"}\n"), want: []string{`want a port from 1 to 65535`}},
		"named port":               {text: server("listen: {enrol: \"127.0.0.1:http\"}\n"), want: []string{`want a port from 1 to 65535`}},
		"host with blanks":         {text: server("listen: {enrol: \"a b:1\"}\n"), want: []string{`the host is neither an address nor a name`}},
		"equal doors":              {text: server("listen: {enrol: \"127.0.0.1:7442\"}\n"), want: []string{`3:10: listen.enrol 127.0.0.1:7442 and listen.agents 127.0.0.1:7442 are the same address`}},
		"equal through wildcard":   {text: server("listen: {http: \"0.0.0.0:7441\"}\n"), want: []string{`3:10: listen.enrol 127.0.0.1:7441 and listen.http 0.0.0.0:7441 are the same address`}},
		"nobody can dial":          {text: server("listen: {agents: \":7442\"}\n"), want: []string{`3:10: listen.agents :7442 is every address of this machine, which nobody can dial: add listen.advertise_agents`}},
		"nobody can dial that":     {text: server("listen: {advertise_enrol: \"[::]:1\"}\n"), want: []string{`names no host that could be dialled`}},
		"long socket":              {text: server("admin_socket: /" + strings.Repeat("a", 107) + "\n"), want: []string{`3:1: admin_socket: the path of a Unix socket has at most 107 bytes`}},

		"agent: both seals":            {agent: true, text: "seal: {passphrase_file: a, passphrase_credential: b}\n", want: []string{`seal names both`}},
		"agent: validator":             {agent: true, text: "sds: {validator: spife}\n", want: []string{`sds.validator "spife" is unknown: use spiffe, trusted_ca; did you mean "spiffe"?`}},
		"agent: http":                  {agent: true, text: "http: x\n", want: []string{`1:1: http: "x" is not host:port`}},
		"agent: nameless socket":       {agent: true, text: "sockets:\n  - path: /a\n", want: []string{`2:5: sockets[0] has no name`}},
		"agent: pathless socket":       {agent: true, text: "sockets:\n  - name: a\n", want: []string{`2:5: sockets[0] has no path`}},
		"agent: bad socket name":       {agent: true, text: "sockets:\n  - {name: A, path: /a}\n", want: []string{`2:6: socket name "A"`}},
		"agent: equal socket names":    {agent: true, text: "sockets:\n  - {name: a, path: /a}\n  - {name: a, path: /b}\n", want: []string{`3:6: sockets[1]: the name a is already another socket's`}},
		"agent: equal socket paths":    {agent: true, text: "socket: /a\nsockets:\n  - {name: a, path: /a}\n", want: []string{`3:15: sockets[0]: the path /a is already another socket's`}},
		"agent: unknown in a list":     {agent: true, text: "sockets:\n  - {name: a, path: /a, pth: b}\n", want: []string{`2:25: unknown key "pth"; did you mean "path"?`}},
		"agent: too many sockets":      {agent: true, text: "sockets: [" + strings.Repeat("{},", 1025) + "]\n", want: []string{`at most 1024 are allowed`}},
		"agent: key of the server's":   {agent: true, text: "cluster: east\n", want: []string{`1:1: unknown key "cluster"; it belongs into the configuration of the server`}},
		"agent: nothing in the list":   {agent: true, text: "sockets:\n  -\n", want: []string{`sockets[0] has no name`, `sockets[0] has no path`}},
		"agent: key that is a mapping": {agent: true, text: "? {a: b}\n: c\n", want: []string{`a key must be a plain word, got keys with values`}},
	} {
		t.Run(name, func(t *testing.T) {
			path := write(t, "c.yaml", c.text)
			var err error
			if c.agent {
				_, err = LoadAgent(path)
			} else {
				_, err = LoadServer(path)
			}
			var found strictyaml.Findings
			if !errors.As(err, &found) {
				t.Fatalf("no findings but %v", err)
			}
			if len(found) != len(c.want) {
				t.Fatalf("findings:\n%v\nwant %d", found, len(c.want))
			}
			for i, f := range found {
				got := f.String()
				want := strings.TrimPrefix(c.want[i], "0:0: ")
				if want != c.want[i] && f.Line != 0 {
					t.Errorf("%s: has a place", got)
				}
				if want[0] >= '0' && want[0] <= '9' {
					want = path + ":" + strings.Replace(want, ":0:", ":", 1)
				}
				if !strings.Contains(got, want) {
					t.Errorf("got  %s\nwant %s", got, want)
				}
			}
		})
	}
}

func TestALoweredMaximumLowersTheDefaultLife(t *testing.T) {
	s, err := LoadServer(write(t, "c.yaml", server("leaf: {max_ttl: 1h}\n")))
	if err != nil {
		t.Fatal(err)
	}
	if s.Leaf.TTL != time.Hour {
		t.Errorf("default life %s under a maximum of 1h", s.Leaf.TTL)
	}
}

func TestFilesThatCannotBeReadAreNoFindings(t *testing.T) {
	dir := t.TempDir()
	big := filepath.Join(dir, "big.yaml")
	if err := os.WriteFile(big, []byte(strings.Repeat("#", maxFile+1)), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		filepath.Join(dir, "none.yaml"): "no such file",
		dir:                             "it is a folder, give a file",
		big:                             "larger than 1 MiB",
	} {
		_, err := LoadServer(path)
		var found strictyaml.Findings
		if err == nil || errors.As(err, &found) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v, want words %q", path, err, want)
		}
	}
}

func TestTheRoleIsToldFromTheKeys(t *testing.T) {
	for text, want := range map[string]Role{fullServer: RoleServer, fullAgent: RoleAgent, "clustr: x\nlisten: {}\n": RoleServer, "sockets: 7\n": RoleAgent} {
		got, err := RoleOf(write(t, "c.yaml", text))
		if err != nil || got != want {
			t.Errorf("%q: %q, %v; want %q", text, got, err, want)
		}
	}
	for _, text := range []string{"", "state_dir: x\nlogging: {}\n", "- a\n"} {
		if got, err := RoleOf(write(t, "c.yaml", text)); err == nil || !strings.Contains(err.Error(), "--role") {
			t.Errorf("%q: %q, %v; want a request for --role", text, got, err)
		}
	}
}

func TestDevelopmentModeListensOnLoopbackOnly(t *testing.T) {
	td, err := identity.ParseTrustDomain("dev.local")
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewServer(td, "dev", t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.CheckLoopback(); err != nil {
		t.Errorf("defaults: %v", err)
	}
	for _, addr := range []string{"0.0.0.0:1", ":1", "10.0.0.1:1", "localhost:1", "[::]:1", "x"} {
		dev := *s
		dev.Listen.HTTP = addr
		if err := dev.CheckLoopback(); err == nil {
			t.Errorf("%s was taken for loopback", addr)
		}
	}
	s.Listen.HTTP = "[::1]:1"
	if err := s.CheckLoopback(); err != nil {
		t.Error(err)
	}
}

func TestAServerWithoutAFileIsCheckedToo(t *testing.T) {
	td, err := identity.ParseTrustDomain("example.org")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewServer(td, "Not A Name", t.TempDir()); err == nil || !strings.Contains(err.Error(), "cluster name") {
		t.Errorf("got %v", err)
	}
}

func TestKeysAreOpenedFromTheNamedSource(t *testing.T) {
	dir := t.TempDir()
	pass := filepath.Join(dir, "pass")
	if err := os.WriteFile(pass, []byte("correct horse\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "c.yaml")
	if err := os.WriteFile(path, []byte(server("keystore: {passphrase_file: pass}\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := LoadServer(path)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := s.OpenKeys()
	if err != nil {
		t.Fatal(err)
	}
	k, err := keys.Create(t.Context(), "ca", s.Keystore.Algorithm, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "state", "keys", "ca@1.pem")); err != nil {
		t.Error(err)
	}
	// Another process, with the passphrase from systemd.
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	s.Keystore.PassphraseFile, s.Keystore.PassphraseCredential = "", "pass"
	again, err := s.OpenKeys()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := again.Open(t.Context(), k.Ref()); err != nil {
		t.Error(err)
	}
	s.Keystore.PassphraseCredential = ""
	asked, err := s.OpenKeys()
	if err != nil || !strings.Contains(asked.String(), "passphrase from the terminal") {
		t.Errorf("without a source: %v, %v", asked, err)
	}
	a := Agent{StateDir: dir}
	if p, local := a.Passphrase(); !local || !strings.Contains(p.(interface{ String() string }).String(), "file mode alone") {
		t.Errorf("an agent without a seal: %v, %v", p, local)
	}
	a.Seal.PassphraseFile = pass
	if p, local := a.Passphrase(); local || p.(interface{ String() string }).String() != "passphrase file "+pass {
		t.Errorf("an agent with a passphrase file: %v, %v", p, local)
	}
}

// Whatever the bytes, a file gives a usable configuration or bounded findings, and never both.
func FuzzLoad(f *testing.F) {
	f.Add([]byte(fullServer))
	f.Add([]byte(fullAgent))
	f.Add([]byte(fullVault))
	f.Add([]byte("a: &a [*a]\n"))
	f.Add([]byte("sockets: [{}, null, 1, [x]]\nleaf: {ttl: -5h, ttl: x}\n? [a]\n: b"))
	f.Add([]byte("\xff\xfea\x00:\x00"))
	f.Add([]byte("listen: {enrol: \"[::1%eth0]:1\", agents: \":::\", http: \"\"}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1<<14 {
			t.Skip()
		}
		s, a := &Server{}, &Agent{}
		_, serr := decode("/d/f", data, s, s.complete)
		_, aerr := decode("/d/f", data, a, a.complete)
		for _, err := range []error{serr, aerr} {
			var found strictyaml.Findings
			if err != nil && !errors.As(err, &found) {
				t.Fatalf("no findings but %v", err)
			}
			for _, one := range found {
				if one.Message == "" || len(one.Message) > 4096 || strings.ContainsAny(one.Message, "\x00\x1b\n") {
					t.Fatalf("finding %q", one.Message)
				}
			}
		}
		if serr == nil && (s.TrustDomain.IsZero() || s.Leaf.TTL < identity.MinTTL || s.Leaf.TTL > s.Leaf.MaxTTL || !filepath.IsAbs(s.StateDir)) {
			t.Fatalf("accepted %+v", s)
		}
	})
}
