"""What the gateway knows of one client: its addresses, authorizations, proxy IPs and NAT sessions (spec tunnel 5.1)."""

from __future__ import annotations

import logging
from copy import copy
from enum import Enum, auto
from math import inf
from typing import TYPE_CHECKING

from fzg.tunnel.nat import Entry, NatTable
from fzg.tunnel.proxies import ProxyTable
from fzg.tunnel.ranges import is_excluded_from_internet, is_proxy
from fzg.tunnel.resources import Authorization, CidrResource, DnsResource, InternetResource, Resource
from fzg.tunnel.routes import Routes
from fzg.tunnel.untranslated import Untranslated

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from fzg.tunnel.ingest_token import Attribution

_LOG = logging.getLogger(__name__)

# Ours: the portal may name that many resources for one client; a sane account has fewer in all.
MAX_AUTHORIZATIONS = 1 << 14
FLOW_VALIDITY = 1.0  # s until a flow is decided anew; carries last-use times back to NAT entries
# Spec tunnel 3.1 [HARDEN]: a lower cap could hide "prohibited", without one a client turns us into a reflector.
ICMP_REPLIES_PER_SECOND = 1000


class Refusal(Enum):
    """Why no authorization admits a packet."""

    PROHIBITED = auto()
    NETWORK = auto()


class Client:
    """State of one client, kept while its connection comes and goes.

    `exempt`: the gateway's own addresses, to and from which everything passes; `met`: those at the first grant, which
    stay exempt for as long as the client is known (spec tunnel 14).
    """

    __slots__ = (
        "_authorizations",
        "_icmp_replies",
        "_icmp_window",
        "_internet",
        "_next_expiry",
        "_routes",
        "exempt",
        "id",
        "ipv4",
        "ipv6",
        "met",
        "nat",
        "proxies",
        "untranslated",
    )

    def __init__(self, client_id: str, ipv4: bytes, ipv6: bytes, gateway: frozenset[bytes] = frozenset()) -> None:
        self.id = client_id
        self.ipv4 = ipv4
        self.ipv6 = ipv6
        self.met = self.exempt = gateway
        self.nat = NatTable()
        self.proxies = ProxyTable()
        self.untranslated = Untranslated(FLOW_VALIDITY)
        self._authorizations: dict[str, Authorization] = {}
        self._routes = Routes()
        self._internet: list[Authorization] = []  # by ascending id
        self._next_expiry = inf  # no authorization ends earlier
        self._icmp_window = -inf
        self._icmp_replies = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing is granted, so that the client can be forgotten."""
        return not self._authorizations

    @property
    def authorizations(self) -> Collection[Authorization]:
        """All grants, those that have ended and were not swept yet included."""
        return self._authorizations.values()

    def rehearsal(self) -> Client:
        """A client with the same rights now, to be judged in its place: what is asked of it leaves no trace here."""
        twin = copy(self)
        twin.nat = self.nat.rehearsal()
        return twin

    @property
    def resource_count(self) -> int:
        """How many resources are granted."""
        return len(self._authorizations)

    def classify(self, ip: bytes, protocol: int, value: int | None, now: float) -> Authorization | Refusal:
        """Who admits a packet whose remote IP and protocol value these are (spec 5.4)."""
        if self._internet and not is_proxy(ip):
            for authorization in self._internet:
                if authorization.expires > now:
                    return Refusal.NETWORK if is_excluded_from_internet(ip) else authorization
        return self._routes.lookup(ip, protocol, value, now) or Refusal.PROHIBITED

    def authorization(self, resource_id: str, now: float) -> Authorization | None:
        """The grant of a resource, unless it has ended."""
        authorization = self._authorizations.get(resource_id)
        return authorization if authorization is not None and authorization.expires > now else None

    def grant(self, resource: Resource, expires: float | None, now: float) -> bool | None:
        """Add or renew. True: packets that passed may not pass now; None: no room."""
        known = self._authorizations.get(resource.id)
        if known is not None:
            narrower = self.update_filters(resource)
            return self.set_expiry(resource.id, expires, now) or narrower
        if len(self._authorizations) >= MAX_AUTHORIZATIONS:
            _LOG.warning("a client holds %d resources, no more are granted", MAX_AUTHORIZATIONS)
            return None
        authorization = Authorization(resource, expires)
        self._authorizations[resource.id] = authorization
        self._next_expiry = min(self._next_expiry, authorization.expires)
        match resource:
            case CidrResource(network=network):
                self._routes.add(network, authorization)
            case DnsResource(id=resource_id):
                for ip in self.proxies.of_resource(resource_id):
                    self._routes.add(ip, authorization)
            case InternetResource():
                self._internet.append(authorization)
                self._internet.sort(key=lambda each: each.resource.id)
                # The networks that were consulted so far no longer are.
                return True
        return False

    def attribute(self, resource_id: str, attribution: Attribution | None) -> None:
        """Log the flows of a held resource under this attribution, or not at all."""
        authorization = self._authorizations.get(resource_id)
        if authorization is not None:
            authorization.attribution = attribution

    def remove(self, resource_id: str) -> bool:
        """Withdraw a grant; False if there was none."""
        authorization = self._authorizations.pop(resource_id, None)
        if authorization is None:
            return False
        match authorization.resource:
            case CidrResource(network=network):
                self._routes.remove(network, authorization)
            case DnsResource():
                for ip in self.proxies.of_resource(resource_id):
                    self._routes.remove(ip, authorization)
            case InternetResource():
                self._internet.remove(authorization)
        return True

    def retain(self, listed: Mapping[str, float | None], now: float) -> bool:
        """Keep only what is listed, with these expiries. True: packets that passed may not pass now."""
        unlisted = [resource_id for resource_id in self._authorizations if resource_id not in listed]
        for resource_id in unlisted:
            self.remove(resource_id)
            _LOG.info("Access revoked", extra={"cid": self.id, "rid": resource_id})
        narrower = [self.set_expiry(resource_id, expires, now) for resource_id, expires in listed.items()]
        return bool(unlisted) or any(narrower)

    def update_filters(self, resource: Resource) -> bool:
        """Take over the filters of a resource of the same kind, nothing else; False if nothing changed."""
        authorization = self._authorizations.get(resource.id)
        if authorization is None:
            return False
        held = authorization.resource
        if type(held) is not type(resource):
            _LOG.error(
                "resource %s changed from %s to %s, which is ignored",
                held.id,
                type(held).__name__,
                type(resource).__name__,
            )
            return False
        if isinstance(held, InternetResource) or isinstance(resource, InternetResource):
            return False
        if held.filters == resource.filters:
            return False
        authorization.replace_filters(resource.filters)
        if isinstance(held, CidrResource):
            self._routes.touch(held.network)
        else:
            for ip in self.proxies.of_resource(held.id):
                self._routes.touch(ip)
        return True

    def set_expiry(self, resource_id: str, expires: float | None, now: float) -> bool:
        """True: packets that passed may not pass now. Unknown resources are ignored."""
        authorization = self._authorizations.get(resource_id)
        if authorization is None:
            return False
        before = authorization.expires
        authorization.expires = inf if expires is None else expires
        self._next_expiry = min(self._next_expiry, authorization.expires)
        # The internet that comes back after its end, and before a tick saw that, takes the place of networks again.
        is_back = isinstance(authorization.resource, InternetResource) and before <= now
        return authorization.expires < before or is_back

    def shift_expiries(self, delta: float) -> bool:
        """Let all grants end `delta` seconds earlier; False if none ends at all."""
        if self._next_expiry == inf:
            return False
        for authorization in self._authorizations.values():
            authorization.expires -= delta
        self._next_expiry -= delta
        return True

    def expire(self, now: float) -> bool:
        """Withdraw the grants that have ended; False if there were none."""
        if now < self._next_expiry:
            return False
        ended = [key for key, authorization in self._authorizations.items() if authorization.expires <= now]
        for resource_id in ended:
            self.remove(resource_id)
            _LOG.info("Access expired", extra={"cid": self.id, "rid": resource_id})
        self._next_expiry = min((each.expires for each in self._authorizations.values()), default=inf)
        return bool(ended)

    def restarts_numbering(self, domain: str, proxy_ips: Collection[bytes]) -> Sequence[Entry] | None:
        """If an IP stands for another name: forget all proxy IPs and sessions, and give the sessions (spec 7.3, 1)."""
        if not self.proxies.belongs_elsewhere(domain, proxy_ips):
            return None
        for authorization in self._authorizations.values():
            if not isinstance(authorization.resource, DnsResource):
                continue  # it may have the id of a former one that was
            for ip in self.proxies.of_resource(authorization.resource.id):
                self._routes.remove(ip, authorization)
        self.proxies.clear()
        return self.nat.clear()

    def may_name(self, domain: str, resource_id: str, now: float) -> bool:
        """Whether the resource is held, is one of names, and covers this one."""
        authorization = self.authorization(resource_id, now)
        return authorization is not None and authorization.pattern is not None and authorization.pattern.matches(domain)

    def assign(
        self, domain: str, resource_id: str, proxy_ips: Collection[bytes], addresses: Collection[bytes]
    ) -> bool | None:
        """Install a mapping that `may_name`. True: packets that passed may not pass now; None: no room."""
        if not self.proxies.has_room(proxy_ips):
            _LOG.warning("a client assigned too many proxy IPs, no more are taken on")
            return None
        is_first = self.proxies.is_empty  # until now it was not noted which flows a session may claim
        added, lost = self.proxies.assign(domain, resource_id, proxy_ips, addresses)
        authorization = self._authorizations[resource_id]
        for ip in added:
            self._routes.add(ip, authorization)
        return lost or is_first

    def may_reply(self, now: float) -> bool:
        """Whether another ICMP error may be sent; counts it."""
        if now - self._icmp_window >= 1.0:
            self._icmp_window = now
            self._icmp_replies = 0
        self._icmp_replies += 1
        return self._icmp_replies <= ICMP_REPLIES_PER_SECOND
