"""What a client may be granted, and the grant (spec tunnel 5.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING

from fzg.tunnel.dns_pattern import Pattern
from fzg.tunnel.filters import Filter, Filters

if TYPE_CHECKING:
    from ipaddress import IPv4Network, IPv6Network

    from fzg.tunnel.ingest_token import Attribution


@dataclass(frozen=True, slots=True)
class CidrResource:
    """A network. `id` is a canonical UUID string."""

    id: str
    network: IPv4Network | IPv6Network
    filters: tuple[Filter, ...] = ()
    name: str = ""


@dataclass(frozen=True, slots=True)
class DnsResource:
    """All names that match the pattern `address`."""

    id: str
    address: str
    filters: tuple[Filter, ...] = ()
    name: str = ""


@dataclass(frozen=True, slots=True)
class InternetResource:
    """Everything that is not excluded by `ranges.is_excluded_from_internet`; filters never apply."""

    id: str


Resource = CidrResource | DnsResource | InternetResource


class Authorization:
    """One resource in the hands of one client until `expires`, which is infinity for a grant without end.

    Flows are logged if there is an `attribution`.
    """

    __slots__ = ("attribution", "expires", "filters", "pattern", "resource")

    def __init__(self, resource: Resource, expires: float | None) -> None:
        self.resource = resource
        self.expires = inf if expires is None else expires
        self.filters = Filters(() if isinstance(resource, InternetResource) else resource.filters)
        self.attribution: Attribution | None = None
        self.pattern = Pattern(resource.address) if isinstance(resource, DnsResource) else None

    def replace_filters(self, filters: tuple[Filter, ...]) -> None:
        """Judge by other filters from now on; the rest of the resource stays as it was granted."""
        assert not isinstance(self.resource, InternetResource)
        self.resource = replace(self.resource, filters=filters)
        self.filters = Filters(filters)
