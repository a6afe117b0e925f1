"""What the host's own INPUT chains do with a client's question to the gateway's DNS server (spec tunnel 8).

One packet is followed through each chain, rule by rule. What a rule asks for that this module does not know, such as a
match of an extension, leaves the rule open: it is taken for one about other packets, and where it would have accepted,
nothing is claimed about the chain.
"""

from __future__ import annotations

import errno
import operator
import socket
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFPROTO_INET,
    NFPROTO_IPV4,
    NFPROTO_IPV6,
    NFT_MSG_GETSETELEM,
    nft_set_elem_list_msg,
)

from fzg.host import nft_ruleset as ruleset
from fzg.host.dns_server import PORT as DNS_PORT
from fzg.host.netlink_socket import NetlinkError
from fzg.host.nft_arrival import LOADS, Arrival, Registers, extension_matches, value_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from ipaddress import IPv4Address, IPv6Address

    from fzg.host.netlink_socket import NetlinkSocket

_FAMILIES: Final = {
    NFPROTO_IPV4: (NFPROTO_IPV4,),
    NFPROTO_IPV6: (NFPROTO_IPV6,),
    NFPROTO_INET: (NFPROTO_IPV4, NFPROTO_IPV6),
}
_COMPARE: Final = {
    "NFT_CMP_EQ": operator.eq,
    "NFT_CMP_NEQ": operator.ne,
    "NFT_CMP_LT": operator.lt,
    "NFT_CMP_LTE": operator.le,
    "NFT_CMP_GT": operator.gt,
    "NFT_CMP_GTE": operator.ge,
}
_NEUTRAL: Final = frozenset({"counter", "log", "notrack", "last", "objref", "dynset", "quota"})
_TERMINAL_TARGETS: Final = frozenset({"REJECT", "DROP"})  # of iptables-nft rules; others go on


class Obstacle(NamedTuple):
    """A chain that drops the question, and the command that lets it in."""

    chain: str
    command: str


class _Fate(Enum):
    ACCEPTED = auto()
    DROPPED = auto()
    OPEN = auto()  # left to the calling chain, or to the policy
    UNSURE = auto()  # accepted, unless a match that is not understood says otherwise


def obstacles(
    netlink: NetlinkSocket, interface: str, addresses: tuple[IPv4Address | None, IPv6Address | None] | None
) -> list[Obstacle]:
    """The foreign INPUT chains that drop clients' questions, over UDP or over TCP. Raises OSError."""
    found = []
    for chain, policy in ruleset.base_chains(ruleset.chains(netlink), ruleset.HOOK_INPUT):
        walk = _Walk(netlink)
        rules = walk.rules(chain)
        arrivals = [
            Arrival(interface, family, protocol, _destination(family, addresses))
            for family in _FAMILIES[chain.family]
            for protocol in (socket.IPPROTO_UDP, socket.IPPROTO_TCP)
            if addresses is None or _destination(family, addresses) is not None
        ]
        if any(_is_dropped(walk.fate(chain, arrival), policy) for arrival in arrivals):
            found.append(Obstacle(str(chain), _command(chain, rules, interface)))
    return found


def warning(obstacles: Sequence[Obstacle], interface: str) -> str:
    """One sentence about them all, and what to do."""
    is_one = len(obstacles) == 1
    chains = " and ".join(each.chain for each in obstacles)
    return (
        f"The firewall {'chain' if is_one else 'chains'} {chains} {'drops' if is_one else 'drop'} what clients ask the "
        f"gateway's DNS server (port {DNS_PORT} on {interface}), so they resolve no SRV and TXT records. "
        f"Run as root: {'; '.join(dict.fromkeys(each.command for each in obstacles))}"
    )


def _command(chain: ruleset.Chain, rules: Sequence[Any], interface: str) -> str:
    """In the words of the tool that keeps the chain; a rule that bypasses it would not last."""
    called = [ruleset.verdict(data)[1] for rule in rules for name, data in ruleset.parts(rule) if name == "immediate"]
    if any(name.startswith(("ufw-", "ufw6-")) for name in called):
        return f"ufw allow in on {interface} to any port {DNS_PORT}"
    if chain.table == "firewalld":
        ports = f"--add-port={DNS_PORT}/udp --add-port={DNS_PORT}/tcp"
        return f"firewall-cmd --permanent {ports} && firewall-cmd --reload"
    return f"nft insert rule {chain} iifname {interface} meta l4proto '{{ tcp, udp }}' th dport {DNS_PORT} accept"


def _destination(family: int, addresses: tuple[IPv4Address | None, IPv6Address | None] | None) -> bytes | None:
    if addresses is None:
        return None
    address = addresses[0] if family == NFPROTO_IPV4 else addresses[1]
    return None if address is None else address.packed


def _is_dropped(fate: _Fate, policy: int) -> bool:
    return fate is _Fate.DROPPED or (fate is _Fate.OPEN and policy == ruleset.NF_DROP)


class _Walk:
    """Follows packets through chains; each chain and set is read once."""

    def __init__(self, netlink: NetlinkSocket) -> None:
        self._netlink = netlink
        self._rules: dict[ruleset.Chain, list[Any]] = {}
        self._sets: dict[tuple[ruleset.Chain, str], list[_Element] | None] = {}

    def rules(self, chain: ruleset.Chain) -> list[Any]:
        if chain not in self._rules:
            self._rules[chain] = ruleset.rules(self._netlink, chain)
        return self._rules[chain]

    def fate(self, chain: ruleset.Chain, arrival: Arrival, depth: int = 0) -> _Fate:
        unsure = False
        for rule in self.rules(chain):
            is_sure, code, target = self._apply(chain, rule, arrival)
            fate = _Fate.OPEN
            match code:
                case "NF_ACCEPT":
                    fate = _Fate.ACCEPTED
                case "NF_DROP":
                    fate = _Fate.DROPPED
                case "NFT_RETURN":
                    if is_sure:
                        break
                case "NFT_JUMP" | "NFT_GOTO" if depth < ruleset.JUMP_DEPTH:
                    fate = self.fate(chain._replace(name=target), arrival, depth + 1)
                    if code == "NFT_GOTO" and fate is _Fate.OPEN and is_sure:
                        break
            if fate is _Fate.UNSURE or (fate is _Fate.ACCEPTED and not is_sure):
                unsure = True
            elif fate is not _Fate.OPEN and is_sure:
                return _Fate.UNSURE if unsure and fate is _Fate.DROPPED else fate
        return _Fate.UNSURE if unsure else _Fate.OPEN

    def _apply(self, chain: ruleset.Chain, rule: Any, arrival: Arrival) -> tuple[bool, str, str]:
        """Whether all matches are understood, and the verdict; no verdict when the rule is about other packets."""
        registers: Registers = {}
        is_sure = True
        code = target = ""
        for name, data in ruleset.parts(rule):
            if name in _NEUTRAL:
                continue
            if name == "immediate":
                code, target = ruleset.verdict(data)
            elif name == "reject":
                code = "NF_DROP"
            elif data is None:
                is_sure = False
            elif name == "target":
                code = "NF_DROP" if data.get_attr("NFTA_TARGET_NAME") in _TERMINAL_TARGETS else code
            elif name == "lookup" and data.get_attr("NFTA_LOOKUP_DREG") is not None:
                element, known = self._find(chain, data, registers)
                if not known:
                    is_sure = False
                elif element is None:
                    return True, "", ""
                else:
                    code, target = element.verdict
            else:
                holds = self._holds(chain, name, data, registers, arrival)
                if holds is False:
                    return True, "", ""
                is_sure = is_sure and holds is True
        return is_sure, code, target

    def _holds(self, chain: ruleset.Chain, name: str, data: Any, registers: Registers, arrival: Arrival) -> bool | None:
        """Whether a match lets the rule go on; None when that is not understood. Loads always do."""
        if name in LOADS:
            register = data.get_attr(f"NFTA_{name.upper()}_DREG")
            if register is None:
                return True  # it sets something of the packet, as a mark
            registers[register] = LOADS[name](data, registers, arrival)
            return True
        if name == "limit":
            return not data.get_attr("NFTA_LIMIT_FLAGS")  # with a flag it means "over"
        if name == "lookup":
            element, known = self._find(chain, data, registers)
            is_inverted = bool(data.get_attr("NFTA_LOOKUP_FLAGS"))
            return (element is not None) != is_inverted if known else None
        if name == "match":
            return extension_matches(data, arrival)
        value = registers.get(data.get_attr(f"NFTA_{name.upper()}_SREG")) if name in ("cmp", "range") else None
        if value is None:
            return None
        if name == "cmp":
            wanted = ruleset.octets(ruleset.compared(data))
            return bool(_COMPARE[data.get_attr("NFTA_CMP_OP")](value[: len(wanted)], wanted))
        first, last = (value_of(data, f"NFTA_RANGE_{end}_DATA") for end in ("FROM", "TO"))
        return (first <= value[: len(first)] <= last) is bool(data.get_attr("NFTA_RANGE_OP") == "NFT_RANGE_EQ")

    def _find(self, chain: ruleset.Chain, lookup: Any, registers: Registers) -> tuple[_Element | None, bool]:
        """The element of a set or map that the register is in, and whether that is known."""
        value = registers.get(lookup.get_attr("NFTA_LOOKUP_SREG"))
        elements = self._elements(chain, lookup.get_attr("NFTA_LOOKUP_SET"))
        if value is None or elements is None:
            return None, False
        if any(len(each.key) != len(value) for each in elements):
            return None, False  # of several parts
        if not any(each.is_end for each in elements):
            return next((each for each in elements if each.key == value), None), True
        below = max((each for each in elements if each.key <= value), key=lambda each: each.key, default=None)
        return (None if below is None or below.is_end else below), True

    def _elements(self, chain: ruleset.Chain, name: str) -> list[_Element] | None:
        key = (chain._replace(name=""), name)
        if key not in self._sets:
            query = ruleset.message(
                nft_set_elem_list_msg(),
                chain.family,
                ("NFTA_SET_ELEM_LIST_TABLE", chain.table),
                ("NFTA_SET_ELEM_LIST_SET", name),
            )
            try:
                answer = self._netlink.dump(query, NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETSETELEM)
            except NetlinkError as error:
                if error.errno == errno.EPERM:
                    raise
                self._sets[key] = None
            else:
                self._sets[key] = [element for part in answer for element in _elements_of(part)]
        return self._sets[key]


class _Element(NamedTuple):
    """One of a set; with `is_end` it is the first value after an interval."""

    key: bytes
    is_end: bool
    verdict: tuple[str, str]


def _elements_of(message: Any) -> Iterator[_Element]:
    for each in message.get_attr("NFTA_SET_ELEM_LIST_ELEMENTS") or ():
        key, data = each.get_attr("NFTA_SET_ELEM_KEY"), each.get_attr("NFTA_SET_ELEM_DATA")
        if key is None:
            continue
        said = data.get_attr("NFTA_DATA_VERDICT") if data is not None else None
        yield _Element(
            ruleset.octets(key.get_attr("NFTA_DATA_VALUE") or b""),
            bool(each.get_attr("NFTA_SET_ELEM_FLAGS")),
            ("", "")
            if said is None
            else (said.get_attr("NFTA_VERDICT_CODE") or "", said.get_attr("NFTA_VERDICT_CHAIN") or ""),
        )
