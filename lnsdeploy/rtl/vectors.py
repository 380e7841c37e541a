"""Vectors: what goes into a design and what the reference executor says comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.datapath import Datapath, LogAccumulator
from lnsdeploy.emulator import reference
from lnsdeploy.emulator.plan import DotPlan
from lnsdeploy.formats import LNSFormat, Words, encode
from lnsdeploy.rtl import designs
from lnsdeploy.rtl.designs import ArrayShape, Design, float_offset_bits, pack
from lnsdeploy.rtl.parameters import Ints, PEParameters, pe_parameters


@dataclass(frozen=True)
class Vectors:
    """Records for a design.

    Args:
        inputs, expected: as :func:`lnsdeploy.rtl.designs.pack` makes them.
        count: outputs.
    """

    inputs: bytes
    expected: bytes
    count: int


def multiplier_vectors(a_format: LNSFormat, w_format: LNSFormat, a: Ints, w: Ints) -> Vectors:
    """Sign, zero and code of products of words (spec 3.1)."""
    design = designs.multiplier(a_format, w_format)
    a_code, _ = a_format.split(a.astype(a_format.dtype))
    w_code, _ = w_format.split(w.astype(w_format.dtype))
    # a zero's sign bit means nothing, and neither does the sign of a zero product
    a_bit, w_bit = (a & a_format.sign_bit) != 0, (w & w_format.sign_bit) != 0
    inputs = pack([(a, a_format.bits), (w, w_format.bits)])
    zero = (a_code == 0) | (w_code == 0)
    p_bits = design.output_bits - 2
    return Vectors(inputs, pack([(a_bit != w_bit, 1), (zero, 1), (a_code + w_code, p_bits)]), len(a))


def adder_vectors(accumulator: LogAccumulator, gamma: int, x: Ints, y: Ints) -> Vectors:
    """Sums of accumulator words {sign, code} (spec 5.2, 5.3)."""
    bits = accumulator.bits
    mask = accumulator.max_code
    codes = [v & mask for v in (x, y)]
    signs = [((v >> bits) & 1 != 0) & (c > 0) for v, c in zip((x, y), codes, strict=True)]
    tables = accumulator.delta.tables(gamma << accumulator.guard_bits)
    code, sign = reference.log_add(codes[0], signs[0], codes[1], signs[1], tables, mask)
    return Vectors(pack([(x, bits + 1), (y, bits + 1)]), pack([(sign, 1), (code, bits)]), len(x))


def finish_vectors(pe: PEParameters, plan: DotPlan, acc: Ints) -> Vectors:
    """Words of linear accumulators (spec 4.6).

    Args:
        acc: [n, bins], each of the accumulator's width.
    """
    accumulator = plan.datapath.linear
    total, lsb = reference._combine(acc.T[:, :, None], accumulator, plan.lsb)
    codes = reference.raw_code(np.abs(total), plan.gamma, accumulator)
    codes += plan.gamma * lsb + plan.product_offset(1) - plan.output_offset
    words = reference._output(codes, total < 0, total == 0, plan.output, plan.datapath.underflow, None)[:, 0]
    v = pe.values
    offsets = np.broadcast_to(pe.offsets(plan, 1), (len(acc),))
    inputs = pack([(acc, v["ACC_BITS"]), (offsets, v["OFFSET_BITS"])])
    return Vectors(inputs, pack([(words, v["OUT_BITS"])]), len(acc))


def term_vectors(pe: PEParameters, plan: DotPlan) -> Vectors:
    """Aligned magnitudes of every product code from 2 on (spec 4.1 to 4.3)."""
    terms = reference.aligned_terms(plan)
    codes = np.arange(2, plan.max_product_code + 1, dtype=np.int64)
    bins = np.argmax(terms != 0, axis=0)[2:]
    magnitudes = terms.sum(axis=0)[2:]
    v, accumulator = pe.values, plan.datapath.linear
    if accumulator.conversion == "product" or accumulator.table_bits:
        f = plan.gamma.bit_length() - 1
        bins = (codes & (plan.gamma - 1)) >> (f - accumulator.table_bits)
    scale = np.full(len(codes), pe.scales(plan, 1)[0])
    inputs = pack([(codes, v["P_BITS"]), (np.zeros(len(codes)), 1), (scale, v["SCALE_BITS"])])
    return Vectors(inputs, pack([(bins, max(v["TABLE_BITS"], 1)), (magnitudes, v["TERM_BITS"])]), len(codes))


def encoder_vectors(fmt: LNSFormat, underflow: str, x: npt.NDArray[np.float32], offset: int) -> Vectors:
    """Words of binary32 numbers (spec 2.1, 2.4); no NaN among them."""
    words = encode(x, fmt, offset, underflow=underflow, negative="clip")  # type: ignore[arg-type]
    inputs = pack([(x.view(np.uint32).astype(np.int64), 32), (np.full(len(x), offset), float_offset_bits(fmt.gamma))])
    return Vectors(inputs, pack([(np.zeros(len(x)), 1), (words, fmt.bits)]), len(x))


def beats(pe: PEParameters, plan: DotPlan, a: Words, w: Words, bias: Ints | None) -> bytes:
    """A PE's input records for every product of rows of `a` [M, K] and `w` [N, K], n fastest; K ≥ 1."""
    v = pe.values
    channels, rows, lanes = len(w), len(a), v["LANES"]
    steps = -(-a.shape[1] // lanes)
    padded = [np.zeros((len(x), steps * lanes), dtype=np.int64) for x in (a, w)]
    padded[0][:, : a.shape[1]], padded[1][:, : w.shape[1]] = a, w
    shape = (rows, channels, steps, lanes)
    fields = [
        np.broadcast_to(padded[0].reshape(rows, 1, steps, lanes), shape),
        np.broadcast_to(padded[1].reshape(1, channels, steps, lanes), shape),
    ]
    step = np.broadcast_to(np.arange(steps), shape[:3]).reshape(-1)
    per_channel = [
        np.broadcast_to(x[None, :, None], shape[:3]).reshape(-1)
        for x in (pe.biases(plan, bias, channels), pe.scales(plan, channels), pe.offsets(plan, channels))
    ]
    return pack(
        [
            (step == 0, 1),
            (step == steps - 1, 1),
            (fields[0].reshape(-1, lanes), v["A_BITS"]),
            (fields[1].reshape(-1, lanes), v["W_BITS"]),
            (per_channel[0], v["ACC_BITS"] + 1),
            (per_channel[1], v["SCALE_BITS"]),
            (per_channel[2], v["OFFSET_BITS"]),
        ]
    )


def pe_vectors(pe: PEParameters, plan: DotPlan, a: Words, w: Words, bias: Ints | None) -> Vectors:
    """A PE's records, and the words of the reference's dot products."""
    expected = reference.dot(a, w, bias, plan)
    return Vectors(beats(pe, plan, a, w, bias), pack([(expected.reshape(-1), pe.values["OUT_BITS"])]), expected.size)


def commands(
    pe: PEParameters, shape: ArrayShape, plan: DotPlan, a: Words, w: Words, bias: Ints | None
) -> tuple[bytes, int]:
    """An array's command records for the product of `a` [M, K] and `w` [N, K], and how many tiles come out.

    The weights stay in their buffer while activations pass; where either does not fit, the product is cut into runs.
    Tiles come row tiles outermost within a run; :func:`untile` puts them together.
    """
    v, lanes = pe.values, pe.values["LANES"]
    _, data_bits = designs.array_widths(pe, shape)
    m, n, depth = len(a), len(w), a.shape[1]
    steps = -(-depth // lanes)
    row_tiles, col_tiles = -(-m // shape.rows), -(-n // shape.cols)
    a_full = np.zeros((row_tiles * shape.rows, steps * lanes), dtype=np.int64)
    w_full = np.zeros((col_tiles * shape.cols, steps * lanes), dtype=np.int64)
    a_full[:m, :depth], w_full[:n, :depth] = a, w
    # [tile, step, row or column, lane]
    a_tiles = a_full.reshape(row_tiles, shape.rows, steps, lanes).transpose(0, 2, 1, 3)
    w_tiles = w_full.reshape(col_tiles, shape.cols, steps, lanes).transpose(0, 2, 1, 3)
    channel = [np.zeros(col_tiles * shape.cols, dtype=np.int64) for _ in range(3)]
    for padded, values in zip(
        channel, (pe.biases(plan, bias, n), pe.scales(plan, n), pe.offsets(plan, n)), strict=True
    ):
        padded[:n] = values
    depth_max = 1 << shape.ksteps_log2
    records = []

    def tiles(op: int, bits: int, data: Ints, count: int) -> bytes:
        """Writes of `count` tiles from address 0 on."""
        at = (np.arange(count)[:, None] * depth_max + np.arange(steps)).reshape(-1)
        flat = data.reshape(count * steps, -1)
        pad = data_bits - flat.shape[1] * bits
        fields: list[tuple[Any, int]] = [(np.full(len(at), op), 2), (at, 16)]
        fields += [(np.zeros((len(at), pad)), 1)] if pad else []
        return pack([*fields, (flat, bits)])

    produced = 0
    for w_first in range(0, col_tiles, 1 << shape.wtiles_log2):
        cols = min(1 << shape.wtiles_log2, col_tiles - w_first)
        records.append(tiles(1, v["W_BITS"], w_tiles[w_first : w_first + cols], cols))
        part = slice(w_first * shape.cols, (w_first + cols) * shape.cols)
        records.append(_channels(pe, shape, [x[part] for x in channel], data_bits))
        for a_first in range(0, row_tiles, 1 << shape.atiles_log2):
            rows = min(1 << shape.atiles_log2, row_tiles - a_first)
            records.append(tiles(0, v["A_BITS"], a_tiles[a_first : a_first + rows], rows))
            pad = data_bits - 32
            run: list[tuple[Any, int]] = [(np.array([3]), 2), (np.array([rows]), 16)]
            run += [(np.zeros((1, pad)), 1)] if pad else []
            records.append(pack([*run, (np.array([steps]), 16), (np.array([cols]), 16)]))
            produced += rows * cols
    return b"".join(records), produced


def _channels(pe: PEParameters, shape: ArrayShape, values: list[Ints], data_bits: int) -> bytes:
    v = pe.values
    channel_bits, _ = designs.array_widths(pe, shape)
    bias, scale, offset = (x.reshape(-1, shape.cols) for x in values)
    count = len(bias)
    fields: list[tuple[Any, int]] = [(np.full(count, 2), 2), (np.arange(count), 16)]
    pad = data_bits - shape.cols * channel_bits
    if pad:
        fields.append((np.zeros((count, pad)), 1))
    for c in range(shape.cols - 1, -1, -1):
        fields += [
            (offset[:, c], v["OFFSET_BITS"]),
            (scale[:, c], v["SCALE_BITS"]),
            (bias[:, c], v["ACC_BITS"] + 1),
        ]
    return pack(fields)


def untile(tiles: Ints, shape: ArrayShape, m: int, n: int) -> Ints:
    """Words [M, N] from an array's tiles [count, cols · rows], in the order of :func:`commands`."""
    row_tiles, col_tiles = -(-m // shape.rows), -(-n // shape.cols)
    full = np.zeros((row_tiles * shape.rows, col_tiles * shape.cols), dtype=np.int64)
    at = 0
    for w_first in range(0, col_tiles, 1 << shape.wtiles_log2):
        cols = min(1 << shape.wtiles_log2, col_tiles - w_first)
        for a_first in range(0, row_tiles, 1 << shape.atiles_log2):
            rows = min(1 << shape.atiles_log2, row_tiles - a_first)
            block = tiles[at : at + rows * cols].reshape(rows, cols, shape.cols, shape.rows)
            at += rows * cols
            full[
                a_first * shape.rows : (a_first + rows) * shape.rows,
                w_first * shape.cols : (w_first + cols) * shape.cols,
            ] = block.transpose(0, 3, 1, 2).reshape(rows * shape.rows, cols * shape.cols)
    return full[:m, :n]


def tile(words: Ints, shape: ArrayShape) -> Ints:
    """Inverse of :func:`untile`, padding with the words given there: [M, N] multiples of the array's shape."""
    row_tiles, col_tiles = words.shape[0] // shape.rows, words.shape[1] // shape.cols
    blocks = words.reshape(row_tiles, shape.rows, col_tiles, shape.cols).transpose(0, 2, 3, 1)
    found = []
    for w_first in range(0, col_tiles, 1 << shape.wtiles_log2):
        for a_first in range(0, row_tiles, 1 << shape.atiles_log2):
            part = blocks[a_first : a_first + (1 << shape.atiles_log2), w_first : w_first + (1 << shape.wtiles_log2)]
            found.append(part.reshape(-1, shape.cols * shape.rows))
    return np.concatenate(found)


def array_vectors(pe: PEParameters, shape: ArrayShape, plan: DotPlan, a: Words, w: Words, bias: Ints | None) -> Vectors:
    """An array's commands, and the reference's words tile by tile; padded rows and columns too."""
    inputs, count = commands(pe, shape, plan, a, w, bias)
    m, n = -(-len(a) // shape.rows) * shape.rows, -(-len(w) // shape.cols) * shape.cols
    whole = np.zeros((m, n), dtype=np.int64)
    whole[: len(a), : len(w)] = reference.dot(a, w, bias, plan)
    if m > len(a):
        # a row of zero words gives what the bias gives
        zeros = np.zeros((1, a.shape[1]), dtype=a.dtype)
        whole[len(a) :, : len(w)] = reference.dot(zeros, w, bias, plan)
    if n > len(w):
        # channels without weights, bias, scale and offset
        whole[:, len(w) :] = 0 if plan.datapath.underflow == "zero" else 1
    return Vectors(inputs, pack([(tile(whole, shape), pe.values["OUT_BITS"])]), count)


# ---------------------------------------------------------------------------------------------------
# Plans and operands that reach every corner


def example_plan(datapath: Datapath, depth: int = 64) -> DotPlan:
    """A plan as calibration would make it for operands of about unit size."""
    gamma = datapath.gamma
    a_offset = -(datapath.activation.max_code - 2 * datapath.activation.gamma)
    w_offset = -(datapath.weight.max_code - datapath.weight.gamma)
    out_offset = -(datapath.output.max_code - gamma * (2 + depth.bit_length() // 2))
    plan = DotPlan(datapath, datapath.activation, datapath.weight, datapath.output, a_offset, w_offset, out_offset)
    if datapath.is_linear:
        octaves = plan.max_product_code // gamma + depth.bit_length() // 2 + 1
        return DotPlan(
            datapath,
            plan.activation,
            plan.weight,
            plan.output,
            a_offset,
            w_offset,
            out_offset,
            lsb=octaves - datapath.linear.bits + 2,
        )
    top = int(plan.product_offset(1)[0]) + plan.max_product_code + gamma * (depth.bit_length() // 2)
    acc_offset = top - (datapath.log.max_code >> datapath.log.guard_bits)
    return DotPlan(
        datapath, plan.activation, plan.weight, plan.output, a_offset, w_offset, out_offset, acc_offset=acc_offset
    )


def operands(fmt: LNSFormat, shape: tuple[int, ...], seed: int) -> Words:
    """Random words, half of them around the largest codes, with zeros, negative zeros and the extremes among them."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, fmt.max_code + 1, shape)
    near = fmt.max_code - random.integers(0, 4 * fmt.gamma, shape)
    codes = np.where(random.random(shape) < 0.5, codes, np.maximum(near, 0))
    codes = np.where(random.random(shape) < 0.05, 0, codes)
    codes = np.where(random.random(shape) < 0.02, fmt.max_code, codes)
    signs = random.integers(0, 2, shape) * fmt.sign_bit
    return (codes | signs).astype(fmt.dtype)


def example(datapath: Datapath, m: int, n: int, depth: int, seed: int = 0) -> tuple[PEParameters, DotPlan, Any]:
    """Parameters, plan and (activations, weights, bias) of a product of a shape."""
    plan = example_plan(datapath, depth)
    random = np.random.default_rng(seed + 1)
    if datapath.is_linear:
        high = 1 << max(datapath.linear.bits - 4, 1)
        bias = random.integers(-high, high, n)
    else:
        bias = random.integers(0, 2 << datapath.log.bits, n)
        bias[bias & datapath.log.max_code == 0] = 0
    a = operands(plan.activation, (m, depth), seed + 2)
    w = operands(plan.weight, (n, depth), seed + 3)
    return pe_parameters([(plan, n)]), plan, (a, w, bias.astype(np.int64))


def design_of(pe: PEParameters, shape: ArrayShape | None = None) -> Design:
    """The PE's design, or with a shape the array's."""
    return designs.vector_pe(pe) if shape is None else designs.array(pe, shape)
