"""TUN super-packets (spec tunnel 9.2, 9.3): split what one read returns, coalesce what one write takes."""

from __future__ import annotations

import errno
import logging
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from fzg.dataplane.flows import IPV4_KEY_SIZE
from fzg.wire import Malformed
from fzg.wire.checksum import congruent, internet_checksum, pseudo_header_sum, sum16
from fzg.wire.ip import (
    IPV4_HEADER,
    IPV6_HEADER,
    MTU,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    TCP_FIN,
    TCP_HEADER,
    UDP_HEADER,
)

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterator, Sequence

    Buffer = bytes | bytearray | memoryview

_LOG = logging.getLogger(__name__)

# <linux/virtio_net.h>: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset; native byte order.
VNET_HEADER = struct.Struct("=BBHHHH")
NEEDS_CSUM = 1
GSO_NONE = 0
GSO_TCPV4 = 1
GSO_TCPV6 = 4
GSO_UDP_L4 = 5

MAX_PACKET = 65535  # of a super-packet, headers included
READ_BUFFER_SIZE = VNET_HEADER.size + MAX_PACKET

_MAX_READ_SEGMENTS = 256  # spec tunnel 9.2
# Spec tunnel 9.3 allows 128; kernels before 6.9 have UDP_MAX_SEGMENTS 64.
_MAX_MERGED_DATAGRAMS = 64
# A write has two further parts, and the kernel takes 1024 (UIO_MAXIOV).
_MAX_MERGED_SEGMENTS = 512
# Packets that may wait for the TUN: 100 batches of 100 (spec tunnel 9.6), at most 12.8 MB.
_MAX_QUEUED = 10_000

_PLAIN_HEADER = bytes(VNET_HEADER.size)
_WORD = struct.Struct(">H")
# IPv4: version to total length, identification, fragment bits to protocol, checksum, addresses.
_IPV4 = struct.Struct(">2sHH4sH8s")
_IPV4_CHECKSUM_AT = 10
# IPv6: version to flow label, payload length, the rest.
_IPV6 = struct.Struct(">4sH34s")
# TCP: ports, sequence, acknowledgement and data offset, flags, window, checksum, urgent pointer.
_TCP = struct.Struct(">4sI5sB2sH2s")
_TCP_CHECKSUM_AT = 16
_TCP_PSH = 0x08
_TCP_ACK = 0x10
_TCP_MERGEABLE = (_TCP_ACK, _TCP_ACK | _TCP_PSH)
_UDP_CHECKSUM_AT = 6
_SEQUENCE_MASK = 0xFFFF_FFFF


class VnetHeader(NamedTuple):
    """The virtio header of a read."""

    flags: int
    gso_type: int
    header_length: int
    gso_size: int
    checksum_start: int
    checksum_offset: int


def complete_checksum(buffer: bytearray, start: int, length: int, header: VnetHeader) -> None:
    """Finish the checksum of a packet whose field holds only the pseudo-header sum; `Malformed` if out of bounds."""
    at = header.checksum_start + header.checksum_offset
    if header.checksum_start >= length or at + 2 > length:
        raise Malformed("checksum field lies outside the packet")
    at += start
    initial = buffer[at] << 8 | buffer[at + 1]
    buffer[at] = buffer[at + 1] = 0
    # 0 would mean "none" in UDP; the two are equal for every protocol (spec tunnel 2.4).
    value = internet_checksum(buffer[start + header.checksum_start : start + length], initial) or 0xFFFF
    _WORD.pack_into(buffer, at, value)


def split(buffer: bytearray, start: int, length: int, header: VnetHeader) -> Iterator[bytes]:
    """The packets that the super-packet at `start` stands for, complete; `Malformed` before the first one or never."""
    version = buffer[start] >> 4
    ip_header = (buffer[start] & 0x0F) * 4 if version == 4 else IPV6_HEADER
    if version not in (4, 6) or length < ip_header + UDP_HEADER or ip_header < IPV4_HEADER:
        raise Malformed("super-packet is shorter than its headers")
    protocol = buffer[start + 9] if version == 4 else buffer[start + 6]
    l4 = start + ip_header
    if protocol == PROTOCOL_TCP and header.gso_type == (GSO_TCPV4 if version == 4 else GSO_TCPV6):
        if length < ip_header + TCP_HEADER:
            raise Malformed("super-packet is shorter than its headers")
        l4_header = (buffer[l4 + 12] >> 4) * 4
        if l4_header < TCP_HEADER:
            raise Malformed("TCP data offset is out of bounds")
    elif protocol == PROTOCOL_UDP and header.gso_type == GSO_UDP_L4:
        l4_header = UDP_HEADER
    else:
        raise Malformed(f"GSO type {header.gso_type} with IP version {version} and protocol {protocol}")
    payload, size = length - ip_header - l4_header, header.gso_size
    if size == 0 or payload <= 0:
        raise Malformed("super-packet without segments")
    if -(-payload // size) > _MAX_READ_SEGMENTS:
        raise Malformed("super-packet of too many segments")
    if ip_header + l4_header + min(size, payload) > MTU:
        raise Malformed("segments exceed the MTU")
    # One read is never larger than what the IP length field of each segment can say, so nothing below can fail.
    end = start + length
    first = l4 + l4_header
    payloads = (buffer[at : min(at + size, end)] for at in range(first, end, size))
    make = _tcp_segments if protocol == PROTOCOL_TCP else _udp_segments
    return make(buffer, start, ip_header, first, payloads)


def _tcp_segments(
    buffer: bytearray, start: int, ip_header: int, first: int, payloads: Iterator[bytearray]
) -> Iterator[bytes]:
    l4 = start + ip_header
    l4_header = first - l4
    ports, sequence, ack_and_offset, flags, window, _, urgent = _TCP.unpack_from(buffer, l4)
    options = bytes(buffer[l4 + TCP_HEADER : first])
    make_ip, pseudo_sum = _ip_template(buffer, start, ip_header)
    # All that is the same in each segment, by RFC 1071 in one sum; 2^16 is 1 modulo 65535, so a sequence number may be
    # added as it is, and the flags stand in the low byte of a word.
    constant = pseudo_sum + sum16(ports + ack_and_offset[:4] + window + urgent + options)
    constant += ack_and_offset[4] << 8
    following = next(payloads, None)
    index = 0
    while following is not None:
        payload, following = following, next(payloads, None)
        size = l4_header + len(payload)
        segment_flags = flags if following is None else flags & ~(TCP_FIN | _TCP_PSH)
        total = congruent(payload)
        if size & 1:
            total <<= 8
        checksum = 0xFFFF - (total + constant + sequence + segment_flags + size) % 0xFFFF
        l4_bytes = _TCP.pack(ports, sequence, ack_and_offset, segment_flags, window, checksum, urgent)
        yield b"".join((make_ip(index, size), l4_bytes, options, payload))
        sequence = sequence + len(payload) & _SEQUENCE_MASK
        index += 1


def _udp_segments(
    buffer: bytearray, start: int, ip_header: int, first: int, payloads: Iterator[bytearray]
) -> Iterator[bytes]:
    l4 = start + ip_header
    ports = bytes(buffer[l4 : l4 + 4])
    make_ip, pseudo_sum = _ip_template(buffer, start, ip_header)
    constant = pseudo_sum + sum16(ports)
    for index, payload in enumerate(payloads):
        size = first - l4 + len(payload)
        total = congruent(payload)
        if size & 1:
            total <<= 8
        checksum = 0xFFFF - (total + constant + size + size) % 0xFFFF  # the length counts in both headers
        yield b"".join((make_ip(index, size), ports, _WORD.pack(size), _WORD.pack(checksum), payload))


def _ip_template(buffer: bytearray, start: int, size: int) -> tuple[Callable[[int, int], bytes], int]:
    """A maker of IP headers from segment index and transport length, and the sum of addresses and protocol."""
    if buffer[start] >> 4 == 4:
        head, _, first_id, middle, _, addresses = _IPV4.unpack_from(buffer, start)
        options = bytes(buffer[start + IPV4_HEADER : start + size])
        constant = sum16(head + middle + addresses + options)

        def make_ipv4(index: int, l4_size: int) -> bytes:
            total = size + l4_size
            identification = first_id + index & 0xFFFF
            checksum = 0xFFFF - (constant + total + identification) % 0xFFFF
            return _IPV4.pack(head, total, identification, middle, checksum, addresses) + options

        return make_ipv4, sum16(addresses) + middle[3]

    head, _, rest = _IPV6.unpack_from(buffer, start)

    def make_ipv6(_index: int, l4_size: int) -> bytes:
        return _IPV6.pack(head, l4_size, rest)

    return make_ipv6, sum16(rest[2:]) + rest[0]


class _Queued:
    """One write to come: a packet, or several of one connection that become one."""

    __slots__ = ("closed", "header", "key", "next_sequence", "octets", "owner", "packets", "payload_size")

    def __init__(self, packet: Buffer, key: bytes | None, owner: int) -> None:
        self.packets: list[Buffer] = [packet]
        self.key = key
        self.owner = owner
        # What follows is worked out when a second packet arrives; most never see one.
        self.header = 0
        self.payload_size = 0
        self.next_sequence = 0
        self.octets = 0
        self.closed = key is None


class TunPort:
    """The TUN's queue of packets to write, merged where the kernel can take them as one, in order per connection."""

    def __init__(self, descriptor: int, *, counters: Counter[str], vnet_hdr: bool, coalesce: bool) -> None:
        self._descriptor = descriptor
        self._counters = counters
        self._prefix = _PLAIN_HEADER if vnet_hdr else b""
        self._coalesce = coalesce and vnet_hdr
        self._queue: list[_Queued] = []
        self._latest: dict[bytes, _Queued] = {}
        self._queued = 0

    @property
    def is_congested(self) -> bool:
        """Whether something waits for the device."""
        return bool(self._queue)

    def fileno(self) -> int:
        """The descriptor, to wait for."""
        return self._descriptor

    def queue(self, packet: Buffer, key: bytes | None, owner: int) -> None:
        """Add a packet behind everything queued for its connection. `key`: its `flows.flow_key`."""
        if self._queued >= _MAX_QUEUED:
            self._counters["drop_tun_queue_full"] += 1
            return
        self._queued += 1
        if not self._coalesce:
            self._queue.append(_Queued(packet, None, owner))
            return
        if key is None:
            # It may belong to a connection that has packets queued (IP options): nothing may overtake it.
            self._latest.clear()
        else:
            latest = self._latest.get(key)
            if latest is not None and not latest.closed and latest.owner == owner and _join(latest, packet):
                return
        queued = _Queued(packet, key, owner)
        self._queue.append(queued)
        if key is not None:
            self._latest[key] = queued

    def purge(self, owner: int) -> int:
        """Take back what is queued for this owner; how many packets that were."""
        kept = [queued for queued in self._queue if queued.owner != owner]
        removed = self._queued - sum(len(queued.packets) for queued in kept)
        if not removed:
            return 0
        self._queue = kept
        self._latest.clear()
        for queued in kept:
            if queued.key is None:
                self._latest.clear()  # see `queue`
            else:
                self._latest[queued.key] = queued
        self._queued -= removed
        return removed

    def flush(self) -> bool:
        """Write what is queued; False: the device takes no more now, and the rest stays queued."""
        queue = self._queue
        self._latest.clear()
        for index, queued in enumerate(queue):
            if not self._write(queued):
                self._queue = queue[index:]
                self._queued = sum(len(left.packets) for left in self._queue)
                return False
        self._queue = []
        self._queued = 0
        return True

    def _write(self, queued: _Queued) -> bool:
        if len(queued.packets) == 1 or not self._coalesce:
            return self._write_singly(queued)
        try:
            self._writev(merged(queued.packets, queued.header), len(queued.packets))
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return False
            if refuses_merged_write(error):
                return self._write_without_merging(queued)
            self._count_failure(error, len(queued.packets))
        return True

    def _write_without_merging(self, queued: _Queued) -> bool:
        """Write a refused super-packet as the packets it was made of. Merging is at fault only if those pass."""
        passed = self._counters["tun_tx_packets"]
        done = self._write_singly(queued)
        if self._counters["tun_tx_packets"] > passed:
            self._coalesce = False
            _LOG.info("packets for the TUN are no longer merged, the kernel refuses merged ones (EINVAL)")
        return done

    def _write_singly(self, queued: _Queued) -> bool:
        for index, packet in enumerate(queued.packets):
            try:
                self._writev((self._prefix, packet) if self._prefix else (packet,), 1)
            except OSError as error:
                if error.errno == errno.EAGAIN:
                    del queued.packets[:index]
                    queued.closed = True
                    return False
                self._count_failure(error, 1)
        return True

    def _writev(self, parts: Sequence[Buffer], packets: int) -> None:
        octets = os.writev(self._descriptor, parts)
        self._counters["tun_tx_calls"] += 1
        self._counters["tun_tx_packets"] += packets
        self._counters["tun_tx_bytes"] += octets - len(self._prefix)

    def _count_failure(self, error: OSError, packets: int) -> None:
        name = errno.errorcode.get(error.errno or 0, "unknown").lower()
        self._counters[f"drop_tun_write_{name}"] += packets


def refuses_merged_write(error: OSError) -> bool:
    """EINVAL: 6.6.44 and LTS kernels with e269d79c7d35 refuse short tails; some vendor kernels everything merged."""
    return error.errno == errno.EINVAL


def merged(packets: Sequence[Buffer], header: int) -> list[Buffer]:
    """The parts of the write that stands for `packets`, whose IP and transport headers are `header` bytes long."""
    first = packets[0]
    is_ipv4 = first[0] >> 4 == 4
    ip_header = IPV4_HEADER if is_ipv4 else IPV6_HEADER
    protocol = first[9] if is_ipv4 else first[6]
    is_tcp = protocol == PROTOCOL_TCP
    total = header + sum(len(packet) - header for packet in packets)
    head = bytearray(first[:header])
    if is_ipv4:
        _WORD.pack_into(head, 2, total)
        _WORD.pack_into(head, _IPV4_CHECKSUM_AT, 0)
        _WORD.pack_into(head, _IPV4_CHECKSUM_AT, internet_checksum(head[:IPV4_HEADER]))
        addresses = bytes(head[12:20])
    else:
        _WORD.pack_into(head, 4, total - IPV6_HEADER)
        addresses = bytes(head[8:40])
    if is_tcp:
        gso_type, checksum_offset = GSO_TCPV4 if is_ipv4 else GSO_TCPV6, _TCP_CHECKSUM_AT
        head[ip_header + 13] |= packets[-1][ip_header + 13]  # only the last can carry PSH
    else:
        gso_type, checksum_offset = GSO_UDP_L4, _UDP_CHECKSUM_AT
        _WORD.pack_into(head, ip_header + 4, total - ip_header)
    half = len(addresses) // 2
    pseudo = pseudo_header_sum(addresses[:half], addresses[half:], protocol, total - ip_header)
    _WORD.pack_into(head, ip_header + checksum_offset, pseudo)
    vnet = VNET_HEADER.pack(NEEDS_CSUM, gso_type, header, len(first) - header, ip_header, checksum_offset)
    return [vnet, head, *(packet[header:] for packet in packets)]


def _join(queued: _Queued, packet: Buffer) -> bool:
    """Add `packet` to what is queued of its connection if the kernel's own receive offload would (spec tunnel 9.3)."""
    key = queued.key
    if key is None:
        return False
    if not queued.header and not _open(queued, key):
        queued.closed = True
        return False
    first, header = queued.packets[0], queued.header
    size = len(packet) - header
    if not 0 < size <= queued.payload_size or queued.octets + size > MAX_PACKET:
        return False
    is_tcp = key[-1] == PROTOCOL_TCP
    is_ipv4 = len(key) == IPV4_KEY_SIZE
    l4 = IPV4_HEADER if is_ipv4 else IPV6_HEADER
    same_ip = (
        packet[1] == first[1] and packet[8] == first[8] and packet[6:8] == first[6:8]
        if is_ipv4
        else packet[:1] == first[:1] and packet[1] & 0xF0 == first[1] & 0xF0 and packet[7] == first[7]
    )
    if not same_ip:
        return False
    if len(queued.packets) >= (_MAX_MERGED_SEGMENTS if is_tcp else _MAX_MERGED_DATAGRAMS):
        return False
    if is_tcp:
        flags = packet[l4 + 13]
        if (
            flags not in _TCP_MERGEABLE
            or int.from_bytes(packet[l4 + 4 : l4 + 8], "big") != queued.next_sequence
            or packet[l4 + 8 : l4 + 13] != first[l4 + 8 : l4 + 13]  # acknowledgement, data offset
            or packet[l4 + 14 : l4 + 16] != first[l4 + 14 : l4 + 16]  # window
            or packet[l4 + TCP_HEADER : header] != first[l4 + TCP_HEADER : header]  # options
        ):
            return False
        ends = bool(flags & _TCP_PSH)
    else:
        ends = False
    if not _has_valid_checksum(packet, key, l4):
        return False
    queued.packets.append(packet)
    queued.octets += size
    queued.next_sequence = queued.next_sequence + size & _SEQUENCE_MASK
    queued.closed = ends or size < queued.payload_size
    return True


def _open(queued: _Queued, key: bytes) -> bool:
    """Work out whether other packets may follow the first one, and what they must continue."""
    first = queued.packets[0]
    l4 = IPV4_HEADER if len(key) == IPV4_KEY_SIZE else IPV6_HEADER
    if key[-1] == PROTOCOL_TCP:
        # PSH ends a super-packet, so a first packet that has it stays alone.
        if first[l4 + 13] != _TCP_ACK:
            return False
        header = l4 + (first[l4 + 12] >> 4) * 4
        sequence = int.from_bytes(first[l4 + 4 : l4 + 8], "big")
    elif key[-1] == PROTOCOL_UDP:
        header, sequence = l4 + UDP_HEADER, 0
    else:
        return False
    payload = len(first) - header
    if payload <= 0 or not _has_valid_checksum(first, key, l4):
        return False
    queued.header = header
    queued.payload_size = payload
    queued.next_sequence = sequence + payload & _SEQUENCE_MASK
    queued.octets = len(first)
    return True


def _has_valid_checksum(packet: Buffer, key: bytes, l4: int) -> bool:
    """Whether the kernel's recomputation changes nothing: merging must not repair a packet (spec tunnel 2.4)."""
    size = len(packet) - l4
    if key[-1] == PROTOCOL_UDP and packet[l4 + 6] == packet[l4 + 7] == 0:
        return False
    # The pseudo header's addresses directly precede the transport in both families.
    value = congruent(packet[12 if l4 == IPV4_HEADER else 8 :])
    if size & 1:
        value <<= 8
    if (value + key[-1] + size) % 0xFFFF:
        return False
    return l4 == IPV6_HEADER or sum16(packet[:IPV4_HEADER]) == 0xFFFF
