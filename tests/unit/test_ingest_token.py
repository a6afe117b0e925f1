from __future__ import annotations

import pytest

from fzg.secret import Secret
from fzg.tunnel import ingest_token
from fzg.wire import Malformed
from tests.unit.flow_log_world import CLAIMS, base64url, token

# Portal 2.13, with the key `dev-ingest-key`.
VECTOR = (
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJhY2NvdW50X2lkIjoiMGYwZjBmMGYtMTExMS00MjIyLTgzMzMtNDQ0NDQ0NDQ0NDQ0IiwiaWF0"
    "IjoxNzkwMDAwMDAwLCJleHAiOjE3OTI1OTIwMDAsInVwbG9hZHNfZW5hYmxlZCI6ZmFsc2UsInJvbGUiOiJyZXNwb25kZXIiLCJpbml0aWF0b3JfZG"
    "V2aWNlX2lkIjoiMTExMTExMTEtMjIyMi00MzMzLTg0NDQtNTU1NTU1NTU1NTU1IiwicmVzcG9uZGVyX2RldmljZV9pZCI6ImFhYWFhYWFhLWJiYmIt"
    "NGNjYy04ZGRkLWVlZWVlZWVlZWVlZSIsInBvbGljeV9hdXRob3JpemF0aW9uX2lkIjoiNzc3Nzc3NzctMDAwMC00MDAwLTgwMDAtMDAwMDAwMDAwMD"
    "AxIiwicG9saWN5X2lkIjoiNzc3Nzc3NzctMDAwMC00MDAwLTgwMDAtMDAwMDAwMDAwMDAyIiwicmVzb3VyY2VfaWQiOiI5OTk5OTk5OS04ODg4LTQ3"
    "NzctODY2Ni01NTU1NTU1NTU1NTUiLCJyZXNvdXJjZV9uYW1lIjoiV2lraSIsImluaXRpYXRvcl9hY3Rvcl9pZCI6Ijc3Nzc3Nzc3LTAwMDAtNDAwMC"
    "04MDAwLTAwMDAwMDAwMDAwMyIsImluaXRpYXRvcl9hY3Rvcl9uYW1lIjoiQWRhIEV4YW1wbGUiLCJhdXRob3JpemVkX2F0IjoiMjAyNi0wOS0yMVQx"
    "NDoxMzoyMC4wMDAwMDBaIiwiYXV0aG9yaXphdGlvbl9leHBpcmVzX2F0IjoiMjAyNi0wOS0yMVQyMjoxMzoyMC4wMDAwMDBaIn0.hDswfM6VFVWTo1"
    "S7LyQ1xDZjY35kjZprAgZ7unXQ7Gk"
)


def test_the_specifications_token_is_understood():
    claims = ingest_token.parse(Secret(VECTOR)).claims
    assert claims.uploads_enabled is False
    assert (claims.role, claims.exp) == ("responder", 1792592000)
    assert claims.policy_authorization_id == "77777777-0000-4000-8000-000000000001"
    assert (claims.resource_name, claims.initiator_actor_name) == ("Wiki", "Ada Example")
    assert claims.initiator_actor_email is None


def test_optional_claims_may_be_missing_and_unknown_ones_present():
    parsed = ingest_token.parse(token(without=["resource_address", "initiator_actor_email"], flavour={"new": [1]}))
    assert parsed.claims.resource_address is None
    assert ingest_token.parse(token(initiator_actor_email="a@b")).claims.initiator_actor_email == "a@b"


@pytest.mark.parametrize("name", sorted(set(CLAIMS) - {"resource_address", "initiator_actor_email"}))
def test_every_required_claim_is_required(name):
    with pytest.raises(Malformed):
        ingest_token.parse(token(without=[name]))


@pytest.mark.parametrize(
    "bad",
    [
        token(header={"alg": "none"}),
        token(header={"alg": "HS512"}),
        token(header={"typ": "JWT"}),
        token(header=b"{"),
        token(signature=b""),
        token(uploads_enabled="true"),
        token(exp=-1),
        token(exp="1790000000"),
        token(iat=1.5),
        token(resource_name=None),
        Secret(""),
        Secret("."),
        Secret("a.b"),
        Secret(VECTOR + ".x"),
        Secret(VECTOR.replace(".", ".=", 1)),
        Secret(VECTOR.replace("eyJ", "ey+", 1)),
        Secret(VECTOR.replace("eyJ", "eyé", 1)),
        Secret(".".join((base64url({"alg": "HS256"}), base64url([]), "AA"))),
        Secret(".".join((base64url({"alg": "HS256"}), base64url(b"[" * 5000), "AA"))),
        Secret("A" * 8193),
        Secret("A.A.A"),
    ],
)
def test_anything_else_is_malformed(bad):
    with pytest.raises(Malformed):
        ingest_token.parse(bad)


@pytest.mark.spec("TUNNEL-98")
def test_neither_a_parsed_nor_a_refused_token_shows_itself():
    good = token()
    assert good.reveal()[:40] not in repr(ingest_token.parse(good))
    bad = token(resource_name=17)
    with pytest.raises(Malformed) as caught:
        ingest_token.parse(bad)
    for segment in bad.reveal().split("."):
        assert segment not in str(caught.value)
