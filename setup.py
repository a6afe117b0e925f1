"""What pyproject.toml cannot say: the native packet engine, which is built where a compiler is and left out elsewhere.

FZG_REQUIRE_NATIVE=1 makes its absence an error. FZG_SANITIZE=address,undefined builds it for the sanitizers.
"""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup

REQUIRED = os.environ.get("FZG_REQUIRE_NATIVE") == "1"
SANITIZERS = os.environ.get("FZG_SANITIZE")
NATIVE = Path("fzg/dataplane/native")


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
        optional=not REQUIRED,
    )
    return cythonize([engine], build_dir="build/cython")


setup(ext_modules=extensions())
