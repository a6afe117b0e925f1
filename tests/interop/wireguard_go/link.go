package main

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.zx2c4.com/wireguard/conn"
)

func dial(address string) (*net.UDPConn, error) {
	remote, err := net.ResolveUDPAddr("udp", address)
	if err != nil {
		return nil, err
	}
	return net.DialUDP("udp", nil, remote)
}

// linkBind carries the messages of all peers over one connected socket. Endpoints are names only: what is behind
// the socket decides where a message goes.
type linkBind struct {
	socket *net.UDPConn
	closed atomic.Bool
}

func (b *linkBind) Open(uint16) ([]conn.ReceiveFunc, uint16, error) {
	b.closed.Store(false)
	if err := b.socket.SetReadDeadline(time.Time{}); err != nil {
		return nil, 0, err
	}
	return []conn.ReceiveFunc{b.receive}, uint16(b.socket.LocalAddr().(*net.UDPAddr).Port), nil
}

// Close only wakes the reader: the device closes a bind before each time that it opens it.
func (b *linkBind) Close() error {
	b.closed.Store(true)
	return b.socket.SetReadDeadline(time.Now())
}

func (b *linkBind) receive(packets [][]byte, sizes []int, endpoints []conn.Endpoint) (int, error) {
	for {
		n, err := b.socket.Read(packets[0])
		switch {
		case b.closed.Load():
			return 0, net.ErrClosed
		case isTransient(err):
			continue
		case err != nil:
			return 0, err
		}
		sizes[0] = n
		endpoints[0] = linkEndpoint(b.socket.RemoteAddr().(*net.UDPAddr).AddrPort())
		return 1, nil
	}
}

func (b *linkBind) Send(packets [][]byte, _ conn.Endpoint) error {
	for _, packet := range packets {
		if _, err := b.socket.Write(packet); err != nil && !isTransient(err) {
			return err
		}
	}
	return nil
}

func (b *linkBind) ParseEndpoint(text string) (conn.Endpoint, error) {
	address, err := netip.ParseAddrPort(text)
	return linkEndpoint(address), err
}

func (b *linkBind) SetMark(uint32) error { return nil }
func (b *linkBind) BatchSize() int       { return 1 }

type linkEndpoint netip.AddrPort

func (e linkEndpoint) ClearSrc()           {}
func (e linkEndpoint) SrcToString() string { return "" }
func (e linkEndpoint) SrcIP() netip.Addr   { return netip.Addr{} }
func (e linkEndpoint) DstToString() string { return netip.AddrPort(e).String() }
func (e linkEndpoint) DstIP() netip.Addr   { return netip.AddrPort(e).Addr() }
func (e linkEndpoint) DstToBytes() []byte {
	bytes, _ := netip.AddrPort(e).MarshalBinary()
	return bytes
}

// A connected UDP socket reports that nobody listened to an earlier datagram; a link has no such memory.
func isTransient(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, os.ErrDeadlineExceeded)
}
