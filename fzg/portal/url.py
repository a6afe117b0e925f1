"""Where to dial: the portal's base URL and the request target of the upgrade (spec portal 1.1)."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv6Address
from urllib.parse import quote, quote_plus, urlsplit

_SCHEMES = {"http": "ws", "ws": "ws", "https": "wss", "wss": "wss"}
_DEFAULT_PORTS = {"ws": 80, "wss": 443}


class InvalidUrl(ValueError):  # noqa: N818 - names what is wrong
    """The configured portal URL cannot be dialled; the message says why."""


class ApiPath(StrEnum):
    """The path decides the names of the authorization messages (3.1); the value is what follows the base path."""

    V2 = "gateway/v2/websocket"
    V1 = "gateway/websocket"


@dataclass(frozen=True, slots=True)
class PortalUrl:
    """A parsed base URL. `host` is a name in ASCII form or an IP literal without brackets; `base_path` starts with
    `/` and has no slash at its end.
    """

    scheme: str
    host: str
    port: int
    base_path: str

    @classmethod
    def parse(cls, text: str) -> PortalUrl:
        """Raises InvalidUrl for a scheme other than http, https, ws, wss, and for a URL without host."""
        if not text.strip():
            raise InvalidUrl("the portal URL is empty; unset FIREZONE_API_URL for the default, or write wss://host")
        try:
            parts = urlsplit(text.strip())
            host, port = parts.hostname, parts.port
            base_path = quote(parts.path, safe="/%:@!$&'()*+,;=~").removesuffix("/")
        except ValueError as error:  # also bytes that are not UTF-8, as an environment variable may hold
            raise InvalidUrl(f"the portal URL {text!r} is not a URL: {error}") from error
        scheme = _SCHEMES.get(parts.scheme)
        if scheme is None:
            raise InvalidUrl(f"the portal URL has the scheme {parts.scheme!r}; use one of {', '.join(_SCHEMES)}")
        if not host:
            raise InvalidUrl(f"the portal URL {text!r} has no host")
        return cls(scheme, _ascii_host(host), port if port is not None else _DEFAULT_PORTS[scheme], base_path)

    @property
    def secure(self) -> bool:
        """True when the connection is wrapped in TLS."""
        return self.scheme == "wss"

    @property
    def authority(self) -> str:
        """The `Host` header: with the port unless it is the scheme's own (RFC 9110 7.2)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def target(self, path: ApiPath, *, external_id: str, name: str, public_key: bytes) -> str:
        """Path and query of the upgrade request; the token is never part of it."""
        query = (
            ("external_id", external_id),
            ("name", name),
            ("public_key", base64.b64encode(public_key).decode()),
        )
        return f"{self.base_path}/{path.value}?" + "&".join(f"{key}={_form_encoded(value)}" for key, value in query)


def _form_encoded(value: str) -> str:
    # Python never escapes the tilde, application/x-www-form-urlencoded does.
    return quote_plus(value, safe="*-._").replace("~", "%7E")


def _ascii_host(host: str) -> str:
    if ":" in host:
        try:
            return str(IPv6Address(host))
        except ValueError as error:
            raise InvalidUrl(f"the portal URL has the host {host!r}, which is not an IPv6 address") from error
    try:
        ascii_host = host.encode("idna").decode()
    except UnicodeError as error:
        raise InvalidUrl(f"the portal URL has the host {host!r}, which is not a host name") from error
    if not all(character.isalnum() or character in "-._" for character in ascii_host):
        raise InvalidUrl(f"the portal URL has the host {host!r}, which is not a host name")
    return ascii_host
