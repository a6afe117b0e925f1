"""Let a router forget its connections: all of them, or those between clients and gateways only.

A connection to the portal or to a relay must survive a new measurement: without its entry the router drops what comes
from outside until the inside speaks again.
"""

from __future__ import annotations

import socket
import sys

from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

RELAY_PORT = 3478


def flush_peers() -> int:
    """Delete the UDP entries that do not lead to a relay; returns how many. Runs inside the router's namespace."""
    return sum(_flush_peers(family) for family in (socket.AF_INET, socket.AF_INET6))


def flush_all() -> None:
    """Delete every entry."""
    with NFCTSocket() as tracker:
        tracker.flush()


def _flush_peers(family: int) -> int:
    deleted = 0
    version = "V4" if family == socket.AF_INET else "V6"
    with NFCTSocket(nfgen_family=family) as tracker:
        for message in list(tracker.dump()):
            original = message.get_attr("CTA_TUPLE_ORIG")
            protocol = original.get_attr("CTA_TUPLE_PROTO")
            addresses = original.get_attr("CTA_TUPLE_IP")
            ports = protocol.get_attr("CTA_PROTO_SRC_PORT"), protocol.get_attr("CTA_PROTO_DST_PORT")
            if protocol.get_attr("CTA_PROTO_NUM") != socket.IPPROTO_UDP or RELAY_PORT in ports:
                continue
            key = NFCTAttrTuple(
                family=family,
                saddr=addresses.get_attr(f"CTA_IP_{version}_SRC"),
                daddr=addresses.get_attr(f"CTA_IP_{version}_DST"),
                proto=socket.IPPROTO_UDP,
                sport=ports[0],
                dport=ports[1],
            )
            tracker.entry("del", tuple_orig=key)
            deleted += 1
    return deleted


if __name__ == "__main__":
    print(flush_peers() if sys.argv[1:] == ["peers"] else flush_all())
