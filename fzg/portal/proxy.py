"""An HTTP proxy between us and the portal: which one the environment names, and how it is asked (RFC 9110 9.3.6)."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

from fzg.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLES: Final = ("https_proxy", "HTTPS_PROXY")  # in this order, as curl has it
EXEMPTIONS: Final = ("no_proxy", "NO_PROXY")
DEFAULT_PORT: Final = 80  # of the scheme; most proxies name theirs


class InvalidProxy(ValueError):  # noqa: N818 - names what is wrong
    """The variable names nothing that can be used; the message says why and shows no password."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """Where the proxy listens. `host` is a name or an IP literal without brackets."""

    host: str
    port: int
    authorization: Secret[str] | None = None
    """Value of the header Proxy-Authorization."""

    @classmethod
    def parse(cls, text: str, variable: str = VARIABLES[-1]) -> Proxy:
        """From `http://user:password@host:port`; all but the host may be missing. Raises InvalidProxy."""
        text = text.strip()
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            host, port = parts.hostname, parts.port
        except ValueError:
            raise InvalidProxy(f"{variable} is no URL; write it as http://user:password@host:port") from None
        if parts.scheme != "http":
            raise InvalidProxy(f"{variable} names a proxy with the scheme {parts.scheme!r}; only http:// can be used")
        if not host or not all(character.isalnum() or character in "-._:" for character in host) or not host.isascii():
            raise InvalidProxy(f"{variable} has no usable host; write it as http://user:password@host:port")
        authorization = None
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            authorization = Secret("Basic " + base64.b64encode(pair.encode()).decode())
        return cls(host, DEFAULT_PORT if port is None else port, authorization)

    def request(self, host: str, port: int) -> bytes:
        """What asks for a tunnel to `host`."""
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
        if self.authorization is not None:
            lines.append(f"Proxy-Authorization: {self.authorization.reveal()}")
        return "\r\n".join([*lines, "", ""]).encode()

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def proxy_for(host: str, port: int, environment: Mapping[str, str]) -> Proxy | None:
    """The proxy for TLS connections to `host`; None where none is named or NO_PROXY exempts it. Raises InvalidProxy."""
    variable = next((name for name in VARIABLES if environment.get(name, "").strip()), None)
    if variable is None or _is_here(host):
        return None
    exempt = next((environment[name] for name in EXEMPTIONS if environment.get(name, "").strip()), "")
    if any(_covers(entry, host.lower(), port) for entry in exempt.replace(",", " ").split()):
        return None
    return Proxy.parse(environment[variable], variable)


def _is_here(host: str) -> bool:
    """A portal on this machine is never behind a proxy."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.rstrip(".").lower() == "localhost"


def _covers(entry: str, host: str, port: int) -> bool:
    """Whether an entry of NO_PROXY means this host: `*`, a domain with all below it, an address, a network; `:port`."""
    if entry == "*":
        return True
    try:
        return ip_address(host) in ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        pass
    name, colon, suffix = entry.rpartition(":")
    if colon and suffix.isascii() and suffix.isdigit():
        if int(suffix) != port:
            return False
        entry = name.strip("[]")
    domain = entry.lower().removeprefix("*").removeprefix(".").rstrip(".")
    return bool(domain) and (host.rstrip(".") == domain or host.rstrip(".").endswith("." + domain))
