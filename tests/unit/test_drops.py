"""What status and trace call a drop: each has a sentence for people and is in the documentation."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from fzg.ops import drops
from fzg.turn.authentication import Integrity
from fzg.wireguard.gate import Rejected

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "json.md").read_text()


def counted_in(path, pattern):
    return set(re.findall(pattern, (ROOT / path).read_text()))


def core(**counters):
    empty = Counter()
    return SimpleNamespace(
        counters=counters.get("gateway", empty),
        node=SimpleNamespace(
            counters=counters.get("node", empty), relays=SimpleNamespace(counters=counters.get("relays", empty))
        ),
        engine=SimpleNamespace(counters=lambda: counters.get("engine", {})),
    )


def test_each_name_in_the_code_has_a_meaning():
    names = counted_in("fzg/node/node.py", r'counters\["([^"]+)"\]')
    names |= counted_in("fzg/gateway.py", r'counters\["([^"]+)"\]')
    names |= {f"WireGuard: {reason}" for reason in counted_in("fzg/wireguard/gate.py", r'Rejected\("([^"]+)"\)')}
    names |= {f"TURN: {reason}" for reason in counted_in("fzg/turn/allocation.py", r'_drop\("([^"]+)"\)')}
    names |= {f"TURN: {each.value}" for each in Integrity if each is not Integrity.ACCEPTED}
    sent = (ast.parse((ROOT / path).read_text()) for path in ("fzg/node/node.py", "fzg/node/connection.py"))
    for tree in sent:
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and function.name == "send":
                names |= {
                    f"to client: {each.value.value}"
                    for each in ast.walk(function)
                    if isinstance(each, ast.Return)
                    and isinstance(each.value, ast.Constant)
                    and isinstance(each.value.value, str)
                }
    tunnel = (ROOT / "fzg/tunnel/tunnel.py").read_text()
    assert {drops.DropReason[name] for name in re.findall(r"DropReason\.(\w+)", tunnel)} == set(drops.DropReason)
    for reason in drops.DropReason:
        assert {f"from client: {reason}", f"to client: {reason}"} & drops.MEANINGS.keys(), reason
    assert Rejected("x").reason == "x"
    assert "to client: no WireGuard session" in names
    assert names - drops.MEANINGS.keys() == set()


@pytest.mark.parametrize("source", ["_native.pyx", "pure.py", "udp_offload.py", "tun_offload.py"])
def test_each_drop_of_the_engines_has_a_meaning(source):
    found = counted_in(f"fzg/dataplane/{source}", r'"drop_(\w+)"')
    assert found
    assert {"engine: " + name.replace("_", " ") for name in found} <= drops.MEANINGS.keys()


def test_what_the_kernel_refuses_is_named_with_its_error():
    assert drops.meaning("engine: udp send enobufs") == "the kernel refused to send it (ENOBUFS)"
    assert drops.meaning("engine: tun write eio") == "the kernel refused to take the packet (EIO)"


def test_what_nobody_explained_keeps_its_name():
    assert drops.meaning("something new") == "something new"


def test_a_count_says_where_it_comes_from_and_the_largest_is_first():
    counted = core(
        gateway=Counter({"to client: NotAPeer": 2}),
        relays=Counter({"no channel to send on": 4}),
        engine={"drop_udp_queue_full": 3, "drop_replayed": 0, "udp_rx_calls": 9},
    )
    assert list(drops.dropped(counted).items()) == [
        ("TURN: no channel to send on", 4),
        ("engine: udp queue full", 3),
        ("to client: NotAPeer", 2),
    ]


def test_each_name_is_on_the_page_with_its_meaning():
    listed = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", PAGE.partition("## Names of drops")[2], re.MULTILINE))
    assert {name: listed.get(name) for name in drops.MEANINGS} == dict(drops.MEANINGS)
