"""A small process inside a namespace that the bench asks over its pipes: echoes, TCP from many, forgotten mappings.

Each line is a request `{"op": NAME, ...}` and gets an answer `{"ok": ...}` or `{"error": ...}`. It is there because
starting a program for each of these costs more than what is measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import json
import os
import select
import socket
import struct
import subprocess
import sys
import termios
import time
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.bench import datagrams
from tests.lab.ping import request as echo_request
from tests.lab.process import lab_environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.lab.namespaces import Namespace

# <linux/netlink.h>, <linux/netfilter/nfnetlink.h>, <linux/netfilter/nfnetlink_conntrack.h>.
NETLINK_NETFILTER = 12
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 1, 4, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
CT_GET, CT_DELETE = 0x101, 0x102
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY = 1, 2
_HEADER = struct.Struct("=IHHII")
_NFGEN = struct.Struct("=BBH")
_ATTRIBUTE = struct.Struct("=HH")


class Outpost:
    """The bench's side of it."""

    def __init__(self, namespace: Namespace) -> None:
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *namespace.prefix(), sys.executable, "-m", "tests.bench.outpost"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(os.environ) | lab_environment(),
            text=True,
            start_new_session=True,  # Ctrl-C is the bench's
        )

    def echoes(self, host: str, port: int, *, count: int = 1, timeout: float = 5.0) -> list[float]:
        """Milliseconds from each datagram to its answer, one after the other; the next goes after the answer."""
        result: list[float] = self._ask("echoes", host=host, port=port, count=count, timeout=timeout)
        return result

    def forget(self, addresses: Sequence[str]) -> int:
        """Let this router forget all connections to or from these addresses; how many there were."""
        result: int = self._ask("forget", addresses=list(addresses))
        return result

    def begin_pings(self, host: str, *, seconds: float, interval: float, source: str = "") -> None:
        """Send ICMP echo requests for a while, whatever comes back; `answer` has the milliseconds of each."""
        self._begin("pings", host=host, seconds=seconds, interval=interval, source=source)

    def begin_answers(self, interface: str, *, seconds: float) -> None:
        """Watch an interface; `answer` has how long STUN and handshake requests that arrived waited for answers, in ms.

        Measured from the kernel's timestamp of the request to that of the answer.
        """
        self._begin("answers", interface=interface, seconds=seconds)

    def listen(self, host: str, port: int) -> None:
        """Accept TCP connections from now on, for `begin_sink`."""
        self._ask("listen", host=host, port=port)

    def begin_sink(self, *, connections: int, seconds: float) -> None:
        """Read from so many new connections; `answer` has the bytes per second once all are there."""
        self._begin("sink", connections=connections, seconds=seconds)

    def begin_pour(self, host: str, port: int, *, sources: Sequence[str], seconds: float) -> None:
        """Connect from each of these addresses, and write to all in turn; the clock runs once all are connected."""
        self._begin("pour", host=host, port=port, sources=list(sources), seconds=seconds)

    def begin_flood(self, host: str, *, source: str, per_second: int, seconds: float) -> None:
        """Send small datagrams from `source`, which need not be one of this host's; `answer` has how many."""
        self._begin("flood", host=host, source=source, per_second=per_second, seconds=seconds)

    def datagrams_to(self, other: Outpost, host: str, port: int, *, size: int, mbit: float, seconds: float, back: bool,
                     trains: bool) -> tuple[float, float]:  # fmt: skip
        """Mbit/s that arrive at `other`, or `back` from there to here, and the per cent of datagrams that do not.

        One that comes later than 50 ms after the last was sent stood in a queue that grew, and is lost.
        """
        other._ask("datagrams", do="bind", host=host, port=port)
        other._begin("datagrams", do="accept")
        try:
            self._ask("datagrams", do="connect", host=host, port=port)
        finally:
            other.answer()
        sender, receiver = (other, self) if back else (self, other)
        receiver._begin("datagrams", do="receive")
        try:
            sent, began, ended = sender._ask(
                "datagrams", do="send", size=size, mbit=mbit, seconds=seconds, trains=trains
            )
        finally:
            moments = receiver.answer()
        received = datagrams.in_time(moments, ended + _UDP_GRACE_S)
        return received * size * 8e-6 / (ended - began), 100 * (1 - received / sent)

    def udp_buffer_errors(self) -> int:
        """Datagrams lost for want of room in socket buffers here so far, as `nstat` counts them."""
        result: int = self._ask("udp_buffer_errors")
        return result

    def answer(self) -> Any:
        """What was asked for by a `begin_` method."""
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline() or '{"error": "it ended"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["ok"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, op: str, **arguments: Any) -> Any:
        self._begin(op, **arguments)
        return self.answer()

    def _begin(self, op: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self._process.stdin.flush()


def _op_echoes(host: str, port: int, count: int, timeout: float) -> list[float]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    took = []
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(timeout)
        sock.connect((host, port))
        for _ in range(count):
            began = time.perf_counter()
            sock.send(b"bench")
            sock.recv(100)
            took.append((time.perf_counter() - began) * 1000)
    return took


_SO_TIMESTAMPNS, _SO_ATTACH_FILTER = 35, 26  # <asm/socket.h>
_TIMESPEC = struct.Struct("=qq")
_LOST_MS = 1000.0  # what an echo that never came counts as
_ETH_P_ALL = 3
_IP_FREEBIND = 15
_CHUNK = bytes(1 << 17)  # octets of one turn
_TURNS_AT_ONCE = 16
_LOOK_S = 0.0001
_IP_TRANSPARENT, _UDP_SEGMENT = 19, 103
_FLOOD_PAYLOAD, _FLOOD_TRAIN = 36, 20  # packets of 64 bytes
_FLOOD_PAUSE_S = 0.0002


def _receive_stamped(sock: socket.socket) -> tuple[bytes, float, Any]:
    """A datagram, the kernel's time of its arrival, and where it came from."""
    data, ancillary, _, source = sock.recvmsg(2048, socket.CMSG_SPACE(_TIMESPEC.size))
    stamps = (_TIMESPEC.unpack(value) for level, kind, value in ancillary if kind == _SO_TIMESTAMPNS)
    seconds, nanoseconds = next(stamps)
    return data, seconds + nanoseconds / 1e9, source


def _op_pings(host: str, seconds: float, interval: float, source: str) -> list[float]:
    sent: dict[int, float] = {}
    took: dict[int, float] = {}
    identifier = os.getpid() & 0xFFFF
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        if source:
            sock.bind((source, 0))
        sock.connect((host, 0))
        began = next_at = time.monotonic()
        while (now := time.monotonic()) < began + seconds or (len(took) < len(sent) and now < began + seconds + 1):
            if now < began + seconds and now >= next_at:
                next_at += interval
                sent[len(sent)] = time.time()
                sock.send(echo_request(False, identifier, len(sent) - 1))
            if not select.select([sock], [], [], max(0.0, min(next_at - time.monotonic(), interval)))[0]:
                continue
            packet, arrived, _ = _receive_stamped(sock)
            kind, _, _, identity, number = struct.unpack_from("!BBHHH", packet, (packet[0] & 15) * 4)
            if kind == 0 and identity == identifier and number in sent:
                took.setdefault(number, (arrived - sent[number]) * 1000)
    return [took.get(number, _LOST_MS) for number in sent]


# Classic BPF: UDP over IPv4 of up to 300 bytes that is STUN, or a handshake's initiation or response.
_FILTER = (
    (0x30, 0, 0, 9),  # protocol
    (0x15, 0, 9, 17),
    (0xB1, 0, 0, 0),  # x = length of the IP header
    (0x48, 0, 0, 4),  # length of the datagram
    (0x25, 6, 0, 300),
    (0x40, 0, 0, 12),
    (0x15, 3, 0, 0x2112A442),
    (0x40, 0, 0, 8),
    (0x15, 1, 0, 0x01000000),
    (0x15, 0, 1, 0x02000000),
    (0x06, 0, 0, 0xFFFF),
    (0x06, 0, 0, 0),
)


def _op_answers(interface: str, seconds: float) -> dict[str, list[float]]:
    asked: dict[bytes, float] = {}
    took: dict[str, list[float]] = {"stun": [], "handshake": []}
    program = b"".join(struct.pack("=HBBI", *instruction) for instruction in _FILTER)
    buffer = ctypes.create_string_buffer(program)
    attached = struct.pack("@HP", len(_FILTER), ctypes.addressof(buffer))  # struct sock_fprog
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as sock:
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, attached)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        sock.bind((interface, _ETH_P_ALL))
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not select.select([sock], [], [], left)[0]:
                break
            packet, stamp, source = _receive_stamped(sock)
            payload = packet[(packet[0] & 15) * 4 + 8 :]
            is_outgoing = source[2] == socket.PACKET_OUTGOING
            if payload[4:8] == b"\x21\x12\xa4\x42":
                what, is_request, key = "stun", payload[:2] == b"\0\1", payload[8:20]
            elif payload[0] == 1:
                what, is_request, key = "handshake", True, payload[4:8]
            else:
                what, is_request, key = "handshake", False, payload[8:12]
            if is_request and not is_outgoing:
                asked[key] = stamp
            elif not is_request and is_outgoing and key in asked:
                took[what].append((stamp - asked.pop(key)) * 1000)
    return took


_DATAGRAMS = (datagrams.bind, datagrams.accept, datagrams.connect, datagrams.send, datagrams.receive)
_UDP_GRACE_S = 0.05
_listeners: list[socket.socket] = []


def _op_listen(host: str, port: int) -> None:
    _listeners[:] = [socket.create_server((host, port), backlog=4096)]


def _op_sink(connections: int, seconds: float) -> float:
    poll = select.epoll()
    accepted: dict[int, socket.socket] = {}
    (listener,) = _listeners
    listener.settimeout(20)
    buffer = bytearray(1 << 20)
    began = total = 0.0
    try:
        while len(accepted) < connections:
            sock, _ = listener.accept()
            sock.setblocking(False)
            accepted[sock.fileno()] = sock
            poll.register(sock.fileno(), select.EPOLLIN)
        end = 0.0
        while not end or time.monotonic() < end:
            for descriptor, _ in poll.poll(1.0):
                size = accepted[descriptor].recv_into(buffer, len(buffer), socket.MSG_TRUNC)
                if not size:
                    return total / (time.monotonic() - began)
                total += size
            if not end and total:
                began, total = time.monotonic(), 0
                end = began + seconds
        return total / (time.monotonic() - began)
    finally:
        for sock in accepted.values():
            sock.close()
        poll.close()


def _op_pour(host: str, port: int, sources: list[str], seconds: float) -> int:
    """The number of connections."""
    socks = []
    try:
        for source in sources:
            sock = socket.socket()
            socks.append(sock)
            sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
            sock.bind((source, 0))
            sock.settimeout(20)
            sock.connect((host, port))
            sock.setblocking(False)
        end = time.monotonic() + seconds
        for turn in itertools.count():
            if time.monotonic() > end:
                break
            # Only a few have something under way at any time: theirs is the turn.
            _wait_sent(socks[(turn - _TURNS_AT_ONCE) % len(socks)])
            with contextlib.suppress(BlockingIOError):
                socks[turn % len(socks)].send(_CHUNK)
    except (ConnectionError, BrokenPipeError):  # the other side has seen enough
        pass
    finally:
        for sock in socks:
            sock.close()
    return len(socks)


def _op_flood(host: str, source: str, per_second: int, seconds: float) -> int:
    sent = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        sock.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, _FLOOD_PAYLOAD)
        sock.bind((source, 0))
        sock.connect((host, 9))
        train = bytes(_FLOOD_PAYLOAD * _FLOOD_TRAIN)
        began = time.monotonic()
        while (passed := time.monotonic() - began) < seconds:
            if sent > passed * per_second:
                time.sleep(_FLOOD_PAUSE_S)
                continue
            with contextlib.suppress(OSError):  # the answer to an earlier one
                sock.send(train)
            sent += _FLOOD_TRAIN
    return sent


def _op_datagrams(do: str, **arguments: Any) -> Any:
    return {each.__name__: each for each in _DATAGRAMS}[do](**arguments)


def _wait_sent(sock: socket.socket) -> None:
    """Until all of it is acknowledged."""
    patience = time.monotonic() + 1
    while int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder):
        time.sleep(_LOOK_S)
        if time.monotonic() > patience:
            return


def _op_udp_buffer_errors() -> int:
    total = 0
    for path, wanted in (("/proc/net/snmp6", ("Udp6RcvbufErrors", "Udp6SndbufErrors")),):
        for line in Path(path).read_text().splitlines():
            name, value = line.split()
            total += int(value) if name in wanted else 0
    lines = [line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Udp:")]
    values = dict(zip(*lines, strict=True))
    return total + int(values["RcvbufErrors"]) + int(values["SndbufErrors"])


def _op_forget(addresses: list[str]) -> int:
    packed = [ip_address(address).packed for address in addresses]
    forgotten = 0
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as sock:
        sock.bind((0, 0))
        for family in (socket.AF_INET, socket.AF_INET6):
            for original, reply in list(_tracked(sock, family)):
                if any(address in original or address in reply for address in packed):
                    forgotten += _delete(sock, family, original)
    return forgotten


def _tracked(sock: socket.socket, family: int) -> Iterator[tuple[bytes, bytes]]:
    """The tuples of all connections, as the kernel writes them."""
    sock.send(_message(CT_GET, NLM_F_DUMP, family, b""))
    while True:
        data = sock.recv(1 << 17)
        while data:
            length, kind, *_ = _HEADER.unpack_from(data)
            if kind in {NLMSG_DONE, NLMSG_ERROR}:
                return
            attributes = dict(_attributes(data[_HEADER.size + _NFGEN.size : length]))
            yield attributes[CTA_TUPLE_ORIG], attributes[CTA_TUPLE_REPLY]
            data = data[length:]


def _delete(sock: socket.socket, family: int, original: bytes) -> bool:
    tuple_ = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(original), CTA_TUPLE_ORIG | 0x8000) + original
    sock.send(_message(CT_DELETE, NLM_F_ACK, family, tuple_))
    error: int = struct.unpack_from("=i", sock.recv(4096), _HEADER.size)[0]
    return error == 0


def _message(kind: int, flags: int, family: int, attributes: bytes) -> bytes:
    body = _NFGEN.pack(family, 0, 0) + attributes
    return _HEADER.pack(_HEADER.size + len(body), kind, flags | NLM_F_REQUEST, 0, 0) + body


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind & 0x3FFF, data[_ATTRIBUTE.size : length]
        data = data[length + 3 & ~3 :]


def _serve() -> None:
    operations: dict[str, Any] = {
        name.removeprefix("_op_"): function for name, function in globals().items() if name.startswith("_op_")
    }
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = {"ok": operations[arguments.pop("op")](**arguments)}
        except OSError as error:
            answer = {"error": repr(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
