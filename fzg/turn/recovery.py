"""How an allocation is got back: address families, paced healing, back-off (spec turn 2.7, 2.10, 2.12)."""

from __future__ import annotations

from enum import Enum
from typing import Final

from fzg.wire.stun import AttributeType

_UDP: Final = bytes((17, 0, 0, 0))
_IPV6: Final = bytes((2, 0, 0, 0))


class Form(Enum):
    """The ways to ask for an allocation, by what they carry. Both family attributes at once are 400 everywhere."""

    DUAL = ((AttributeType.REQUESTED_TRANSPORT, _UDP), (AttributeType.ADDITIONAL_ADDRESS_FAMILY, _IPV6))
    PLAIN = ((AttributeType.REQUESTED_TRANSPORT, _UDP),)
    IPV6 = ((AttributeType.REQUESTED_TRANSPORT, _UDP), (AttributeType.REQUESTED_ADDRESS_FAMILY, _IPV6))


class Ladder:
    """Each form once per attempt; the one that worked is where the next attempt begins."""

    __slots__ = ("_known", "form")

    def __init__(self) -> None:
        self.form = Form.DUAL
        self._known = Form.DUAL

    def begin(self) -> None:
        """A new attempt."""
        self.form = self._known

    def step_down(self, code: int) -> bool:
        """After 400, 420, 440 or 508: whether there is another form to try, which then is `form`."""
        if self.form is Form.DUAL:
            self.form = Form.PLAIN
        elif self.form is Form.PLAIN and code == 440:
            self.form = Form.IPV6
        else:
            self._known = Form.DUAL
            return False
        return True

    def handle_success(self) -> None:
        """Remember the form."""
        self._known = self.form


class Remedy(Enum):
    """What to do about an allocation mismatch."""

    DELETE = "delete"
    WAIT = "wait"
    SUSPEND = "suspend"


class Healing:
    """Deletes what stands at our 5-tuple, then asks with pauses: coturn lingers a second after a delete (DEV 11)."""

    MAX_DELETES: Final = 3
    PAUSES: Final = (1.2, 2.4, 4.8)  # seconds before Allocate is repeated after a delete
    LINGER: Final = 5.0  # a 437 this soon after a delete is the old allocation still going away

    __slots__ = ("_deleted_at", "_deletes", "_pauses", "pause")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """The allocation succeeded, or the attempt is over."""
        self._deletes = 0
        self._deleted_at: float | None = None
        self._pauses = 0
        self.pause = 0.0

    def handle_mismatch(self, now: float) -> Remedy:
        """Allocate got 437 or 441. With WAIT, repeat it after `pause` seconds."""
        deleted_at = self._deleted_at
        lingers = deleted_at is not None and (self._pauses > 0 or now - deleted_at <= self.LINGER)
        if lingers and self._pauses < len(self.PAUSES):
            self.pause = self.PAUSES[self._pauses]
            self._pauses += 1
            return Remedy.WAIT
        if self._deletes >= self.MAX_DELETES:
            return Remedy.SUSPEND
        self._deletes += 1
        return Remedy.DELETE

    def handle_deleted(self, now: float) -> None:
        """The delete was answered, whatever the answer."""
        self._deleted_at = now
        self._pauses = 0

    def skip_delete(self, now: float) -> None:
        """The 5-tuple belongs to other credentials, so that a delete is impossible: go on as if it had been tried."""
        self._deletes += 1
        self.handle_deleted(now)


class Grants:
    """Allocations that the relay forgets as soon as it has granted them.

    So it is behind an address that several servers share: one grants, the next does not know of it. Each round costs a
    round trip only, and tells every client of a new relay address.
    """

    MAX_FORGOTTEN: Final = 3  # in a row; one or two may be a relay that restarts
    STEADY: Final = 10.0  # seconds, after which the loss of an allocation is news

    __slots__ = ("_forgotten", "_granted_at")

    def __init__(self) -> None:
        self._forgotten = 0
        self._granted_at = 0.0

    def handle_granted(self, now: float) -> None:
        """Allocate succeeded."""
        self._granted_at = now

    def handle_forgotten(self, now: float) -> None:
        """The relay says that it has no allocation of ours."""
        self._forgotten = self._forgotten + 1 if now - self._granted_at < self.STEADY else 0

    @property
    def hold(self) -> bool:
        """Whether the last one held for a while, as far as is known."""
        return self._forgotten == 0

    @property
    def are_in_vain(self) -> bool:
        """Whether asking for another at once would only go on in circles."""
        return self._forgotten > self.MAX_FORGOTTEN


class Backoff:
    """Pauses of a suspended allocation (DEV 9)."""

    PAUSES: Final = (30.0, 60.0, 120.0, 240.0, 300.0)

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next = 0

    def reset(self) -> None:
        """Begin again with the shortest."""
        self._next = 0

    def pause(self) -> float:
        """The next pause in seconds."""
        pause = self.PAUSES[self._next]
        self._next = min(self._next + 1, len(self.PAUSES) - 1)
        return pause
