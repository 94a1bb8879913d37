package lab

import (
	"net"
	"slices"
	"strconv"
	"sync"
	"testing"
)

func TestNobodyIsGivenAPortTwice(t *testing.T) {
	var mu sync.Mutex
	var all []int
	var askers sync.WaitGroup
	for range 10 {
		askers.Go(func() {
			for range 6 {
				ports, err := FreePorts(5)
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				all = append(all, ports...)
				mu.Unlock()
			}
		})
	}
	askers.Wait()
	slices.Sort(all)
	if n := len(slices.Compact(slices.Clone(all))); n != 300 || len(all) != 300 {
		t.Errorf("%d ports, %d of them different: want 300", len(all), n)
	}
	for _, port := range all {
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			t.Error(err)
			continue
		}
		l.Close()
	}
	// Another process looks at the first port of a block, and finds it taken.
	for _, b := range portsGiven.blocks {
		if l, err := net.Listen("tcp", b.Addr().String()); err == nil {
			l.Close()
			t.Errorf("%s, the first of a block, is not held", b.Addr())
		}
	}
}
