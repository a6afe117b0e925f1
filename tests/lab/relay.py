"""The test relay: what a Firezone relay does on the wire, with knobs for what may go wrong (spec turn.md 5).

One thread, plain sockets. Data moves in super-packets (UDP_GRO in, UDP_SEGMENT out): Python can carry Gbit/s then.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import random
import selectors
import socket
import struct
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from tests.lab import derivations, stun
from tests.lab.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

_LOG = logging.getLogger("lab.relay")

REALM = "firezone"
SOFTWARE = b"firezone-relay; rev=lab00000"
NONCE_USES = 10_000
DEFAULT_LIFETIME_S = 600
MAX_LIFETIME_S = 3600
CHANNEL_S = 600.0
CHANNEL_COOLDOWN_S = 300.0

_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104
_MAX_SEGMENTS = 64
_MAX_UDP_PAYLOAD = 65_507 - 40  # fits both families
_BATCH = 32  # datagrams taken from one socket before the others get their turn
_BUFFER_BYTES = 4 << 20
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_ANCILLARY_BYTES = socket.CMSG_SPACE(4)

Address = tuple[str, int]


class Channel:
    """One bound channel of an allocation."""

    __slots__ = ("header", "number", "peer", "socket", "until")

    def __init__(self, number: int, peer: Address, sock: socket.socket, until: float) -> None:
        self.number = number
        self.peer = peer
        self.socket = sock
        self.until = until
        self.header = struct.pack("!H", number)


class Allocation:
    """What one client socket has been given."""

    __slots__ = ("by_number", "by_peer", "client", "expires", "listener", "port", "sockets", "username")

    def __init__(self, client: Address, listener: socket.socket, username: str, port: int, expires: float) -> None:
        self.client = client
        self.listener = listener
        self.username = username
        self.port = port
        self.expires = expires
        self.sockets: dict[int, socket.socket] = {}
        self.by_number: dict[int, Channel] = {}
        self.by_peer: dict[Address, Channel] = {}


class Refused(Exception):  # noqa: N818 (it is an answer, not an error of ours)
    """The error response to give."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Relay:
    """A relay on these addresses. `run` serves until `stop`; orders are the `op_` methods, posted into the loop."""

    def __init__(
        self,
        *,
        ipv4: str | None,
        ipv6: str | None,
        port: int = 3478,
        ports: tuple[int, int] = (49152, 65535),
        secret: str | None = None,
    ) -> None:
        self.secret = secret or os.urandom(32).hex()
        self.addresses = {4: ipv4, 6: ipv6}
        self.port = port
        self._port_range = ports
        self._selector = selectors.DefaultSelector()
        self._listeners: dict[int, socket.socket] = {}
        self._allocations: dict[Address, Allocation] = {}
        self._nonces: dict[Address, list[Any]] = {}
        self._orders: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, self._on_wake)
        self._buffer = bytearray(1 << 17)
        self._stopped = False  # a stop may come before `run` begins
        self._thread: int | None = None
        self._clock_base = time.monotonic()
        self._clock_factor = 1.0
        self._delayed: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        # the knobs
        self._drop_next: Counter[str] = Counter()
        self._forced: dict[str, list[Any]] = {}
        self._reply_delay = 0.0
        self._padding = 0
        self._mapped: Address | None = None
        self._silent = False
        self._blackhole = False
        self.requests: Counter[str] = Counter()
        self.carried: Counter[str] = Counter()
        self.on_new_secret: Callable[[], None] = lambda: None

    def open(self) -> None:
        """Bind the listening sockets; port 0 picks one for both families."""
        self.port = self.port or free_port(*filter(None, self.addresses.values()))
        for version, address in self.addresses.items():
            if address is not None:
                sock = _udp_socket(address, self.port)
                self._listeners[version] = sock
                self._selector.register(sock, selectors.EVENT_READ, lambda sock=sock: self._on_client(sock))

    def run(self) -> None:
        """Serve until `stop`."""
        self._thread = threading.get_ident()
        sweep = time.monotonic() + 1
        while not self._stopped:
            timeout = sweep - time.monotonic()
            if self._delayed:
                timeout = min(timeout, self._delayed[0][0] - time.monotonic())
            for key, _ in self._selector.select(max(timeout, 0)):
                key.data()
            now = time.monotonic()
            while self._delayed and self._delayed[0][0] <= now:
                heapq.heappop(self._delayed)[2]()
            if now >= sweep:
                sweep = now + 1
                self._sweep()
        for allocation in list(self._allocations.values()):
            self._delete(allocation)
        for sock in self._listeners.values():
            sock.close()

    def stop(self) -> None:
        """End `run`, from any thread or a signal handler."""
        self._stopped = True
        self._wake_writer.send(b"x")

    def post(self, order: Callable[[], Any]) -> Any:
        """Run `order` in the loop's thread and return its result."""
        future: Future[Any] = Future()
        self._orders.put((order, future))
        self._wake_writer.send(b"x")
        return future.result(10)

    # --- orders ---

    def op_requests(self) -> dict[str, int]:
        """Requests received so far, by method."""
        return dict(self.requests)

    def op_carried(self) -> dict[str, int]:
        """Packets and bytes relayed and dropped."""
        return dict(self.carried)

    def op_allocations(self) -> list[dict[str, Any]]:
        """Every allocation with its channels; times in seconds from now, on the relay's (scaled) clock."""
        now = self._now()
        return [
            {
                "client": list(a.client),
                "username": a.username,
                "port": a.port,
                "families": sorted(a.sockets),
                "expires_in": a.expires - now,
                "channels": [
                    {"number": c.number, "peer": list(c.peer), "expires_in": c.until - now}
                    for c in a.by_number.values()
                ],
            }
            for a in self._allocations.values()
        ]

    def op_drop_next(self, method: str, count: int = 1) -> None:
        """Ignore the next `count` requests of a method (`binding`, `allocate`, `refresh`, `channel_bind`)."""
        self._drop_next[method] += count

    def op_force_error(self, method: str, code: int, count: int = 1, signed: bool = True) -> None:
        """Answer the next `count` requests of a method with this error."""
        self._forced[method] = [code, count, signed]

    def op_delay(self, seconds: float) -> None:
        """Answer all STUN requests this much later."""
        self._reply_delay = seconds

    def op_pad(self, surplus: int) -> None:
        """Append this many bytes to each ChannelData message (spec turn.md 3.3)."""
        self._padding = surplus

    def op_mapped_address(self, host: str | None = None, port: int = 0) -> None:
        """Report this as everybody's mapped address; None: the truth."""
        self._mapped = (host, port) if host else None

    def op_silent(self, silent: bool = True) -> None:
        """Answer nothing and relay nothing, as if the host were gone."""
        self._silent = silent

    def op_blackhole(self, blackhole: bool = True) -> None:
        """Relay nothing, but answer requests."""
        self._blackhole = blackhole

    def op_time_factor(self, factor: float) -> None:
        """Let allocations and channels age this many times faster."""
        now = self._now()
        self._clock_base, self._clock_factor = time.monotonic(), factor
        self._clock_base -= now / factor

    def op_expire(self, what: str = "channels") -> None:
        """Let all `channels` or `allocations` expire now."""
        if what == "allocations":
            for allocation in list(self._allocations.values()):
                self._delete(allocation)
        for allocation in self._allocations.values():
            for channel in allocation.by_number.values():
                channel.until = self._now()

    def op_forget_nonces(self) -> None:
        """Let every nonce be stale."""
        self._nonces.clear()

    def op_restart(self, secret: str | None = None) -> str:
        """Lose all state and take a new secret; returns the relay id that follows. The portal is told of it."""
        for allocation in list(self._allocations.values()):
            self._delete(allocation)
        self._nonces.clear()
        self.secret = secret or os.urandom(32).hex()
        threading.Thread(target=self.on_new_secret, daemon=True).start()
        return derivations.relay_id(self.secret)

    # --- the loop ---

    def _now(self) -> float:
        return (time.monotonic() - self._clock_base) * self._clock_factor

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_reader.recv(1024)
        while not self._orders.empty():
            order, future = self._orders.get()
            try:
                future.set_result(order())
            except Exception as error:
                future.set_exception(error)

    def _sweep(self) -> None:
        now = self._now()
        for allocation in list(self._allocations.values()):
            if allocation.expires <= now:
                self._delete(allocation)
                continue
            for channel in list(allocation.by_number.values()):
                if channel.until + CHANNEL_COOLDOWN_S <= now:
                    del allocation.by_number[channel.number], allocation.by_peer[channel.peer]

    # --- data ---

    def _on_client(self, sock: socket.socket) -> None:
        view = memoryview(self._buffer)
        for _ in range(_BATCH):
            try:
                size, ancillary, _, source = sock.recvmsg_into([view], _ANCILLARY_BYTES)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error of an earlier send
            if self._silent or source[1] == 0 or not size:
                continue
            stride = _stride(ancillary) or size
            client = (source[0], source[1])
            # The first octet of each datagram of the train: the kernel joins whatever has the same size.
            if all(64 <= octet <= 79 for octet in view[:size:stride]):
                self._relay_from_client(client, view[:size], stride)
                continue
            for offset in range(0, size, stride):
                packet = view[offset : min(offset + stride, size)]
                if 64 <= packet[0] <= 79:
                    self._relay_from_client(client, packet, len(packet))
                elif packet[0] <= 3:
                    self._on_stun(bytes(packet), client, sock)

    def _relay_from_client(self, client: Address, data: memoryview, stride: int) -> None:
        if self._blackhole:
            return
        allocation = self._allocations.get(client)
        if allocation is None:
            self.carried["dropped_without_allocation"] += 1
            return
        now = self._now()
        size = len(data)
        run: list[memoryview] = []
        last_header, length = b"", 0
        last_channel: Channel | None = None
        for offset in range(0, size, stride):
            end = min(offset + stride, size)
            header = bytes(data[offset : offset + 4])
            if header != last_header:
                if len(header) < 4:
                    continue
                number, shorter = struct.unpack("!HH", header)
                if (
                    end == size
                    and run
                    and header[:2] == last_header[:2]
                    and shorter < length
                    and shorter + 4 <= end - offset
                ):
                    run.append(data[offset + 4 : offset + 4 + shorter])  # only the last segment may be shorter
                    break
                if last_channel is not None:
                    _send_run(last_channel.socket, run, last_channel.peer)
                    last_channel, run = None, []
                length = shorter
                channel = allocation.by_number.get(number)
                last_header = header
                if channel is None or channel.until <= now or length > end - offset - 4:
                    self.carried["dropped_from_client"] += 1
                    last_header = b""
                    continue
                last_channel = channel
            elif end - offset < stride and length > end - offset - 4:
                self.carried["dropped_from_client"] += 1
                continue
            run.append(data[offset + 4 : offset + 4 + length])
        if last_channel is not None:
            _send_run(last_channel.socket, run, last_channel.peer)
        self.carried["bytes_from_clients"] += size

    def _on_peer(self, allocation: Allocation, sock: socket.socket) -> None:
        view = memoryview(self._buffer)
        for _ in range(_BATCH):
            try:
                size, ancillary, _, source = sock.recvmsg_into([view], _ANCILLARY_BYTES)
            except BlockingIOError:
                return
            except OSError:
                continue
            channel = allocation.by_peer.get((source[0], source[1]))
            if channel is None or channel.until <= self._now() or self._blackhole or self._silent:
                self.carried["dropped_from_peer"] += 1
                continue
            stride = min(_stride(ancillary) or size, size)
            header = channel.header + struct.pack("!H", stride)
            tail = bytes(self._padding)
            run: list[bytes | memoryview] = []
            full = size - size % stride if stride else 0
            for offset in range(0, full, stride):
                run += (
                    (header, view[offset : offset + stride], tail) if tail else (header, view[offset : offset + stride])
                )
            if full < size:
                run += [channel.header + struct.pack("!H", size - full), view[full:size]] + ([tail] if tail else [])
            per_message = stride + 4 + len(tail)
            pieces = 3 if tail else 2
            at_once = max(1, min(_MAX_SEGMENTS, _MAX_UDP_PAYLOAD // per_message)) * pieces
            for start in range(0, len(run), at_once):
                _send_segments(
                    allocation.listener, run[start : start + at_once], per_message, pieces, allocation.client
                )
            if size == 0:
                _send(allocation.listener, [header, tail], [], allocation.client)
            self.carried["bytes_from_peers"] += size

    # --- STUN ---

    def _on_stun(self, packet: bytes, client: Address, sock: socket.socket) -> None:
        try:
            message = stun.Message(packet)
        except (ValueError, struct.error):
            return
        if message.message_class != stun.REQUEST:
            return
        method = stun.METHODS.get(message.method, "other")
        self.requests[method] += 1
        if self._drop_next[method] > 0:
            self._drop_next[method] -= 1
            return
        reply = self._answer(message, method, client, sock)
        if reply is None:
            return
        if self._reply_delay > 0:
            self._sequence += 1
            due = time.monotonic() + self._reply_delay
            heapq.heappush(self._delayed, (due, self._sequence, lambda: _send(sock, [reply], [], client)))
        else:
            _send(sock, [reply], [], client)

    def _answer(self, message: stun.Message, method: str, client: Address, sock: socket.socket) -> bytes | None:
        username = message.attributes.get(stun.USERNAME)
        key = None
        if username is not None:
            key = self._key_of(username)
            if key is None and message.method != stun.BINDING:
                return None
        forced = self._forced.get(method)
        try:
            if forced:
                forced[1] -= 1
                if forced[1] <= 0:
                    del self._forced[method]
                return self._error(message, client, forced[0], key if forced[2] else None)
            if message.method == stun.BINDING:
                return self._success(message, [self._mapped_attribute(message, client)], None)
            self._check_form(message)
        except (Refused, ValueError, struct.error, IndexError):
            return self._error(message, client, 400, None)
        try:
            self._authenticate(message, client, key)
            match message.method:
                case stun.ALLOCATE:
                    attributes = self._allocate(message, client, sock)
                case stun.REFRESH:
                    attributes = self._refresh(message, client)
                case stun.CHANNEL_BIND:
                    attributes = self._bind(message, client)
                case _:
                    attributes = []
            return self._success(message, attributes, key)
        except Refused as refused:
            return self._error(message, client, refused.code, key)

    def _check_form(self, message: stun.Message) -> None:
        """Step 2, and the well-formedness of the attributes we know."""
        attributes = message.attributes
        match message.method:
            case stun.ALLOCATE:
                required = {stun.REQUESTED_TRANSPORT}
            case stun.CHANNEL_BIND:
                required = {stun.CHANNEL_NUMBER, stun.XOR_PEER_ADDRESS}
            case stun.REFRESH | stun.CREATE_PERMISSION:
                required = set()
            case _:
                raise Refused(400)
        if not required <= attributes.keys():
            raise Refused(400)
        sizes = {
            stun.REQUESTED_TRANSPORT: 4,
            stun.CHANNEL_NUMBER: 4,
            stun.LIFETIME: 4,
            stun.ADDITIONAL_ADDRESS_FAMILY: 4,
        }
        if any(len(attributes[attribute]) != size for attribute, size in sizes.items() if attribute in attributes):
            raise Refused(400)
        if stun.XOR_PEER_ADDRESS in attributes:
            stun.decode_address(attributes[stun.XOR_PEER_ADDRESS], message.transaction_id)

    def _authenticate(self, message: stun.Message, client: Address, key: bytes | None) -> None:
        """Step 4, in its order."""
        attributes = message.attributes
        if message.integrity_at is None or stun.USERNAME not in attributes or stun.NONCE not in attributes:
            raise Refused(401)
        try:
            nonce = str(uuid.UUID(attributes[stun.NONCE].decode()))
        except ValueError:
            raise Refused(401) from None
        issued = self._nonces.get(client)
        if issued is None or issued[0] != nonce or issued[1] <= 0:
            raise Refused(438)
        issued[1] -= 1
        expiry = int(attributes[stun.USERNAME].decode().partition(":")[0])
        if expiry < time.time() or key is None or not message.signed_with(key):
            raise Refused(401)

    def _key_of(self, username: bytes) -> bytes | None:
        try:
            expiry, salt = username.decode().split(":")
            if not expiry.isascii() or not expiry.isdigit() or int(expiry) >= 1 << 64:
                return None
        except ValueError:
            return None
        password = derivations.turn_password(expiry, self.secret, salt)
        return derivations.long_term_key(f"{expiry}:{salt}", password, REALM)

    def _allocate(self, message: stun.Message, client: Address, sock: socket.socket) -> list[tuple[int, bytes]]:
        if client in self._allocations:
            raise Refused(437)
        if message.attributes[stun.REQUESTED_TRANSPORT][0] != 17:
            raise Refused(400)
        families = self._families(message)
        username = message.attributes[stun.USERNAME].decode()
        for older in [a for a in self._allocations.values() if a.username == username]:
            self._delete(older)
        lifetime = self._lifetime(message)
        allocation = Allocation(client, sock, username, 0, self._now() + lifetime)
        self._open_ports(allocation, families)
        self._allocations[client] = allocation
        _LOG.info("allocation for %s: port %d, families %s", client, allocation.port, families)
        relayed = [
            (
                stun.XOR_RELAYED_ADDRESS,
                stun.encode_address((self.addresses[family], allocation.port), message.transaction_id),
            )
            for family in families
        ]
        return [*relayed, self._mapped_attribute(message, client), (stun.LIFETIME, struct.pack("!I", lifetime))]

    def _families(self, message: stun.Message) -> list[int]:
        """The table of spec turn.md 5.3."""
        have = {family for family, address in self.addresses.items() if address is not None}
        requested = _family(message.attributes.get(stun.REQUESTED_ADDRESS_FAMILY))
        additional = _family(message.attributes.get(stun.ADDITIONAL_ADDRESS_FAMILY))
        if additional is not None and (requested is not None or additional == 4):
            raise Refused(400)
        if additional == 6:
            return sorted(have)
        wanted = requested or 4
        if wanted not in have:
            raise Refused(440)
        return [wanted]

    def _open_ports(self, allocation: Allocation, families: list[int]) -> None:
        low, high = self._port_range
        start = random.randrange(high - low + 1)
        for probe in range(high - low + 1):
            port = low + (start + probe) % (high - low + 1)
            opened: dict[int, socket.socket] = {}
            try:
                for family in families:
                    opened[family] = _udp_socket(self.addresses[family], port)
            except OSError:
                for sock in opened.values():
                    sock.close()
                continue
            allocation.port, allocation.sockets = port, opened
            for sock in opened.values():
                self._selector.register(sock, selectors.EVENT_READ, lambda sock=sock: self._on_peer(allocation, sock))
            return
        raise Refused(508)

    def _refresh(self, message: stun.Message, client: Address) -> list[tuple[int, bytes]]:
        allocation = self._allocations.get(client)
        if allocation is None:
            raise Refused(437)
        lifetime = self._lifetime(message)
        if lifetime == 0:
            self._delete(allocation)
        else:
            allocation.expires = self._now() + lifetime
        return [(stun.LIFETIME, struct.pack("!I", lifetime))]

    def _bind(self, message: stun.Message, client: Address) -> list[tuple[int, bytes]]:
        allocation = self._allocations.get(client)
        if allocation is None:
            raise Refused(437)
        number = struct.unpack_from("!H", message.attributes[stun.CHANNEL_NUMBER])[0]
        peer = stun.decode_address(message.attributes[stun.XOR_PEER_ADDRESS], message.transaction_id)
        sock = allocation.sockets.get(6 if ":" in peer[0] else 4)
        if sock is None:
            raise Refused(443)
        of_peer, of_number = allocation.by_peer.get(peer), allocation.by_number.get(number)
        if of_peer is not of_number or not 0x4000 <= number <= 0x4FFF:
            raise Refused(400)
        channel = of_peer or Channel(number, peer, sock, 0.0)
        channel.until = self._now() + CHANNEL_S
        allocation.by_peer[peer] = allocation.by_number[number] = channel
        return []

    def _delete(self, allocation: Allocation) -> None:
        self._allocations.pop(allocation.client, None)
        for sock in allocation.sockets.values():
            self._selector.unregister(sock)
            sock.close()
        _LOG.info("allocation of %s ended", allocation.client)

    def _lifetime(self, message: stun.Message) -> int:
        value = message.attributes.get(stun.LIFETIME)
        return DEFAULT_LIFETIME_S if value is None else min(struct.unpack("!I", value)[0], MAX_LIFETIME_S)

    def _mapped_attribute(self, message: stun.Message, client: Address) -> tuple[int, bytes]:
        return stun.XOR_MAPPED_ADDRESS, stun.encode_address(self._mapped or client, message.transaction_id)

    def _success(self, message: stun.Message, attributes: list[tuple[int, bytes]], key: bytes | None) -> bytes:
        first = (stun.SOFTWARE, SOFTWARE)
        return stun.encode(message.method, stun.SUCCESS, message.transaction_id, [first, *attributes], key)

    def _error(self, message: stun.Message, client: Address, code: int, key: bytes | None) -> bytes:
        attributes = [(stun.SOFTWARE, SOFTWARE), (stun.ERROR_CODE, stun.error_value(code))]
        if code in {401, 438}:
            issued = self._nonces.get(client)
            if issued is None or issued[1] <= 0:
                issued = self._nonces[client] = [str(uuid.uuid4()), NONCE_USES]
            attributes += [(stun.REALM, REALM.encode()), (stun.NONCE, issued[0].encode())]
        return stun.encode(message.method, stun.ERROR, message.transaction_id, attributes, key)


def _udp_socket(address: str | None, port: int) -> socket.socket:
    assert address is not None
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        for forced, plain in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
            try:
                sock.setsockopt(socket.SOL_SOCKET, forced, _BUFFER_BYTES)
            except PermissionError:
                sock.setsockopt(socket.SOL_SOCKET, plain, _BUFFER_BYTES)
        with contextlib.suppress(OSError):
            sock.setsockopt(_SOL_UDP, _UDP_GRO, 1)
        sock.setblocking(False)
        sock.bind((address, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _family(value: bytes | None) -> int | None:
    match value and value[0]:
        case None:
            return None
        case 1:
            return 4
        case 2:
            return 6
    raise Refused(400)


def _stride(ancillary: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in ancillary:
        if level == _SOL_UDP and kind == _UDP_GRO:
            return int(struct.unpack("=i", data[:4])[0])
    return 0


def _send_run(sock: socket.socket, run: list[memoryview], peer: Address) -> None:
    """Send messages of equal length."""
    if run:
        _send_segments(sock, run, len(run[0]), 1, peer)


def _send_segments(
    sock: socket.socket, pieces: list[Any], segment_bytes: int, pieces_each: int, destination: Address
) -> None:
    if len(pieces) > pieces_each and segment_bytes:
        segment = [(_SOL_UDP, _UDP_SEGMENT, struct.pack("=H", segment_bytes))]
        try:
            sock.sendmsg(pieces, segment, 0, destination)
            return
        except BlockingIOError:
            return
        except OSError as error:
            _LOG.debug("UDP_SEGMENT refused, sending singly: %s", error)
    for start in range(0, len(pieces), pieces_each):
        _send(sock, pieces[start : start + pieces_each], [], destination)


def _send(sock: socket.socket, pieces: list[Any], ancillary: list[Any], destination: Address) -> None:
    # A relay may lose packets; a full buffer or an ICMP error of an earlier one is such a loss.
    with contextlib.suppress(OSError):
        sock.sendmsg(pieces, ancillary, 0, destination)
