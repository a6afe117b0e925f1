from __future__ import annotations

import pytest

from fzg.host.nftables import legacy_tables_note


@pytest.mark.parametrize("text", [None, "", "nat\n"])
def test_a_host_without_legacy_filter_rules_gets_no_note(tmp_path, text):
    names = tmp_path / "ip_tables_names"
    if text is not None:
        names.write_text(text)
    assert legacy_tables_note("tun-firezone", names) == ""


def test_legacy_filter_rules_are_named_with_the_exact_command(tmp_path):
    names = tmp_path / "ip_tables_names"
    names.write_text("nat\nfilter\n")
    note = legacy_tables_note("tun-firezone", names)
    assert "run as root: iptables-legacy -I FORWARD -i tun-firezone -j ACCEPT; iptables-legacy -I FORWARD -o" in note
