"""Masquerading in a table of our own, and accept rules where a foreign FORWARD chain would drop (spec operations 2.2).

An accept in our own table cannot overrule a drop in another, so a chain that forwards nothing (Docker, ufw, firewalld,
the blanket reject of some distributions) gets two rules at its head, tagged with a comment by which the next start
finds what a killed process left. Everything that belongs together is one transaction.
"""

from __future__ import annotations

import errno
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pyroute2.netlink import NETLINK_NETFILTER
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES, nfgen_msg
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFPROTO_IPV4,
    NFPROTO_IPV6,
    NFT_MSG_DELRULE,
    NFT_MSG_DELTABLE,
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWRULE,
    NFT_MSG_NEWTABLE,
    Cmp,
    Meta,
    nft_chain_msg,
    nft_rule_msg,
    nft_table_msg,
)

from fzg.host import nft_ruleset as ruleset
from fzg.host.errors import HostError, Report
from fzg.host.input_chains import Obstacle, obstacles
from fzg.host.masquerade import Masquerade
from fzg.host.netlink_socket import NLM_F_ACK, NLM_F_CREATE, NetlinkError, NetlinkSocket
from fzg.host.nft_ruleset import TABLE_NAME
from fzg.tunnel.ranges import PEER_V4, PEER_V6

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

RULE_COMMENT: Final = "firezone-gateway"

_CHAIN_NAME: Final = "postrouting"
_PRIORITY_SRCNAT: Final = 100
_HOOK_POSTROUTING: Final = 4
_BATCH_BEGIN: Final = 0x10
_BATCH_END: Final = 0x11
_REGISTER_VERDICT: Final = 0
_REGISTER_1: Final = 1
_NETWORK_HEADER: Final = 1
_NF_ACCEPT: Final = 1
_DIRECTIONS: Final = (Meta.NFT_META_OIFNAME, Meta.NFT_META_IIFNAME)  # inserted in this order, so "in" comes first
_MATCH: Final = {Meta.NFT_META_OIFNAME: "oifname", Meta.NFT_META_IIFNAME: "iifname"}
_IFNAMSIZ: Final = 16

# Expressions without a say in where the packet goes; a rule made of these and a verdict holds for every packet.
_NEUTRAL: Final = frozenset({"counter", "log", "notrack", "last"})
_TERMINAL_TARGETS: Final = frozenset({"REJECT", "DROP"})  # targets of iptables-nft rules


class _Source(NamedTuple):
    """Where the source address stands in the network header, and the range that is masqueraded."""

    offset: int
    network: IPv4Network | IPv6Network


_SOURCES: Final = {NFPROTO_IPV4: _Source(12, PEER_V4), NFPROTO_IPV6: _Source(8, PEER_V6)}


class _Fate(Enum):
    ACCEPTED = 1
    DROPPED = 2
    OPEN = 3  # left to the calling chain, or to the policy


_FINAL: Final = {"NF_DROP": _Fate.DROPPED, "NF_ACCEPT": _Fate.ACCEPTED, "NFT_RETURN": _Fate.OPEN}


class Blocked(NamedTuple):
    """A foreign chain that drops what clients need, and the matches of the accepts that are missing at its head."""

    chain: str
    missing: tuple[str, ...]


class Survey(NamedTuple):
    """What the firewall does now: families that we masquerade, chains in the way of forwarding and of our DNS."""

    masqueraded: tuple[str, ...]
    forward: tuple[Blocked, ...]
    input: tuple[Obstacle, ...]


class Firewall:
    """Our nftables objects for one TUN device. Every method may be repeated; all are synchronous."""

    def __init__(self, interface: str) -> None:
        self._interface = interface
        self._masqueraded: set[int] = set()

    def apply(self, mode: Masquerade) -> Report:
        """Make the rule set what `mode` asks for, replacing what an earlier process left."""
        report = Report()
        try:
            netlink = NetlinkSocket(NETLINK_NETFILTER)
        except OSError as error:
            self._refuse(report, mode, "IPv4 and IPv6", f"The kernel has no nftables ({error.strerror})")
            return report
        with netlink:
            for family in (NFPROTO_IPV4, NFPROTO_IPV6):
                self._masquerade(netlink, family, mode, report)
            self._accept_forwarding(netlink, report)
        return report

    def is_intact(self) -> bool:
        """False when somebody flushed what `apply` made, or a foreign chain has begun to drop since."""
        try:
            with NetlinkSocket(NETLINK_NETFILTER) as netlink:
                chains = list(ruleset.chains(netlink))
                if not self._masqueraded <= {chain.family for chain, _ in chains if chain.table == TABLE_NAME}:
                    return False
                return not any(
                    self._missing(netlink, chain, policy)
                    for chain, policy in ruleset.base_chains(chains, ruleset.HOOK_FORWARD)
                )
        except OSError:
            return True  # unreadable: applying again would not improve it

    def survey(self) -> Survey:
        """What stands now, without a change. Raises OSError where it may not be read."""
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            chains = list(ruleset.chains(netlink))
            masqueraded = {ruleset.FAMILY_NAME[chain.family] for chain, _ in chains if chain.table == TABLE_NAME}
            forward = [
                Blocked(str(chain), tuple(_MATCH[key] for key in missing))
                for chain, policy in ruleset.base_chains(chains, ruleset.HOOK_FORWARD)
                if (missing := self._missing(netlink, chain, policy))
            ]
            entering = tuple(obstacles(netlink, self._interface, None))
        return Survey(tuple(sorted(masqueraded)), tuple(forward), entering)

    def obstacles(self, addresses: tuple[IPv4Address | None, IPv6Address | None] | None) -> list[Obstacle]:
        """The host's INPUT chains that drop what clients ask our DNS server; none where they may not be read."""
        try:
            with NetlinkSocket(NETLINK_NETFILTER) as netlink:
                return obstacles(netlink, self._interface, addresses)
        except OSError:
            return []

    def remove(self) -> Report:
        """Delete our table and our rules in foreign chains; silent when there are none."""
        report = Report()
        try:
            with NetlinkSocket(NETLINK_NETFILTER) as netlink:
                for family in (NFPROTO_IPV4, NFPROTO_IPV6):
                    _delete_table(netlink, family)
                for chain, _ in ruleset.base_chains(ruleset.chains(netlink), ruleset.HOOK_FORWARD):
                    for rule in _tagged(ruleset.rules(netlink, chain)):
                        _transact(netlink, [_delete_rule(chain, rule)])
        except OSError as error:
            report.warnings.append(
                f"Our nftables rules may be left behind ({error.strerror}). Run as root: "
                f"nft delete table ip {TABLE_NAME}; nft delete table ip6 {TABLE_NAME}"
            )
        return report

    def _masquerade(self, netlink: NetlinkSocket, family: int, mode: Masquerade, report: Report) -> None:
        try:
            if mode is Masquerade.OFF:
                _delete_table(netlink, family)
                self._masqueraded.discard(family)
            else:
                _transact(netlink, self._table(family))
                self._masqueraded.add(family)
        except NetlinkError as error:
            if family == NFPROTO_IPV6 and error.errno in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.ENOENT):
                report.notes.append("The kernel has no nftables for IPv6: clients' IPv6 packets are not masqueraded.")
            else:
                name = "IPv4" if family == NFPROTO_IPV4 else "IPv6"
                self._refuse(report, mode, name, f"The masquerading of {name} could not be set up ({error.strerror})")

    def _table(self, family: int) -> Iterator[_Step]:
        """The replacement of our table: creating it first lets the deletion succeed where there was none."""
        yield _new_table(family)
        yield _Step(ruleset.message(nft_table_msg(), family, ("NFTA_TABLE_NAME", TABLE_NAME)), NFT_MSG_DELTABLE, 0)
        yield _new_table(family)
        chain = ruleset.message(
            nft_chain_msg(),
            family,
            ("NFTA_CHAIN_TABLE", TABLE_NAME),
            ("NFTA_CHAIN_NAME", _CHAIN_NAME),
            (
                "NFTA_CHAIN_HOOK",
                {"attrs": [("NFTA_HOOK_HOOKNUM", _HOOK_POSTROUTING), ("NFTA_HOOK_PRIORITY", _PRIORITY_SRCNAT)]},
            ),
            ("NFTA_CHAIN_TYPE", "nat"),
        )
        yield _Step(chain, NFT_MSG_NEWCHAIN, NLM_F_CREATE)
        source = _SOURCES[family]
        expressions = [
            *_source_in(source),
            *_interface_is(Meta.NFT_META_OIFNAME, self._interface, Cmp.NFT_CMP_NEQ),
            _expression("masq"),
        ]
        rule = ruleset.message(
            nft_rule_msg(),
            family,
            ("NFTA_RULE_TABLE", TABLE_NAME),
            ("NFTA_RULE_CHAIN", _CHAIN_NAME),
            ("NFTA_RULE_EXPRESSIONS", expressions),
        )
        yield _Step(rule, NFT_MSG_NEWRULE, NLM_F_CREATE)

    def _accept_forwarding(self, netlink: NetlinkSocket, report: Report) -> None:
        try:
            chains = list(ruleset.base_chains(ruleset.chains(netlink), ruleset.HOOK_FORWARD))
        except NetlinkError as error:
            report.warnings.append(
                f"The firewall cannot be inspected ({error.strerror}), so it may drop packets of clients. "
                "Run the gateway as root or with CAP_NET_ADMIN."
            )
            return
        for chain, policy in chains:
            try:
                tagged = _tagged(ruleset.rules(netlink, chain))
                wanted = self._missing(netlink, chain, policy, ignoring=tagged)
                present = [key for rule in tagged for key in _DIRECTIONS if self._accepts(rule, key)]
                if sorted(present) == sorted(wanted) and len(tagged) == len(wanted):
                    continue
                steps = [_delete_rule(chain, rule) for rule in tagged]
                _transact(netlink, steps + [self._accept(chain, key) for key in wanted])
                if wanted:
                    report.notes.append(
                        f"The firewall chain {chain} drops forwarded packets: "
                        f"those of {self._interface} are now accepted there."
                    )
            except NetlinkError as error:
                report.warnings.append(
                    f"The firewall chain {chain} drops forwarded packets and could not be changed ({error.strerror}), "
                    "so clients reach nothing behind this host. Run as root: "
                    f"nft insert rule {chain} iifname {self._interface} accept; "
                    f"nft insert rule {chain} oifname {self._interface} accept"
                )

    def _missing(
        self, netlink: NetlinkSocket, chain: ruleset.Chain, policy: int, *, ignoring: Sequence[Any] = ()
    ) -> list[int]:
        """The directions (meta keys) in which `chain` drops and no rule accepts, `ignoring` these."""
        ignored = {rule.get_attr("NFTA_RULE_HANDLE") for rule in ignoring}
        rules = [rule for rule in ruleset.rules(netlink, chain) if rule.get_attr("NFTA_RULE_HANDLE") not in ignored]
        fate = _fate(netlink, chain, rules)
        if fate is _Fate.ACCEPTED or (fate is _Fate.OPEN and policy != ruleset.NF_DROP):
            return []
        return [key for key in _DIRECTIONS if not any(self._accepts(rule, key) for rule in rules)]

    def _accepts(self, rule: Any, key: int) -> bool:
        """True for `iifname INTERFACE accept` (or oifname), whoever wrote it."""
        parts = [(name, data) for name, data in ruleset.parts(rule) if name not in _NEUTRAL]
        if [name for name, _ in parts] != ["meta", "cmp", "immediate"]:
            return False
        (_, meta), (_, compare), (_, verdict) = parts
        value = ruleset.compared(compare)
        return (
            meta.get_attr("NFTA_META_KEY") == Meta(key).name
            and compare.get_attr("NFTA_CMP_OP") == Cmp.NFT_CMP_EQ.name
            and ruleset.octets(value).rstrip(b"\0") == self._interface.encode()
            and ruleset.verdict(verdict)[0] == "NF_ACCEPT"
        )

    def _accept(self, chain: ruleset.Chain, key: int) -> _Step:
        expressions = [*_interface_is(key, self._interface, Cmp.NFT_CMP_EQ), _accept_verdict()]
        rule = ruleset.message(
            nft_rule_msg(),
            chain.family,
            ("NFTA_RULE_TABLE", chain.table),
            ("NFTA_RULE_CHAIN", chain.name),
            ("NFTA_RULE_EXPRESSIONS", expressions),
            ("NFTA_RULE_USERDATA", RULE_COMMENT),
        )
        return _Step(rule, NFT_MSG_NEWRULE, NLM_F_CREATE)  # without NLM_F_APPEND: at the head

    def _refuse(self, report: Report, mode: Masquerade, families: str, what: str) -> None:
        remedy = "; ".join(
            f"{tool} -t nat -A POSTROUTING -s {source.network} ! -o {self._interface} -j MASQUERADE"
            for tool, name, source in (
                ("iptables", "IPv4", _SOURCES[NFPROTO_IPV4]),
                ("ip6tables", "IPv6", _SOURCES[NFPROTO_IPV6]),
            )
            if name in families
        )
        if mode is Masquerade.ON:
            raise HostError(f"{what}. Run as root: {remedy}; then start the gateway with --masquerade auto.")
        if mode is Masquerade.AUTO:
            report.warnings.append(
                f"{what}: resources answer clients only if their networks route {families} answers to this host. "
                f"Run as root: {remedy}"
            )


def legacy_tables_note(interface: str, names: Path = Path("/proc/net/ip_tables_names")) -> str:
    """A sentence when rules of the older iptables are in force, which nftables cannot show; else empty."""
    try:
        if "filter" not in names.read_text(encoding="utf-8").split():
            return ""
    except OSError:  # absent, or only root may know
        return ""
    return (
        "This host has rules of the legacy iptables, which cannot be inspected. If clients reach nothing behind it, "
        f"run as root: iptables-legacy -I FORWARD -i {interface} -j ACCEPT; "
        f"iptables-legacy -I FORWARD -o {interface} -j ACCEPT"
    )


class _Step(NamedTuple):
    message: Any
    kind: int
    flags: int


def _transact(netlink: NetlinkSocket, steps: Iterable[_Step]) -> None:
    """All steps or none."""
    begin, end = nfgen_msg(), nfgen_msg()
    begin["res_id"] = end["res_id"] = NFNL_SUBSYS_NFTABLES
    netlink.batch(
        [
            (begin, _BATCH_BEGIN, 0),
            *((step.message, NFNL_SUBSYS_NFTABLES << 8 | step.kind, step.flags | NLM_F_ACK) for step in steps),
            (end, _BATCH_END, 0),
        ]
    )


def _new_table(family: int) -> _Step:
    return _Step(
        ruleset.message(nft_table_msg(), family, ("NFTA_TABLE_NAME", TABLE_NAME)), NFT_MSG_NEWTABLE, NLM_F_CREATE
    )


def _delete_table(netlink: NetlinkSocket, family: int) -> None:
    try:
        message = ruleset.message(nft_table_msg(), family, ("NFTA_TABLE_NAME", TABLE_NAME))
        _transact(netlink, [_Step(message, NFT_MSG_DELTABLE, 0)])
    except NetlinkError as error:
        if error.errno not in (errno.ENOENT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
            raise


def _delete_rule(chain: ruleset.Chain, rule: Any) -> _Step:
    message = ruleset.message(
        nft_rule_msg(),
        chain.family,
        ("NFTA_RULE_TABLE", chain.table),
        ("NFTA_RULE_CHAIN", chain.name),
        ("NFTA_RULE_HANDLE", rule.get_attr("NFTA_RULE_HANDLE")),
    )
    return _Step(message, NFT_MSG_DELRULE, 0)


def _tagged(rules: Iterable[Any]) -> list[Any]:
    return [rule for rule in rules if _comment(rule) == RULE_COMMENT]


def _comment(rule: Any) -> str:
    comment = rule.get_attr("NFTA_RULE_USERDATA")
    return comment if isinstance(comment, str) else ""


def _fate(netlink: NetlinkSocket, chain: ruleset.Chain, rules: Iterable[Any], depth: int = 0) -> _Fate:
    """What becomes of a packet that no conditional rule names: those decide about others and stay as they are."""
    for rule in rules:
        parts = [(name, data) for name, data in ruleset.parts(rule) if name not in _NEUTRAL]
        if len(parts) != 1:
            continue
        name, data = parts[0]
        if name == "reject" or (name == "target" and data.get_attr("NFTA_TARGET_NAME") in _TERMINAL_TARGETS):
            return _Fate.DROPPED
        code, target = ruleset.verdict(data) if name == "immediate" else ("", "")
        if code in _FINAL:
            return _FINAL[code]
        if code in ("NFT_JUMP", "NFT_GOTO") and depth < ruleset.JUMP_DEPTH:
            called = chain._replace(name=target)
            fate = _fate(netlink, called, ruleset.rules(netlink, called), depth + 1)
            if fate is not _Fate.OPEN or code == "NFT_GOTO":
                return fate
    return _Fate.OPEN


def _expression(name: str, *attributes: tuple[str, Any]) -> dict[str, Any]:
    return {"attrs": [("NFTA_EXPR_NAME", name), ("NFTA_EXPR_DATA", {"attrs": list(attributes)})]}


def _source_in(source: _Source) -> Iterator[dict[str, Any]]:
    """`ip saddr NETWORK`: load the address, mask it, compare."""
    network = source.network
    octets = network.max_prefixlen // 8
    yield _expression(
        "payload",
        ("NFTA_PAYLOAD_DREG", _REGISTER_1),
        ("NFTA_PAYLOAD_BASE", _NETWORK_HEADER),
        ("NFTA_PAYLOAD_OFFSET", source.offset),
        ("NFTA_PAYLOAD_LEN", octets),
    )
    yield _expression(
        "bitwise",
        ("NFTA_BITWISE_SREG", _REGISTER_1),
        ("NFTA_BITWISE_DREG", _REGISTER_1),
        ("NFTA_BITWISE_LEN", octets),
        ("NFTA_BITWISE_MASK", _value(network.netmask.packed)),
        ("NFTA_BITWISE_XOR", _value(bytes(octets))),
    )
    yield _expression(
        "cmp",
        ("NFTA_CMP_SREG", _REGISTER_1),
        ("NFTA_CMP_OP", Cmp.NFT_CMP_EQ),
        ("NFTA_CMP_DATA", _value(network.network_address.packed)),
    )


def _interface_is(key: int, interface: str, comparison: int) -> Iterator[dict[str, Any]]:
    """`iifname INTERFACE` or `oifname != INTERFACE`: names, since the device comes and goes with the process."""
    yield _expression("meta", ("NFTA_META_KEY", key), ("NFTA_META_DREG", _REGISTER_1))
    yield _expression(
        "cmp",
        ("NFTA_CMP_SREG", _REGISTER_1),
        ("NFTA_CMP_OP", comparison),
        ("NFTA_CMP_DATA", _value(interface.encode().ljust(_IFNAMSIZ, b"\0"))),
    )


def _accept_verdict() -> dict[str, Any]:
    verdict = {"attrs": [("NFTA_DATA_VERDICT", {"attrs": [("NFTA_VERDICT_CODE", _NF_ACCEPT)]})]}
    return _expression("immediate", ("NFTA_IMMEDIATE_DREG", _REGISTER_VERDICT), ("NFTA_IMMEDIATE_DATA", verdict))


def _value(octets: bytes) -> dict[str, Any]:
    return {"attrs": [("NFTA_DATA_VALUE", octets)]}
