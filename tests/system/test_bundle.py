"""The support archive: complete, anonymous unless asked otherwise, and never with a secret."""

from __future__ import annotations

import io
import json
import re
import stat
import tarfile

import pytest
from gateway_process import TOKEN
from test_command_line import AUTHORIZATION, CLIENT, RELAY, RESOURCE, SECRETS
from test_control_socket import operator

from tests.lab.scenario import Lab
from tests.lab.scripted_portal import wait_until

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.needs("namespaces", "tun", "ip", "nft")]

FILES = {
    "README.txt",
    "doctor.json",
    "log.txt",
    "machine.json",
    "network.json",
    "problems.txt",
    "settings.json",
    "status.json",
    "sysctl.json",
}


def unpacked(path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        members = {member.name.removeprefix("firezone-gateway/"): member for member in archive.getmembers()}
        assert all(member.isfile() for member in members.values())
        return {name: archive.extractfile(member).read().decode() for name, member in members.items()}


@pytest.fixture
def busy(portal, start):
    """A gateway that logs all it can, with a client whose every secret is known."""
    init = portal.push_after_join[0][1] | {"relays": [RELAY]}
    named = AUTHORIZATION | {
        "resource": {
            "type": "dns",
            "id": RESOURCE,
            "name": "Payroll Berlin",
            "address": "*.corp.example",
            "filters": [],
        }
    }
    portal.push_after_join = [("init", init)]
    gateway = start(portal=portal, RUST_LOG="trace", FIREZONE_NAME="rack-seven", FIREZONE_ID="berlin-gateway-id")
    gateway.wait_ready()
    portal.connection(0).push("create_authorization", named)
    gateway.says("create_authorization")
    return gateway


def test_no_secret_is_in_the_archive_whether_it_is_anonymous_or_not(busy, tmp_path):
    for number, words in enumerate([[], ["--no-anonymise"]]):
        file = tmp_path / f"{number}.tar.gz"
        done = operator(busy, "bundle", "--output", str(file), *words)
        assert done.returncode == 0, done.stderr
        content = unpacked(file)
        assert set(content) >= FILES
        whole = "\n".join(content.values())
        for secret in (TOKEN, *SECRETS, RELAY["username"]):
            assert secret not in whole
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert "Logging started" in content["log.txt"]
        assert json.loads(content["settings.json"])["token"] == "Secret(***)"
        assert json.loads(content["status.json"])["portal"]["state"] == "connected"
        assert json.loads(content["doctor.json"])


def test_names_and_ids_are_pseudonyms_unless_they_are_wanted(busy, tmp_path):
    identities = ["rack-seven", "berlin-gateway-id", CLIENT, RESOURCE, RELAY["id"], "100.66.1.2", "100.71.4.9"]
    identities += ["Payroll Berlin", "corp.example", "fd00:2021:1111::1:2"]
    operator(busy, "bundle", "--output", str(tmp_path / "anonymous"))
    whole = "\n".join(unpacked(tmp_path / "anonymous").values())
    assert [each for each in identities if each in whole] == []
    operator(busy, "bundle", "--no-anonymise", "--output", str(tmp_path / "full"))
    full = unpacked(tmp_path / "full")
    assert "rack-seven" in full["settings.json"]
    assert "wire::api" in full["log.txt"]
    assert "wire::" not in unpacked(tmp_path / "anonymous")["log.txt"]


def test_json_says_where_the_archive_is_and_a_default_name_overwrites_nothing(busy, tmp_path):
    done = operator(busy, "bundle", "--json", prefix=["env", "-C", str(tmp_path)])
    shown = json.loads(done.stdout)
    assert re.fullmatch(r"firezone-gateway-\d{8}-\d{6}\.tar\.gz", shown["file"])
    assert shown["anonymous"] is True
    assert shown["problems"] == []
    assert (tmp_path / shown["file"]).exists()


def test_a_place_that_cannot_be_written_is_named_in_one_line(busy):
    done = operator(busy, "bundle", "--output", "/nowhere/there.tar.gz")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "/nowhere/there.tar.gz cannot be written: No such file or directory" in done.stderr


def test_without_a_gateway_the_archive_tells_of_the_host(portal, start, tmp_path):
    gateway = start(portal=portal)
    gateway.wait_ready()
    gateway.terminate()
    done = operator(gateway, "bundle", "--output", str(tmp_path / "host.tar.gz"))
    assert done.returncode == 0, done.stderr
    content = unpacked(tmp_path / "host.tar.gz")
    assert set(content) >= FILES - {"status.json", "settings.json", "log.txt"}
    assert "no gateway is running here" in content["problems.txt"]
    assert "no gateway is running here" in done.stdout
    assert json.loads(content["sysctl.json"])["net.ipv4.ip_forward"] in {"0", "1"}


def test_addresses_of_users_are_in_no_file_of_an_anonymous_archive():
    with Lab("direct", gateway_environment={"RUST_LOG": "trace"}) as lab:
        assert lab.client.ping("10.20.0.100")
        assert lab.client.curl("http://download.httpbin/bytes?num=10").ok
        (client,) = json.loads(lab.gateway.command("status", "--json").stdout)["clients"]
        proxies = set(re.findall(r"100\.96\.\d+\.\d+", lab.gateway.process.log_text()))
        place = lab.places["client1"]
        users = {*client["addresses"], place.public_ipv4, place.public_ipv6, "10.20.0.100", "172.21.0.101"}
        users |= {"download.httpbin", client["id"], *proxies}
        log = wait_until(lambda: place.public_ipv4 in (text := lab.gateway.process.log_text()) and text, "its address")
        assert any(each in log for each in client["addresses"])
        file = lab.directory / "bundle.tar.gz"
        lab.gateway.command("bundle", "--output", str(file))
        content = unpacked(file)
        for name, text in content.items():
            assert [each for each in users if re.search(rf"(?<![\w.:]){re.escape(each)}(?![\w.:])", text)] == [], name
        assert "ipv4-tunnel-" in content["status.json"]


def test_the_archive_may_go_to_standard_output(busy):
    done = operator(busy, "bundle", "--output", "-", text=False)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        assert "firezone-gateway/README.txt" in archive.getnames()
