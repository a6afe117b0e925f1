"""The User-Agent from which the portal reads our version (spec portal 1.3, 3.2, 3.3)."""

from __future__ import annotations

import re

import pytest

from fzg.portal.user_agent import host_user_agent, parse_os_release, user_agent


def agent(ident="debian", version_id="12", *, raspberry_pi=False, machine="x86_64", kernel="6.1.0-18-amd64", **more):
    release = {"ID": ident, "VERSION_ID": version_id} | more
    return user_agent(release, raspberry_pi=raspberry_pi, machine=machine, kernel=kernel, version="1.6.1")


def test_the_examples_of_the_specification_are_reproduced():
    assert agent() == "Debian/12.0.0 gateway/1.6.1 (x86_64; 6.1.0-18-amd64)"
    assert agent("ubuntu", "22.04", machine="aarch64", kernel="5.15.0-97-generic") == (
        "Ubuntu/22.4.0 gateway/1.6.1 (aarch64; 5.15.0-97-generic)"
    )


@pytest.mark.parametrize(("ident", "name"), [
    ("alpine", "Alpine Linux"), ("rhel", "Red Hat Enterprise Linux"), ("opensuse-leap", "openSUSE"),
    ("ol", "Oracle Linux"),
    ("amzn", "Amazon Linux AMI"), ("sled", "SUSE Linux Enterprise Server"), ("nixos", "NixOS"), ("unheard-of", "Linux"),
])  # fmt: skip
def test_distributions_have_their_names(ident, name):
    assert agent(ident).startswith(name + "/12.0.0 gateway/")


def test_raspberry_pi_os_is_debian_with_an_issue_file():
    assert agent(raspberry_pi=True).startswith("Raspberry Pi OS/")
    assert agent("ubuntu", raspberry_pi=True).startswith("Ubuntu/")


@pytest.mark.parametrize(("version", "shown"), [
    ("3.19.1", "3.19.1"), ("9.3", "9.3.0"), ("1.2.3.4", "1.2.3.4"), ("24.05pre", "24.05pre"), ("", "Unknown"),
    ("rolling", "Rolling Release"), ("20260101", "20260101.0.0"),
])  # fmt: skip
def test_numeric_versions_have_three_parts_and_others_stay(version, shown):
    assert agent("arch", version).startswith(f"Arch Linux/{shown} gateway/")


def test_what_is_unknown_about_machine_and_kernel_is_left_out():
    assert agent(kernel="").endswith(" gateway/1.6.1 (x86_64)")
    assert agent(machine="").endswith(" gateway/1.6.1 (6.1.0-18-amd64)")
    assert agent(machine="", kernel="").endswith(" gateway/1.6.1")


@pytest.mark.spec("PORTAL-10")
def test_the_header_of_this_host_has_the_version_token_and_only_ascii(tmp_path):
    hosts = [host_user_agent(), host_user_agent(os_release=tmp_path / "none")]
    release = tmp_path / "os-release"
    for version in ("1\u00b2 \u4e2d\r\nX-Evil: 1", "\u4e2d1\u00b2\x7f"):
        release.write_text(f'ID=debian\nVERSION_ID="{version}"\n')
        hosts.append(host_user_agent(os_release=release))
    assert hosts[-1].startswith("Debian/1 gateway/")
    for text in hosts:
        assert text.isascii()
        assert text.isprintable()
        (token,) = [word for word in text.split(" ") if word.startswith("gateway/")]
        found = re.fullmatch(r"gateway/(\d+)\.(\d+)\.(\d+)", token)
        assert (1, 6, 1) <= tuple(map(int, found.groups())) < (1, 7, 0)


def test_os_release_files_are_read_as_the_shell_would():
    text = 'NAME="Debian GNU/Linux"\n# comment\n\nID=debian\nVERSION_ID=\'12\'\nBROKEN="x\nnot an assignment\nE=\n'
    assert parse_os_release(text) == {"NAME": "Debian GNU/Linux", "ID": "debian", "VERSION_ID": "12", "E": ""}
