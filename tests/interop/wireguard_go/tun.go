package main

import (
	"net"
	"os"
	"sync"

	"golang.zx2c4.com/wireguard/tun"
)

// datagramTun exchanges one inner packet per datagram.
type datagramTun struct {
	socket *net.UDPConn
	mtu    int
	events chan tun.Event
	once   sync.Once
}

func newDatagramTun(socket *net.UDPConn, mtu int) *datagramTun {
	return &datagramTun{socket: socket, mtu: mtu, events: make(chan tun.Event)}
}

func (t *datagramTun) Read(packets [][]byte, sizes []int, offset int) (int, error) {
	for {
		n, err := t.socket.Read(packets[0][offset:])
		if isTransient(err) {
			continue
		}
		if err != nil {
			return 0, os.ErrClosed
		}
		sizes[0] = n
		return 1, nil
	}
}

func (t *datagramTun) Write(packets [][]byte, offset int) (int, error) {
	for i, packet := range packets {
		if _, err := t.socket.Write(packet[offset:]); err != nil && !isTransient(err) {
			return i, err
		}
	}
	return len(packets), nil
}

func (t *datagramTun) Close() error {
	t.once.Do(func() { close(t.events) })
	return t.socket.Close()
}

func (t *datagramTun) File() *os.File           { return nil }
func (t *datagramTun) MTU() (int, error)        { return t.mtu, nil }
func (t *datagramTun) Name() (string, error)    { return "datagrams", nil }
func (t *datagramTun) Events() <-chan tun.Event { return t.events }
func (t *datagramTun) BatchSize() int           { return 1 }
