"""Reading the rule set of the host's nftables, which is that of iptables-nft, ufw and firewalld too."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFPROTO_INET,
    NFPROTO_IPV4,
    NFPROTO_IPV6,
    NFT_MSG_GETCHAIN,
    NFT_MSG_GETRULE,
    nft_chain_msg,
    nft_rule_msg,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fzg.host.netlink_socket import NetlinkSocket

TABLE_NAME: Final = "firezone-gateway"
FAMILY_NAME: Final = {NFPROTO_IPV4: "ip", NFPROTO_IPV6: "ip6", NFPROTO_INET: "inet"}

HOOK_INPUT: Final = 1
HOOK_FORWARD: Final = 2
NF_DROP: Final = 0
JUMP_DEPTH: Final = 16  # the kernel's own limit on nested jumps (NFT_JUMP_STACK_SIZE)

# NFTA_CHAIN_TYPE as it is encoded: length, type, text.
_FILTER_CHAIN: Final = struct.pack("=HH", 4 + len(b"filter\0"), 7) + b"filter\0"


class Chain(NamedTuple):
    """One chain; as text what `nft` calls it."""

    family: int
    table: str
    name: str

    def __str__(self) -> str:
        return f"{FAMILY_NAME[self.family]} {self.table} {self.name}"


def chains(netlink: NetlinkSocket) -> Iterator[tuple[Chain, Any]]:
    """Our own chains, and all base chains that filter."""
    found = netlink.dump(
        nft_chain_msg(), NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETCHAIN, containing=(_FILTER_CHAIN, TABLE_NAME.encode())
    )
    for each in found:
        family = each["nfgen_family"]
        if family in FAMILY_NAME:
            yield Chain(family, each.get_attr("NFTA_CHAIN_TABLE"), each.get_attr("NFTA_CHAIN_NAME")), each


def base_chains(found: Iterable[tuple[Chain, Any]], number: int) -> Iterator[tuple[Chain, int]]:
    """Foreign base chains that filter at this hook, with their policies."""
    for chain, each in found:
        hook = each.get_attr("NFTA_CHAIN_HOOK")
        if (
            hook is not None
            and hook.get_attr("NFTA_HOOK_HOOKNUM") == number
            and each.get_attr("NFTA_CHAIN_TYPE") == "filter"
            and chain.table != TABLE_NAME
        ):
            yield chain, each.get_attr("NFTA_CHAIN_POLICY")


def rules(netlink: NetlinkSocket, chain: Chain) -> list[Any]:
    """The rules of a chain, in order."""
    query = message(
        nft_rule_msg(), chain.family, ("NFTA_RULE_TABLE", chain.table), ("NFTA_RULE_CHAIN", chain.name)
    )  # kernels before 4.17 send the rules of all chains
    found = netlink.dump(query, NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETRULE)
    return [
        rule
        for rule in found
        if (rule["nfgen_family"], rule.get_attr("NFTA_RULE_TABLE"), rule.get_attr("NFTA_RULE_CHAIN")) == tuple(chain)
    ]


def parts(rule: Any) -> Iterator[tuple[str, Any]]:
    """Name and data of each expression of a rule."""
    for expression in rule.get_attr("NFTA_RULE_EXPRESSIONS") or ():
        yield expression.get_attr("NFTA_EXPR_NAME"), expression.get_attr("NFTA_EXPR_DATA")


def compared(compare: Any) -> bytes | str:
    """What a `cmp` compares with."""
    data = compare.get_attr("NFTA_CMP_DATA")
    value: bytes | str | None = data.get_attr("NFTA_DATA_VALUE") if data is not None else None
    return value or b""


def verdict(immediate: Any) -> tuple[str, str]:
    """Code of an `immediate` verdict and the chain it leads to; empty where there is none."""
    data = immediate.get_attr("NFTA_IMMEDIATE_DATA")
    said = data.get_attr("NFTA_DATA_VERDICT") if data is not None else None
    if said is None:
        return "", ""
    return said.get_attr("NFTA_VERDICT_CODE") or "", said.get_attr("NFTA_VERDICT_CHAIN") or ""


def message(of: Any, family: int, *attributes: tuple[str, Any]) -> Any:
    """A message with its family and attributes."""
    of["nfgen_family"] = family
    of["attrs"] = list(attributes)
    return of


def octets(value: bytes | str) -> bytes:
    """Data as the decoder gives it, in bytes."""
    return value if isinstance(value, bytes) else value.encode()
