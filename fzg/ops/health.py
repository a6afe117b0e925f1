"""`/healthz`, `/readyz` and, if wanted, `/metrics` over plain HTTP (spec operations 1.9, OPS-39 to 42)."""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING

import gevent
from gevent.pool import Pool
from gevent.pywsgi import WSGIHandler, WSGIServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIEnvironment

    from fzg.wire.endpoint import Endpoint

_LOG = logging.getLogger(__name__)

# One probe per second from a handful of supervisors is usual; more connections than this at once is a scan.
MAX_CONNECTIONS = 64
# Who connects and says nothing gives its place back after this.
MAX_CONNECTION_S = 10.0


class Health:
    """The HTTP server; a port that is taken costs the endpoint, not the gateway (OPS-32)."""

    def __init__(
        self,
        address: Endpoint,
        not_ready_because: Callable[[], str | None],
        render_metrics: Callable[[str], tuple[bytes, str]] | None = None,
    ) -> None:
        """`not_ready_because`: a sentence why no client can be served, None when all is well. `render_metrics`: body
        and content type of `/metrics` for an Accept header; None: there is no such path.
        """
        self._address = address
        self._not_ready_because = not_ready_because
        self._render_metrics = render_metrics
        self._server: WSGIServer | None = None

    def start(self) -> None:
        """Listen; logs a warning that names the address when that fails."""
        server = WSGIServer(
            (self._address.host, self._address.port),
            self._answer,
            log=None,
            error_log=None,
            spawn=Pool(MAX_CONNECTIONS),
            handler_class=_Handler,
        )
        try:
            server.start()
        except OSError as error:
            _LOG.warning(
                "The health endpoint cannot listen, the gateway runs without it: choose another address with"
                " --health-check-addr or HEALTH_CHECK_ADDR",
                extra={"address": str(self._address), "error": os.strerror(error.errno or 0)},
            )
            return
        self._server = server

    def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.stop(timeout=0)

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path, method = environ.get("PATH_INFO", ""), environ.get("REQUEST_METHOD", "")
        accept = str(environ.get("HTTP_ACCEPT", ""))
        status, body, content_type, headers = "200 OK", b"", "text/plain; charset=utf-8", []
        if path not in ("/healthz", "/readyz") and not (path == "/metrics" and self._render_metrics is not None):
            status = "404 Not Found"
        elif method not in ("GET", "HEAD"):
            status, headers = "405 Method Not Allowed", [("Allow", "GET, HEAD")]
        elif path == "/readyz":
            status, body, content_type = _readiness_answer(self._not_ready_because(), accept)
        elif path == "/metrics" and self._render_metrics is not None:
            body, content_type = self._render_metrics(accept)
        headers += [("Content-Type", content_type), ("Content-Length", str(len(body)))]
        start_response(status, headers)
        return [body] if method != "HEAD" else []


def _readiness_answer(reason: str | None, accept: str) -> tuple[str, bytes, str]:
    """Status, body and content type; the body is a sentence, or nothing, unless JSON is asked for."""
    status = "200 OK" if reason is None else "503 Service Unavailable"
    if "application/json" in accept.lower():
        body = {"ready": reason is None} | ({} if reason is None else {"reason": reason})
        return status, json.dumps(body).encode() + b"\n", "application/json"
    return status, b"" if reason is None else f"{reason}\n".encode(), "text/plain; charset=utf-8"


class _Handler(WSGIHandler):  # type: ignore[misc]
    """A connection with an end; what it did wrong is its own affair and reaches no log."""

    def handle(self) -> None:
        """All requests of one connection."""
        with gevent.Timeout(MAX_CONNECTION_S, False):  # noqa: FBT003 - gevent's way to say "do not raise"
            super().handle()
