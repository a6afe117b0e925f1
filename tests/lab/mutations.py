"""Frames of the portal with one thing changed, and what must become of each by the specification (portal.md 1.7, 2, 6).

Nothing is left to chance but the choice: each mutation is of a kind whose outcome is known.
"""

from __future__ import annotations

import copy
import enum
import json
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from tests.lab.grants import Message


class Verdict(enum.Enum):
    """What a gateway does with a frame."""

    TAKEN = "as if nothing had been changed"
    SKIPPED = "a warning, and the connection goes on"
    EITHER = "as the original or not at all"
    HICCUP = "the connection is over"


class Frame(NamedTuple):
    """A text, how it came about, and what is to become of it."""

    text: str
    how: str
    verdict: Verdict


HUGE = 10**400
ODD_UNICODE = ["\0", "\U0001f600" * 40, "\u202e", "\u00e9\u0663", "a" * 5000, "\ufeff", "\x7f\x80", "\U0001d518"]
_NOT_TEXT = [None, True, 5, 1.5, -1, HUGE, [], {}, ["x"], {"x": "y"}]
_NOT_ID = [*_NOT_TEXT, "", "x", "99999999-8888-4777-8666", "g9999999-8888-4777-8666-555555555555", *ODD_UNICODE]
_NOT_KEY = [*_NOT_TEXT, "", "ICEi", "*" * 44, "A" * 44, "A" * 43 + "é", *ODD_UNICODE]
_NOT_IP = [*_NOT_TEXT, "", "::1/128", "300.1.1.1", "1.2.3", "fe80::1%eth0", "localhost", *ODD_UNICODE]
_NOT_TIME = [None, True, 1.5, 1790000000.0, -1, -HUGE, "1790000000", "", [], {}, "now"]
_NOT_LIST = [None, True, 5, 1.5, HUGE, "", "x", {}, {"0": "x"}]
_NOT_OBJECT = [None, True, 5, 1.5, HUGE, "", "x", [], [[]], ["id"]]
_NOT_SOCKET = [*_NOT_TEXT, "", "203.0.113.7", "203.0.113.7:99999", "[::1", "relay:3478", "[::1]:x"]
_NOT_CIDR = [*_NOT_TEXT, "", "10.0.0.5", "10.0.0.5/16", "10.0.0.0/33", "10.0.0.0/-1", "::/0.5", "lab", *ODD_UNICODE]
_NOT_PORT = [None, True, 1.5, -1, 65_536, HUGE, "443", [], {}]

# What stands at a path of a payload and must stand there; `*` is any element of a list.
_CREDENTIALS = {"": _NOT_OBJECT, "username": _NOT_TEXT, "password": _NOT_TEXT}
_RESOURCE = {
    "": _NOT_OBJECT, "id": _NOT_ID, "type": [*_NOT_TEXT, "", "CIDR", "device_pool", "\0"], "address": _NOT_CIDR,
    "name": _NOT_TEXT, "filters": _NOT_LIST,
}  # fmt: skip
_FILTER = {
    "": _NOT_OBJECT, "protocol": [*_NOT_TEXT, "", "sctp", "TCP"], "port_range_start": _NOT_PORT,
    "port_range_end": _NOT_PORT,
}  # fmt: skip
_RELAY = {
    "": _NOT_OBJECT, "id": _NOT_ID, "type": [*_NOT_TEXT, "", "tcp", "TURN"], "addr": _NOT_SOCKET, "username": _NOT_TEXT,
    "password": _NOT_TEXT, "expires_at": _NOT_TIME,
}  # fmt: skip
_PAIR = {"client_id": _NOT_ID, "resource_id": _NOT_ID}


def _under(prefix: str, fields: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {f"{prefix}.{name}" if name else prefix: wrong for name, wrong in fields.items()}


FIELDS: dict[str, dict[str, list[Any]]] = {
    "init": {
        "interface": _NOT_OBJECT, "interface.ipv4": _NOT_IP, "interface.ipv6": _NOT_IP, "relays": _NOT_LIST,
        **_under("relays.*", _RELAY), "authorizations.*": _NOT_OBJECT,
        **_under("authorizations.*", _PAIR | {"expires_at": _NOT_TIME}),
        "flow_logs.api_url": _NOT_TEXT, "flow_logs.upload_interval_secs": _NOT_TIME,
        "flow_logs.upload_batch_size": _NOT_TIME,
    },
    "create_authorization": {
        "ref": _NOT_TEXT, "client": _NOT_OBJECT, "client.id": _NOT_ID, "client.public_key": _NOT_KEY,
        "client.preshared_key": _NOT_KEY, "client.ipv4": _NOT_IP, "client.ipv6": _NOT_IP,
        **_under("resource", _RESOURCE), **_under("resource.filters.*", _FILTER),
        **_under("client_ice_credentials", _CREDENTIALS), **_under("gateway_ice_credentials", _CREDENTIALS),
        "expires_at": [wrong for wrong in _NOT_TIME if wrong is not None],  # null: never
    },
    "ice_candidates": {"client_id": _NOT_ID, "candidates": _NOT_LIST},
    "invalidate_ice_candidates": {"client_id": _NOT_ID, "candidates": _NOT_LIST},
    "reject_access": _PAIR,
    "relays_presence": {
        "disconnected_ids": _NOT_LIST, "disconnected_ids.*": _NOT_ID, "connected": _NOT_LIST,
        **_under("connected.*", _RELAY),
    },
    # A filter that is not understood permits nothing here, so it is left alone.
    "resource_updated": {name: wrong for name, wrong in _RESOURCE.items() if name},
    "access_authorization_expiry_updated": _PAIR | {"expires_at": _NOT_TIME},
}  # fmt: skip
# Without these the message means something else, and is none the worse for it.
OPTIONAL = {
    "relays", "relays.*", "authorizations.*", "disconnected_ids.*", "connected.*", "expires_at", "resource.filters.*",
    "resource.filters.*.port_range_start", "resource.filters.*.port_range_end",
}  # fmt: skip


def frame(message: Message) -> dict[str, Any]:
    """The envelope of a push."""
    event, payload = message
    return {"topic": "gateway", "event": event, "ref": None, "payload": payload}


def mutated(rng: random.Random, message: Message) -> Frame:
    """One mutation of a message that was valid."""
    whole = frame(copy.deepcopy(message))
    kind = rng.choices(list(_KINDS), weights=list(_KINDS.values()))[0]
    return kind(rng, whole)


def _wrong_value(rng: random.Random, whole: dict[str, Any]) -> Frame:
    path, values = rng.choice(list(FIELDS[whole["event"]].items()))
    value = rng.choice(values)
    if not _replace(rng, whole["payload"], path, lambda holder, key: holder.__setitem__(key, value)):
        return _missing_key(rng, whole)
    return Frame(json.dumps(whole), f"{path} = {str(value)[:30]!r}", Verdict.SKIPPED)


def _missing_key(rng: random.Random, whole: dict[str, Any]) -> Frame:
    required = [path for path in FIELDS[whole["event"]] if path not in OPTIONAL]
    path = rng.choice(required)
    if not _replace(rng, whole["payload"], path, lambda holder, key: holder.__delitem__(key)):
        return _no_payload(rng, whole)
    return Frame(json.dumps(whole), f"no {path}", Verdict.SKIPPED)


def _no_payload(rng: random.Random, whole: dict[str, Any]) -> Frame:
    whole["payload"] = rng.choice(_NOT_OBJECT)
    if rng.random() < 0.3:
        del whole["payload"]
    return Frame(json.dumps(whole), "no payload", Verdict.SKIPPED)


def _wrong_envelope(rng: random.Random, whole: dict[str, Any]) -> Frame:
    key, value = rng.choice([
        ("topic", rng.choice(_NOT_TEXT)), ("event", rng.choice(_NOT_TEXT)),
        ("event", rng.choice(["", "init ", "INIT", "allow_access", "request_connection", "\0", "x" * 5000])),
        ("ref", rng.choice([1.5, True, [], {}, "x", "", "-1", "1.0", "1" * 400])),
    ])  # fmt: skip
    whole[key] = value
    return Frame(json.dumps(whole), f"{key} = {str(value)[:30]!r}", Verdict.SKIPPED)


def _unknown_keys(rng: random.Random, whole: dict[str, Any]) -> Frame:
    for holder in _objects(whole):
        if rng.random() < 0.5:
            holder[rng.choice(["x", "", "Topic", "join_ref", *ODD_UNICODE])] = rng.choice(
                [*_NOT_TEXT, *ODD_UNICODE, _nested(rng.randrange(100))]
            )
    return Frame(json.dumps(whole, ensure_ascii=rng.random() < 0.5), "unknown keys", Verdict.TAKEN)


def _other_spelling(rng: random.Random, whole: dict[str, Any]) -> Frame:
    """White space, the order of keys, escapes, forms of an id, a topic that nobody looks at."""
    for holder in _objects(whole):
        items = list(holder.items())
        rng.shuffle(items)
        holder.clear()
        holder.update(items)
        for key in ("id", "client_id", "resource_id"):
            if isinstance(text := holder.get(key), str) and rng.random() < 0.3:
                forms: list[Callable[[str], str]] = [str.upper, "{{{}}}".format, "urn:uuid:{}".format]
                holder[key] = rng.choice(forms)(text)
    whole["topic"] = rng.choice(["gateway", "Gateway", "", "phoenix"])
    whole["ref"] = rng.choice([None, 7, "7", "0"])
    text = json.dumps(whole, indent=rng.choice([None, 0, 3]))
    if rng.random() < 0.5:
        text = text.replace("client", "\\u0063lient")
    return Frame(rng.choice([text, f"\n\t {text} \r\n"]), "another spelling", Verdict.TAKEN)


def _far_future(rng: random.Random, whole: dict[str, Any]) -> Frame:
    """An expiry that no clock holds is a day away (tunnel.md 5.7): for these tests, never."""
    if "expires_at" not in whole["payload"] or whole["event"] != "create_authorization":
        return _unknown_keys(rng, whole)
    whole["payload"]["expires_at"] = rng.choice([1 << 62, 1 << 64, 1 << 70, HUGE])
    return Frame(json.dumps(whole), "ends in the far future", Verdict.TAKEN)


def _deep(rng: random.Random, whole: dict[str, Any]) -> Frame:
    text = json.dumps(whole)
    depth = rng.choice([200, 900, 1100, 20_000])
    where = rng.choice(["envelope", "payload"])
    deep = "[" * depth + "]" * depth if rng.random() < 0.5 else '{"x":' * depth + "0" + "}" * depth
    if where == "envelope":
        return Frame(f'{{"x":{deep},{text[1:]}', f"{depth} levels", Verdict.EITHER)
    return Frame(text.replace('"payload": {', f'"payload": {{"x":{deep},'), f"{depth} levels", Verdict.EITHER)


def _odd_unicode(rng: random.Random, whole: dict[str, Any]) -> Frame:
    """Half of a surrogate pair is no character; whether it matters depends on where it stands."""
    text = json.dumps(whole)
    half = rng.choice((r"\ud800", r"\udfff\ud800"))
    return Frame(f'{{"x":"{half}",{text[1:]}', "half a pair", Verdict.EITHER)


def _truncated(rng: random.Random, whole: dict[str, Any]) -> Frame:
    text = json.dumps(whole)
    return Frame(text[: rng.randrange(len(text))], "truncated", Verdict.HICCUP)


def _not_json(rng: random.Random, whole: dict[str, Any]) -> Frame:
    text = json.dumps(whole)
    changed = rng.choice([
        f"{text}}}", f"x{text}", text.replace(":", "=", 1), text.replace('"', "'", 2), f"{text},{text}", "]", "nul",
        f"[{text}]", "5", '"init"', "null", "[]", "{}", text.replace("{", "{,", 1), f"\ufeff{text}",
    ])  # fmt: skip
    return Frame(changed, "no JSON object", Verdict.SKIPPED if changed != "nul" else Verdict.HICCUP)


_KINDS: dict[Callable[[random.Random, dict[str, Any]], Frame], int] = {
    _wrong_value: 40, _missing_key: 12, _no_payload: 3, _wrong_envelope: 6, _unknown_keys: 8, _other_spelling: 8,
    _far_future: 4, _deep: 4, _odd_unicode: 3, _truncated: 4, _not_json: 8,
}  # fmt: skip


def _nested(depth: int) -> Any:
    value: Any = "x"
    for number in range(depth):
        value = [value] if number % 2 else {"x": value}
    return value


def _objects(value: Any) -> list[dict[str, Any]]:
    """All JSON objects in a value; those of a resource's kind are not, as their other keys have a meaning."""
    if isinstance(value, dict):
        return [value, *(found for inner in value.values() for found in _objects(inner))]
    if isinstance(value, list):
        return [found for inner in value for found in _objects(inner)]
    return []


def _replace(rng: random.Random, payload: Any, path: str, change: Callable[[Any, Any], None]) -> bool:
    """Do something at a path, at one of all elements where it says `*`; False where the payload has no such place."""
    holder: Any = None
    key: Any = None
    for name in path.split("."):
        if holder is not None:
            payload = holder[key]
        if name == "*":
            if not isinstance(payload, list) or not payload:
                return False
            holder, key = payload, rng.randrange(len(payload))
        else:
            if not isinstance(payload, dict) or name not in payload:
                return False
            holder, key = payload, name
    change(holder, key)
    return True
