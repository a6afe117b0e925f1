"""The STUN codec against RFC 5769 and the vectors of spec turn 1.8."""

from __future__ import annotations

import random
import struct
from base64 import b64encode
from hashlib import sha256

import pytest

from fzg.wire import Malformed, stun
from fzg.wire.endpoint import Endpoint

TRANSACTION = bytes.fromhex("0102030405060708090a0b0c")
USERNAME = "2145916800:vWv9RfZkTOa8lNJGVhSPK65JoOhjM2b5vyNIV8CU2zE"
PASSWORD = "q0BSQVnXUbqgoXf5emeTjlD+SF80elm0HSoSxQ4L9G8"
NONCE = b"11111111-2222-4333-8444-555555555555"
KEY = bytes.fromhex("d3e386e4fe4789dbc7bb12f41a323051")
RFC5769_PASSWORD = b"VOkJxbRl1RmTxUk/WvJxBt"

RFC5769_REQUEST = bytes.fromhex(
    "000100582112a442b7e7a701bc34d686fa87dfae802200105354554e207465737420636c69656e74"
    "002400046e0001ff80290008932ff9b151263b36000600096576746a3a683676592020200008"
    "00149aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a280280004e57a3bcf"
)
RFC5769_IPV4 = bytes.fromhex(
    "0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000080001a147e112a643"
    "000800142b91f599fd9e90c38c7489f92af9ba53f06be7d780280004c07d4c96"
)
RFC5769_IPV6 = bytes.fromhex(
    "010100482112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000140002a1470113a9fa"
    "a5d3f179bc25f4b5bed2b9d900080014a382954e4be67bf11784c97c8292c275bfe3ed4180280004c8fb0b4c"
)
RFC5769_LONG_TERM = bytes.fromhex(
    "000100602112a44278ad3433c6ad72c029da412e00060012e3839ee38388e383aae38383e382afe382b900000015001c"
    "662f2f3439396b39353464364f4c33346f4c394653547679363473410014000b6578616d706c652e6f72670000080014"
    "f67024656dd64a3e02b8e0712e85c9a28ca89666"
)

V1 = bytes.fromhex("000100142112a4420102030405060708090a0b0c80220010666972657a6f6e652d67617465776179")
V2 = bytes.fromhex(
    "000300242112a4420102030405060708090a0b0c0019000411000000800000040200000080220010666972657a6f6e652d67617465776179"
)
V3 = bytes.fromhex(
    "000300ac2112a4420102030405060708090a0b0c0019000411000000800000040200000080220010666972657a6f6e65"
    "2d6761746577617900060036323134353931363830303a7657763952665a6b544f61386c4e4a47566853504b36354a6f"
    "4f686a4d32623576794e4956384355327a45000000140008666972657a6f6e650015002431313131313131312d323232"
    "322d343333332d383434342d35353535353535353535353500080014b89c2180756f6799f7576d3c1b24bc335227da06"
)
V4 = bytes.fromhex(
    "000900b02112a4420102030405060708090a0b0c001200080001ec83ea12d54b000c000440000000"
    "80220010666972657a6f6e652d6761746577617900060036323134353931363830303a7657763952665a6b544f61386c"
    "4e4a47566853504b36354a6f4f686a4d32623576794e4956384355327a45000000140008666972657a6f6e65"
    "0015002431313131313131312d323232322d343333332d383434342d353535353535353535353535"
    "00080014bc4a4755c95f5f2e7e818866f78964409b6a0a07"
)
V5 = bytes.fromhex(
    "011300642112a4420102030405060708090a0b0c80220018666972657a6f6e652d72656c61793b207265763d78787878"
    "0009001000000401556e617574686f72697a656400140008666972657a6f6e65"
    "0015002431313131313131312d323232322d343333332d383434342d353535353535353535353535"
)
V6 = bytes.fromhex(
    "0103006c2112a4420102030405060708090a0b0c80220018666972657a6f6e652d72656c61793b207265763d78787878"
    "001600080001e112e721c045001600140002e1120113a9fa0102030405060708090a0b0b002000080001bd52ea12d547"
    "000d00040000025800080014a83c452b30513acff188e944440c8abfc3edadd0"
)
V7 = bytes.fromhex(
    "000100442112a4420102030405060708090a0b0c00060009656a71743a68677768000000802a00080123456789abcdef"
    "002400046effff7f00080014d849ff4c1051120bf328795e2c210622bddb0c8180280004e7d1415d"
)
V8 = bytes.fromhex(
    "0101002c2112a4420102030405060708090a0b0c002000080001ec83ea12d54b"
    "00080014e2ea3337c2a791b1be8bcdb85443e820d677e5828028000440809614"
)
ICE_KEY = b"zfjrrjdkbci42t2axyd45a"

SOFTWARE = (0x8022, b"firezone-gateway")
TRANSPORT = (0x0019, bytes.fromhex("11000000"))
ADDITIONAL_FAMILY = (0x8000, bytes.fromhex("02000000"))
CREDENTIALS = [(0x0006, USERNAME.encode()), (0x0014, b"firezone"), (0x0015, NONCE)]


def message(*attributes: tuple[int, bytes], method: int = 1, message_class: int = 0) -> stun.Message:
    return stun.parse(stun.encode(method, message_class, TRANSACTION, attributes))


@pytest.mark.spec("TURN-1")
class TestRfc5769:
    def test_request_verifies_over_its_space_padding(self) -> None:
        parsed = stun.parse(RFC5769_REQUEST)
        assert parsed.verify_integrity(RFC5769_PASSWORD)
        assert parsed.verify_fingerprint()
        assert (parsed.method, parsed.message_class) == (1, 0)
        assert parsed.username == "evtj:h6vY"
        assert parsed.priority == 0x6E0001FF
        assert parsed.ice_controlled == 0x932FF9B151263B36
        assert parsed.software == "STUN test client"

    @pytest.mark.parametrize(
        ("datagram", "address"),
        [
            (RFC5769_IPV4, Endpoint.parse("192.0.2.1:32853")),
            (RFC5769_IPV6, Endpoint.parse("[2001:db8:1234:5678:11:2233:4455:6677]:32853")),
        ],
    )
    def test_response_gives_the_mapped_address(self, datagram: bytes, address: Endpoint) -> None:
        parsed = stun.parse(datagram)
        assert parsed.verify_integrity(RFC5769_PASSWORD)
        assert parsed.verify_fingerprint()
        assert (parsed.method, parsed.message_class) == (1, 2)
        assert parsed.xor_mapped_address == address

    def test_long_term_request_verifies_with_the_digest_of_its_credentials(self) -> None:
        parsed = stun.parse(RFC5769_LONG_TERM)
        username = "\u30de\u30c8\u30ea\u30c3\u30af\u30b9"
        assert parsed.username == username
        assert parsed.realm == "example.org"
        assert parsed.nonce == b"f//499k954d6OL34oL9FSTvy64sA"
        assert parsed.verify_integrity(stun.long_term_key(username, "example.org", "TheMatrIX"))


@pytest.mark.spec("TURN-2")
class TestVectors:
    def test_binding_request(self) -> None:
        assert stun.encode(1, 0, TRANSACTION, [SOFTWARE]) == V1

    def test_bare_allocate(self) -> None:
        assert stun.encode(3, 0, TRANSACTION, [TRANSPORT, ADDITIONAL_FAMILY, SOFTWARE]) == V2

    def test_authenticated_allocate(self) -> None:
        attributes = [TRANSPORT, ADDITIONAL_FAMILY, SOFTWARE, *CREDENTIALS]
        assert stun.encode(3, 0, TRANSACTION, attributes, integrity_key=KEY) == V3

    def test_channel_bind(self) -> None:
        peer = stun.xor_address(Endpoint.parse("203.0.113.9:52625"), TRANSACTION)
        attributes = [(0x0012, peer), (0x000C, stun.uint16(0x4000)), SOFTWARE, *CREDENTIALS]
        assert stun.encode(9, 0, TRANSACTION, attributes, integrity_key=KEY) == V4

    def test_ipv6_peer_address_depends_on_the_transaction(self) -> None:
        value = stun.xor_address(Endpoint.parse("[2001:db8::9]:52625"), TRANSACTION)
        assert value == bytes.fromhex("0002ec830113a9fa0102030405060708090a0b05")

    def test_challenge(self) -> None:
        parsed = stun.parse(V5)
        assert (parsed.method, parsed.message_class) == (3, 3)
        assert parsed.error == (401, "Unauthorized")
        assert parsed.realm == "firezone"
        assert parsed.nonce == NONCE
        assert not parsed.has_integrity
        assert not parsed.verify_integrity(KEY)

    def test_allocate_success(self) -> None:
        parsed = stun.parse(V6)
        assert parsed.xor_relayed_addresses == (
            Endpoint.parse("198.51.100.7:49152"),
            Endpoint.parse("[2001:db8::7]:49152"),
        )
        assert parsed.xor_mapped_address == Endpoint.parse("203.0.113.5:40000")
        assert parsed.lifetime == 600
        assert parsed.verify_integrity(KEY)

    def test_ice_request(self) -> None:
        parsed = stun.parse(V7)
        assert parsed.username == "ejqt:hgwh"
        assert parsed.ice_controlling == 0x0123456789ABCDEF
        assert parsed.priority == 1862270847
        assert not parsed.use_candidate
        assert parsed.verify_integrity(ICE_KEY)
        assert parsed.verify_fingerprint()

    def test_ice_request_is_encoded_with_fingerprint(self) -> None:
        attributes = [
            (0x0006, b"ejqt:hgwh"),
            (0x802A, stun.uint64(0x0123456789ABCDEF)),
            (0x0024, stun.uint32(1862270847)),
        ]
        encoded = stun.encode(1, 0, TRANSACTION, attributes, integrity_key=ICE_KEY, fingerprint=True)
        assert encoded == V7

    def test_ice_success(self) -> None:
        parsed = stun.parse(V8)
        assert parsed.xor_mapped_address == Endpoint.parse("203.0.113.9:52625")
        assert parsed.verify_integrity(ICE_KEY)
        assert parsed.verify_fingerprint()


@pytest.mark.spec("TURN-3")
def test_no_single_bit_of_a_signed_message_can_be_flipped() -> None:
    for bit in range(len(V6) * 8):
        flipped = bytearray(V6)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            parsed = stun.parse(bytes(flipped))
        except Malformed:
            continue
        assert not parsed.verify_integrity(KEY), f"bit {bit}"


@pytest.mark.spec("TURN-4")
class TestNotStun:
    @pytest.mark.parametrize(
        ("datagram", "reason"),
        [
            (b"", "shorter than its header"),
            (V1[:19], "shorter than its header"),
            (b"\x40" + V1[1:], "top two bits"),
            (b"\x80" + V1[1:], "top two bits"),
            (V1[:4] + b"\x21\x12\xa4\x43" + V1[8:], "magic cookie"),
            (V1 + b"\0", "length does not match"),
            (V1 + b"\0\0\0\0", "length does not match"),
            (V1[:-4], "length does not match"),
            (V1[:2] + struct.pack(">H", 22) + V1[4:] + b"\0\0", "length does not match"),
            (V1[:22] + b"\0\x11" + V1[24:], "overruns"),
            (V1[:22] + b"\xff\xff" + V1[24:], "overruns"),
        ],
    )
    def test_broken_frame_is_refused(self, datagram: bytes, reason: str) -> None:
        with pytest.raises(Malformed, match=reason):
            stun.parse(datagram)

    @pytest.mark.slow
    def test_random_mutations_raise_nothing_else(self) -> None:
        rng = random.Random(8489)
        vectors = [V1, V2, V3, V4, V5, V6, V7, V8]
        parsed = 0
        for _ in range(100_000):
            datagram = bytearray(rng.choice(vectors))
            for _ in range(rng.randrange(1, 4)):
                datagram[rng.randrange(len(datagram))] = rng.randrange(256)
            if rng.random() < 0.1:
                del datagram[rng.randrange(len(datagram)) :]
            try:
                found = stun.parse(bytes(datagram))
            except Malformed:
                continue
            parsed += 1
            read_everything(found)
        assert parsed > 10_000


def read_everything(found: stun.Message) -> None:
    for name in [
        "username",
        "realm",
        "nonce",
        "software",
        "error",
        "unknown_attributes",
        "xor_mapped_address",
        "xor_relayed_addresses",
        "xor_peer_address",
        "lifetime",
        "channel_number",
        "priority",
        "use_candidate",
        "ice_controlled",
        "ice_controlling",
        "has_integrity",
    ]:
        getattr(found, name)
    found.verify_fingerprint()
    repr(found)


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        (0x0008, bytes(19), "MESSAGE-INTEGRITY is not 20"),
        (0x0024, bytes(3), "PRIORITY is not 4"),
        (0x0024, bytes(5), "PRIORITY is not 4"),
        (0x0025, b"\0", "USE-CANDIDATE is not 0"),
        (0x8029, bytes(4), "ICE-CONTROLLED is not 8"),
        (0x802A, bytes(9), "ICE-CONTROLLING is not 8"),
        (0x8028, bytes(8), "FINGERPRINT is not 4"),
        (0x000D, bytes(8), "LIFETIME is not 4"),
        (0x000C, bytes(2), "CHANNEL-NUMBER is not 4"),
        (0x000C, bytes.fromhex("3fff0000"), "not in 0x4000"),
        (0x000C, bytes.fromhex("80000000"), "not in 0x4000"),
        (0x0009, bytes(3), "ERROR-CODE is shorter"),
        (0x0009, bytes.fromhex("00010400"), "not in 300"),
        (0x0009, bytes.fromhex("00000c00"), "not in 300"),
        (0x0009, bytes.fromhex("00000201"), "not in 300"),
        (0x0009, bytes.fromhex("00000464"), "not in 300"),
        (0x0006, b"\xff\xfe", "USERNAME is not UTF-8"),
        (0x0006, b"x" * 513, "USERNAME is more than 512"),
        (0x0014, b"x" * 764, "REALM is more than 763"),
        (0x0015, b"x" * 764, "NONCE is more than 763"),
        (0x0020, bytes(2), "shorter than 4"),
        (0x0020, bytes.fromhex("0003000000000000"), "unknown family"),
        (0x0016, bytes.fromhex("00010000"), "too short for its family"),
        (0x0012, bytes.fromhex("0002000000000000"), "too short for its family"),
    ],
)
def test_attribute_of_the_wrong_shape_makes_it_not_stun(attribute: int, value: bytes, reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        message((attribute, value))


@pytest.mark.parametrize("length", [0, 508, 512])
def test_username_up_to_512_bytes_is_read(length: int) -> None:
    assert message((0x0006, b"x" * length)).username == "x" * length


@pytest.mark.parametrize("number", [0x4000, 0x7FFF])
def test_channel_numbers_of_the_standard_are_read(number: int) -> None:
    assert message((0x000C, struct.pack(">HH", number, 0))).channel_number == number


@pytest.mark.spec("TURN-5")
def test_reason_loses_the_nul_padding_that_coturn_counts() -> None:
    parsed = message((0x0009, b"\0\0\4\0Bad Request\0"), message_class=3)
    assert parsed.error == (400, "Bad Request")


def test_reason_that_is_not_utf8_does_not_fail_the_parse() -> None:
    parsed = message((0x0009, b"\0\0\4\1\xff\xfe"), message_class=3)
    assert parsed.error is not None
    assert parsed.error.code == 401


@pytest.mark.spec("TURN-6")
def test_unspecified_second_relayed_address_is_ignored() -> None:
    valid = Endpoint.parse("198.51.100.7:49152")
    unspecified = Endpoint.parse("0.0.0.0:0")
    for order in ([valid, unspecified], [unspecified, valid]):
        attributes = [(0x0016, stun.xor_address(address, TRANSACTION)) for address in order]
        assert message(*attributes, method=3, message_class=2).xor_relayed_addresses == (valid,)


@pytest.mark.parametrize(
    "text",
    ["0.0.0.0:1", "198.51.100.7:0", "169.254.1.1:9", "255.255.255.255:9", "224.0.0.1:9", "[::]:9", "[ff02::1]:9"],
)
def test_address_that_nobody_can_have_counts_as_absent(text: str) -> None:
    value = stun.xor_address(Endpoint.parse(text), TRANSACTION)
    parsed = message((0x0020, value), (0x0016, value), message_class=2)
    assert parsed.xor_mapped_address is None
    assert parsed.xor_relayed_addresses == ()


def test_first_of_two_equal_attributes_counts() -> None:
    assert message((0x000D, stun.uint32(1)), (0x000D, stun.uint32(2))).lifetime == 1


def test_unknown_attributes_are_skipped_whatever_their_type() -> None:
    parsed = message((0x7FFF, b"required"), (0xC057, bytes(4)), (0x0024, stun.uint32(5)))
    assert parsed.priority == 5


def test_attributes_behind_integrity_do_not_exist() -> None:
    signed = stun.encode(1, 0, TRANSACTION, [(0x0024, stun.uint32(5))], integrity_key=b"key")
    appended = stun.encode(1, 0, TRANSACTION, [(0x0025, b""), (0x000D, b"x")])[20:]
    forged = signed[:2] + struct.pack(">H", len(signed) - 20 + len(appended)) + signed[4:] + appended
    parsed = stun.parse(forged)
    assert parsed.verify_integrity(b"key")
    assert not parsed.use_candidate
    assert parsed.lifetime is None
    assert parsed.get(0x0025) is None


def test_unknown_attributes_of_a_420_are_listed() -> None:
    assert message((0x000A, bytes.fromhex("80000019"))).unknown_attributes == (0x8000, 0x0019)
    assert message().unknown_attributes == ()


def test_wrong_key_does_not_verify() -> None:
    assert not stun.parse(V6).verify_integrity(KEY[:-1] + b"\0")


def test_transaction_id_of_another_length_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="12 bytes"):
        stun.encode(1, 0, b"short", [])


@pytest.mark.parametrize(
    ("method", "message_class", "encoded"),
    [(1, 1, 0x0011), (3, 2, 0x0103), (3, 3, 0x0113), (6, 1, 0x0016), (7, 1, 0x0017), (8, 2, 0x0108), (9, 3, 0x0119)],
)
def test_message_type_interleaves_class_and_method(method: int, message_class: int, encoded: int) -> None:
    datagram = stun.encode(method, message_class, TRANSACTION, [])
    assert datagram[:2] == struct.pack(">H", encoded)
    parsed = stun.parse(datagram)
    assert (parsed.method, parsed.message_class) == (method, message_class)


@pytest.mark.spec("TURN-7")
@pytest.mark.parametrize(
    ("expiry", "secret", "salt", "password"),
    [
        (
            "2145916800",
            "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff",
            "vWv9RfZkTOa8lNJGVhSPK65JoOhjM2b5vyNIV8CU2zE",
            PASSWORD,
        ),
        (
            "1685984278",
            "1cab293a-4032-46f4-862a-40e5d174b0d2",
            "uvdgKvS9GXYZ_vmv",
            "6xUIoZ+QvxKhRasLifwfRkMXl+ETLJUsFkHlXjlHAkg",
        ),
    ],
)
def test_password_of_a_relay_comes_from_its_secret(expiry: str, secret: str, salt: str, password: str) -> None:
    from scripted_relay import firezone_password

    assert firezone_password(expiry, secret, salt) == password


def test_long_term_key_is_the_digest_of_username_realm_and_password() -> None:
    salt = b64encode(sha256(b"fiAjSBWDgQfD1CFJkTwOf4zg+1QhH0eTT+oLaVIMpH8=").digest()).decode().rstrip("=")
    assert f"2145916800:{salt}" == USERNAME
    assert stun.long_term_key(USERNAME, "firezone", PASSWORD) == KEY
