package identity

import (
	"path"
	"strings"
	"testing"
)

func TestTheCgroupIsTheUnifiedOneOrSystemds(t *testing.T) {
	for name, c := range map[string]struct{ text, cgroup, about string }{
		"version 2":             {"0::/system.slice/web.service\n", "/system.slice/web.service", ""},
		"hybrid":                {"12:pids:/x\n1:name=systemd:/system.slice/web.service\n0::/system.slice/web.service\n", "/system.slice/web.service", ""},
		"version 1":             {"12:cpu,cpuacct:/y\n1:name=systemd:/system.slice/web.service\n", "/system.slice/web.service", ""},
		"version 1 and a root":  {"1:name=systemd:/system.slice/web.service\n0::/\n", "/system.slice/web.service", ""},
		"unified wins":          {"1:name=systemd:/a\n0::/b\n", "/b", ""},
		"colon in the path":     {"0::/a:b/c\n", "/a:b/c", ""},
		"no newline at the end": {"0::/a", "/a", ""},
		"root":                  {"0::/\n", "", "no cgroup but the root"},
		"nothing":               {"", "", "no cgroup but the root"},
		"controllers only":      {"3:memory:/evil.service\n", "", "no cgroup but the root"},
		"another named":         {"3:name=elogind:/evil.service\n", "", "no cgroup but the root"},
		"removed":               {"0::/a.service (deleted)\n", "", "removed"},
		"outside":               {"0::/../../a.service\n", "", "outside"},
		"relative":              {"0::a.service\n", "", "plain path"},
		"unclean":               {"0::/a//b\n", "", "plain path"},
		"not a cgroup file":     {"hello\n", "", "ID:CONTROLLERS:PATH"},
	} {
		cgroup, err := parseCgroup([]byte(c.text))
		if cgroup != c.cgroup || (err == nil) != (c.about == "") || err != nil && !strings.Contains(err.Error(), c.about) {
			t.Errorf("%s: %q %v", name, cgroup, err)
		}
	}
}

func TestTheUnitIsTheSystemsNotWhatIsCalledSoBelowIt(t *testing.T) {
	for cgroup, want := range map[string]string{
		"/system.slice/web.service":              "web.service",
		"/init.scope":                            "init.scope",
		"/web.service":                           "web.service",
		"/a.slice/a-b.slice/web@1.service":       "web@1.service",
		"/system.slice/docker-0123.scope/init":   "docker-0123.scope",
		"/system.slice/evil.service/web.service": "evil.service", // delegated: made by evil.service
		"/user.slice/user-1000.slice/user@1000.service/app.slice/web.service":   "user@1000.service",
		"/user.slice/user-1000.slice/session-2.scope":                           "session-2.scope",
		"/system.slice/_cpu.service":                                            "cpu.service",
		"/kubepods/burstable/pod1/web.service":                                  "",
		"/kubepods.slice/kubepods-pod1.slice/cri-containerd-01.scope/x.service": "cri-containerd-01.scope",
		"/machine/web.service":                                                  "",
		"/system.slice":                                                         "",
		"/system.slice/web.socket":                                              "",
		"/system.slice/.service":                                                "",
		"/system.slice/a b.service":                                             "",
		"/system.slice/a\nb.service":                                            "",
		"/system.slice/" + strings.Repeat("a", 248) + ".service":                "",
		"/system.slice/systemd-fsck@dev-disk-by\\x2dlabel-x.service":            "systemd-fsck@dev-disk-by\\x2dlabel-x.service",
		"/": "",
	} {
		if have := systemdUnit(cgroup); have != want {
			t.Errorf("%q: %q, want %q", cgroup, have, want)
		}
	}
}

func FuzzParseCgroup(f *testing.F) {
	for _, s := range []string{"0::/system.slice/web.service\n", "1:name=systemd:/a\n0::/\n", "0::/../x\n", ":::\n", "0::/a (deleted)", "\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		cgroup, err := parseCgroup(text)
		if err != nil {
			return
		}
		if !path.IsAbs(cgroup) || path.Clean(cgroup) != cgroup || cgroup == "/" || strings.HasPrefix(cgroup, "/..") || !strings.Contains(string(text), cgroup) {
			t.Fatalf("%q from %q", cgroup, text)
		}
		if unit := systemdUnit(cgroup); unit != "" {
			if _, err := ParseSelector("systemd:unit:" + unit); err != nil {
				t.Fatalf("unit %q of %q: %v", unit, cgroup, err)
			}
		}
	})
}
