"""The interface of the packet engine. `pure` implements it in Python; a native twin may replace it unchanged.

The engine settles data packets: it decrypts, checks replay, looks up the flow, rewrites, batches and writes, in both
directions. Everything else (handshakes, STUN, TURN, first packets of a flow, oddities) comes back as items for the
core, which decides and installs flows. Arguments are integers, floats and bytes, so that an implementation may keep
its tables outside Python and run each direction on a thread of its own.

Handles: `peer` is a small integer that the core gives to a client for as long as it knows it. A session's
`local_index` is the 32-bit WireGuard receiver index.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence

    from fzg.sansio import Transmit
    from fzg.wire.endpoint import Endpoint


class Datagram(NamedTuple):
    """A UDP datagram that the engine did not settle: for the node."""

    payload: bytes
    source: Endpoint
    local: Endpoint
    ecn: int


class SessionConfirmed(NamedTuple):
    """The first authenticated packet arrived on a session; comes before that packet's own item."""

    local_index: int


class InnerPacket(NamedTuple):
    """A decrypted packet of a client without a valid flow: for the policy. `ecn` is the outer codepoint."""

    peer: int
    packet: bytes
    ecn: int
    source: Endpoint
    local: Endpoint


class OutboundPacket(NamedTuple):
    """An IP packet read from the TUN without a valid flow: for the policy. Checksums are complete."""

    packet: bytes


class FlowReport(NamedTuple):
    """What an entry carried since its last report. `token` is the one given to `install_flow`."""

    token: int
    packets: int
    payload_bytes: int
    last_packet: float


Item = Datagram | SessionConfirmed | InnerPacket | OutboundPacket | FlowReport


class Activity(NamedTuple):
    """Times that WireGuard's timers and the idle rule need, for one peer; 0.0 means never.

    `first_unanswered_sent`: first non-empty data packet sent since anything authenticated was received.
    `first_unanswered_received`: first non-empty data packet received since anything was sent.
    `last_data`: last non-empty packet in either direction.
    `current_sent_data`, `current_received_data`: whether the current session carried non-empty data.
    """

    first_unanswered_sent: float
    first_unanswered_received: float
    last_sent: float
    last_received: float
    last_data: float
    current_sent_data: bool
    current_received_data: bool


class Rewrite(NamedTuple):
    """DNS NAT of one direction: the replaced IP and the replaced port or echo identifier (spec tunnel 7.4).

    Towards the network the destination IP and the source port change, towards the client the source IP and the
    destination port.
    """

    ip: bytes
    port: int


class FlowKey(NamedTuple):
    """The 5-tuple of a packet as it enters the engine, echo identifiers standing for both ports."""

    protocol: int
    source: bytes
    destination: bytes
    source_port: int
    destination_port: int


class Engine(Protocol):
    """See the module text. Methods do no I/O except `receive_udp`, `receive_tun` and `flush`."""

    # -- descriptors: opened by `fzg.host`, non-blocking; the engine never waits for them.

    def attach_udp(self, family: int, udp: socket.socket, *, port: int, segmentation: bool = True) -> None:
        """Use this socket, which stays the caller's to close. `segmentation`: send batches by UDP_SEGMENT."""

    def attach_tun(self, descriptor: int, *, vnet_hdr: bool = True, offloads: bool = True) -> None:
        """Use this TUN. `vnet_hdr`: reads and writes carry virtio headers; `offloads`: it takes super-packets."""

    # -- sessions: WireGuard makes keys and decides on their life; the engine counts, seals and opens.

    def add_session(
        self, peer: int, local_index: int, remote_index: int, *, receive_key: bytes, send_key: bytes, now: float
    ) -> None:
        """Accept data on `local_index` from now on. It is not used for sending until `use_session`."""

    def use_session(self, peer: int, local_index: int | None) -> None:
        """Seal what goes to `peer` with this session; None: nothing can be sent."""

    def remove_session(self, local_index: int) -> None:
        """Forget the keys; a session in use for sending is no longer used. Unknown indices are ignored."""

    def seal(self, peer: int, packet: bytes, now: float) -> bytes | None:
        """Encrypt one inner packet (empty: keepalive) as a WireGuard data message; None without a usable session."""

    def activity(self, peer: int) -> Activity:
        """The peer's times, exact to the packet."""

    def note_handshake(self, peer: int, *, sent: bool, now: float) -> None:
        """A handshake message was sent to the peer, or an authenticated one received from it."""

    def remove_peer(self, peer: int) -> None:
        """Forget sessions, path and flows of the peer."""

    # -- paths: where data goes.

    def set_path(self, peer: int, source: bytes | None, destination: Endpoint, channel: int | None) -> None:
        """Send to `destination` from local IP `source` (None: kernel's choice), framed as ChannelData if `channel`."""

    def clear_path(self, peer: int) -> None:
        """Nothing can be sent: packets for the peer come back as items."""

    def set_channel(self, relay: Endpoint, number: int, *, usable: bool) -> None:
        """ChannelData of this number from this relay socket carries data of ours, or no longer does."""

    # -- flows: verdicts of the policy, installed for identical packets (design 4).

    def install_flow(
        self,
        peer: int,
        key: tuple[int, bytes, bytes, int, int],
        *,
        inbound: bool,
        rewrite: tuple[bytes, int] | None,
        valid_until: float,
        token: int,
    ) -> None:
        """Forward what matches `key` (a `FlowKey`), changed by `rewrite` (a `Rewrite`), `inbound` from the client
        or else from the TUN. Replaces an entry.
        """

    def revoke(self, peer: int) -> None:
        """Void all flow entries of the peer and take back what is queued for it, by the engine or by the core.

        On return no packet that passed the policy earlier can still be written.
        """

    def sweep(self, now: float) -> Sequence[FlowReport]:
        """Reports of all entries that carried packets since their last report; drops entries that lapsed."""

    # -- packets.

    def receive_udp(self, family: int, now: float) -> Sequence[Item]:
        """One bounded turn on the socket of this family (AF_INET, AF_INET6). Settled packets go to the TUN queue."""

    def receive_tun(self, now: float) -> Sequence[Item]:
        """One bounded turn on the TUN. Settled packets go to the UDP queue. Raises OSError when the device is gone."""

    def has_backlog(self, family: int | None) -> bool:
        """Whether a further `receive_udp` (or, for None, `receive_tun`) has work even if nothing more arrives.

        So it is while packets of a flow wait for the verdict on one of them that was an item of the last turn.
        """

    def handle_datagram(self, datagram: Datagram, now: float) -> Sequence[Item]:
        """What `receive_udp` does with one datagram, from memory."""

    def handle_packet(self, packet: bytes, now: float) -> Sequence[Item]:
        """What `receive_tun` does with one packet, from memory."""

    def write_tun(self, packet: bytes, peer: int | None = None) -> None:
        """Queue an inner packet that the policy forwarded for `peer`, from whom `revoke` takes it back."""

    def transmit(self, transmit: Transmit) -> None:
        """Queue a datagram of the core: STUN, TURN, handshakes, sealed packets."""

    def flush(self) -> bool:
        """Write both queues, in order per destination and per flow, as super-packets where the kernel has them.

        False: a descriptor takes no more now; what is left stays queued (bounded) for the next call, which is due when
        one of `congested` is writable. Until then the caller should not read the other side.
        """

    def congested(self) -> Sequence[int]:
        """Descriptors that have something queued which they did not take at the last `flush`."""

    def counters(self) -> Mapping[str, int]:
        """Totals since start by name: packets, bytes, segments, drops by reason."""
