"""The lab's networks behave as the NATs they stand for, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.lab.namespaces import (
    Attachment,
    Nat,
    Network,
    can_make_namespaces,
    public_addresses,
    remove_stale,
    user_namespace_command,
)
from tests.lab.process import REPOSITORY, lab_environment

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_namespaces(), reason="needs root for network namespaces"),
]

# A reflector on the internet: answers each datagram with the address it came from.
REFLECTOR = """
import json, os, socket, sys
s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
s.bind((sys.argv[1], 3478))
os.write(int(sys.argv[2]), b"ready")
while True:
    data, source = s.recvfrom(100)
    s.sendto(json.dumps(source[:2]).encode(), source)
"""

# One end of a punched hole: learns its reflexive address, tells it, learns the other's, and punches `ROUNDS` times.
PUNCHER = """
import json, select, socket, sys
own, reflector, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
s = socket.socket(socket.AF_INET6 if ":" in own else socket.AF_INET, socket.SOCK_DGRAM)
s.bind((own, 52625))
s.settimeout(5)
s.sendto(b"?", (reflector, 3478))
mapped = json.loads(s.recv(100))
print(json.dumps(mapped), flush=True)
peer = tuple(json.loads(sys.stdin.readline()))
sent = got = 0
for _ in range(rounds):
    s.sendto(b"punch", peer); sent += 1
    if select.select([s], [], [], 0.05)[0]:
        data, source = s.recvfrom(100)
        if source[:2] == peer and data == b"punch":
            got += 1
print(json.dumps({"sent": sent, "got": got}), flush=True)
"""
ROUNDS = 10


def start(party: Attachment, source: str, *arguments: str, **more) -> subprocess.Popen[str]:
    command = [*party.namespace.prefix(), sys.executable, "-c", source, *arguments]
    return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **more)


def punch(first: Nat, second: Nat, *, ipv6: bool = False) -> tuple[list[dict[str, int]], list[list]]:
    """Two parties punch at each other's reflexive address; what each sent and got, and the mapped addresses."""
    processes: list[subprocess.Popen[str]] = []
    with Network() as network:
        server = network.party("reflector", Nat.NONE, public=100, private=1)
        one = network.party("one", first, public=30, private=30)
        two = network.party("two", second, public=31, private=31)
        try:
            reflector = public_addresses(100)[ipv6]
            reader, writer = os.pipe()
            processes.append(start(server, REFLECTOR, reflector, str(writer), pass_fds=[writer]))
            assert os.read(reader, 10) == b"ready"
            ends = [
                start(party, PUNCHER, party.ipv6 if ipv6 else party.ipv4, reflector, str(ROUNDS))
                for party in (one, two)
            ]
            processes += ends
            mapped = [json.loads(end.stdout.readline()) for end in ends]
            for end, other in zip(ends, reversed(mapped), strict=True):
                end.stdin.write(json.dumps(other) + "\n")
                end.stdin.flush()
            return [json.loads(end.stdout.readline()) for end in ends], mapped
        finally:
            for process in processes:
                process.kill()
                process.communicate()
            os.close(reader)
            os.close(writer)


@pytest.mark.parametrize("ipv6", [False, True])
def test_port_preserving_nat_keeps_the_port_and_lets_hole_punching_work(ipv6):
    counts, mapped = punch(Nat.CONE, Nat.CONE, ipv6=ipv6)
    assert mapped == [[public_addresses(30)[ipv6], 52625], [public_addresses(31)[ipv6], 52625]]
    for count in counts:
        assert count["sent"] == ROUNDS
        assert ROUNDS - 3 <= count["got"] <= ROUNDS


def test_symmetric_nat_changes_the_port_and_defeats_hole_punching():
    counts, mapped = punch(Nat.SYMMETRIC, Nat.CONE)
    assert mapped[0][1] != 52625
    assert [count["got"] for count in counts] == [0, 0]


def test_without_nat_packets_arrive_unasked():
    counts, mapped = punch(Nat.NONE, Nat.NONE)
    assert mapped == [["203.0.113.30", 52625], ["203.0.113.31", 52625]]
    assert all(count["got"] >= ROUNDS - 1 for count in counts)


def test_nothing_new_gets_in_from_outside_and_blocked_parties_hear_nothing():
    probe = textwrap.dedent("""
        import socket, sys
        try: socket.create_connection((sys.argv[1], 9), 0.3); print("open")
        except ConnectionRefusedError: print("refused")
        except OSError as e: print("silent")
    """)
    with Network() as network:
        outside = network.party("outside", Nat.NONE, public=100, private=1)
        other = network.party("other", Nat.NONE, public=101, private=2)
        inside = network.party("inside", Nat.CONE, public=30, private=30)
        assert outside.namespace.python(probe, inside.public_ipv4).strip() == "silent"
        assert inside.namespace.python(probe, outside.ipv4).strip() == "refused"
        network.block(inside, outside)
        assert inside.namespace.python(probe, outside.ipv4).strip() == "silent"
        assert inside.namespace.python(probe, outside.ipv6).strip() == "silent"
        assert inside.namespace.python(probe, other.ipv4).strip() == "refused"
        network.block(inside, outside, blocked=False)
        assert inside.namespace.python(probe, outside.ipv6).strip() == "refused"


def test_paths_between_peers_can_be_forgotten_while_those_to_relays_stay():
    send = (
        "import socket, sys\n"
        "for host in sys.argv[1:]:\n"
        "    for port in (9, 3478):\n"
        "        s = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET, socket.SOCK_DGRAM)\n"
        "        s.bind(('', 50000 + port)); s.sendto(b'x', (host, port))\n"
    )
    count = (
        "from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket\n"
        "print(sum(len(list(NFCTSocket(nfgen_family=family).dump())) for family in (2, 10)))"
    )
    with Network() as network:
        outside = network.party("outside", Nat.NONE, public=100, private=1)
        inside = network.party("inside", Nat.CONE, public=30, private=30)
        inside.namespace.python(send, outside.ipv4, outside.ipv6)
        assert int(inside.router.python(count)) == 4
        network.flush_conntrack()
        assert int(inside.router.python(count)) == 2
        inside.router.flush_conntrack()
        assert int(inside.router.python(count)) == 0


def test_a_crashed_lab_is_cleaned_up_by_the_next_one_and_a_living_one_is_left_alone():
    source = textwrap.dedent("""
        import subprocess, sys
        from tests.lab.namespaces import Nat, Network
        network = Network()
        party = network.party("one", Nat.CONE, public=30, private=30)
        child = subprocess.Popen([*party.namespace.prefix(), "sleep", "1000"])
        print(child.pid, *[n.name for n in network.namespaces.values()], flush=True)
        sys.stdin.read()
    """)
    environment = dict(os.environ) | lab_environment()
    lab = subprocess.Popen(
        [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    child, *names = lab.stdout.readline().split()
    remove_stale()
    assert all(os.path.exists(f"/run/netns/{name}") for name in names)
    lab.send_signal(signal.SIGKILL)
    lab.wait()
    lab.stdin.close()
    lab.stdout.close()
    with Network():
        assert len(names) == 3
        assert not any(os.path.exists(f"/run/netns/{name}") for name in names)
        command_line = Path(f"/proc/{child}/cmdline")
        assert not command_line.exists() or not command_line.read_bytes()


def test_files_are_seen_inside_and_not_outside(tmp_path):
    before = Path("/etc/resolv.conf").read_text()
    with Network() as network:
        host = network.namespace("host")
        host.file("/etc/resolv.conf", "nameserver 192.0.2.53\n")
        assert host.run("cat", "/etc/resolv.conf").stdout == "nameserver 192.0.2.53\n"
        assert Path("/etc/resolv.conf").read_text() == before


def test_networks_can_be_made_inside_a_user_namespace():
    source = textwrap.dedent("""
        from tests.lab.namespaces import Nat, Network
        with Network() as network:
            outside = network.party("outside", Nat.NONE, public=100, private=1)
            inside = network.party("inside", Nat.SYMMETRIC, public=30, private=30)
            print("made")
            inside.namespace.file("/etc/resolv.conf", "nameserver 192.0.2.53\\n")
            print(inside.namespace.run("cat", "/etc/resolv.conf").stdout)
    """)
    done = subprocess.run(
        user_namespace_command(sys.executable, "-c", source),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=dict(os.environ) | lab_environment(),
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == ["made", "nameserver", "192.0.2.53"], done.stderr
