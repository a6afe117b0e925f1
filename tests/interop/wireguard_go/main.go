// Runs wireguard-go's device between a TUN and a network that the caller chooses, both of which may be plain
// datagram sockets, and speaks WireGuard's configuration protocol on standard input and output.
//
// The first line of output is "ready link=ADDRESS tun=ADDRESS-OR-NAME". Then requests are answered as on the usual
// configuration socket: "set=1" and "get=1", and, beyond it, "handshake=PUBLIC_KEY_IN_HEX", which initiates.
// End of input ends the program.
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"strings"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
)

func main() {
	link := flag.String("link", "", "exchange WireGuard messages as datagrams with this UDP `address`, whatever the endpoint; default: wireguard-go's own sockets")
	name := flag.String("tun", "", "`name` of the TUN device to make, or udp:ADDRESS to exchange inner packets as datagrams with it")
	mtu := flag.Int("mtu", 1280, "of the TUN")
	verbose := flag.Bool("verbose", false, "log handshakes and more to standard error")
	flag.Parse()
	if *name == "" || flag.NArg() != 0 {
		flag.Usage()
		os.Exit(2)
	}

	bind, linkName := conn.NewDefaultBind(), "sockets"
	if *link != "" {
		socket, err := dial(*link)
		exitOn(err)
		bind, linkName = &linkBind{socket: socket}, socket.LocalAddr().String()
	}
	inner, tunName, err := openTun(*name, *mtu)
	exitOn(err)

	level := device.LogLevelError
	if *verbose {
		level = device.LogLevelVerbose
	}
	dev := device.NewDevice(inner, bind, device.NewLogger(level, ""))
	exitOn(dev.Up())
	fmt.Printf("ready link=%s tun=%s\n", linkName, tunName)
	exitOn(serve(dev, bufio.NewReader(os.Stdin), os.Stdout))
	dev.Close()
}

func openTun(name string, mtu int) (tun.Device, string, error) {
	if address, ok := strings.CutPrefix(name, "udp:"); ok {
		socket, err := dial(address)
		if err != nil {
			return nil, "", err
		}
		return newDatagramTun(socket, mtu), socket.LocalAddr().String(), nil
	}
	inner, err := tun.CreateTUN(name, mtu)
	if err != nil {
		return nil, "", err
	}
	name, err = inner.Name()
	return inner, name, err
}

func serve(dev *device.Device, requests *bufio.Reader, answers io.Writer) error {
	for {
		operation, err := requests.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		operation = strings.TrimSpace(operation)
		if operation == "" {
			continue
		}
		body := new(strings.Builder)
		switch {
		case operation == "set=1":
			err = dev.IpcSetOperation(requests)
		case operation == "get=1":
			err = dev.IpcGetOperation(body)
		case strings.HasPrefix(operation, "handshake="):
			err = initiate(dev, strings.TrimPrefix(operation, "handshake="))
		default:
			err = fmt.Errorf("unknown operation %q", operation)
		}
		status := 0
		if err != nil {
			status = 1
			fmt.Fprintln(os.Stderr, err)
		}
		if _, err := fmt.Fprintf(answers, "%serrno=%d\n\n", body, status); err != nil {
			return err
		}
	}
}

func initiate(dev *device.Device, publicKey string) error {
	var key device.NoisePublicKey
	if err := key.FromHex(publicKey); err != nil {
		return err
	}
	peer := dev.LookupPeer(key)
	if peer == nil {
		return fmt.Errorf("unknown peer %s", publicKey)
	}
	return peer.SendHandshakeInitiation(false)
}

func exitOn(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
