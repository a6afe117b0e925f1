"""UDP super-packets: `UDP_GRO` on receive, `UDP_SEGMENT` on send (udp(7), performance chapters 2 and 3)."""

from __future__ import annotations

import errno
import logging
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from fzg.dataplane.sessions import CORE
from fzg.wire.endpoint import Endpoint

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterable, Sequence

    Ancillary = tuple[int, int, bytes]

K = TypeVar("K")
V = TypeVar("V")

_LOG = logging.getLogger(__name__)

# Specification constants.
MAX_DATAGRAM = 1316  # largest UDP payload sent or accepted, spec tunnel 1.2
MAX_SEGMENTS = 64  # UDP_MAX_SEGMENTS of the kernel, spec tunnel 9.6
_MAX_BATCH_BYTES = {socket.AF_INET: 65535 - 68, socket.AF_INET6: 65535 - 48}  # spec tunnel 9.6

# <linux/udp.h>, <linux/in.h>, <linux/in6.h>: not all in Python's socket module.
SOL_UDP = 17
UDP_SEGMENT = 103
UDP_GRO = 104
IP_PKTINFO = 8
IPV6_PKTINFO = 50

# Implementation constants.
# Holds the largest train the kernel makes of our largest datagrams; a smaller buffer would cut one short.
RECEIVE_BUFFER_SIZE = MAX_SEGMENTS * MAX_DATAGRAM
# Datagrams of clients that may wait for the socket: 64 full batches (spec tunnel 9.6), about 5 MB.
_MAX_QUEUED_DATA = 64 * 64
# Further room for the core's own datagrams, so that waiting data never displaces STUN or a handshake.
_MAX_QUEUED_CONTROL = 1024
# Distinct addresses remembered in packed and textual form; beyond it, a flood of sources costs conversions, not memory.
_MAX_CACHED_ADDRESSES = 4096

_IN_PKTINFO = struct.Struct("=I4s4s")  # interface, local address (to send from), header destination
_IN6_PKTINFO = struct.Struct("=16sI")
_INT = struct.Struct("=i")
_U16 = struct.Struct("=H")

_WOULD_BLOCK = frozenset({errno.EAGAIN, errno.EWOULDBLOCK})
# An ICMP error that the kernel reports on the next call, for an earlier datagram to whomever (spec README).
_ICMP_ERRORS = frozenset(
    {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EPROTO, errno.ENOPROTOOPT}
)
_SOCKET_GONE = frozenset({errno.EBADF, errno.ENOTSOCK})


class Arrival(NamedTuple):
    """What one receive call left in the buffer: datagrams of `stride` bytes, the last one maybe shorter."""

    length: int
    stride: int
    source: Endpoint
    local: Endpoint
    ecn: int


class Batch:
    """Datagrams that one call can send. `owners` says for each whose data it is."""

    __slots__ = ("closed", "destination", "ecn", "octets", "owners", "payloads", "size", "source")

    def __init__(self, source: bytes | None, destination: Endpoint, ecn: int, size: int) -> None:
        self.source = source
        self.destination = destination
        self.ecn = ecn
        self.size = size
        self.octets = 0
        self.closed = False
        self.payloads: list[bytes] = []
        self.owners: list[int] = []


class UdpPort:
    """One bound socket: receives into the engine's buffer, and queues and sends batches in order per destination."""

    def __init__(
        self, family: int, udp: socket.socket, port: int, *, counters: Counter[str], segmentation: bool
    ) -> None:
        self._family = family
        self._udp = udp
        self._port = port
        self._counters = counters
        self._segmentation = segmentation and supports_segmentation(udp)
        self._max_octets = _MAX_BATCH_BYTES[socket.AddressFamily(family)]
        self._queue: list[Batch] = []
        self._latest: dict[Endpoint, Batch] = {}
        self._queued = 0
        self._sources: dict[tuple[str, int], Endpoint] = {}
        self._locals: dict[bytes, Endpoint] = {}
        self._destinations: dict[Endpoint, tuple[str, int]] = {}
        self._ancillary: dict[tuple[bytes | None, int, int], Sequence[Ancillary]] = {}
        self._ancillary_room = sum(socket.CMSG_SPACE(size) for size in (_IN6_PKTINFO.size, _INT.size, _INT.size))

    @property
    def is_congested(self) -> bool:
        """Whether something waits for the socket."""
        return bool(self._queue)

    def fileno(self) -> int:
        """The descriptor, to wait for."""
        return self._udp.fileno()

    def receive(self, buffer: Sequence[memoryview]) -> Arrival | None:
        """One receive call; None: nothing there. `length` 0: one to pass over."""
        try:
            length, ancillary, flags, address = self._udp.recvmsg_into(buffer, self._ancillary_room)
        except OSError as error:
            if error.errno in _WOULD_BLOCK:
                return None
            if error.errno in _SOCKET_GONE:
                raise
            self._counters["udp_icmp_errors" if error.errno in _ICMP_ERRORS else "udp_receive_errors"] += 1
            return _NOTHING
        local: bytes | None = None
        ecn, stride = 0, length
        for level, kind, data in ancillary:
            if level == SOL_UDP and kind == UDP_GRO:
                stride = _INT.unpack(data)[0] or length
            elif level == socket.IPPROTO_IP:
                if kind == IP_PKTINFO:
                    local = _IN_PKTINFO.unpack(data)[2]
                elif kind == socket.IP_TOS:
                    ecn = data[0] & 0b11
            elif level == socket.IPPROTO_IPV6:
                if kind == IPV6_PKTINFO:
                    local = _IN6_PKTINFO.unpack(data)[0]
                elif kind == socket.IPV6_TCLASS:
                    ecn = _INT.unpack(data)[0] & 0b11
        if local is None:
            self._counters["drop_udp_without_local_address"] += 1
            return _NOTHING
        if flags & socket.MSG_TRUNC and stride == length:
            self._counters["drop_udp_oversized"] += 1
            return _NOTHING
        return Arrival(length, stride, self._source(address), self._local(local), ecn)

    def queue(
        self, payloads: Iterable[bytes], *, source: bytes | None, destination: Endpoint, ecn: int, owner: int
    ) -> None:
        """Add datagrams behind everything queued for their destination."""
        limit = _MAX_QUEUED_DATA if owner != CORE else _MAX_QUEUED_DATA + _MAX_QUEUED_CONTROL
        batch = self._latest.get(destination)
        if batch is not None and (batch.source != source or batch.ecn != ecn):
            batch = None
        for payload in payloads:
            if self._queued >= limit:
                self._counters["drop_udp_queue_full"] += 1
                continue
            size = len(payload)
            if (
                batch is None
                or batch.closed
                or size > batch.size
                or len(batch.payloads) >= MAX_SEGMENTS
                or batch.octets + size > self._max_octets
            ):
                batch = Batch(source, destination, ecn, size)
                self._queue.append(batch)
                self._latest[destination] = batch
            elif size < batch.size:
                batch.closed = True
            batch.payloads.append(payload)
            batch.owners.append(owner)
            batch.octets += size
            self._queued += 1

    def purge(self, owner: int) -> int:
        """Take back what is queued for this owner; how many datagrams that were."""
        removed = 0
        for batch in self._queue:
            if owner in batch.owners:
                kept = [(p, o) for p, o in zip(batch.payloads, batch.owners, strict=True) if o != owner]
                removed += len(batch.payloads) - len(kept)
                batch.payloads = [payload for payload, _ in kept]
                batch.owners = [o for _, o in kept]
                batch.octets = sum(map(len, batch.payloads))
        self._queue = [batch for batch in self._queue if batch.payloads]
        self._latest = {batch.destination: batch for batch in self._queue}
        self._queued -= removed
        return removed

    def flush(self) -> bool:
        """Send what is queued; False: the socket takes no more now, and the rest stays queued."""
        queue = self._queue
        for index, batch in enumerate(queue):
            if not self._send(batch):
                self._queue = queue[index:]
                self._queued = sum(len(left.payloads) for left in self._queue)
                self._latest = {left.destination: left for left in self._queue}
                return False
        self._queue = []
        self._latest.clear()
        self._queued = 0
        return True

    def _send(self, batch: Batch) -> bool:
        if not self._segmentation or len(batch.payloads) == 1:
            return self._send_singly(batch)
        try:
            self._sendmsg(batch.payloads, batch, batch.size)
        except OSError as error:
            if error.errno in _WOULD_BLOCK:
                return False
            if lacks_checksum_offload(error) or refuses_segmentation(error) or exceeds_segmentation_limit(error):
                return self._send_without_segmentation(batch, error)
            self._count_failure(error, len(batch.payloads))
        return True

    def _send_without_segmentation(self, batch: Batch, cause: OSError) -> bool:
        """Send a refused batch one by one. Segmentation is at fault only if the datagrams themselves pass."""
        passed = self._counters["udp_tx_packets"]
        done = self._send_singly(batch)
        if self._counters["udp_tx_packets"] > passed:
            self._segmentation = False
            name = errno.errorcode.get(cause.errno or 0, "error")
            _LOG.info("UDP segmentation offload is off, the kernel refuses it (%s)", name)
        return done

    def _send_singly(self, batch: Batch) -> bool:
        for index, payload in enumerate(batch.payloads):
            try:
                self._sendmsg((payload,), batch, 0)
            except OSError as error:
                if error.errno in _WOULD_BLOCK:
                    del batch.payloads[:index], batch.owners[:index]
                    return False
                self._count_failure(error, 1)
        return True

    def _sendmsg(self, payloads: Sequence[bytes], batch: Batch, segment: int) -> None:
        key = (batch.source, batch.ecn, segment)
        ancillary = self._ancillary.get(key)
        if ancillary is None:
            ancillary = _remember(self._ancillary, key, self._make_ancillary(*key))
        address = self._destinations.get(batch.destination)
        if address is None:
            address = _remember(self._destinations, batch.destination, (batch.destination.host, batch.destination.port))
        try:
            octets = self._udp.sendmsg(payloads, ancillary, 0, address)
        except OSError as error:
            # A pending ICMP error is reported once, for some earlier datagram, instead of sending this one.
            if error.errno != errno.ECONNREFUSED:
                raise
            self._counters["udp_icmp_errors"] += 1
            octets = self._udp.sendmsg(payloads, ancillary, 0, address)
        self._counters["udp_tx_calls"] += 1
        self._counters["udp_tx_packets"] += len(payloads)
        self._counters["udp_tx_bytes"] += octets

    def _make_ancillary(self, source: bytes | None, ecn: int, segment: int) -> Sequence[Ancillary]:
        ancillary: list[Ancillary] = []
        is_ipv4 = self._family == socket.AF_INET
        if source is not None:
            if is_ipv4:
                ancillary.append((socket.IPPROTO_IP, IP_PKTINFO, _IN_PKTINFO.pack(0, source, bytes(4))))
            else:
                ancillary.append((socket.IPPROTO_IPV6, IPV6_PKTINFO, _IN6_PKTINFO.pack(source, 0)))
        if ecn and is_ipv4:
            ancillary.append((socket.IPPROTO_IP, socket.IP_TOS, _INT.pack(ecn)))
        elif ecn:
            ancillary.append((socket.IPPROTO_IPV6, socket.IPV6_TCLASS, _INT.pack(ecn)))
        if segment:
            ancillary.append((SOL_UDP, UDP_SEGMENT, _U16.pack(segment)))
        return ancillary

    def _count_failure(self, error: OSError, datagrams: int) -> None:
        name = errno.errorcode.get(error.errno or 0, "unknown").lower()
        self._counters[f"drop_udp_send_{name}"] += datagrams

    def _source(self, address: tuple[str, int]) -> Endpoint:
        key = address[:2]
        return self._sources.get(key) or _remember(self._sources, key, Endpoint.of(*key))

    def _local(self, ip: bytes) -> Endpoint:
        return self._locals.get(ip) or _remember(self._locals, ip, Endpoint(ip, self._port))


def supports_segmentation(udp: socket.socket) -> bool:
    """Whether the kernel knows UDP_SEGMENT (4.18). One that does not would ignore it and glue datagrams together."""
    try:
        udp.getsockopt(SOL_UDP, UDP_SEGMENT)
    except OSError:
        return False
    return True


def lacks_checksum_offload(error: OSError) -> bool:
    """EIO: the egress device cannot checksum, so the kernel cannot segment (net/ipv4/udp.c, udp_send_skb)."""
    return error.errno == errno.EIO


def refuses_segmentation(error: OSError) -> bool:
    """EINVAL: a driver's limit, e.g. IPv6 on virtio-net of 5.15 and 6.1; may begin at any time."""
    return error.errno == errno.EINVAL


def exceeds_segmentation_limit(error: OSError) -> bool:
    """EMSGSIZE: the batch, or one segment with its headers, is more than the device's or the kernel's limit."""
    return error.errno == errno.EMSGSIZE


_NOTHING = Arrival(0, 0, Endpoint(b"", 0), Endpoint(b"", 0), 0)


def _remember(cache: dict[K, V], key: K, value: V) -> V:
    if len(cache) >= _MAX_CACHED_ADDRESSES:
        cache.clear()
    cache[key] = value
    return value
