"""`/metrics` for Prometheus: what the parts count anyway, read when somebody asks (spec operations 1.10, OPS-42).

Names of operations 1.10 with underscores for dots; the rest begins with `firezone_gateway_`. No label carries an id, an
address or a name: every set of label values is bounded by this code.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from fzg.node.connection import ConnectionState
from fzg.node.path import PathKind
from fzg.turn.allocation import State as RelayState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from prometheus_client.metrics_core import Metric

    from fzg.dataplane.engine import Engine
    from fzg.gateway import Gateway
    from fzg.ops.flow_logs import Backlog
    from fzg.ops.lag import Histogram, LoopLag
    from fzg.portal.websocket import PortalConnection

# Direction as seen by the process's clients: what they send is received, what is for them transmitted.
RECEIVE: Final = "receive"
TRANSMIT: Final = "transmit"
_BOTH: Final = "both"

# Drop counters of the engines, and what they are about. Others end in the name of an errno, of which there are few.
_ENGINE_DROPS: Final = {
    "drop_udp_oversized": RECEIVE,
    "drop_udp_without_local_address": RECEIVE,
    "drop_udp_backlog_full": RECEIVE,
    "drop_replayed": RECEIVE,
    "drop_undecryptable": RECEIVE,
    "drop_inner_not_ip": RECEIVE,
    "drop_inner_truncated": RECEIVE,
    "drop_inner_oversized": RECEIVE,
    "drop_tun_queue_full": RECEIVE,
    "drop_tun_not_attached": RECEIVE,
    "drop_udp_no_socket": TRANSMIT,
    "drop_udp_queue_full": TRANSMIT,
    "drop_tun_malformed": TRANSMIT,
    "drop_tun_backlog_full": TRANSMIT,
    "drop_revoked": _BOTH,
    "drop_no_memory": _BOTH,
}
_ERRNO_DROPS: Final = {"drop_tun_write_": RECEIVE, "drop_udp_send_": TRANSMIT}
_FROM, _TO = "from client: ", "to client: "
# Reasons are constants of this program; should one ever carry a value, it must not grow the scrape without end.
MAX_REASONS: Final = 256
_WORDS: Final = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[^A-Za-z0-9]+")

# <asm-generic/socket.h>, <linux/sock_diag.h>: what the kernel knows of a socket's memory, nine numbers of 32 bits.
_SO_MEMINFO: Final = 55
_MEMINFO: Final = struct.Struct("=9I")


class Buffers(NamedTuple):
    """One UDP socket's memory in bytes, and the datagrams that found its receive buffer full."""

    family: str
    received: int
    receive_limit: int
    queued: int
    send_limit: int
    drops: int


class Sources(NamedTuple):
    """What is looked at. Everything here changes; nothing is changed."""

    gateway: Gateway
    engine: Engine
    portal: PortalConnection
    lag: LoopLag
    lookups: Histogram
    not_ready_because: Callable[[], str | None]
    backlog: Callable[[], Backlog]
    sockets: Sequence[socket.socket]
    log_lines: Callable[[], Mapping[str, int]]
    clock: Callable[[], float]
    facts: Mapping[str, str]
    max_partition: float


class Metrics:
    """Answers scrapes. Made only where metrics are asked for: the library costs 5 MiB."""

    def __init__(self, sources: Sources) -> None:
        from prometheus_client import CollectorRegistry, ProcessCollector

        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Collector(sources))
        ProcessCollector(registry=self._registry)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The page in the format that the scraper's Accept header prefers, and its content type."""
        from prometheus_client.exposition import choose_encoder

        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class _Collector:
    """One walk over the sources per scrape."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        """All families."""
        counters = self._sources.engine.counters()
        yield from self._traffic(counters)
        yield from self._drops(counters)
        yield from self._sockets(counters)
        yield from self._connections()
        yield from self._relays()
        yield from self._portal()
        yield from self._process()
        yield from self._flow_logs()

    def _traffic(self, counters: Mapping[str, int]) -> Iterator[Metric]:
        for what, text in (
            ("packets", "Packets"),
            ("bytes", "Bytes of packets"),
            ("calls", "System calls that moved packets"),
        ):
            yield _counter(
                f"connlib_network_{what}",
                f"{text}, by interface (udp: the tunnels, tun: the network behind) and direction.",
                ("interface", "network_io_direction"),
                {
                    (interface, direction): counters.get(f"{interface}_{short}_{what}", 0)
                    for interface in ("udp", "tun")
                    for short, direction in (("rx", RECEIVE), ("tx", TRANSMIT))
                },
            )

    def _drops(self, counters: Mapping[str, int]) -> Iterator[Metric]:
        gateway = self._sources.gateway
        found: dict[tuple[str, ...], float] = {
            (_label(name.removeprefix("drop_")), direction): 0 for name, direction in _ENGINE_DROPS.items()
        }

        def add(reason: str, direction: str, count: int) -> None:
            key = (_label(reason), direction)
            if key not in found and len(found) >= MAX_REASONS:
                key = ("other", _BOTH)
            found[key] = found.get(key, 0) + count

        for name, count in counters.items():
            if name.startswith("drop_"):
                prefix = next((known for known in _ERRNO_DROPS if name.startswith(known)), None)
                direction = _ENGINE_DROPS.get(name, _BOTH) if prefix is None else _ERRNO_DROPS[prefix]
                add(name.removeprefix("drop_"), direction, count)
        for reason, count in gateway.counters.items():
            direction = RECEIVE if reason.startswith(_FROM) else TRANSMIT if reason.startswith(_TO) else _BOTH
            add(reason.removeprefix(_FROM).removeprefix(_TO), direction, count)
        for reason, count in gateway.node.counters.items():
            add(reason, RECEIVE, count)
        for reason, count in gateway.node.relays.counters.items():
            add(f"TURN: {reason}", _BOTH, count)
        yield _counter(
            "connlib_network_dropped",
            "Packets and messages that were dropped, by reason.",
            ("error_type", "network_io_direction"),
            found,
        )
        yield _counter(
            "firezone_gateway_flows_uncached",
            "Verdicts that found the flow table full, so that every packet of the flow is judged anew.",
            (),
            {(): counters.get("flow_table_full", 0)},
        )

    def _sockets(self, counters: Mapping[str, int]) -> Iterator[Metric]:
        yield _counter(
            "connlib_network_errors",
            "Errors that the UDP sockets reported and that cost no packet of ours.",
            ("error_type", "network_io_direction"),
            {
                ("icmp", TRANSMIT): counters.get("udp_icmp_errors", 0),
                ("receive", RECEIVE): counters.get("udp_receive_errors", 0),
            },
        )
        found = [each for each in map(buffers_of, self._sources.sockets) if each is not None]
        yield _counter(
            "firezone_gateway_udp_receive_buffer_drops",
            "Datagrams that the kernel dropped because the socket's receive buffer was full.",
            ("network_type",),
            {(each.family,): each.drops for each in found},
        )
        used: dict[tuple[str, ...], float] = {}
        limits: dict[tuple[str, ...], float] = {}
        for each in found:
            used[each.family, RECEIVE], limits[each.family, RECEIVE] = each.received, each.receive_limit
            used[each.family, TRANSMIT], limits[each.family, TRANSMIT] = each.queued, each.send_limit
        labels = ("network_type", "network_io_direction")
        yield _gauge("firezone_gateway_udp_buffer_bytes", "Memory that datagrams hold in the buffers.", labels, used)
        yield _gauge("firezone_gateway_udp_buffer_limit_bytes", "Sizes of the sockets' buffers.", labels, limits)

    def _connections(self) -> Iterator[Metric]:
        gateway = self._sources.gateway
        paths: dict[tuple[str, ...], float] = {(_path_label(kind),): 0 for kind in PathKind}
        states: dict[tuple[str, ...], float] = {
            (state.value,): 0 for state in ConnectionState if state is not ConnectionState.FAILED
        }
        for connection in gateway.node.connections:
            states[connection.state.value,] = states.get((connection.state.value,), 0) + 1
            if connection.path is not None:
                paths[_path_label(connection.path.kind),] += 1
        yield _gauge(
            "tunnel_connection_count",
            "Connections with a path, by whether our end and the client's end of it are a relay.",
            ("connection_socket",),
            paths,
        )
        yield _gauge("firezone_gateway_connections", "Connections, by state.", ("state",), states)
        yield _gauge(
            "firezone_gateway_clients",
            "Clients that may reach at least one resource.",
            (),
            {(): gateway.tunnel.client_count},
        )
        yield _gauge(
            "firezone_gateway_nat_sessions",
            "Sessions to resources that are known by name.",
            (),
            {(): gateway.tunnel.nat_session_count},
        )
        yield _counter(
            "firezone_gateway_handshakes",
            "WireGuard handshakes that were completed.",
            (),
            {(): gateway.node.handshakes},
        )

    def _relays(self) -> Iterator[Metric]:
        relays = self._sources.gateway.node.relays.status()
        states: dict[tuple[str, ...], float] = {
            (state.value,): 0 for state in RelayState if state is not RelayState.DEAD
        }
        for relay in relays:
            states[relay.state.value,] = states.get((relay.state.value,), 0) + 1
        yield _gauge(
            "firezone_gateway_relays",
            "Relays by state; those that are active hold an allocation for us.",
            ("state",),
            states,
        )
        yield _gauge(
            "firezone_gateway_relay_channels",
            "TURN channels to clients on all relays.",
            (),
            {(): sum(relay.channels for relay in relays)},
        )
        times = [relay.rtt for relay in relays if relay.rtt is not None]
        yield _gauge(
            "firezone_gateway_relay_rtt_seconds",
            "Smoothed round-trip time to the nearest and to the farthest relay.",
            ("relay",),
            {("nearest",): min(times, default=float("nan")), ("farthest",): max(times, default=float("nan"))},
        )

    def _portal(self) -> Iterator[Metric]:
        sources = self._sources
        away_since = sources.portal.away_since
        yield _gauge(
            "firezone_gateway_ready",
            "1 where /readyz answers 200, else 0.",
            (),
            {(): float(sources.not_ready_because() is None)},
        )
        yield _gauge(
            "firezone_gateway_portal_joined",
            "1 while the portal's room is joined, else 0.",
            (),
            {(): float(away_since is None)},
        )
        yield _gauge(
            "firezone_gateway_portal_partition_seconds",
            "How long the portal has been away, 0 while the room is joined.",
            (),
            {(): 0.0 if away_since is None else max(0.0, sources.clock() - away_since)},
        )
        yield _gauge(
            "firezone_gateway_portal_partition_limit_seconds",
            "How long the gateway serves on without the portal (--max-partition-time).",
            (),
            {(): sources.max_partition},
        )
        yield _counter(
            "portal_connection_hiccup",
            "Attempts to reach the portal that failed, and connections to it that broke.",
            (),
            {(): sources.portal.hiccups},
        )
        yield _histogram("dns_lookup_duration", "Seconds until the name of a resource was resolved.", sources.lookups)

    def _process(self) -> Iterator[Metric]:
        from prometheus_client.metrics_core import InfoMetricFamily

        sources = self._sources
        yield InfoMetricFamily("firezone_gateway_build", "What runs here.", value=dict(sources.facts))
        yield _histogram(
            "eventloop_poll_duration", "Seconds by which timers of the event loop fired late.", sources.lag.histogram
        )
        yield _gauge(
            "firezone_gateway_eventloop_lag_seconds", "The newest of these values.", (), {(): sources.lag.last}
        )
        yield _counter(
            "firezone_gateway_log_lines",
            "Log lines by level, those included that were left out as repeats.",
            ("level",),
            {(level,): count for level, count in sources.log_lines().items()},
        )

    def _flow_logs(self) -> Iterator[Metric]:
        backlog = self._sources.backlog()
        yield _gauge(
            "firezone_gateway_flow_log_spool_records",
            "Flow records on disk that no collector has taken yet.",
            (),
            {(): float("nan") if backlog.spooled is None else backlog.spooled},
        )
        yield _gauge(
            "connlib_queue_length",
            "Items that wait, by kind.",
            ("queue_item",),
            {("flow_record",): backlog.queued},
        )
        yield _counter(
            "firezone_gateway_flow_log_dropped",
            "Flow records that could not be kept for the portal.",
            (),
            {(): backlog.dropped},
        )


def buffers_of(udp: socket.socket) -> Buffers | None:
    """What the kernel says of a socket's memory; None where it does not (Linux before 4.12)."""
    with contextlib.suppress(OSError, struct.error):
        received, receive_limit, _, send_limit, _, queued, _, _, drops = _MEMINFO.unpack(
            udp.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
        )
        family = "ipv6" if udp.family == socket.AF_INET6 else "ipv4"
        return Buffers(family, received, receive_limit, queued, send_limit, drops)
    return None


def _label(text: str) -> str:
    """`NoPeerState`, `STUN: unknown connection` and `udp_queue_full` in one form: lower case and underscores."""
    return _WORDS.sub("_", text).strip("_").lower()


def _path_label(kind: PathKind) -> str:
    """`peer-to-relay`, as operations 1.10 words it."""
    return _label(kind.value).replace("_", "-")


def _counter(name: str, text: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float]) -> Metric:
    from prometheus_client.metrics_core import CounterMetricFamily

    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _gauge(name: str, text: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float]) -> Metric:
    from prometheus_client.metrics_core import GaugeMetricFamily

    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    from prometheus_client.metrics_core import HistogramMetricFamily

    family = HistogramMetricFamily(name, text)
    family.add_metric([], histogram.cumulative(), histogram.total)
    return family
