//! A client of parts that others wrote: the ICE agent of the crate `is` and the WireGuard of `boringtun`, on UDP
//! sockets of its own and with a TURN allocation. The caller plays portal and TUN with one JSON object a line: orders
//! on standard input (`Order`), events on standard output, each with `at`, the seconds of CLOCK_MONOTONIC.
//! End of input ends the program.

mod client;
mod turn;

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::mem::ManuallyDrop;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd};
use std::time::Instant;

use serde::Deserialize;
use serde_json::{Value, json};

use client::{Client, Keys};
use turn::Credentials;

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Order {
    /// Open a socket on each address and make an allocation; `opened` follows when both is done.
    Open {
        hosts: Vec<SocketAddr>,
        relay: Option<Credentials>,
    },
    /// Begin a connection as the controlling side; `candidates` follows.
    Connect {
        keys: Keys,
        offer: Vec<Kind>,
    },
    /// Offer more candidates (`candidates` follows), or take some back (`withdrawn` follows).
    Offer {
        kinds: Vec<Kind>,
    },
    Withdraw {
        kinds: Vec<Kind>,
    },
    /// What the other side signalled.
    AddRemote {
        line: String,
    },
    RemoveRemote {
        line: String,
    },
    /// An inner packet, in hexadecimal.
    Send {
        packet: String,
    },
    /// Initiate a WireGuard handshake now, as after an age of 120 s.
    Handshake,
    /// Move to new ports without telling anybody, as a NAT does that lost its state.
    Rebind,
    /// Lose what comes from these addresses (and from no others than these).
    Block {
        addresses: HashSet<SocketAddr>,
    },
    /// Send no WireGuard data, keepalives included.
    Mute {
        muted: bool,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Host,
    Srflx,
    Relay,
}

fn main() {
    let mut orders = Orders::new();
    let mut client = Client::new();
    let mut buffer = [0; 2048];
    loop {
        let mut watched = vec![libc::pollfd { fd: 0, events: libc::POLLIN, revents: 0 }];
        watched.extend(client.sockets().map(|socket| libc::pollfd {
            fd: socket.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        }));
        let wait = client.deadline().saturating_duration_since(Instant::now());
        // Rounded up: a poll that ends early would spin.
        let milliseconds = wait.as_micros().div_ceil(1000) as libc::c_int;
        unsafe { libc::poll(watched.as_mut_ptr(), watched.len() as libc::nfds_t, milliseconds) };

        for (index, _) in watched[1..].iter().enumerate().filter(|(_, watch)| watch.revents != 0) {
            while let Some((length, source)) = client.receive(index, &mut buffer) {
                client.handle_datagram(index, source, &buffer[..length], Instant::now());
            }
        }
        if watched[0].revents != 0 && !orders.read() {
            return;
        }
        while let Some(order) = orders.next() {
            client.handle_order(order, Instant::now());
        }
        client.handle_timeout(Instant::now());
    }
}

/// Lines of standard input, read without waiting for more than there is.
struct Orders {
    input: ManuallyDrop<File>,
    pending: Vec<u8>,
}

impl Orders {
    fn new() -> Self {
        Orders { input: ManuallyDrop::new(unsafe { File::from_raw_fd(0) }), pending: Vec::new() }
    }

    /// False at the end of input.
    fn read(&mut self) -> bool {
        let mut part = [0; 65536];
        match self.input.read(&mut part) {
            Ok(0) | Err(_) => false,
            Ok(length) => {
                self.pending.extend_from_slice(&part[..length]);
                true
            }
        }
    }

    fn next(&mut self) -> Option<Order> {
        let end = self.pending.iter().position(|&byte| byte == b'\n')?;
        let line: Vec<u8> = self.pending.drain(..=end).collect();
        Some(serde_json::from_slice(&line).expect("an order"))
    }
}

/// Tells the caller what happened; `details` is an object.
pub fn tell(event: &str, mut details: Value) {
    details["event"] = json!(event);
    details["at"] = json!(monotonic());
    println!("{details}");
}

fn monotonic() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// A socket that never blocks; port 0 takes any.
pub fn bind(address: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(address).expect("bind");
    socket.set_nonblocking(true).expect("non-blocking");
    socket
}
