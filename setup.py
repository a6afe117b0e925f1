"""What pyproject.toml cannot say: the native packet engine, which is built where a compiler is and left out elsewhere.

FZG_REQUIRE_NATIVE=1 makes its absence an error. FZG_SANITIZE=address,undefined builds it for the sanitizers.
"""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

REQUIRED = os.environ.get("FZG_REQUIRE_NATIVE") == "1"
SANITIZERS = os.environ.get("FZG_SANITIZE")
NATIVE = Path("fzg/dataplane/native")


class BuildEngine(build_ext):
    """Takes a compiler that is missing for one that fails, so that `optional` covers both."""

    def build_extension(self, ext: Extension) -> None:
        """See setuptools."""
        try:
            super().build_extension(ext)
        except OSError as error:
            raise CompileError(str(error)) from error


def extensions() -> list[Extension]:
    """The engine; none where Cython is not installed or the system is not Linux."""
    if platform.system() != "Linux":
        return []
    try:
        from Cython.Build import cythonize
    except ImportError:
        if REQUIRED:
            raise
        return []
    options, link = ["-std=c11", "-fvisibility=hidden"], []
    if SANITIZERS:
        options += ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover", f"-fsanitize={SANITIZERS}"]
        link += [f"-fsanitize={SANITIZERS}"]
    else:
        options += ["-O3", "-g0"]
    engine = Extension(
        "fzg.dataplane._native",
        ["fzg/dataplane/_native.pyx", *sorted(map(str, NATIVE.glob("*.c")))],
        depends=sorted(map(str, (*NATIVE.glob("*.h"), *NATIVE.glob("*.pxi")))),
        include_dirs=[str(NATIVE)],
        define_macros=[("_GNU_SOURCE", None)],
        extra_compile_args=options,
        extra_link_args=link,
        libraries=["dl"],  # libcrypto itself is the one that the interpreter has loaded
    )
    (engine,) = cythonize([engine], build_dir="build/cython")
    engine.optional = not REQUIRED
    return [engine]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildEngine})
