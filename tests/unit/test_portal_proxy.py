from __future__ import annotations

import base64

import pytest

from fzg.portal.proxy import InvalidProxy, Proxy, proxy_for

HOST = "api.firezone.dev"
PROXY = "http://proxy.example:3128"


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("http://proxy.example:3128", "proxy.example", 3128),
        ("http://proxy.example:3128/", "proxy.example", 3128),
        (" proxy.example:3128\n", "proxy.example", 3128),
        ("http://proxy.example", "proxy.example", 80),
        ("http://192.0.2.1:8080", "192.0.2.1", 8080),
        ("http://[2001:db8::1]:8080", "2001:db8::1", 8080),
    ],
)
def test_a_proxy_is_a_host_and_a_port(text, host, port):
    assert Proxy.parse(text) == Proxy(host, port)


def test_credentials_become_a_header_that_is_never_shown():
    proxy = Proxy.parse("http://edge%40site:p%3Ass%2Fword@proxy.example:3128")
    assert base64.b64decode(proxy.authorization.reveal().removeprefix("Basic ")) == b"edge@site:p:ss/word"
    assert str(proxy) == "proxy.example:3128"
    assert "Basic" not in repr(proxy)


def test_the_request_names_the_portal_twice_and_carries_the_credentials():
    encoded = base64.b64encode(b"edge:secret").decode()
    assert (
        Proxy.parse("http://edge:secret@proxy.example:3128").request(HOST, 443)
        == (f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: {HOST}:443\r\nProxy-Authorization: Basic {encoded}\r\n\r\n").encode()
    )
    assert Proxy("p", 80).request("2001:db8::9", 443) == (
        b"CONNECT [2001:db8::9]:443 HTTP/1.1\r\nHost: [2001:db8::9]:443\r\n\r\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hunter2@proxy.example",
        "socks5://user:hunter2@proxy.example:1080",
        "http://user:hunter2@:3128",
        "http://user:hunter2@proxy.example:99999",
        "http://user:hunter2@[::1",
        "http://user:hunter2@a b:80",
        "http://user:hunter2@pröxy:80",
    ],
)
def test_what_cannot_be_used_is_refused_with_the_variable_and_without_the_password(text):
    with pytest.raises(InvalidProxy, match="HTTPS_PROXY") as caught:
        proxy_for(HOST, 443, {"HTTPS_PROXY": text})
    assert "hunter2" not in str(caught.value)


def test_the_environment_names_the_proxy_and_lower_case_wins():
    assert proxy_for(HOST, 443, {}) is None
    assert proxy_for(HOST, 443, {"HTTPS_PROXY": " ", "HTTP_PROXY": PROXY}) is None
    assert proxy_for(HOST, 443, {"HTTPS_PROXY": PROXY}) == Proxy("proxy.example", 3128)
    both = {"HTTPS_PROXY": PROXY, "https_proxy": "http://other.example:1"}
    assert proxy_for(HOST, 443, both) == Proxy("other.example", 1)


@pytest.mark.parametrize(
    ("entries", "host", "exempt"),
    [
        ("*", HOST, True),
        ("firezone.dev", HOST, True),
        (".firezone.dev", HOST, True),
        ("*.firezone.dev", HOST, True),
        ("localhost, API.Firezone.DEV", HOST, True),
        ("api.firezone.dev:443", HOST, True),
        ("api.firezone.dev:8443", HOST, False),
        ("zone.dev", HOST, False),
        ("api.firezone.dev.example", HOST, False),
        ("", HOST, False),
        (",", HOST, False),
        ("192.0.2.0/24", "192.0.2.7", True),
        ("192.0.2.7", "192.0.2.7", True),
        ("192.0.2.7:443", "192.0.2.7", True),
        ("192.0.3.0/24,10.0.0.1", "192.0.2.7", False),
        ("2001:db8::/32", "2001:db8::7", True),
        ("[2001:db8::7]", "2001:db8::7", True),
        ("2001:db8::/32", "192.0.2.7", False),
        ("10.0.0.0/8", HOST, False),
    ],
)
@pytest.mark.parametrize("variable", ["NO_PROXY", "no_proxy"])
def test_no_proxy_exempts_domains_addresses_and_networks(entries, host, exempt, variable):
    found = proxy_for(host, 443, {"HTTPS_PROXY": PROXY, variable: entries})
    assert (found is None) is exempt
