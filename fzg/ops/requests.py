"""What an operator may ask of a running gateway (served by `fzg.ops.control`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent

from fzg.host import clock
from fzg.ops import bundle, capture, snapshot, trace
from fzg.ops.control import Refused
from fzg.ops.drain import DEFAULT_TIMEOUT, INTERVAL, LONGEST_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from fzg.gateway import Gateway
    from fzg.ops.control import Handler
    from fzg.ops.drain import Drain
    from fzg.portal.websocket import PortalConnection
    from fzg.secret import Secret

# Clients described in one go: under 2 ms, so that packets and portal frames wait no longer than that.
CLIENTS_A_TURN = 32


class Requests:
    """Every request by name. `settings`: as they may be shown. `not_ready_because`: None when all is well."""

    def __init__(
        self,
        *,
        gateway: Gateway,
        portal: PortalConnection,
        drain: Drain,
        settings: Mapping[str, Any],
        token: Secret[str],
        not_ready_because: Callable[[], str | None],
    ) -> None:
        self._gateway = gateway
        self._portal = portal
        self._drain = drain
        self._settings = settings
        self._token = token
        self._not_ready_because = not_ready_because
        self._started = clock.now()

    def handlers(self) -> Mapping[str, Handler]:
        """For `ControlServer`."""
        return {
            "status": self.status,
            "drain": self.drain,
            "trace": self.trace,
            "bundle": self.bundle,
            "capture": self.capture,
        }

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

    def trace(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Why a packet passes or not."""
        yield trace.trace(self._gateway, request, clock.now())

    def capture(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Inner packets of one client; ends with the asker, at the latest."""
        client_id = trace.find_client(self._gateway, request.get("client"))
        count = _number(request, "count", capture.DEFAULT_COUNT, most=capture.MAX_COUNT)
        seconds = _number(request, "seconds", capture.DEFAULT_SECONDS, most=capture.MAX_SECONDS)
        for line in capture.capture(self._gateway, client_id, count=int(count), seconds=seconds):
            yield line
            _let_others_run()

    def bundle(self, _request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """What only this process knows; the command adds what the host shows to everybody."""
        for line in bundle.contribution(self._gateway, self._settings, [self._token.reveal()]):
            yield line
            _let_others_run()

    def drain(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """How many clients are left, every second; goes on when the asker hangs up."""
        timeout = _number(request, "timeout", DEFAULT_TIMEOUT, most=LONGEST_TIMEOUT)
        begun = self._drain.start(timeout)
        yield {"begun": begun, "clients": self._drain.remaining}
        while not self._drain.done.wait(INTERVAL):
            yield {"clients": self._drain.remaining}
        yield {"clients": self._drain.remaining, "done": True}


def _number(request: Mapping[str, Any], name: str, default: float, *, most: float) -> float:
    value = request.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise Refused(f"{name} must be a number from 0 to {most:g}")
    return float(value)


def _let_others_run() -> None:
    """Wait until the loop has looked at every socket; `gevent.sleep(0)` would not let it (design 3)."""
    hub = gevent.get_hub()
    hub.wait(hub.loop.timer(0.0))
