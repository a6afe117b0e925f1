"""The STUN codec on arbitrary input."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from fzg.wire import Malformed, channel_data, stun
from fzg.wire.endpoint import Endpoint

transaction_ids = st.binary(min_size=12, max_size=12)
endpoints = st.builds(
    Endpoint,
    st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16)),
    st.integers(0, 0xFFFF),
)
opaque = st.tuples(st.sampled_from([0x8022, 0xC057, 0x7F00, 0x0013, 0x0015]), st.binary(max_size=80))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_malformed(data: bytes) -> None:
    with contextlib.suppress(Malformed):
        stun.parse(data)
    with contextlib.suppress(Malformed):
        channel_data.parse(data)


@given(transaction_ids, st.lists(st.tuples(st.integers(0, 0xFFFF), st.binary(max_size=40)), max_size=8))
def test_arbitrary_attributes_raise_only_malformed(transaction_id: bytes, attributes: list[tuple[int, bytes]]) -> None:
    datagram = stun.encode(1, 2, transaction_id, attributes)
    with contextlib.suppress(Malformed):
        message = stun.parse(datagram)
        _ = message.error, message.xor_mapped_address, message.xor_relayed_addresses, message.realm


@given(endpoints, transaction_ids)
def test_addresses_come_back(endpoint: Endpoint, transaction_id: bytes) -> None:
    value = stun.xor_address(endpoint, transaction_id)
    message = stun.parse(stun.encode(9, 0, transaction_id, [(0x0012, value)]))
    assert message.xor_peer_address == endpoint


@given(
    st.sampled_from([1, 3, 4, 6, 7, 8, 9, 0xFFF]),
    st.integers(0, 3),
    transaction_ids,
    st.lists(opaque, max_size=6),
    st.binary(min_size=1, max_size=40),
    st.booleans(),
)
def test_what_is_encoded_parses_and_verifies(
    method: int,
    message_class: int,
    transaction_id: bytes,
    attributes: list[tuple[int, bytes]],
    key: bytes,
    fingerprint: bool,
) -> None:
    datagram = stun.encode(
        method, message_class, transaction_id, attributes, integrity_key=key, fingerprint=fingerprint
    )
    message = stun.parse(datagram)
    assert (message.method, message.message_class, message.transaction_id) == (method, message_class, transaction_id)
    assert message.verify_integrity(key)
    assert not message.verify_integrity(key + b"x")
    assert message.verify_fingerprint() is fingerprint
    first: dict[int, bytes] = {}
    for attribute, value in attributes:
        first.setdefault(attribute, value)
    assert {attribute: message.get(attribute) for attribute in first} == first


@given(st.integers(0x4000, 0x4FFF), st.binary(max_size=1400), st.binary(max_size=3))
def test_channel_data_comes_back_without_padding(number: int, payload: bytes, padding: bytes) -> None:
    assert channel_data.parse(channel_data.encode(number, payload) + padding) == (number, payload)
