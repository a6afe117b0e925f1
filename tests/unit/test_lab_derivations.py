"""The portal's derivations give the values that the specification prints."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from tests.lab import derivations

CLIENT_ID = "11111111-2222-4333-8444-555555555555"
GATEWAY_ID = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"
GATEWAY_KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
CLIENT_KEY = "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8="
SECRET = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
# The token of spec portal.md 2.13, signed with `dev-ingest-key`.
INGEST_TOKEN = (
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJhY2NvdW50X2lkIjoiMGYwZjBmMGYtMTExMS00MjIyLTgzMzMtNDQ0NDQ0NDQ0NDQ0IiwiaWF0Ij"
    "oxNzkwMDAwMDAwLCJleHAiOjE3OTI1OTIwMDAsInVwbG9hZHNfZW5hYmxlZCI6ZmFsc2UsInJvbGUiOiJyZXNwb25kZXIiLCJpbml0aWF0b3JfZGV2aW"
    "NlX2lkIjoiMTExMTExMTEtMjIyMi00MzMzLTg0NDQtNTU1NTU1NTU1NTU1IiwicmVzcG9uZGVyX2RldmljZV9pZCI6ImFhYWFhYWFhLWJiYmItNGNjYy"
    "04ZGRkLWVlZWVlZWVlZWVlZSIsInBvbGljeV9hdXRob3JpemF0aW9uX2lkIjoiNzc3Nzc3NzctMDAwMC00MDAwLTgwMDAtMDAwMDAwMDAwMDAxIiwicG"
    "9saWN5X2lkIjoiNzc3Nzc3NzctMDAwMC00MDAwLTgwMDAtMDAwMDAwMDAwMDAyIiwicmVzb3VyY2VfaWQiOiI5OTk5OTk5OS04ODg4LTQ3NzctODY2Ni"
    "01NTU1NTU1NTU1NTUiLCJyZXNvdXJjZV9uYW1lIjoiV2lraSIsImluaXRpYXRvcl9hY3Rvcl9pZCI6Ijc3Nzc3Nzc3LTAwMDAtNDAwMC04MDAwLTAwMD"
    "AwMDAwMDAwMyIsImluaXRpYXRvcl9hY3Rvcl9uYW1lIjoiQWRhIEV4YW1wbGUiLCJhdXRob3JpemVkX2F0IjoiMjAyNi0wOS0yMVQxNDoxMzoyMC4wMD"
    "AwMDBaIiwiYXV0aG9yaXphdGlvbl9leHBpcmVzX2F0IjoiMjAyNi0wOS0yMVQyMjoxMzoyMC4wMDAwMDBaIn0.hDswfM6VFVWTo1S7LyQ1xDZjY35kjZ"
    "prAgZ7unXQ7Gk"
)


@pytest.mark.spec("PORTAL-68")
def test_the_vectors_of_the_specification_are_reproduced():
    assert derivations.relay_id(SECRET) == "2a8abfa8-cb99-4629-8437-854193ca6bca"

    turn = derivations.turn_credentials(GATEWAY_KEY, SECRET)
    assert turn.username == "2145916800:kF8o3vGOqsBa5vErLDRSdEr69ibaE0PVezlbVE4FGbY"
    assert turn.password == "4xl1v/gk+pPzA+09EeABUVJ5Ot3ayty2AsktF2zqpXo"

    psk = derivations.preshared_key(
        client_psk_base=b"\x01" * 32,
        gateway_psk_base=b"\x02" * 32,
        client_id=CLIENT_ID,
        gateway_id=GATEWAY_ID,
        client_public_key=CLIENT_KEY,
        gateway_public_key=GATEWAY_KEY,
    )
    assert psk == "dtQLwvW7CXikc+A1EmIJEaJAmluyzJ33YKcWJQKkxXU="

    ice = derivations.ice_credentials(
        client_id=CLIENT_ID, client_public_key=CLIENT_KEY, gateway_id=GATEWAY_ID, gateway_public_key=GATEWAY_KEY
    )
    assert ice == ("725z", "latqe7iwpjyrccojsy4ywy", "zzcf", "up7vgqqtsogpiahklbaira")


def test_the_turn_vectors_of_the_relay_chapter_are_reproduced():
    key = "fiAjSBWDgQfD1CFJkTwOf4zg+1QhH0eTT+oLaVIMpH8="
    turn = derivations.turn_credentials(key, SECRET)
    assert turn.username == "2145916800:vWv9RfZkTOa8lNJGVhSPK65JoOhjM2b5vyNIV8CU2zE"
    assert turn.password == "q0BSQVnXUbqgoXf5emeTjlD+SF80elm0HSoSxQ4L9G8"
    assert derivations.long_term_key(*turn).hex() == "d3e386e4fe4789dbc7bb12f41a323051"
    assert (
        derivations.turn_password(1685984278, "1cab293a-4032-46f4-862a-40e5d174b0d2", "uvdgKvS9GXYZ_vmv")
        == "6xUIoZ+QvxKhRasLifwfRkMXl+ETLJUsFkHlXjlHAkg"
    )


def test_a_flow_log_token_is_signed_as_the_portal_signs_it():
    head, body, signature = INGEST_TOKEN.split(".")
    assert derivations._url(hmac.digest(b"dev-ingest-key", f"{head}.{body}".encode(), hashlib.sha256)) == signature
    assert derivations.flow_log_token({"role": "responder"}).split(".")[0] == head
