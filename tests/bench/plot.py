"""The main figures as a picture, SVG without any library: bars for medians, lines from the least to the most."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class _Panel(NamedTuple):
    title: str
    unit: str
    figures: tuple[str, ...]
    """First parts of names, each with the directions that it has."""


_PANELS = (
    _Panel("TCP, more is better", "Gbit/s", ("tcp1.up", "tcp1.down", "tcp4.up", "tcp4.down", "tcp_both")),
    _Panel("CPU of the gateway's end, less is better", "s per 10⁹ bytes", ("cpu_s_per_gb.up", "cpu_s_per_gb.down")),
    _Panel("UDP of 1200 bytes without loss, more is better", "Mbit/s", ("udp1200_mbit.up", "udp1200_mbit.down")),
    _Panel("UDP of 64 bytes without loss, more is better", "1000/s", ("udp64_kpps.up", "udp64_kpps.down")),
    _Panel("another client's ping under load, p99, less is better", "ms", ("ping_p99_ms.up", "ping_p99_ms.down")),
)
_PROGRAMS = {
    "direct.gateway": ("firezone-gateway", "#1a7f5a"),
    "relayed.gateway": ("firezone-gateway, relayed", "#7cc4a8"),
    "direct.wireguard-go": ("wireguard-go", "#3b6fb6"),
    "direct.pure": ("firezone-gateway, engine in Python", "#c9a227"),
}
_WIDTH, _LABEL, _VALUE = 860, 130, 110
_BAR, _GAP, _HEAD = 13, 10, 34


def draw(figures: Mapping[str, Mapping[str, Any]], caption: str) -> str:
    """The picture; figures that were not measured are left out."""
    parts: list[str] = []
    y = 20
    parts.append(_text(10, y, "Measured in one run, all ends on the same machine; medians, least and most", bold=True))
    x, y = 10, y + 22
    for name, colour in _PROGRAMS.values():
        parts.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour}"/>' + _text(x + 15, y, name))
        x += 45 + 7 * len(name)
    y += 8
    for panel in _PANELS:
        drawn, height = _panel(panel, figures, y)
        parts.append(drawn)
        y += height
    y += 22
    parts.append(_text(10, y, caption))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 12}" font-family="sans-serif"'
        f' font-size="12"><rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _panel(panel: _Panel, figures: Mapping[str, Mapping[str, Any]], y: int) -> tuple[str, int]:
    groups = {
        what: [
            (figures[f"{what}.{key}"], colour) for key, (_, colour) in _PROGRAMS.items() if f"{what}.{key}" in figures
        ]
        for what in panel.figures
    }
    groups = {what: bars for what, bars in groups.items() if bars}
    if not groups:
        return "", 0
    most = max(each["max"] for bars in groups.values() for each, _ in bars) or 1.0
    scale = (_WIDTH - _LABEL - _VALUE) / most
    parts = [_text(10, y + 24, f"{panel.title} ({panel.unit})", bold=True)]
    top = y + _HEAD
    for what, bars in groups.items():
        parts.append(_text(20, top + len(bars) * _BAR / 2 + 4, what.replace(".", " ")))
        for each, colour in bars:
            width, middle = each["median"] * scale, top + _BAR / 2
            parts.append(
                f'<rect x="{_LABEL}" y="{top + 1}" width="{width:.1f}" height="{_BAR - 2}" fill="{colour}"/>'
                f'<path d="M{_LABEL + each["min"] * scale:.1f} {middle}H{_LABEL + each["max"] * scale:.1f}"'
                ' stroke="#222" stroke-width="1.5"/>'
                + _text(_LABEL + each["max"] * scale + 6, top + _BAR - 2.5, f"{each['median']:.3g}")
            )
            top += _BAR
        top += _GAP
    return "".join(parts), top - y


def _text(x: float, y: float, text: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{weight} fill="#222">{escape(text)}</text>'
