"""Which of the host's nameservers answers fastest (spec tunnel 8). Cooperative: waits with gevent."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final, NamedTuple

import dns.name
import gevent
from gevent import socket
from gevent.event import Event
from gevent.pool import Pool

from fzg.mark import mark_socket
from fzg.wire import Malformed
from fzg.wire import dns as messages

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_LOG = logging.getLogger(__name__)

# Specification (tunnel 1.3, 8).
DNS_PORT: Final = 53
PROBE_INTERVAL: Final = 60.0
PROBE_TIMEOUT: Final = 2.0
PROBES_AT_ONCE: Final = 20
PROBE_NAME: Final = dns.name.from_text("firezone.dev.")

# Ours: a nameserver that fails queries is looked at again before the minute is over, but not for every query.
_RETRY_INTERVAL: Final = 5.0
_LONGEST_ANSWER: Final = 0xFFFF


class Upstream(NamedTuple):
    """How to reach nameservers. `mark` keeps what we send out of the tunnel."""

    port: int = DNS_PORT
    mark: int | None = None


class Probe(NamedTuple):
    """One nameserver over one transport."""

    server: str
    tcp: bool


class Ranking:
    """The winner of the latest round for each transport; it stays while rounds yield nothing and it is configured."""

    def __init__(self) -> None:
        self._winners: dict[bool, str] = {}

    def update(self, seconds: Mapping[Probe, float]) -> None:
        """One round is over; `seconds` holds those that answered NOERROR in time."""
        for tcp in (False, True):
            times = {probe.server: taken for probe, taken in seconds.items() if probe.tcp is tcp}
            if times:
                self._winners[tcp] = min(times, key=lambda server: times[server])

    def fastest(self, servers: Sequence[str], *, tcp: bool) -> str | None:
        """The nameserver to ask; without a measurement the first in the order of the file."""
        winner = self._winners.get(tcp)
        return winner if winner in servers else next(iter(servers), None)


class Nameservers:
    """The fastest of the configured nameservers; measures in a greenlet between `start` and `stop`."""

    def __init__(
        self, configured: Callable[[], Sequence[str]], *, upstream: Upstream, clock: Callable[[], float]
    ) -> None:
        self._configured = configured
        self._upstream = upstream
        self._clock = clock
        self._ranking = Ranking()
        self._measured: frozenset[str] = frozenset()
        self._round_at = float("-inf")
        self._wanted = Event()
        self._prober: gevent.Greenlet | None = None

    def start(self) -> None:
        """Begin to measure: at once, every minute, and when the list changes."""
        self._prober = gevent.spawn(self._run)

    def stop(self) -> None:
        """End measuring."""
        if self._prober is not None:
            self._prober.kill()

    def fastest(self, *, tcp: bool) -> str | None:
        """Whom to ask; None when no nameserver is configured."""
        servers = self._configured()
        if frozenset(servers) != self._measured:
            self._wanted.set()
        return self._ranking.fastest(servers, tcp=tcp)

    def note_failure(self) -> None:
        """The fastest did not answer a query: measure again soon."""
        if self._clock() - self._round_at >= _RETRY_INTERVAL:
            self._wanted.set()

    def _run(self) -> None:
        while True:
            self._wanted.clear()
            self._measure(self._configured())
            self._wanted.wait(PROBE_INTERVAL)

    def _measure(self, servers: Sequence[str]) -> None:
        if self._measured and not servers:
            _LOG.warning("No nameserver is configured any more, so queries of clients cannot be forwarded")
        self._round_at = self._clock()
        self._measured = frozenset(servers)
        probes = [Probe(server, tcp) for server in servers for tcp in (False, True)]
        taken = Pool(PROBES_AT_ONCE).map(self._time, probes)
        self._ranking.update({probe: time for probe, time in zip(probes, taken, strict=True) if time is not None})
        _LOG.debug("Nameservers were measured: fastest=%s", self._ranking.fastest(servers, tcp=False))

    def _time(self, probe: Probe) -> float | None:
        """Seconds until NOERROR; None for anything else."""
        query = messages.probe(int.from_bytes(os.urandom(2), "big"), PROBE_NAME)
        started = self._clock()
        try:
            with gevent.Timeout(PROBE_TIMEOUT, TimeoutError("timed out")):
                answer = exchange(
                    probe.server, query, messages.parse_query(query), tcp=probe.tcp, upstream=self._upstream
                )
        except (OSError, Malformed) as error:
            _LOG.debug("Nameserver %s does not answer over %s: %s", probe.server, "TCP" if probe.tcp else "UDP", error)
            return None
        return self._clock() - started if answer.parsed.is_success else None


class Answer(NamedTuple):
    """The response as it came, and what its header says."""

    data: bytes
    parsed: messages.Message


def exchange(server: str, data: bytes, query: messages.Message, *, tcp: bool, upstream: Upstream) -> Answer:
    """Ask over a socket of its own; the caller sets the time limit. Raises OSError, or `Malformed` for what came."""
    address = _address(server, upstream.port)
    kind = socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, kind) as connection:
        if upstream.mark is not None:
            mark_socket(connection, upstream.mark)
        connection.connect(address)
        if not tcp:
            connection.send(data)
            # A datagram that answers another query is forged or late; the right one may still come.
            while (parsed := messages.parse_response(received := connection.recv(_LONGEST_ANSWER), query)) is None:
                pass
            return Answer(received, parsed)
        connection.sendall(len(data).to_bytes(2, "big") + data)
        answer = receive_message(connection)
        if answer is None:
            raise ConnectionResetError("the connection was closed without an answer")
        parsed = messages.parse_response(answer, query)
        if parsed is None:
            raise Malformed("DNS response belongs to another query")
        return Answer(answer, parsed)


def receive_message(connection: socket.socket) -> bytes | None:
    """The next message of a TCP connection (RFC 1035 4.2.2); None at a proper end."""
    size = _receive(connection, 2)
    if not size:
        return None
    length = int.from_bytes(size, "big")
    message = _receive(connection, length) if len(size) == 2 else b""
    if len(size) < 2 or len(message) < length:
        raise ConnectionResetError("the connection was closed inside a message")
    return message


def _receive(connection: socket.socket, size: int) -> bytes:
    """`size` bytes, or fewer at the end of the connection."""
    received = bytearray()
    while len(received) < size and (chunk := connection.recv(size - len(received))):
        received += chunk
    return bytes(received)


def _address(server: str, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    host, percent, scope = server.partition("%")
    if not percent:
        return host, port
    return host, port, 0, int(scope) if scope.isdigit() else socket.if_nametoindex(scope)
