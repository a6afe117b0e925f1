"""Identity of the gateway and its token (spec portal 1.2, operations 1.3, 1.4)."""

from __future__ import annotations

import hashlib
import json
import re

import pytest

from fzg.portal import identity
from fzg.portal.identity import IdentityError, external_id, find_token, firezone_id, gateway_name

MACHINE_ID = "0123456789abcdef0123456789abcdef\n"
DERIVED = "eeefe5d1cb3807dfc3ae24794878ec3147027390d839d1d718d8e42bcfde3336"


@pytest.fixture
def host(tmp_path):
    class Host:
        state = tmp_path / "lib" / "firezone"
        machine_id = tmp_path / "machine-id"
        file = state / "gateway_id"

        def ident(self, configured=None, **options):
            return firezone_id(configured, state_directory=self.state, machine_id=self.machine_id, **options)

        def store(self, content):
            self.state.mkdir(parents=True)
            self.file.write_text(content)

    return Host()


@pytest.mark.spec("OPS-9", "PORTAL-4")
@pytest.mark.parametrize(("ident", "sent"), [
    (DERIVED, DERIVED),
    ("4f8524fd33934a31a180a598f9457d80", "05c3f2f2c55836a4376ca0c0154d5d2d4898644c2366c64c2cc13ca6302dc701"),
    ("f47ac10b-58cc-4372-a567-0e02b2c3d479", "8f400c257611ed5d30c0e6607ac61074307dfa24cf70a8e92c3e8147d67d2c70"),
    ("3f1c2b9e-7a44-4d0e-9b1f-0c5d8e6a7b21", "d6876adf3ac73dd5965d93a80724459b48501a369866a2afc5782b66e8048867"),
    ("edge-1", "edge-1"),
    ("f47ac10b-58cc-4372-a567-0e02b2c3d47", "f47ac10b-58cc-4372-a567-0e02b2c3d47"),
    ("f47ac10b58cc-4372-a567-0e02b2c3d479", "f47ac10b58cc-4372-a567-0e02b2c3d479"),
])  # fmt: skip
def test_an_id_that_reads_as_a_uuid_is_sent_as_the_hash_of_its_text(ident, sent):
    assert external_id(ident) == sent


@pytest.mark.spec("OPS-9")
@pytest.mark.parametrize("form", ["{}", "{{{}}}", "urn:uuid:{}"])
@pytest.mark.parametrize("case", [str, str.upper])
def test_every_spelling_of_a_uuid_is_hashed_as_it_is_written(form, case):
    text = form.format(case("f47ac10b-58cc-4372-a567-0e02b2c3d479"))
    assert external_id(text) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.spec("OPS-9")
def test_without_anything_stored_the_id_is_derived_from_the_machine_and_not_stored(host):
    host.machine_id.write_text(MACHINE_ID)
    assert host.ident() == DERIVED
    assert host.ident("") == DERIVED
    assert not host.state.exists()


@pytest.mark.spec("OPS-11")
def test_the_derived_id_needs_no_writable_directory(host):
    host.machine_id.write_text(MACHINE_ID)
    host.state.parent.write_text("a file where the directory would be")
    assert host.ident() == DERIVED


def test_a_configured_id_wins_over_everything(host):
    host.machine_id.write_text(MACHINE_ID)
    host.store('{"id":"stored"}')
    assert host.ident("edge-1") == "edge-1"


@pytest.mark.spec("OPS-10")
@pytest.mark.parametrize("content", [
    '{"id":"stored-id"}', ' {"id": "stored-id", "more": 1}\n', "stored-id", "stored-id\n",
])  # fmt: skip
def test_a_stored_id_is_read_in_both_forms_and_not_rewritten(host, content):
    host.machine_id.write_text(MACHINE_ID)
    host.store(content)
    assert host.ident() == "stored-id"
    assert host.file.read_text() == content
    assert host.file.stat().st_mode & 0o777 == 0o640
    assert host.state.stat().st_mode & 0o777 == 0o770


@pytest.mark.parametrize("content", [
    "", "\n", '{"id":7}', "{}", '{"id":""}', '["x"]', "two words", "two\nlines", "\x00\x01", "x" * 5000,
    '{"id":"a\\nb"}',
])  # fmt: skip
def test_a_file_without_an_id_counts_as_absent_and_is_never_overwritten(host, content):
    host.store(content)
    with pytest.raises(IdentityError, match="FIREZONE_ID"):
        host.ident()
    assert host.file.read_text() == content
    host.machine_id.write_text(MACHINE_ID)
    assert host.ident() == DERIVED


@pytest.mark.spec("OPS-12", "PORTAL-5")
def test_a_random_id_is_stored_whole_with_mode_0640_and_used_again(host):
    ident = host.ident(random=lambda n: bytes(range(n)))
    assert ident == hashlib.sha256(b"00010203-0405-4607-8809-0a0b0c0d0e0f").hexdigest()
    assert json.loads(host.file.read_text()) == {"id": ident}
    assert host.file.stat().st_mode & 0o777 == 0o640
    assert host.state.stat().st_mode & 0o777 == 0o770
    assert [path.name for path in host.state.iterdir()] == ["gateway_id"]
    assert host.ident() == ident


def test_a_start_that_was_overtaken_takes_the_id_of_the_other(host):
    def race(n):
        host.store('{"id":"faster"}')
        return bytes(n)

    assert host.ident(random=race) == "faster"
    assert [path.name for path in host.state.iterdir()] == ["gateway_id"]


def test_without_any_place_for_an_id_the_error_names_the_remedies(host):
    host.state.parent.write_text("a file where the directory would be")
    with pytest.raises(IdentityError, match=r"set FIREZONE_ID or give write access to .*firezone"):
        host.ident()


@pytest.mark.parametrize("content", ["", "\n", "uninitialized\n"])
def test_the_machine_id_of_an_image_is_no_identity(host, content):
    host.machine_id.write_text(content)
    assert re.fullmatch("[0-9a-f]{64}", host.ident())
    assert host.file.exists()


@pytest.mark.spec("PORTAL-7")
def test_the_name_is_configured_or_the_hosts_or_random():
    assert gateway_name("edge 1", "host") == "edge 1"
    assert gateway_name(None, "host") == "host"
    assert gateway_name("  ", " host ") == "host"
    assert gateway_name(None, None, random=lambda n: bytes(range(n))) == "00010203-0405-4607-8809-0a0b0c0d0e0f"
    assert len(gateway_name("x" * 300, None)) == 255


@pytest.mark.spec("OPS-13")
def test_the_token_comes_from_argument_variable_or_credential_in_this_order(tmp_path):
    (tmp_path / "FIREZONE_TOKEN").write_text(" .SFMyNTY.\n credential\r\n")
    assert find_token(" argu\nment\t", "variable", tmp_path).reveal() == "argument"
    assert find_token(None, "vari able\n", tmp_path).reveal() == "variable"
    assert find_token(None, None, tmp_path).reveal() == ".SFMyNTY.credential"
    assert find_token(None, "", tmp_path).reveal() == ""


@pytest.mark.parametrize("directory", [None, "empty"])
def test_a_missing_token_is_an_error_that_names_all_three_sources(tmp_path, directory):
    with pytest.raises(IdentityError, match=r"argument.*FIREZONE_TOKEN.*systemd credential"):
        find_token(None, None, tmp_path if directory else None)


def test_the_defaults_are_the_paths_of_the_specification():
    assert str(identity.STATE_DIRECTORY) == "/var/lib/firezone"
    assert str(identity.MACHINE_ID) == "/etc/machine-id"
