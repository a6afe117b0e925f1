from __future__ import annotations

import pytest

from fzg.host.capabilities import effective_capabilities, has_net_admin, privilege_remedy

STATUS = "Name:\tpython\nCapInh:\t0000000000000000\nCapPrm:\t{0}\nCapEff:\t{0}\nCapBnd:\t000001ffffffffff\n"


@pytest.fixture
def status(tmp_path):
    def write(mask: str):
        path = tmp_path / "status"
        path.write_text(STATUS.format(mask))
        return path

    return write


def test_net_admin_alone_is_enough_for_an_ordinary_user(status):
    assert has_net_admin(status=status("0000000000001000"), uid=1000)


def test_other_capabilities_are_not_enough(status):
    assert not has_net_admin(status=status("000001ffffffefff"), uid=1000)


def test_root_is_enough(status):
    assert has_net_admin(status=status("0000000000000000"), uid=0)


@pytest.mark.parametrize("text", ["", "CapEff:\tnonsense\n", "CapPrm:\t0000000000001000\n"])
def test_a_status_that_says_nothing_counts_as_none(tmp_path, text):
    path = tmp_path / "status"
    path.write_text(text)
    assert effective_capabilities(path) == 0
    assert effective_capabilities(tmp_path / "absent") == 0


def test_the_remedy_names_both_ways_and_the_exact_command():
    text = privilege_remedy("/usr/bin/firezone-gateway", 1000)
    assert "root" in text
    assert "CAP_NET_ADMIN" in text
    assert "setcap cap_net_admin+eip /usr/bin/firezone-gateway" in text
