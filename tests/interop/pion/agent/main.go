// A controlling ICE agent by pion/ice. The caller plays the portal with one JSON object a line: orders on standard
// input, events on standard output. What the agent carries is exchanged as datagrams with whoever writes to the
// address in the event "bridge". End of input ends the program.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"log"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"

	"github.com/pion/ice/v4"
	"github.com/pion/stun/v4"
)

// Order is the union of all orders, told apart by Do.
type Order struct {
	Do string `json:"do"`

	// "gather": make the agent and find its candidates; "candidates" follows.
	Ufrag     string   `json:"ufrag"`
	Password  string   `json:"password"`
	Address   string   `json:"address"` // of the host candidate, without a port
	Kinds     []string `json:"kinds"`
	Relay     string   `json:"relay"` // address of the TURN server
	RelayUser string   `json:"relay_user"`
	RelayPass string   `json:"relay_password"`

	// "connect": check and nominate, with these credentials of the other side.
	RemoteUfrag    string `json:"remote_ufrag"`
	RemotePassword string `json:"remote_password"`

	// "add_remote": a candidate of the other side.
	Line string `json:"line"`

	// "block": lose what comes from this address.
	From string `json:"from"`
}

var output sync.Mutex

func tell(event string, details map[string]any) {
	if details == nil {
		details = map[string]any{}
	}
	details["event"] = event
	output.Lock()
	defer output.Unlock()
	exitOn(json.NewEncoder(os.Stdout).Encode(details))
}

func main() {
	var agent *ice.Agent
	var socket *filter
	input := bufio.NewScanner(os.Stdin)
	for input.Scan() {
		var order Order
		exitOn(json.Unmarshal(input.Bytes(), &order))
		switch order.Do {
		case "gather":
			socket = listen(order.Address)
			agent = gather(order, socket)
		case "connect":
			go connect(agent, order)
		case "add_remote":
			candidate, err := ice.UnmarshalCandidate(order.Line)
			if err == nil {
				err = agent.AddRemoteCandidate(candidate)
			}
			if err != nil {
				tell("bad_candidate", map[string]any{"line": order.Line, "error": err.Error()})
			}
		case "block":
			socket.blocked.Store(order.From, true)
		default:
			log.Fatalf("unknown order %q", order.Do)
		}
	}
}

func gather(order Order, socket *filter) *ice.Agent {
	kinds := []ice.CandidateType{}
	for _, kind := range order.Kinds {
		kinds = append(kinds, map[string]ice.CandidateType{
			"host": ice.CandidateTypeHost, "relay": ice.CandidateTypeRelay,
		}[kind])
	}
	options := []ice.AgentOption{
		ice.WithLocalCredentials(order.Ufrag, order.Password),
		ice.WithCandidateTypes(kinds),
		ice.WithNetworkTypes([]ice.NetworkType{ice.NetworkTypeUDP4, ice.NetworkTypeUDP6}),
		ice.WithMulticastDNSMode(ice.MulticastDNSModeDisabled),
		ice.WithIncludeLoopback(),
		ice.WithUDPMux(ice.NewUDPMuxDefault(ice.UDPMuxParams{UDPConn: socket})),
		ice.WithRelayAcceptanceMinWait(0),
		ice.WithPrflxAcceptanceMinWait(0),
	}
	if order.Relay != "" {
		server, err := netip.ParseAddrPort(order.Relay)
		exitOn(err)
		options = append(options, ice.WithUrls([]*stun.URI{{
			Scheme: stun.SchemeTypeTURN, Host: server.Addr().String(), Port: int(server.Port()),
			Proto: stun.ProtoTypeUDP, Username: order.RelayUser, Password: order.RelayPass,
		}}))
	}
	agent, err := ice.NewAgentWithOptions(options...)
	exitOn(err)
	exitOn(agent.OnConnectionStateChange(func(state ice.ConnectionState) {
		tell("state", map[string]any{"state": state.String()})
	}))
	exitOn(agent.OnSelectedCandidatePairChange(func(local, remote ice.Candidate) {
		tell("selected", map[string]any{"local": local.Type().String(), "remote": remote.Type().String()})
	}))
	lines := []string{}
	exitOn(agent.OnCandidate(func(candidate ice.Candidate) {
		if candidate == nil {
			tell("candidates", map[string]any{"lines": lines})
			return
		}
		lines = append(lines, "candidate:"+candidate.Marshal())
	}))
	exitOn(agent.GatherCandidates())
	return agent
}

func connect(agent *ice.Agent, order Order) {
	link, err := agent.Dial(context.Background(), order.RemoteUfrag, order.RemotePassword)
	exitOn(err)
	bridge, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	exitOn(err)
	var inside atomic.Pointer[netip.AddrPort]
	go func() {
		buffer := make([]byte, 2048)
		for {
			length, err := link.Read(buffer)
			exitOn(err)
			if to := inside.Load(); to != nil {
				_, _ = bridge.WriteToUDPAddrPort(buffer[:length], *to)
			}
		}
	}()
	tell("bridge", map[string]any{"address": bridge.LocalAddr().String()})
	buffer := make([]byte, 2048)
	for {
		length, from, err := bridge.ReadFromUDPAddrPort(buffer)
		exitOn(err)
		inside.Store(&from)
		_, err = link.Write(buffer[:length])
		exitOn(err)
	}
}

// filter is a socket that loses what comes from the blocked addresses.
type filter struct {
	*net.UDPConn
	blocked sync.Map
}

func listen(host string) *filter {
	socket, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(host)})
	exitOn(err)
	return &filter{UDPConn: socket}
}

func (f *filter) ReadFrom(buffer []byte) (int, net.Addr, error) {
	for {
		length, from, err := f.UDPConn.ReadFrom(buffer)
		if err != nil {
			return 0, nil, err
		}
		if _, blocked := f.blocked.Load(from.String()); !blocked {
			return length, from, nil
		}
	}
}

func exitOn(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
