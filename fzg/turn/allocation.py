"""The allocation client: one relay, from the first Binding to the delete (spec turn 2)."""

from __future__ import annotations

import logging
from enum import Enum
from math import inf
from typing import TYPE_CHECKING, Final, assert_never

from fzg.sansio import Deadline, Transmit
from fzg.turn.authentication import Authentication, Challenge, Integrity
from fzg.turn.channels import (
    BUFFERED_PEERS,
    REFUSAL_LONG,
    REFUSAL_SHORT,
    Channel,
    ChannelTable,
    Due,
    PeerBuffer,
    Refusals,
)
from fzg.turn.events import (
    CandidateAdded,
    CandidateInvalidated,
    ChannelChanged,
    LocalCandidate,
    Route,
    Unwrapped,
    Use,
)
from fzg.turn.recovery import Backoff, Grants, Healing, Ladder, Remedy
from fzg.turn.rtt import RoundTrip
from fzg.turn.transactions import RETRANSMISSION, SINGLE_SHOT, Purpose, Transaction, Transactions
from fzg.wire import stun
from fzg.wire.candidate import Kind
from fzg.wire.stun import AttributeType, MessageClass

if TYPE_CHECKING:
    from fzg.sansio import Random
    from fzg.turn.events import Outbox, Relay
    from fzg.wire.endpoint import Endpoint

_LOG = logging.getLogger(__name__)

KEEP_ALIVE: Final = 25.0  # NAT bindings die after 30..120 s (spec turn 2.8)
LEAST_REFRESH: Final = 1.0  # seconds, whatever lifetime the relay grants
REFRESH_RETRY: Final = 10.0  # after an error that says nothing about the allocation (spec turn 7)
PROBE_INTERVAL: Final = 10.0  # between Refreshes that only ask whether the allocation still exists
MAX_CHALLENGES: Final = 3  # in a row for one request; a relay that always says 438 must not make us loop
FULL_WARNING_INTERVAL: Final = 60.0


class State(Enum):
    """Spec turn 2.2."""

    PROBING = "probing"
    ALLOCATING = "allocating"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    DEAD = "dead"


_IF_SILENT: Final = (
    "; if all relays do, UDP is blocked: let it out of this network to any port, and answers back in"
    " (firezone-gateway doctor)"
)


class Failure(Enum):
    """Why an allocation is dead."""

    NO_RESPONSE = "no response"
    AUTHENTICATION = "authentication"
    PROTOCOL = "protocol"


class Allocation:
    """Sends Bindings on creation. When `state` is DEAD the owner removes it; it does nothing any more then."""

    def __init__(
        self,
        relay: Relay,
        *,
        realm: str,
        software: str,
        accept_unsigned_errors: bool,
        random: Random,
        outbox: Outbox,
        now: float,
    ) -> None:
        self.relay: Final = relay
        self.state = State.PROBING
        self.failure: Failure | None = None
        self.relayed: dict[int, Endpoint] = {}
        self._software = software.encode()
        self._random = random
        self._outbox = outbox
        self._sockets = relay.sockets
        self._authentication = Authentication(relay, realm, accept_unsigned_errors=accept_unsigned_errors)
        self._transactions = Transactions()
        self._channels = ChannelTable()
        self._buffer = PeerBuffer()
        self._refusals = Refusals()
        self._ladder = Ladder()
        self._healing = Healing()
        self._backoff = Backoff()
        self._grants = Grants()
        self._round_trip = RoundTrip()
        self._active: Endpoint | None = None
        self._hosts: dict[int, Endpoint] = {}
        self._mapped: dict[int, tuple[Endpoint, Endpoint]] = {}  # reflexive address and its base
        self._ever_succeeded = False
        self._lifetime = 0.0
        self._expires_at: float | None = None
        self._refresh_at: float | None = None
        self._allocate_at: float | None = None
        self._retry_at: float | None = None
        self._refresh_again = False
        self._last_sent = now
        self._last_received = -inf
        self._last_binding = now
        self._last_probe = -inf
        self._doubted: list[Endpoint] = []  # refused with 400 or not answered: the allocation may be gone
        self._warned_full_at = -inf
        self._begin_probing(now)

    # -- what the relay set asks

    @property
    def rtt(self) -> float | None:
        """The smoothed round-trip time in seconds; None before the first answer."""
        return self._round_trip.smoothed

    @property
    def channel_count(self) -> int:
        """Channels the relay may know, usable or not."""
        return len(self._channels)

    def reflexive_candidates(self) -> list[LocalCandidate]:
        """Host and server-reflexive candidates; they outlive the allocation."""
        hosts = [self._candidate(Kind.HOST, address, address) for address in self._hosts.values()]
        return hosts + [self._candidate(Kind.SRFLX, address, base) for address, base in self._mapped.values()]

    def relay_candidates(self) -> list[LocalCandidate]:
        """One per relayed address, in the order in which they are announced."""
        return [self._candidate(Kind.RELAY, address, address) for address in self.relayed.values()]

    # -- inputs

    def handle_message(self, message: stun.Message, local: Endpoint, now: float) -> None:
        """A STUN message from one of the relay's sockets; `local` is the address it arrived on."""
        transaction = self._transactions.find(message.transaction_id)
        if transaction is None:
            return self._drop("unknown transaction")
        error = message.error
        if message.method != transaction.purpose.method:
            return self._drop("wrong method")
        if message.message_class is not MessageClass.SUCCESS and (
            message.message_class is not MessageClass.ERROR or error is None
        ):
            return self._drop("not a response")
        integrity = self._authentication.judge(message)
        if integrity is not Integrity.ACCEPTED:
            # The request stays in flight: a forged reply must neither complete nor cancel it.
            transaction.wrong_integrity |= integrity is Integrity.WRONG
            return self._drop(integrity.value)
        self._transactions.finish(transaction)
        self._last_received = now
        self._round_trip.add(now - transaction.started, retransmitted=transaction.sends > 1)
        if message.message_class is MessageClass.SUCCESS:
            return self._handle_success(transaction, message, local, now)
        assert error is not None
        _LOG.debug("relay %s answered %s with %s", self.relay.id, transaction.purpose.name, error)
        return self._handle_error(transaction, message, error.code, now)

    def handle_channel_data(self, number: int, payload: bytes, now: float) -> Unwrapped | None:
        """The payload and where it came from; None when the channel is not usable or there is no payload."""
        channel = self._channels.receivable(number, now)
        relayed = None if channel is None else self.relayed.get(channel.peer.family)
        if channel is None or relayed is None:
            self._drop("unknown channel")
            return None
        self._last_received = now
        self._channels.note(channel, now, data=not _is_stun(payload))
        if not payload:
            return None
        return Unwrapped(payload, channel.peer, relayed, self.relay.id)

    def bind(self, peer: Endpoint, now: float) -> None:
        """Have a channel to `peer`, unless that is useless, refused or under way (spec turn 3.2)."""
        match self.state:
            case State.SUSPENDED | State.DEAD:
                return
            case State.PROBING | State.ALLOCATING:
                self._buffer.add([peer])
                return
            case State.ACTIVE:
                pass
            case unreachable:
                assert_never(unreachable)
        if (
            peer.family not in self.relayed
            or self._channels.usable(peer, now) is not None
            or self._refusals.is_refused(peer, now)
        ):
            return
        channel = self._channels.open(peer, now)
        if channel is None:
            self._drop("all channels taken")
            if now - self._warned_full_at >= FULL_WARNING_INTERVAL:
                self._warned_full_at = now
                _LOG.warning("relay %s: all channel numbers are taken", self.relay.id)
            return
        self._request(Purpose.CHANNEL_BIND, now, peer=peer, channel=channel.number)
        self._announce(channel, usable=True)

    def route(self, peer: Endpoint, use: Use, now: float) -> Route | None:
        """How to send to `peer` now; None starts a bind, and what was to be sent is lost."""
        channel = self._channels.usable(peer, now)
        if channel is None:
            if use is not Use.LOOKUP:
                self._drop("no channel to send on")
            self.bind(peer, now)
            return None
        assert self._active is not None
        if use is not Use.LOOKUP:
            self._last_sent = now
            self._channels.note(channel, now, data=use is Use.DATA)
        return Route(self._active, channel.number)

    def nominate(self, peer: Endpoint, *, nominated: bool) -> None:
        """Keep the channel to `peer` bound even when only ICE checks use it, or no longer."""
        self._channels.nominate(peer, nominated=nominated)

    def note_data(self, number: int, *, sent: bool, received: bool, now: float) -> None:
        """Data went over the channel without passing here."""
        channel = self._channels.receivable(number, now)
        if channel is None or not (sent or received):
            return
        if sent:
            self._last_sent = now
        if received:
            self._last_received = now
        self._channels.note(channel, now, data=True)

    def probe(self, now: float) -> None:
        """An update did not list this relay: find out quickly whether it lives (spec turn 2.9 step 3)."""
        if self.state is State.SUSPENDED:
            self._begin_probing(now)
        elif self.state is State.ACTIVE:
            refresh = self._transactions.first(Purpose.REFRESH)
            if refresh is None:
                self._request(Purpose.REFRESH, now, intervals=SINGLE_SHOT)
            else:
                self._transactions.shorten(refresh, now)
                self._transmit(refresh, now)

    def doubt(self, now: float) -> None:
        """What went through the relay met with silence: find out whether the allocation still exists."""
        if self.state is State.ACTIVE:
            self._probe_refresh(now)

    def delete(self) -> None:
        """Tell the relay once to forget the allocation, without waiting for an answer (DEV 10)."""
        if self.state is State.ACTIVE and self._active is not None:
            datagram = self._encode(Purpose.DELETE, self._random(stun.TRANSACTION_ID_LENGTH))
            self._outbox.transmits.append(Transmit(self._active, datagram))

    def close(self, now: float) -> None:
        """Withdraw candidates and channels; nothing happens here any more."""
        self._invalidate(now, rebind=False)
        self._transactions.finish_unless(lambda _: False)
        self._active = None
        self.state = State.DEAD

    # -- time

    def poll_timeout(self) -> Deadline | None:
        """When `handle_timeout` is due. Asked after every datagram of the gateway: it makes one object at most."""
        at, reason = self._transactions.soonest(), "turn retransmission"
        match self.state:
            case State.ALLOCATING:
                at, reason = _sooner(at, reason, self._allocate_at, "turn allocate")
            case State.SUSPENDED:
                at, reason = _sooner(at, reason, self._retry_at, "turn retry")
            case State.ACTIVE:
                at, reason = _sooner(at, reason, self._expires_at, "turn expiry")
                at, reason = _sooner(at, reason, self._channels.soonest(), "turn channel")
                if not self._transactions.in_flight(Purpose.REFRESH):
                    at, reason = _sooner(at, reason, self._refresh_at, "turn refresh")
                if not self._transactions.in_flight(Purpose.BINDING):
                    at, reason = _sooner(at, reason, self._keep_alive_at(), "turn keep-alive")
            case State.PROBING | State.DEAD:
                pass
            case unreachable:
                assert_never(unreachable)
        return None if at is None else Deadline(at, reason)

    def handle_timeout(self, now: float) -> None:
        """Do everything that is due."""
        while (due := self._transactions.pop_due(now)) is not None:
            transaction, given_up = due
            if given_up:
                self._handle_given_up(transaction, now)
            else:
                self._transmit(transaction, now)
                self._look_for_life(transaction, now)
        if self.state is State.ACTIVE and self._expires_at is not None and now >= self._expires_at:
            _LOG.info("relay %s: the allocation expired", self.relay.id)
            self._invalidate(now, rebind=True)
            self._allocate(now)
        elif self.state is State.ALLOCATING and self._allocate_at is not None and now >= self._allocate_at:
            self._send_allocate(now)
        elif self.state is State.SUSPENDED and self._retry_at is not None and now >= self._retry_at:
            self._begin_probing(now)
        if self.state is State.ACTIVE:
            self._maintain(now)

    def _maintain(self, now: float) -> None:
        """Refresh, channels, keep-alive."""
        if self._refresh_at is not None and now >= self._refresh_at:
            self._refresh(now)
        while (due := self._channels.pop_due(now)) is not None:
            channel, what = due
            if what is Due.LAPSE:
                self._announce(channel, usable=False)
            else:
                self._channels.begin_refresh(channel)
                self._request(Purpose.CHANNEL_BIND, now, peer=channel.peer, channel=channel.number)
        if now >= self._keep_alive_at():
            self._ask_for_life(now)

    def _look_for_life(self, unanswered: Transaction, now: float) -> None:
        """Some relays say nothing about an allocation that they lost, but answer a Binding (DEV 14)."""
        asks = unanswered.purpose in (Purpose.REFRESH, Purpose.CHANNEL_BIND) and not unanswered.challenges
        if asks and self.state is State.ACTIVE and self._last_received <= unanswered.started:
            self._ask_for_life(now)

    def _ask_for_life(self, now: float) -> None:
        if not self._transactions.in_flight(Purpose.BINDING):
            assert self._active is not None
            self._last_binding = now
            self._request(Purpose.BINDING, now, destination=self._active)

    def _keep_alive_at(self) -> float:
        """25 s of silence in either direction, but never more often (DEV 8)."""
        return max(min(self._last_sent, self._last_received), self._last_binding) + KEEP_ALIVE

    # -- states

    def _begin_probing(self, now: float) -> None:
        """One Binding to each socket of the relay."""
        self._transactions.finish_unless(lambda _: False)
        self.state = State.PROBING
        self._active = None
        self._retry_at = None
        self._last_binding = now
        for socket in self._sockets:
            self._request(Purpose.BINDING, now, destination=socket)

    def _allocate(self, now: float) -> None:
        """A new attempt to get an allocation."""
        self.state = State.ALLOCATING
        self._ladder.begin()
        self._send_allocate(now)

    def _send_allocate(self, now: float) -> None:
        self._allocate_at = None
        self._request(Purpose.ALLOCATE, now)

    def _heal(self, now: float) -> None:
        """Allocate met an allocation that is not ours to use (spec turn 2.12)."""
        match self._healing.handle_mismatch(now):
            case Remedy.DELETE:
                self._request(Purpose.DELETE, now)
            case Remedy.WAIT:
                self._allocate_at = now + self._healing.pause
            case Remedy.SUSPEND:
                self._suspend(now)
            case unreachable:
                assert_never(unreachable)

    def _suspend(self, now: float) -> None:
        """The relay gives no allocation for now. What it told about our addresses stays."""
        pause = self._backoff.pause()
        _LOG.warning("relay %s gives no allocation, next attempt in %d s", self.relay.id, pause)
        self._buffer.take()
        self._healing.reset()
        self._allocate_at = None
        self._retry_at = now + pause
        self.state = State.SUSPENDED

    def _die(self, failure: Failure, now: float) -> None:
        advice = _IF_SILENT if failure is Failure.NO_RESPONSE else ""
        _LOG.warning("relay %s failed: %s%s", self.relay.id, failure.value, advice)
        self.failure = failure
        self.close(now)

    def _invalidate(self, now: float, *, rebind: bool) -> None:
        """Forget the allocation. Nonce, credentials, host and server-reflexive candidates stay (spec turn 2.11)."""
        if rebind:
            for peer in self._doubted:
                self._refusals.forgive(peer)
            self._buffer.add(self._channels.recent_peers(now))
            self._buffer.add(self._doubted)
        for channel in self._channels:
            if not channel.lapsed:
                self._announce(channel, usable=False)
        self._channels.clear()
        for address in self.relayed.values():
            self._outbox.events.append(CandidateInvalidated(self.relay.id, address))
        self.relayed = {}
        self._doubted.clear()
        self._expires_at = self._refresh_at = self._allocate_at = None
        self._refresh_again = False
        # A Binding of the other family still brings candidates, and its end has no effect.
        self._transactions.finish_unless(
            lambda transaction: transaction.purpose is Purpose.BINDING and not self._is_active_family(transaction)
        )

    # -- responses

    def _handle_success(self, transaction: Transaction, message: stun.Message, local: Endpoint, now: float) -> None:
        match transaction.purpose:
            case Purpose.BINDING:
                self._handle_bound(transaction, message, local, now)
            case Purpose.ALLOCATE:
                self._handle_allocated(message, now)
            case Purpose.REFRESH:
                self._handle_refreshed(message, now)
            case Purpose.DELETE:
                self._handle_deleted(now)
            case Purpose.CHANNEL_BIND:
                self._handle_channel_bound(transaction, now)
            case unreachable:
                assert_never(unreachable)

    def _handle_bound(self, transaction: Transaction, message: stun.Message, local: Endpoint, now: float) -> None:
        """A Binding success: our addresses, and at first the active socket."""
        family = transaction.destination.family
        if self._hosts.get(family) != local:
            self._hosts[family] = local
            self._add_candidate(self._candidate(Kind.HOST, local, local))
        mapped = message.xor_mapped_address
        before = self._mapped.get(family)
        if mapped is not None and mapped.family == local.family and before != (mapped, local):
            self._mapped[family] = (mapped, local)
            self._add_candidate(self._candidate(Kind.SRFLX, mapped, local))
            moved = before is not None and before[0] != mapped
            if moved and self.state is State.ACTIVE and transaction.destination == self._active:
                # The relay knows us by the old 5-tuple; its answer to a Refresh says so at once (DEV 7).
                _LOG.info("relay %s sees us at a new address", self.relay.id)
                self._refresh_again = self._transactions.in_flight(Purpose.REFRESH)
                self._refresh(now)
        if self.state is State.PROBING:
            self._active = transaction.destination
            self._allocate(now)

    def _handle_allocated(self, message: stun.Message, now: float) -> None:
        relayed: dict[int, Endpoint] = {}
        for address in message.xor_relayed_addresses:
            relayed.setdefault(address.family, address)
        if not message.lifetime or not relayed:
            _LOG.warning("relay %s: Allocate success without lifetime or usable relayed address", self.relay.id)
            return self._suspend(now)
        self._ladder.handle_success()
        self._healing.reset()
        self._grants.handle_granted(now)
        if self._grants.hold:
            self._backoff.reset()
        self._refusals.handle_new_allocation()
        self._ever_succeeded = True
        self.state = State.ACTIVE
        self.relayed = dict(sorted(relayed.items()))  # AF_INET sorts before AF_INET6
        self._start_lifetime(message.lifetime, now)
        _LOG.info("relay %s: allocation active for %d s", self.relay.id, message.lifetime)
        for candidate in self.relay_candidates():
            self._add_candidate(candidate)
        for peer in self._buffer.take():
            self.bind(peer, now)
        return None

    def _handle_refreshed(self, message: stun.Message, now: float) -> None:
        if message.lifetime == 0:
            return self._allocate_anew(now)
        self._doubted.clear()
        self._start_lifetime(self._lifetime if message.lifetime is None else message.lifetime, now)
        if self._refresh_again:
            self._refresh(now)
        return None

    def _handle_deleted(self, now: float) -> None:
        """The delete was answered in any way: only a new Allocate can tell more."""
        self._healing.handle_deleted(now)
        self._send_allocate(now)

    def _handle_channel_bound(self, transaction: Transaction, now: float) -> None:
        channel = self._bound_channel(transaction)
        if channel is not None:
            lapsed = channel.lapsed
            self._channels.confirm(channel, now)
            self._refusals.forgive(channel.peer)
            if lapsed:  # the answer to its refresh came late, but the relay has bound it anew
                self._announce(channel, usable=True)

    def _handle_error(self, transaction: Transaction, message: stun.Message, code: int, now: float) -> None:
        if transaction.purpose is Purpose.BINDING:
            if self.state is State.PROBING and not len(self._transactions):
                self._die(Failure.NO_RESPONSE, now)
        elif code in (401, 438):
            self._handle_challenge(transaction, message, now)
        else:
            self._handle_refusal(transaction, message, code, now)

    def _handle_challenge(self, transaction: Transaction, message: stun.Message, now: float) -> None:
        challenge = self._authentication.handle_challenge(message, transaction.nonce)
        binds = transaction.purpose is Purpose.CHANNEL_BIND
        if challenge is Challenge.ANSWER:
            if transaction.challenges >= MAX_CHALLENGES:
                return self._handle_given_up(transaction, now)
            challenges = transaction.challenges + 1
            return self._request(
                transaction.purpose, now, peer=transaction.peer, channel=transaction.channel, challenges=challenges
            )
        if challenge is Challenge.REFUSED:
            if binds and (message.realm is None or message.nonce is None):
                return self._handle_refusal(transaction, message, 403, now)  # pion's way to refuse a peer
            return self._die(Failure.AUTHENTICATION, now)
        if challenge is Challenge.FOREIGN_REALM:
            _LOG.warning("relay %s wants credentials for another realm", self.relay.id)
        return self._handle_refusal(transaction, message, 0, now)

    def _handle_refusal(self, transaction: Transaction, message: stun.Message, code: int, now: float) -> None:
        """An error that more authentication does not help; code 0 stands for "no known one"."""
        match transaction.purpose:
            case Purpose.ALLOCATE:
                self._handle_allocate_refused(message, code, now)
            case Purpose.REFRESH:
                self._handle_refresh_refused(code, now)
            case Purpose.DELETE:
                self._handle_deleted(now)
            case Purpose.CHANNEL_BIND:
                self._handle_channel_refused(transaction, code, now)
            case Purpose.BINDING:
                pass
            case unreachable:
                assert_never(unreachable)

    def _handle_allocate_refused(self, message: stun.Message, code: int, now: float) -> None:
        """Spec turn 2.7."""
        if code in (437, 441):
            return self._heal(now)
        # An unsigned 400 after a success may be anybody's or a full table: not a reason to give the relay up.
        credible = message.has_integrity or not self._ever_succeeded
        lists_family = AttributeType.ADDITIONAL_ADDRESS_FAMILY in message.unknown_attributes
        may_step = code in (440, 508) or (code == 400 and credible) or (code == 420 and lists_family)
        if may_step and self._ladder.step_down(code):
            return self._send_allocate(now)
        if code in (405, 420, 442) or (code == 400 and credible):
            return self._die(Failure.PROTOCOL, now)
        return self._suspend(now)

    def _handle_refresh_refused(self, code: int, now: float) -> None:
        match code:
            case 437:
                self._allocate_anew(now)
            case 441:
                self._allocate_anew(now, foreign=True)
            case 420:
                self._die(Failure.PROTOCOL, now)
            case _:
                _LOG.info("relay %s: Refresh failed with error %d", self.relay.id, code)
                self._refresh_again = False
                self._refresh_at = now + REFRESH_RETRY

    def _handle_channel_refused(self, transaction: Transaction, code: int, now: float) -> None:
        """Spec turn 3.5."""
        peer = transaction.peer
        assert peer is not None
        match code:
            case 437:
                return self._allocate_anew(now, peer)
            case 441:
                return self._allocate_anew(now, foreign=True)
            case 420:
                return self._die(Failure.PROTOCOL, now)
        channel = self._bound_channel(transaction)
        if channel is not None:
            self._channels.remove(channel)
            self._announce(channel, usable=False)
        match code:
            case 400:
                self._refusals.add_bad_request(peer, now)
                self._doubted = [*self._doubted, peer][-BUFFERED_PEERS:]
                self._probe_refresh(now)
            case 403:
                self._refusals.add(peer, now + REFUSAL_LONG)
            case 443:
                self._refusals.add(peer, inf)
            case _:
                self._refusals.add(peer, now + REFUSAL_SHORT)
        return None

    def _allocate_anew(self, now: float, peer: Endpoint | None = None, *, foreign: bool = False) -> None:
        """The relay has no allocation of ours (spec turn 2.12); `peer` waits for a channel.

        `foreign`: our 5-tuple belongs to other credentials, so only its expiry helps: ask with pauses.
        """
        self._invalidate(now, rebind=True)
        self._grants.handle_forgotten(now)
        if self._grants.are_in_vain:
            return self._suspend(now)
        if peer is not None:
            self._buffer.add([peer])
        if foreign:
            self._healing.skip_delete(now)
        return self._allocate(now)

    def _handle_given_up(self, transaction: Transaction, now: float) -> None:
        """No answer in time, or too many challenges (spec turn 2.11)."""
        purpose = transaction.purpose
        self._drop("given up")
        if self.state is State.PROBING:
            if not len(self._transactions):
                self._die(Failure.NO_RESPONSE, now)
            return
        if purpose is Purpose.BINDING and not self._is_active_family(transaction):
            return
        # A request that answers a challenge was asked for by the relay itself.
        alive = self._last_received > transaction.started or transaction.challenges > 0
        if transaction.wrong_integrity:
            # A restarted relay answers with a key made from its new secret.
            self._die(Failure.AUTHENTICATION, now)
        elif alive and purpose is Purpose.CHANNEL_BIND:
            channel = self._bound_channel(transaction)
            if channel is not None:
                self._channels.retire(channel, now)
                self._announce(channel, usable=False)
                self._refusals.add(channel.peer, now + REFUSAL_SHORT)
                self._doubted = [*self._doubted, channel.peer][-BUFFERED_PEERS:]
            self._probe_refresh(now)
        elif alive and purpose in (Purpose.REFRESH, Purpose.DELETE):
            self._invalidate(now, rebind=True)
            self._allocate(now)
        else:
            self._die(Failure.NO_RESPONSE, now)

    # -- requests

    def _refresh(self, now: float) -> None:
        """Send a Refresh unless one is in flight."""
        if not self._transactions.in_flight(Purpose.REFRESH):
            self._refresh_again = False
            self._request(Purpose.REFRESH, now)

    def _probe_refresh(self, now: float) -> None:
        """Ask whether the allocation still exists, not too often."""
        if now - self._last_probe >= PROBE_INTERVAL:
            self._last_probe = now
            self._refresh(now)

    def _start_lifetime(self, lifetime: float, now: float) -> None:
        self._lifetime = lifetime
        self._expires_at = now + lifetime
        self._refresh_at = now + max(lifetime / 2, LEAST_REFRESH)

    def _request(
        self,
        purpose: Purpose,
        now: float,
        *,
        destination: Endpoint | None = None,
        peer: Endpoint | None = None,
        channel: int = 0,
        challenges: int = 0,
        intervals: tuple[float, ...] = RETRANSMISSION,
    ) -> None:
        """Start a transaction with the active socket, or with `destination`."""
        destination = destination or self._active
        assert destination is not None
        transaction_id = self._random(stun.TRANSACTION_ID_LENGTH)
        datagram = self._encode(purpose, transaction_id, peer=peer, channel=channel)
        transaction = Transaction(
            transaction_id,
            purpose,
            destination,
            datagram,
            None if purpose is Purpose.BINDING else self._authentication.nonce,
            now,
            challenges=challenges,
            peer=peer,
            channel=channel,
            intervals=intervals,
        )
        self._transactions.start(transaction)
        self._transmit(transaction, now)

    def _encode(
        self, purpose: Purpose, transaction_id: bytes, *, peer: Endpoint | None = None, channel: int = 0
    ) -> bytes:
        """Attributes in the order of spec turn 1.5; bare as long as no nonce is known (DEV 1)."""
        attributes: list[tuple[int, bytes]] = []
        match purpose:
            case Purpose.ALLOCATE:
                attributes.extend(self._ladder.form.value)
            case Purpose.DELETE:
                attributes.append((AttributeType.LIFETIME, stun.uint32(0)))
            case Purpose.CHANNEL_BIND:
                assert peer is not None
                attributes.append((AttributeType.XOR_PEER_ADDRESS, stun.xor_address(peer, transaction_id)))
                attributes.append((AttributeType.CHANNEL_NUMBER, stun.uint16(channel)))
            case Purpose.BINDING | Purpose.REFRESH:
                pass
            case unreachable:
                assert_never(unreachable)
        attributes.append((AttributeType.SOFTWARE, self._software))
        credentials = [] if purpose is Purpose.BINDING else self._authentication.attributes()
        return stun.encode(
            purpose.method,
            MessageClass.REQUEST,
            transaction_id,
            [*attributes, *credentials],
            integrity_key=self._authentication.key if credentials else None,
        )

    def _transmit(self, transaction: Transaction, now: float) -> None:
        if transaction.purpose is not Purpose.BINDING:
            self._last_sent = now
        self._outbox.transmits.append(Transmit(transaction.destination, transaction.datagram))

    # -- small parts

    def _bound_channel(self, transaction: Transaction) -> Channel | None:
        """The channel that a ChannelBind was for, if it still is the peer's."""
        channel = None if transaction.peer is None else self._channels.find(transaction.peer)
        return channel if channel is not None and channel.number == transaction.channel else None

    def _is_active_family(self, transaction: Transaction) -> bool:
        return self._active is not None and transaction.destination.family == self._active.family

    def _candidate(self, kind: Kind, address: Endpoint, base: Endpoint) -> LocalCandidate:
        mismatch = kind is Kind.RELAY and self._active is not None and address.family != self._active.family
        return LocalCandidate(kind, address, base, mismatch, self.relay.id)

    def _add_candidate(self, candidate: LocalCandidate) -> None:
        self._outbox.events.append(CandidateAdded(self.relay.id, candidate))

    def _announce(self, channel: Channel, *, usable: bool) -> None:
        self._outbox.events.append(
            ChannelChanged(
                self.relay.id, self._sockets, channel.number, channel.peer, sendable=usable, receivable=usable
            )
        )

    def _drop(self, reason: str) -> None:
        self._outbox.counters[reason] += 1


def _sooner(at: float | None, reason: str, other: float | None, other_reason: str) -> tuple[float | None, str]:
    return (other, other_reason) if other is not None and (at is None or other < at) else (at, reason)


def _is_stun(payload: bytes) -> bool:
    """Whether inner data is an ICE check or its answer."""
    return len(payload) >= 20 and payload[0] < 4 and payload[4:8] == stun.MAGIC_COOKIE.to_bytes(4, "big")
