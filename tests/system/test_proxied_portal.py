"""The portal behind an HTTP proxy: the way out of networks that let nothing else pass."""

from __future__ import annotations

import base64
import logging

import pytest
from gateway_process import INIT, inside
from portal_world import Gateway, Impatient
from test_frozen import ORDINARY_USER
from test_portal_dialling import tls_client, tls_server

from fzg.portal.proxy import Proxy
from tests.lab.certificates import Authority
from tests.lab.connect_proxy import ConnectProxy
from tests.lab.scripted_portal import ScriptedPortal, wait_until

NAME = "portal.example"  # known to the proxy alone
CREDENTIALS = "Basic " + base64.b64encode(b"edge:s3cret%").decode()


@pytest.fixture(name="authority", scope="module")
def authority_fixture(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(name="portal")
def portal_fixture(authority):
    with ScriptedPortal(tls=tls_server(authority, [NAME])) as portal:
        yield portal


@pytest.fixture(name="proxy")
def proxy_fixture(portal):
    with ConnectProxy({f"{NAME}:443": ("127.0.0.1", portal.port)}) as proxy:
        yield proxy


@pytest.fixture(name="dial")
def dial_fixture(authority, proxy):
    """A portal connection through the proxy, which may be named with credentials; the portal's name is not resolved."""
    started = []

    def start(credentials="", **dialing):
        def resolve(host):
            assert host == "proxy.example"
            return ["127.0.0.1"]

        named = Proxy.parse(f"http://{credentials}proxy.example:{proxy.port}")
        options = {"ssl_context": tls_client(authority), "resolve": resolve, "proxy": named} | dialing
        reconnect = Impatient(random=bytes, max_partition=60.0)
        started.append(Gateway(f"wss://{NAME}", dialing=options, reconnect=reconnect))
        return started[-1]

    yield start
    for gateway in started:
        gateway.connection.close(wait=0)
        gateway.greenlet.get(timeout=5)


def test_the_portal_is_reached_through_the_proxy_and_tls_is_with_the_portal(dial, proxy, portal):
    dial().wait_connected()
    assert proxy.requests == [f"CONNECT {NAME}:443 HTTP/1.1\r\nHost: {NAME}:443\r\n\r\n"]
    assert portal.connection(0).request.headers["host"] == NAME


def test_credentials_go_to_the_proxy_and_into_no_log(dial, proxy, caplog):
    caplog.set_level(logging.DEBUG)
    proxy.authorization = CREDENTIALS
    dial("edge:wrong@").wait_for("disconnected")
    assert "wants other credentials (407 Proxy Authentication Required)" in caplog.text
    dial("edge:s3cret%25@").wait_connected()
    for secret in ("wrong", "s3cret", CREDENTIALS[6:]):
        assert secret not in caplog.text


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            b"HTTP/1.1 403 Forbidden by policy\r\n\r\n",
            "refused to connect to portal.example:443: 403 Forbidden by policy",
        ),
        (b"HTTP/1.0 502 Bad Gateway\r\n\r\n", "refused to connect to portal.example:443: 502 Bad Gateway"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "does not speak HTTP"),
        (b"", "closed the connection before it answered"),
        (b"HTTP/1.1 200 OK\r\n\r\nunasked", "sent more than its answer"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000, "has no end"),
    ],
)
def test_a_proxy_that_opens_no_tunnel_is_a_failed_dial_that_is_tried_again(dial, proxy, caplog, answer, sentence):
    caplog.set_level(logging.INFO)
    proxy.answer = answer
    gateway = dial()
    gateway.wait_for("disconnected")
    assert sentence in caplog.text
    assert f"proxy.example:{proxy.port}" in caplog.text
    proxy.answer = None
    gateway.wait_connected()


def test_a_401_of_the_proxy_does_not_pass_for_one_of_the_portal(dial, proxy):
    proxy.answer = b"HTTP/1.1 401 Unauthorized\r\n\r\n"
    gateway = dial()
    gateway.wait_for("disconnected", 2)
    assert "fatal" not in gateway.application.log


def test_a_proxy_without_an_address_and_one_that_refuses_are_named(dial, caplog):
    caplog.set_level(logging.INFO)
    dial(resolve=lambda _: []).wait_for("disconnected")
    assert "the proxy proxy.example has no addresses" in caplog.text
    dial(resolve=lambda _: ["127.0.0.99"]).wait_for("disconnected")
    assert "cannot be reached: no address accepted: 127.0.0.99: [Errno 111]" in caplog.text


def test_a_silent_proxy_ends_the_dial_after_its_time(dial, proxy, caplog):
    caplog.set_level(logging.INFO)
    dial(dial_timeout=0.1, resolve=lambda _: ["127.0.0.1"], proxy=Proxy("proxy.example", _silent_port()))
    wait_until(lambda: "no upgrade within 0.1 s" in caplog.text)


_LISTENERS = []


def _silent_port():
    from gevent import socket

    _LISTENERS.append(socket.create_server(("127.0.0.1", 0)))
    return _LISTENERS[-1].getsockname()[1]


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.needs("namespaces", "tun", "ip", "nft", "setpriv", "setcap", "objdump", "strip")
@pytest.mark.parametrize("program", ["source", "file capability"])
def test_the_whole_program_finds_its_proxy_and_its_authorities_in_the_environment(
    namespace, start, portal, authority, request, program
):
    """Under a file capability the C library hides variables, and OpenSSL does not read SSL_CERT_FILE itself."""
    capability = program == "file capability"
    command = [request.getfixturevalue("capable")] if capability else ()
    if capability:
        request.getfixturevalue("open_node")
    certificate = request.getfixturevalue("shared_directory") / "ca.pem"
    certificate.write_bytes(authority.certificate.read_bytes())
    with inside(namespace):  # from where nothing leads to the portal but the proxy
        proxy = ConnectProxy({f"{NAME}:443": ("127.0.0.1", portal.port)}, authorization=CREDENTIALS)
    portal.push_after_join = [("init", INIT)]
    with proxy:
        gateway = start(
            command=command,
            prefix=ORDINARY_USER if capability else [],
            FIREZONE_API_URL=f"wss://{NAME}",
            HTTPS_PROXY=f"http://edge:s3cret%25@127.0.0.1:{proxy.port}",
            no_proxy="localhost",
            NO_PROXY="localhost",
            SSL_CERT_FILE=str(certificate),
        )
        gateway.wait_ready()
        assert f"through the proxy 127.0.0.1:{proxy.port}" in gateway.output
        assert "s3cret" not in gateway.output
        assert gateway.terminate() == 0


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.needs("namespaces", "tun", "ip", "nft")
def test_a_proxy_that_cannot_be_used_ends_the_start_with_one_sentence(start):
    line = start(
        FIREZONE_API_URL=f"wss://{NAME}",
        HTTPS_PROXY="socks5://edge:s3cret@127.0.0.1:1080",
        NO_PROXY="",
        no_proxy="",
    ).fails()
    assert "HTTPS_PROXY names a proxy with the scheme 'socks5'; only http:// can be used" in line
    assert "s3cret" not in line
