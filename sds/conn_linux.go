package sds

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// peerCredentials asks the kernel who connected a Unix socket.
func peerCredentials(conn net.Conn) (pid int32, uid uint32, ok bool) {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return 0, 0, false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return 0, 0, false
	}
	var ucred *unix.Ucred
	var sockErr error
	if err := raw.Control(func(fd uintptr) {
		ucred, sockErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil || sockErr != nil {
		return 0, 0, false
	}
	return ucred.Pid, ucred.Uid, true
}
