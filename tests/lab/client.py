"""The development client: one process that does what a user's device does, on top of the gateway's own protocols.

    python -m tests.lab.client --portal-url wss://... --token ... --external-id ... --control PATH

It answers DNS for its resources on the sentinel address, asks for access at the first packet, buffers until the path
is up, and tells over its control socket what happened when. Its ICE role is controlling (spec connectivity 8).
"""

from __future__ import annotations

if __name__ == "__main__":
    from gevent import monkey

    monkey.patch_all()

import argparse
import base64
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
import urllib.parse
import uuid
from collections import deque
from dataclasses import dataclass, field
from fnmatch import fnmatch
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TYPE_CHECKING, Any

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import gevent
import websocket
from gevent.event import Event
from gevent.queue import Queue

from fzg.dataplane.engine import Datagram, FlowKey, InnerPacket, OutboundPacket, SessionConfirmed
from fzg.dataplane.select import make_engine
from fzg.host import tun, udp
from fzg.ice.agent import CLIENT_DEFAULT, CLIENT_IDLE, Credentials, Role
from fzg.mark import SOCKET_MARK
from fzg.node.node import ConnectionEstablished, ConnectionFailed, Node, NoRelayAvailableError
from fzg.secret import Secret
from fzg.turn.events import Relay
from fzg.wire import Malformed, checksum, ip
from fzg.wire.endpoint import Endpoint
from fzg.wireguard.keys import KeyPair
from tests.lab.control import ControlThread, announce_ready

if TYPE_CHECKING:
    from collections.abc import Sequence

SENTINEL = IPv4Address("100.100.111.1")
PROXY4 = int(IPv4Address("100.96.0.0"))
PROXY6 = int(IPv6Address("fd00:2021:1111:8000::"))
BUFFERED_PACKETS = 128
USER_AGENT = "Debian/12.0.0 headless-client/1.5.11 (x86_64; 6.1.0)"


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass
class Access:
    """One resource: what it is, and how far the way to it has come."""

    resource: dict[str, Any]
    gateway_id: str | None = None
    requested_at: float | None = None


@dataclass
class GatewayLink:
    """One gateway, with the moments that the measurements report."""

    gateway_id: str
    handle: int
    addresses: set[bytes]
    intent_at: float
    authorized_at: float = 0.0
    established_at: float | None = None
    first_reply_at: float | None = None
    buffered: deque[bytes] = field(default_factory=lambda: deque(maxlen=BUFFERED_PACKETS))
    candidate_messages: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


@dataclass
class Domain:
    """A name that was asked for: its stand-in addresses and whether the gateway knows them."""

    name: str
    resource_id: str
    proxies: list[str]
    status: str = "new"
    sent_at: float = 0.0
    buffered: deque[bytes] = field(default_factory=lambda: deque(maxlen=32))


class Client:
    def __init__(self, options: Any) -> None:
        self.options = options
        self.stop = Event()
        self.wake = Event()
        self.ready = Event()
        self.outbox: Queue[str] = Queue()
        self.ref = 0
        self.interface: dict[str, Any] = {}
        self.access: dict[str, Access] = {}
        self.links: dict[str, GatewayLink] = {}
        self.by_handle: dict[int, GatewayLink] = {}
        self.domains: dict[str, Domain] = {}
        self.by_proxy: dict[bytes, Domain] = {}
        self.log: list[dict[str, Any]] = []
        self.pending: dict[str, deque[bytes]] = {}
        self.intents: dict[str, float] = {}
        self.prohibited = 0
        self.sockets: list[udp.UdpSocket] = []
        self.relays: dict[str, Relay] = {}
        self.pumps: list[gevent.Greenlet] = []
        self.device: tun.TunDevice | None = None
        self.portal_socket: websocket.WebSocket | None = None
        self.ask_again_when_prohibited = False
        self.begin()

    def begin(self) -> None:
        """A new identity, unknown to everybody."""
        self.static = KeyPair.generate(os.urandom)
        self.engine = make_engine()
        start = now()
        self.node = Node(
            static=self.static, engine=self.engine, random=os.urandom, unix_offset=time.time() - start, now=start,
            role=Role.CONTROLLING, timing=CLIENT_DEFAULT, idle_timing=CLIENT_IDLE,
        )  # fmt: skip

    # -- life

    def run(self) -> None:
        self.open_sockets()
        self.open_tun()
        gevent.signal_handler(signal.SIGTERM, self.stop.set)
        gevent.signal_handler(signal.SIGINT, self.stop.set)
        gevent.spawn(self.timer)
        gevent.spawn(self.portal)
        if self.options.control:
            ControlThread(self.options.control, self)
        gevent.spawn(self.announce)
        self.stop.wait()
        self.node.shutdown(now())
        self.drain()

    def announce(self) -> None:
        """Tell the starter when the first packet would find relays and resources."""
        while not self.op_status()["ready"]:
            gevent.sleep(0.01)
        announce_ready(self.options.ready_fd, interface=self.interface)

    def open_sockets(self) -> None:
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                opened = udp.open_socket(family, mark=SOCKET_MARK if self.options.tun_fd is None else None)
            except OSError:
                continue  # no IPv6 here
            self.sockets.append(opened)
            self.engine.attach_udp(family, opened.socket, port=opened.port)
            self.pumps.append(gevent.spawn(self.pump, opened.socket.fileno(), self.engine.receive_udp, family))

    def open_tun(self) -> None:
        if self.options.tun_fd is not None:
            fd = self.options.tun_fd
            os.set_blocking(fd, False)
            self.engine.attach_tun(fd)
        else:
            self.device = self.device or tun.open_tun(name="tun-client")
            fd = self.device.descriptor
            self.engine.attach_tun(fd, offloads=self.device.offloads)
        self.pumps.append(gevent.spawn(self.pump, fd, self.engine.receive_tun))

    def configure_tun(self) -> None:
        if self.options.tun_fd is not None:
            return
        v4, v6 = self.interface["ipv4"], self.interface["ipv6"]
        routes = ["100.96.0.0/11", "100.100.111.0/24", "fd00:2021:1111:8000::/107", "100.64.0.0/11"]
        routes += ["fd00:2021:1111::/107"]
        routes += [a.resource["address"] for a in self.access.values() if a.resource["type"] == "cidr"]
        if any(a.resource["type"] == "internet" for a in self.access.values()):
            routes += ["0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1"]
        commands = [
            f"addr replace {v4}/32 dev tun-client",
            f"-6 addr replace {v6}/128 dev tun-client",
            "link set tun-client mtu 1280 txqueuelen 10000 up",
            "rule add not fwmark 0xfd002021 lookup 4242 priority 100",
            "-6 rule add not fwmark 0xfd002021 lookup 4242 priority 100",
            *(f"{'-6 ' if ':' in route else ''}route replace {route} dev tun-client table 4242" for route in routes),
        ]
        for command in commands:
            subprocess.run(["ip", *command.split()], check=False, capture_output=True)

    # -- portal

    def portal(self) -> None:
        while not self.stop.is_set():
            try:
                self.portal_once()
            except (OSError, websocket.WebSocketException) as error:
                self.note("portal lost", error=repr(error))
            gevent.sleep(0.5)

    def portal_once(self) -> None:
        options = self.options
        query = urllib.parse.urlencode({
            "external_id": options.external_id, "name": options.name,
            "public_key": base64.b64encode(self.static.public).decode(),
        })  # fmt: skip
        context = ssl.create_default_context(cafile=options.ca) if options.ca else None
        socket_options: list[tuple[int, int, int | bytes]] = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]
        if options.tun_fd is None:  # an internet resource must not capture the way to the portal
            mark = struct.pack("=I", SOCKET_MARK)
            socket_options.append((socket.SOL_SOCKET, socket.SO_MARK, mark))
        socket_ = websocket.create_connection(
            f"{options.portal_url.rstrip('/')}/client/v2/websocket?{query}",
            header=[f"X-Authorization: Bearer {options.token}", f"User-Agent: {USER_AGENT}"],
            suppress_origin=True, timeout=None, sslopt={"context": context} if context else None,
            sockopt=socket_options,
        )  # fmt: skip
        self.portal_socket = socket_
        self.ref = 0
        self.outbox = Queue()
        socket_.send(json.dumps({"topic": "client", "event": "phx_join", "payload": None, "ref": self.next_ref()}))
        greenlets = [gevent.spawn(self.portal_writer, socket_), gevent.spawn(self.heartbeat)]
        try:
            while (text := socket_.recv()) not in ("", b""):
                frame = json.loads(text)
                self.handle_portal(frame["event"], frame["payload"])
        finally:
            gevent.killall(greenlets)
            socket_.close()

    def portal_writer(self, socket_: websocket.WebSocket) -> None:
        while True:
            socket_.send(self.outbox.get())

    def heartbeat(self) -> None:
        while True:
            gevent.sleep(10)
            self.outbox.put(
                json.dumps({"topic": "phoenix", "event": "heartbeat", "payload": {}, "ref": self.next_ref()})
            )

    def next_ref(self) -> int:
        self.ref += 1
        return self.ref - 1

    def send_portal(self, event: str, payload: Any) -> None:
        frame = {"topic": "client", "event": event, "payload": payload, "ref": self.next_ref()}
        self.outbox.put(json.dumps(frame))

    def handle_portal(self, event: str, payload: Any) -> None:
        moment = now()
        match event:
            case "init":
                self.interface = payload["interface"]
                for resource in payload["resources"]:
                    known = self.access.setdefault(resource["id"], Access(resource))
                    known.resource = resource
                self.configure_tun()
                self.update_relays((), relays(payload["relays"]), moment)
                self.node.signalling.release()
                self.ready.set()
                for resource_id in self.pending:  # asked for while nobody listened
                    if resource_id in self.access:
                        self.request(self.access[resource_id], resource_id, moment)
            case "relays_presence":
                self.update_relays(payload["disconnected_ids"], relays(payload["connected"]), moment)
            case "resource_created_or_updated":
                self.access[payload["id"]] = Access(payload)
                self.configure_tun()
            case "resource_deleted":
                self.access.pop(payload, None)
            case "authorization_created":
                self.authorized(payload, moment)
            case "authorization_creation_failed":
                self.note("refused", resource=payload["resource_id"], reason=payload["reason"])
                if payload["resource_id"] in self.access:
                    self.access[payload["resource_id"]].requested_at = None
            case "ice_candidates" | "gateway_ice_candidates":
                link = self.links.get(payload["gateway_id"])
                if link is not None:
                    link.candidate_messages.append(
                        {"at": moment - link.intent_at, "added": True, "candidates": payload["candidates"]}
                    )
                for text in payload["candidates"]:
                    if not self.options.relay_only or " typ relay " in text:
                        self.node.add_remote_candidate(payload["gateway_id"], text, moment)
            case "invalidate_ice_candidates":
                link = self.links.get(payload["gateway_id"])
                if link is not None:
                    link.candidate_messages.append(
                        {"at": moment - link.intent_at, "added": False, "candidates": payload["candidates"]}
                    )
                for text in payload["candidates"]:
                    self.node.remove_remote_candidate(payload["gateway_id"], text, moment)
            case _:
                pass
        self.drain()

    def update_relays(self, removed: Sequence[str], listed: Sequence[Relay], moment: float) -> None:
        for relay_id in removed:
            self.relays.pop(relay_id, None)
        self.relays |= {relay.id: relay for relay in listed}
        self.node.update_relays(removed, listed, moment)

    def authorized(self, payload: dict[str, Any], moment: float) -> None:
        resource_id, gateway_id = payload["resource_id"], payload["gateway_id"]
        access = self.access.get(resource_id)
        if access is None:
            return
        access.gateway_id = gateway_id
        link = self.links.get(gateway_id)
        if link is None:
            handle = len(self.by_handle) + 1
            link = GatewayLink(
                gateway_id, handle,
                {IPv4Address(payload["gateway_ipv4"]).packed, IPv6Address(payload["gateway_ipv6"]).packed},
                intent_at=access.requested_at or moment,
            )  # fmt: skip
            self.links[gateway_id] = self.by_handle[handle] = link
        link.authorized_at = moment
        mine, theirs = payload["client_ice_credentials"], payload["gateway_ice_credentials"]
        try:
            self.node.upsert(
                gateway_id,
                handle=link.handle,
                public_key=base64.b64decode(payload["gateway_public_key"]),
                preshared_key=Secret(base64.b64decode(payload["preshared_key"])),
                local=Credentials(mine["username"], Secret(mine["password"])),
                remote=Credentials(theirs["username"], Secret(theirs["password"])),
                now=moment,
            )
        except NoRelayAvailableError:
            self.note("no relay yet", gateway=gateway_id)
            self.lost(link)
            return
        link.buffered.extend(self.pending.pop(resource_id, ()))
        if link.established_at is not None:
            self.flush(link)

    # -- packets

    def pump(self, fd: int, receive: Any, *arguments: int) -> None:
        hub = gevent.get_hub()
        watcher, at_once = hub.loop.io(fd, 1), hub.loop.io(os.eventfd(1), 1)
        family = arguments[0] if arguments else None
        while True:
            hub.wait(at_once if self.engine.has_backlog(family) else watcher)
            moment = now()
            items = receive(*arguments, moment)
            if not items:  # as in the gateway: nothing for the node, so nothing to drain
                self.engine.flush()
                continue
            for item in items:
                match item:
                    case Datagram(payload=payload, source=source, local=local):
                        self.node.handle_datagram(payload, source, local, moment)
                    case SessionConfirmed(local_index=index):
                        self.node.handle_session_confirmed(index, moment)
                    case InnerPacket(peer=peer, packet=packet):
                        self.from_gateway(peer, packet, moment)
                    case OutboundPacket(packet=packet):
                        self.from_device(packet, moment)
            self.drain()

    def from_gateway(self, peer: int, packet: bytes, moment: float) -> None:
        link = self.by_handle[peer]
        self.node.note_activity(link.gateway_id, moment)
        if packet[0] >> 4 == 6 and packet[6] == 255:
            self.control_event(link, packet, moment)
            return
        if link.first_reply_at is None:
            link.first_reply_at = moment
        if is_prohibited(packet):
            self.prohibited += 1
            if self.ask_again_when_prohibited:
                self.forget_access(packet)
        self.engine.write_tun(packet)
        key = flow_key(packet)
        if key is not None:
            self.engine.install_flow(peer, key, inbound=True, rewrite=None, valid_until=moment + 1.0, token=0)

    def from_device(self, packet: bytes, moment: float) -> None:
        try:
            parsed = ip.parse(packet)
        except Malformed:
            return
        destination = bytes(parsed.destination)
        if ip_address(destination) == SENTINEL:
            self.answer_dns(packet, parsed)
            return
        domain = self.by_proxy.get(destination)
        resource_id = domain.resource_id if domain is not None else self.resource_for(destination)
        link = next((known for known in self.links.values() if destination in known.addresses), None)
        if resource_id is None and link is None:
            return
        if resource_id is not None:
            access = self.access[resource_id]
            link = self.links.get(access.gateway_id or "")
            if link is None:
                self.ask(access, resource_id, packet, moment)
                return
        assert link is not None
        if link.established_at is None:
            link.buffered.append(packet)
            return
        if domain is not None and domain.status != "Active":
            self.assign(link, domain, moment)
            domain.buffered.append(packet)
            return
        self.send(link, packet, moment)

    def send(self, link: GatewayLink, packet: bytes, moment: float) -> None:
        reason = self.node.send(link.gateway_id, packet, moment)
        if reason is not None:
            self.note("dropped", reason=reason)
            return
        key = flow_key(packet)
        if key is not None:
            self.engine.install_flow(link.handle, key, inbound=False, rewrite=None, valid_until=moment + 1.0, token=0)

    def ask(self, access: Access, resource_id: str, packet: bytes, moment: float) -> None:
        self.pending.setdefault(resource_id, deque(maxlen=BUFFERED_PACKETS)).append(packet)
        if access.requested_at is None or moment > access.requested_at + 5.0:
            self.request(access, resource_id, moment)

    def request(self, access: Access, resource_id: str, moment: float) -> None:
        access.requested_at = moment
        connected = [link.gateway_id for link in self.links.values()]
        self.send_portal("request_authorization", {"resource_id": resource_id, "connected_gateway_ids": connected})

    def resource_for(self, destination: bytes) -> str | None:
        address = ip_address(destination)
        best: tuple[int, str] | None = None
        for resource_id, access in self.access.items():
            if access.resource["type"] == "cidr":
                network = ip_network(access.resource["address"])
                if address.version == network.version and address in network:
                    best = max(best or (-1, ""), (network.prefixlen, resource_id))
            elif access.resource["type"] == "internet":
                best = best or (-1, resource_id)
        return best[1] if best is not None else None

    def forget_access(self, error: bytes) -> None:
        """An ICMP error quotes a packet of ours: the next one to that destination asks for access anew."""
        quoted = error[(error[0] & 15) * 4 + 8 :] if error[0] >> 4 == 4 else error[48:]
        destination = quoted[16:20] if quoted[0] >> 4 == 4 else quoted[24:40]
        domain = self.by_proxy.get(destination)
        resource_id = domain.resource_id if domain is not None else self.resource_for(destination)
        if resource_id is not None:
            access = self.access[resource_id]
            access.gateway_id = access.requested_at = None

    def flush(self, link: GatewayLink) -> None:
        while link.buffered:
            self.from_device(link.buffered.popleft(), now())

    # -- DNS resources

    def answer_dns(self, packet: bytes, parsed: ip.Packet) -> None:
        body = packet[parsed.l4_offset + 8 :]
        try:
            query = dns.message.from_wire(body)
            name = query.question[0].name.to_text(omit_final_dot=True).lower()
        except (dns.exception.DNSException, IndexError):
            return
        response = dns.message.make_response(query)
        response.flags |= dns.flags.RA
        domain = self.domain(name)
        if domain is None:
            response.set_rcode(dns.rcode.NXDOMAIN)
        else:
            wanted = query.question[0].rdtype
            version = {dns.rdatatype.A: 4, dns.rdatatype.AAAA: 6}.get(wanted)
            addresses = [proxy for proxy in domain.proxies if ip_address(proxy).version == version]
            if addresses:
                response.answer.append(dns.rrset.from_text(query.question[0].name, 1, 1, wanted, *addresses))
        payload = response.to_wire()
        source_port, destination_port = struct.unpack_from("!HH", packet, parsed.l4_offset)
        self.engine.write_tun(
            udp4(bytes(parsed.destination), destination_port, bytes(parsed.source), source_port, payload)
        )

    def domain(self, name: str) -> Domain | None:
        known = self.domains.get(name)
        if known is not None:
            return known
        for resource_id, access in self.access.items():
            pattern = str(access.resource.get("address", "")).lower()
            plain = pattern.replace("**.", "*.")
            if access.resource["type"] == "dns" and (fnmatch(name, plain) or name == plain.removeprefix("*.")):
                first = len(self.domains) * 4 + 1
                proxies = [str(IPv4Address(PROXY4 + first + i)) for i in range(4)]
                proxies += [str(IPv6Address(PROXY6 + first + i)) for i in range(4)]
                domain = Domain(name, resource_id, proxies)
                self.domains[name] = domain
                for proxy in proxies:
                    self.by_proxy[ip_address(proxy).packed] = domain
                return domain
        return None

    def assign(self, link: GatewayLink, domain: Domain, moment: float) -> None:
        if moment < domain.sent_at + 2.0:
            return
        domain.sent_at = moment
        payload = json.dumps(
            {"resource": domain.resource_id, "domain": domain.name, "proxy_ips": domain.proxies}, separators=(",", ":")
        ).encode()
        self.node.send(link.gateway_id, control_packet(0, payload), moment)

    def control_event(self, link: GatewayLink, packet: bytes, moment: float) -> None:
        if packet[40] == 2:
            self.note("goodbye", gateway=link.gateway_id)
            self.node.drop(link.gateway_id)
            self.lost(link)
        elif packet[40] == 1:
            status = json.loads(packet[48:])
            domain = self.domains.get(status["domain"].lower())
            if domain is not None and domain.resource_id == status["resource"]:
                domain.status = status["status"]
                while domain.status == "Active" and domain.buffered:
                    self.send(link, domain.buffered.popleft(), moment)

    def lost(self, link: GatewayLink) -> None:
        self.links.pop(link.gateway_id, None)
        for access in self.access.values():
            if access.gateway_id == link.gateway_id:
                access.gateway_id = access.requested_at = None
        for domain in self.domains.values():
            domain.status, domain.sent_at = "new", 0.0

    # -- time and output

    def timer(self) -> None:
        while True:
            deadline = self.node.poll_timeout()
            self.wake.clear()
            self.wake.wait(max(0.0, min((deadline.at if deadline else now() + 1.0) - now(), 1.0)))
            self.node.handle_timeout(now())
            self.engine.sweep(now())
            self.drain()

    def drain(self) -> None:
        while (event := self.node.poll_event()) is not None:
            match event:
                case ConnectionEstablished(client_id=gateway_id, path=path):
                    link = self.links[gateway_id]
                    link.established_at = now()
                    self.note("established", gateway=gateway_id, path=str(path))
                    for domain in self.domains.values():
                        if self.access[domain.resource_id].gateway_id == gateway_id:
                            self.assign(link, domain, now())
                    self.flush(link)
                case ConnectionFailed(client_id=gateway_id, failure=failure):
                    self.note("failed", gateway=gateway_id, reason=failure.value)
                    if gateway_id in self.links:
                        self.lost(self.links[gateway_id])
                case _:
                    pass
        while (transmit := self.node.poll_transmit()) is not None:
            self.engine.transmit(transmit)
        self.engine.flush()
        for message in self.node.drain_candidates(now()):
            candidates = [c for c in message.candidates if not self.options.relay_only or " typ relay " in c]
            event_name = "new_gateway_ice_candidates" if message.added else "invalidate_gateway_ice_candidates"
            self.send_portal(event_name, {"gateway_id": message.client_id, "candidates": candidates})
        self.wake.set()

    def note(self, what: str, **fields: Any) -> None:
        entry = {"at": now(), "what": what, **fields}
        self.log.append(entry)
        print(json.dumps(entry), flush=True)

    # -- orders over the control socket

    def op_status(self) -> dict[str, Any]:
        """Where everything stands."""
        links = []
        for link in self.links.values():
            connection = self.node.connection(link.gateway_id)
            path = connection.path if connection is not None else None
            links.append({
                "gateway_id": link.gateway_id,
                "path": str(path.kind) if path is not None else None,
                "established_ms": ms(link.established_at, link.intent_at),
                "authorized_ms": ms(link.authorized_at, link.intent_at),
                "first_reply_ms": ms(link.first_reply_at, link.intent_at),
                "candidate_messages": link.candidate_messages,
            })  # fmt: skip
        return {
            "ready": self.ready.is_set() and self.node.relays.sample(now()) is not None,
            "allocations": sum(bool(relay.relayed) for relay in self.node.relays.status()),
            "interface": self.interface,
            "links": links,
            "domains": {
                domain.name: {"proxies": domain.proxies, "status": domain.status} for domain in self.domains.values()
            },
            "prohibited": self.prohibited,
            "counters": dict(self.engine.counters()),
        }

    def op_resolve(self, name: str) -> list[str]:
        """The stand-in addresses of a name, as a DNS query would give them."""
        domain = self.domain(name)
        return domain.proxies if domain is not None else []

    def op_reset(self) -> bool:
        """Forget every gateway with a goodbye, so that the next packet makes a fresh connection."""
        for link in list(self.links.values()):
            self.node.close(link.gateway_id, now())
            self.lost(link)
        self.drain()
        return True

    def op_network_reset(self) -> bool:
        """What a device does when its network changed: new key, new sockets, a new login (spec connectivity 8)."""
        gevent.killall(self.pumps)
        self.pumps.clear()
        for opened in self.sockets:
            opened.socket.close()
        self.sockets.clear()
        self.begin()
        for link in list(self.links.values()):
            self.lost(link)
        for access in self.access.values():
            access.requested_at = None
        self.by_handle.clear()
        self.relays.clear()
        self.open_sockets()
        self.open_tun()
        if self.portal_socket is not None:
            self.portal_socket.shutdown()
        self.wake.set()
        return True

    def op_new_flow_on_prohibited(self, enabled: bool = True) -> None:
        """Whether ICMP prohibited makes the next packet ask for access again."""
        self.ask_again_when_prohibited = enabled

    def op_renew(self) -> int:
        """Give up the allocations and ask for new ones, so that no relay knows of a peer; how many relays there are."""
        known = list(self.relays.values())
        self.update_relays([relay.id for relay in known], known, now())
        self.drain()
        return len(known)

    def op_log(self) -> list[dict[str, Any]]:
        """Everything noted so far."""
        return self.log


def relays(entries: list[dict[str, Any]]) -> list[Relay]:
    grouped: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry["type"] != "turn":
            continue
        endpoint = Endpoint.parse(entry["addr"])
        known = grouped.setdefault(entry["id"], {"ipv4": None, "ipv6": None})
        known["ipv4" if endpoint.is_ipv4 else "ipv6"] = endpoint
        known |= {"username": entry["username"], "password": Secret(entry["password"])}
    return [Relay(id=relay_id, **fields) for relay_id, fields in grouped.items()]


def control_packet(kind: int, payload: bytes) -> bytes:
    header = b"\x60\x00\x00\x00" + struct.pack("!H", 8 + len(payload)) + b"\xff\x00" + bytes(32)
    return header + bytes([kind]) + bytes(7) + payload


def flow_key(packet: bytes) -> FlowKey | None:
    try:
        parsed = ip.parse(packet)
    except Malformed:
        return None
    if parsed.protocol not in (6, 17):
        return None
    source_port, destination_port = struct.unpack_from("!HH", packet, parsed.l4_offset)
    return FlowKey(parsed.protocol, bytes(parsed.source), bytes(parsed.destination), source_port, destination_port)


def is_prohibited(packet: bytes) -> bool:
    if packet[0] >> 4 == 4:
        return packet[9] == 1 and packet[(packet[0] & 15) * 4 :][:2] == b"\x03\x0d"
    return packet[6] == 58 and packet[40:42] == b"\x01\x01"


def udp4(source: bytes, source_port: int, destination: bytes, destination_port: int, payload: bytes) -> bytes:
    length = 8 + len(payload)
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + length, 0, 0, 64, 17, 0, source, destination)
    header = header[:10] + struct.pack("!H", checksum.internet_checksum(header)) + header[12:]
    return header + struct.pack("!HHHH", source_port, destination_port, length, 0) + payload


def ms(later: float | None, earlier: float) -> float | None:
    return None if later is None else round((later - earlier) * 1000, 2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.lab.client", description=__doc__.splitlines()[0])
    parser.add_argument("--portal-url", required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--external-id", default=str(uuid.uuid4()))
    parser.add_argument("--name", default="lab-client")
    parser.add_argument("--ca", help="PEM file of the portal's certificate authority")
    parser.add_argument("--control", help="path of the control socket")
    parser.add_argument("--tun-fd", type=int, help="descriptor with virtio framing instead of a TUN device")
    parser.add_argument("--relay-only", action="store_true", help="offer and take relay candidates only")
    parser.add_argument("--ready-fd", type=int, help="descriptor for the readiness line")
    Client(parser.parse_args()).run()
    sys.stdout.flush()
    os._exit(0)  # greenlets that still wait for a socket must not keep the process


if __name__ == "__main__":
    main()
