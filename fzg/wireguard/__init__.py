"""WireGuard without its data path: handshakes, load limiter, sessions and timers."""

from __future__ import annotations

from fzg.wireguard.gate import Admitted, CookieReply, Gate, Rejected
from fzg.wireguard.index import IndexAllocator
from fzg.wireguard.keys import StaticKeyPair
from fzg.wireguard.noise import PartialInitiation, identify
from fzg.wireguard.peer import Event, Expired, HandshakeCompleted, Peer
from fzg.wireguard.sessions import Sessions
from fzg.wireguard.timers import ICE, ICELESS, Timing

__all__ = [
    "ICE",
    "ICELESS",
    "Admitted",
    "CookieReply",
    "Event",
    "Expired",
    "Gate",
    "HandshakeCompleted",
    "IndexAllocator",
    "PartialInitiation",
    "Peer",
    "Rejected",
    "Sessions",
    "StaticKeyPair",
    "Timing",
    "identify",
]
