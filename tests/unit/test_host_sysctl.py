from __future__ import annotations

import pytest

from fzg.host import sysctl

VALUES = {
    "net/ipv4/ip_forward": "0",
    "net/ipv4/conf/all/src_valid_mark": "0",
    "net/ipv6/conf/all/disable_ipv6": "0",
    "net/ipv6/conf/all/forwarding": "0",
    "net/ipv6/conf/default/forwarding": "0",
    "net/core/rmem_max": "212992",
    "net/core/wmem_max": "212992",
}


class Proc:
    def __init__(self, root):
        self.root = root
        for name, value in VALUES.items():
            self[name] = value

    def __setitem__(self, name, value):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value + "\n")

    def __getitem__(self, name):
        return (self.root / name).read_text().strip()

    def refuse(self, name):
        """Root may write anything: a directory in place of the file refuses everybody."""
        (self.root / name).unlink()
        (self.root / name).mkdir()


@pytest.fixture
def proc(tmp_path):
    return Proc(tmp_path)


def test_all_five_forwarding_settings_are_enabled(proc):
    report = sysctl.enable_forwarding(enable_ipv6=False, root=proc.root)
    assert report.warnings == []
    assert report.notes == []
    assert [proc[name] for name in list(VALUES)[:5]] == ["1", "1", "0", "1", "1"]


def test_settings_that_are_right_are_not_written(proc):
    sysctl.enable_forwarding(enable_ipv6=False, root=proc.root)
    written = {name: (proc.root / name).stat().st_mtime_ns for name in VALUES}
    sysctl.enable_forwarding(enable_ipv6=False, root=proc.root)
    assert written == {name: (proc.root / name).stat().st_mtime_ns for name in VALUES}


def test_what_may_not_be_written_is_one_warning_with_the_exact_command(proc):
    proc.refuse("net/ipv4/ip_forward")
    proc.refuse("net/ipv6/conf/all/forwarding")
    report = sysctl.enable_forwarding(enable_ipv6=False, root=proc.root)
    assert len(report.warnings) == 1
    command = "sysctl -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1;"
    assert f"Run: sudo firezone-gateway host-setup (as root it does: {command}" in report.warnings[0]
    assert proc["net/ipv4/conf/all/src_valid_mark"] == "1"


def test_a_host_without_ipv6_is_no_warning(tmp_path):
    proc = Proc(tmp_path)
    for name in VALUES:
        if "ipv6" in name:
            (proc.root / name).unlink()
    report = sysctl.enable_forwarding(enable_ipv6=True, root=proc.root)
    assert (report.notes, report.warnings) == ([], [])
    assert proc["net/ipv4/ip_forward"] == "1"


def test_ipv6_that_is_switched_off_stays_off_and_the_note_says_how_to_change_that(proc):
    proc["net/ipv6/conf/all/disable_ipv6"] = "1"
    report = sysctl.enable_forwarding(enable_ipv6=False, root=proc.root)
    assert proc["net/ipv6/conf/all/disable_ipv6"] == "1"
    assert report.warnings == []
    assert "sysctl -w net.ipv6.conf.all.disable_ipv6=0" in report.notes[0]


def test_ipv6_that_is_switched_off_is_switched_on_when_it_is_required(proc):
    proc["net/ipv6/conf/all/disable_ipv6"] = "1"
    sysctl.enable_forwarding(enable_ipv6=True, root=proc.root)
    assert proc["net/ipv6/conf/all/disable_ipv6"] == "0"


@pytest.mark.parametrize(("forwarding", "accept_ra", "expected"), [("0", "1", "2"), ("1", "1", "1"), ("0", "0", "0")])
def test_interfaces_that_learn_routes_from_routers_keep_doing_so(proc, forwarding, accept_ra, expected):
    proc["net/ipv6/conf/eth0.7/accept_ra"] = accept_ra
    proc["net/ipv6/conf/eth0.7/forwarding"] = forwarding
    sysctl.enable_forwarding(enable_ipv6=False, root=proc.root)
    assert proc["net/ipv6/conf/eth0.7/accept_ra"] == expected


def test_buffer_ceilings_are_raised(proc):
    report = sysctl.raise_buffer_ceilings(root=proc.root)
    assert (proc["net/core/rmem_max"], proc["net/core/wmem_max"]) == ("16777216", "2097152")
    assert report.warnings == []
    assert len(report.notes) == 2


def test_larger_buffer_ceilings_are_not_lowered(proc):
    proc["net/core/rmem_max"] = "33554432"
    proc["net/core/wmem_max"] = "2097153"
    assert sysctl.raise_buffer_ceilings(root=proc.root).notes == []
    assert (proc["net/core/rmem_max"], proc["net/core/wmem_max"]) == ("33554432", "2097153")


def test_a_namespace_without_buffer_ceilings_is_silent(tmp_path):
    report = sysctl.raise_buffer_ceilings(root=tmp_path)
    assert (report.notes, report.warnings) == ([], [])
