"""The Debian package: what is in it, and what installing, upgrading, removing and purging it do to a host."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from typing import TYPE_CHECKING

import pytest
from machine import scratch_host

from tests.lab.process import REPOSITORY, wait_until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.needs("dpkg-deb")]

DEBIAN = REPOSITORY / "packaging" / "debian"
MACHINE_ID = "0123456789abcdef0123456789abcdef"
PACKAGE_ID = "4f8524fd33934a31a180a598f9457d80"  # operations 1.3: what packages of the original make of it
TOKEN = ".SFMyNTY.c2VjcmV0.c2lnbmF0dXJl"
PROMISED = {"/etc/firezone/gateway-env", "/etc/firezone/gateway-preset-env", "/etc/firezone/gateway-token"}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds the package of a version around a program that only says its version."""

    def build(version: str) -> Path:
        directory = tmp_path_factory.mktemp("package")
        program = directory / "program"
        program.write_text(
            f"#!/bin/sh\necho firezone-gateway {version}\n"
            '[ "$*" != "--version --verbose" ] || echo "C library: glibc 2.36, 2.34 or newer needed"\n'
        )
        program.chmod(0o755)
        output = directory / "dist"
        subprocess.run([DEBIAN / "build", sys.executable, program, output, version], check=True, cwd=REPOSITORY)
        (package,) = output.iterdir()
        return package

    return build


@pytest.fixture(scope="module")
def package(build):
    return build("1.6.1")


@pytest.fixture
def host(tmp_path):
    with scratch_host(tmp_path) as machine:
        machine.path("/etc/machine-id").write_text(MACHINE_ID + "\n")
        assert not machine.path("/etc/firezone").exists()
        yield machine


def put(host, package) -> str:
    shutil.copy(package, host.path("/root"))
    return f"/root/{package.name}"


def settings_of(host, path):
    return dict(re.findall(r"^(\w+)=(.*)$", host.path(path).read_text(), re.MULTILINE))


def state(host, path):
    return host.run("stat", "-c", "%A %U:%G", path).stdout.strip()


def test_the_package_holds_program_helper_unit_page_and_completion_and_nothing_else(package):
    listed = subprocess.run(["dpkg-deb", "-c", package], capture_output=True, text=True, check=True).stdout
    files = {line.split()[5].lstrip("."): tuple(line.split()[:2]) for line in listed.splitlines() if line[0] != "d"}
    assert files == {
        "/usr/bin/firezone": ("-rwxr-xr-x", "root/root"),
        "/usr/bin/firezone-gateway": ("-rwxr-x---", "root/root"),
        "/usr/lib/systemd/system/firezone-gateway.service": ("-rw-r--r--", "root/root"),
        "/usr/lib/sysusers.d/firezone-gateway.conf": ("-rw-r--r--", "root/root"),
        "/usr/lib/tmpfiles.d/firezone-gateway.conf": ("-rw-r--r--", "root/root"),
        "/usr/share/bash-completion/completions/firezone-gateway": ("-rw-r--r--", "root/root"),
        "/usr/share/doc/firezone-gateway/CHANGELOG.md.gz": ("-rw-r--r--", "root/root"),
        "/usr/share/doc/firezone-gateway/copyright": ("-rw-r--r--", "root/root"),
        "/usr/share/fish/vendor_completions.d/firezone-gateway.fish": ("-rw-r--r--", "root/root"),
        "/usr/share/man/man8/firezone.8.gz": ("-rw-r--r--", "root/root"),
        "/usr/share/man/man8/firezone-gateway.8.gz": ("-rw-r--r--", "root/root"),
        "/usr/share/zsh/vendor-completions/_firezone-gateway": ("-rw-r--r--", "root/root"),
    }
    assert {line.split()[1] for line in listed.splitlines()} == {"root/root"}


def test_its_description_names_what_it_needs(package):
    fields = subprocess.run(["dpkg-deb", "-f", package], capture_output=True, text=True, check=True).stdout
    assert "Package: firezone-gateway\nVersion: 1.6.1\n" in fields
    assert "Depends: libc6 (>= 2.34), zlib1g, systemd (>= 247)\n" in fields
    architecture = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, check=True).stdout
    assert f"Architecture: {architecture}" in fields
    assert "@" not in fields.replace("firezone-gateway@localhost", "")


def test_the_same_sources_give_the_same_package(build):
    assert build("1.6.1").read_bytes() == build("1.6.1").read_bytes()


@pytest.mark.needs("root", "namespaces", "systemd-sysusers")
@pytest.mark.spec("OPS-52", "OPS-54")
def test_it_keeps_token_settings_and_identity_until_it_is_purged(host, build, package):
    before = host.changed()
    older = put(host, build("1.6.0"))
    host.run("dpkg", "-i", older)
    assert state(host, "/usr/bin/firezone-gateway") == "-rwxr-x--- root:firezone"
    assert state(host, "/etc/firezone") == "drwxr-xr-x firezone:firezone"
    assert state(host, "/etc/firezone/gateway-token") == "-r-------- root:root"
    assert state(host, "/etc/firezone/gateway-env") == "-rw-r--r-- firezone:firezone"
    assert state(host, "/etc/firezone/gateway-preset-env") == "-rw-r--r-- firezone:firezone"
    assert settings_of(host, "/etc/firezone/gateway-preset-env") == {"FIREZONE_ID": PACKAGE_ID}
    assert re.search(r":/usr/sbin/nologin$", host.run("getent", "passwd", "firezone").stdout)
    assert host.run("systemctl", "is-enabled", "firezone-gateway", check=False).stdout == "disabled\n"

    host.run("firezone", "gateway", "authenticate", stdin=f"\n  {TOKEN} \n")
    assert host.path("/etc/firezone/gateway-token").read_text() == f"{TOKEN}\n"
    assert state(host, "/etc/firezone/gateway-token") == "-r-------- root:root"
    host.path("/etc/firezone/gateway-env").write_text("FIREZONE_NAME=bureau\n")
    host.run("systemctl", "enable", "firezone-gateway")

    host.run("dpkg", "-i", put(host, package))
    assert host.run("firezone-gateway", "--version").stdout == "firezone-gateway 1.6.1\n"
    assert state(host, "/usr/bin/firezone-gateway") == "-rwxr-x--- root:firezone"
    assert settings_of(host, "/etc/firezone/gateway-preset-env") == {"FIREZONE_ID": PACKAGE_ID}
    assert host.path("/etc/firezone/gateway-env").read_text() == "FIREZONE_NAME=bureau\n"
    assert host.path("/etc/firezone/gateway-token").read_text() == f"{TOKEN}\n"
    assert state(host, "/etc/firezone/gateway-token") == "-r-------- root:root"
    assert host.run("systemctl", "is-enabled", "firezone-gateway").stdout == "enabled\n"

    # Back again, as after an upgrade that was regretted; and an administrator's own mode is left alone.
    host.run("dpkg-statoverride", "--add", "root", "root", "0700", "/usr/bin/firezone-gateway")
    host.run("dpkg", "--force-downgrade", "-i", older)
    assert host.run("firezone-gateway", "--version").stdout == "firezone-gateway 1.6.0\n"
    assert state(host, "/usr/bin/firezone-gateway") == "-rwx------ root:root"
    assert host.path("/etc/firezone/gateway-token").read_text() == f"{TOKEN}\n"
    assert settings_of(host, "/etc/firezone/gateway-preset-env") == {"FIREZONE_ID": PACKAGE_ID}
    host.run("dpkg-statoverride", "--remove", "/usr/bin/firezone-gateway")

    host.run("dpkg", "-r", "firezone-gateway")
    kept = {path for path in host.changed() - before if "firezone" in path and not path.startswith("/root/")}
    assert {path for path in kept if not path.startswith("/var/lib/dpkg/")} == PROMISED
    host.run("install", "-d", "/var/lib/firezone/flow_logs")
    host.path("/var/lib/firezone/gateway_id").write_text("something")

    host.run("dpkg", "-P", "firezone-gateway")
    left = {path for path in host.changed() - before if "firezone" in path and not path.startswith("/root/")}
    assert left == set()
    assert not host.path("/etc/firezone").exists()
    assert not host.path("/var/lib/firezone").exists()
    assert not os.path.lexists(host.path("/etc/systemd/system/multi-user.target.wants/firezone-gateway.service"))
    assert host.run("getent", "passwd", "firezone").stdout  # promised: its number gets no other owner


@pytest.mark.needs("root", "namespaces", "systemd-sysusers")
@pytest.mark.spec("OPS-54")
def test_a_host_of_the_original_keeps_what_it_had(host, package):
    """Its package has the same names and paths, and makes the same identity of the machine's."""
    host.run("useradd", "--system", "--shell", "/usr/sbin/nologin", "firezone")
    host.run("install", "-d", "-o", "firezone", "-g", "firezone", "/etc/firezone")
    host.path("/etc/firezone/gateway-env").write_text("FIREZONE_NAME=old\nFIREZONE_ID=chosen\n")
    token = host.path("/etc/firezone/gateway-token")
    token.write_text(TOKEN)
    token.chmod(0o400)
    number = host.run("id", "-u", "firezone").stdout
    host.run("dpkg", "-i", put(host, package))
    assert host.path("/etc/firezone/gateway-env").read_text() == "FIREZONE_NAME=old\nFIREZONE_ID=chosen\n"
    assert token.read_text() == TOKEN
    assert host.run("id", "-u", "firezone").stdout == number
    assert settings_of(host, "/etc/firezone/gateway-preset-env") == {"FIREZONE_ID": PACKAGE_ID}


@pytest.mark.needs("root", "namespaces", "systemd-sysusers")
def test_a_host_without_machine_id_is_installed_and_told(host, package):
    host.path("/etc/machine-id").write_text("")
    done = host.run("dpkg", "-i", put(host, package))
    assert "no identity can be derived" in done.stderr
    assert host.path("/etc/firezone/gateway-preset-env").read_text() == ""


class TestTheHelper:
    """`firezone gateway …`."""

    @pytest.fixture(autouse=True)
    def _installed(self, host):
        shutil.copy(DEBIAN / "firezone", host.path("/usr/bin"))
        host.run("install", "-d", "/etc/firezone")
        self.host = host
        self.token = host.path("/etc/firezone/gateway-token")

    pytestmark = pytest.mark.needs("root", "namespaces")

    def helper(self, *arguments, **options):
        return self.host.run("firezone", *arguments, check=False, **options)

    def test_it_replaces_a_token_only_when_told_to(self):
        self.token.write_text("old\n")
        refused = self.helper("gateway", "authenticate", stdin=TOKEN)
        assert refused.returncode == 1
        assert "--replace" in refused.stderr
        assert self.token.read_text() == "old\n"
        replaced = self.helper("gateway", "authenticate", "--replace", stdin=TOKEN)
        assert replaced.returncode == 0
        assert self.token.read_text() == f"{TOKEN}\n"
        assert TOKEN not in replaced.stdout + replaced.stderr

    def test_no_token_at_all_ends_with_a_sentence(self):
        done = self.helper("gateway", "authenticate", stdin="\n\n")
        assert (done.returncode, self.token.exists()) == (1, False)
        assert "there was no token" in done.stderr
        assert list(self.token.parent.iterdir()) == []

    def test_on_a_terminal_the_token_is_not_shown(self):
        ours, theirs = pty.openpty()
        command = ["nsenter", f"--target={self.host.pid}", "--all", "firezone", "gateway", "authenticate"]
        with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as helper:
            os.close(theirs)
            shown = b""
            while b"Token" not in shown:
                shown += os.read(ours, 4096)
            wait_until(lambda: not termios.tcgetattr(ours)[3] & termios.ECHO, timeout=10, what="echo is off")
            os.write(ours, f"{TOKEN}\n".encode())
            with contextlib.suppress(OSError):  # the other end is closed
                while part := os.read(ours, 4096):
                    shown += part
            os.close(ours)
        assert helper.returncode == 0
        assert TOKEN.encode() not in shown
        assert self.token.read_text() == f"{TOKEN}\n"

    @pytest.mark.parametrize("command", ["authenticate", "enable-service", "disable-service"])
    def test_a_dry_run_changes_nothing_and_needs_no_root(self, command):
        before = self.host.changed()
        nobody = ["setpriv", "--reuid=65534", "--clear-groups", "firezone", "gateway", command]
        done = self.host.run(*nobody, FZ_DRY_RUN="true")
        assert done.stdout.startswith("FZ_DRY_RUN: would ")
        assert self.host.changed() == before

    @pytest.mark.parametrize("command", ["authenticate", "enable-service", "disable-service"])
    def test_without_root_it_says_so(self, command):
        self.host.path("/etc/firezone/gateway-env").write_text("FIREZONE_TOKEN=x\n")
        nobody = ["setpriv", "--reuid=65534", "--clear-groups", "firezone", "gateway", command]
        done = self.host.run(*nobody, check=False)
        assert done.returncode == 1
        assert "sudo firezone gateway" in done.stderr

    def test_the_service_is_not_enabled_without_a_token(self):
        done = self.helper("gateway", "enable-service")
        assert done.returncode == 1
        assert "firezone gateway authenticate" in done.stderr

    @pytest.mark.parametrize("words", ["", "gateway", "client", "gateway x", "gateway authenticate x"])
    def test_what_it_does_not_understand_is_a_usage_error(self, words):
        done = self.helper(*words.split())
        assert done.returncode == 2
        assert "usage: firezone gateway" in done.stderr


@pytest.mark.needs("shellcheck")
def test_the_scripts_are_free_of_what_shellcheck_knows():
    named = [DEBIAN / name for name in ("build", "firezone", "postinst", "prerm", "postrm")]
    done = subprocess.run(["shellcheck", *named], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
