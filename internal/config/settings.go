package config

import (
	"fmt"
	"strings"
	"time"

	"github.com/signet-ca/signet/internal/strictyaml"
)

// Setting is one value and where it comes from.
type Setting struct {
	Key   string `json:"key"`
	Value string `json:"value"`
	// Source is "default" or file:line.
	Source string `json:"source"`
}

// settings lists the values of a loaded struct in the order of its fields.
func (o origin) settings(of any) []Setting {
	var out []Setting
	for key, value := range strictyaml.Values(of) {
		s := Setting{Key: key, Source: "default"}
		switch v := value.(type) {
		case time.Duration:
			s.Value = short(v)
		case []Socket, []Peer: // None: others have a setting each.
		default:
			s.Value = fmt.Sprint(v)
		}
		if source, ok := o.Source(key); ok {
			s.Source = source
		}
		out = append(out, s)
	}
	return out
}

// short writes 24h0m0s as 24h.
func short(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}
