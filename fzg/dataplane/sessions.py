"""What the engine keeps per client: WireGuard sessions, the send path, and the times that timers need."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fzg.dataplane.engine import Activity
from fzg.dataplane.replay import ReplayWindow

if TYPE_CHECKING:
    from fzg.dataplane.flows import Flow
    from fzg.wire.endpoint import Endpoint

# In place of a peer's handle: the owner of what the core itself queued.
CORE = -1


class Path(NamedTuple):
    """Where data of a client goes; `channel` frames it for a relay."""

    source: bytes | None
    destination: Endpoint
    channel: int | None


class Session:
    """One pair of transport keys with its counters."""

    __slots__ = (
        "confirmed",
        "local_index",
        "next_counter",
        "peer",
        "receive_key",
        "received_data",
        "remote_index",
        "send_key",
        "sent_data",
        "window",
    )

    def __init__(self, peer: Peer, local_index: int, remote_index: int, receive_key: bytes, send_key: bytes) -> None:
        self.peer = peer
        self.local_index = local_index
        self.remote_index = remote_index
        self.receive_key = receive_key
        self.send_key = send_key
        self.next_counter = 0
        self.window = ReplayWindow()
        self.confirmed = False
        self.sent_data = False
        self.received_data = False


class Peer:
    """One client. Times are 0.0 for never; see `engine.Activity` for their meaning."""

    __slots__ = (
        "current",
        "first_unanswered_received",
        "first_unanswered_sent",
        "handle",
        "inbound",
        "last_data",
        "last_received",
        "last_sent",
        "outbound",
        "path",
        "sessions",
    )

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.sessions: dict[int, Session] = {}
        self.current: Session | None = None
        self.path: Path | None = None
        self.inbound: dict[bytes, Flow] = {}
        self.outbound: dict[bytes, Flow] = {}
        self.first_unanswered_sent = 0.0
        self.first_unanswered_received = 0.0
        self.last_sent = 0.0
        self.last_received = 0.0
        self.last_data = 0.0

    def note_sent(self, now: float) -> None:
        """Anything went to the peer: what it sent is answered."""
        self.last_sent = now
        self.first_unanswered_received = 0.0

    def note_received(self, now: float) -> None:
        """Anything authenticated came from the peer: what we sent is answered."""
        self.last_received = now
        self.first_unanswered_sent = 0.0

    def note_data_sent(self, session: Session, now: float) -> None:
        """A non-empty packet went to the peer on `session`."""
        self.note_sent(now)
        self.last_data = now
        self.first_unanswered_sent = self.first_unanswered_sent or now
        session.sent_data = True

    def note_data_received(self, session: Session, now: float) -> None:
        """A non-empty packet came from the peer on `session`."""
        self.note_received(now)
        self.last_data = now
        self.first_unanswered_received = self.first_unanswered_received or now
        session.received_data = True

    def activity(self) -> Activity:
        """The times as the interface gives them."""
        current = self.current
        return Activity(
            first_unanswered_sent=self.first_unanswered_sent,
            first_unanswered_received=self.first_unanswered_received,
            last_sent=self.last_sent,
            last_received=self.last_received,
            last_data=self.last_data,
            current_sent_data=current is not None and current.sent_data,
            current_received_data=current is not None and current.received_data,
        )
