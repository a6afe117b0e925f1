"""Maintenance: leave the portal, send the clients to other gateways, and end when all have gone (users' item 24)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import gevent
from gevent.event import Event

from fzg.host import clock

if TYPE_CHECKING:
    from collections.abc import Callable

    from fzg.gateway import Gateway
    from fzg.portal.websocket import PortalConnection

_LOG = logging.getLogger(__name__)

# A client that heard none of our goodbyes finds out by itself in about 15 s (connectivity 3.9): waiting longer is idle.
DEFAULT_TIMEOUT = 20.0  # s
LONGEST_TIMEOUT = 86_400  # s; who wants to wait longer does not want to drain
# How often clients that still send are told again.
INTERVAL = 1.0  # s
# For the close frame, which takes this gateway off the portal's list before the first client asks for another.
CLOSE_WAIT = 1.0  # s


class Drain:
    """Begun once by `start`. `settle` carries out what the core decided, `finished` ends the process."""

    def __init__(
        self,
        gateway: Gateway,
        portal: PortalConnection,
        *,
        settle: Callable[[], None],
        finished: Callable[[], None],
    ) -> None:
        self.done = Event()
        self._gateway = gateway
        self._portal = portal
        self._settle = settle
        self._finished = finished
        self._began = False

    @property
    def is_under_way(self) -> bool:
        """Whether it was started."""
        return self._began

    @property
    def remaining(self) -> int:
        """Clients that have not gone yet."""
        return len(self._gateway.client_ids)

    def start(self, timeout: float = DEFAULT_TIMEOUT) -> bool:
        """Begin, and end after `timeout` seconds at the latest; False if it was begun before."""
        if self._began:
            return False
        self._began = True
        gevent.spawn(self._run, timeout)
        return True

    def _run(self, timeout: float) -> None:
        _LOG.info("Draining: the clients are sent to other gateways", extra={"clients": self.remaining})
        deadline = clock.now() + timeout
        # First, for a client that is sent away asks the portal at once, which must not name us again.
        self._portal.close(wait=CLOSE_WAIT)
        self._gateway.handle_portal_disconnected(clock.now())
        while self._gateway.drain(clock.now()) and clock.now() < deadline:
            self._settle()
            gevent.sleep(min(INTERVAL, max(0.0, deadline - clock.now())))
        self._settle()
        _LOG.info("Drained", extra={"clients_left": self.remaining})
        self.done.set()
        hub = gevent.get_hub()
        hub.wait(hub.loop.timer(INTERVAL / 10))  # so that who asked for it hears of the end before it comes
        self._finished()
