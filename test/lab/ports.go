package lab

import (
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
)

// Ports below those that the kernel gives to outgoing connections: one of these might take them before they are used.
const (
	firstPort  = 10_000
	portBlocks = 200
	blockSize  = 100
	maxBlocks  = 20 // of one process; then it begins again with its first
)

// portsGiven hands out blocks of ports one after the other. Tests look for ports in many processes at once, and much can pass until
// they are listened on: so a block is one process's, which listens on the block's first port as long as it lives.
var portsGiven struct {
	sync.Mutex
	blocks []net.Listener
	turns  int // blocks begun
	next   int
	left   int
}

// FreePorts finds ports that nobody listens on, and that nobody else who asks here is given.
func FreePorts(n int) ([]int, error) {
	g := &portsGiven
	g.Lock()
	defer g.Unlock()
	var ports []int
	for tries := 0; len(ports) < n; tries++ {
		if tries == 1000 {
			return nil, fmt.Errorf("find %d free ports from %d to %d: none are left", n, firstPort, firstPort+portBlocks*blockSize-1)
		}
		if g.left == 0 {
			if err := beginBlock(); err != nil {
				return nil, err
			}
		}
		port := g.next
		g.next, g.left = g.next+1, g.left-1
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue // somebody else's
		}
		l.Close()
		ports = append(ports, port)
	}
	return ports, nil
}

// beginBlock goes on with a block that nobody else has.
func beginBlock() error {
	g := &portsGiven
	if len(g.blocks) < maxBlocks {
		for _, i := range rand.Perm(portBlocks) { //nolint:gosec // no secret
			if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", firstPort+i*blockSize)); err == nil {
				g.blocks = append(g.blocks, l)
				break
			}
		}
	}
	if len(g.blocks) == 0 {
		return fmt.Errorf("find free ports: all %d blocks of ports are taken", portBlocks)
	}
	block := g.blocks[g.turns%len(g.blocks)]
	g.turns++
	g.next, g.left = block.Addr().(*net.TCPAddr).Port+1, blockSize-1
	return nil
}
