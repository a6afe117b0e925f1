"""Every message between portal and gateway as a record (spec portal 2), and JSON to and from them.

Identifiers are canonical UUID strings, keys 32 raw bytes, tunnel addresses packed bytes, secrets `Secret`.
Unknown keys are ignored. A message that breaks a rule is `Malformed` as a whole, with two exceptions: a bad candidate
is left out alone (2.5), and a bad filter in `resource_updated` permits nothing, because skipping that message would
leave in force the wider rule that it replaces (tunnel 14).
"""

from __future__ import annotations

import base64
import binascii
import logging
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias

import msgspec

from fzg.portal.uuids import canonical_uuid
from fzg.secret import Secret
from fzg.wire import Malformed
from fzg.wire.candidate import priority_of
from fzg.wire.endpoint import Endpoint

if TYPE_CHECKING:
    from collections.abc import Callable

_LOG = logging.getLogger(__name__)

UnixTime: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
Port: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
_Unsigned: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]

MAX_ICE_USERNAME = 256
"""Bytes (RFC 8445 5.3); a check carries two, and what no STUN attribute holds could never be sent."""


class Id(str):
    """A UUID in its lower-case hyphenated form."""

    __slots__ = ()


class PublicKey(bytes):
    """32 bytes of X25519 public key."""

    __slots__ = ()


class Ipv4(bytes):
    """A tunnel address, 4 bytes in network order."""

    __slots__ = ()


class Ipv6(bytes):
    """A tunnel address, 16 bytes in network order."""

    __slots__ = ()


class IceUsername(str):
    """The user name fragment of one ICE side, of at most `MAX_ICE_USERNAME` bytes."""

    __slots__ = ()


class Cidr(str):
    """A network with its prefix length and no host bits, as text."""

    __slots__ = ()

    @property
    def network(self) -> IPv4Network | IPv6Network:
        """The network as an `ipaddress` object."""
        return ip_network(str(self))


class Relay(msgspec.Struct, frozen=True, kw_only=True):
    """One TURN server with the addresses that the portal listed under its id, at most one per family."""

    id: Id
    ipv4: Endpoint | None
    ipv6: Endpoint | None
    username: str
    password: Secret[str]


class Relays(tuple[Relay, ...]):
    """The relays of a list, merged by id in order of first appearance; STUN-only entries are left out."""

    __slots__ = ()


class Candidates(tuple[str, ...]):
    """The usable candidate strings of a list, in its order."""

    __slots__ = ()


class TcpFilter(msgspec.Struct, frozen=True, tag_field="protocol", tag="tcp"):
    """TCP to the inclusive port range; a start above the end permits nothing."""

    port_range_start: Port = 0
    port_range_end: Port = 0xFFFF


class UdpFilter(msgspec.Struct, frozen=True, tag_field="protocol", tag="udp"):
    """UDP to the inclusive port range; a start above the end permits nothing."""

    port_range_start: Port = 0
    port_range_end: Port = 0xFFFF


class IcmpFilter(msgspec.Struct, frozen=True, tag_field="protocol", tag="icmp"):
    """ICMP and ICMPv6."""


class UnknownFilter(msgspec.Struct, frozen=True):
    """One that we cannot read. It permits nothing, and its list is not empty: an empty one would permit everything."""


Filter: TypeAlias = TcpFilter | UdpFilter | IcmpFilter | UnknownFilter


class Filters(tuple[Filter, ...]):
    """What a resource permits; empty means everything."""

    __slots__ = ()


class DnsResource(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="dns"):
    """Names that match a pattern."""

    id: Id
    address: str
    name: str
    filters: Filters


class CidrResource(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="cidr"):
    """A network, or a single address as /32 or /128."""

    id: Id
    address: Cidr
    name: str
    filters: Filters


class InternetResource(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="internet"):
    """Everything that is public."""

    id: Id


Resource: TypeAlias = DnsResource | CidrResource | InternetResource


class Interface(msgspec.Struct, frozen=True, kw_only=True):
    """The gateway's own tunnel addresses."""

    ipv4: Ipv4
    ipv6: Ipv6


class Authorization(msgspec.Struct, frozen=True, kw_only=True):
    """One pair of the snapshot in `init`."""

    client_id: Id
    resource_id: Id
    expires_at: UnixTime


class FlowLogs(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how often flow logs are uploaded; interval 0 means never."""

    api_url: str
    upload_interval_secs: _Unsigned
    upload_batch_size: _Unsigned


class IceCredentials(msgspec.Struct, frozen=True, kw_only=True):
    """User name fragment and password of one ICE side."""

    username: IceUsername
    password: Secret[str]


class Client(msgspec.Struct, frozen=True, kw_only=True):
    """The client that an authorization is for."""

    id: Id
    public_key: PublicKey
    preshared_key: Secret[bytes]
    ipv4: Ipv4
    ipv6: Ipv6


class ClientAddress(bytes):
    """The public address from which the client reached the portal, packed; empty when the portal does not say."""

    __slots__ = ()


class IngestToken:
    """The flow-log token of one authorization; `secret` is None when the portal sent something that is not text."""

    __slots__ = ("secret",)

    def __init__(self, secret: Secret[str] | None) -> None:
        self.secret = secret

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IngestToken) and self.secret == other.secret

    def __hash__(self) -> int:
        return hash(self.secret)

    def __repr__(self) -> str:
        return f"IngestToken({self.secret!r})"


# Portal to gateway


class Init(msgspec.Struct, frozen=True, kw_only=True):
    """2.2. `authorizations` None means no resynchronisation; an empty tuple revokes everything."""

    interface: Interface
    relays: Relays = Relays()
    authorizations: tuple[Authorization, ...] | None = None
    account_slug: str | None = None
    flow_logs: FlowLogs | None = None


class CreateAuthorization(msgspec.Struct, frozen=True, kw_only=True):
    """2.4. Let a client reach a resource; `expires_at` None means it never expires."""

    ref: str
    client: Client
    resource: Resource
    gateway_ice_credentials: IceCredentials
    client_ice_credentials: IceCredentials
    expires_at: UnixTime | None = None
    use_iceless: bool = False
    flow_logs_ingest_token: IngestToken | None = None
    address: ClientAddress = msgspec.field(name="subject", default=ClientAddress())

    def acknowledgement(self) -> AuthorizationCreated | FlowAuthorized:
        """The answer, under the name that belongs to the request's (3.1)."""
        return AuthorizationCreated(ref=self.ref)


class AuthorizeFlow(CreateAuthorization, frozen=True, kw_only=True):
    """4.5. The name of `create_authorization` on the v1 path."""

    def acknowledgement(self) -> AuthorizationCreated | FlowAuthorized:
        """The answer, under the name that belongs to the request's (3.1)."""
        return FlowAuthorized(ref=self.ref)


class IceCandidates(msgspec.Struct, frozen=True, kw_only=True):
    """2.5. Candidates of a client."""

    client_id: Id
    candidates: Candidates


class InvalidateIceCandidates(msgspec.Struct, frozen=True, kw_only=True):
    """2.5. Withdrawn candidates of a client."""

    client_id: Id
    candidates: Candidates


class RejectAccess(msgspec.Struct, frozen=True, kw_only=True):
    """2.6. Withdraw one pair."""

    client_id: Id
    resource_id: Id


class RelaysPresence(msgspec.Struct, frozen=True, kw_only=True):
    """2.7. Relays that are gone, and relays to use."""

    disconnected_ids: tuple[Id, ...]
    connected: Relays


class ResourceUpdated(msgspec.Struct, frozen=True, kw_only=True):
    """2.8. New filters of a resource."""

    resource: Resource


class AccessAuthorizationExpiryUpdated(msgspec.Struct, frozen=True, kw_only=True):
    """2.9. An obsolete message that portals of 2025 and 2026 send."""

    client_id: Id
    resource_id: Id
    expires_at: UnixTime


Inbound: TypeAlias = (
    Init
    | CreateAuthorization
    | IceCandidates
    | InvalidateIceCandidates
    | RejectAccess
    | RelaysPresence
    | ResourceUpdated
    | AccessAuthorizationExpiryUpdated
)


# Gateway to portal


class SetSnownetCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """2.3. Features of this gateway."""

    EVENT: ClassVar[str] = "set_snownet_capabilities"

    iceless: bool


class AuthorizationCreated(msgspec.Struct, frozen=True, kw_only=True):
    """2.4. Answer to `create_authorization`."""

    EVENT: ClassVar[str] = "authorization_created"

    ref: str


class FlowAuthorized(msgspec.Struct, frozen=True, kw_only=True):
    """4.5. Answer to `authorize_flow`."""

    EVENT: ClassVar[str] = "flow_authorized"

    ref: str


class BroadcastIceCandidates(msgspec.Struct, frozen=True, kw_only=True):
    """2.10. Our candidates for one client, best first, each once."""

    EVENT: ClassVar[str] = "broadcast_ice_candidates"

    client_ids: tuple[str]
    candidates: tuple[str, ...]


class BroadcastInvalidatedIceCandidates(msgspec.Struct, frozen=True, kw_only=True):
    """2.10. Our withdrawn candidates for one client, best first, each once."""

    EVENT: ClassVar[str] = "broadcast_invalidated_ice_candidates"

    client_ids: tuple[str]
    candidates: tuple[str, ...]


class NoRelays(msgspec.Struct, frozen=True, kw_only=True):
    """2.12. Ask for relays."""

    EVENT: ClassVar[str] = "no_relays"


CandidateBroadcast: TypeAlias = BroadcastIceCandidates | BroadcastInvalidatedIceCandidates
Outbound: TypeAlias = SetSnownetCapabilities | AuthorizationCreated | FlowAuthorized | CandidateBroadcast | NoRelays


class UnknownEvent(Malformed):
    """An event name that no portal sends to gateways of this version."""


def decode(event: str, payload: bytes | str) -> Inbound:
    """The message of a push. Raises `UnknownEvent`, or `Malformed` with the field that is wrong."""
    decoder = _DECODERS.get(event)
    if decoder is None:
        raise UnknownEvent(f"unknown event {event[:64]!r}")
    try:
        return decoder(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Malformed(f"{event}: {str(error)[:200]}") from error


class _TurnEntry(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="turn"):
    id: Id
    addr: str
    username: str
    password: Secret[str]
    expires_at: UnixTime


class _StunEntry(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="stun"):
    id: Id
    addr: str


def _id(value: object) -> Id:
    canonical = canonical_uuid(_text(value))
    if canonical is None:
        raise ValueError("Expected a UUID")
    return Id(canonical)


def _key_bytes(value: object) -> bytes:
    text = _text(value)
    try:
        raw = base64.b64decode(text.encode(), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise ValueError("Expected standard base64") from None
    if len(raw) != 32 or base64.b64encode(raw).decode() != text:
        raise ValueError("Expected the base64 of 32 bytes")
    return raw


def _ipv4(value: object) -> Ipv4:
    try:
        return Ipv4(IPv4Address(_text(value)).packed)
    except AddressValueError:
        raise ValueError("Expected an IPv4 address") from None


def _ipv6(value: object) -> Ipv6:
    try:
        address = IPv6Address(_text(value))
    except AddressValueError:
        raise ValueError("Expected an IPv6 address") from None
    if address.scope_id is not None:
        raise ValueError("Expected an IPv6 address without scope")
    return Ipv6(address.packed)


def _ice_username(value: object) -> IceUsername:
    text = _text(value)
    if not 0 < len(text.encode()) <= MAX_ICE_USERNAME:
        raise ValueError(f"Expected an ICE user name of 1 to {MAX_ICE_USERNAME} bytes")
    return IceUsername(text)


def _cidr(value: object) -> Cidr:
    text = _text(value)
    address, slash, prefix = text.partition("/")
    if not slash or "%" in address or not (prefix.isascii() and prefix.isdigit()):
        raise ValueError("Expected a network with a prefix length")
    try:
        return Cidr(ip_network(text, strict=True))
    except ValueError:
        raise ValueError("Expected a network without host bits") from None


def _relays(value: object) -> Relays:
    merged: dict[Id, Relay] = {}
    for entry in msgspec.convert(value, list[_TurnEntry | _StunEntry], dec_hook=_strict):
        address = Endpoint.parse(entry.addr)
        if isinstance(entry, _StunEntry):
            continue
        known = merged.get(entry.id)
        if known is None:
            known = Relay(id=entry.id, ipv4=None, ipv6=None, username=entry.username, password=entry.password)
        family = "ipv4" if address.is_ipv4 else "ipv6"
        if getattr(known, family) is None:
            known = msgspec.structs.replace(known, **{family: address})
        else:
            _LOG.warning("The portal lists two addresses of one family for relay %s; the first is used", entry.id)
        merged[entry.id] = known
    return Relays(merged.values())


def _candidates(value: object) -> Candidates:
    if not isinstance(value, list):
        raise TypeError("Expected `array`")
    return Candidates(text for text in value if isinstance(text, str) and priority_of(text) is not None)


def _filters(value: object) -> Filters:
    return Filters(msgspec.convert(value, list[TcpFilter | UdpFilter | IcmpFilter]))


def _filters_closed(value: object) -> Filters:
    if not isinstance(value, list):
        raise TypeError("Expected `array`")
    filters: list[Filter] = []
    for entry in value:
        try:
            filters.append(msgspec.convert(entry, TcpFilter | UdpFilter | IcmpFilter))
        except msgspec.ValidationError as error:
            _LOG.warning("A filter of an updated resource is not understood and permits nothing: %s", error)
            filters.append(UnknownFilter())
    return Filters(filters)


def _client_address(value: object) -> ClientAddress:
    address = value.get("ip") if isinstance(value, dict) else None
    try:
        return ClientAddress(ip_address(address).packed) if isinstance(address, str) else ClientAddress()
    except ValueError:
        return ClientAddress()  # a hint: what cannot be read is as good as none


def _ingest_token(value: object) -> IngestToken:
    if isinstance(value, str):
        return IngestToken(Secret(value))
    _LOG.debug("The flow-log token is not text; flows of this authorization are not uploaded")
    return IngestToken(None)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("Expected `str`")
    return value


_HOOKS: dict[Any, Callable[[object], object]] = {
    Id: _id,
    PublicKey: lambda value: PublicKey(_key_bytes(value)),
    Secret[bytes]: lambda value: Secret(_key_bytes(value)),
    Secret[str]: lambda value: Secret(_text(value)),
    Ipv4: _ipv4,
    Ipv6: _ipv6,
    IceUsername: _ice_username,
    Cidr: _cidr,
    Relays: _relays,
    Candidates: _candidates,
    Filters: _filters,
    ClientAddress: _client_address,
    IngestToken: _ingest_token,
}


def _strict(kind: Any, value: object) -> object:
    return _HOOKS[kind](value)


def _closed(kind: Any, value: object) -> object:
    return _filters_closed(value) if kind is Filters else _strict(kind, value)


def _decoder_of(kind: type[Inbound]) -> Callable[[bytes | str], Inbound]:
    return msgspec.json.Decoder(kind, dec_hook=_strict).decode


_RESOURCE: msgspec.json.Decoder[Resource] = msgspec.json.Decoder(
    DnsResource | CidrResource | InternetResource, dec_hook=_closed
)

_DECODERS: dict[str, Callable[[bytes | str], Inbound]] = {
    "init": _decoder_of(Init),
    "create_authorization": _decoder_of(CreateAuthorization),
    "authorize_flow": _decoder_of(AuthorizeFlow),
    "ice_candidates": _decoder_of(IceCandidates),
    "invalidate_ice_candidates": _decoder_of(InvalidateIceCandidates),
    "reject_access": _decoder_of(RejectAccess),
    "relays_presence": _decoder_of(RelaysPresence),
    "resource_updated": lambda payload: ResourceUpdated(resource=_RESOURCE.decode(payload)),
    "access_authorization_expiry_updated": _decoder_of(AccessAuthorizationExpiryUpdated),
}
