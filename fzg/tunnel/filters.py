"""Port filters of resources, compiled to one sorted list of protocol values (spec tunnel 5.5)."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fzg.wire.ip import ECHO, PROTOCOL_ICMP, PROTOCOL_ICMPV6, TCP, UDP

if TYPE_CHECKING:
    from collections.abc import Iterable

_PORTS = 0x10000


@dataclass(frozen=True, slots=True)
class TcpFilter:
    """Inclusive port range; a range that ends before it starts permits nothing."""

    start: int = 0
    end: int = 0xFFFF


@dataclass(frozen=True, slots=True)
class UdpFilter:
    """Inclusive port range; a range that ends before it starts permits nothing."""

    start: int = 0
    end: int = 0xFFFF


@dataclass(frozen=True, slots=True)
class IcmpFilter:
    """All ICMP messages, echo or not."""


@dataclass(frozen=True, slots=True)
class UnknownFilter:
    """An entry that was not understood. It permits nothing, and its list is not an empty one."""


Filter = TcpFilter | UdpFilter | IcmpFilter | UnknownFilter


class Filters:
    """What a list of filters permits; an empty list permits everything."""

    __slots__ = ("bounds", "everything", "icmp")

    def __init__(self, filters: Iterable[Filter]) -> None:
        listed = tuple(filters)
        self.everything = not listed
        self.icmp = any(isinstance(entry, IcmpFilter) for entry in listed)
        self.bounds = _merge(_range(entry) for entry in listed)

    @classmethod
    def union(cls, parts: Iterable[Filters]) -> Filters:
        """Permits what any of `parts` permits."""
        whole = cls((UnknownFilter(),))
        ranges: list[tuple[int, int]] = []
        for part in parts:
            whole.everything |= part.everything
            whole.icmp |= part.icmp
            ranges.extend(zip(part.bounds[::2], part.bounds[1::2], strict=True))
        whole.bounds = _merge(ranges)
        return whole

    def permits(self, protocol: int, value: int | None) -> bool:
        """Whether a packet of this IP protocol and protocol value may pass."""
        if self.everything:
            return True
        if value is None:
            return self.icmp and protocol in (PROTOCOL_ICMP, PROTOCOL_ICMPV6)
        return bisect_right(self.bounds, value) & 1 == 1


def _range(entry: Filter) -> tuple[int, int]:
    match entry:
        case TcpFilter(start, end):
            return (TCP + start, TCP + end + 1) if 0 <= start <= end < _PORTS else (0, 0)
        case UdpFilter(start, end):
            return (UDP + start, UDP + end + 1) if 0 <= start <= end < _PORTS else (0, 0)
        case IcmpFilter():
            return ECHO, ECHO + _PORTS
        case UnknownFilter():
            return 0, 0


def _merge(ranges: Iterable[tuple[int, int]]) -> list[int]:
    """Half-open ranges as ascending bounds: a value is inside iff an odd number of bounds is at or below it."""
    bounds: list[int] = []
    for start, end in sorted(ranges):
        if start == end:
            continue
        if bounds and start <= bounds[-1]:
            bounds[-1] = max(bounds[-1], end)
        else:
            bounds += (start, end)
    return bounds
