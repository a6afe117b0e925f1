"""The request `trace`: from a 5-tuple to a packet, and from the policy's answer to lines (see `fzg.tunnel.explain`)."""

from __future__ import annotations

import struct
from dataclasses import asdict
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Any

from fzg.ops import drops
from fzg.ops.control import Refused
from fzg.tunnel.explain import explain_incoming, explain_outgoing
from fzg.tunnel.ranges import is_peer
from fzg.wire import ip

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fzg.gateway import Gateway
    from fzg.tunnel.client import Client
    from fzg.tunnel.explain import Explanation

PROTOCOLS = {"tcp": ip.PROTOCOL_TCP, "udp": ip.PROTOCOL_UDP, "icmp": ip.PROTOCOL_ICMP}
DEFAULT_SOURCE_PORT = 50_000  # any port of the dynamic range will do where the policy does not look at it
_TTL = 64

Address = IPv4Address | IPv6Address

_IN_THE_PORTAL = "if it should pass, give the user a policy for a resource that covers it and whose filters permit it"
# What the operator can do, by the check that decides against a packet and whether a client sent it.
_REMEDIES = {
    ("policy", True): _IN_THE_PORTAL,
    ("policy", False): _IN_THE_PORTAL,
    (
        "client",
        False,
    ): "see in `firezone-gateway status` which clients are here; that one has to connect",
    ("source", True): "send from the client's own tunnel address; what lies behind the client is not carried",
    ("source", False): "find who sends from an address of the tunnel's: it belongs to clients alone",
    ("destination", True): "nothing can be done here: gateways do not carry it",
    ("destination", False): "route only 100.64.0.0/11 and fd00:2021:1111::/107 to the gateway's interface",
    ("DNS NAT", True): "look the name up on this host; `firezone-gateway doctor` shows its nameservers",
    ("NAT session", True): "wait until sessions of the client end, or close some",
    ("NAT session", False): "the client has to begin the connection anew",
}


def trace(gateway: Gateway, request: Mapping[str, Any], now: float) -> dict[str, Any]:
    """`protocol`, `source`, `destination` as text, ports as numbers or None, `client` as id or its beginning or None.

    Raises `Refused` with a sentence about what cannot be used.
    """
    protocol = _protocol(request.get("protocol"))
    source = _address(request.get("source"), "source")
    client = _client(gateway, request.get("client"), source)
    destination, name = _destination(request.get("destination"), client, source)
    if source.version != destination.version:
        raise Refused(f"{source} and {destination} are of different IP versions")
    incoming = client is None or destination.packed in (client.ipv4, client.ipv6)
    if incoming and is_peer(source.packed) and gateway.tunnel.client_at(destination.packed) is None:
        raise Refused(f"no client here has the address {source}; `status` lists the clients")
    source_port = _port(request.get("source_port"), protocol, "source", needed=incoming)
    destination_port = _port(request.get("destination_port"), protocol, "destination", needed=True)
    packet = _packet(protocol, source, destination, source_port, destination_port)
    if client is None or incoming:
        told = explain_incoming(gateway.tunnel, packet, now)
        holder = gateway.tunnel.client_at(destination.packed)
    else:
        told = explain_outgoing(gateway.tunnel, client.id, packet, now)
        holder = client
    reason = None
    if told.reason is not None:
        reason = (drops.TO_CLIENT if incoming else drops.FROM_CLIENT) + told.reason
    shown: dict[str, Any] = {
        "direction": "to client" if incoming else "from client",
        "client": holder.id if holder is not None else None,
        "name": name,
        "steps": [asdict(step) for step in told.steps],
        "verdict": told.verdict if reason is None else f"{told.verdict}: {drops.meaning(reason)}",
        "reason": reason,
        "remedy": _remedy(told, outgoing=not incoming),
        "translated": told.translated,
        "passes": told.passes,
    }
    if holder is not None:
        shown["connection"] = _connection(gateway, holder.id)
    return shown


def _remedy(told: Explanation, *, outgoing: bool) -> str | None:
    """None where nothing stopped the packet."""
    last = told.steps[-1] if told.steps else None
    return None if last is None or last.outcome != "stop" else _REMEDIES.get((last.check, outgoing))


def find_client(gateway: Gateway, wanted: object) -> str:
    """The client whose id begins so. Raises `Refused`."""
    if not isinstance(wanted, str) or not wanted:
        raise Refused("the client is not named by text")
    found = [each for each in gateway.client_ids if each.startswith(wanted.lower())]
    if not found:
        raise Refused(f"no client here has an id that begins with {wanted!r}; `status` lists them")
    if len(found) > 1 and wanted not in found:
        raise Refused(f"{len(found)} clients have ids that begin with {wanted!r}; give more of it")
    return wanted if wanted in found else found[0]


def _client(gateway: Gateway, wanted: object, source: Address) -> Client | None:
    if wanted is not None:
        return gateway.tunnel.client(find_client(gateway, wanted))
    return gateway.tunnel.client_at(source.packed)


def _protocol(text: object) -> int:
    if isinstance(text, str) and (number := PROTOCOLS.get(text.lower())) is not None:
        return number
    if isinstance(text, str) and text.isascii() and text.isdigit() and int(text) < ip.PROTOCOL_CONTROL:
        return int(text)
    raise Refused(f"{text!r} is no protocol: tcp, udp, icmp, or a number from 0 to 254")


def _address(text: object, what: str) -> Address:
    try:
        return ip_address(str(text))
    except ValueError as error:
        raise Refused(f"the {what} {text!r} is no IP address") from error


def _destination(text: object, client: Client | None, source: Address) -> tuple[Address, str | None]:
    """An address, or a name for which the client has proxy addresses."""
    try:
        return ip_address(str(text)), None
    except ValueError:
        pass
    if client is None:
        raise Refused(f"{text!r} is no IP address; a name is known only for a client's own packets")
    proxies = [ip_address(each) for each in client.proxies.of_name(str(text))]
    for each in sorted(proxies, key=int):
        if each.version == source.version:
            return each, str(text)
    raise Refused(f"the client has asked for no name {text!r} whose addresses are IPv{source.version}")


def _port(value: object, protocol: int, what: str, *, needed: bool) -> int:
    if value is None:
        if protocol in (ip.PROTOCOL_TCP, ip.PROTOCOL_UDP) and needed:
            raise Refused(f"TCP and UDP need the port of the {what}, as in 10.0.0.1:443 or [fd00::1]:443")
        return DEFAULT_SOURCE_PORT
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 0xFFFF:
        raise Refused(f"the {what}'s port {value!r} is not from 0 to 65535")
    return value


def _packet(protocol: int, source: Address, destination: Address, source_port: int, destination_port: int) -> bytes:
    """The smallest packet of this 5-tuple, as a flow begins with; the policy looks at no checksum."""
    if protocol == ip.PROTOCOL_TCP:
        body = struct.pack("!HHIIBBHHH", source_port, destination_port, 0, 0, 5 << 4, ip.TCP_SYN, 0xFFFF, 0, 0)
    elif protocol == ip.PROTOCOL_UDP:
        body = struct.pack("!HHHH", source_port, destination_port, ip.UDP_HEADER, 0)
    elif protocol in (ip.PROTOCOL_ICMP, ip.PROTOCOL_ICMPV6):
        # Towards the client an echo reply, whose identifier is that of the request.
        protocol = ip.PROTOCOL_ICMP if source.version == 4 else ip.PROTOCOL_ICMPV6
        body = struct.pack("!BBHHH", 8 if source.version == 4 else 128, 0, 0, destination_port, 1)
    else:
        body = bytes(8)
    if source.version == 4:
        header = struct.pack(
            "!BBHHHBBH4s4s",
            0x45,
            0,
            ip.IPV4_HEADER + len(body),
            0,
            0,
            _TTL,
            protocol,
            0,
            source.packed,
            destination.packed,
        )
    else:
        header = struct.pack("!IHBB16s16s", 6 << 28, len(body), protocol, _TTL, source.packed, destination.packed)
    return header + body


def _connection(gateway: Gateway, client_id: str) -> str:
    """Whether what passes also gets over the tunnel."""
    connection = gateway.node.connection(client_id)
    if connection is None:
        return "none: the client is not connected now"
    if connection.path is None:
        return "no path has been found yet"
    if connection.handshake_at is None:
        return "no handshake was completed yet"
    return f"{connection.path.kind}, {connection.state.value}"
