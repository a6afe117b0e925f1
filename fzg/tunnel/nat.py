"""The NAT table of one client: proxy IPs outside of the network, real IPs inside of it (spec tunnel 7.4).

An entry joins an inside key (source value, proxy IP) with an outside key (source value, real IP), one to one.
"""

from __future__ import annotations

from collections import OrderedDict
from copy import copy
from enum import Enum, auto
from heapq import heappop, heappush
from math import inf
from typing import TYPE_CHECKING

from fzg.wire.ip import ECHO, TCP, TCP_FIN, TCP_RST, UDP

if TYPE_CHECKING:
    from collections.abc import Sequence

# Seconds after the last packet, spec tunnel 1.3.
_TTL = {TCP: 7440.0, UDP: 120.0, ECHO: 120.0}
_UNANSWERED = 60.0  # after the last outgoing packet
_AFTER_FIN = 5.0  # after the last packet, once both sides sent FIN

# Ours. Enough for two real IPs with every port in use; stops one client from taking all memory (about 1 kB each).
MAX_ENTRIES = 1 << 17
# Spec tunnel 7.4 [HARDEN]: the newest are kept.
MAX_EXPIRED = 1 << 16
# Ours. Ports that are tried one by one before a map of all is made: such runs are rare, and a map costs 64 KiB.
_PROBES = 256

_PORTS = 0x10000
_TAG = ~0xFFFF


class Lookup(Enum):
    """Why a packet from the network has no entry."""

    UNKNOWN = auto()
    EXPIRED = auto()


class Entry:
    """One session. `token` names it in flow reports, 0 until a flow was made; `is_cached` once there is any."""

    __slots__ = (
        "answered",
        "armed",
        "fin_in",
        "fin_out",
        "is_cached",
        "last_incoming",
        "last_outgoing",
        "outside_value",
        "proxy",
        "real",
        "rst",
        "source_value",
        "token",
    )

    def __init__(self, source_value: int, proxy: bytes, outside_value: int, real: bytes, now: float) -> None:
        self.source_value = source_value
        self.proxy = proxy
        self.outside_value = outside_value
        self.real = real
        self.last_outgoing = now
        self.last_incoming = -inf
        self.answered = False
        self.fin_out = self.fin_in = self.rst = False
        self.armed = inf
        self.token = 0
        self.is_cached = False

    @property
    def last_packet(self) -> float:
        """When it was used last."""
        return max(self.last_outgoing, self.last_incoming)

    def deadline(self) -> float:
        """When the entry has had its time."""
        last = self.last_packet
        if self.rst:
            return last
        due = last + _TTL[self.source_value & _TAG]
        if self.fin_out and self.fin_in:
            due = last + _AFTER_FIN
        return due if self.answered else min(due, self.last_outgoing + _UNANSWERED)


class NatTable:
    """All sessions of one client, and the outside keys of those that ended."""

    __slots__ = ("_count", "_due", "_expired", "_inside", "_outside", "_sequence")

    def __init__(self) -> None:
        # By proxy IP, then by source value: with many sessions a lookup touches half the memory that one by pairs does.
        self._inside: dict[bytes, dict[int, Entry]] = {}
        self._outside: dict[tuple[int, bytes], _Ports] = {}
        self._expired: OrderedDict[tuple[int, bytes], None] = OrderedDict()
        self._due: list[tuple[float, int, Entry]] = []
        self._sequence = 0  # no two places in the queue compare equal
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def outgoing(self, source_value: int, proxy: bytes, real: bytes, tcp_flags: int, now: float) -> Entry | None:
        """The session of a packet to the network, new if need be; None when no port or no room is left.

        A session stays with its real IP even if the proxy IP leads elsewhere by now.
        """
        sessions = self._inside.get(proxy)
        entry = sessions.get(source_value) if sessions is not None else None
        if entry is None:
            return self._open(source_value, proxy, real, now)
        entry.last_outgoing = now
        if tcp_flags & (TCP_FIN | TCP_RST):
            entry.fin_out |= bool(tcp_flags & TCP_FIN)
            entry.rst |= bool(tcp_flags & TCP_RST)
            self._arm(entry)
        return entry

    def incoming(self, destination_value: int, source: bytes, tcp_flags: int, now: float) -> Entry | Lookup:
        """The session of a packet from the network. For an ICMP error: embedded source value and destination IP."""
        ports = self._outside.get((destination_value & _TAG, source))
        entry = ports.entries.get(destination_value) if ports is not None else None
        if entry is None:
            return Lookup.EXPIRED if (destination_value, source) in self._expired else Lookup.UNKNOWN
        entry.last_incoming = now
        entry.answered = True
        if tcp_flags & (TCP_FIN | TCP_RST):
            entry.fin_in |= bool(tcp_flags & TCP_FIN)
            entry.rst |= bool(tcp_flags & TCP_RST)
            self._arm(entry)
        return entry

    def sweep(self, now: float, limit: int) -> list[Entry]:
        """Remove and return at most `limit` entries whose time is over."""
        removed: list[Entry] = []
        while len(removed) < limit and self._due and self._due[0][0] <= now:
            due, _, entry = heappop(self._due)
            if due != entry.armed:
                continue  # an earlier place in the queue has taken over, or the entry is gone
            if entry.deadline() <= now:
                self._remove(entry)
                removed.append(entry)
            else:
                entry.armed = inf
                self._arm(entry)
        return removed

    def clear(self) -> Sequence[Entry]:
        """Forget and return all entries; the expired memory goes too."""
        removed = [entry for sessions in self._inside.values() for entry in sessions.values()]
        for entry in removed:
            entry.armed = inf
        self._inside.clear()
        self._outside.clear()
        self._expired.clear()
        self._due.clear()
        self._count = 0
        return removed

    def rehearsal(self) -> NatTable:
        """A table that answers as this one would now, whatever it is asked, and remembers nothing."""
        return _Rehearsal(self)

    def _open(self, source_value: int, proxy: bytes, real: bytes, now: float) -> Entry | None:
        entry = self._plan(source_value, proxy, real, now)
        if entry is None:
            return None
        key = (entry.outside_value & _TAG, real)
        ports = self._outside.get(key)
        if ports is None:
            ports = self._outside[key] = _Ports()
        self._count += 1
        self._inside.setdefault(proxy, {})[source_value] = entry
        ports.take(entry)
        self._expired.pop((entry.outside_value, real), None)
        self._arm(entry)
        return entry

    def _plan(self, source_value: int, proxy: bytes, real: bytes, now: float) -> Entry | None:
        """The session that would be opened."""
        if self._count >= MAX_ENTRIES:
            return None
        tag = source_value & _TAG
        ports = self._outside.get((tag, real))
        wanted = source_value & 0xFFFF
        port = wanted if ports is None else ports.free_from(wanted, tag)
        return None if port is None else Entry(source_value, proxy, tag | port, real, now)

    def _remove(self, entry: Entry) -> None:
        entry.armed = inf
        self._count -= 1
        sessions = self._inside[entry.proxy]
        del sessions[entry.source_value]
        if not sessions:
            del self._inside[entry.proxy]
        key = (entry.outside_value & _TAG, entry.real)
        ports = self._outside[key]
        ports.release(entry)
        if not ports.entries:
            del self._outside[key]
        self._expired[entry.outside_value, entry.real] = None
        if len(self._expired) > MAX_EXPIRED:
            self._expired.popitem(last=False)

    def _arm(self, entry: Entry) -> None:
        """Queue the entry unless it has a place early enough; later deadlines are seen to when that place comes."""
        due = entry.deadline()
        if due < entry.armed:
            entry.armed = due
            self._sequence += 1
            heappush(self._due, (due, self._sequence, entry))


class _Rehearsal(NatTable):
    """See `NatTable.rehearsal`. Its own tables stay empty, and sessions are copies."""

    __slots__ = ("_real",)

    def __init__(self, real: NatTable) -> None:
        super().__init__()
        self._real = real

    def outgoing(self, source_value: int, proxy: bytes, real: bytes, tcp_flags: int, now: float) -> Entry | None:  # noqa: ARG002
        """As there."""
        entry = self._real._inside.get(proxy, {}).get(source_value)  # noqa: SLF001 - its own class
        return self._real._plan(source_value, proxy, real, now) if entry is None else copy(entry)  # noqa: SLF001

    def incoming(self, destination_value: int, source: bytes, tcp_flags: int, now: float) -> Entry | Lookup:  # noqa: ARG002
        """As there."""
        ports = self._real._outside.get((destination_value & _TAG, source))  # noqa: SLF001
        entry = ports.entries.get(destination_value) if ports is not None else None
        if entry is None:
            expired = (destination_value, source) in self._real._expired  # noqa: SLF001
            return Lookup.EXPIRED if expired else Lookup.UNKNOWN
        return copy(entry)


class _Ports:
    """The outside values in use towards one real IP over one protocol."""

    __slots__ = ("_taken", "entries")

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        # One byte per port once long runs of used ports were met, so that searching them stays cheap.
        self._taken: bytearray | None = None

    def free_from(self, wanted: int, tag: int) -> int | None:
        """`wanted`, else the next free one upwards, then from 1; 0 only if wanted."""
        if tag | wanted not in self.entries:
            return wanted
        if self._taken is None:
            for port in range(wanted + 1, min(wanted + _PROBES, _PORTS)):
                if tag | port not in self.entries:
                    return port
            self._taken = bytearray(_PORTS)
            for value in self.entries:
                self._taken[value & 0xFFFF] = 1
        port = self._taken.find(0, wanted)
        if port < 0:
            port = self._taken.find(0, 1, wanted) if wanted else -1
        return port if port >= 0 else None

    def take(self, entry: Entry) -> None:
        self.entries[entry.outside_value] = entry
        if self._taken is not None:
            self._taken[entry.outside_value & 0xFFFF] = 1

    def release(self, entry: Entry) -> None:
        del self.entries[entry.outside_value]
        if self._taken is not None:
            self._taken[entry.outside_value & 0xFFFF] = 0
