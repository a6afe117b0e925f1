"""The systemd unit, as systemd's own tools judge it. Under a real systemd: test_package_installed.py."""

from __future__ import annotations

import re
import runpy
import subprocess

import pytest

from tests.lab.process import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.needs("systemd-analyze")]

UNIT = REPOSITORY / "packaging" / "systemd" / "firezone-gateway.service"
WORST_EXPOSURE = 2.0


@pytest.fixture(params=["package", "installer"])
def unit(request, tmp_path):
    """The unit of the package, and what the installer makes of it, with a program that is there."""
    text = UNIT.read_text()
    if request.param == "installer":
        text = runpy.run_path(str(REPOSITORY / "packaging" / "make-installer"))["unit"]()
        text = text.replace("@SETTINGS@", 'Environment="FIREZONE_NAME=bureau"')
    text = re.sub(r"^(ExecStart(?:Pre)?=\+?)\S+", r"\1/bin/true", text, flags=re.MULTILINE)
    path = tmp_path / "firezone-gateway.service"
    path.write_text(text.replace("Documentation=man:firezone-gateway(8)\n", ""))  # the page is not installed here
    return path


def test_systemd_finds_nothing_wrong_with_it(unit):
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=60, check=False
    )
    ours = [line for line in done.stderr.splitlines() if "firezone" in line]
    assert (done.returncode, ours) == (0, [])


def test_its_exposure_is_at_most_2(unit):
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", unit],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    exposure = re.search(r"exposure level for \S+: (\d+\.\d+)", done.stdout)
    assert exposure, done.stdout + done.stderr
    assert float(exposure[1]) <= WORST_EXPOSURE, done.stdout


def directives():
    return re.findall(r"^(\w+)=(.*)$", UNIT.read_text(), re.MULTILINE)


@pytest.mark.spec("OPS-51", "OPS-52")
@pytest.mark.parametrize(
    "directive",
    [
        ("User", "firezone"),
        ("Group", "firezone"),
        ("SyslogIdentifier", "firezone-gateway"),
        ("LoadCredential", "FIREZONE_TOKEN:/etc/firezone/gateway-token"),
        ("ExecStart", "/usr/bin/firezone-gateway"),
        ("TimeoutStartSec", "15s"),
        ("TimeoutStopSec", "15s"),
        ("RestartSec", "7"),
        ("PrivateTmp", "yes"),
        ("NoNewPrivileges", "yes"),
        ("RestrictNamespaces", "yes"),
        ("MemoryDenyWriteExecute", "yes"),
        ("LockPersonality", "yes"),
        ("RestrictAddressFamilies", "AF_INET AF_INET6 AF_NETLINK AF_UNIX"),
        ("AmbientCapabilities", "CAP_NET_ADMIN"),
        ("CapabilityBoundingSet", "CAP_NET_ADMIN"),
        ("InaccessiblePaths", "-/root -/home"),
        ("LimitNOFILE", "4096"),
        ("LimitNPROC", "512"),
        ("LimitCORE", "0"),
        ("SystemCallFilter", "@system-service"),
        ("WantedBy", "multi-user.target"),
        ("StateDirectory", "firezone"),
        ("StateDirectoryMode", "0750"),
        ("Type", "notify"),
        ("NotifyAccess", "all"),
    ],
    ids=lambda pair: pair[0],
)
def test_it_has_what_operations_2_4_lists(directive):
    assert directive in directives()


@pytest.mark.spec("OPS-51")
def test_settings_of_the_operator_win_over_those_of_the_package():
    files = [value for name, value in directives() if name == "EnvironmentFile"]
    assert files == ["/etc/firezone/gateway-preset-env", "/etc/firezone/gateway-env"]
