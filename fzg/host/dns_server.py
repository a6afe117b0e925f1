"""The gateway's DNS server: passes clients' queries to the host's fastest nameserver (spec tunnel 8).

Clients send what they do not answer themselves (SRV, TXT) to the gateway that serves the resource, so that it is
resolved inside that network. Kernel sockets on the tunnel addresses; not marked, since answers go through the tunnel.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from typing import TYPE_CHECKING, Final

import gevent
from gevent import socket
from gevent.lock import BoundedSemaphore
from gevent.server import StreamServer

from fzg.host.errors import HostError
from fzg.host.nameservers import Answer, Nameservers, exchange, receive_message
from fzg.host.udp import set_receive_buffer
from fzg.wire import Malformed
from fzg.wire import dns as messages

if TYPE_CHECKING:
    from collections.abc import Sequence
    from ipaddress import IPv4Address, IPv6Address

    from fzg.host.nameservers import Upstream

_LOG = logging.getLogger(__name__)
_TRACE = logging.getLogger("wire.dns.qry")
_TRACE_LEVEL = 5  # below DEBUG

# Specification (tunnel 1.3, 1.4, 8).
PORT: Final = 53535
QUERY_TIMEOUT: Final = 5.0
MAX_IN_FLIGHT: Final = 1000
BIND_ATTEMPTS: Final = 3
BIND_PAUSE: Final = 0.1
LONGEST_QUERY: Final = 2000

# Ours. One client may not use up what all share.
MAX_IN_FLIGHT_PER_CLIENT: Final = MAX_IN_FLIGHT // 4
# Ours. Genuine clients keep one connection; each costs a greenlet and a descriptor.
MAX_CONNECTIONS: Final = 512
MAX_CONNECTIONS_PER_CLIENT: Final = 16
# Ours. As many queries as may be in flight can come at once. The kernel counts up to 2.3 kB for each, the usual buffer
# holds 277; it doubles what it is asked for.
_RECEIVE_BUFFER: Final = MAX_IN_FLIGHT * 1200
# Ours. How long a connection may be silent between queries, and how long a query may take to arrive (RFC 7766 6.2.3).
IDLE_TIMEOUT: Final = 120.0
# Ours. Datagrams taken per turn, so that a flood of queries does not starve the packets.
_TURN_DATAGRAMS: Final = 32


class DnsServer:
    """Listens where `bind` says; `bind` again moves it. Counts by reason what it did not answer."""

    def __init__(self, nameservers: Nameservers, *, upstream: Upstream, port: int = PORT) -> None:
        self.dropped: Counter[str] = Counter()
        self._nameservers = nameservers
        self._upstream = upstream
        self._port = port
        self._binding = BoundedSemaphore(1)
        self._sockets: dict[str, socket.socket] = {}
        self._receivers: list[gevent.Greenlet] = []
        self._acceptors: list[StreamServer] = []
        self._in_flight: Counter[str] = Counter()
        self._connections: dict[socket.socket, tuple[str, str]] = {}

    def bind(self, addresses: Sequence[IPv4Address | IPv6Address]) -> None:
        """Leave the former addresses and listen on these, on all or none. Raises HostError. Waits up to 200 ms."""
        with self._binding:
            hosts = [str(address) for address in addresses]
            self._unbind()
            for connection, (_, local) in list(self._connections.items()):
                if local not in hosts:
                    _abort(connection)
            for attempts_left in reversed(range(BIND_ATTEMPTS)):
                try:
                    self._listen(hosts)
                except OSError as error:
                    self._unbind()
                    if not attempts_left:
                        raise HostError(
                            f"The DNS server cannot listen on port {self._port} of {' and '.join(hosts)}: {error}"
                        ) from error
                    gevent.sleep(BIND_PAUSE)
                else:
                    return

    def close(self) -> None:
        """Leave all addresses and end all connections. Idempotent."""
        self._unbind()
        for connection in list(self._connections):
            _abort(connection)

    def _listen(self, hosts: Sequence[str]) -> None:
        for host in hosts:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            udp = self._sockets[host] = socket.socket(family, socket.SOCK_DGRAM)
            udp.setblocking(0)
            set_receive_buffer(udp, _RECEIVE_BUFFER)
            udp.bind((host, self._port))
            acceptor = StreamServer((host, self._port), self._serve_connection)
            self._acceptors.append(acceptor)
            acceptor.start()
        self._receivers = [gevent.spawn(self._receive, host, udp) for host, udp in self._sockets.items()]

    def _unbind(self) -> None:
        gevent.killall(self._receivers)
        self._receivers = []
        for acceptor in self._acceptors:
            acceptor.close()  # connections that it accepted live on
        self._acceptors = []
        for udp in self._sockets.values():
            udp.close()
        self._sockets = {}

    # -- UDP

    def _receive(self, host: str, udp: socket.socket) -> None:
        hub = gevent.get_hub()
        watcher = hub.loop.io(udp.fileno(), 1)
        while True:
            hub.wait(watcher)
            for _ in range(_TURN_DATAGRAMS):
                try:
                    data, client = udp.recvfrom(LONGEST_QUERY)
                except BlockingIOError:
                    break
                except OSError as error:  # an ICMP error for an earlier answer
                    _LOG.debug("The DNS server's socket reports: %s", error)
                    continue
                self._take_datagram(data, client, host)

    def _take_datagram(self, data: bytes, client: tuple[str, int], host: str) -> None:
        try:
            query = messages.parse_query(data)
        except Malformed as error:
            _LOG.debug("A DNS query is ignored: %s", error)
            self.dropped["not a query"] += 1
            return
        if self._reserve(client[0]):
            gevent.spawn(self._answer_datagram, data, query, client, host)

    def _answer_datagram(self, data: bytes, query: messages.Message, client: tuple[str, int], host: str) -> None:
        answer = self._ask(data, query, client[0], tcp=False)
        response = messages.server_failure(data, query) if answer is None else messages.fit_udp(*answer)
        udp = self._sockets.get(host)
        if udp is None:
            return  # the address is gone
        try:
            udp.sendto(response, client)
        except OSError as error:
            _LOG.debug("A DNS answer cannot be sent: %s", error)

    # -- TCP

    def _serve_connection(self, connection: socket.socket, address: tuple[str, int]) -> None:
        """Queries of one connection, one after another, until the client has had enough."""
        client = address[0]
        mine = sum(1 for owner, _ in self._connections.values() if owner == client)
        if len(self._connections) >= MAX_CONNECTIONS or mine >= MAX_CONNECTIONS_PER_CLIENT:
            self.dropped["too many connections"] += 1
            connection.close()
            return
        self._connections[connection] = (client, connection.getsockname()[0])
        try:
            while True:
                with gevent.Timeout(IDLE_TIMEOUT, TimeoutError("idle")):
                    data = receive_message(connection)
                    if data is None:
                        return
                response = self._answer_message(data, client)
                with gevent.Timeout(IDLE_TIMEOUT, TimeoutError("the client does not read")):
                    connection.sendall(len(response).to_bytes(2, "big") + response)
        except (OSError, Malformed) as error:
            _LOG.debug("A DNS connection ended: %s", error)
        finally:
            del self._connections[connection]
            connection.close()

    def _answer_message(self, data: bytes, client: str) -> bytes:
        query = messages.parse_query(data)
        if not self._reserve(client):
            raise ConnectionAbortedError("too many queries are in flight")
        answer = self._ask(data, query, client, tcp=True)
        return messages.server_failure(data, query) if answer is None else answer.data

    # -- both

    def _reserve(self, client: str) -> bool:
        """Whether one more query of this client is taken on; `_ask` gives the place back."""
        if self._in_flight.total() >= MAX_IN_FLIGHT or self._in_flight[client] >= MAX_IN_FLIGHT_PER_CLIENT:
            self.dropped["too many in flight"] += 1
            return False
        self._in_flight[client] += 1
        return True

    def _ask(self, data: bytes, query: messages.Message, client: str, *, tcp: bool) -> Answer | None:
        """The answer of the fastest nameserver; None when there is none in time."""
        try:
            server = self._nameservers.fastest(tcp=tcp)
            if _TRACE.isEnabledFor(_TRACE_LEVEL):
                name, kind, _ = query.question or ("", 0, 0)
                fields = {"client": client, "domain": str(name), "type": kind, "nameserver": str(server), "tcp": tcp}
                _TRACE.log(_TRACE_LEVEL, "A query is passed on", extra=fields)
            if server is None:
                return None
            with gevent.Timeout(QUERY_TIMEOUT, TimeoutError("timed out")):
                return exchange(server, data, query, tcp=tcp, upstream=self._upstream)
        except (OSError, Malformed) as error:
            _LOG.debug("A nameserver failed a query of a client: %s", error)
            self._nameservers.note_failure()
            return None
        finally:
            self._in_flight[client] -= 1
            if not self._in_flight[client]:
                del self._in_flight[client]


def _abort(connection: socket.socket) -> None:
    """Wake whoever waits for the connection."""
    with contextlib.suppress(OSError):  # the client may have been faster
        connection.shutdown(socket.SHUT_RDWR)
