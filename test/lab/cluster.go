package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/signet-ca/signet/test/doors"
)

// MakeRoot makes the offline root in root/.
func (l *Lab) MakeRoot(ctx context.Context) (err error) {
	l.RootFingerprint, err = l.MakeRootIn(ctx, "root")
	return err
}

// MakeRootIn makes an offline root in a folder, with its passphrase in <dir>.pass, and returns its fingerprint.
func (l *Lab) MakeRootIn(ctx context.Context, dir string) (fingerprint string, err error) {
	if err := l.Passphrase(dir + ".pass"); err != nil {
		return "", err
	}
	if _, err := l.Run(ctx, "root", "init", "--trust-domain", TrustDomain, "--dir", dir, "--passphrase-file", dir+".pass"); err != nil {
		return "", err
	}
	var root struct {
		Fingerprint string `json:"fingerprint"`
	}
	if err := l.JSON(ctx, &root, "root", "show", "--dir", dir); err != nil {
		return "", err
	}
	if root.Fingerprint == "" {
		return "", errors.New("root show gives no fingerprint")
	}
	return root.Fingerprint, nil
}

// Cluster is one installation: addresses of its server's doors, and its folder.
type Cluster struct {
	Lab                 *Lab
	Name                string
	Enrol, Agents, HTTP string
	// Keystore is what the configuration's block of that name has besides the passphrase: lines, indented by two spaces.
	Keystore string
}

// NewCluster writes the server's configuration and passphrase. extra is appended to the configuration.
func (l *Lab) NewCluster(name, extra string) (*Cluster, error) {
	if err := l.Passphrase(name + "/server.pass"); err != nil {
		return nil, err
	}
	return l.Cluster(name, extra)
}

// Cluster is the one that was made in a folder of this lab before, at new addresses.
func (l *Lab) Cluster(name, extra string) (*Cluster, error) {
	ports, err := FreePorts(3)
	if err != nil {
		return nil, err
	}
	addr := func(i int) string { return fmt.Sprintf("127.0.0.1:%d", ports[i]) }
	c := &Cluster{Lab: l, Name: name, Enrol: addr(0), Agents: addr(1), HTTP: addr(2)}
	return c, errors.Join(os.MkdirAll(c.Path("run"), 0o700), c.Configure(extra))
}

// Configure writes the server's configuration anew, with something else appended to it.
func (c *Cluster) Configure(extra string) error {
	return c.Lab.Write(c.Name+"/server.yaml", fmt.Sprintf(`trust_domain: %s
cluster: %s
state_dir: ./state
keystore:
  passphrase_file: ./server.pass
%slisten:
  enrol: %s
  agents: %s
  http: %s
%s`, TrustDomain, c.Name, c.Keystore, c.Enrol, c.Agents, c.HTTP, extra))
}

// Path is a path in the cluster's folder.
func (c *Cluster) Path(elem ...string) string {
	return filepath.Join(append([]string{c.Lab.Dir, c.Name}, elem...)...)
}

// Config is the path of the server's configuration.
func (c *Cluster) Config() string { return c.Path("server.yaml") }

// Initialize runs `cluster init` and returns the fingerprint of the intermediate's key.
func (c *Cluster) Initialize(ctx context.Context) (string, error) {
	out, err := c.Lab.Run(ctx, "cluster", "init", "--config", c.Config(), "--csr-out", c.Path("intermediate.csr"))
	return strings.TrimSpace(out), err
}

// SignArgs is the ceremony on the root's side.
func (c *Cluster) SignArgs(fingerprint string) []string {
	return []string{
		"root", "sign", "--dir", "root", "--passphrase-file", "root.pass", "--cluster", c.Name,
		"--csr", c.Path("intermediate.csr"), "--fingerprint", fingerprint, "--out", c.Path("chain.pem"),
	}
}

// InstallArgs is the ceremony's end on the cluster's side.
func (c *Cluster) InstallArgs(rootFingerprint string) []string {
	return []string{"cluster", "install", "--config", c.Config(), "--chain", c.Path("chain.pem"), "--root-fingerprint", rootFingerprint}
}

// Join runs the whole ceremony; more goes to its end, `cluster install`.
func (c *Cluster) Join(ctx context.Context, more ...string) error {
	fp, err := c.Initialize(ctx)
	if err != nil {
		return err
	}
	if _, err := c.Lab.Run(ctx, c.SignArgs(fp)...); err != nil {
		return err
	}
	_, err = c.Lab.Run(ctx, append(c.InstallArgs(c.Lab.RootFingerprint), more...)...)
	return err
}

// Serve starts the server and waits until it is ready.
func (c *Cluster) Serve(ctx context.Context) (*Process, error) {
	p, err := c.Lab.Start(c.Name+"-server", "serve", "--config", c.Config())
	if err != nil {
		return nil, err
	}
	return p, Ready(ctx, c.Name+"'s server", c.HTTP)
}

// Token makes a join token.
func (c *Cluster) Token(ctx context.Context, agent string) (string, error) {
	out, err := c.Lab.Run(ctx, "join-token", "create", "--config", c.Config(), "--agent", agent)
	return strings.TrimSpace(out), err
}

// Apply applies registrations, given as YAML.
func (c *Cluster) Apply(ctx context.Context, yaml string) error {
	if err := c.Lab.Write(c.Name+"/registrations.yaml", yaml); err != nil {
		return err
	}
	_, err := c.Lab.Run(ctx, "registration", "apply", "--config", c.Config(), "-f", c.Path("registrations.yaml"))
	return err
}

// Member enrols an agent of the caller's own, which speaks the doors' protocol by itself.
func (c *Cluster) Member(ctx context.Context, agent string) (*doors.Member, error) {
	token, err := c.Token(ctx, agent)
	if err != nil {
		return nil, err
	}
	return doors.Enrol(ctx, token)
}

// Agent is a `signet agent` of the cluster.
type Agent struct {
	*Process
	Token, HTTP, Socket string
	cluster             *Cluster
	name                string
}

// NewAgent makes the token and the configuration of an agent; sockets are the names of dedicated ones, at run/<name>.sock.
func (c *Cluster) NewAgent(ctx context.Context, name string, sockets ...string) (*Agent, error) {
	ports, err := FreePorts(1)
	if err != nil {
		return nil, err
	}
	token, err := c.Token(ctx, name)
	if err != nil {
		return nil, err
	}
	a := &Agent{Token: token, HTTP: fmt.Sprintf("127.0.0.1:%d", ports[0]), Socket: c.Path("run", name+".sock"), cluster: c, name: name}
	conf := fmt.Sprintf("state_dir: ./%[1]s\njoin_token_file: ./%[1]s.token\nsocket: ./run/%[1]s.sock\nhttp: %[2]s\n", name, a.HTTP)
	for i, s := range sockets {
		if i == 0 {
			conf += "sockets:\n"
		}
		conf += fmt.Sprintf("  - { name: %[1]s, path: ./run/%[1]s.sock }\n", s)
	}
	return a, errors.Join(c.Lab.Write(c.Name+"/"+name+".token", token+"\n"), c.Lab.Write(c.Name+"/"+name+".yaml", conf))
}

// Config is the path of the agent's configuration.
func (a *Agent) Config() string { return a.cluster.Path(a.name + ".yaml") }

// Start starts the agent, once more if it has ended, and waits until it is ready.
func (a *Agent) Start(ctx context.Context) error {
	var err error
	if a.Process, err = a.cluster.Lab.Start(a.cluster.Name+"-"+a.name, "agent", "--config", a.Config()); err != nil {
		return err
	}
	return Ready(ctx, a.cluster.Name+"'s agent "+a.name, a.HTTP)
}

// StartAgent enrols and starts an agent, see NewAgent.
func (c *Cluster) StartAgent(ctx context.Context, name string, sockets ...string) (*Agent, error) {
	a, err := c.NewAgent(ctx, name, sockets...)
	if err != nil {
		return nil, err
	}
	return a, a.Start(ctx)
}
