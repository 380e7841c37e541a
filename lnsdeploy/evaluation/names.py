"""How models are named."""

from __future__ import annotations

import re
from pathlib import Path

LIBRARIES = ("timm", "hf", "torchvision")

DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_model_name(source: str) -> bool:
    """Whether a text names a torch model (``timm:…``, ``FILE.py:CALLABLE``, ``PACKAGE.MODULE:CALLABLE``)."""
    library, _, rest = source.partition(":")
    if library in LIBRARIES and rest:
        return True
    place, colon, function = source.rpartition(":")
    if not colon or not DOTTED.fullmatch(function) or Path(source).exists():
        return False
    return place.endswith(".py") or DOTTED.fullmatch(place) is not None
