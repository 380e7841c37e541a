"""What a model takes: the contract between models and data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from lnsdeploy.errors import BadTypeError, BadValueError
from lnsdeploy.fields import check_choice

Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos"]

INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos")

# A size that no net of today takes: more is a slip, and would take the memory of the machine.
_MAX_SIZE = 1 << 14


@dataclass(frozen=True)
class ImageInput:
    """Images, as float32 [n, channels, height, width]: (pixel/255 − mean) / std.

    Args:
        shape: channels (1 or 3), height, width.
        mean, std: one for each channel.
        crop: the share of the shorter side that is kept in the middle when a photograph is brought to size.
        interpolation: how it is resized.

    Raises:
        BadValueError: a field is out of range; the message names it.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    crop: float = 1.0
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        shape = _sizes("shape", self.shape)
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise BadValueError(f"shape must be channels (1 or 3), height and width, not {shape}")
        object.__setattr__(self, "shape", shape)
        for name, default in (("mean", 0.0), ("std", 1.0)):
            values = tuple(float(value) for value in getattr(self, name)) or (default,) * shape[0]
            if len(values) != shape[0] or (name == "std" and min(values) <= 0):
                raise BadValueError(f"{name} must be {shape[0]} numbers, one a channel, not {values}")
            object.__setattr__(self, name, values)
        if not 0 < self.crop <= 1:
            raise BadValueError(f"crop must be a share in 0 … 1, not {self.crop}")
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)

    def __str__(self) -> str:
        return "×".join(map(str, self.shape))


@dataclass(frozen=True)
class TokenInput:
    """Tokens, as int64 [n, length] in 0 … `vocabulary` − 1.

    Args:
        vocabulary: their number.
        length: of a sequence.
        tokenizer: text to tokens; None if the model has none here, and then text is read as bytes.
        mask: the token that stands for a hidden one, in models that guess it.
    """

    vocabulary: int
    length: int
    tokenizer: Callable[[str], list[int]] | None = field(default=None, compare=False, repr=False)
    mask: int | None = None

    def __post_init__(self) -> None:
        if type(self.vocabulary) is not int or self.vocabulary < 2:
            raise BadValueError(f"vocabulary must be an integer of at least 2, not {self.vocabulary!r}")
        if type(self.length) is not int or not 1 <= self.length <= 1 << 20:
            raise BadValueError(f"length must be an integer from 1 to {1 << 20}, not {self.length!r}")
        if self.mask is not None and not 0 <= self.mask < self.vocabulary:
            raise BadValueError(f"mask must be one of the {self.vocabulary} tokens, not {self.mask!r}")

    def __str__(self) -> str:
        return f"{self.length} tokens of {self.vocabulary}"


@dataclass(frozen=True)
class TensorInput:
    """Anything else: float32 [n, *shape], normal with mean 0 and variance 1 where it is made up.

    Args:
        shape: of one sample, one to five sizes.
    """

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        shape = _sizes("shape", self.shape)
        if not 1 <= len(shape) <= 5:
            raise BadValueError(f"shape must have one to five sizes, not {shape}")
        object.__setattr__(self, "shape", shape)

    def __str__(self) -> str:
        return "×".join(map(str, self.shape))


Input = ImageInput | TokenInput | TensorInput


def _sizes(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not all(type(size) is int for size in value):
        raise BadTypeError(f"{name} must be integers, not {value!r}")
    if not all(1 <= size <= _MAX_SIZE for size in value):
        raise BadValueError(f"{name} must be sizes from 1 to {_MAX_SIZE}, not {tuple(value)}")
    return tuple(value)
