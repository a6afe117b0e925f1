"""What a test needs of the machine, and what happens where that is missing.

`@pytest.mark.needs("root", "ip", "turnserver")` names programs and the abilities below; where one is missing the test
is skipped, with one line that says what would help. With CI=true in the environment it fails instead: there, a test
that does not run proves nothing. The same holds for every other skip, unless its reason begins with `not applicable:`,
for what no machine of this kind can have.
"""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path

import pytest

from tests import secrets_watch
from tests.lab.namespaces import can_make_namespaces

NOT_APPLICABLE = "not applicable:"
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))

ABILITIES = {
    "root": (lambda: os.geteuid() == 0, "be root"),
    "namespaces": (can_make_namespaces, "be root, with unshare (util-linux)"),
    "tun": (lambda: Path("/dev/net/tun").exists(), "modprobe tun, and a container that may open /dev/net/tun"),
}
PACKAGES = {
    "ip": "iproute2",
    "nft": "nftables",
    "turnserver": "coturn",
    "setpriv": "util-linux",
    "su": "util-linux",
    "useradd": "passwd",
    "unshare": "util-linux",
    "setcap": "libcap2-bin",
    "objdump": "binutils",
    "ping": "iputils-ping",
    "dnsmasq": "dnsmasq-base",
    "promtool": "prometheus",
    "go": "golang-go",
    "dpkg-deb": "dpkg",
    "systemd-analyze": "systemd",
    "systemd-sysusers": "systemd",
    "sysctl": "procps",
}


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.is_registered(secrets_watch):
        config.pluginmanager.register(secrets_watch)


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = dict.fromkeys(name for mark in item.iter_markers("needs") for name in mark.args)
    if lacking := [_remedy(name) for name in wanted if not _available(name)]:
        pytest.skip("missing " + "; ".join(lacking))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    return _judged((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    return _judged((yield))


def _judged(report):
    """Under CI=true a skip is a failure."""
    if report.outcome != "skipped" or os.environ.get("CI") != "true" or hasattr(report, "wasxfail"):
        return report
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith(NOT_APPLICABLE):
        report.outcome = "failed"
        report.longrepr = f"CI=true, and the test was not run: {reason}"
    return report


@functools.cache
def _available(name: str) -> bool:
    if name in ABILITIES:
        return ABILITIES[name][0]()
    return shutil.which(name, path=_PATH) is not None


def _remedy(name: str) -> str:
    if name in ABILITIES:
        return f"{name} ({ABILITIES[name][1]})"
    return f"{name} (package {PACKAGES.get(name, name)})"
