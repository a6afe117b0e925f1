"""Log lines for people and for programs, and the filter that selects them (spec operations 1.8)."""

from __future__ import annotations

import logging
import platform
import re
import sys
import time
from collections import Counter, deque
from contextlib import suppress
from datetime import UTC, datetime
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, TextIO

from pythonjsonlogger.json import JsonFormatter

from fzg.secret import without
from fzg.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fzg.secret import Secret

TRACE = 5  # below DEBUG, as the filter grammar has it
_NAMES = {
    TRACE: "TRACE",
    logging.DEBUG: "DEBUG",
    logging.INFO: "INFO",
    logging.WARNING: "WARN",
    logging.ERROR: "ERROR",
    logging.CRITICAL: "ERROR",
}
_LEVELS = {
    "off": logging.CRITICAL + 10,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": TRACE,
}
_LEVELS |= dict(zip("012345", _LEVELS.values(), strict=True))
# Libraries that would drown ours at debug; the operator's own directives come later and win.
_CEILINGS = "pyroute2=warn,asyncio=warn,geventwebsocket=warn,websocket=warn,dns=info"
# `target[span{field=value}]=level` selects what happens inside a span; we have none, so it selects nothing.
_SPAN = re.compile(r"\[[^\]]*\]")
_SPAN_MARK = "[]"
_TARGET = re.compile(r"[\w:.-]+")
# A portal or a resource must not be able to write to the operator's terminal.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))} | {10: "\\n", 13: "\\r", 9: "\\t"}
# The same where JSON leaves them as they are.
_JSON_CONTROL = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), 0x2028, 0x2029)}
# What a person can follow, and a site of a hundred clients can say when it comes back; a fault that repeats itself
# must not fill a disk, nor hide other lines. Only WARN and INFO: who asks for more wants all of it, and each ERROR is
# shown.
REPEATS_SHOWN = 100  # lines of one template per window
REPEATS_WINDOW = 60.0  # s
_LIMITED = frozenset({logging.INFO, logging.WARNING})
# Templates are constants of this program; a text that was put together beforehand must not make the table grow.
_MAX_TEMPLATES = 1000
# For support archives: an hour of a busy gateway at INFO, and 2 MB of memory at most.
RECENT_LINES = 1000
RECENT_LENGTH = 2000  # characters of each
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

_LOG = logging.getLogger("firezone_gateway")


class FilterError(ValueError):
    """A directive of RUST_LOG that cannot be understood."""


class HumanFormatter(logging.Formatter):
    """`2026-08-20T10:11:12.345Z  INFO fzg::app: Message key=value`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback, which only our own bugs have, follows it."""
        moment = datetime.fromtimestamp(record.created, UTC)
        stamp = f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"
        fields = "".join(f" {key}={_plain(value)}" for key, value in _fields(record).items())
        line = f"{stamp} {_level(record):>5} {_target(record.name)}: {record.getMessage()}{fields}"
        line = line.translate(_CONTROL)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonLineFormatter(JsonFormatter):
    """One object per line: timestamp, level, target, message, and every field at the top level."""

    def format(self, record: logging.LogRecord) -> str:
        """One line whatever is in it."""
        return super().format(record).translate(_JSON_CONTROL)

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        """Ours instead of the library's set of names."""
        moment = datetime.fromtimestamp(record.created, UTC)
        log_data["timestamp"] = moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
        log_data["level"] = _level(record)
        log_data["target"] = _target(record.name)
        log_data["message"] = record.getMessage()
        log_data.update(message_dict)
        log_data.update(_fields(record))
        if record.exc_info:
            log_data["exception"] = self.formatException(record.exc_info)


class _Window:
    """Lines of one template since the first of them."""

    __slots__ = ("last", "left_out", "shown", "until")

    def __init__(self, until: float) -> None:
        self.until = until
        self.shown = 0
        self.left_out = 0
        self.last: logging.LogRecord | None = None


class _Lines(logging.StreamHandler[TextIO]):
    """Writes lines, counts them, and leaves out those beyond `REPEATS_SHOWN`; `summarise` says how many."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.recent: deque[str] = deque(maxlen=RECENT_LINES)
        self.hidden = ""
        self.counts = dict.fromkeys(dict.fromkeys(_NAMES.values()), 0)
        self._windows: dict[tuple[str, int, str], _Window] = {}

    def handle(self, record: logging.LogRecord) -> bool:
        """Called by the logger with what its level lets through."""
        self.counts[_NAMES.get(record.levelno, "INFO")] += 1
        return super().handle(record) if self._is_shown(record) else False

    def format(self, record: logging.LogRecord) -> str:
        """The line as it is written; its beginning is kept for support archives."""
        line = without(self.hidden, super().format(record))
        self.recent.append(line[:RECENT_LENGTH])
        return line

    def summarise(self, now: float) -> None:
        """Write the last of the lines that were left out, with their number, for each window that is over."""
        for key, window in list(self._windows.items()):
            if now < window.until:
                continue
            del self._windows[key]
            if window.last is not None:
                record = logging.makeLogRecord(vars(window.last))
                record.created = time.time()
                record.repeats_not_shown = window.left_out - 1
                super().handle(record)

    def _is_shown(self, record: logging.LogRecord) -> bool:
        if record.levelno not in _LIMITED:
            return True
        key = (record.name, record.levelno, str(record.msg))
        window = self._windows.get(key)
        if window is None:
            if len(self._windows) >= _MAX_TEMPLATES:
                return True
            window = self._windows[key] = _Window(time.monotonic() + REPEATS_WINDOW)
        if window.shown < REPEATS_SHOWN:
            window.shown += 1
            return True
        window.left_out += 1
        window.last = record
        return False


def configure(*, json_lines: bool, directives: str | None, flow_logs: bool, stream: TextIO | None = None) -> None:
    """Send everything that the filter lets through to `stream`, by default standard output. Raises `FilterError`."""
    stream = stream or sys.stdout
    if isinstance(stream, TextIOWrapper):  # one line each at once, whatever the locale and whatever reads it
        with suppress(OSError):  # an earlier line, for which there is no room
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    logging.raiseExceptions = False  # standard output may be closed or full; that must cost no more than the line
    handler = _Lines(stream)
    handler.setFormatter(JsonLineFormatter(json_ensure_ascii=False) if json_lines else HumanFormatter())
    wanted = "info" if directives is None else directives
    default, targets = parse_filter(",".join([_CEILINGS, wanted, "flow_logs=trace" if flow_logs else ""]))
    root = logging.getLogger()
    handler.recent.extend(recent_lines())  # of an earlier call
    root.handlers[:] = [handler]
    root.setLevel(default)
    for target, level in targets.items():  # loggers inherit from the nearest named one, as targets do
        logging.getLogger(target.replace("::", ".")).setLevel(level)


def parse_filter(directives: str) -> tuple[int, dict[str, int]]:
    """The level for everything and those for targets; without a bare level only errors. Raises `FilterError`."""
    default = _LEVELS["error"]
    targets: dict[str, int] = {}
    for directive in _SPAN.sub(_SPAN_MARK, directives).split(","):
        target, equals, word = (part.strip() for part in directive.partition("="))
        level = _LEVELS.get(word.lower() if equals else target.lower())
        if (not target and not equals) or _SPAN_MARK in target:
            continue
        if equals and level is None:
            raise FilterError(f"{directive!r} names no level; levels are off, error, warn, info, debug and trace")
        if _TARGET.fullmatch(target) is None:
            raise FilterError(f"{directive!r} names no target; write target=level or a level alone, and commas between")
        if equals or level is None:
            targets[target] = TRACE if level is None else level
        else:
            default = level
    return default, targets


def summarise_repeats(*, now_or_never: bool = False) -> None:
    """Call about once a second: what was left out as a repeat is said in sum; `now_or_never`: without waiting."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Lines):
            handler.summarise(float("inf") if now_or_never else time.monotonic())


def lines_by_level() -> Mapping[str, int]:
    """How many lines there were so far by level, as the format names it; those left out as repeats count too."""
    counts: Counter[str] = Counter()
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Lines):
            counts.update(handler.counts)
    return counts


def recent_lines() -> list[str]:
    """The last lines that were written, the oldest first."""
    return [line for handler in logging.getLogger().handlers if isinstance(handler, _Lines) for line in handler.recent]


def hide(token: Secret[str]) -> None:
    """From now on asterisks stand for it in each line: a portal or proxy that echoes our request must not log it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Lines):
            handler.hidden = token.reveal()


def announce() -> None:
    """The first line of every run."""
    machine = platform.uname()
    fields = {"version": VERSION, "arch": machine.machine, "os": machine.system.lower(), "system_uptime": _uptime()}
    _LOG.info("Logging started", extra=fields)


def fatal(error: BaseException) -> None:
    """One ERROR line with the whole chain of causes."""
    _LOG.error(chain(error))


def chain(error: BaseException) -> str:
    """The outermost message followed by each cause, separated by colons; a cause that is already quoted is left out."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        text = (str(cause) or type(cause).__name__).rstrip(".")
        gist = cause.strerror if isinstance(cause, OSError) and cause.strerror else text
        if not any(gist in part for part in parts):
            parts.append(text)
        cause = cause.__cause__
    return ": ".join(parts)


def _level(record: logging.LogRecord) -> str:
    return _NAMES.get(record.levelno, record.levelname)


def _target(name: str) -> str:
    return name.replace(".", "::")


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    text = str(value)
    if not isinstance(value, str) or (text and " " not in text and '"' not in text):
        return text
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{quoted}"'


def _uptime() -> str:
    with open("/proc/uptime", encoding="ascii") as uptime:  # noqa: PTH123 - the shortest way is the clearest here
        seconds = int(float(uptime.read().split()[0]))
    return f"{seconds // 86_400}d{seconds // 3600 % 24}h{seconds // 60 % 60}m"
