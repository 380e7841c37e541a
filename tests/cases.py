"""Named edge cases, and the bridge from lnsdeploy's objects to the oracle's.

`DOTS` are dot products at the edges of the specification: each is plain data (a datapath, a plan's
integers, words), so that the same list makes the golden vectors of `tests/vectors`. `DELTAS` are the
parametrisations of every way to make Δ that the tests go through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lnsdeploy import delta as methods
from lnsdeploy.datapath import Accumulator, Datapath, LinearAccumulator, LogAccumulator
from lnsdeploy.delta import Delta
from lnsdeploy.emulator.plan import AddPlan, DotPlan, PoolPlan, Window
from lnsdeploy.formats import LNSFormat
from tests import oracle

Array = np.ndarray[Any, Any]

# ---------------------------------------------------------------------------------------------------------------------
# lnsdeploy's objects as the oracle's


def to_format(fmt: LNSFormat) -> oracle.Format:
    return oracle.Format(fmt.bits, fmt.gamma, fmt.signed)


def to_method(how: Delta) -> oracle.Method:
    return oracle.method(how.kind, **dataclasses.asdict(how))


def to_linear(part: LinearAccumulator) -> oracle.Linear:
    return oracle.Linear(**dataclasses.asdict(part))


def to_log(part: LogAccumulator) -> oracle.Log:
    return oracle.Log(part.bits, part.guard_bits, part.lanes, to_method(part.delta))


def channel(value: Any, n: int) -> int:
    """An integer, or the entry of an output channel."""
    array = np.asarray(value)
    return int(array[n]) if array.ndim else int(array)


def oracle_dot(a: Sequence[int], w: Sequence[int], bias: Any, plan: DotPlan, n: int) -> int:
    """One output word (output channel n) by the oracle (spec 3 to 5)."""
    formats = to_format(plan.activation), to_format(plan.weight), to_format(plan.output)
    offsets = plan.input_offset, channel(plan.weight_offset, n), plan.output_offset
    start = 0 if bias is None else int(bias[n])
    a, w = [int(v) for v in a], [int(v) for v in w]
    part = plan.datapath.accumulate
    if isinstance(part, LinearAccumulator):
        return oracle.dot_linear(a, w, start, formats, offsets, plan.lsb, to_linear(part), plan.datapath.underflow)
    acc_offset = channel(plan.acc_offset, n)
    return oracle.dot_log(a, w, start, formats, offsets, acc_offset, to_log(part), plan.datapath.underflow)


def oracle_product(a: Array, w: Array, bias: Any, plan: DotPlan) -> Array:
    """Words [M, N] by the oracle."""
    result = [[oracle_dot(row, column, bias, plan, n) for n, column in enumerate(w)] for row in a]
    return np.array(result, dtype=np.int64).reshape(a.shape[0], w.shape[0])


def to_shape(window: Window) -> oracle.Shape:
    return oracle.Shape(window.kernel, window.strides, window.pads, window.dilations)


def oracle_convolution(x: Array, w: Array, bias: Any, plan: DotPlan, window: Window, groups: int) -> Array:
    """spec 7.1 by the oracle."""
    return oracle.convolve(x, w, to_shape(window), groups, lambda a, b, n: oracle_dot(a, b, bias, plan, n))


def oracle_add(a: Array, b: Array, plan: AddPlan) -> Array:
    """spec 6.4 by the oracle, element by element."""
    formats = to_format(plan.a), to_format(plan.b), to_format(plan.output)
    offsets = plan.a_offset, plan.b_offset, plan.output_offset
    part = to_log(plan.accumulator)
    a, b = np.broadcast_arrays(a, b)
    words = [
        oracle.add(int(x), int(y), formats, offsets, plan.acc_offset, part, plan.underflow)
        for x, y in zip(a.reshape(-1), b.reshape(-1), strict=True)
    ]
    return np.array(words, dtype=np.int64).reshape(a.shape)


def oracle_pool(x: Array, plan: PoolPlan, window: Window, average: bool, count_include_pad: bool = False) -> Array:
    """spec 6.5 by the oracle."""

    def reduce(words: list[int | None]) -> int:
        count = len(words) if count_include_pad else sum(word is not None for word in words)
        return oracle.window_sum(
            [word or 0 for word in words],
            count if average else None,
            to_format(plan.input),
            to_format(plan.output),
            plan.input_offset,
            plan.output_offset,
            plan.acc_offset,
            to_log(plan.accumulator),
            plan.underflow,
        )

    return oracle.pool(x, to_shape(window), reduce)


# ---------------------------------------------------------------------------------------------------------------------
# Ways to make Δ

DELTAS: tuple[Delta, ...] = (
    methods.Exact(),
    methods.Table(1),
    methods.Table(20, 4, "left"),
    methods.Table(20, 4, "middle"),
    methods.Table(8, 1, "middle"),
    methods.Table(64, 2, "middle"),
    methods.Table(3, 64, "left"),
    methods.Table(512, 1, "left"),
    methods.Interpolated(1, "equal", 4),
    methods.Interpolated(8, "equal", 8),
    methods.Interpolated(64, "equal", 12),
    methods.Interpolated(1, "octave", 1),
    methods.Interpolated(4, "octave", 8),
    methods.Interpolated(16, "octave", 24),
    methods.Cotransform(1),
    methods.Cotransform(3),
    methods.Cotransform(6),
    methods.Mitchell(),
    methods.Shift(),
    methods.Polynomial(1, 4, "octave", 8),
    methods.Polynomial(2, 4, "octave", 8),
    methods.Polynomial(3, 16, "equal", 12),
    methods.Polynomial(6, 1, "equal", 20),
    methods.Polynomial(2, 8, "equal", 0),
    methods.Polynomial(4, 1, "octave", 30),
    methods.Cordic(1, 4),
    methods.Cordic(6, 10),
    methods.Cordic(14, 16),
    methods.Cordic(20, 24),
    methods.Cordic(48, 48),
    methods.Max(),
)


def delta_name(how: Delta) -> str:
    return "-".join([how.kind, *(str(v) for v in dataclasses.asdict(how).values())])


# ---------------------------------------------------------------------------------------------------------------------
# Dot products


@dataclass(frozen=True)
class DotCase:
    """A dot product as data: everything of a `DotPlan`, and words."""

    name: str
    accumulate: Accumulator
    a: list[list[int]]
    w: list[list[int]]
    bias: list[int] | None = None
    activation: str = "8:8"
    weight: str = "8:8"
    output: str = "8:8"
    input_offset: int = 0
    weight_offset: int | list[int] = 0
    output_offset: int = 0
    lsb: int = 0
    acc_offset: int | list[int] = 0
    underflow: str = "zero"
    expected: list[list[int]] | None = field(default=None, compare=False)

    def datapath(self) -> Datapath:
        adder = self.accumulate if isinstance(self.accumulate, LogAccumulator) else LogAccumulator(bits=10)
        return Datapath(
            name=self.name,
            weight=LNSFormat.parse(self.weight),
            activation=LNSFormat.parse(self.activation),
            output=LNSFormat.parse(self.output),
            accumulate=self.accumulate,
            add=adder,
            underflow=self.underflow,  # type: ignore[arg-type]
        )

    def plan(self) -> DotPlan:
        datapath = self.datapath()
        return DotPlan(
            datapath,
            datapath.activation,
            datapath.weight,
            datapath.output,
            self.input_offset,
            np.array(self.weight_offset) if isinstance(self.weight_offset, list) else self.weight_offset,
            self.output_offset,
            self.lsb,
            np.array(self.acc_offset) if isinstance(self.acc_offset, list) else self.acc_offset,
        )

    def arrays(self) -> tuple[Array, Array, Array | None]:
        datapath = self.datapath()
        depth = len(self.w[0]) if self.w else len(self.a[0]) if self.a else 0
        a = np.array(self.a, dtype=datapath.activation.dtype).reshape(len(self.a), depth)
        w = np.array(self.w, dtype=datapath.weight.dtype).reshape(len(self.w), depth)
        return a, w, None if self.bias is None else np.array(self.bias, dtype=np.int64)

    def by_oracle(self) -> list[list[int]]:
        a, w, bias = self.arrays()
        return oracle_product(a, w, bias, self.plan()).tolist()  # type: ignore[no-any-return]


def spread(rows: int, columns: int, seed: int, bits: int = 8) -> list[list[int]]:
    """Words spread over a format by a fixed linear congruence: no library's generator decides a vector."""
    state = 2 * seed + 1
    found = []
    for _ in range(rows * columns):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        found.append(state >> (64 - bits))
    return [found[i * columns : (i + 1) * columns] for i in range(rows)]


def _middle(rows: int, columns: int, seed: int) -> list[list[int]]:
    """Words of 8:8 within two octaves, both signs, now and then a zero."""
    return [[0 if v % 11 == 0 else (v & 0x80) | (56 + v % 16) for v in row] for row in spread(rows, columns, seed)]


def _linear_cases() -> list[DotCase]:
    base = LinearAccumulator(bits=24, conversion="product", table_bits=3, constant_bits=8, overflow="saturate")
    bins = dataclasses.replace(base, conversion="bin")
    change = dataclasses.replace
    a, w = _middle(3, 13, 1), _middle(4, 13, 2)
    middle: dict[str, Any] = {"a": a, "w": w, "lsb": 8, "output_offset": 64}
    found = [
        # by hand: γ = 1, 2^1·2^2 + 2^2·2^2 = 24, nearest in the log domain to 2^5 (24 > 2^4.5); −(2·4) + 16 = 8
        DotCase(
            "by-hand-shifts",
            LinearAccumulator(bits=16, table_bits=0, constant_bits=0),
            [[1, 2], [9, 2]],
            [[2, 2]],
            activation="4:1",
            weight="4:1",
            output="4:1",
            expected=[[5], [3]],
        ),
        # by hand: a bias of 100 alone, wrapped to −28 and clamped to 63, in units of 2^0: −28 → −2^5, 63 → 2^6
        DotCase(
            "by-hand-bias-wraps",
            LinearAccumulator(bits=7, constant_bits=0, overflow="wrap"),
            [[0]],
            [[1]],
            [100],
            activation="4:1",
            weight="4:1",
            output="4:1",
            expected=[[8 | 5]],
        ),
        DotCase(
            "by-hand-bias-saturates",
            LinearAccumulator(bits=7, constant_bits=0, overflow="saturate"),
            [[0]],
            [[1]],
            [100],
            activation="4:1",
            weight="4:1",
            output="4:1",
            expected=[[6]],
        ),
        DotCase("product", base, **middle),
        DotCase("bins", bins, **middle),
        DotCase("bias", base, bias=[5, -4096, 1 << 23, -(1 << 30)], **middle),
        DotCase("bias-in-bin-0", bins, bias=[5, -4096, 1 << 23, -(1 << 30)], **middle),
        DotCase("wrap", change(base, bits=9, overflow="wrap"), **middle),
        DotCase("saturates-at-every-step", change(base, bits=8), **middle),
        DotCase("bins-saturate", change(bins, bits=5), **middle),
        DotCase("mitchell-both-ways", change(base, table_bits=0, constant_bits=0, encoder="mitchell"), **middle),
        DotCase("table-encoder", change(base, encoder="table", encoder_bits=5), **middle),
        DotCase("table-encoder-wide", change(base, bits=8, encoder="table", encoder_bits=12), **middle),
        DotCase("half-table", change(base, table_bits=1), **middle),
        DotCase("half-table-bins", change(bins, table_bits=2), **middle),
        DotCase("rounds", change(base, shift="round"), **middle),
        DotCase("psum-narrower", change(base, lanes=4, psum_bits=6), **middle),
        DotCase("psum-narrower-wraps", change(base, lanes=4, psum_bits=6, overflow="wrap"), **middle),
        DotCase("psum-wider", change(base, lanes=4, bits=7, psum_bits=20, overflow="wrap"), **middle),
        DotCase("all-left-shifts", change(base, bits=40), a=a, w=w, lsb=-12, output_offset=64),
        DotCase("huge-left-shift", change(base, bits=62), a=a, w=w, lsb=-200, output_offset=-1500),
        DotCase("left-shift-wraps", change(base, bits=30, overflow="wrap"), a=a, w=w, lsb=-14, output_offset=64),
        DotCase("huge-right-shift", base, a=a, w=w, lsb=90, output_offset=64),
        DotCase("right-shift-leaves-one-bit", change(base, shift="round"), a=a, w=w, lsb=16, output_offset=90),
        DotCase(
            "cancels", base, a=[[60, 60, 0x80 | 61, 61]], w=[[70, 0x80 | 70, 90, 90], [70, 0x80 | 69, 90, 90]], lsb=4
        ),
        DotCase("zeros", base, a=[[0, 0x80, 5, 0]], w=[[0, 7, 0x80, 0x80]], bias=[0]),
        DotCase("zeros-underflow-min", base, a=[[0, 0x80, 5, 0]], w=[[0, 7, 0x80, 0x80]], underflow="min"),
        DotCase("small-underflow-min", base, a=a, w=w, lsb=8, output_offset=1000, underflow="min"),
        DotCase("small-underflow-zero", base, a=a, w=w, lsb=8, output_offset=1000),
        DotCase("large", base, a=a, w=w, lsb=8, output_offset=-1000),
        DotCase("unsigned-output", base, output="u7:8", **middle),
        DotCase("unsigned-output-min", base, output="u7:8", underflow="min", **middle),
        DotCase("unsigned-activation", base, activation="u8:8", **middle),
        DotCase("per-channel-offsets", base, **{**middle, "weight_offset": [-30, 0, 7, 40]}),
        DotCase(
            "offsets-near-limits",
            base,
            **{
                **middle,
                "input_offset": 2**31 - 1,
                "weight_offset": [-(2**31 - 1), -(2**31) + 9, 5 - 2**31, 20 - 2**31],
            },
        ),
        DotCase(
            "widened-activation",
            change(base, table_bits=2),
            **{**middle, "activation": "8:2", "input_offset": -40, "lsb": 34, "output_offset": 112},
        ),
        DotCase("widened-weight", change(bins, table_bits=3), **{**middle, "weight": "8:4", "weight_offset": -12}),
        DotCase("depth-0", base, [[], []], [[], [], []]),
        DotCase("depth-0-bias", bins, [[], []], [[], [], []], bias=[1, -77, 1 << 22]),
        DotCase("depth-1", base, [[64], [0x80 | 64]], [[64]], lsb=10, output_offset=64),
        DotCase("no-rows", base, [], [[1, 2]]),
        DotCase("no-columns", base, [[1, 2]], []),
        DotCase(
            "two-bit-words",
            LinearAccumulator(bits=4, constant_bits=0),
            [[1, 3, 2]],
            [[1, 1, 3]],
            activation="2:1",
            weight="2:1",
            output="2:1",
        ),
        DotCase(
            "16-bit",
            LinearAccumulator(bits=48, table_bits=10, constant_bits=16, encoder="exact"),
            spread(2, 5, 3, 16),
            spread(3, 5, 4, 16),
            activation="16:1024",
            weight="16:1024",
            output="16:1024",
            lsb=24,
            output_offset=29000,
        ),
    ]
    found += [DotCase(f"lanes-{n}", change(base, lanes=n, bits=12, psum_bits=9), **middle) for n in range(1, 10)]
    found += [DotCase(f"bins-lanes-{n}", change(bins, lanes=n, bits=10, psum_bits=8), **middle) for n in (2, 5, 8)]
    return found


def _log_cases() -> list[DotCase]:
    base = LogAccumulator(bits=7)
    change = dataclasses.replace
    a, w = _middle(3, 13, 5), _middle(4, 13, 6)
    middle: dict[str, Any] = {"a": a, "w": w, "acc_offset": 64, "output_offset": 64}
    found = [
        # by hand: γ = 1, exact Δ⁺(0) = 1, Δ⁺(1) = round(log2 1.5) = 1: 2^3 + 2^3 = 2^4, 2^4 + 2^3 = 2^5
        DotCase(
            "log-by-hand",
            LogAccumulator(bits=3),
            [[1, 1], [2, 1]],
            [[2, 2]],
            activation="4:1",
            weight="4:1",
            output="4:1",
            expected=[[4], [5]],
        ),
        # by hand: Δ⁻(1) = round(−log2 ½) = 1: 2^4 − 2^3 = 2^3; equal codes cancel to zero
        DotCase(
            "log-by-hand-minus",
            LogAccumulator(bits=3),
            [[2, 9], [1, 9]],
            [[2, 2]],
            activation="4:1",
            weight="4:1",
            output="4:1",
            expected=[[3], [0]],
        ),
        DotCase("log-exact", base, **middle),
        DotCase("log-guard-bits", change(base, bits=10, guard_bits=3), **middle),
        DotCase("log-narrow", change(base, bits=4), **middle),
        DotCase("log-bias", base, bias=[0, 100, 128 | 100, 128], **middle),
        DotCase("log-enters-saturated", base, **{**middle, "acc_offset": -40, "output_offset": -40}),
        DotCase("log-enters-as-zero", base, **{**middle, "acc_offset": 124, "output_offset": 100}),
        DotCase("log-saturates-at-every-step", change(base, bits=7), **{**middle, "acc_offset": 8, "output_offset": 8}),
        DotCase("log-per-channel", base, **{**middle, "weight_offset": [-9, 0, 3, 20], "acc_offset": [50, 60, 66, 80]}),
        DotCase(
            "log-cancels",
            base,
            a=[[60, 60, 0x80 | 61, 61]],
            w=[[70, 0x80 | 70, 9, 9], [70, 0x80 | 69, 9, 9]],
            acc_offset=40,
            output_offset=40,
        ),
        DotCase("log-zeros", base, a=[[0, 0x80, 5, 0]], w=[[0, 7, 0x80, 0x80]], bias=[0]),
        DotCase("log-zeros-min", base, a=[[0, 0x80, 5, 0]], w=[[0, 7, 0x80, 0x80]], underflow="min"),
        DotCase("log-underflow-min", base, **{**middle, "output_offset": 300, "underflow": "min"}),
        DotCase("log-unsigned-output", base, output="u7:8", **middle),
        DotCase("log-depth-0", base, [[], []], [[], [], []]),
        DotCase("log-depth-0-bias", base, [[], []], [[], [], []], bias=[3, 128 | 7, 128]),
        DotCase(
            "log-gamma-10",
            LogAccumulator(bits=9, guard_bits=1),
            a,
            w,
            activation="8:10",
            weight="8:5",
            output="8:10",
            input_offset=-30,
            weight_offset=-9,
            acc_offset=60,
            output_offset=60,
        ),
        DotCase(
            "log-offsets-near-limits",
            base,
            a,
            w,
            input_offset=2**31 - 1,
            weight_offset=-(2**31 - 1),
            acc_offset=64,
            output_offset=64,
        ),
    ]
    found += [DotCase(f"log-lanes-{n}", change(base, lanes=n), **middle) for n in range(2, 10)]
    wide: dict[str, Any] = {**middle, "acc_offset": 32, "output_offset": 64}
    found += [
        DotCase(f"log-{delta_name(how)}", LogAccumulator(bits=9, guard_bits=1, lanes=2, delta=how), **wide)
        for how in DELTAS
        if how.kind != "exact"
    ]
    return found


DOTS: tuple[DotCase, ...] = (*_linear_cases(), *_log_cases())
