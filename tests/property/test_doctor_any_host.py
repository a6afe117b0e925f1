"""Whatever a host is like, doctor has something to say about each part of it, and a remedy for each complaint."""

from __future__ import annotations

import errno
import socket

from hypothesis import given
from hypothesis import strategies as st

from fzg.commands.doctor import live_from
from fzg.host.facts import Disk, HostFacts, TunNode, Unreadable, Way
from fzg.host.holders import Listener, Process
from fzg.host.input_chains import Obstacle
from fzg.host.nftables import Blocked, Survey
from fzg.host.reach import Answer, Portal
from fzg.ops.doctor import Live, Plan, Seen, State, examine
from fzg.wire.endpoint import Endpoint

WORDS = st.sampled_from(["", "a", "eth0", "with spaces", "x; y; z", "One. Two.", "ip filter FORWARD", "ü\x1b[2J\n"])
PROCESSES = st.none() | st.builds(Process, st.integers(1, 1 << 22), WORDS)
LISTENERS = st.lists(st.builds(Listener, st.sampled_from(["0.0.0.0", "::", "127.0.0.1"]), PROCESSES), max_size=2).map(
    tuple
)
DISKS = st.builds(
    Disk,
    WORDS,
    st.integers(0, 1 << 40),
    st.none() | st.integers(0, 1 << 30),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
CHAINS = st.sampled_from(["ip filter FORWARD", "inet firewalld filter_FORWARD", "ip6 filter FORWARD", "inet x y"])
SURVEYS = st.builds(
    Survey,
    st.sampled_from([(), ("ip",), ("ip", "ip6")]),
    st.lists(st.builds(Blocked, CHAINS, st.just(("iifname",))), max_size=2).map(tuple),
    st.lists(st.builds(Obstacle, CHAINS, st.just("nft …")), max_size=2).map(tuple),
)
NUMBERS = st.sampled_from(["0", "1", "2", "212992", "16777216", "nonsense"])
SYSCTLS = st.dictionaries(
    st.sampled_from(
        [
            "net.ipv4.ip_forward",
            "net.ipv4.conf.all.src_valid_mark",
            "net.ipv6.conf.all.disable_ipv6",
            "net.ipv6.conf.all.forwarding",
            "net.core.rmem_max",
            "net.ipv4.conf.all.rp_filter",
            "net.ipv4.conf.eth0/7.rp_filter",
        ]
    ),
    NUMBERS,
)
UNREADABLE = st.builds(Unreadable, WORDS)
HOSTS = st.builds(
    HostFacts,
    interface=st.just("tun-firezone"),
    kernel=st.sampled_from(["6.1.0", "4.9", "2.6.32-el6", "odd", "99999999999.1"]),
    uid=st.sampled_from([0, 1000]),
    capabilities=st.sampled_from([0, 1 << 12, (1 << 41) - 1]),
    executable=WORDS,
    nosuid=st.booleans(),
    no_new_privileges=st.booleans(),
    container=st.sampled_from(["", "docker", "lxc", "podman", "systemd-nspawn"]),
    tun=st.builds(
        TunNode, st.sampled_from([0, errno.ENOENT, errno.EPERM, errno.EACCES, errno.EIO]), st.booleans(), st.booleans()
    ),
    link=st.sampled_from([None, "", "tun", "bridge"]),
    tun_holder=PROCESSES,
    udp=LISTENERS,
    health=LISTENERS,
    tunnel_addresses=st.lists(WORDS, max_size=2).map(tuple),
    ways=st.dictionaries(
        st.sampled_from([socket.AF_INET, socket.AF_INET6]), st.builds(Way, WORDS, st.integers(0, 65536))
    ),
    default_interfaces=st.lists(WORDS, max_size=2).map(tuple),
    has_ipv6=st.booleans(),
    sysctls=SYSCTLS,
    fixed_sysctls=st.just(frozenset()) | st.just(frozenset({"net.ipv4.ip_forward"})),
    firewall=SURVEYS | UNREADABLE,
    legacy_firewall=WORDS,
    firewall_tools=st.sampled_from([(), ("Docker",), ("Docker", "ufw", "firewalld")]),
    overlaps=st.lists(WORDS, max_size=2).map(tuple),
    nameservers=st.lists(WORDS, max_size=2).map(tuple),
    dns_problem=WORDS,
    disks=st.fixed_dictionaries({"state": DISKS, "temporary": DISKS}),
    frozen=st.booleans(),
    wall=st.floats(0, 4e9),
    machine_id_age=st.none() | st.floats(-1e9, 1e9),
    token_file=st.none() | st.integers(0, 100) | UNREADABLE,
)
PLANS = st.builds(
    Plan,
    udp_port=st.just(52625),
    health_address=st.sampled_from(["0.0.0.0", "::1"]),
    health_port=st.just(8080),
    masquerade=st.booleans(),
    token_source=WORDS,
    token_problem=WORDS,
    identity=WORDS,
    identity_source=st.sampled_from(["", "FIREZONE_ID", "/etc/machine-id"]),
    portal_problem=WORDS,
)
PORTALS = st.none() | st.builds(
    Portal,
    WORDS,
    st.just(443),
    st.booleans(),
    proxy=WORDS,
    failed=st.sampled_from(["", "settings", "name", "connection", "certificate"]),
    problem=WORDS,
    ahead=st.none() | st.floats(-1e9, 1e9),
)
SERVERS = st.lists(
    st.builds(Answer, WORDS, st.none() | st.floats(0, 2), st.none() | st.just(Endpoint.parse("192.0.2.1:1"))),
    max_size=2,
).map(tuple)
LIVES = st.none() | st.builds(
    Live,
    pid=st.integers(0, 9),
    portal_connected=st.booleans(),
    portal_error=WORDS | st.just("the portal answered HTTP 409 (code=gateway_already_connected)"),
    relays=st.lists(st.tuples(WORDS, st.booleans()), max_size=2).map(tuple),
    clients=st.integers(0, 3),
)


@given(
    st.builds(Seen, host=HOSTS, plan=PLANS, portal=PORTALS, stun=SERVERS, live=LIVES, live_problem=WORDS, stuck=WORDS)
)
def test_each_complaint_has_a_remedy_and_each_check_its_own_name(seen):
    checks = list(examine(seen))
    names = [check.name for check in checks]
    assert len(set(names)) == len(names) >= 25
    assert all(isinstance(check.state, State) for check in checks)
    for check in checks:
        if check.state in (State.WARN, State.FAIL) and not check.name.startswith("portal"):
            assert check.remedy, check


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "pid": st.none() | st.integers(0),
            "portal": st.none() | st.dictionaries(st.sampled_from(["state", "last_error"]), JSON),
            "relays": st.none()
            | st.lists(st.dictionaries(st.sampled_from(["addresses", "rtt_ms"]), st.none() | st.just([]))),
            "client_count": st.none() | st.integers(0),
        },
    )
)
def test_a_status_that_lacks_things_is_read(status):
    assert isinstance(live_from(status), Live)
