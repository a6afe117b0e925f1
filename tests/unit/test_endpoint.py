"""Socket addresses as text."""

from __future__ import annotations

import pytest

from fzg.wire import Malformed
from fzg.wire.endpoint import Endpoint


@pytest.mark.parametrize("text", ["203.0.113.7:3478", "[2001:db8::7]:0", "[::]:65535"])
def test_addresses_are_written_as_they_are_read(text):
    assert str(Endpoint.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":1",
        "1.2.3.4",
        "1.2.3.4:",
        "1.2.3.4:65536",
        "1.2.3.4:-1",
        "1.2.3.4:" + "9" * 5000,
        "1.2.3.4:\u0663",
        "[1.2.3.4]:1",
        "::1:1",
        "1.2.3.4\0:1",
        "[::1\0]:1",
        "\ud800:1",
        "host:1",
    ],
)
def test_anything_else_is_malformed(text):
    with pytest.raises(Malformed):
        Endpoint.parse(text)
