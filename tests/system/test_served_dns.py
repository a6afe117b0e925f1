"""The gateway's DNS server in a whole process, asked on its tunnel addresses."""

from __future__ import annotations

import contextlib

import dns.message
import dns.query
import dns.rcode
import dns.rrset
import gevent
import pytest
from gateway_process import INIT, inside, portal_in
from gevent import socket
from gevent.server import DatagramServer, StreamServer

from tests.lab.scripted_portal import wait_until

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.needs("namespaces", "tun", "ip", "nft")]

PORT = 53535
COUNT_MARKED = """
table inet marked {
  chain out {
    type filter hook output priority 0
    udp dport 53 meta mark 0xfd002021 counter
    udp dport 53 meta mark != 0xfd002021 counter comment "unmarked"
  }
}
"""


@contextlib.contextmanager
def nameserver(namespace, host, text="text"):
    """Answers TXT with `text`, everything else with NXDOMAIN, on port 53 of a loopback address."""

    def answer(data):
        query = dns.message.from_wire(data)
        response = dns.message.make_response(query)
        if query.question[0].rdtype == 16:
            response.answer.append(dns.rrset.from_text(query.question[0].name, 60, "IN", "TXT", f'"{text}"'))
        else:
            response.set_rcode(dns.rcode.NXDOMAIN)
        return response.to_wire()

    def serve(connection, _address):
        with connection:
            data = connection.recv(4096)
            reply = answer(data[2:])
            connection.sendall(len(reply).to_bytes(2, "big") + reply)

    with inside(namespace):
        udp = DatagramServer((host, 53), lambda data, client: udp.sendto(answer(data), client))
        tcp = StreamServer((host, 53), serve)
        udp.start()
        tcp.start()
    try:
        yield
    finally:
        udp.close()
        tcp.close()


def ask(namespace, host, *, tcp=False, patience=8.0):
    """The text that the gateway's server on `host` answers with; the rcode's name if it is a failure; None if none."""
    query = dns.message.make_query("db.example.", "TXT")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with inside(namespace):
        client = socket.socket(family, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM)
    with client, gevent.Timeout(patience, False):
        try:
            client.connect((host, PORT))
            client.send((len(query.to_wire()).to_bytes(2, "big") if tcp else b"") + query.to_wire())
            data = client.recv(4096)
        except ConnectionError:
            return None
        response = dns.message.from_wire(data[2:] if tcp else data)
        assert response.id == query.id
        if response.rcode() != dns.rcode.NOERROR:
            return dns.rcode.to_text(response.rcode())
        return response.answer[0][0].strings[0].decode()
    return None


@pytest.mark.spec("TUNNEL-78", "OPS-49")
def test_clients_are_served_on_both_tunnel_addresses_by_the_nameserver_of_the_moment(namespace, start):
    namespace.file("/etc/resolv.conf", "nameserver 127.0.0.21\n")
    namespace.nft(COUNT_MARKED)
    with nameserver(namespace, "127.0.0.21", "first"), portal_in(namespace) as portal:
        gateway = start(portal=portal)
        gateway.wait_ready()
        for host in (INIT["interface"]["ipv4"], INIT["interface"]["ipv6"]):
            assert ask(namespace, host) == "first"
            assert ask(namespace, host, tcp=True) == "first"
        listed = namespace.run("nft", "list", "table", "inet", "marked").stdout
        assert "0xfd002021 counter packets 0" not in listed.replace("!= 0xfd002021 counter packets 0", "")
        assert "!= 0xfd002021 counter packets 0" in listed, "forwarded queries carry the mark"

        namespace.file("/etc/resolv.conf", "nameserver 127.0.0.22 # another\n")
        with nameserver(namespace, "127.0.0.22", "second"):
            wait_until(
                lambda: ask(namespace, INIT["interface"]["ipv4"], patience=2.0) == "second", "the new nameserver"
            )

        moved = {**INIT, "interface": {"ipv4": "100.71.4.10", "ipv6": "fd00:2021:1111::a:18"}}
        with nameserver(namespace, "127.0.0.22", "second"):
            portal.connection(0).push("init", moved)
            wait_until(lambda: ask(namespace, "100.71.4.10", patience=2.0) == "second", "an answer on the new address")
            assert ask(namespace, "100.71.4.9", patience=2.0) is None
        assert gateway.terminate() == 0
        assert "Traceback" not in gateway.output


@pytest.mark.spec("TUNNEL-79", "OPS-21")
def test_without_nameservers_the_gateway_warns_and_answers_server_failure(namespace, start):
    namespace.file("/etc/resolv.conf", "# empty\n")
    with portal_in(namespace) as portal:
        gateway = start(portal=portal)
        gateway.wait_ready()
        assert ask(namespace, INIT["interface"]["ipv4"]) == "SERVFAIL"
        assert " WARN " in gateway.output


def test_an_occupied_port_ends_the_gateway_with_a_clear_message(namespace, start):
    with inside(namespace):
        squatter = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    squatter.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND: the address is not there yet
    squatter.bind((INIT["interface"]["ipv4"], PORT))
    with squatter, portal_in(namespace) as portal:
        gateway = start(portal=portal)
        assert "DNS server cannot listen on port 53535 of 100.71.4.9" in gateway.fails()
