"""`firezone-gateway id`: the identity of this host, without making one, or a fresh one."""

from __future__ import annotations

import json
import re

import click
import pytest

from fzg import commands
from fzg.portal import identity

MACHINE_ID = b"0123456789abcdef0123456789abcdef\n"
DERIVED = "eeefe5d1cb3807dfc3ae24794878ec3147027390d839d1d718d8e42bcfde3336"
GENUINE_PEEK = identity.peek


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host with a machine id and no stored identity; its two files are in the directory."""
    (tmp_path / "machine-id").write_bytes(MACHINE_ID)
    peek = lambda configured: GENUINE_PEEK(
        configured, state_directory=tmp_path / "state", machine_id=tmp_path / "machine-id"
    )
    monkeypatch.setattr(identity, "peek", peek)
    return tmp_path


def run(capsys, *words, firezone_id=None):
    assert commands.run("id", words, {"firezone_id": firezone_id}) == 0
    return capsys.readouterr().out


@pytest.mark.spec("OPS-9")
def test_the_configured_id_is_shown_as_the_portal_sees_it(host, capsys):
    shown = json.loads(run(capsys, "--json", firezone_id="f47ac10b-58cc-4372-a567-0e02b2c3d479"))
    assert shown == {
        "firezone_id": "f47ac10b-58cc-4372-a567-0e02b2c3d479",
        "external_id": "8f400c257611ed5d30c0e6607ac61074307dfa24cf70a8e92c3e8147d67d2c70",
        "source": "FIREZONE_ID",
    }


def test_without_one_it_comes_from_the_machine_and_nothing_is_stored(host, capsys):
    assert run(capsys).splitlines() == [
        f"firezone_id  {DERIVED}",
        f"external_id  {DERIVED}",
        f"source       {host}/machine-id",
    ]
    assert not (host / "state").exists()


def test_a_stored_id_comes_before_the_machine_s(host, capsys):
    (host / "state").mkdir()
    (host / "state" / "gateway_id").write_text('{"id":"kept"}')
    assert json.loads(run(capsys, "--json"))["firezone_id"] == "kept"


def test_a_host_without_any_identity_is_told_how_to_get_one(host, capsys):
    (host / "machine-id").unlink()
    with pytest.raises(click.ClickException, match="firezone-gateway id --new"):
        run(capsys)
    assert not (host / "state").exists()


def test_a_new_id_is_64_random_hexadecimal_digits_alone_on_its_line(host, capsys):
    first, second = run(capsys, "--new"), run(capsys, "--new", firezone_id="configured")
    assert re.fullmatch(r"[0-9a-f]{64}\n", first)
    assert re.fullmatch(r"[0-9a-f]{64}\n", second)
    assert first != second
    shown = json.loads(run(capsys, "--new", "--json"))
    assert shown["external_id"] == shown["firezone_id"]
