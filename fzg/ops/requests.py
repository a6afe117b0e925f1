"""What an operator may ask of a running gateway (served by `fzg.ops.control`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent

from fzg.host import clock
from fzg.ops import snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from fzg.gateway import Gateway
    from fzg.ops.control import Handler
    from fzg.portal.websocket import PortalConnection

# Clients described in one go: under 2 ms, so that packets and portal frames wait no longer than that.
CLIENTS_A_TURN = 32


class Requests:
    """Every request by name. `not_ready_because`: one sentence why no client can be served, None when all is well."""

    def __init__(
        self, *, gateway: Gateway, portal: PortalConnection, not_ready_because: Callable[[], str | None]
    ) -> None:
        self._gateway = gateway
        self._portal = portal
        self._not_ready_because = not_ready_because
        self._started = clock.now()

    def handlers(self) -> Mapping[str, Handler]:
        """For `ControlServer`."""
        return {"status": self.status}

    def status(self, _request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """A line of everything else, then lines of `clients`."""
        gateway = self._gateway
        yield snapshot.overview(
            gateway,
            self._portal,
            now=clock.now(),
            started=self._started,
            not_ready_because=self._not_ready_because(),
        )
        ids = gateway.client_ids
        for start in range(0, len(ids), CLIENTS_A_TURN):
            now = clock.now()
            found = (snapshot.client(gateway, each, now) for each in ids[start : start + CLIENTS_A_TURN])
            yield {"clients": [each for each in found if each is not None]}
            _let_others_run()


def _let_others_run() -> None:
    """Wait until the loop has looked at every socket; `gevent.sleep(0)` would not let it (design 3)."""
    hub = gevent.get_hub()
    hub.wait(hub.loop.timer(0.0))
