"""The `User-Agent` of the upgrade request, from which the portal reads our version (spec portal 1.3, 3.2)."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from fzg.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAMES = {
    "almalinux": "AlmaLinux",
    "alpine": "Alpine Linux",
    "amzn": "Amazon Linux AMI",
    "arch": "Arch Linux",
    "azurelinux": "Azure Linux",
    "centos": "CentOS",
    "debian": "Debian",
    "fedora": "Fedora",
    "kali": "Kali Linux",
    "linuxmint": "Linux Mint",
    "nixos": "NixOS",
    "ol": "Oracle Linux",
    "rhel": "Red Hat Enterprise Linux",
    "rocky": "Rocky Linux",
    "sled": "SUSE Linux Enterprise Server",
    "sles": "SUSE Linux Enterprise Server",
    "ubuntu": "Ubuntu",
}
_NUMERIC = re.compile(r"(\d{1,9})(?:\.(\d{1,9}))?(?:\.(\d{1,9}))?")


def host_user_agent(*, os_release: Path = Path("/etc/os-release"), rpi_issue: Path = Path("/etc/rpi-issue")) -> str:
    """The header of this host. Cannot fail: what is unknown is left out."""
    try:
        release = parse_os_release(os_release.read_text("utf-8", "replace"))
    except OSError:
        release = {}
    host = os.uname()
    return user_agent(release, raspberry_pi=rpi_issue.exists(), machine=host.machine, kernel=host.release)


def user_agent(
    os_release: Mapping[str, str], *, raspberry_pi: bool, machine: str, kernel: str, version: str = VERSION
) -> str:
    """`<os>/<os-version> gateway/<version> (<machine>; <kernel>)`, ASCII only."""
    known = "; ".join(part for part in (machine, kernel) if part)
    extra = f" ({known})" if known else ""
    text = f"{_os_name(os_release, raspberry_pi=raspberry_pi)}/{_os_version(os_release)} gateway/{version}{extra}"
    return "".join(character for character in text if " " <= character <= "~")


def parse_os_release(text: str) -> dict[str, str]:
    """The assignments of an os-release file; lines that are none are skipped."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        key, equals, value = line.strip().partition("=")
        if not equals or key.startswith("#"):
            continue
        try:
            values[key] = "".join(shlex.split(value)[:1])
        except ValueError:
            continue
    return values


def _os_name(os_release: Mapping[str, str], *, raspberry_pi: bool) -> str:
    ident = os_release.get("ID", "").lower()
    if ident == "debian" and raspberry_pi:
        return "Raspberry Pi OS"
    if ident.startswith("opensuse"):
        return "openSUSE"
    return _NAMES.get(ident, "Linux")


def _os_version(os_release: Mapping[str, str]) -> str:
    version = os_release.get("VERSION_ID", "") or os_release.get("BUILD_ID", "")
    if not version:
        return "Unknown"
    if version.lower() == "rolling":
        return "Rolling Release"
    if numeric := _NUMERIC.fullmatch(version):
        return ".".join(str(int(part or 0)) for part in numeric.groups())
    return version
