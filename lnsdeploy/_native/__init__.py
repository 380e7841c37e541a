"""Where the native library lies, and how it was built.

The library is beside this file: in an installed package because the wheel put it there, in an editable install because
it is built into the source tree. A pure-Python installation has none.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

LIBRARY_VARIABLE = "LNSDEPLOY_LIBRARY"
NAMES = ("liblnsdeploy.so", "liblnsdeploy.dylib", "lnsdeploy.dll")


def library_path() -> Path | None:
    """The shared library, or None where none was built.

    The environment variable LNSDEPLOY_LIBRARY names another one, for instance a sanitized one. It is returned even
    where no such file exists: who asks for a library must not silently get a different one.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    return Path(named) if named else _built()


def build_info() -> dict[str, Any]:
    """How the package's own library was built: `built`, `why` not, `compiler`, `isas`, `version`."""
    info: dict[str, Any] = {"built": False, "why": "", "compiler": "", "isas": [], "version": ""}
    info |= _record()
    if info["built"] and _built() is None:
        info |= {"built": False, "why": "the C++ sources did not compile, or the library was deleted"}
    elif not info["built"] and not info["why"]:
        info["why"] = "the C++ sources were not compiled at installation"
    return info


def _built() -> Path | None:
    return _find(NAMES)


def _record() -> dict[str, Any]:
    path = _find(("build.json",))
    if path is None:
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _find(names: tuple[str, ...]) -> Path | None:
    # All folders of the package: other ways to install than ours may spread a package over several.
    for folder in __path__:
        for name in names:
            path = Path(folder) / name
            if path.is_file():
                return path
    return None
