package config

import (
	"fmt"
	"slices"

	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/internal/strictyaml"
)

// Role is whose configuration a file is.
type Role string

// The roles.
const (
	RoleServer Role = "server"
	RoleAgent  Role = "agent"
)

var roots = map[Role]any{RoleServer: Server{}, RoleAgent: Agent{}}

// otherRole says where a key belongs that the file's own role doesn't know.
func otherRole(key string) string {
	for role, v := range roots {
		if slices.Contains(strictyaml.KeysOf(v), key) {
			return fmt.Sprintf("it belongs into the configuration of the %s", role)
		}
	}
	return ""
}

// RoleOf tells from a file's keys whose configuration it is: the one that knows more of them.
func RoleOf(path string) (Role, error) {
	text, err := durable.ReadFile(path, "configuration", maxFile)
	if err != nil {
		return "", err
	}
	keys, err := strictyaml.Keys(path, text)
	if err != nil {
		return "", err
	}
	known := map[Role]int{}
	for role, v := range roots {
		of := strictyaml.KeysOf(v)
		for _, key := range keys {
			if slices.Contains(of, key) {
				known[role]++
			}
		}
	}
	switch {
	case known[RoleServer] > known[RoleAgent]:
		return RoleServer, nil
	case known[RoleAgent] > known[RoleServer]:
		return RoleAgent, nil
	}
	return "", fmt.Errorf("configuration %s: its keys don't tell whether it is a server's or an agent's: say --role server or --role agent", path)
}
