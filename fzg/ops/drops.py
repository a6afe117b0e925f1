"""Why packets and messages went nowhere: the names of the counters, and what each means to an operator."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Final

from fzg.tunnel.events import DropReason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fzg.gateway import Gateway

FROM_CLIENT: Final = "from client: "
TO_CLIENT: Final = "to client: "
RELAY: Final = "TURN: "
ENGINE: Final = "engine: "

# One clause each, to stand after "because" and before what the operator may do about it, if anything.
MEANINGS: Final[Mapping[str, str]] = {
    **{
        side + reason: meaning
        for side in (FROM_CLIENT, TO_CLIENT)
        for reason, meaning in {
            DropReason.MALFORMED: "it is no valid IP packet",
            DropReason.FRAGMENT: "it is a fragment of a larger packet; fragments are not carried",
            DropReason.UNSUPPORTED_PROTOCOL: "it is neither TCP, UDP nor ICMP echo, which alone can be translated",
            DropReason.EXPIRED_NAT_SESSION: "it belongs to a session with a DNS resource that has ended",
        }.items()
    },
    FROM_CLIENT + DropReason.MULTICAST: "it goes to a multicast address, which no resource covers",
    FROM_CLIENT + DropReason.NO_PEER_STATE: "the client has lost all its access meanwhile",
    FROM_CLIENT + DropReason.OUTBOUND_ICMP_ERROR: "it is an ICMP error, which clients may not send into the network",
    FROM_CLIENT + DropReason.NAT_EXHAUSTED: "the client has no free port or NAT session left for DNS resources",
    FROM_CLIENT + DropReason.ICMP_RATE: "it was refused, and the client was told so often enough in this second",
    TO_CLIENT + DropReason.NO_PEER_STATE: "no client with that tunnel address is here, as when it has left",
    TO_CLIENT + DropReason.NOT_A_PEER: "it goes to no client's address, as this host's own multicast does",
    TO_CLIENT + DropReason.NOT_ALLOWED: "no resource of the client admits packets from there",
    TO_CLIENT + "not connected": "the client has no connection now",
    TO_CLIENT + "still connecting": "the client's connection has no path yet",
    TO_CLIENT + "no WireGuard session": "the client's handshake is not complete",
    "inner packet of an unknown peer": "the client left while its packet was under way",
    "candidate for an unknown client": "the portal named an address of a client that has left",
    "malformed candidate": "the portal passed on an address that cannot be read",
    "STUN: not a binding": "a stranger asked for something else than a STUN binding",
    "STUN: unknown connection": "a connectivity check of a client that is not here, as when it has left",
    "WireGuard: not a handshake message": "a datagram with a handshake's first byte and another length",
    "WireGuard: wrong MAC1": "a handshake that is not meant for this gateway, as after a restart, or of a scan",
    "WireGuard: unknown session": "a packet of a session that has ended, as after a restart",
    "WireGuard: unknown client": "a handshake of a client that the portal did not introduce, or that has left",
    "WireGuard: unknown connection": "an answer to a handshake that has ended",
    "neither STUN nor WireGuard": "a datagram of a stranger",
    RELAY + "unknown transaction": "a relay answered what was not asked, or too late",
    RELAY + "wrong method": "a relay answered another question than the one it was asked",
    RELAY + "not a response": "a relay asked something",
    RELAY + "wrong integrity": "a relay's answer has a wrong signature",
    RELAY + "missing integrity": "a relay's answer has no signature",
    RELAY + "unknown channel": "a relay passed something on by a channel that has ended",
    RELAY + "all channels taken": "a relay has no free channel for another address of a client",
    RELAY + "no channel to send on": "the channel to that address was being bound; what follows goes through",
    RELAY + "given up": "a relay did not answer a request in time",
    ENGINE + "udp oversized": "a datagram larger than any that a client sends",
    ENGINE + "udp without local address": "the kernel did not say where a datagram arrived",
    ENGINE + "udp no socket": "there is no socket of that IP version to send from",
    ENGINE + "udp queue full": "the network takes datagrams more slowly than they are to be sent",
    ENGINE + "udp backlog full": "clients send faster than this host can decrypt",
    ENGINE + "tun queue full": "the kernel takes packets more slowly than clients send",
    ENGINE + "tun backlog full": "the network sends faster than this host can encrypt",
    ENGINE + "tun malformed": "the kernel handed over what is no packet",
    ENGINE + "tun not attached": "the TUN device is not there",
    ENGINE + "replayed": "the packet came twice, or far too late",
    ENGINE + "undecryptable": "the packet was changed on the way, or is not of this session",
    ENGINE + "inner not ip": "what a client encrypted is no IP packet",
    ENGINE + "inner truncated": "what a client encrypted is shorter than it says",
    ENGINE + "inner oversized": "what a client encrypted is larger than the tunnel's MTU allows",
    ENGINE + "revoked": "the client lost its access while the packet waited",
    ENGINE + "no memory": "the kernel gave no memory",
}
_ERRNO: Final = re.compile(r"engine: (tun write|udp send) (e\w+|unknown)")
_REFUSED: Final = {"tun write": "the kernel refused to take the packet", "udp send": "the kernel refused to send it"}


def dropped(gateway: Gateway) -> dict[str, int]:
    """Packets and messages that went nowhere, by the name of their counter, the most frequent first."""
    found: Counter[str] = Counter()
    for counted in (gateway.counters, gateway.node.counters):
        found.update({str(name): total for name, total in counted.items()})
    found.update({f"{RELAY}{name}": total for name, total in gateway.node.relays.counters.items()})
    found.update(_of_engine(gateway.engine.counters()))
    return dict(found.most_common())


def meaning(name: str) -> str:
    """Why, in a clause; the name itself where it is not known."""
    if name in MEANINGS:
        return MEANINGS[name]
    match = _ERRNO.fullmatch(name)
    return f"{_REFUSED[match[1]]} ({match[2].upper()})" if match is not None else name


def _of_engine(counters: Mapping[str, int]) -> dict[str, int]:
    prefix = "drop_"
    return {
        ENGINE + name.removeprefix(prefix).replace("_", " "): total
        for name, total in counters.items()
        if name.startswith(prefix) and total
    }
