"""Pseudonyms in support archives: the same for the same, and nothing left of the original."""

from __future__ import annotations

import json

import pytest

from fzg.ops.anonymise import Anonymiser, without_credentials


def anonymous(text, **names):
    return Anonymiser(names).text(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("to 203.0.113.9:443 now", "to ipv4-public-1:443 now"),
        ("10.1.2.3 and 10.1.2.3 and 10.1.2.4", "ipv4-private-1 and ipv4-private-1 and ipv4-private-2"),
        ("[2001:db8::7]:52625", "[ipv6-public-1]:52625"),
        ("100.66.1.2, fd00:2021:1111::1:2", "ipv4-tunnel-1, ipv6-tunnel-1"),
        ("100.96.0.1 fd00:2021:1111:8000::1", "ipv4-proxy-1 ipv6-proxy-1"),
        ("route 192.168.7.0/24 via fe80::1", "route ipv4-private-1/24 via ipv6-link-local-1"),
        ("::ffff:203.0.113.9", "ipv6-public-1"),
        ('{"ip":"203.0.113.9"}', '{"ip":"ipv4-public-1"}'),
        ("cid=11111111-2222-4333-8444-555555555555.", "cid=id-1."),
        ("id 4F8524FD33934A31A180A598F9457D80", "id id-1"),
        ("key ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8=", "key key-1"),
        ("link 02:42:ac:11:00:02", "link mac-1"),
        ("from jo.doe+x@example.org", "from mail-1"),
        ("resolved wiki.example.com.", "resolved name-1."),
        ("pattern *.Example.com and **.example.com", "pattern name-1 and name-1"),
        ("/home/alice/fg: and /home/alice", "/home/user-1/fg: and /home/user-1"),
    ],
)
def test_what_identifies_somebody_is_replaced(text, shown):
    assert anonymous(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "2026-08-20T10:11:12.345Z  INFO fzg::portal::websocket: Connected",
        "version 1.6.1 on Linux 6.1.0-18-amd64",
        "net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.core.rmem_max",
        "listening on 0.0.0.0:8080, 127.0.0.1 and [::1]:8080 and [::]",
        "routes 100.64.0.0/11 fd00:2021:1111::/107 0.0.0.0/0 ::/0",
        "api.firezone.dev",
        "/etc/resolv.conf, doctor.json and firezone-gateway.service",
        "path=PeerToPeer cpu=100% 3.5 s a:b::c::d",
    ],
)
def test_what_support_needs_stays(text):
    assert anonymous(text) == text


def test_known_names_are_found_whole_and_the_longest_first():
    names = {"host": ["gw1", "gw1-berlin"], "resource": ["Payroll (HR)"], "name": ["intranet"]}
    shown = anonymous("gw1-berlin, gw1: Payroll (HR) at intranet; gw12 x-gw1", **names)
    assert shown == "host-1, host-2: resource-1 at name-1; gw12 x-gw1"


def test_json_stays_json():
    line = json.dumps({"fields": {"address": "10.0.0.1:1", "note": 'say "no" to 10.0.0.1'}, "n": 3})
    assert json.loads(anonymous(line)) == {
        "fields": {"address": "ipv4-private-1:1", "note": 'say "no" to ipv4-private-1'},
        "n": 3,
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Authorization: Bearer abc.def-ghi", "Authorization: ***"),
        (".SFMyNTY.c2VjcmV0.c2lnbmF0dXJl", "***"),
        ("wss://user:pass@portal.example.com/x", "wss://***@portal.example.com/x"),
        ("x eyJhbGciOi.eyJzdWIiOi.c2ln y", "x *** y"),
    ],
)
def test_what_looks_like_a_credential_is_masked_in_any_case(text, shown):
    assert without_credentials(text) == shown
