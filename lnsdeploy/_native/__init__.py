"""Where the native library lies, and how it was built."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def library_path() -> Path | None:
    """The shared library, or None where none was built."""
    named = os.environ.get("LNSDEPLOY_LIBRARY")
    return Path(named) if named else None


def build_info() -> dict[str, Any]:
    """How the library was built."""
    return {}
