"""The packet engine in Python: see `engine.Engine` for the interface, and performance chapter 4 for what it costs.

It moves one packet at a time between two buffers that live as long as it does. Everything it queues is a copy, so
buffers are free again when a call returns.
"""

from __future__ import annotations

import errno
import os
import struct
from collections import Counter
from typing import TYPE_CHECKING

from fzg.dataplane.aead import TAG_SIZE, make_aead
from fzg.dataplane.engine import (
    Activity,
    Datagram,
    FlowKey,
    FlowReport,
    InnerPacket,
    Item,
    OutboundPacket,
    Rewrite,
    SessionConfirmed,
)
from fzg.dataplane.flows import Flow, FlowTable, flow_key, pack_key
from fzg.dataplane.sessions import CORE, Path, Peer, Session
from fzg.dataplane.tun_offload import (
    GSO_NONE,
    NEEDS_CSUM,
    READ_BUFFER_SIZE,
    VNET_HEADER,
    TunPort,
    VnetHeader,
    complete_checksum,
    split,
)
from fzg.dataplane.udp_offload import MAX_DATAGRAM, RECEIVE_BUFFER_SIZE, UdpPort
from fzg.sansio import EcnCodepoint, Transmit
from fzg.wire import Malformed
from fzg.wire.ip import IPV4_HEADER, IPV6_HEADER, MTU, ecn_of, mark_ce

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable, Mapping, Sequence

    from fzg.wire.endpoint import Endpoint

# WireGuard's data message (whitepaper 5.4.6) and ChannelData (RFC 8656 12.4).
_DATA_TYPE = 4
_DATA_HEADER = struct.Struct("<IIQ")
_DATA_OVERHEAD = _DATA_HEADER.size + TAG_SIZE
_CHANNEL_HEADER = struct.Struct(">HH")
_CHANNEL_FIRST_BYTES = range(0x40, 0x50)
_CHANNEL_SURPLUS = range(4)  # bytes of padding that some servers send, spec turn 3.3

# Packets of one turn, after which other sockets get theirs: near 1 ms of this engine's time.
_TURN_PACKETS = 64

# A data message is built here, with room for the channel header before it and one MTU inside.
_SEAL_AT = _CHANNEL_HEADER.size + _DATA_HEADER.size
_SEAL_BUFFER_SIZE = _SEAL_AT + MTU + TAG_SIZE

# Relay sockets with usable channels: a few dozen in practice. The core sets them, peers cannot.
_NO_CHANNELS: frozenset[int] = frozenset()


class PureEngine:
    """Implements `engine.Engine`. Not thread-safe: one greenlet at a time, and no call switches."""

    def __init__(self) -> None:
        self._counters: Counter[str] = Counter()
        self._peers: dict[int, Peer] = {}
        self._sessions: dict[int, Session] = {}
        self._flows = FlowTable(self._counters)
        self._channels: dict[Endpoint, set[int]] = {}
        self._udp: dict[int, UdpPort] = {}
        self._tun: TunPort | None = None
        self._tun_descriptor = -1
        self._vnet_hdr = True

        self._received = bytearray(RECEIVE_BUFFER_SIZE)
        self._received_view = memoryview(self._received)
        self._plain = bytearray(MAX_DATAGRAM)
        self._sealed = bytearray(_SEAL_BUFFER_SIZE)
        self._sealed_view = memoryview(self._sealed)
        self._read = bytearray(READ_BUFFER_SIZE)
        self._aead = make_aead(received=self._received, plain=self._plain, sealed=self._sealed)

    # -- descriptors.

    def attach_udp(self, family: int, udp: socket.socket, *, port: int, segmentation: bool = True) -> None:
        """See `Engine`."""
        self._udp[family] = UdpPort(family, udp, port, counters=self._counters, segmentation=segmentation)

    def attach_tun(self, descriptor: int, *, vnet_hdr: bool = True, offloads: bool = True) -> None:
        """See `Engine`."""
        self._tun = TunPort(descriptor, counters=self._counters, vnet_hdr=vnet_hdr, coalesce=offloads)
        self._tun_descriptor = descriptor
        self._vnet_hdr = vnet_hdr

    # -- sessions.

    def add_session(
        self, peer: int, local_index: int, remote_index: int, *, receive_key: bytes, send_key: bytes, now: float
    ) -> None:
        """See `Engine`."""
        del now  # the core decides on the session's age
        self.remove_session(local_index)
        owner = self._peer(peer)
        session = Session(owner, local_index, remote_index, receive_key, send_key)
        owner.sessions[local_index] = session
        self._sessions[local_index] = session

    def use_session(self, peer: int, local_index: int | None) -> None:
        """See `Engine`."""
        owner = self._peer(peer)
        owner.current = None if local_index is None else owner.sessions[local_index]

    def remove_session(self, local_index: int) -> None:
        """See `Engine`."""
        session = self._sessions.pop(local_index, None)
        if session is None:
            return
        del session.peer.sessions[local_index]
        if session.peer.current is session:
            session.peer.current = None

    def seal(self, peer: int, packet: bytes, now: float) -> bytes | None:
        """See `Engine`. A packet above the MTU is refused like one without a session."""
        owner = self._peers.get(peer)
        session = owner.current if owner is not None else None
        if owner is None or session is None or len(packet) > MTU:
            return None
        if packet:
            owner.note_data_sent(session, now)
        else:
            owner.note_sent(now)
        return self._seal(session, packet, None)

    def activity(self, peer: int) -> Activity:
        """See `Engine`."""
        owner = self._peers.get(peer)
        return (owner if owner is not None else Peer(peer)).activity()

    def note_handshake(self, peer: int, *, sent: bool, now: float) -> None:
        """See `Engine`."""
        owner = self._peer(peer)
        if sent:
            owner.note_sent(now)
        else:
            owner.note_received(now)

    def remove_peer(self, peer: int) -> None:
        """See `Engine`."""
        owner = self._peers.get(peer)
        if owner is None:
            return
        self.revoke(peer)
        for local_index in tuple(owner.sessions):
            self.remove_session(local_index)
        del self._peers[peer]

    # -- paths.

    def set_path(self, peer: int, source: bytes | None, destination: Endpoint, channel: int | None) -> None:
        """See `Engine`."""
        self._peer(peer).path = Path(source, destination, channel)

    def clear_path(self, peer: int) -> None:
        """See `Engine`."""
        self._peer(peer).path = None

    def set_channel(self, relay: Endpoint, number: int, *, usable: bool) -> None:
        """See `Engine`."""
        numbers = self._channels.setdefault(relay, set())
        if usable:
            numbers.add(number)
        else:
            numbers.discard(number)
        if not numbers:
            del self._channels[relay]

    # -- flows.

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
        """See `Engine`."""
        change = Rewrite(*rewrite) if rewrite is not None else None
        packed = pack_key(FlowKey(*key))
        self._flows.install(
            Flow(self._peer(peer), packed, inbound=inbound, rewrite=change, valid_until=valid_until, token=token)
        )

    def revoke(self, peer: int) -> None:
        """See `Engine`."""
        owner = self._peers.get(peer)
        if owner is None:
            return
        self._flows.revoke(owner)
        removed = self._tun.purge(peer) if self._tun is not None else 0
        removed += sum(port.purge(peer) for port in self._udp.values())
        if removed:
            self._counters["drop_revoked"] += removed

    def sweep(self, now: float) -> Sequence[FlowReport]:
        """See `Engine`."""
        return self._flows.sweep(now)

    # -- packets.

    def receive_udp(self, family: int, now: float) -> Sequence[Item]:
        """See `Engine`."""
        port = self._udp[family]
        turn = _Turn(now)
        buffers = (self._received_view,)
        budget = _TURN_PACKETS
        while budget > 0:
            arrival = port.receive(buffers)
            if arrival is None:
                break
            length, stride, source, local, ecn = arrival
            if not length:
                budget -= 1  # an empty datagram, or one that was counted and dropped
                continue
            channels = self._channels.get(source, _NO_CHANNELS)
            for offset in range(0, length, stride):
                size = min(stride, length - offset)
                budget -= 1
                if size > MAX_DATAGRAM:
                    self._counters["drop_udp_oversized"] += 1
                    continue
                if not self._open(turn, offset, size, channels, source, local, ecn):
                    payload = bytes(self._received_view[offset : offset + size])
                    turn.items.append(Datagram(payload, source, local, ecn))
            self._counters["udp_rx_calls"] += 1
            self._counters["udp_rx_packets"] += -(-length // stride)
            self._counters["udp_rx_bytes"] += length
        return turn.items

    def has_backlog(self, family: int | None) -> bool:
        """See `Engine`. What a turn leaves is in the kernel's queues."""
        del family
        return False

    def handle_datagram(self, datagram: Datagram, now: float) -> Sequence[Item]:
        """See `Engine`."""
        payload, source, local, ecn = datagram
        turn = _Turn(now)
        size = len(payload)
        if size > MAX_DATAGRAM:
            self._counters["drop_udp_oversized"] += 1
        elif size:
            self._received[:size] = payload
            channels = self._channels.get(source, _NO_CHANNELS)
            if not self._open(turn, 0, size, channels, source, local, ecn):
                turn.items.append(datagram)
        return turn.items

    def receive_tun(self, now: float) -> Sequence[Item]:
        """See `Engine`."""
        turn = _Turn(now)
        budget = _TURN_PACKETS
        start = VNET_HEADER.size if self._vnet_hdr else 0
        while budget > 0:
            try:
                length = os.readv(self._tun_descriptor, (self._read,)) - start
            except BlockingIOError:
                break
            if length <= -start:
                raise OSError(errno.ENODEV, "the TUN device is gone")
            before = turn.packets
            try:
                self._take_read(turn, start, length)
            except Malformed:
                self._counters["drop_tun_malformed"] += 1
            budget -= max(1, turn.packets - before)
            self._counters["tun_rx_calls"] += 1
            self._counters["tun_rx_bytes"] += max(0, length)
        self._counters["tun_rx_packets"] += turn.packets
        return turn.items

    def handle_packet(self, packet: bytes, now: float) -> Sequence[Item]:
        """See `Engine`."""
        turn = _Turn(now)
        if 0 < len(packet) <= MTU:
            self._take_packet(turn, bytearray(packet), packet)
        else:
            self._counters["drop_tun_malformed"] += 1
        return turn.items

    def write_tun(self, packet: bytes, peer: int | None = None) -> None:
        """See `Engine`."""
        if self._tun is None:
            self._counters["drop_tun_not_attached"] += 1
            return
        self._tun.queue(packet, flow_key(packet, 0, len(packet)), CORE if peer is None else peer)

    def transmit(self, transmit: Transmit) -> None:
        """See `Engine`."""
        port = self._udp.get(transmit.destination.family)
        if port is None:
            self._counters["drop_udp_no_socket"] += 1
            return
        port.queue(
            (transmit.payload,),
            source=transmit.source,
            destination=transmit.destination,
            ecn=transmit.ecn,
            owner=CORE if transmit.peer is None else transmit.peer,
        )

    def flush(self) -> bool:
        """See `Engine`."""
        done = True  # UDP first, as in `engine_flush`
        for port in self._udp.values():
            done &= port.flush()
        return done if self._tun is None else self._tun.flush() and done

    def congested(self) -> Sequence[int]:
        """See `Engine`."""
        ports: list[TunPort | UdpPort] = list(self._udp.values())
        if self._tun is not None:
            ports.append(self._tun)
        return [port.fileno() for port in ports if port.is_congested]

    def counters(self) -> Mapping[str, int]:
        """See `Engine`."""
        return dict(self._counters)

    # -- from UDP to the TUN.

    def _open(  # noqa: PLR0917 - called for every packet
        self,
        turn: _Turn,
        offset: int,
        size: int,
        channels: frozenset[int] | set[int],
        source: Endpoint,
        local: Endpoint,
        ecn: int,
    ) -> bool:
        """Settle the datagram at `offset` of the receive buffer, or say that it is not one of ours."""
        received = self._received
        if channels and size >= _CHANNEL_HEADER.size and received[offset] in _CHANNEL_FIRST_BYTES:
            number, length = _CHANNEL_HEADER.unpack_from(received, offset)
            surplus = size - _CHANNEL_HEADER.size - length
            if number not in channels or surplus not in _CHANNEL_SURPLUS:
                return False
            offset += _CHANNEL_HEADER.size
            size = length
        if size < _DATA_OVERHEAD:
            return False
        kind, index, counter = _DATA_HEADER.unpack_from(received, offset)
        if kind != _DATA_TYPE:
            return False
        session = self._sessions.get(index)
        if session is None:
            return False

        window = session.window
        if not window.accepts(counter):
            self._counters["drop_replayed"] += 1
            return True
        if not self._aead.open(offset + _DATA_HEADER.size, size - _DATA_HEADER.size, counter, session.receive_key):
            self._counters["drop_undecryptable"] += 1
            return True
        window.mark(counter)
        if not session.confirmed:
            session.confirmed = True
            turn.items.append(SessionConfirmed(index))
        peer = session.peer
        size -= _DATA_OVERHEAD
        if not size:
            peer.note_received(turn.now)
            return True
        peer.note_data_received(session, turn.now)
        self._take_inner(turn, peer, size, source, local, ecn)
        return True

    def _take_inner(self, turn: _Turn, peer: Peer, size: int, source: Endpoint, local: Endpoint, ecn: int) -> None:  # noqa: PLR0917
        """Forward the decrypted packet by its flow or hand it to the policy; padding is cut (spec connectivity 5.7)."""
        plain = self._plain
        version = plain[0] >> 4
        if version == 4 and size >= IPV4_HEADER:
            length = plain[2] << 8 | plain[3]
        elif version == 6 and size >= IPV6_HEADER:
            length = (plain[4] << 8 | plain[5]) + IPV6_HEADER
        else:
            self._counters["drop_inner_not_ip"] += 1
            return
        if length > size:
            self._counters["drop_inner_truncated"] += 1
            return
        if length > MTU:
            self._counters["drop_inner_oversized"] += 1
            return
        packet = plain[:length]
        key = flow_key(packet, 0, length)
        if key is not None:
            flow = peer.inbound.get(key)
            if flow is not None and key not in turn.missed and flow.admits(packet, 0, turn.now):
                self._forward(flow, packet, length, ecn, turn.now)
                return
            turn.missed.add(key)
            if flow is not None:
                self._lapse(turn, flow)
        turn.items.append(InnerPacket(peer.handle, bytes(packet), ecn, source, local))

    def _forward(self, flow: Flow, packet: bytearray, length: int, ecn: int, now: float) -> None:
        tun = self._tun
        if tun is None:
            self._counters["drop_tun_not_attached"] += 1
            return
        flow.count(packet, 0, length, now)
        if flow.translation is not None:
            flow.translation.apply(packet)
        queued: bytes | bytearray = packet
        if ecn == EcnCodepoint.CE:
            queued = mark_ce(bytes(packet))
        tun.queue(queued, flow.translated_key, flow.peer.handle)

    def _lapse(self, turn: _Turn, flow: Flow) -> None:
        """Remove an entry that is over; its report comes before the packet that the policy is asked about."""
        if flow.valid_until > turn.now:
            return
        report = self._flows.lapse(flow)
        if report is not None:
            turn.items.append(report)

    # -- from the TUN to UDP.

    def _take_read(self, turn: _Turn, start: int, length: int) -> None:
        """Handle what one read left in the buffer: a packet, or a super-packet that is decided on as one."""
        read = self._read
        if length <= 0:
            raise Malformed("read without a packet")
        header = VnetHeader(*VNET_HEADER.unpack_from(read)) if start else None
        if header is None or header.gso_type == GSO_NONE:
            if length > MTU:
                raise Malformed("packet exceeds the MTU")
            if header is not None and header.flags & NEEDS_CSUM:
                complete_checksum(read, start, length, header)
            turn.packets += 1
            packet = read[start : start + length]
            self._take_packet(turn, packet, None)
            return

        packets = split(read, start, length, header)
        key = flow_key(read, start, length)
        flow = self._hit(turn, key, read, start)
        if flow is None:
            untouched = list(packets)
            turn.packets += len(untouched)
            turn.items.extend(OutboundPacket(packet) for packet in untouched)
            return
        if flow.translation is not None:
            flow.translation.apply(read, start)
            packets = split(read, start, length, header)
        turn.packets += self._send(flow, packets, turn.now)

    def _take_packet(self, turn: _Turn, packet: bytearray, original: bytes | None) -> None:
        """Handle one packet, which may be changed. `original`: the same as bytes if there is such a thing."""
        key = flow_key(packet, 0, len(packet))
        flow = self._hit(turn, key, packet, 0)
        if flow is None:
            turn.items.append(OutboundPacket(bytes(packet) if original is None else original))
            return
        if flow.translation is not None:
            flow.translation.apply(packet)
        self._send(flow, (packet,), turn.now)

    def _hit(self, turn: _Turn, key: bytes | None, data: bytearray, start: int) -> Flow | None:
        """The flow that covers a packet now, if its client can be sent to; a miss holds for the rest of the turn."""
        if key is None:
            return None
        flow = self._flows.outbound.get(key)
        if (
            flow is not None
            and key not in turn.missed
            and flow.admits(data, start, turn.now)
            and flow.peer.path is not None
            and flow.peer.current is not None
        ):
            return flow
        turn.missed.add(key)
        if flow is not None:
            self._lapse(turn, flow)
        return None

    def _send(self, flow: Flow, packets: Iterable[bytes | bytearray], now: float) -> int:
        """Seal packets of one flow and queue them; how many there were."""
        peer = flow.peer
        session, path = peer.current, peer.path
        if session is None or path is None:  # `_hit` saw to it
            return 0
        port = self._udp.get(path.destination.family)
        if port is None:
            dropped = sum(1 for _ in packets)
            self._counters["drop_udp_no_socket"] += dropped
            return dropped
        channel = path.channel
        messages: list[bytes] = []
        ecn = -1
        for packet in packets:
            if ecn < 0:
                ecn = ecn_of(packet)
            flow.count(packet, 0, len(packet), now)
            messages.append(self._seal(session, packet, channel))
        peer.note_data_sent(session, now)
        port.queue(messages, source=path.source, destination=path.destination, ecn=ecn, owner=peer.handle)
        return len(messages)

    def _seal(self, session: Session, packet: bytes | bytearray, channel: int | None) -> bytes:
        size = len(packet)
        counter = session.next_counter
        session.next_counter = counter + 1
        sealed = self._sealed
        self._sealed_view[_SEAL_AT : _SEAL_AT + size] = packet
        _DATA_HEADER.pack_into(sealed, _CHANNEL_HEADER.size, _DATA_TYPE, session.remote_index, counter)
        self._aead.seal(_SEAL_AT, size, counter, session.send_key)
        end = _SEAL_AT + size + TAG_SIZE
        if channel is None:
            return bytes(self._sealed_view[_CHANNEL_HEADER.size : end])
        _CHANNEL_HEADER.pack_into(sealed, 0, channel, size + _DATA_OVERHEAD)
        return bytes(self._sealed_view[:end])

    def _peer(self, handle: int) -> Peer:
        peer = self._peers.get(handle)
        if peer is None:
            peer = self._peers[handle] = Peer(handle)
        return peer


class _Turn:
    """What accumulates during one call: items for the core, and the 5-tuples that it must see in order."""

    __slots__ = ("items", "missed", "now", "packets")

    def __init__(self, now: float) -> None:
        self.now = now
        self.items: list[Item] = []
        self.missed: set[bytes] = set()
        self.packets = 0
