"""Prints LIBRARY=PACKAGE for the shared library of this Python, without which nothing can be frozen from it."""

import sys
import sysconfig
from pathlib import Path

version = sysconfig.get_python_version()
library = sysconfig.get_config_var("INSTSONAME") or ""
if ".so" not in library:
    sys.exit(f"{sys.base_prefix}: this Python was built without --enable-shared; say PYTHON=path of another one")
sys.stdout.write(f"{Path(sysconfig.get_config_var('LIBDIR')) / library}=libpython{version}\n")
