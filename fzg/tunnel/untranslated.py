"""Cached flows towards a client that belong to no NAT session, in case one begins that their packets belong to.

A session claims every packet from its real IP to its outside port (spec tunnel 4.1), also of a conversation that passed
untranslated until then, because the client may reach the same host through another resource.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fzg.tunnel.events import FlowKey

_Flows = dict[tuple[int, bytes], list["FlowKey"]]


class Untranslated:
    """Keys of such flows for at least `validity` seconds, which is how long they may be cached, and at most thrice."""

    __slots__ = ("_older", "_recent", "_since", "_validity")

    def __init__(self, validity: float) -> None:
        self._validity = validity
        self._recent: _Flows = {}
        self._older: _Flows = {}
        self._since = 0.0

    def note(self, value: int, source: bytes, key: FlowKey, now: float) -> None:
        """A flow from this IP to this protocol value of the client may be cached from now on."""
        if now - self._since >= self._validity:
            self._older, self._recent = self._recent, {}
            self._since = now
        self._recent.setdefault((value, source), []).append(key)

    def take(self, value: int, source: bytes) -> list[FlowKey]:
        """Those from this IP to this value, which are forgotten."""
        if not self._recent and not self._older:
            return []
        return self._recent.pop((value, source), []) + self._older.pop((value, source), [])

    def prune(self, now: float) -> None:
        """Forget all once none can be cached any more."""
        if (self._recent or self._older) and now - self._since >= 2 * self._validity:
            self._recent, self._older = {}, {}
