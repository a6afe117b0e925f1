"""The bench's side of a crowd: it makes members known to the portal and to the gateway, and gives orders."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import uuid
from typing import TYPE_CHECKING, Any, Self

from fzg.wireguard.keys import KeyPair
from tests.bench.crowd import TUN
from tests.lab.process import lab_environment, wait_until

if TYPE_CHECKING:
    from tests.lab.namespaces import Attachment
    from tests.lab.scenario import Lab

_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
GATEWAY_PORT = 52625
_HOST_PRIORITY = 2_130_706_431
_SECONDS_PER_MEMBER = 0.05  # patience


class Crowd:
    """A running crowd at `place`, which is on the gateway's local network. `addresses` are its members' own."""

    def __init__(self, lab: Lab, place: Attachment) -> None:
        self.place = place
        self.addresses: list[str] = []
        self._lab = lab
        place.namespace.sysctl(ipv4__conf__all__rp_filter=0)
        self._process = subprocess.Popen(
            [*_DIES_WITH_US, *place.namespace.prefix(), sys.executable, "-m", "tests.bench.crowd"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(os.environ) | lab_environment() | {"FIREZONE_ENGINE": "native"},
            text=True,
            start_new_session=True,
        )
        port = self._ask("port")
        self._candidate = f"candidate:1 1 udp {_HOST_PRIORITY} {place.ipv4} {port} typ host"
        place.namespace.ip(
            f"link set {TUN} mtu 1280 txqueuelen 10000 up",
            f"route add 10.20.0.0/16 dev {TUN}",
            "route add local 100.64.0.0/11 dev lo",
        )

    def grow(self, members: int) -> None:
        """Have at least so many members, with a session each."""
        portal = self._lab.portal
        state = portal.state()
        (gateway,) = state["gateways"].values()
        resource = next(key for key, each in state["resources"].items() if each["address"] == "10.20.0.0/16")
        identities = []
        for _ in range(members - len(self.addresses)):
            own = KeyPair.generate(os.urandom)
            payload = portal.authorize(
                resource=resource, client_id=str(uuid.uuid4()), client_key=base64.b64encode(own.public).decode()
            )
            mine, theirs = payload["client_ice_credentials"], payload["gateway_ice_credentials"]
            portal.push(
                kind="gateway",
                event="ice_candidates",
                payload={"client_id": payload["client"]["id"], "candidates": [self._candidate]},
            )
            identities.append((
                base64.b64encode(own.private.reveal()).decode(),
                gateway["public_key"],
                (self._lab.places["gateway"].ipv4, GATEWAY_PORT),
                payload["client"]["preshared_key"],
                payload["client"]["ipv4"],
                (mine["username"], mine["password"]),
                (theirs["username"], theirs["password"]),
            ))  # fmt: skip
            self.addresses.append(payload["client"]["ipv4"])
        self._ask("join", identities=identities)
        timeout = 10 + len(identities) * _SECONDS_PER_MEMBER
        wait_until(lambda: self._ask("joined") >= members, timeout=timeout, what=f"{members} clients connect")

    def probe(self, *, seconds: float, interval: float) -> None:
        """Send an ICE check and, half an `interval` later, a handshake, for a while, each round for another member."""
        self._ask("probe", seconds=seconds, interval=interval)

    def counts(self) -> dict[str, int]:
        """What it and its engine count."""
        counts: dict[str, int] = self._ask("counts")
        return counts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, op: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "it ended"}')
        if "error" in answer:
            raise RuntimeError(f"{op}: {answer['error']}")
        return answer["ok"]
