"""The one-line installer on a copy of this host, with a service manager and a download that only take notes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
from machine import scratch_host

from tests.lab.process import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.root, pytest.mark.needs("namespaces")]

BASE_URL = "https://downloads.test/releases"
TOKEN = ".SFMyNTY.c2VjcmV0.c2lnbmF0dXJl"
UNIT = "/etc/systemd/system/firezone-gateway.service"
INIT = "/usr/local/bin/firezone-gateway-init"
CREDENTIAL = "/etc/firezone/gateway-token"
PROGRAM = "/opt/firezone/bin/firezone-gateway"
RELEASED = b"\177ELF the program"
HASHES = {"x86_64": hashlib.sha256(RELEASED).hexdigest(), "aarch64": "a" * 64, "armv7": "7" * 64}

PATH = "/stand-ins:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# As systemd 252 says it; what it was asked for is noted.
SYSTEMCTL = """#!/bin/sh
echo "$*" >>/called
case $1 in --version) echo "systemd ${SYSTEMD_VERSION-252 (252.38-1~deb12u1)}" ;; esac
"""
CURL = """#!/bin/sh
echo "curl $*" >>/called
[ -e /release ] || { echo "curl: (22) The requested URL returned error: 404" >&2; exit 22; }
while [ $# -gt 0 ]; do
    if [ "$1" = --output ]; then cp /release "$2"; fi
    shift
done
"""


def make_installer(tmp_path, *lines, version="1.6.1", base_url=BASE_URL):
    sums = tmp_path / "SHA256SUMS"
    sums.write_text("".join(f"{line}\n" for line in lines))
    return subprocess.run(
        [sys.executable, REPOSITORY / "packaging" / "make-installer", version, base_url, sums],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    lines = [f"{digest}  firezone-gateway_1.6.1_{name}" for name, digest in HASHES.items()]
    done = make_installer(tmp_path_factory.mktemp("installer"), *lines)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def host(tmp_path, script):
    with scratch_host(tmp_path) as machine:
        machine.path("/install.sh").write_text(script)
        for name, text in {"systemctl": SYSTEMCTL, "curl": CURL, "uname": UNAME}.items():
            file = machine.path(f"/stand-ins/{name}")
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
            file.chmod(0o755)
        machine.path("/release").write_bytes(RELEASED)
        yield machine


UNAME = """#!/bin/sh
[ "$1" != -m ] || { echo "${MACHINE:-x86_64}"; exit; }
exec /usr/bin/uname "$@"
"""


def install(host, *, check=True, **variables):
    return host.run("bash", "/install.sh", check=check, **({"PATH": PATH} | variables))


def test_an_ordinary_user_needs_sudo_and_the_token_is_in_no_command_of_it(host):
    sudo = host.path("/stand-ins/sudo")
    sudo.write_text('#!/bin/sh\necho "sudo $*" >>/called\nexec setpriv --reuid=0 --regid=0 --clear-groups "$@"\n')
    sudo.chmod(0o755)
    host.path("/called").touch()
    host.path("/called").chmod(0o666)
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    user += [f"--{which}-caps=+setuid,+setgid" for which in ("inh", "ambient")]  # for the stand-in of sudo
    host.run(*user, "bash", "/install.sh", PATH=PATH, FIREZONE_ID="gw-1", FIREZONE_TOKEN=TOKEN, HOME="/")
    assert host.path(CREDENTIAL).read_text() == f"{TOKEN}\n"
    assert host.run("stat", "-c", "%a %U:%G", CREDENTIAL, UNIT, INIT, PROGRAM).stdout.splitlines() == [
        "400 root:root",
        "644 root:root",
        "755 root:root",
        "750 root:firezone",
    ]
    assert any(line.startswith("sudo systemctl restart") for line in called(host))
    assert TOKEN not in "".join(called(host))


def called(host):
    path = host.path("/called")
    return path.read_text().splitlines() if path.exists() else []


def settings(host):
    return dict(re.findall(r'^Environment="(\w+)=(.*)"$', host.path(UNIT).read_text(), re.MULTILINE))


@pytest.mark.spec("OPS-52", "OPS-53")
def test_the_token_is_in_the_credential_file_with_mode_400_and_nowhere_in_the_unit(host):
    done = install(host, FIREZONE_ID="gw-1", FIREZONE_TOKEN=TOKEN, FIREZONE_LOG_FORMAT="json")
    assert host.path(CREDENTIAL).read_text() == f"{TOKEN}\n"
    assert host.run("stat", "-c", "%a %U:%G", CREDENTIAL).stdout == "400 root:root\n"
    unit = host.path(UNIT).read_text()
    assert f"LoadCredential=FIREZONE_TOKEN:{CREDENTIAL}\n" in unit
    assert TOKEN not in unit + host.path(INIT).read_text() + done.stdout + done.stderr + "".join(called(host))
    assert settings(host) == {
        "FIREZONE_ID": "gw-1",
        "FIREZONE_NAME": host.run("uname", "-n").stdout.strip(),
        "FIREZONE_LOG_FORMAT": "json",
        "RUST_LOG": "info",
    }
    assert host.run("stat", "-c", "%a %U:%G", "/etc/firezone", PROGRAM).stdout.splitlines() == [
        "755 root:root",
        "750 root:firezone",
    ]
    assert re.search(r":/usr/sbin/nologin$", host.run("getent", "passwd", "firezone").stdout)
    fetched = [line for line in called(host) if line.startswith("curl")]
    assert len(fetched) == 1
    assert fetched[0].endswith(f"{BASE_URL}/dl/firezone-gateway/1.6.1/x86_64")
    assert "--proto =https" in fetched[0]
    service = "firezone-gateway.service"
    assert called(host)[-3:] == ["daemon-reload", f"enable {service}", f"restart {service}"]
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.spec("OPS-53")
def test_the_init_script_fixes_address_version_and_hashes(host):
    install(host, FIREZONE_ID="gw-1", FIREZONE_TOKEN=TOKEN)
    init = host.path(INIT).read_text()
    assert f"{BASE_URL}/dl/firezone-gateway/" in init
    assert "version=1.6.1\n" in init
    assert re.findall(r"[0-9a-f]{64}", init) == list(HASHES.values())
    assert "Checksum verification failed" in init
    assert "${" not in init  # the form in which a variable of the caller could take the place of a value
    used = set(re.findall(r"\$(\w+)", init))
    assigned = set(re.findall(r"\b(\w+)=", init))
    assert used - {"1"} <= assigned
    # Nothing in the environment changes where the program comes from.
    host.path(PROGRAM).unlink()
    names = [name for name in used if not name.isdigit()]
    loaded = dict.fromkeys([*names, "BASE_URL", "FIREZONE_VERSION", "ARTIFACT_URL"], "https://evil.test")
    host.run(INIT, **(loaded | {"PATH": "/stand-ins:/usr/sbin:/usr/bin"}))
    assert all("evil" not in line for line in called(host))
    assert host.path(PROGRAM).read_bytes() == RELEASED


@pytest.mark.spec("OPS-53")
@pytest.mark.parametrize("quoted", [True, False])
def test_token_and_id_come_from_an_old_unit(host, quoted):
    mark = '"' if quoted else ""
    host.path(UNIT).write_text(
        f"[Service]\nEnvironment={mark}FIREZONE_TOKEN={TOKEN}{mark}\nEnvironment={mark}FIREZONE_ID=old-id{mark}\n"
        f"Environment={mark}FIREZONE_ENABLE_MASQUERADE=1{mark}\nExecStart=/usr/local/bin/firezone-gateway\n"
    )
    install(host)
    assert host.path(CREDENTIAL).read_text() == f"{TOKEN}\n"
    assert settings(host)["FIREZONE_ID"] == "old-id"
    assert TOKEN not in host.path(UNIT).read_text()


@pytest.mark.spec("OPS-53")
@pytest.mark.parametrize(
    ("version", "reason"),
    [("219", "systemd 219 is too old"), ("246 (246.6)", "systemd 246 is too old"), ("unknown", "cannot be told")],
)
def test_an_old_systemd_is_refused_without_side_effects(host, version, reason):
    before = host.changed()
    done = install(host, check=False, FIREZONE_ID="gw-1", FIREZONE_TOKEN=TOKEN, SYSTEMD_VERSION=version)
    assert done.returncode == 1
    assert reason in done.stderr
    assert host.changed() - before == {"/called"}
    assert called(host) == ["--version"]


def test_a_host_without_systemd_is_refused_without_side_effects(host):
    host.path("/stand-ins/systemctl").unlink()
    for name in ("/usr/bin/systemctl", "/bin/systemctl"):
        host.path(name).unlink(missing_ok=True)
    before = host.changed()
    done = install(host, check=False, FIREZONE_ID="gw-1", FIREZONE_TOKEN=TOKEN)
    assert done.returncode == 1
    assert "no systemctl" in done.stderr
    assert host.changed() == before


@pytest.mark.spec("OPS-53")
def test_another_run_changes_neither_id_nor_token_nor_settings(host):
    given = {"FIREZONE_NAME": 'a "100 %" \\ bureau', "FIREZONE_API_URL": "wss://portal.test", "RUST_LOG": "debug"}
    install(host, FIREZONE_ID="gw-1", FIREZONE_TOKEN=TOKEN, **given)
    unit = host.path(UNIT).read_text()
    assert 'FIREZONE_NAME=a \\"100 %%\\" \\\\ bureau' in unit
    host.path("/called").unlink()
    install(host)
    assert host.path(UNIT).read_text() == unit
    assert host.path(CREDENTIAL).read_text() == f"{TOKEN}\n"
    assert not any(line.startswith("curl") for line in called(host))  # the released file is there


@pytest.mark.parametrize(
    ("given", "missing"), [({"FIREZONE_TOKEN": TOKEN}, "FIREZONE_ID"), ({"FIREZONE_ID": "gw-1"}, "FIREZONE_TOKEN")]
)
def test_what_is_missing_is_named_and_nothing_written(host, given, missing):
    before = host.changed()
    done = install(host, check=False, **given)
    assert done.returncode == 1
    assert f"{missing} is required" in done.stderr
    assert host.changed() == before


@pytest.mark.parametrize(
    ("release", "reason"),
    [(b"\177ELF another program", "Checksum verification failed"), (None, "returned error: 404")],
)
def test_a_bad_download_leaves_what_was_installed(host, script, release, reason):
    install(host, FIREZONE_ID="gw-1", FIREZONE_TOKEN=TOKEN)
    installed = {path: host.path(path).read_bytes() for path in (UNIT, INIT, PROGRAM)}
    newer = script.replace("version=1.6.1\n", "version=1.6.2\n").replace(HASHES["x86_64"], "b" * 64)
    host.path("/install.sh").write_text(newer)
    host.path("/release").unlink()
    if release is not None:
        host.path("/release").write_bytes(release)
    host.path("/called").unlink()
    done = install(host, check=False, RUST_LOG="debug")
    assert done.returncode == 1
    assert reason in done.stderr
    assert "unchanged" in done.stderr
    assert {path: host.path(path).read_bytes() for path in installed} == installed
    assert sorted(os.listdir(host.path("/opt/firezone/bin"))) == ["firezone-gateway"]
    assert sorted(name for name in os.listdir(host.path("/usr/local/bin")) if "firezone" in name) == [
        "firezone-gateway-init"
    ]
    assert not any(line.startswith(("restart", "enable")) for line in called(host))


@pytest.mark.parametrize(
    ("machine", "word"), [("aarch64", "aarch64"), ("arm64", "aarch64"), ("armv7l", "armv7"), ("armv7", "armv7")]
)
def test_each_architecture_gets_its_own_file(host, machine, word):
    """Which is then refused here: the stand-in has that of x86_64 only."""
    done = install(host, check=False, FIREZONE_ID="gw-1", FIREZONE_TOKEN=TOKEN, MACHINE=machine)
    assert "Checksum verification failed" in done.stderr
    assert called(host)[-1].endswith(f"/1.6.1/{word}")


def test_an_architecture_without_a_release_is_told(host):
    done = install(host, check=False, FIREZONE_ID="gw-1", FIREZONE_TOKEN=TOKEN, MACHINE="riscv64")
    assert "no gateway for the architecture riscv64" in done.stderr
    assert called(host) == ["--version"]


def test_a_release_of_one_architecture_says_so_to_the_others(tmp_path):
    done = make_installer(tmp_path, f"{'c' * 64}  firezone-gateway_1.6.1_aarch64")
    assert len(re.findall(r"[0-9a-f]{64}", done.stdout)) == 3
    assert "0" * 64 in done.stdout
    assert "was not released for the architecture" in done.stdout


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base_url": "http://downloads.test"}, "is no https address"),
        ({"base_url": 'https://x/"$(id)'}, "is no https address"),
        ({"version": "latest"}, "is no version"),
    ],
)
def test_a_release_that_could_not_be_trusted_is_not_made(tmp_path, changes, reason):
    done = make_installer(tmp_path, f"{'c' * 64}  firezone-gateway", **changes)
    assert done.returncode == 1
    assert reason in done.stderr


def test_without_checksums_there_is_no_release(tmp_path):
    assert "no checksum" in make_installer(tmp_path, "c" * 63).stderr


def test_sums_that_are_not_there_are_one_line(tmp_path):
    script = REPOSITORY / "packaging" / "make-installer"
    command = [sys.executable, script, "1.6.1", BASE_URL, tmp_path / "absent"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"{tmp_path}/absent: No such file or directory; build the program first: make binary\n"


@pytest.mark.needs("shellcheck")
def test_the_scripts_are_free_of_what_shellcheck_knows(script, tmp_path):
    (tmp_path / "install.sh").write_text(script)
    source = REPOSITORY / "packaging"
    named = [tmp_path / "install.sh", source / "install.sh", source / "systemd" / "firezone-gateway-init"]
    done = subprocess.run(["shellcheck", "-f", "json", *named], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout) == []
