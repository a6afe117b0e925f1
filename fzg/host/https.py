"""One HTTPS connection at a time, by the portal's way of dialling: all addresses at once, marked, through its proxy."""

from __future__ import annotations

import http.client
import ssl
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import gevent

from fzg.portal import dial
from fzg.portal.dial import DialError, DialOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from fzg.secret import Secret

# Ours. The collector stores up to 10 MB per request.
REQUEST_TIMEOUT: Final = 60.0
CONNECT_TIMEOUT: Final = 15.0
# Ours. Answers are a few bytes; of a longer one the rest is not read, and the connection not used again.
_MAX_BODY: Final = 64 * 1024


class HttpsError(Exception):
    """No answer came; trying again may help."""


class ConnectionLost(HttpsError):  # noqa: N818 - names what happened
    """The other side closed the connection before it answered."""


class Response(NamedTuple):
    """Status and headers, whose names are lower-case."""

    status: int
    headers: dict[str, str]

    def header(self, name: str) -> str:
        """The value of a header, empty if there is none."""
        return self.headers.get(name, "").strip()


class Connection(Protocol):
    """A connection to `host`."""

    host: str

    @property
    def is_open(self) -> bool:
        """Whether a further request may be sent."""

    def post(self, path: str, body: bytes, token: Secret[str]) -> Response:
        """Send JSON under a bearer token. Raises HttpsError."""

    def close(self) -> None:
        """Idempotent."""


class Connector(Protocol):
    """Opens connections."""

    def __call__(self, host: str, /) -> Connection:
        """A TLS connection to `host`. Raises HttpsError."""


class HttpsConnector:
    """Connects to port 443 with certificates and names checked. `options` gives the options of each dial."""

    def __init__(
        self, options: Callable[[str], DialOptions], *, user_agent: str = "", port: int = http.client.HTTPS_PORT
    ) -> None:
        self._options = options
        self._user_agent = user_agent
        self._port = port

    def __call__(self, host: str, /) -> Connection:
        """See `Connector`."""
        stream: Any = None
        try:
            options = self._options(host)
            assert options.ssl_context is not None
            addresses = dial.find(host, options)
            with gevent.Timeout(CONNECT_TIMEOUT, TimeoutError(f"no connection within {CONNECT_TIMEOUT:g} s")):
                stream = dial.connect(addresses, host, self._port, options)
                stream = options.ssl_context.wrap_socket(stream, server_hostname=host, do_handshake_on_connect=False)
                stream.do_handshake()
        except BaseException as error:
            if stream is not None:
                stream.close()
            if isinstance(error, OSError | ValueError | DialError):
                raise HttpsError(str(error)) from error
            raise
        return _HttpsConnection(host, stream, self._user_agent)


class _HttpsConnection:
    def __init__(self, host: str, stream: ssl.SSLSocket, user_agent: str) -> None:
        self.host = host
        self._user_agent = user_agent
        self._http: http.client.HTTPConnection | None = http.client.HTTPConnection(host, http.client.HTTPS_PORT)
        self._http.auto_open = 0  # only we open connections
        self._http.sock = stream

    @property
    def is_open(self) -> bool:
        """See `Connection`."""
        return self._http is not None and self._http.sock is not None

    def post(self, path: str, body: bytes, token: Secret[str]) -> Response:
        """See `Connection`."""
        if self._http is None:
            raise ConnectionLost("closed")
        headers = {
            "Host": f"[{self.host}]" if ":" in self.host else self.host,
            "Authorization": f"Bearer {token.reveal()}",
            "Content-Type": "application/json",
        }
        if self._user_agent:
            headers["User-Agent"] = self._user_agent
        try:
            with gevent.Timeout(REQUEST_TIMEOUT, TimeoutError("timed out")):
                self._http.request("POST", path, body=body, headers=headers)
                response = self._http.getresponse()
                if len(response.read(_MAX_BODY)) == _MAX_BODY or response.will_close:
                    self._http.close()
        except BaseException as error:
            self.close()
            if isinstance(error, ConnectionError | http.client.NotConnected | ssl.SSLEOFError):
                raise ConnectionLost(type(error).__name__) from error  # RemoteDisconnected is a ConnectionError
            if isinstance(error, OSError | http.client.HTTPException):
                raise HttpsError(repr(error)[:200]) from error
            if isinstance(error, ValueError):
                raise HttpsError("the request cannot be written") from None  # the message may quote the token
            raise
        return Response(response.status, {name.lower(): value for name, value in response.getheaders()})

    def close(self) -> None:
        """See `Connection`."""
        if self._http is not None:
            self._http.close()
            self._http = None
