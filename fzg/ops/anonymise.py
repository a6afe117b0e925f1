"""Pseudonyms for what identifies people and networks, the same for the same within one support archive."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TYPE_CHECKING, Final

from fzg.secret import MASK

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# In an order in which no pattern finds a part of what a later one would have found whole.
_TOKEN: Final = re.compile(r"(?i)\bbearer\s+\S+|\.?SFMyNTY\.[\w.-]+|\beyJ[\w-]+\.[\w-]+\.[\w-]*")
_USERINFO: Final = re.compile(r"(?<=://)[^/\s@]+@")
_MAIL: Final = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_UUID: Final = re.compile(r"(?i)(?<![\w-])[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?![\w-])")
_DIGEST: Final = re.compile(r"(?i)(?<!\w)(?:[0-9a-f]{64}|[0-9a-f]{40}|[0-9a-f]{32})(?!\w)")
_KEY: Final = re.compile(r"(?<![\w+/])[A-Za-z0-9+/]{43}=")
_MAC: Final = re.compile(r"(?i)(?<![\w:])[0-9a-f]{2}(?::[0-9a-f]{2}){5}(?![\w:])")
_IPV6: Final = re.compile(
    r"(?i)(?<![\w:.])(?=[0-9a-f:.]*:[0-9a-f:.]*:)[0-9a-f:]+(?:\.\d{1,3}){0,3}(?![\w:])(?:/\d{1,3}(?!\d))?"
)
_IPV4: Final = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)(?:/\d{1,2}(?!\d))?")
_HOME: Final = re.compile(r"(?<=/home/)[^/\s\"':]+")
_NAME: Final = re.compile(r"(?<![\w@/.-])(?:(?:\*{1,2}|\w(?:[\w-]{0,62}))\.)+[A-Za-z]{2,}(?![\w-]|\.\w)")

# Whoever reads the archive needs these, and nobody is identified by them.
_KEPT_NETWORKS: Final = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/32",
        "255.255.255.255/32",
        "127.0.0.0/8",
        "224.0.0.0/4",
        "::/128",
        "::1/128",
        "ff00::/8",
    )
)
_KEPT: Final = frozenset(
    {
        "100.64.0.0/11",
        "100.96.0.0/11",
        "100.64.0.0/10",
        "fd00:2021:1111::/107",
        "fd00:2021:1111:8000::/107",
        "0.0.0.0/0",
        "::/0",
        "fe80::/64",
        "fe80::/10",
        "169.254.0.0/16",
    }
)
_CLASSES: Final = (
    ("tunnel", ("100.64.0.0/11", "fd00:2021:1111::/107")),
    ("proxy", ("100.96.0.0/11", "fd00:2021:1111:8000::/107")),
    ("link-local", ("169.254.0.0/16", "fe80::/10")),
    ("private", ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")),
)
_CLASS_NETWORKS: Final = tuple((name, tuple(ip_network(each) for each in texts)) for name, texts in _CLASSES)
# Ends of words with a dot that are no names of hosts: files, and units of service managers.
_FILE_ENDINGS: Final = frozenset(
    {"py", "pyx", "so", "conf", "json", "log", "md", "service", "sh", "sock", "socket", "txt"}
)
_PARAMETERS: Final = ("net.ipv", "net.core.", "net.netfilter.", "net.bridge.", "kernel.")
_KEPT_NAMES: Final = ("firezone.dev",)
_SHORTEST_NAME: Final = 3  # characters; shorter ones would be found everywhere


class Anonymiser:
    """Replaces addresses, names, ids and keys in text. `names`: texts of which it is known what they are, by kind."""

    def __init__(self, names: Mapping[str, Iterable[str]]) -> None:
        self._pseudonyms: dict[tuple[str, str], str] = {}
        self._counts: dict[str, int] = {}
        known = {text: kind for kind, texts in names.items() for text in texts if len(text) >= _SHORTEST_NAME}
        self._known = known
        longest_first = sorted(known, key=len, reverse=True)
        self._known_pattern = (
            re.compile("|".join(rf"(?<![\w-]){re.escape(text)}(?![\w-])" for text in longest_first)) if known else None
        )

    def text(self, text: str) -> str:
        """The text with pseudonyms."""
        text = without_credentials(text)
        if self._known_pattern is not None:
            text = self._known_pattern.sub(lambda match: self._pseudonym(self._known[match[0]], match[0]), text)
        for kind, pattern in (("mail", _MAIL), ("id", _UUID), ("id", _DIGEST), ("key", _KEY), ("mac", _MAC)):
            text = pattern.sub(lambda match, kind=kind: self._pseudonym(kind, match[0].lower()), text)  # type: ignore[misc]
        text = _HOME.sub(lambda match: self._pseudonym("user", match[0]), text)
        for pattern in (_IPV6, _IPV4):
            text = pattern.sub(lambda match: self._address(match[0]), text)
        return _NAME.sub(lambda match: self._name(match[0]), text)

    def _address(self, text: str) -> str:
        host, slash, prefix = text.partition("/")
        try:
            address = ip_address(host)
        except ValueError:
            return text
        if text in _KEPT or any(address in network for network in _KEPT_NETWORKS if network.version == address.version):
            return text
        kind = f"ipv{address.version}-{_class_of(address)}"
        return self._pseudonym(kind, str(address)) + slash + prefix

    def _name(self, name: str) -> str:
        lowered = name.lower().removeprefix("**.").removeprefix("*.")
        ending = lowered.rpartition(".")[2]
        if ending in _FILE_ENDINGS or lowered.startswith(_PARAMETERS):
            return name
        if any(lowered == kept or lowered.endswith("." + kept) for kept in _KEPT_NAMES):
            return name
        return self._pseudonym("name", lowered)

    def _pseudonym(self, kind: str, original: str) -> str:
        known = self._pseudonyms.get((kind, original))
        if known is None:
            self._counts[kind] = self._counts.get(kind, 0) + 1
            known = self._pseudonyms[kind, original] = f"{kind}-{self._counts[kind]}"
        return known


def without_credentials(text: str) -> str:
    """What looks like a token or a password in a URL never leaves, anonymous or not."""
    return _USERINFO.sub(f"{MASK}@", _TOKEN.sub(MASK, text))


def _class_of(address: IPv4Address | IPv6Address) -> str:
    for name, networks in _CLASS_NETWORKS:
        if any(address in network for network in networks if network.version == address.version):
            return name
    return "public"
