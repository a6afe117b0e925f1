"""What the operator asked for, parsed and checked: the only place that knows names and defaults of settings."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from fzg.host.masquerade import Masquerade
from fzg.wire import Malformed
from fzg.wire.endpoint import Endpoint

if TYPE_CHECKING:
    from fzg.secret import Secret

DEFAULT_API_URL = "wss://api.firezone.dev"
DEFAULT_HEALTH_ADDRESS = "0.0.0.0:8080"
DEFAULT_MAX_PARTITION_TIME = "24h"  # how long a gateway serves on without the portal before it gives up


class Variable(NamedTuple):
    """A variable that is read and has no option."""

    name: str
    meaning: str


ENVIRONMENT = (
    Variable("RUST_LOG", "What is logged: `level` or `target=level`, separated by commas. Default: `info`."),
    Variable("CREDENTIALS_DIRECTORY", "Set by systemd; the file `FIREZONE_TOKEN` in it is the token."),
    Variable(
        "HTTPS_PROXY", "Proxy for the portal and for uploads, `http://user:password@host:port`; also `ALL_PROXY`."
    ),
    Variable("NO_PROXY", "Hosts that are reached without the proxy, separated by commas."),
    Variable("SSL_CERT_FILE", "Certificates to trust instead of the host's; a file."),
    Variable("SSL_CERT_DIR", "Certificates to trust instead of the host's; a directory."),
    Variable("FIREZONE_UDP_SEND_BUFFER_SIZE", "Bytes of each UDP socket's send buffer. Default: 2 MiB."),
    Variable("FIREZONE_UDP_RECV_BUFFER_SIZE", "Bytes of each UDP socket's receive buffer. Default: 16 MiB."),
    Variable("FIREZONE_NO_UDP_GSO", "`true`: datagrams leave one by one, for network cards that mangle batches."),
    Variable("FIREZONE_NO_UDP_GRO", "`true`: datagrams arrive one by one."),
    Variable("FIREZONE_NO_TUN_OFFLOAD", "`true`: the TUN device carries no super-packets."),
    Variable("FIREZONE_ENGINE", "`native` or `pure`: the packet engine. Default: native where it was built."),
    Variable("FIREZONE_CONTROL_SOCKET", "Path of the socket for `status` and the other commands; empty: none."),
    Variable("RUNTIME_DIRECTORY", "Set by systemd; the control socket is in it."),
    Variable("XDG_RUNTIME_DIR", "An ordinary user's place for the control socket."),
    Variable("NOTIFY_SOCKET", "Set by systemd; it is told of readiness and life there."),
    Variable("WATCHDOG_USEC", "Set by systemd; how often it wants to hear."),
    Variable("TEMP", "Where the one-file executable unpacks itself; also `TMP`. Needed where `/tmp` is `noexec`."),
)

_DAY = 86_400
_UNITS = {
    **dict.fromkeys(("ns", "nsec"), 1e-9),
    **dict.fromkeys(("us", "usec"), 1e-6),
    **dict.fromkeys(("ms", "msec"), 1e-3),
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), _DAY),
    **dict.fromkeys(("w", "wk", "wks", "week", "weeks"), 7 * _DAY),
    **dict.fromkeys(("M", "month", "months"), 30.44 * _DAY),
    **dict.fromkeys(("y", "yr", "yrs", "year", "years"), 365.25 * _DAY),
}
_PAIR = re.compile(r"\s*([0-9]{1,20})\s*([a-zA-Z]+)")
_SIZE_DIGITS = 18  # more than any memory; Python refuses to convert thousands of digits
_TRUE = frozenset({"1", "yes", "on", "true"})
_FALSE = frozenset({"0", "no", "off", "false"})


class LogFormat(StrEnum):
    """How a log line looks."""

    HUMAN = "human"
    JSON = "json"


class MetricsExporter(StrEnum):
    """PROMETHEUS serves them on the health address; the others are words of the reference, and without effect."""

    PROMETHEUS = "prometheus"
    STDOUT = "stdout"
    OTEL_COLLECTOR = "otel-collector"
    SENTRY = "sentry"


class SettingError(ValueError):
    """A value that cannot be used; the message names the setting's problem in one sentence."""


@dataclass(frozen=True, slots=True)
class Offloads:
    """Kernel features that an operator may have to switch off (performance notes, pitfalls)."""

    udp_gso: bool = True
    udp_gro: bool = True
    tun: bool = True


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that the process needs to start. Durations in seconds, sizes in bytes."""

    token: Secret[str]
    firezone_id: str
    api_url: str = DEFAULT_API_URL
    name: str = ""
    health_address: Endpoint = field(default_factory=lambda: Endpoint.parse(DEFAULT_HEALTH_ADDRESS))
    max_partition_time: float = 86_400.0
    masquerade: Masquerade = Masquerade.AUTO
    flow_logs: bool = False
    validate_checksums: bool = False
    increase_buffers: bool = True
    udp_send_buffer: int | None = None
    udp_receive_buffer: int | None = None
    offloads: Offloads = field(default_factory=Offloads)
    metrics: bool = False
    tun_fd: int | None = None

    def shown(self) -> dict[str, object]:
        """All of them as JSON values; secrets are masked."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values["offloads"] = asdict(self.offloads)
        return {
            name: value if isinstance(value, dict | bool | int | float | None) else str(value)
            for name, value in values.items()
        }


def parse_duration(text: str) -> float:
    """Seconds of `5m`, `1h 30m`, `30d`; a number without a unit is refused (OPS-8)."""
    position, total = 0, 0.0
    while position < len(text):
        match = _PAIR.match(text, position)
        if match is None or match[2] not in _UNITS:
            break
        total += int(match[1]) * _UNITS[match[2]]
        position = match.end()
    if position == 0 or text[position:].strip():
        raise SettingError(f"{text!r} is not a duration; write for example 90s, 5m, '1h 30m' or 30d")
    if total > timedelta(days=36_500).total_seconds():
        raise SettingError(f"{text!r} is longer than a hundred years")
    return total


def parse_flag(text: str) -> bool:
    """A boolean from the environment; empty means unset, hence false (OPS-6)."""
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE or not word:
        return False
    raise SettingError(f"{text!r} is neither true nor false")


def parse_socket_address(text: str) -> Endpoint:
    """A literal `IP:PORT`; host names are refused, since a listener must not depend on DNS."""
    try:
        return Endpoint.parse(text)
    except Malformed as error:
        raise SettingError(f"{text!r} is not an address like 127.0.0.1:8080 or [::1]:8080") from error


def parse_size(text: str | None) -> int | None:
    """Bytes; anything else counts as unset, as the reference has it (operations 1.1)."""
    digits = (text or "").strip()
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= _SIZE_DIGITS else None
