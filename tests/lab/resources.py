"""What clients want to reach: web servers, echo servers and a name server, in one process (spec operations.md 5.1)."""

from __future__ import annotations

import json
import logging
import socket
import socketserver
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

_LOG = logging.getLogger("lab.resources")

ECHO_PORT = 7
DNS_PORT = 53
HTTP_PORT = 80
RECORDS = {
    "dns.httpbin.search.test": ["172.21.0.100"],
    "download.httpbin": ["172.21.0.101"],
    "alias.httpbin": ["172.21.0.101"],
    "alias2.httpbin": ["172.21.0.101"],
    "dual.httpbin": ["172.21.0.101", "10:20::100"],
    "iperf3.test": ["10.20.0.110", "10:20::110"],
    "web.test": ["10.20.0.100", "10:20::100"],
    "example.test": ["10.20.0.100"],
}
BIG_NAME = "big.test"
_BIG_TEXT = [f"{i:03}" + "x" * 200 for i in range(15)]  # above 2 kB, so that UDP truncates it
_ZEROS = memoryview(bytes(1 << 18))
_TTL_S = 1
_IP_PKTINFO = 8  # <linux/in.h>; the socket module has no name for it


class Resources:
    """All servers; `op_` methods are the orders of `control`."""

    def __init__(self) -> None:
        self.records = {name: list(addresses) for name, addresses in RECORDS.items()}
        self.queries: Counter[str] = Counter()
        self.muted: set[str] = set()
        self.delay_s = 0.0

    def start(self) -> None:
        """Listen on all addresses of the namespace, in threads."""
        servers: list[socketserver.BaseServer] = [_HttpServer(("::", HTTP_PORT), _HttpHandler)]
        servers.append(_TcpServer(("::", ECHO_PORT), _EchoHandler))
        servers.append(_TcpServer(("::", DNS_PORT), _dns_handler(self)))
        for server in servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            threading.Thread(target=_udp_echo, args=(_udp(family, address, ECHO_PORT),), daemon=True).start()
            sock = _udp(family, address, DNS_PORT)
            threading.Thread(target=self._serve_dns, args=(sock,), daemon=True).start()

    def op_set_records(self, name: str, addresses: list[str]) -> None:
        """Let a name have these addresses; an empty list answers NOERROR without any."""
        self.records[name] = addresses

    def op_delete_records(self, name: str) -> None:
        """Let a name not exist."""
        self.records.pop(name, None)

    def op_mute(self, name: str, muted: bool = True) -> None:
        """Never answer queries for a name."""
        (self.muted.add if muted else self.muted.discard)(name)

    def op_delay(self, seconds: float) -> None:
        """Answer DNS this much later."""
        self.delay_s = seconds

    def op_queries(self) -> dict[str, int]:
        """DNS queries so far, by `name/type`."""
        return dict(self.queries)

    def answer(self, query: bytes, *, limit: int) -> bytes | None:
        """The reply to a DNS query, truncated to `limit` bytes; None for silence."""
        question = dns.message.from_wire(query)
        rrset = question.question[0]
        name = rrset.name.to_text(omit_final_dot=True).lower()
        kind = rrset.rdtype
        self.queries[f"{name}/{dns.rdatatype.to_text(kind)}"] += 1
        if name in self.muted:
            return None
        time.sleep(self.delay_s)
        reply = dns.message.make_response(question, recursion_available=True)
        addresses = self.records.get(name)
        texts: list[str] = []
        if kind == dns.rdatatype.A:
            texts = [address for address in addresses or () if ":" not in address]
        elif kind == dns.rdatatype.AAAA:
            texts = [address for address in addresses or () if ":" in address]
        elif kind == dns.rdatatype.TXT and name == BIG_NAME:
            texts = [f'"{text}"' for text in _BIG_TEXT]
        if texts:
            reply.answer.append(dns.rrset.from_text(rrset.name, _TTL_S, "IN", kind, *texts))
        elif addresses is None and name != BIG_NAME:
            reply.set_rcode(dns.rcode.NXDOMAIN)
        wire = reply.to_wire(max_size=65535)
        if len(wire) <= max(limit, question.payload if question.edns >= 0 and limit == 512 else 0):
            return wire
        reply.answer.clear()
        reply.flags |= dns.flags.TC
        return reply.to_wire()

    def _serve_dns(self, sock: socket.socket) -> None:
        while True:
            query, ancillary, _, source = sock.recvmsg(4096, 256)

            def reply(query=query, source=source, asked=_reply_source(ancillary)) -> None:
                try:
                    answer = self.answer(query, limit=512)
                except Exception as error:
                    _LOG.warning("bad query from %s: %r", source, error)
                    return
                if answer is not None:
                    sock.sendmsg([answer], asked, 0, source)

            threading.Thread(target=reply, daemon=True).start()


class _TcpServer(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class _HttpServer(ThreadingHTTPServer):
    address_family = socket.AF_INET6
    request_queue_size = 128

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "lab", HTTP_PORT


class _HttpHandler(BaseHTTPRequestHandler):
    """`/bytes?num=N` sends N zero bytes, everything else tells what was asked and from where."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if parts.path == "/bytes":
            left = int(parse_qs(parts.query)["num"][0])
            self._head(left, "application/octet-stream")
            while left > 0:
                left -= self.connection.send(_ZEROS[:left])
            return
        told = {
            "url": self.path,
            "method": self.command,
            "origin": self.client_address[0].removeprefix("::ffff:"),
            "server": self.connection.getsockname()[0].removeprefix("::ffff:"),
            "headers": dict(self.headers),
        }
        body = json.dumps(told).encode() + b"\n"
        self._head(len(body), "application/json")
        self.wfile.write(body)

    def do_POST(self) -> None:
        left = int(self.headers.get("Content-Length", "0"))
        while left > 0 and (part := self.rfile.read(min(left, 1 << 18))):
            left -= len(part)
        self._head(0, "text/plain")

    do_PUT = do_POST  # noqa: N815 (the name http.server looks for)

    def log_message(self, form: str, *arguments: object) -> None:
        _LOG.info("%s %s", self.client_address[0], form % arguments)

    def _head(self, length: int, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.send_header("Content-Type", kind)
        self.end_headers()


class _EchoHandler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(1 << 16):
            self.request.sendall(data)


def _dns_handler(resources: Resources) -> type[socketserver.StreamRequestHandler]:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while len(head := self.rfile.read(2)) == 2:
                answer = resources.answer(self.rfile.read(int.from_bytes(head, "big")), limit=65535)
                if answer is not None:
                    self.wfile.write(len(answer).to_bytes(2, "big") + answer)

    return Handler


def _udp(family: int, address: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # Answers must come from the address that was asked; one namespace has several.
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    sock.bind((address, port))
    return sock


def _udp_echo(sock: socket.socket) -> None:
    while True:
        data, ancillary, _, source = sock.recvmsg(65536, 256)
        sock.sendmsg([data], _reply_source(ancillary), 0, source)


def _reply_source(ancillary: list[tuple[int, int, bytes]]) -> list[tuple[int, int, bytes]]:
    """The packet-info that makes an answer leave from the address that was asked."""
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            return [(level, kind, bytes(4) + data[8:12] + bytes(4))]
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            return [(level, kind, data[:16] + bytes(4))]
    return []
