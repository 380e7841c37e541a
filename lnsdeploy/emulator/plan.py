"""What calibration fixes for each operation: formats, offsets, and where the accumulator stands.

A plan together with words and tables determines every output bit; plans hold integers only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.datapath import Datapath, LogAccumulator, common_gamma
from lnsdeploy.errors import BadValueError
from lnsdeploy.fields import check_choice, check_integer
from lnsdeploy.formats import MAX_OFFSET, UNDERFLOWS, LNSFormat

Ints = npt.NDArray[np.int64]
IntOrChannels = int | Ints


@dataclass
class Counts:
    """How often results left their format.

    Args:
        words: results produced.
        saturated: results above the largest code.
        negative: those of them that are negative.
        flushed: non-zero results below code 1.
    """

    words: int = 0
    saturated: int = 0
    flushed: int = 0
    negative: int = 0

    def add(self, words: int, saturated: int, flushed: int, negative: int = 0) -> None:
        """Count one more batch of results."""
        self.words += words
        self.saturated += saturated
        self.negative += negative
        self.flushed += flushed


@dataclass(frozen=True, eq=False)
class DotPlan:
    """A dot product, matrix product or convolution (spec 3 to 5).

    Args:
        datapath: the arithmetic.
        activation, weight, output: the formats of the operands and of the result.
        input_offset: o_a.
        weight_offset: o_b, an integer or one per output channel.
        output_offset: o_out.
        lsb: λ, the weight of the linear accumulator's least significant bit is 2^λ (spec 4.3).
        acc_offset: o_acc of the log accumulator, an integer or one per output channel (spec 5).
    """

    datapath: Datapath
    activation: LNSFormat
    weight: LNSFormat
    output: LNSFormat
    input_offset: int
    weight_offset: IntOrChannels
    output_offset: int
    lsb: int = 0
    acc_offset: IntOrChannels = 0

    def __post_init__(self) -> None:
        for name in ("input_offset", "output_offset"):
            check_integer(name, getattr(self, name), -MAX_OFFSET, MAX_OFFSET)
        check_integer("lsb", self.lsb, -(1 << 24), 1 << 24)
        if self.output.gamma != self.gamma:
            raise BadValueError(
                f"the output's gamma must be that of the products, {self.gamma}, not {self.output.gamma}"
            )
        if self.gamma != self.datapath.gamma:
            raise BadValueError(
                f"formats {self.activation} and {self.weight} multiply at gamma {self.gamma}, "
                f"the datapath {self.datapath.name!r} at {self.datapath.gamma}"
            )

    @property
    def gamma(self) -> int:
        """γ of the products (spec 3.2)."""
        return common_gamma(self.activation, self.weight)

    @property
    def widen_activation(self) -> int:
        """What activation codes and offsets are multiplied by (spec 3.2)."""
        return self.gamma // self.activation.gamma

    @property
    def widen_weight(self) -> int:
        """What weight codes and offsets are multiplied by (spec 3.2)."""
        return self.gamma // self.weight.gamma

    @property
    def max_product_code(self) -> int:
        """The largest P (spec 3.1)."""
        return self.activation.max_code * self.widen_activation + self.weight.max_code * self.widen_weight

    def product_offset(self, channels: int) -> Ints:
        """S_n, int64 [channels] (spec 3.2)."""
        weight = per_channel(self.weight_offset, channels, "weight_offset")
        return self.input_offset * self.widen_activation + weight * self.widen_weight

    def accumulator_offset(self, channels: int) -> Ints:
        """o_acc, int64 [channels]."""
        return per_channel(self.acc_offset, channels, "acc_offset")

    def channels(self, part: slice) -> DotPlan:
        """The plan of some of the output channels (for grouped convolution)."""
        changes: dict[str, Any] = {}
        for name in ("weight_offset", "acc_offset"):
            value = getattr(self, name)
            if isinstance(value, np.ndarray) and value.ndim:
                changes[name] = value[part]
        return replace(self, **changes) if changes else self


def per_channel(value: IntOrChannels, channels: int, name: str) -> Ints:
    """An integer, or one per channel, as int64 [channels]."""
    array = np.asarray(value, dtype=np.int64)
    if array.ndim and array.shape != (channels,):
        raise BadValueError(f"{name} has shape {array.shape}, but there are {channels} output channels")
    return np.broadcast_to(array, (channels,))


@dataclass(frozen=True)
class AddPlan:
    """Element-wise addition by the log adder (spec 6.4).

    Args:
        accumulator: the adder.
        a, b, output: formats; all of one γ.
        a_offset, b_offset, output_offset, acc_offset: their offsets and the adder's.
        underflow: ``"zero"`` or ``"min"``.
    """

    accumulator: LogAccumulator
    a: LNSFormat
    b: LNSFormat
    output: LNSFormat
    a_offset: int
    b_offset: int
    output_offset: int
    acc_offset: int
    underflow: str = "zero"

    def __post_init__(self) -> None:
        check_choice("underflow", self.underflow, UNDERFLOWS)
        if not self.a.gamma == self.b.gamma == self.output.gamma:
            raise BadValueError(
                f"an addition needs one gamma, not those of {self.a}, {self.b} and {self.output}; rescale first"
            )


@dataclass(frozen=True)
class PoolPlan:
    """Sums and averages over windows by the log adder (spec 6.5).

    Args:
        accumulator: the adder and its order.
        input, output: formats of one γ.
        input_offset, output_offset, acc_offset: their offsets and the accumulator's.
        underflow: ``"zero"`` or ``"min"``.
    """

    accumulator: LogAccumulator
    input: LNSFormat
    output: LNSFormat
    input_offset: int
    output_offset: int
    acc_offset: int
    underflow: str = "zero"

    def __post_init__(self) -> None:
        check_choice("underflow", self.underflow, UNDERFLOWS)
        if self.input.gamma != self.output.gamma:
            raise BadValueError(f"pooling needs one gamma, not those of {self.input} and {self.output}; rescale first")


@dataclass(frozen=True)
class RescalePlan:
    """Words of one format and offset to another (spec 6.3).

    Args:
        input, output: formats; one γ is a multiple of the other.
        input_offset, output_offset: their offsets.
        underflow: ``"zero"`` or ``"min"``; zero itself stays zero under either.
    """

    input: LNSFormat
    output: LNSFormat
    input_offset: int
    output_offset: int
    underflow: str = "zero"

    def __post_init__(self) -> None:
        check_choice("underflow", self.underflow, UNDERFLOWS)
        common_gamma(self.input, self.output)


@dataclass(frozen=True)
class MultiplyPlan:
    """Element-wise multiplication of words (spec 6.2).

    Args:
        a, b, output: formats; all of one γ.
        a_offset, b_offset, output_offset: their offsets.
        underflow: ``"zero"`` or ``"min"``.
    """

    a: LNSFormat
    b: LNSFormat
    output: LNSFormat
    a_offset: int
    b_offset: int
    output_offset: int
    underflow: str = "zero"

    def __post_init__(self) -> None:
        check_choice("underflow", self.underflow, UNDERFLOWS)
        if not self.a.gamma == self.b.gamma == self.output.gamma:
            raise BadValueError(
                f"a product needs one gamma, not those of {self.a}, {self.b} and {self.output}; rescale first"
            )

    @property
    def code_shift(self) -> int:
        """What is added to the sum of two codes."""
        return self.a_offset + self.b_offset - self.output_offset


@dataclass(frozen=True)
class Window:
    """Geometry of convolutions and pooling, one entry a spatial axis.

    Args:
        kernel: sizes, ≥ 1.
        strides: ≥ 1; ones where omitted.
        pads: beginnings, then ends, ≥ 0, as in ONNX; none where omitted.
        dilations: ≥ 1; ones where omitted.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        axes = len(self.kernel)
        if not 1 <= axes <= 3 or min(self.kernel) < 1:
            raise BadValueError(f"kernel must be one to three integers of at least 1, not {self.kernel}")
        for name, length, default in (("strides", axes, 1), ("pads", 2 * axes, 0), ("dilations", axes, 1)):
            value = tuple(int(v) for v in getattr(self, name)) or (default,) * length
            if len(value) != length or min(value) < default:
                raise BadValueError(f"{name} must be {length} integers of at least {default}, not {value}")
            object.__setattr__(self, name, value)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial shape of the result.

        Raises:
            BadValueError: the window does not fit the padded input.
        """
        axes = len(self.kernel)
        if len(shape) != axes:
            raise BadValueError(f"a window over {axes} axes does not fit the spatial shape {shape}")
        sizes = []
        for i, size in enumerate(shape):
            reach = self.dilations[i] * (self.kernel[i] - 1) + 1
            room = size + self.pads[i] + self.pads[axes + i] - reach
            if room < 0:
                raise BadValueError(
                    f"a window of {self.kernel} (dilations {self.dilations}) does not fit the spatial "
                    f"shape {shape} with pads {self.pads}"
                )
            sizes.append(room // self.strides[i] + 1)
        return tuple(sizes)
