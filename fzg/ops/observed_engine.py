"""A packet engine that somebody looks into: without flows, so that every packet passes, at the price of speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fzg.dataplane.engine import Engine


class ObservedEngine:
    """Passes everything on to the engine `observed` but flows; subclasses override what carries packets."""

    def __init__(self, engine: Engine) -> None:
        self.observed = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.observed, name)

    @property
    def __class__(self) -> type[Any]:
        """Who asks which engine this is gets to know the real one."""
        return self.observed.__class__

    @__class__.setter
    def __class__(self, _: object) -> None:
        raise AttributeError("an engine does not change its class")

    def install_flow(self, *_: object, **__: object) -> None:
        """No flow: the core decides on each packet, by the same rules, and we see it."""
