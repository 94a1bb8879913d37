package config

import (
	"fmt"
	"reflect"
	"strings"
	"time"
)

// Setting is one value and where it comes from.
type Setting struct {
	Key   string `json:"key"`
	Value string `json:"value"`
	// Source is "default" or file:line.
	Source string `json:"source"`
}

// settings lists the values of a loaded struct in the order of its fields.
func (o *origin) settings(of any) []Setting {
	var out []Setting
	o.list("", reflect.ValueOf(of).Elem(), &out)
	return out
}

func (o *origin) list(key string, v reflect.Value, out *[]Setting) {
	switch {
	case v.Type() == durationType:
		o.setting(key, short(time.Duration(v.Int())), out)
	case v.Kind() == reflect.Slice:
		for i := range v.Len() {
			o.list(fmt.Sprintf("%s[%d]", key, i), v.Index(i), out)
		}
		if v.Len() == 0 {
			o.setting(key, "", out)
		}
	case isSection(v):
		for _, i := range fieldIndexes(v.Type()) {
			o.list(join(key, v.Type().Field(i).Tag.Get("yaml")), v.Field(i), out)
		}
	default:
		o.setting(key, fmt.Sprint(v.Interface()), out)
	}
}

func (o *origin) setting(key, value string, out *[]Setting) {
	s := Setting{Key: key, Value: value, Source: "default"}
	if p, ok := o.at[key]; ok {
		s.Source = fmt.Sprintf("%s:%d", o.file, p.line)
	}
	*out = append(*out, s)
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
