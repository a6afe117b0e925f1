//! As much of TURN (RFC 8656) as a client needs for a few minutes: an allocation and channels, never refreshed.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use is::stun::StunMessage;
use is::{DefaultSha1HmacProvider, Sha1HmacProvider};
use serde::Deserialize;
use serde_json::json;

use crate::tell;

const ALLOCATE: u16 = 3;
const CHANNEL_BIND: u16 = 9;
const USERNAME: u16 = 0x0006;
const MESSAGE_INTEGRITY: u16 = 0x0008;
const CHANNEL_NUMBER: u16 = 0x000C;
const XOR_PEER_ADDRESS: u16 = 0x0012;
const REALM: u16 = 0x0014;
const NONCE: u16 = 0x0015;
const REQUESTED_TRANSPORT: u16 = 0x0019;
const COOKIE: [u8; 4] = [0x21, 0x12, 0xA4, 0x42];

const UNAUTHORIZED: u16 = 401;
const STALE_NONCE: u16 = 438;
const FIRST_CHANNEL: u16 = 0x4000;
const RETRY: Duration = Duration::from_millis(500);

/// Of the allocation; `key` is MD5(username:realm:password) in hexadecimal.
#[derive(Deserialize)]
pub struct Credentials {
    pub server: SocketAddr,
    username: String,
    realm: String,
    key: String,
}

/// What a datagram of the server was.
pub enum Incoming {
    Control,
    Data { peer: SocketAddr, length: usize },
    Unknown,
}

pub struct Allocation {
    pub server: SocketAddr,
    /// Where peers reach us, and what the server says our own address is.
    pub relayed: Option<SocketAddr>,
    pub mapped: Option<SocketAddr>,
    credentials: Credentials,
    nonce: Option<String>,
    channels: HashMap<SocketAddr, u16>,
    requests: Vec<Request>,
    outbox: Vec<Vec<u8>>,
}

struct Request {
    method: u16,
    attributes: Vec<(u16, Vec<u8>)>,
    transaction: [u8; 12],
    nonce: Option<String>,
    bytes: Vec<u8>,
    due: Instant,
}

impl Allocation {
    pub fn new(credentials: Credentials, now: Instant) -> Self {
        let mut this = Allocation {
            server: credentials.server,
            relayed: None,
            mapped: None,
            credentials,
            nonce: None,
            channels: HashMap::new(),
            requests: Vec::new(),
            outbox: Vec::new(),
        };
        this.request(ALLOCATE, vec![(REQUESTED_TRANSPORT, vec![17, 0, 0, 0])], now);
        this
    }

    /// The datagram for the server that carries `payload` to `peer`; None when there is no channel: one is bound then.
    pub fn wrap(&mut self, peer: SocketAddr, payload: &[u8], now: Instant) -> Option<Vec<u8>> {
        let Some(channel) = self.channels.get(&peer) else {
            self.bind(peer, now);
            return None;
        };
        let mut datagram = channel.to_be_bytes().to_vec();
        datagram.extend((payload.len() as u16).to_be_bytes());
        datagram.extend(payload);
        Some(datagram)
    }

    /// Binds a channel, unless there is one or the server cannot reach the peer.
    pub fn bind(&mut self, peer: SocketAddr, now: Instant) {
        if self.channels.contains_key(&peer) || self.relayed.is_none_or(|own| own.is_ipv4() != peer.is_ipv4()) {
            return;
        }
        let number = FIRST_CHANNEL + self.channels.len() as u16;
        self.channels.insert(peer, number);
        let attributes = vec![(CHANNEL_NUMBER, [number.to_be_bytes(), [0; 2]].concat()), (XOR_PEER_ADDRESS, xor(peer))];
        self.request(CHANNEL_BIND, attributes, now);
    }

    /// What came from the server; data lies behind the four bytes of the channel's header.
    pub fn handle(&mut self, datagram: &[u8], now: Instant) -> Incoming {
        match datagram.first() {
            Some(0x40..=0x4F) if datagram.len() >= 4 => {
                let number = u16::from_be_bytes([datagram[0], datagram[1]]);
                let length = u16::from_be_bytes([datagram[2], datagram[3]]) as usize;
                match self.channels.iter().find(|(_, bound)| **bound == number) {
                    Some((&peer, _)) if length <= datagram.len() - 4 => Incoming::Data { peer, length },
                    _ => Incoming::Unknown,
                }
            }
            _ => match StunMessage::parse(datagram) {
                Ok(answer) => {
                    self.handle_answer(&answer, &datagram[8..20], now);
                    Incoming::Control
                }
                Err(_) => Incoming::Unknown,
            },
        }
    }

    fn handle_answer(&mut self, answer: &StunMessage<'_>, transaction: &[u8], now: Instant) {
        let Some(index) = self.requests.iter().position(|request| request.transaction == transaction) else {
            return;
        };
        let request = self.requests.remove(index);
        match answer.error_code() {
            Some((UNAUTHORIZED | STALE_NONCE, _)) if answer.nonce() != request.nonce.as_deref() => {
                self.nonce = answer.nonce().map(str::to_owned);
                self.request(request.method, request.attributes, now);
            }
            Some((code, reason)) => {
                tell("refused", json!({"method": request.method, "code": code, "reason": reason}));
            }
            None if request.method == ALLOCATE => {
                assert!(answer.verify(&self.key(), hmac), "the relay's answer is not signed with our key");
                self.relayed = answer.xor_relayed_address();
                self.mapped = answer.mapped_address();
            }
            None => {}
        }
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        for request in self.requests.iter_mut().filter(|request| request.due <= now) {
            request.due = now + RETRY;
            self.outbox.push(request.bytes.clone());
        }
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.requests.iter().map(|request| request.due).min()
    }

    /// Datagrams for the server.
    pub fn drain(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.outbox)
    }

    fn request(&mut self, method: u16, attributes: Vec<(u16, Vec<u8>)>, now: Instant) {
        let transaction = random_transaction();
        let mut sent = attributes.clone();
        let mut key = None;
        if let Some(nonce) = &self.nonce {
            sent.push((USERNAME, self.credentials.username.clone().into_bytes()));
            sent.push((REALM, self.credentials.realm.clone().into_bytes()));
            sent.push((NONCE, nonce.clone().into_bytes()));
            key = Some(self.key());
        }
        let bytes = encode(method, transaction, &sent, key.as_deref());
        self.outbox.push(bytes.clone());
        self.requests.push(Request {
            method,
            attributes,
            transaction,
            nonce: self.nonce.clone(),
            bytes,
            due: now + RETRY,
        });
    }

    fn key(&self) -> Vec<u8> {
        hex::decode(&self.credentials.key).expect("a key in hexadecimal")
    }
}

fn encode(method: u16, transaction: [u8; 12], attributes: &[(u16, Vec<u8>)], key: Option<&[u8]>) -> Vec<u8> {
    let mut message = [method.to_be_bytes(), [0; 2]].concat();
    message.extend(COOKIE);
    message.extend(transaction);
    for (attribute, value) in attributes {
        append(&mut message, *attribute, value);
    }
    if let Some(key) = key {
        set_length(&mut message, 24);
        let integrity = hmac(key, &[&message]);
        append(&mut message, MESSAGE_INTEGRITY, &integrity);
    }
    set_length(&mut message, 0);
    message
}

fn append(message: &mut Vec<u8>, attribute: u16, value: &[u8]) {
    message.extend(attribute.to_be_bytes());
    message.extend((value.len() as u16).to_be_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

fn set_length(message: &mut [u8], to_come: usize) {
    let length = (message.len() - 20 + to_come) as u16;
    message[2..4].copy_from_slice(&length.to_be_bytes());
}

/// XOR-PEER-ADDRESS of an IPv4 peer: the allocation has no other.
fn xor(peer: SocketAddr) -> Vec<u8> {
    let IpAddr::V4(address) = peer.ip() else { unreachable!("only IPv4 is allocated") };
    let mut value = vec![0, 1];
    value.extend((peer.port() ^ 0x2112).to_be_bytes());
    value.extend(address.octets().iter().zip(COOKIE).map(|(byte, mask)| byte ^ mask));
    value
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> [u8; 20] {
    DefaultSha1HmacProvider.sha1_hmac(key, parts)
}

fn random_transaction() -> [u8; 12] {
    let mut transaction = [0; 12];
    unsafe { libc::getrandom(transaction.as_mut_ptr().cast(), transaction.len(), 0) };
    transaction
}
