"""The watch that fails a test when a secret is said: it must notice what it claims to notice."""

from __future__ import annotations

import base64
import json

import pytest

from fzg.wireguard.keys import KeyPair
from tests.lab.secrets import Watch

TOKEN = ".SFMyNTY.c2VjcmV0LXRva2Vu.c2lnbmF0dXJl"
KEY = bytes(range(32))


@pytest.fixture
def watch():
    return Watch()


def test_a_secret_in_a_log_is_noticed_and_not_repeated(watch):
    watch.add(TOKEN, "token")
    watch.hear("the log", f"one line\nBearer {TOKEN}, said\nanother")
    (leak,) = {str(leak) for leak in watch.leaks()}
    assert leak == "token in the log: Bearer <the secret>, said"


@pytest.mark.parametrize("form", [KEY.hex(), base64.b64encode(KEY).decode()])
def test_bytes_are_noticed_in_hex_and_in_base64(watch, form):
    watch.add(KEY, "key")
    watch.hear("the log", f"key={form} ")
    assert {leak.what for leak in watch.leaks()} == {"key"}


def test_secrets_of_earlier_tests_are_noticed_as_words(watch):
    watch.add("dtQLwvW7CXikdtQLwvW7CXik", "password")
    watch.hear("first", "nothing")
    assert watch.leaks() == []
    watch.hear("second", '{"password":"dtQLwvW7CXikdtQLwvW7CXik"}')
    assert [leak.where for leak in watch.leaks()] == ["second"]


def test_what_is_in_a_portal_s_messages_is_noticed_by_its_key(watch, tmp_path):
    payload = {"relays": [{"username": "public-name", "password": "4xl1v/gk+pPzA"}], "preshared_key": "dtQLwvW7CXik"}
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text(json.dumps({"direction": "out", "payload": payload}) + "\n{half")
    watch.add_ledger(ledger)
    assert set(watch.secrets) == {"4xl1v/gk+pPzA", "dtQLwvW7CXik"}


@pytest.mark.parametrize("text", [bytes.hex, lambda key: base64.b64encode(key).decode()])
def test_a_private_key_is_known_by_the_public_key_that_it_makes(watch, text):
    pair = KeyPair.generate(lambda size: KEY[:size])
    query = base64.b64encode(pair.public).decode().replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    watch.add_request(f"/gateway/v2/websocket?public_key={query}", [("X-Authorization", f"Bearer {TOKEN}")])
    watch.hear("the log", f"public={text(pair.public)} other={text(bytes(range(1, 33)))}")
    assert watch.leaks() == []
    watch.hear("the log", f"private={text(pair.private.reveal())}")
    assert [leak.what for leak in watch.leaks()] == ["the gateway's private key"]


def test_a_log_is_read_once_also_when_it_grows(watch, tmp_path):
    watch.add(TOKEN, "token")
    log = tmp_path / "gateway.log"
    log.write_text(TOKEN)
    watch.hear_log("gateway", log)
    assert watch.leaks() != []
    log.write_text(TOKEN + "\nmore")
    watch.hear_log("gateway", log)
    assert watch.leaks() == []


@pytest.mark.parametrize("value", ["short", "aaaaaaaaaaaaaaaa", "11111111-2222-4333-8444-555555555555"])
def test_what_stands_in_texts_by_chance_or_right_is_no_secret(watch, value):
    watch.add(value, "secret")
    assert watch.secrets == {}
