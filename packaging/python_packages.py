"""Prints FILE=PACKAGE for what packaging/require is to look after, of this Python: `library` or `headers`.

Without its shared library nothing can be frozen from it, without its headers no extension compiled.
"""

import sys
import sysconfig
from pathlib import Path

version = sysconfig.get_python_version()
library = sysconfig.get_config_var("INSTSONAME") or ""
if sys.argv[1] == "headers":
    pair = f"{Path(sysconfig.get_path('include')) / 'Python.h'}=libpython{version}-dev"
elif ".so" in library:
    pair = f"{Path(sysconfig.get_config_var('LIBDIR')) / library}=libpython{version}"
else:
    sys.exit(f"{sys.base_prefix}: this Python was built without --enable-shared; say PYTHON=path of another one")
sys.stdout.write(pair + "\n")
