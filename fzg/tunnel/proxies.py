"""The proxy IPs of one client and the real IPs behind them (spec tunnel 7.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

# Spec tunnel 7.3 [HARDEN]: genuine clients assign 4 or 8 per event, and a few for each name they use.
MAX_PER_EVENT = 16
MAX_PROXIES = 10_000
# Ours: pairs of proxy IP and resource. Each is a route; a client must not multiply its names by its resources.
MAX_PAIRS = 1 << 16


class Proxy:
    """What one proxy IP stands for. `resolved` is None if the name has no address of this family."""

    __slots__ = ("domain", "resolved")

    def __init__(self, domain: str) -> None:
        self.domain = domain
        self.resolved: bytes | None = None


class ProxyTable:
    """Proxy IPs by address and by the resources that they serve."""

    __slots__ = ("_by_resource", "_pairs", "_proxies")

    def __init__(self) -> None:
        self._proxies: dict[bytes, Proxy] = {}
        self._by_resource: dict[str, set[bytes]] = {}
        self._pairs = 0

    @property
    def is_empty(self) -> bool:
        """Whether no IP was assigned, so that no session can begin."""
        return not self._proxies

    def get(self, ip: bytes) -> Proxy | None:
        """The entry of a proxy IP."""
        return self._proxies.get(ip)

    def of_name(self, domain: str) -> list[bytes]:
        """The proxy IPs that stand for a name."""
        wanted = normalize(domain)
        return [ip for ip, proxy in self._proxies.items() if proxy.domain == wanted]

    @property
    def names(self) -> set[str]:
        """Every name that some proxy IP stands for."""
        return {proxy.domain for proxy in self._proxies.values()}

    def of_resource(self, resource_id: str) -> Collection[bytes]:
        """The proxy IPs that list a resource, held or not."""
        return self._by_resource.get(resource_id, ())

    def belongs_elsewhere(self, domain: str, proxy_ips: Iterable[bytes]) -> bool:
        """Whether one of the IPs stands for another name: the client began to number anew."""
        wanted = normalize(domain)
        known = (self._proxies.get(ip) for ip in proxy_ips)
        return any(proxy is not None and proxy.domain != wanted for proxy in known)

    def has_room(self, proxy_ips: Collection[bytes]) -> bool:
        """Whether `assign` would stay below the limits."""
        new = sum(ip not in self._proxies for ip in proxy_ips)
        return len(self._proxies) + new <= MAX_PROXIES and self._pairs + len(proxy_ips) <= MAX_PAIRS

    def assign(
        self, domain: str, resource_id: str, proxy_ips: Collection[bytes], addresses: Collection[bytes]
    ) -> tuple[list[bytes], bool]:
        """Map proxy IPs to resolved addresses of their family in turn.

        Gives the proxy IPs that are new for the resource, and whether one lost its address.
        """
        lost = False
        listed = self._by_resource.setdefault(resource_id, set())
        added: list[bytes] = []
        for size in (4, 16):
            resolved = sorted({address for address in addresses if len(address) == size})
            for position, ip in enumerate(sorted(ip for ip in set(proxy_ips) if len(ip) == size)):
                proxy = self._proxies.get(ip)
                if proxy is None:
                    proxy = self._proxies[ip] = Proxy(normalize(domain))
                if ip not in listed:
                    listed.add(ip)
                    self._pairs += 1
                    added.append(ip)
                lost |= proxy.resolved is not None and not resolved
                proxy.resolved = resolved[position % len(resolved)] if resolved else None
        return added, lost

    def clear(self) -> None:
        """Forget everything."""
        self._proxies.clear()
        self._by_resource.clear()
        self._pairs = 0


def normalize(domain: str) -> str:
    """The form in which names compare."""
    return domain.removesuffix(".").lower()
