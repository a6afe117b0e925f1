"""What of gevent belongs into the frozen program; stands in for PyInstaller's own hook, which takes its tests too."""

from PyInstaller.utils.hooks import collect_submodules

_OTHER_LOOPS = (
    "gevent.libuv",
    "gevent._ffi",
    "gevent.libev._corecffi",
    "gevent.libev.corecffi",
    "gevent.libev.watcher",
)
_OTHER_RESOLVERS = (
    "gevent.resolver.ares",
    "gevent.resolver.cares",
    "gevent.resolver.dnspython",
    "gevent.resolver_ares",
)
_UNUSED = (*_OTHER_LOOPS, *_OTHER_RESOLVERS, "gevent.tests", "gevent.testing", "gevent.backdoor")


def _used(name: str) -> bool:
    return not any(name == unused or name.startswith(unused + ".") for unused in _UNUSED)


# Its compiled modules import others by name in C, which no analysis sees.
hiddenimports = collect_submodules("gevent", filter=_used)
excludedimports = list(_UNUSED)
