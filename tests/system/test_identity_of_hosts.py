"""Who a gateway is on hosts of all kinds, and which token it shows, as its portal sees it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.lab.process import lab_environment
from tests.lab.program import gateway_command

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.needs("namespaces", "tun", "ip", "nft")]

MACHINE_ID = "0123456789abcdef0123456789abcdef\n"
DERIVED = "eeefe5d1cb3807dfc3ae24794878ec3147027390d839d1d718d8e42bcfde3336"
NO_MACHINE_ID = "uninitialized\n"  # as in an image that never ran
UUID = "f47ac10b-58cc-4372-a567-0e02b2c3d479"
SPELLINGS = (UUID.upper(), f"{{{UUID}}}", f"urn:uuid:{UUID}")


@pytest.fixture
def state(namespace, tmp_path):
    """The host's /var/lib, empty, on a host with the machine id of the specification."""
    namespace.file("/etc/machine-id", MACHINE_ID)
    namespace.bind("/var/lib", tmp_path)
    return tmp_path / "firezone"


def identity(portal, number=-1):
    return parse_qs(urlsplit(portal.connections[number].request.path).query)["external_id"][0]


def joined(start, portal, *arguments, **environment):
    """The identity with which a gateway joins; it ends again."""
    gateway = start(*arguments, portal=portal, **environment)
    gateway.wait_ready()
    assert gateway.terminate() == 0
    assert gateway.levels() == {"INFO"}
    return identity(portal)


@pytest.mark.spec("OPS-9")
@pytest.mark.parametrize(
    ("configured", "sent"),
    [
        (None, DERIVED),
        ("4f8524fd33934a31a180a598f9457d80", "05c3f2f2c55836a4376ca0c0154d5d2d4898644c2366c64c2cc13ca6302dc701"),
        (UUID, "8f400c257611ed5d30c0e6607ac61074307dfa24cf70a8e92c3e8147d67d2c70"),
        *((text, hashlib.sha256(text.encode()).hexdigest()) for text in SPELLINGS),
        ("edge-1", "edge-1"),
    ],
)
def test_the_identities_of_the_specification(namespace, state, configured, sent):
    variables = lab_environment() | ({"FIREZONE_ID": configured} if configured else {})
    assignments = [f"{name}={value}" for name, value in variables.items()]
    done = namespace.run("env", "-u", "FIREZONE_ID", *assignments, *gateway_command(), "id", "--json")
    assert json.loads(done.stdout)["external_id"] == sent
    assert not state.exists()


@pytest.mark.spec("OPS-10")
@pytest.mark.parametrize("content", ['{"id":"kept-by-the-original"}', "kept-by-the-original\n"], ids=["json", "text"])
def test_the_identity_that_the_original_stored_is_kept_as_it_is(portal, start, state, content):
    state.mkdir()
    file = state / "gateway_id"
    file.write_text(content)
    before = file.stat()
    assert joined(start, portal, FIREZONE_ID=None) == "kept-by-the-original"
    assert file.read_text() == content
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.spec("OPS-9", "OPS-11")
def test_a_host_that_lets_nothing_be_stored_is_known_by_its_machine_id(namespace, portal, start, state):
    namespace.bind("/var/lib", Path("/proc"))
    assert joined(start, portal, FIREZONE_ID="") == DERIVED


@pytest.mark.spec("OPS-12")
def test_an_identity_made_up_is_stored_whole_and_used_again(namespace, portal, start, state):
    namespace.file("/etc/machine-id", NO_MACHINE_ID)
    first = joined(start, portal, FIREZONE_ID=None)
    assert re.fullmatch("[0-9a-f]{64}", first)
    (file,) = state.iterdir()
    assert file.name == "gateway_id"
    assert json.loads(file.read_text()) == {"id": first}
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert joined(start, portal, FIREZONE_ID=None) == first
    assert os.listdir(state) == ["gateway_id"]


@pytest.mark.spec("OPS-13", "OPS-2")
def test_the_token_is_the_arguments_before_the_variables_before_the_credentials(portal, start, tmp_path):
    (tmp_path / "FIREZONE_TOKEN").write_text(" third\ntoken\n")
    sources = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    joined(start, portal, " first to ken\n", FIREZONE_TOKEN="second", **sources)
    joined(start, portal, FIREZONE_TOKEN="sec ond\ttoken", **sources)
    shown = [connection.request.headers["X-Authorization"] for connection in portal.connections]
    assert shown == ["Bearer firsttoken", "Bearer secondtoken"]
