//! Sockets, ICE agent and tunnel, and the paths between them.

use std::collections::{HashSet, VecDeque};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use is::stun::{StunMessage, StunPacket};
use is::{Candidate, IceAgent, IceAgentEvent, IceCreds, Protocol};
use serde::Deserialize;
use serde_json::json;

use crate::turn::{Allocation, Incoming};
use crate::{Kind, Order, bind, tell};

/// boringtun has timers of a second's precision that it wants to be asked for.
const TICK: Duration = Duration::from_millis(250);
const BUFFERED_PACKETS: usize = 128;
const HANDSHAKE_DEBOUNCE: Duration = Duration::from_secs(20);
/// boringtun's own limit, of responses too, is 10.
const HANDSHAKES_A_SECOND: u64 = 1000;

// WireGuard's message types.
const INITIATION: u8 = 1;
const RESPONSE: u8 = 2;
const COOKIE_REPLY: u8 = 3;
const DATA: u8 = 4;

/// What an authorization says; keys in hexadecimal.
#[derive(Deserialize)]
pub struct Keys {
    local: IceCreds,
    remote: IceCreds,
    private_key: String,
    public_key: String,
    preshared_key: String,
    /// Upper 24 bits of the session indices.
    index: u32,
}

pub struct Client {
    hosts: Vec<Host>,
    relay: Option<Allocation>,
    session: Option<Session>,
    blocked: HashSet<SocketAddr>,
    muted: bool,
    opening: bool,
}

struct Host {
    /// As ICE knows it, whatever the socket's address is by now.
    address: SocketAddr,
    socket: UdpSocket,
}

struct Session {
    agent: IceAgent,
    tunnel: Tunn,
    limiter: Arc<RateLimiter>,
    offered: Vec<(Kind, Candidate)>,
    path: Option<(SocketAddr, SocketAddr)>,
    initiated_at: Option<Instant>,
    next_tick: Instant,
    buffered: VecDeque<Vec<u8>>,
}

impl Client {
    pub fn new() -> Self {
        Client { hosts: Vec::new(), relay: None, session: None, blocked: HashSet::new(), muted: false, opening: false }
    }

    pub fn sockets(&self) -> impl Iterator<Item = &UdpSocket> {
        self.hosts.iter().map(|host| &host.socket)
    }

    pub fn receive(&self, index: usize, buffer: &mut [u8]) -> Option<(usize, SocketAddr)> {
        self.hosts[index].socket.recv_from(buffer).ok()
    }

    /// When `handle_timeout` has something to do.
    pub fn deadline(&mut self) -> Instant {
        let relay = self.relay.as_ref().and_then(Allocation::deadline);
        let session = self.session.as_mut().map(|session| match session.agent.poll_timeout() {
            Some(due) => due.min(session.next_tick),
            None => Instant::now(),
        });
        let far = Instant::now() + Duration::from_secs(3600);
        relay.into_iter().chain(session).min().unwrap_or(far)
    }

    pub fn handle_order(&mut self, order: Order, now: Instant) {
        match order {
            Order::Open { hosts, relay } => {
                self.hosts = hosts.into_iter().map(Host::open).collect();
                self.relay = relay.map(|credentials| Allocation::new(credentials, now));
                self.opening = true;
                self.flush_relay();
                self.tell_opened();
            }
            Order::Connect { keys, offer } => {
                self.session = Some(Session::new(keys, now));
                self.offer(&offer);
            }
            Order::Offer { kinds } => self.offer(&kinds),
            Order::Withdraw { kinds } => self.withdraw(&kinds),
            Order::AddRemote { line } => self.add_remote(&line, now),
            Order::RemoveRemote { line } => {
                let candidate = Candidate::from_sdp_string(&line).expect("a candidate");
                let found = self.session().agent.invalidate_candidate(&candidate);
                tell("removed", json!({"found": found, "line": line}));
            }
            Order::Send { packet } => {
                let packet = hex::decode(packet).expect("hexadecimal");
                self.send_packet(packet, now);
            }
            Order::Handshake => self.initiate(now),
            Order::Rebind => {
                for host in &mut self.hosts {
                    host.socket = bind(SocketAddr::new(host.address.ip(), 0));
                }
            }
            Order::Block { addresses } => self.blocked = addresses,
            Order::Mute { muted } => self.muted = muted,
        }
        self.drive(now);
    }

    pub fn handle_datagram(&mut self, index: usize, source: SocketAddr, datagram: &[u8], now: Instant) {
        let local = self.hosts[index].address;
        if let Some(relay) = self.relay.as_mut().filter(|relay| relay.server == source) {
            match relay.handle(datagram, now) {
                Incoming::Data { peer, length } => {
                    let local = relay.relayed.expect("channels come after the allocation");
                    self.handle_payload(peer, local, &datagram[4..4 + length], now);
                }
                Incoming::Control => {
                    self.flush_relay();
                    self.tell_opened();
                }
                Incoming::Unknown => tell("unknown", json!({"from": source})),
            }
        } else {
            self.handle_payload(source, local, datagram, now);
        }
        self.drive(now);
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        if let Some(relay) = &mut self.relay {
            relay.handle_timeout(now);
            self.flush_relay();
        }
        if let Some(session) = self.session.as_mut().filter(|session| session.next_tick <= now) {
            session.next_tick = now + TICK;
            session.limiter.reset_count();
            let mut buffer = [0; 2048];
            match session.tunnel.update_timers(&mut buffer) {
                TunnResult::WriteToNetwork(message) => {
                    let message = message.to_vec();
                    self.send_message(&message, now);
                }
                TunnResult::Err(error) => tell("wireguard_error", json!({"error": format!("{error:?}")})),
                _ => {}
            }
        }
        self.drive(now);
    }

    fn handle_payload(&mut self, source: SocketAddr, local: SocketAddr, payload: &[u8], now: Instant) {
        if self.blocked.contains(&source) || self.session.is_none() {
            return;
        }
        if let Ok(message) = StunMessage::parse(payload) {
            let packet = StunPacket { proto: Protocol::Udp, source, destination: local, message };
            self.session().agent.handle_packet(now, packet);
        } else {
            self.handle_message(payload, now);
        }
    }

    /// A WireGuard message, and whatever boringtun kept back until it came.
    fn handle_message(&mut self, message: &[u8], now: Instant) {
        let mut outgoing = Vec::new();
        let tunnel = &mut self.session().tunnel;
        let mut input = message;
        loop {
            let mut buffer = [0; 2048];
            match tunnel.decapsulate(None, input, &mut buffer) {
                TunnResult::WriteToNetwork(answer) => {
                    match input.first() {
                        Some(&RESPONSE) => tell("handshake", json!({"initiator": true})),
                        Some(&INITIATION) => tell("handshake", json!({"initiator": false})),
                        _ => {}
                    }
                    outgoing.push(answer.to_vec());
                }
                TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                    tell("packet", json!({"packet": hex::encode(packet)}));
                    break;
                }
                TunnResult::Err(error) => {
                    tell("wireguard_error", json!({"error": format!("{error:?}"), "type": message.first()}));
                    break;
                }
                TunnResult::Done => {
                    if input.first() == Some(&COOKIE_REPLY) {
                        tell("cookie", json!({}));
                    }
                    break;
                }
            }
            input = &[];
        }
        for message in outgoing {
            self.send_message(&message, now);
        }
    }

    /// Lets the agent do all that is due; a nomination's handshake leaves before its check.
    fn drive(&mut self, now: Instant) {
        while self.session.is_some() {
            while let Some(event) = self.session().agent.poll_event() {
                match event {
                    IceAgentEvent::NominatedSend { source, destination, .. } => self.select(source, destination, now),
                    IceAgentEvent::IceConnectionStateChange(state) => {
                        tell("state", json!({"state": format!("{state:?}")}));
                    }
                    _ => {}
                }
            }
            while let Some(transmit) = self.session().agent.poll_transmit() {
                self.send(transmit.source, transmit.destination, &transmit.contents, now);
            }
            let agent = &mut self.session().agent;
            if agent.poll_timeout().is_some_and(|due| due > now) {
                return;
            }
            agent.handle_timeout(now);
        }
    }

    fn select(&mut self, source: SocketAddr, destination: SocketAddr, now: Instant) {
        tell("nominated", json!({"source": source, "destination": destination}));
        let session = self.session();
        session.path = Some((source, destination));
        let waiting = std::mem::take(&mut session.buffered);
        if session.initiated_at.is_none_or(|at| now >= at + HANDSHAKE_DEBOUNCE) {
            self.initiate(now);
        }
        for packet in waiting {
            self.send_packet(packet, now);
        }
    }

    fn offer(&mut self, kinds: &[Kind]) {
        let mut local = Vec::new();
        for host in &self.hosts {
            local.push((Kind::Host, Candidate::host(host.address, Protocol::Udp).expect("a host")));
        }
        if let Some(relay) = &self.relay {
            let base = self.hosts[0].address;
            if let Some(mapped) = relay.mapped.filter(|mapped| *mapped != base) {
                local.push((Kind::Srflx, Candidate::server_reflexive(mapped, base, Protocol::Udp).expect("a mapping")));
            }
            if let Some(relayed) = relay.relayed {
                local.push((Kind::Relay, Candidate::relayed(relayed, base, Protocol::Udp).expect("a relay")));
            }
        }
        let session = self.session();
        let mut lines = Vec::new();
        for (kind, candidate) in local.into_iter().filter(|(kind, _)| kinds.contains(kind)) {
            if let Some(added) = session.agent.add_local_candidate(candidate.clone()) {
                lines.push(added.to_sdp_string());
                session.offered.push((kind, candidate));
            }
        }
        tell("candidates", json!({"lines": lines}));
    }

    fn withdraw(&mut self, kinds: &[Kind]) {
        let session = self.session();
        let (gone, kept): (Vec<_>, _) =
            std::mem::take(&mut session.offered).into_iter().partition(|(kind, _)| kinds.contains(kind));
        session.offered = kept;
        let lines: Vec<_> = gone.iter().map(|(_, candidate)| candidate.to_sdp_string()).collect();
        for (_, candidate) in &gone {
            session.agent.invalidate_candidate(candidate);
        }
        tell("withdrawn", json!({"lines": lines}));
    }

    fn add_remote(&mut self, line: &str, now: Instant) {
        match Candidate::from_sdp_string(line) {
            Ok(candidate) => {
                let (kind, address) = (candidate.kind(), candidate.addr());
                self.session().agent.add_remote_candidate(candidate);
                if let Some(relay) = self.relay.as_mut().filter(|_| kind != is::CandidateKind::Host) {
                    relay.bind(address, now);
                    self.flush_relay();
                }
            }
            Err(error) => tell("bad_candidate", json!({"line": line, "error": error.to_string()})),
        }
    }

    fn send_packet(&mut self, packet: Vec<u8>, now: Instant) {
        let session = self.session();
        if session.path.is_none() {
            session.buffered.push_back(packet);
            session.buffered.truncate(BUFFERED_PACKETS);
            return;
        }
        let mut buffer = [0; 2048];
        match session.tunnel.encapsulate(&packet, &mut buffer) {
            TunnResult::WriteToNetwork(message) => {
                let message = message.to_vec();
                self.send_message(&message, now);
            }
            TunnResult::Err(error) => tell("wireguard_error", json!({"error": format!("{error:?}")})),
            _ => {} // kept until there is a session
        }
    }

    fn initiate(&mut self, now: Instant) {
        let mut buffer = [0; 2048];
        let session = self.session();
        session.initiated_at = Some(now);
        if let TunnResult::WriteToNetwork(message) = session.tunnel.format_handshake_initiation(&mut buffer, true) {
            let message = message.to_vec();
            self.send_message(&message, now);
        }
    }

    fn send_message(&mut self, message: &[u8], now: Instant) {
        if self.muted && message[0] == DATA {
            return;
        }
        if let Some((source, destination)) = self.session().path {
            self.send(source, destination, message, now);
        }
    }

    fn send(&mut self, source: SocketAddr, destination: SocketAddr, payload: &[u8], now: Instant) {
        if let Some(relay) = self.relay.as_mut().filter(|relay| relay.relayed == Some(source)) {
            let wrapped = relay.wrap(destination, payload, now);
            let server = relay.server;
            self.flush_relay();
            if let Some(datagram) = wrapped {
                let _ = self.hosts[0].socket.send_to(&datagram, server);
            }
        } else if let Some(host) = self.hosts.iter().find(|host| host.address == source) {
            let _ = host.socket.send_to(payload, destination);
        }
    }

    /// The allocation belongs to the first address.
    fn flush_relay(&mut self) {
        if let Some(relay) = &mut self.relay {
            for datagram in relay.drain() {
                let _ = self.hosts[0].socket.send_to(&datagram, relay.server);
            }
        }
    }

    fn tell_opened(&mut self) {
        let relayed = self.relay.as_ref().map(|relay| relay.relayed);
        if self.opening && relayed != Some(None) {
            self.opening = false;
            let hosts: Vec<_> = self.hosts.iter().map(|host| host.address).collect();
            tell("opened", json!({"hosts": hosts, "relayed": relayed.flatten()}));
        }
    }

    fn session(&mut self) -> &mut Session {
        self.session.as_mut().expect("connect comes first")
    }
}

impl Host {
    fn open(address: SocketAddr) -> Self {
        let socket = bind(address);
        Host { address: socket.local_addr().expect("bound"), socket }
    }
}

impl Session {
    fn new(keys: Keys, now: Instant) -> Self {
        let mut agent = IceAgent::new(keys.local);
        agent.set_remote_credentials(keys.remote);
        agent.set_controlling(true);
        agent.set_timing_advance(Duration::ZERO);
        agent.set_max_candidate_pairs(100);
        agent.set_max_stun_retransmits(12);
        agent.set_max_stun_rto(Duration::from_millis(1500));
        agent.set_initial_stun_rto(Duration::from_millis(250));
        let private = StaticSecret::from(key(&keys.private_key));
        let limiter = Arc::new(RateLimiter::new(&PublicKey::from(&private), HANDSHAKES_A_SECOND));
        let remote = PublicKey::from(key(&keys.public_key));
        let preshared = Some(key(&keys.preshared_key));
        let tunnel = Tunn::new(private, remote, preshared, None, keys.index, Some(limiter.clone()));
        Session {
            agent,
            tunnel,
            limiter,
            offered: Vec::new(),
            path: None,
            initiated_at: None,
            next_tick: now + TICK,
            buffered: VecDeque::new(),
        }
    }
}

fn key(text: &str) -> [u8; 32] {
    hex::decode(text).ok().and_then(|bytes| bytes.try_into().ok()).expect("32 bytes in hexadecimal")
}
