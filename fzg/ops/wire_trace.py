"""Datagrams and packets in the log, for who asks with `RUST_LOG=wire=trace` (spec operations 1.8): what kind, between
whom, how long. Never what is in them: names, passwords and users' data are nobody's business in a log.

    wire::net::send, wire::net::recv     UDP datagrams
    wire::turn::send, wire::turn::recv   those of them that belong to TURN, with the relay's words
    wire::dev::send, wire::dev::recv     packets written to and read from the TUN

Only while one of these is asked for, the packet engine gets a wrapper that logs (see `ObservedEngine`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, cast

from fzg.dataplane.engine import Datagram, InnerPacket, OutboundPacket
from fzg.ops.logs import TRACE
from fzg.ops.observed_engine import ObservedEngine
from fzg.wire import Malformed, channel_data, ip, stun, wireguard
from fzg.wire.endpoint import Endpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fzg.dataplane.engine import Engine, Item
    from fzg.sansio import Transmit

_NET_SEND: Final = logging.getLogger("wire.net.send")
_NET_RECEIVE: Final = logging.getLogger("wire.net.recv")
_TURN_SEND: Final = logging.getLogger("wire.turn.send")
_TURN_RECEIVE: Final = logging.getLogger("wire.turn.recv")
_DEV_SEND: Final = logging.getLogger("wire.dev.send")
_DEV_RECEIVE: Final = logging.getLogger("wire.dev.recv")
_ALL: Final = (_NET_SEND, _NET_RECEIVE, _TURN_SEND, _TURN_RECEIVE, _DEV_SEND, _DEV_RECEIVE)

_PROTOCOLS: Final = {
    ip.PROTOCOL_TCP: "TCP",
    ip.PROTOCOL_UDP: "UDP",
    ip.PROTOCOL_ICMP: "ICMP",
    ip.PROTOCOL_ICMPV6: "ICMPv6",
    ip.PROTOCOL_CONTROL: "control",
}
_TCP_FLAGS: Final = {ip.TCP_SYN: "SYN", ip.TCP_FIN: "FIN", ip.TCP_RST: "RST", ip.TCP_ACK: "ACK"}


def traced(engine: Engine) -> Engine:
    """The engine itself, or, where the log's filter lets any of the targets through, one that logs what passes."""
    if not any(logger.isEnabledFor(TRACE) for logger in _ALL):
        return engine
    return cast("Engine", _TracedEngine(engine))


class _TracedEngine(ObservedEngine):
    def receive_udp(self, family: int, now: float) -> Sequence[Item]:
        """What came from the network."""
        return _received(self.observed.receive_udp(family, now))

    def handle_datagram(self, datagram: Datagram, now: float) -> Sequence[Item]:
        """The same from memory."""
        return _received(self.observed.handle_datagram(datagram, now))

    def receive_tun(self, now: float) -> Sequence[Item]:
        """What the kernel routed to the TUN."""
        return _read(self.observed.receive_tun(now))

    def handle_packet(self, packet: bytes, now: float) -> Sequence[Item]:
        """The same from memory."""
        return _read(self.observed.handle_packet(packet, now))

    def write_tun(self, packet: bytes, peer: int | None = None) -> None:
        """What goes to the network behind the gateway."""
        if _DEV_SEND.isEnabledFor(TRACE):
            _DEV_SEND.log(TRACE, described(packet), extra={"num_bytes": len(packet)})
        self.observed.write_tun(packet, peer)

    def transmit(self, transmit: Transmit) -> None:
        """What goes to clients and relays."""
        source = None if transmit.source is None else Endpoint(transmit.source, 0)
        _log_datagram(_NET_SEND, _TURN_SEND, transmit.payload, source=source, destination=transmit.destination)
        self.observed.transmit(transmit)


def _received(items: Sequence[Item]) -> Sequence[Item]:
    for item in items:
        match item:
            case Datagram(payload=payload, source=source, local=local):
                _log_datagram(_NET_RECEIVE, _TURN_RECEIVE, payload, source=source, destination=local)
            case InnerPacket(packet=packet, source=source, local=local) if _NET_RECEIVE.isEnabledFor(TRACE):
                fields = {"src": str(source), "dst": str(local), "num_bytes": len(packet)}
                _NET_RECEIVE.log(TRACE, "WireGuard data: %s", described(packet), extra=fields)
            case _:
                pass
    return items


def _read(items: Sequence[Item]) -> Sequence[Item]:
    if _DEV_RECEIVE.isEnabledFor(TRACE):
        for item in items:
            if isinstance(item, OutboundPacket):
                _DEV_RECEIVE.log(TRACE, described(item.packet), extra={"num_bytes": len(item.packet)})
    return items


def _log_datagram(
    net: logging.Logger, turn: logging.Logger, payload: bytes, *, source: Endpoint | None, destination: Endpoint
) -> None:
    kind, is_turn = classified(payload)
    fields: dict[str, object] = {} if source is None else {"src": str(source) if source.port else source.host}
    fields |= {"dst": str(destination), "num_bytes": len(payload)}
    if net.isEnabledFor(TRACE):
        net.log(TRACE, kind, extra=fields)
    if is_turn and turn.isEnabledFor(TRACE):
        turn.log(TRACE, kind, extra=fields)


def classified(payload: bytes) -> tuple[str, bool]:
    """The kind of a datagram in words, and whether it is TURN's."""
    try:
        message = stun.parse(payload)
    except Malformed:
        pass
    else:
        known = message.method in tuple(stun.Method)
        method = stun.Method(message.method).name.lower() if known else f"method {message.method:#x}"
        words = f"STUN {method} {message.message_class.name.lower()}"
        if message.error is not None:
            words += f" {message.error.code}"
        return words, message.method != stun.Method.BINDING
    try:
        number, data = channel_data.parse(payload)
    except Malformed:
        pass
    else:
        return f"ChannelData {number:#x}: {classified(data)[0]}", True
    kind = wireguard.classify(payload)
    return "unknown" if kind is None else f"WireGuard {kind.name.lower().replace('_', ' ')}", False


def described(packet: bytes) -> str:
    """Protocol, addresses, ports and TCP flags of an IP packet."""
    try:
        parsed = ip.parse(packet)
    except Malformed as error:
        return f"malformed: {error}"
    ends = [
        str(Endpoint(address, value & 0xFFFF)) if value is not None else Endpoint(address, 0).host
        for address, value in (
            (parsed.source, parsed.source_value),
            (parsed.destination, parsed.destination_value),
        )
    ]
    flags = "".join(f" {name}" for bit, name in _TCP_FLAGS.items() if parsed.tcp_flags & bit)
    return f"{protocol_name(parsed.protocol)} {ends[0]} > {ends[1]}{flags}"


def protocol_name(number: int) -> str:
    """What an IP protocol is called."""
    return _PROTOCOLS.get(number, f"protocol {number}")
