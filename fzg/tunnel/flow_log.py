"""Which flows are logged, when they start, split and end, and what they carried (spec tunnel 10.3).

The engine carries most packets and reports them later. So a flow that has ended is recorded only when the engine's next
reports are in, and what it reports for the flow after that is put down to the one that took its place.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, deque
from typing import TYPE_CHECKING, NamedTuple

from fzg.sansio import Deadline
from fzg.tunnel.flow_record import Figures, FlowRecord, Outer
from fzg.wire.ip import TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fzg.tunnel.ingest_token import Attribution
    from fzg.tunnel.nat import Entry
    from fzg.wire.endpoint import Endpoint
    from fzg.wire.ip import Packet

_LOG = logging.getLogger(__name__)

IDLE = 120.0  # s without a packet that a flow outlives, spec tunnel 1.3
MAX_OUTERS = 16  # spec tunnel 10.3

# Ours. A flow is about a kilobyte; a client that sends from every port to every port must not take all memory, and
# one client not the room of all.
MAX_FLOWS = 1 << 17
MAX_FLOWS_PER_CLIENT = 1 << 15
# Ours. Flows that one turn closes, about 5 ms of work; the rest waits for other work of the process.
CLOSE_BUDGET = 1000
CLOSE_PAUSE = 0.01  # s
# Ours. The engine reports a packet within two seconds: an entry lives for one, and reports come once a second.
_REPORT_DELAY = 2.0  # s
# Ours. So long may the engine still report for a flow that was recorded.
_ALIAS_LIFE = 2 * _REPORT_DELAY

FlowKey = tuple[str, str, bytes, bytes, int, int]
"""Client id, resource id, client's IP, real IP, protocol values of the client's side (after NAT) and the far side."""

Path = tuple["Endpoint", "Endpoint"]
"""Outer addresses: where the client's datagram came from, and where it arrived."""


class TrackedFlow:
    """One flow. `session` is the NAT session that it uses, `token` its name in engine reports."""

    __slots__ = (
        "attribution",
        "domain",
        "end",
        "fin_rx",
        "fin_tx",
        "has_sent_data",
        "key",
        "last_packet",
        "outers",
        "path",
        "rx_bytes",
        "rx_packets",
        "session",
        "start",
        "successor",
        "token",
        "tx_bytes",
        "tx_packets",
    )

    def __init__(  # noqa: PLR0917 - made for every new flow
        self, key: FlowKey, attribution: Attribution, domain: str, session: Entry | None, token: int, now: float
    ) -> None:
        self.key = key
        self.attribution = attribution
        self.domain = domain
        self.session = session
        self.token = token
        self.start = 0.0
        self.path: Path | None = None
        self.outers: list[Outer] = []
        self.last_packet = now
        self.end: float | None = None
        self.successor: TrackedFlow | None = None
        self.fin_tx = self.fin_rx = self.has_sent_data = False
        self.tx_packets = self.tx_bytes = self.rx_packets = self.rx_bytes = 0


class Tally(NamedTuple):
    """A packet for a client that counts once it has been sent."""

    flow: TrackedFlow
    payload: int
    tcp_flags: int


class FlowLog:
    """All logged flows. Off until `switch`; while it is off nothing but `is_on` may be asked."""

    def __init__(self, *, tokens: Iterator[int], unix_offset: float) -> None:
        self.is_on = False
        self.unix_offset = unix_offset
        """Unix time minus `now`."""
        self._tokens = tokens
        # In the order in which packets were counted, the longest ago first.
        self._flows: OrderedDict[FlowKey, TrackedFlow] = OrderedDict()
        self._by_token: dict[int, TrackedFlow] = {}
        self._aliases: deque[tuple[float, int]] = deque()
        self._per_client: Counter[str] = Counter()
        self._finished: list[TrackedFlow] = []
        self._ended: list[TrackedFlow] = []
        self._closing: deque[TrackedFlow] = deque()
        self._swept_at = float("-inf")
        self._resume_at: float | None = None
        self._records: deque[FlowRecord] = deque()
        self._refused = 0

    def switch(self, *, on: bool, now: float) -> None:
        """Begin to log, or stop and close all flows."""
        if self.is_on and not on:
            self.close_all(now)
        self.is_on = on

    @property
    def is_full(self) -> bool:
        """Whether no new flow is logged at all."""
        return len(self._flows) >= MAX_FLOWS

    def outgoing(
        self,
        key: FlowKey,
        packet: Packet,
        path: Path,
        now: float,
        *,
        attribution: Attribution,
        domain: str = "",
        session: Entry | None = None,
    ) -> TrackedFlow | None:
        """Count a packet that goes to the network; its flow, or None if it belongs to none."""
        flags, payload = packet.tcp_flags, packet.payload_length
        flow = self._flows.get(key)
        if flow is None:
            if flags & (TCP_FIN | TCP_RST) or (flags & (TCP_ACK | TCP_SYN) == TCP_ACK and not payload):
                return None
            flow = self._open(key, attribution, domain, session, path, now)
            if flow is None:
                return None
        elif (path != flow.path and len(flow.outers) >= MAX_OUTERS) or (flags & TCP_SYN and flow.has_sent_data):
            former = flow
            self._end(former, now)
            self._ended.append(former)
            flow = self._open(key, attribution, domain, session, path, now)
            if flow is None:
                return None
            former.successor = flow
        elif path != flow.path:
            self._append_outer(flow, path, now)
        flow.tx_packets += 1
        flow.tx_bytes += payload
        flow.last_packet = now
        self._flows.move_to_end(key)
        flow.session = session
        if not flags & TCP_SYN:
            flow.has_sent_data = True
        if flags & (TCP_FIN | TCP_RST):
            flow.fin_tx |= bool(flags & TCP_FIN)
            self._handle_ending(flow, flags, now)
        return flow

    def incoming(self, key: FlowKey) -> TrackedFlow | None:
        """The flow that a packet for the client belongs to."""
        return self._flows.get(key)

    def delivered(self, tally: Tally, now: float) -> None:
        """The packet was sent to the client."""
        flow, payload, flags = tally
        flow.rx_packets += 1
        flow.rx_bytes += payload
        if flow.end is not None:
            return
        flow.last_packet = now
        self._flows.move_to_end(flow.key)
        if flags & (TCP_FIN | TCP_RST):
            flow.fin_rx |= bool(flags & TCP_FIN)
            self._handle_ending(flow, flags, now)

    def reported(self, token: int, *, incoming: bool, packets: int, payload: int, last_packet: float) -> Entry | None:
        """The engine carried packets of the flow; the NAT session that it uses."""
        flow = self._by_token.get(token)
        if flow is None:
            return None
        if incoming:
            flow.rx_packets += packets
            flow.rx_bytes += payload
        else:
            flow.tx_packets += packets
            flow.tx_bytes += payload
        flow.last_packet = max(flow.last_packet, last_packet)
        if flow.end is None:
            self._flows.move_to_end(flow.key)
        return flow.session

    def handle_swept(self, now: float) -> None:
        """All that the engine carried until now was reported."""
        for flow in self._finished:
            if flow.end is None:
                self._end(flow, flow.last_packet)
                self._ended.append(flow)
        self._finished.clear()
        self._closing.extend(self._ended)
        self._ended.clear()
        while self._aliases and self._aliases[0][0] <= now:
            self._by_token.pop(self._aliases.popleft()[1], None)
        self._swept_at = self._resume_at = now
        self.handle_timeout(now)

    def close_all(self, now: float) -> None:
        """End every flow, at once; what the engine carried must have been reported."""
        for flow in list(self._flows.values()):
            self._end(flow, now)
            self._closing.append(flow)
        self._closing.extendleft(reversed(self._ended))
        self._ended.clear()
        self._finished.clear()
        while self._closing:
            self._close(self._closing.popleft())

    def handle_timeout(self, now: float) -> None:
        """Go on closing flows."""
        if self._resume_at is None or now < self._resume_at:
            return
        for flow in self._idle(CLOSE_BUDGET):
            self._end(flow, self._swept_at)
            self._closing.append(flow)
        budget = CLOSE_BUDGET
        while self._closing and budget:
            self._close(self._closing.popleft())
            budget -= 1
        self._resume_at = None if budget else now + CLOSE_PAUSE

    def poll_timeout(self) -> Deadline | None:
        """When `handle_timeout` is due."""
        return None if self._resume_at is None else Deadline(self._resume_at, "flow logs")

    def poll_record(self) -> FlowRecord | None:
        """The next record, in the order of their causes."""
        return self._records.popleft() if self._records else None

    def _open(  # noqa: PLR0917 - the arguments of `outgoing`
        self, key: FlowKey, attribution: Attribution, domain: str, session: Entry | None, path: Path, now: float
    ) -> TrackedFlow | None:
        client_id = key[0]
        if len(self._flows) >= MAX_FLOWS or self._per_client[client_id] >= MAX_FLOWS_PER_CLIENT:
            if not self._refused % 10_000:
                _LOG.warning("Too many flows at once are logged, more are not: refused=%d", self._refused + 1)
            self._refused += 1
            return None
        flow = TrackedFlow(key, attribution, domain, session, next(self._tokens), now)
        flow.start = now + self.unix_offset
        self._append_outer(flow, path, now)
        self._flows[key] = flow
        self._by_token[flow.token] = flow
        self._per_client[client_id] += 1
        self._record(flow, None)
        return flow

    def _append_outer(self, flow: TrackedFlow, path: Path, now: float) -> None:
        flow.path = path
        flow.outers.append(Outer(*path, now + self.unix_offset))

    def _handle_ending(self, flow: TrackedFlow, flags: int, now: float) -> None:
        """A FIN or RST was counted."""
        if flags & TCP_RST:
            self._end(flow, now)
            self._ended.append(flow)
        elif flow.fin_tx and flow.fin_rx:
            self._finished.append(flow)

    def _end(self, flow: TrackedFlow, at: float) -> None:
        """The flow is over; the caller sees to its record."""
        flow.end = at
        del self._flows[flow.key]
        client_id = flow.key[0]
        self._per_client[client_id] -= 1
        if not self._per_client[client_id]:
            del self._per_client[client_id]

    def _close(self, flow: TrackedFlow) -> None:
        """Record what the flow came to."""
        if flow.successor is None:
            self._by_token.pop(flow.token, None)
        else:
            self._by_token[flow.token] = flow.successor
            self._aliases.append((self._swept_at + _ALIAS_LIFE, flow.token))
        assert flow.end is not None
        moments = (flow.end, min(flow.end, flow.last_packet))
        end, last = (max(flow.start, moment + self.unix_offset) for moment in moments)  # the wall clock may go back
        self._record(flow, Figures(end, last, flow.rx_packets, flow.tx_packets, flow.rx_bytes, flow.tx_bytes))

    def _record(self, flow: TrackedFlow, figures: Figures | None) -> None:
        _, _, source, destination, source_value, destination_value = flow.key
        self._records.append(
            FlowRecord(
                flow.attribution,
                source,
                destination,
                source_value,
                destination_value,
                flow.domain,
                tuple(flow.outers),
                flow.start,
                figures,
            )
        )

    def _idle(self, limit: int) -> list[TrackedFlow]:
        """Flows that had their time when the engine last reported; at most `limit`."""
        latest = self._swept_at - IDLE
        idle: list[TrackedFlow] = []
        for flow in self._flows.values():
            # Those behind it may be older, by as much as a report may come late.
            if flow.last_packet > latest + _REPORT_DELAY or len(idle) >= limit:
                break
            if flow.last_packet < latest:
                idle.append(flow)
        return idle
