"""The Containerfile and its entry script. No daemon is needed: its instructions are carried out by hand."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from machine import Machine, cannot_boot, debian_root

from fzg.commands import COMMANDS
from tests.lab.portal_client import TOKEN
from tests.lab.process import REPOSITORY, wait_until
from tests.lab.scenario import Lab

FOLDER = REPOSITORY / "packaging" / "container"
ENTRY = FOLDER / "entrypoint"
READ_IN_ORDER = ("FROM", "ARG", "COPY", "COPY", "ENV", "HEALTHCHECK", "ENTRYPOINT", "CMD")


def instructions():
    lines = (FOLDER / "Containerfile").read_text().splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line and not line.startswith("#")]


def one(name):
    (value,) = [rest for word, rest in instructions() if word == name]
    return value


def copies():
    """What is copied to where; the built file's name is the argument's default."""
    default = dict([one("ARG").split("=", 1)])
    for word, rest in instructions():
        if word == "COPY":
            source, target = (re.sub(r"\$\{(\w+)\}", lambda name: default[name[1]], part) for part in rest.split())
            yield source, target


def test_it_consists_of_what_every_builder_knows():
    assert tuple(word for word, _ in instructions()) == READ_IN_ORDER
    name, tag = one("FROM").rsplit(":", 1)
    assert name.count("/") == 2  # names its registry: podman asks otherwise
    assert tag != "latest"


def test_what_it_copies_is_in_the_sources_or_made_by_make_and_not_ignored():
    sources = [source for source, _ in copies()]
    assert sources == ["dist/firezone-gateway", "packaging/container/entrypoint"]
    assert os.access(ENTRY, os.X_OK)
    let_in = (FOLDER / "Containerfile.dockerignore").read_text().split()
    assert let_in[0] == "*"
    assert {f"!{source}" for source in sources} <= set(let_in)


def test_its_health_check_is_a_command_of_the_program():
    check = re.search(r"CMD (\[.*\])$", one("HEALTHCHECK"))
    program, word = json.loads(check[1])
    assert program == json.loads(one("CMD"))[0]
    assert word in COMMANDS


def entry(*command, **environment):
    return subprocess.run(
        [ENTRY, *command],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_token_may_be_a_path(tmp_path):
    secret = tmp_path / "token"
    secret.write_text(f"{TOKEN}\n")
    show = ("sh", "-c", 'echo "<$FIREZONE_TOKEN>"')
    assert entry(*show, FIREZONE_TOKEN=str(secret)).stdout == f"<{TOKEN}>\n"
    assert entry(*show, FIREZONE_TOKEN=TOKEN).stdout == f"<{TOKEN}>\n"
    assert entry(*show).stdout == "<>\n"


def test_a_secret_that_cannot_be_read_ends_it(tmp_path):
    done = entry("echo", "on", FIREZONE_TOKEN=str(tmp_path))  # a directory: what a missing file is mounted as
    assert (done.returncode, done.stdout) == (1, "")
    assert str(tmp_path) in done.stderr


def test_options_alone_are_the_gateways(tmp_path):
    program = tmp_path / "firezone-gateway"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert entry("--flow-logs", "-n", "a b", PATH=path).stdout == "--flow-logs -n a b\n"


@pytest.mark.needs("shellcheck")
def test_the_script_is_free_of_what_shellcheck_knows():
    done = subprocess.run(["shellcheck", ENTRY], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.long
@pytest.mark.root
@pytest.mark.timeout(600)
@pytest.mark.needs("namespaces", "tun", "ip", "nft", "mmdebstrap", "objdump", "strip")
def test_as_first_process_of_a_minimal_debian_it_becomes_healthy_serves_a_client_and_ends(frozen, tmp_path):
    if reason := cannot_boot():
        pytest.skip(f"not applicable: {reason}")
    image = tmp_path / "image"
    for source, target in copies():
        place = image / target.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(frozen if source.startswith("dist/") else REPOSITORY / source, place)
    secret = image / "etc" / "firezone-token"
    secret.parent.mkdir()
    secret.write_text(f"{TOKEN}\n")
    with Lab("direct", start_gateway=False) as lab:
        place = lab.places["gateway"].namespace
        (image / "etc" / "resolv.conf").write_text(place.run("cat", "/etc/resolv.conf").stdout)
        variables = {
            **dict([one("ENV").split("=", 1)]),
            "FIREZONE_TOKEN": "/etc/firezone-token",
            "FIREZONE_ID": "in-a-container",
            "FIREZONE_API_URL": lab._portal_url_at("gateway"),
            "TMP": "/var/tmp",  # the machine's /tmp is mounted noexec
        }
        init = ["env", *(f"{name}={value}" for name, value in variables.items())]
        init += [*json.loads(one("ENTRYPOINT")), *json.loads(one("CMD"))]
        prefix = place.prefix(binds=False)
        with Machine(
            tmp_path / "machine", lower=f"{image}:{debian_root()}", init=shlex.join(init), prefix=prefix
        ) as box:
            check = json.loads(re.search(r"CMD (\[.*\])$", one("HEALTHCHECK"))[1])

            def healthy():
                assert Path(f"/proc/{box.pid}").exists(), box.log
                return box.run(*check, check=False, TMP="/var/tmp").returncode == 0

            wait_until(healthy, timeout=30, what=f"the container is healthy; {box.log}")
            (gateway,) = lab.portal.state()["gateways"].values()
            assert gateway["external_id"] == "in-a-container"
            assert lab.start_client(0).curl("http://10.20.0.100/get").ok
            os.kill(box.pid, 15)
            wait_until(lambda: not Path(f"/proc/{box.pid}").exists(), timeout=15, what=f"the end; {box.log}")
            assert "Goodbye" in box.log
