"""Image files as pixels: one rule for what a net is trained on and what it is evaluated on (docs/training.md)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.errors import BadFileError, MissingDependencyError

Pixels = npt.NDArray[np.uint8]

# As Pillow counts its filters.
FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def pillow() -> Any:
    """The module PIL.Image.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import PIL.Image
    except ImportError as error:
        raise MissingDependencyError("Pillow reads images: pip install 'lnsdeploy[models]'") from error
    return PIL.Image


def read_picture(
    file: Path, shape: tuple[int, int, int], *, crop: float = 1.0, interpolation: str = "bilinear"
) -> Pixels:
    """An image file, resized so that its shorter side leaves `crop`, and cut out of the middle.

    Args:
        shape: channels (1 for grey, else 3), height and width.
        crop: share of the resized image that is left, along the side that is cut least.
        interpolation: one of :data:`FILTERS`.
    Returns: uint8 [channels, height, width].

    Raises:
        BadFileError: it is missing, damaged, or so large that it may be meant to exhaust the memory.
        MissingDependencyError: Pillow is not installed.
    """
    image_of = pillow()
    channels, height, width = shape
    try:
        with warnings.catch_warnings():
            # a picture of more than 90 million pixels is an attack or a slip
            warnings.simplefilter("error", image_of.DecompressionBombWarning)
            with image_of.open(file) as opened:
                # JPEGs are decoded no finer than needed
                opened.draft("RGB", (2 * width, 2 * height))
                image = opened.convert("L" if channels == 1 else "RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever damage makes them raise
        raise BadFileError(f"{file}: not a readable image: {' '.join(str(error).split())}") from error
    scale = max(height / crop / image.height, width / crop / image.width)
    size = tuple(max(least, round(side * scale)) for side, least in ((image.width, width), (image.height, height)))
    if size != image.size:
        image = image.resize(size, resample=FILTERS[interpolation])
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.uint8)
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)
