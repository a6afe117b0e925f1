"""`--validate-checksums`: tells of packets that came from the TUN with a wrong checksum (spec operations 1.1).

None is dropped: their receiver does that, and the gateway hands on a wrong checksum as wrong as it was. What the kernel
left to us to compute cannot be wrong. Who and where stands at DEBUG, as all addresses of users do.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

from fzg.dataplane.engine import OutboundPacket
from fzg.ops.observed_engine import ObservedEngine
from fzg.ops.wire_trace import described, protocol_name
from fzg.wire import Malformed, ip

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fzg.dataplane.engine import Engine, Item

_LOG = logging.getLogger(__name__)


def validating(engine: Engine) -> Engine:
    """The engine, with a WARN for each packet of the TUN whose IPv4 header, TCP, UDP or ICMP checksum is wrong."""
    return cast("Engine", _ValidatingEngine(engine))


class _ValidatingEngine(ObservedEngine):
    def receive_tun(self, now: float) -> Sequence[Item]:
        """What the kernel routed to the TUN."""
        return _validated(self.observed.receive_tun(now))

    def handle_packet(self, packet: bytes, now: float) -> Sequence[Item]:
        """The same from memory."""
        return _validated(self.observed.handle_packet(packet, now))


def _validated(items: Sequence[Item]) -> Sequence[Item]:
    for item in items:
        if not isinstance(item, OutboundPacket):
            continue
        try:
            parsed = ip.parse(item.packet)
        except Malformed:  # the tunnel drops and counts it
            continue
        if not ip.has_valid_checksums(parsed):
            fields = {"protocol": protocol_name(parsed.protocol), "num_bytes": len(item.packet)}
            _LOG.warning("A packet from the network has a wrong checksum", extra=fields)
            _LOG.debug("Its checksum is wrong: %s", described(item.packet))
    return items
