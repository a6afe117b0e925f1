"""Where a connection sends: the peer socket of spec connectivity 4.1."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from fzg.wire.candidate import Kind

if TYPE_CHECKING:
    from fzg.ice.agent import Nominated
    from fzg.wire.endpoint import Endpoint


class PathKind(StrEnum):
    """Named for the two ends; the datagram differs only in whether our own relay carries it."""

    PEER_TO_PEER = "PeerToPeer"
    PEER_TO_RELAY = "PeerToRelay"
    RELAY_TO_PEER = "RelayToPeer"
    RELAY_TO_RELAY = "RelayToRelay"


@dataclass(frozen=True, slots=True)
class Path:
    """The nominated pair as a send path."""

    kind: PathKind
    source: Endpoint
    destination: Endpoint

    @property
    def relayed(self) -> bool:
        """True when datagrams travel through our own allocation."""
        return self.kind in (PathKind.RELAY_TO_PEER, PathKind.RELAY_TO_RELAY)

    def __str__(self) -> str:
        return f"{self.kind} {self.source} -> {self.destination}"


def path_of(nominated: Nominated) -> Path:
    """The path that a nomination stands for."""
    match nominated.local_kind is Kind.RELAY, nominated.remote_kind is Kind.RELAY:
        case False, False:
            kind = PathKind.PEER_TO_PEER
        case False, True:
            kind = PathKind.PEER_TO_RELAY
        case True, False:
            kind = PathKind.RELAY_TO_PEER
        case _:
            kind = PathKind.RELAY_TO_RELAY
    return Path(kind, nominated.source, nominated.destination)
