"""Hypothesis strategies: formats, ways to make Δ, accumulators, datapaths, plans, words, numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from hypothesis import strategies as st

from lnsdeploy import delta as methods
from lnsdeploy.datapath import Accumulator, Datapath, LinearAccumulator, LogAccumulator
from lnsdeploy.delta import Delta
from lnsdeploy.emulator.plan import AddPlan, DotPlan, PoolPlan, Window
from lnsdeploy.formats import LNSFormat
from tests.cases import DELTAS

Array = np.ndarray[Any, Any]

UNDERFLOWS = st.sampled_from(["zero", "min"])
# Few values, so that the oracle's cached tables serve many examples.
GAMMAS = st.sampled_from([1, 2, 3, 4, 5, 8, 10, 16, 64])
POWERS = st.sampled_from([1, 2, 4, 8, 16, 64])


@st.composite
def formats(draw: Any, max_bits: int = 32, max_gamma: int = 1 << 26) -> LNSFormat:
    """Any format, small and round γ preferred."""
    gamma = draw(st.one_of(GAMMAS, st.integers(1, 300), st.integers(1, max_gamma)))
    return LNSFormat(draw(st.integers(2, max_bits)), min(gamma, max_gamma), draw(st.booleans()))


def deltas() -> st.SearchStrategy[Delta]:
    """Every way to make Δ with any valid parameters."""
    powers = st.integers(0, 12).map(lambda n: 1 << n)
    spacing = st.sampled_from(["equal", "octave"])
    return st.one_of(
        st.just(methods.Exact()),
        st.builds(methods.Table, st.integers(1, 4096), powers, st.sampled_from(["left", "middle"])),
        st.builds(methods.Interpolated, powers, spacing, st.integers(1, 24)),
        st.builds(methods.Cotransform, st.integers(1, 20)),
        st.just(methods.Mitchell()),
        st.just(methods.Shift()),
        st.builds(methods.Polynomial, st.integers(1, 6), powers, spacing, st.integers(0, 30)),
        st.builds(methods.Cordic, st.integers(1, 48), st.integers(4, 48)),
        st.just(methods.Max()),
    )


@st.composite
def linear_accumulators(draw: Any, gamma: int) -> LinearAccumulator:
    """Any linear accumulator for a γ that is a power of two."""
    conversion = draw(st.sampled_from(["product", "bin"]))
    table_bits = draw(st.integers(0, min(gamma.bit_length() - 1, 4)))
    constant_bits = draw(st.one_of(st.integers(0, 10), st.integers(0, 24)))
    widest = 62 if conversion == "product" else 61 - constant_bits - table_bits
    bits = draw(st.one_of(st.integers(8, 32), st.integers(8, 20), st.integers(2, widest)))
    encoder = draw(st.sampled_from(["exact", "table", "mitchell"]))
    return LinearAccumulator(
        bits=min(bits, widest),
        conversion=conversion,
        table_bits=table_bits,
        constant_bits=constant_bits,
        lanes=draw(st.integers(1, 9)),
        psum_bits=draw(st.one_of(st.none(), st.integers(2, 40), st.just(62))),
        overflow=draw(st.sampled_from(["wrap", "saturate"])),
        shift=draw(st.sampled_from(["truncate", "round"])),
        encoder=encoder,
        encoder_bits=draw(st.sampled_from([1, 3, 6, 10])) if encoder == "table" else None,
    )


@st.composite
def log_accumulators(draw: Any, how: st.SearchStrategy[Delta] | None = None) -> LogAccumulator:
    """Any log accumulator; by default with the parametrisations of `DELTAS`."""
    return LogAccumulator(
        bits=draw(st.one_of(st.integers(6, 12), st.integers(6, 12), st.integers(1, 40))),
        guard_bits=draw(st.integers(0, 3)),
        lanes=draw(st.integers(1, 9)),
        delta=draw(st.sampled_from(DELTAS) if how is None else how),
    )


@st.composite
def operand_formats(draw: Any, gammas: st.SearchStrategy[int], max_bits: int = 12) -> tuple[LNSFormat, LNSFormat]:
    """Formats of two operands: γ equal, or the one a divisor of the other."""
    gamma = draw(gammas)
    narrow = draw(st.sampled_from([g for g in (gamma, gamma, gamma // 2, gamma // 5, 1) if g and gamma % g == 0]))
    pair = [gamma, narrow]
    if draw(st.booleans()):
        pair.reverse()
    widths = st.one_of(st.integers(5, 8), st.integers(2, max_bits))
    first, second = (LNSFormat(draw(widths), g, draw(st.booleans())) for g in pair)
    return first, second


@st.composite
def datapaths(draw: Any, free: bool = False) -> Datapath:
    """Any valid datapath. With `free`, the parameters of Δ are unrestricted too (tables may be slow to make)."""
    how = deltas() if free else None
    linear = draw(st.booleans())
    activation, weight = draw(operand_formats(POWERS if linear else GAMMAS))
    gamma = max(activation.gamma, weight.gamma)
    accumulate: Accumulator = draw(linear_accumulators(gamma) if linear else log_accumulators(how))
    text = st.text(st.characters(codec="utf-8"), max_size=12) if free else st.just("")
    return Datapath(
        name=draw(text) or "generated",
        weight=weight,
        activation=activation,
        output=LNSFormat(draw(st.one_of(st.integers(7, 12), st.integers(2, 12))), gamma, draw(st.integers(0, 3)) > 0),
        accumulate=accumulate,
        add=draw(log_accumulators(how)),
        underflow=draw(UNDERFLOWS),
        citation=draw(text),
        notes=draw(text),
    )


@st.composite
def words(draw: Any, fmt: LNSFormat, shape: tuple[int, ...]) -> Array:
    """Words of a format, with zeros, minus zeros, ones and largest codes more often than chance.

    All of them are made from one string of bytes: drawn one by one, they would be most of the time of a test.
    """
    count = int(np.prod(shape))
    raw = np.frombuffer(draw(st.binary(min_size=5 * count, max_size=5 * count)), dtype=np.uint8).reshape(count, 5)
    kind, sign = raw[:, 0] % 4, (raw[:, 0] >> 7) * np.int64(fmt.sign_bit)
    number = raw[:, 1:].astype(np.int64) @ (1 << np.arange(0, 32, 8))
    special = np.array([0, 1, fmt.max_code, fmt.sign_bit, fmt.sign_bit | 1, fmt.sign_bit | fmt.max_code])
    # around the middle products of several meet and cancel
    low, high = max(fmt.max_code // 2 - 8, 0), min(fmt.max_code // 2 + 8, fmt.max_code)
    values = np.select(
        [kind == 0, kind == 3],
        [number % (1 << fmt.bits), special[number % len(special)]],
        sign | (low + number % (high + 1 - low)),
    )
    return values.astype(fmt.dtype).reshape(shape)


def _offset(draw: Any) -> int:
    return int(draw(st.one_of(st.integers(-40, 40), st.integers(-40, 40), st.integers(-(2**31) + 1, 2**31 - 1))))


@st.composite
def dot_plans(draw: Any, channels: int) -> DotPlan:
    """A plan whose accumulator stands near the products, so that most of its bits matter."""
    datapath = draw(datapaths())
    gamma = datapath.gamma
    per_channel = draw(st.booleans())
    input_offset, base = _offset(draw), _offset(draw)
    nudges = draw(st.lists(st.integers(-20, 20), min_size=channels, max_size=channels)) if per_channel else [0]
    weight_offset: Any = np.clip(np.array(nudges) + base, -(2**31) + 1, 2**31 - 1) if per_channel else base
    plan = DotPlan(datapath, datapath.activation, datapath.weight, datapath.output, input_offset, weight_offset, 0)
    middle = plan.max_product_code // 2
    shared = int(plan.product_offset(1 if not per_channel else channels)[0]) if channels or not per_channel else 0
    if datapath.is_linear:
        part = datapath.linear
        lsb = middle // gamma - part.bits // 2 + draw(st.integers(-part.bits // 2, part.bits // 2))
        lsb = draw(st.one_of(st.just(lsb), st.just(lsb), st.integers(-90, 90)))
        result = shared + max(gamma * (lsb + part.bits // 2), middle)
        plan = dataclasses.replace(plan, lsb=lsb)
    else:
        reach = datapath.log.max_code >> datapath.log.guard_bits
        acc = shared + middle - reach // 2 + draw(st.integers(-reach // 3, reach // 3))
        many = draw(st.booleans()) and channels
        shifts = draw(st.lists(st.integers(-9, 9), min_size=channels, max_size=channels)) if many else [0]
        plan = dataclasses.replace(plan, acc_offset=np.array(shifts) + acc if many else acc)
        result = shared + middle
    nudge = draw(st.integers(-datapath.output.max_code // 3, datapath.output.max_code // 3))
    output_offset = result - datapath.output.max_code // 2 + nudge
    return dataclasses.replace(plan, output_offset=int(np.clip(output_offset, -(2**31) + 1, 2**31 - 1)))


@st.composite
def biases(draw: Any, plan: DotPlan, channels: int) -> Array | None:
    """None, or start values: integers for linear accumulation, words for log (spec 4.5, 5.5)."""
    if draw(st.booleans()):
        return None
    part = plan.datapath.accumulate
    if isinstance(part, LinearAccumulator):
        one = st.one_of(st.integers(-300, 300), st.integers(-(1 << 62), 1 << 62))
    else:
        one = st.one_of(st.integers(0, (2 << part.bits) - 1), st.sampled_from([0, 1 << part.bits]))
    return np.array(draw(st.lists(one, min_size=channels, max_size=channels)), dtype=np.int64)


@st.composite
def add_plans(draw: Any) -> AddPlan:
    """Element-wise addition (spec 6.4) with operands that overlap in the adder's range."""
    gamma = draw(GAMMAS)
    part = draw(log_accumulators())
    a, b, out = (LNSFormat(draw(st.integers(2, 10)), gamma, draw(st.booleans())) for _ in range(3))
    a_offset = _offset(draw)
    b_offset = a_offset + a.max_code // 2 - b.max_code // 2 + draw(st.integers(-20, 20))
    acc_offset = a_offset + a.max_code // 2 - (part.max_code >> part.guard_bits) // 2 + draw(st.integers(-30, 30))
    output_offset = a_offset + a.max_code // 2 - out.max_code // 2 + draw(st.integers(-20, 20))
    return AddPlan(part, a, b, out, a_offset, b_offset, output_offset, acc_offset, draw(UNDERFLOWS))


@st.composite
def pool_plans(draw: Any) -> PoolPlan:
    """Sums and averages (spec 6.5)."""
    plan = draw(add_plans())
    return PoolPlan(
        plan.accumulator, plan.a, plan.output, plan.a_offset, plan.output_offset, plan.acc_offset, plan.underflow
    )


@st.composite
def geometries(draw: Any, axes: int, *, small_pads: bool = False) -> tuple[tuple[int, ...], Window]:
    """A spatial shape and a window that fits it; with `small_pads` no window holds padding only."""
    kernel, strides, dilations, begins, ends, spatial = [], [], [], [], [], []
    for _ in range(axes):
        k, d = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        reach = d * (k - 1) + 1
        # a dilated window may straddle the input, so pads stay below one dilation to keep a tap inside
        most = 0 if small_pads and k == 1 else (k if d == 1 else d) - 1 if small_pads else 2
        begin, end = draw(st.integers(0, min(most, 2))), draw(st.integers(0, min(most, 2)))
        spatial.append(draw(st.integers(max(1, reach - begin - end) if not small_pads else reach, reach + 2)))
        kernel.append(k)
        dilations.append(d)
        strides.append(draw(st.integers(1, 3)))
        begins.append(begin)
        ends.append(end)
    window = Window(tuple(kernel), tuple(strides), (*begins, *ends), tuple(dilations))
    return tuple(spatial), window


def finite_floats(width: int) -> st.SearchStrategy[float]:
    """Finite floats of a width, subnormals and zeros of both signs among them."""
    return st.floats(allow_nan=False, allow_infinity=False, width=width)  # type: ignore[arg-type]
