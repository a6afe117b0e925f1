"""Authorizations that came before any relay had answered; what the portal says of them meanwhile holds for them."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from msgspec import structs

from fzg.portal import messages
from fzg.sansio import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# Spec connectivity D6: a relay answers within its round trip, and the client waits 15 s for us, so a second costs
# nothing and saves the client a retry.
RELAY_WAIT = 1.0  # s
# The portal sends one authorization per request of a client; more than this waiting at once is a portal gone wild.
MAX_WAITING_AUTHORIZATIONS = 1000


class WaitingAuthorizations:
    """In the order of their arrival, each for `RELAY_WAIT` at most."""

    def __init__(self) -> None:
        self._entries: deque[tuple[float, messages.CreateAuthorization]] = deque()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, message: messages.CreateAuthorization, now: float) -> bool:
        """Keep it for `RELAY_WAIT`; False when there are too many."""
        if len(self._entries) >= MAX_WAITING_AUTHORIZATIONS:
            return False
        self._entries.append((now + RELAY_WAIT, message))
        return True

    def take(self, now: float, *, every: bool) -> list[messages.CreateAuthorization]:
        """Those whose time is over, or all, in the order of arrival."""
        taken = []
        while self._entries and (every or now >= self._entries[0][0]):
            taken.append(self._entries.popleft()[1])
        return taken

    def withdraw(self, client_id: str, resource_id: str) -> None:
        """The portal rejected the pair."""
        self._change(lambda message: None if _pair(message) == (client_id, resource_id) else message)

    def retain(self, authorizations: Iterable[messages.Authorization]) -> None:
        """The portal said which pairs are authorized, and until when."""
        listed: dict[tuple[str, str], int] = {
            (entry.client_id, entry.resource_id): entry.expires_at for entry in authorizations
        }

        def listed_only(message: messages.CreateAuthorization) -> messages.CreateAuthorization | None:
            expires_at = listed.get(_pair(message))
            return None if expires_at is None else structs.replace(message, expires_at=expires_at)

        self._change(listed_only)

    def set_expiry(self, client_id: str, resource_id: str, expires_at: int) -> None:
        """The portal moved the end of the pair."""
        pair = (client_id, resource_id)
        self._change(lambda each: structs.replace(each, expires_at=expires_at) if _pair(each) == pair else each)

    def update_filters(self, resource: messages.Resource) -> None:
        """The portal changed what the resource permits."""
        if isinstance(resource, messages.InternetResource):
            return
        filters_now = resource.filters

        def updated(message: messages.CreateAuthorization) -> messages.CreateAuthorization:
            held = message.resource
            if (
                held.id != resource.id
                or isinstance(held, messages.InternetResource)
                or type(held) is not type(resource)
            ):
                return message
            return structs.replace(message, resource=structs.replace(held, filters=filters_now))

        self._change(updated)

    def poll_timeout(self) -> Deadline | None:
        """When the first has waited long enough."""
        return Deadline(self._entries[0][0], "authorization waits for a relay") if self._entries else None

    def _change(self, change: Callable[[messages.CreateAuthorization], messages.CreateAuthorization | None]) -> None:
        changed = ((deadline, change(message)) for deadline, message in self._entries)
        self._entries = deque((deadline, message) for deadline, message in changed if message is not None)


def _pair(message: messages.CreateAuthorization) -> tuple[str, str]:
    return message.client.id, message.resource.id
