package config

import (
	"fmt"
	"reflect"
	"slices"
)

// Role is whose configuration a file is.
type Role string

// The roles.
const (
	RoleServer Role = "server"
	RoleAgent  Role = "agent"
)

var roots = map[Role]reflect.Type{
	RoleServer: reflect.TypeFor[Server](),
	RoleAgent:  reflect.TypeFor[Agent](),
}

// RoleOf tells from a file's keys whose configuration it is: the one that knows more of them.
func RoleOf(path string) (Role, error) {
	data, err := read(path)
	if err != nil {
		return "", err
	}
	o := origin{file: path}
	doc, ok := o.document(data)
	if !ok {
		return "", o.result()
	}
	known := map[Role]int{}
	if doc != nil {
		for i := 0; i+1 < len(doc.Content); i += 2 {
			for role, t := range roots {
				if slices.Contains(keysOf(t), doc.Content[i].Value) {
					known[role]++
				}
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
