"""An in-memory relay after spec turn 5, and a virtual network that joins it with a `RelaySet`."""

from __future__ import annotations

import heapq
import struct
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from random import Random

from fzg.secret import Secret
from fzg.turn import Relay, RelaySet
from fzg.wire import stun
from fzg.wire.endpoint import Endpoint

BINDING, ALLOCATE, REFRESH, CHANNEL_BIND = 1, 3, 4, 9
REQUEST, SUCCESS, ERROR = 0, 2, 3
USERNAME, ERROR_CODE, CHANNEL_NUMBER, LIFETIME = 0x0006, 0x0009, 0x000C, 0x000D
XOR_PEER_ADDRESS, REALM, NONCE, XOR_RELAYED_ADDRESS = 0x0012, 0x0014, 0x0015, 0x0016
REQUESTED_ADDRESS_FAMILY, REQUESTED_TRANSPORT, XOR_MAPPED_ADDRESS = 0x0017, 0x0019, 0x0020
ADDITIONAL_ADDRESS_FAMILY, SOFTWARE, UNKNOWN_ATTRIBUTES = 0x8000, 0x8022, 0x000A

HOST4 = Endpoint.of("192.168.1.2", 52625)
HOST6 = Endpoint.of("2001:db8:1::2", 52625)
MAPPED4 = Endpoint.of("203.0.113.5", 40000)
MAPPED6 = Endpoint.of("2001:db8:1::2", 52625)

RELAY_ID = "0a133356-7a9e-4b9a-b413-0d95a5720fd8"


def peer(number: int) -> Endpoint:
    """An IPv4 client, distinct for distinct numbers below 2**16."""
    return Endpoint(bytes((203, 0, 113, 9)), 1 + number)


class ScriptedRelay:
    """Behaves like a Firezone relay unless a knob says otherwise."""

    def __init__(
        self,
        name: str = RELAY_ID,
        *,
        number: int = 7,
        families: str = "46",
        username: str = "2145916800:salt",
        password: str = "password",
        delay: float = 0.040,
    ) -> None:
        self.id = name
        self.ipv4 = Endpoint.of(f"198.51.100.{number}", 3478) if "4" in families else None
        self.ipv6 = Endpoint.of(f"2001:db8:9::{number}", 3478) if "6" in families else None
        self.username = username
        self.password = password
        self.realm = "firezone"
        self.delay = delay
        self.number = number
        self._serial = 0
        self.nonces: dict[Endpoint, bytes] = {}
        self.allocations: dict[Endpoint, dict[int, Endpoint]] = {}
        self.channels: dict[tuple[Endpoint, int], Endpoint] = {}
        self.deleted_at: dict[Endpoint, float] = {}
        # knobs
        self.mapped: dict[int, Endpoint] = {4: MAPPED4, 16: MAPPED6}
        self.lifetime = 600
        self.relays = families
        self.silent = False
        self.silent_to: set[int] = set()  # methods
        self.drop_channels: set[int] = set()
        self.errors: dict[int, list[tuple[int, bool]]] = {}  # by method: (code, signed), last one stays if forever
        self.error_forever = True
        self.unknown_attributes: tuple[int, ...] = ()
        self.realm_in_challenge: str | None = "firezone"
        self.always_stale = False
        self.wrong_key: bytes | None = None
        self.sign_success = True
        self.linger = 0.0
        self.mismatch_before_authentication = False
        self.errors_before_authentication = False
        self.bind_without_allocation = 437
        self.pad = False
        self.loss = 0.0
        self.loss_random = Random(5)
        self.delay_by_family: dict[int, float] = {}
        self.next_delays: list[float] = []
        # record
        self.count: Counter[int] = Counter()

    @property
    def relay(self) -> Relay:
        """As the portal describes it."""
        return Relay(self.id, self.ipv4, self.ipv6, self.username, Secret(self.password))

    @property
    def sockets(self) -> list[Endpoint]:
        return [socket for socket in (self.ipv4, self.ipv6) if socket is not None]

    @property
    def key(self) -> bytes:
        return stun.long_term_key(self.username, self.realm, self.password)

    def handle(self, payload: bytes, client: Endpoint, now: float) -> list[bytes]:
        """Answers to a request or ChannelData of `client`."""
        if self.silent or payload[0] >= 0x40:
            return []
        request = stun.parse(payload)
        assert request.message_class == REQUEST
        self.count[request.method] += 1
        if self.loss and self.loss_random.random() < self.loss:
            return []
        if request.method in self.silent_to:
            return []
        if request.method == CHANNEL_BIND and request.channel_number in self.drop_channels:
            return []
        answer = self._answer(request, client, now)
        return [] if answer is None else [answer]

    def _answer(self, request: stun.Message, client: Endpoint, now: float) -> bytes | None:
        forced = self.errors.get(request.method)
        if request.method == BINDING:
            if forced:
                return self._error(request, forced[0][0], signed=False)
            mapped = self.mapped[len(client.ip)]
            return self._success(request, [(XOR_MAPPED_ADDRESS, stun.xor_address(mapped, request.transaction_id))])
        if self.mismatch_before_authentication and request.method == ALLOCATE and self._stands(client, now):
            return self._error(request, 437, signed=False)
        if forced and self.errors_before_authentication:
            return self._error(request, forced[0][0], signed=False)
        nonce = self.nonces.get(client)
        if not request.has_integrity or request.username is None or request.nonce is None:
            return self._challenge(request, 401, client)
        if self.always_stale or request.nonce != nonce:
            self.nonces.pop(client, None)
            return self._challenge(request, 438, client)
        if request.username != self.username or not request.verify_integrity(self.key):
            return self._challenge(request, 401, client)
        if forced:
            code, signed = forced[0]
            if len(forced) > 1 or not self.error_forever:
                forced.pop(0)
            return self._error(request, code, signed=signed)
        match request.method:
            case 3:
                return self._allocate(request, client, now)
            case 4:
                return self._refresh(request, client, now)
            case 9:
                return self._channel_bind(request, client)
        return self._error(request, 400, signed=False)

    def _stands(self, client: Endpoint, now: float) -> bool:
        return client in self.allocations or now < self.deleted_at.get(client, -1e9) + self.linger

    def _allocate(self, request: stun.Message, client: Endpoint, now: float) -> bytes:
        if self._stands(client, now):
            return self._error(request, 437)
        additional = request.get(ADDITIONAL_ADDRESS_FAMILY)
        requested = request.get(REQUESTED_ADDRESS_FAMILY)
        wanted = "6" if requested == b"\2\0\0\0" else "4"
        families = self.relays if additional else wanted
        if families not in self.relays:
            return self._error(request, 440)
        self.allocations.clear()  # one allocation per username
        port = 49152 + self._serial
        self._serial += 1
        relayed = {}
        if "4" in families:
            relayed[4] = Endpoint.of(f"198.51.100.{self.number}", port)
        if "6" in families:
            relayed[16] = Endpoint.of(f"2001:db8:9::{self.number}", port)
        self.allocations[client] = relayed
        attributes = [
            (XOR_RELAYED_ADDRESS, stun.xor_address(address, request.transaction_id)) for address in relayed.values()
        ]
        mapped = stun.xor_address(client, request.transaction_id)
        return self._success(request, [*attributes, (XOR_MAPPED_ADDRESS, mapped), self._lifetime(self.lifetime)])

    def _refresh(self, request: stun.Message, client: Endpoint, now: float) -> bytes:
        if client not in self.allocations:
            return self._error(request, 437)
        if request.lifetime == 0:
            self.forget(client)
            self.deleted_at[client] = now
            return self._success(request, [self._lifetime(0)])
        return self._success(request, [self._lifetime(self.lifetime)])

    def _channel_bind(self, request: stun.Message, client: Endpoint) -> bytes:
        number, address = request.channel_number, request.xor_peer_address
        assert number is not None
        assert address is not None
        relayed = self.allocations.get(client)
        if relayed is None:
            return self._error(request, self.bind_without_allocation)
        if len(address.ip) not in relayed:
            return self._error(request, 443)
        held = {peer: number for (owner, number), peer in self.channels.items() if owner == client}
        if held.get(address, number) != number or self.channels.get((client, number), address) != address:
            return self._error(request, 400)
        self.channels[client, number] = address
        return self._success(request, [])

    def forget(self, client: Endpoint | None = None) -> None:
        """Lose the allocation (all of them) and its channels."""
        for owner in [client] if client else list(self.allocations):
            self.allocations.pop(owner, None)
            self.channels = {key: peer for key, peer in self.channels.items() if key[0] != owner}

    def restart(self, password: str) -> None:
        """A new secret: nothing is known any more, and answers are signed with another key."""
        self.password = password
        self.nonces.clear()
        self.forget()

    def channel_data(self, number: int, payload: bytes) -> bytes:
        """A datagram to the client."""
        data = struct.pack(">HH", number, len(payload)) + payload
        return data + bytes(-len(data) % 4) if self.pad else data

    def _challenge(self, request: stun.Message, code: int, client: Endpoint) -> bytes:
        nonce = self.nonces.setdefault(client, self._new_nonce())
        attributes = [(NONCE, nonce)]
        if self.realm_in_challenge is not None:
            attributes.insert(0, (REALM, self.realm_in_challenge.encode()))
        return self._error(request, code, attributes, signed=request.username is not None)

    def _new_nonce(self) -> bytes:
        self._serial += 1
        return b"nonce-%d" % self._serial

    def _success(self, request: stun.Message, attributes: list[tuple[int, bytes]]) -> bytes:
        signed = request.username is not None and self.sign_success
        return self._encode(request, SUCCESS, [(SOFTWARE, b"firezone-relay; rev=xxxx"), *attributes], signed=signed)

    def _error(
        self,
        request: stun.Message,
        code: int,
        attributes: list[tuple[int, bytes]] | None = None,
        *,
        signed: bool = True,
    ) -> bytes:
        attributes = [(ERROR_CODE, stun.error_code(code, "reason")), *(attributes or [])]
        if code == 420:
            attributes.append((UNKNOWN_ATTRIBUTES, b"".join(struct.pack(">H", one) for one in self.unknown_attributes)))
        return self._encode(request, ERROR, attributes, signed=signed and request.username is not None)

    def _encode(
        self, request: stun.Message, message_class: int, attributes: list[tuple[int, bytes]], *, signed: bool
    ) -> bytes:
        key = (self.wrong_key or self.key) if signed else None
        return stun.encode(request.method, message_class, request.transaction_id, attributes, integrity_key=key)

    @staticmethod
    def _lifetime(seconds: int) -> tuple[int, bytes]:
        return LIFETIME, struct.pack(">I", seconds)


@dataclass
class Sent:
    """One datagram of ours."""

    at: float
    destination: Endpoint
    payload: bytes

    @property
    def message(self) -> stun.Message:
        return stun.parse(self.payload)

    @property
    def method(self) -> int:
        return self.message.method


@dataclass
class Network:
    """Runs a `RelaySet` against scripted relays on a virtual clock."""

    relays: list[ScriptedRelay]
    now: float = 1000.0
    sent: list[Sent] = field(default_factory=list)
    events: list[tuple[float, object]] = field(default_factory=list)
    unwrapped: list[object] = field(default_factory=list)
    accept_unsigned_errors: bool = True

    def __post_init__(self) -> None:
        random = Random(1)
        self.start = self.now
        self.set = RelaySet(random=random.randbytes, accept_unsigned_errors=self.accept_unsigned_errors)
        self._queue: list[tuple[float, int, bytes, Endpoint, Endpoint]] = []
        self._serial = 0

    def connect(self) -> Network:
        """Give all relays to the set."""
        self.set.update([], [relay.relay for relay in self.relays], self.now)
        self.drain()
        return self

    def active(self) -> Network:
        """Run until every allocation stands; forget what was sent and reported meanwhile."""
        self.connect()
        self.run(1.0)
        assert all(status.state.value == "active" for status in self.set.status()), self.set.status()
        self.clear()
        return self

    def clear(self) -> None:
        self.sent.clear()
        self.events.clear()
        self.unwrapped.clear()

    def drain(self) -> None:
        """Take transmits and events, and have the relays answer."""
        while (event := self.set.poll_event()) is not None:
            self.events.append((self.now, event))
        while (transmit := self.set.poll_transmit()) is not None:
            self.sent.append(Sent(self.now, transmit.destination, transmit.payload))
            for relay in self.relays:
                if transmit.destination in relay.sockets:
                    client = HOST4 if len(transmit.destination.ip) == 4 else HOST6
                    delay = relay.delay_by_family.get(len(client.ip), relay.delay)
                    if relay.next_delays:
                        delay = relay.next_delays.pop(0)
                    for answer in relay.handle(transmit.payload, client, self.now):
                        self.deliver(answer, transmit.destination, delay)

    def deliver(self, payload: bytes, source: Endpoint, delay: float = 0.0) -> None:
        """Have a datagram arrive."""
        local = HOST4 if len(source.ip) == 4 else HOST6
        self._serial += 1
        heapq.heappush(self._queue, (self.now + delay, self._serial, payload, source, local))

    def run(self, seconds: float) -> Network:
        """Let time pass."""
        return self.run_until(self.now + seconds)

    def run_until(self, end: float) -> Network:
        spins = 0
        self.drain()
        while True:
            deadline = self.set.poll_timeout()
            arrival = self._queue[0][0] if self._queue else None
            instants = [at for at in (None if deadline is None else deadline.at, arrival) if at is not None]
            if not instants or min(instants) > end:
                break
            following = max(min(instants), self.now)
            spins = 0 if following > self.now else spins + 1
            assert spins < 5000, f"spinning on {deadline}"
            self.now = following
            if arrival is not None and arrival <= self.now:
                _, _, payload, source, local = heapq.heappop(self._queue)
                result = self.set.handle_datagram(payload, source, local, self.now)
                if result is not None and hasattr(result, "payload"):
                    self.unwrapped.append(result)
            else:
                self.set.handle_timeout(self.now)
                again = self.set.poll_timeout()
                assert again is None or again.at > self.now or again != deadline, f"deadline stays at {again}"
            self.drain()
        self.now = end
        return self

    def requests(self, method: int) -> list[Sent]:
        """Our requests of one method, in order."""
        return [sent for sent in self.sent if sent.payload[0] < 4 and sent.method == method]

    def methods(self) -> list[int]:
        """What we sent, by STUN method."""
        return [sent.method for sent in self.sent if sent.payload[0] < 4]

    def event_types(self) -> list[str]:
        return [type(event).__name__ for _, event in self.events]

    def all(self, kind: type) -> list:
        """Events of one type."""
        return [event for _, event in self.events if isinstance(event, kind)]


def firezone_password(expiry: str, secret: str, salt: str) -> str:
    """Spec turn 5.1."""
    from base64 import b64encode

    return b64encode(sha256(f"{expiry}:{secret}:{salt}".encode()).digest()).decode().rstrip("=")
