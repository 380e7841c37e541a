"""The ONNX operators of domain `lnsdeploy`, version 1, as functions in standard operators.

Each operator has one body for every datapath: what differs is data (tables, attributes). Inside a body words are
int32 keys 4·code + sign, so that one addition of two keys indexes a table by code sum and product sign at once (spec
3.1), and the difference of two keys indexes Δ with the signs' relation included (spec 5.2). As an operand, zero has a
key beyond every sum of two others; in an accumulator it is 0, and the others are raised beyond every difference that
has a Δ.

What costs time in ONNX Runtime is looking up single elements: `Gather` copies each by a call (12 to 35 ns),
`GatherElements` does not (1 to 2 ns), an element-wise pass takes less than 1 ns. So every table is read by
`GatherElements`, whose rows are also what its threads share.

Every node has a name: ONNX Runtime 1.18 and 1.20 refuse functions with nameless nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, helper

DOMAIN = "lnsdeploy"
VERSION = 1
OPSET = 21
IR_VERSION = 10

# Bits of a log accumulator's code that int32 keys can carry.
MAX_LOG_BITS = 26
# Added to a key to cancel it: below every key of a log accumulator.
_CANCEL = -(1 << 29)
# Below every word in the order of values; what padding holds in max pooling.
LOWEST = -(1 << 30)
# Rows of a product are taken in blocks: about this many accumulators, so that memory does not grow with the batch.
_BLOCK = 1 << 17
# Copies of a table that as many threads read, where it has at most _SHARED entries and there are rows for all.
_COPIES = 8
_SHARED = 1 << 16
_POWERS = [1 << i for i in range(63)]


class Body:
    """Collects the nodes of a function or of a subgraph, naming nodes and values."""

    def __init__(self, prefix: str = ""):
        self.prefix = prefix
        self.nodes: list[NodeProto] = []
        self._known: dict[tuple[str, Any], str] = {}

    def _name(self, kind: str) -> str:
        return f"{self.prefix}{kind}_{len(self.nodes)}"

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output; returns the output's name."""
        name = self._name(kind)
        made = output or f"{name}_out"
        self.nodes.append(helper.make_node(kind, list(inputs), [made], name=name, **attributes))
        return made

    def constant(self, value: Any, kind: int) -> str:
        """A constant scalar, or one-dimensional list, of a type; made once."""
        key = (repr(value), kind)
        if key not in self._known:
            values = value if isinstance(value, list) else [value]
            dims = [len(value)] if isinstance(value, list) else []
            self._known[key] = self.op("Constant", value=helper.make_tensor("value", kind, dims, values))
        return self._known[key]

    def i32(self, value: Any) -> str:
        """An int32 constant."""
        return self.constant(value, TensorProto.INT32)

    def i64(self, value: Any) -> str:
        """An int64 constant."""
        return self.constant(value, TensorProto.INT64)

    def attribute(self, attribute: str, *, several: bool = False) -> str:
        """An attribute of the operator, as an int64 scalar or list."""
        key = (attribute, -1)
        if key not in self._known:
            name = self._name("Constant")
            node = NodeProto(op_type="Constant", name=name, output=[f"{name}_out"])
            entry = node.attribute.add()
            entry.name = "value_ints" if several else "value_int"
            entry.type = AttributeProto.INTS if several else AttributeProto.INT
            entry.ref_attr_name = attribute
            self.nodes.append(node)
            self._known[key] = f"{name}_out"
        return self._known[key]

    def cast(self, value: str, kind: int) -> str:
        """A cast to a type."""
        return self.op("Cast", value, to=kind)

    def cast32(self, value: str) -> str:
        """A cast to int32."""
        return self.cast(value, TensorProto.INT32)

    def cast64(self, value: str) -> str:
        """A cast to int64."""
        return self.cast(value, TensorProto.INT64)

    def cast_to_attribute(self, value: str, attribute: str, output: str | None = None) -> str:
        """A cast to the type that an attribute of the operator names."""
        name = self._name("Cast")
        made = output or f"{name}_out"
        node = NodeProto(op_type="Cast", name=name, input=[value], output=[made])
        entry = node.attribute.add()
        entry.name, entry.type, entry.ref_attr_name = "to", AttributeProto.INT, attribute
        self.nodes.append(node)
        return made

    def power(self, exponent: str) -> str:
        """2^exponent for an exponent of 0 to 62, int64."""
        return self.op("Gather", self.i64(_POWERS), exponent)

    def at(self, value: str, index: int) -> str:
        """One element of a list, as a scalar."""
        return self.op("Gather", value, self.i64(index), axis=0)

    def shape(self, *parts: str) -> str:
        """A list from scalars and lists."""
        return self.op("Concat", *(self.op("Reshape", p, self.i64([-1])) for p in parts), axis=0)

    def reshape(self, value: str, *parts: str) -> str:
        """Reshape to a list of scalars and lists; zero-sized axes stay zero."""
        return self.op("Reshape", value, self.shape(*parts), allowzero=1)

    def product(self, *factors: str) -> str:
        """The product of scalars."""
        total = factors[0]
        for factor in factors[1:]:
            total = self.op("Mul", total, factor)
        return total

    def ceil_div(self, value: str, divisor: str) -> str:
        """⌈value/divisor⌉ of int64 scalars ≥ 0."""
        return self.op("Div", self.op("Sub", self.op("Add", value, divisor), self.i64(1)), divisor)

    def steps(self, count: str, stride: str) -> str:
        """0, stride, 2·stride, …: int64 [count]."""
        return self.op("Mul", self.op("Range", self.i64(0), count, self.i64(1)), stride)

    def outer(self, slow: str, fast: str | None) -> str:
        """Every sum of two lists, the second running faster, as a list."""
        if fast is None:
            return slow
        return self.op("Reshape", self.op("Add", self.op("Unsqueeze", slow, self.i64([1])), fast), self.i64([-1]))

    def graph(self, inputs: list[str], outputs: list[str]) -> GraphProto:
        """The nodes as a subgraph."""
        return helper.make_graph(
            self.nodes,
            f"{self.prefix}graph",
            [onnx.ValueInfoProto(name=name) for name in inputs],
            [onnx.ValueInfoProto(name=name) for name in outputs],
        )

    def scan(
        self, states: list[str], sequences: list[str], step: Callable[[Body, list[str]], str], rank: int = 2
    ) -> str:
        """A Scan over axis 0 of sequences; returns its only output.

        That is the final value of the only state, or, without states, what the steps give, stacked. A step gives an
        array of `rank` axes.
        """
        name = self._name("Scan")
        inner = Body(f"{name}_")
        inputs = [f"{name}_in_{i}" for i in range(len(states) + len(sequences))]
        # changes nothing, but lets ONNX Runtime up to 1.20 infer the rank, without which it refuses to run
        output = inner.op("Reshape", step(inner, inputs), inner.i64([0] * (rank - 1) + [-1]))
        return self.op("Scan", *states, *sequences, num_scan_inputs=len(sequences), body=inner.graph(inputs, [output]))

    def branch(self, condition: str, yes: Callable[[Body], str], no: Callable[[Body], str]) -> str:
        """An If with one result; only the branch taken costs anything."""
        name = self._name("If")
        branches = []
        for label, make in (("then", yes), ("else", no)):
            inner = Body(f"{name}_{label}_")
            result = make(inner)
            branches.append(inner.graph([], [inner.op("Identity", result)]))
        return self.op("If", condition, then_branch=branches[0], else_branch=branches[1])


# ---------------------------------------------------------------------------------------------------
# Words, keys, look-ups


def _mask(b: Body, bits: str, signed: str) -> str:
    """The largest code of a format, int64."""
    return b.op("Sub", b.power(b.op("Sub", b.attribute(bits), b.attribute(signed))), b.i64(1))


def _codes(b: Body, x: str, bits: str, signed: str) -> tuple[str, str]:
    """Codes (int32) and signs (bool, also of non-canonical zeros) of words."""
    wide, mask = b.cast32(x), b.cast32(_mask(b, bits, signed))
    return b.op("BitwiseAnd", wide, mask), b.op("Greater", wide, mask)


def _keys(b: Body, x: str, side: str, zero: str, shift: str | None = None) -> str:
    """int32 keys 4·widened code + sign; `zero` for zero; `shift` is added to the widened codes."""
    codes, signs = _codes(b, x, f"{side}_bits", f"{side}_signed")
    widened = b.op("Mul", codes, b.cast32(b.attribute(f"{side}_widen")))
    if shift is not None:
        widened = b.op("Add", widened, shift)
    keys = b.op("Add", b.op("Mul", widened, b.i32(4)), b.cast32(signs))
    return b.op("Where", b.op("Equal", codes, b.i32(0)), zero, keys)


class _Output:
    """Words of the output format (spec 2.4), with the constants made once outside every loop."""

    def __init__(self, b: Body):
        self.most = _mask(b, "output_bits", "output_signed")
        self.sign = b.op("Add", self.most, b.i64(1))
        self.unsigned = b.op("Equal", b.attribute("output_signed"), b.i64(0))
        self.underflow = b.attribute("underflow")

    def __call__(self, b: Body, codes: str, negative: str, zero: str) -> str:
        """int32 words of int64 codes; `zero` marks results that are exactly zero."""
        nothing = b.op("Or", zero, b.op("And", negative, self.unsigned))
        under = b.op("Or", nothing, b.op("Less", codes, b.i64(1)))
        limited = b.op("Where", under, self.underflow, b.op("Min", codes, self.most))
        signed = b.op("And", b.op("And", negative, b.op("Not", nothing)), b.op("Greater", limited, b.i64(0)))
        return b.cast32(b.op("Add", limited, b.op("Where", signed, self.sign, b.i64(0))))


class _Table:
    """A table to look single elements up in; `copies` of it are read by as many threads."""

    def __init__(self, b: Body, values: str, copies: str | None = None):
        self.data = b.op("Reshape", values, b.i64([1, -1]))
        self.shape = b.i64([1, -1])
        if copies is not None:
            self.data = b.op("Expand", self.data, b.shape(copies, b.i64(1)))
            self.shape = b.shape(copies, b.i64(-1))

    def split(self, b: Body, value: str) -> str:
        """Anything as [copies, …]."""
        return b.op("Reshape", value, self.shape)

    def __call__(self, b: Body, index: str) -> str:
        """Entries [copies, …] of indices [copies, …]."""
        return b.op("GatherElements", self.data, index, axis=1)

    def any(self, b: Body, index: str) -> str:
        """Entries for indices of any shape."""
        return b.op("Reshape", self(b, self.split(b, index)), b.op("Shape", index), allowzero=1)


class _Ladder:
    """How many of sorted thresholds a value reaches: a binary search (spec 2.1, 4.6)."""

    def __init__(self, b: Body, thresholds: str, copies: str | None = None):
        self.size = b.op("Size", thresholds)
        powers = b.i64(_POWERS[24::-1])
        weights = b.op("Compress", powers, b.op("LessOrEqual", powers, self.size))
        self.weights = b.cast32(weights)
        # up to 2^n − 1 entries by repeating the last; entry 0 is never asked for
        whole = b.op("Mul", b.at(weights, 0), b.i64(2))
        last = b.op(
            "Slice", thresholds, b.op("Reshape", b.op("Sub", self.size, b.i64(1)), b.i64([1])), b.i64([1 << 30])
        )
        more = b.op("Expand", last, b.shape(b.op("Sub", b.op("Sub", whole, b.i64(1)), self.size)))
        self.table = _Table(b, b.op("Concat", last, thresholds, more, axis=0), copies)

    def __call__(self, b: Body, values: str) -> str:
        """Codes, int64, of values of any shape."""
        flat = self.table.split(b, values)

        def step(s: Body, names: list[str]) -> str:
            found, weight = names
            tried = s.op("Add", found, weight)
            # written as "not above" would make NaN the largest number
            reached = s.op("LessOrEqual", self.table(s, tried), flat)
            return s.op("Where", reached, tried, found)

        found = b.scan([b.op("Expand", b.i32(0), b.op("Shape", flat))], [self.weights], step)
        shaped = b.op("Reshape", b.cast64(found), b.op("Shape", values), allowzero=1)
        return b.op("Min", shaped, self.size)


# ---------------------------------------------------------------------------------------------------
# Dot products: operands, blocks of rows (spec 7)


@dataclass(frozen=True)
class _Operands:
    """A matrix product with activations as places in a list: what a convolution and a matrix product share.

    The activation of row m, group g and depth k is element rows[m] + groups[g] + depth[k] of `keys`.

    Args:
        keys: int32 [F + 1], the last is any key.
        rows, groups, depth: int32 [M], [G], [K].
        weights: int32 keys [G, N, K].
        zero: the key of zero of the weights.
    """

    keys: str
    rows: str
    groups: str
    depth: str
    weights: str
    zero: str


class _Blocks:
    """The operands in steps of `lanes` (padded with zeros to `width`), the rows in blocks (spec 4.4, 5.4)."""

    def __init__(self, b: Body, o: _Operands, bins: str, width: str, largest_table: str):
        lanes = b.attribute("lanes")
        shape = b.op("Shape", o.weights)
        self.bins, self.groups, self.channels = bins, b.at(shape, 0), b.at(shape, 1)
        depth, count = b.at(shape, 2), b.op("Size", o.rows)
        self.count = count
        # a threads' share of a block is whole rows
        several = b.op(
            "And", b.op("GreaterOrEqual", count, b.i64(64)), b.op("LessOrEqual", largest_table, b.i64(_SHARED))
        )
        self.copies = b.op("Where", several, b.i64(_COPIES), b.i64(1))
        terms = b.product(width, bins, self.groups, self.channels)
        entries = b.op("Div", b.op("Mul", depth, self.groups), b.i64(8))
        most = b.op("Max", b.op("Div", b.i64(_BLOCK), b.op("Max", b.op("Max", terms, entries), b.i64(1))), b.i64(1))
        blocks = b.op("Max", b.ceil_div(count, most), b.i64(1))
        each = b.op("Max", b.ceil_div(count, b.op("Mul", blocks, self.copies)), b.i64(1))
        self.rows = b.op("Mul", each, self.copies)
        missing = b.op("Sub", b.op("Mul", blocks, self.rows), count)
        self.starts = b.reshape(b.op("Pad", o.rows, b.shape(b.i64(0), missing)), blocks, self.rows)
        steps = b.op("Max", b.ceil_div(depth, lanes), b.i64(1))
        k_missing = b.op("Sub", b.op("Mul", steps, lanes), depth)
        more_lanes = b.op("Sub", width, lanes)
        # weights [steps, width, 1, G, 1, N]: zeros in the padding make products zero, whatever the activation
        padded = b.op("Pad", o.weights, b.shape(b.i64([0, 0, 0, 0, 0]), k_missing), o.zero)
        split = b.reshape(padded, self.groups, self.channels, steps, lanes)
        ordered = b.op("Transpose", split, perm=[2, 3, 0, 1])
        widened = b.op("Pad", ordered, b.shape(b.i64([0, 0, 0, 0, 0]), more_lanes, b.i64([0, 0])), o.zero)
        self.weights = b.op("Unsqueeze", widened, b.i64([2, 4]))
        # places [steps, width, 1, G, 1, 1] without the row's own
        places = b.op("Pad", o.depth, b.shape(b.i64(0), k_missing))
        places = b.reshape(places, steps, lanes)
        places = b.op("Pad", places, b.shape(b.i64([0, 0, 0]), more_lanes))
        groups = b.op("Reshape", o.groups, b.i64([1, -1, 1, 1]))
        self.places = b.op("Add", b.op("Unsqueeze", places, b.i64([2, 3, 4, 5])), groups)
        self.keys = _Table(b, o.keys)
        self.last = b.cast32(b.op("Sub", b.op("Size", o.keys), b.i64(1)))
        self.row_shape = b.i64([-1, 1])
        self.acc_shape = b.shape(bins, self.groups, self.rows, self.channels)

    def words(self, b: Body, reduce: Callable[[Body, str], str], finish: Callable[[Body, str], str]) -> str:
        """int32 words [M, G·N]: `reduce` adds activations [steps, width, 1, G, rows, 1] up, `finish` encodes sums."""

        def block(s: Body, names: list[str]) -> str:
            place = s.op("Add", self.places, s.op("Reshape", names[0], self.row_shape))
            # without rows there is one block of padding, which leads beyond the only key
            acc = reduce(s, self.keys.any(s, s.op("Min", place, self.last)))
            return finish(s, s.op("Reshape", acc, self.acc_shape, allowzero=1))

        found = b.scan([], [self.starts], block, rank=3)
        ordered = b.op("Transpose", found, perm=[0, 2, 1, 3])
        columns = b.op("Mul", self.groups, self.channels)
        every = b.reshape(ordered, b.op("Mul", b.at(b.op("Shape", found), 0), self.rows), columns)
        return b.op("Slice", every, b.i64([0]), b.op("Reshape", self.count, b.i64([1])))


# ---------------------------------------------------------------------------------------------------
# Linear accumulation (spec 4)


def _linear_zero(b: Body) -> str:
    """The key of zero, int32: with it every sum lies beyond the terms."""
    return b.cast32(b.op("Mul", b.at(b.op("Shape", "terms"), 1), b.i64(4)))


def _linear(b: Body, o: _Operands, bias: str = "bias", code_shift: str = "code_shift") -> str:
    """int32 words [M, G·N] of operands; `bias` and `code_shift` are [G·N]."""
    lanes = b.attribute("lanes")
    bins, columns = (b.at(b.op("Shape", "terms"), i) for i in (0, 1))
    # by 4·P + signs: +, −, + (two negatives), unused; zeros for every sum with a zero key; one stretch a bin
    stretch = b.op("Add", b.op("Mul", columns, b.i64(8)), b.i64(1))
    plus = b.op("Unsqueeze", "terms", b.i64([-1]))
    quads = b.op("Concat", plus, b.op("Neg", plus), plus, b.op("Sub", plus, plus), axis=-1)
    near = b.reshape(quads, bins, b.op("Mul", columns, b.i64(4)))
    beyond = b.op("Sub", stretch, b.op("Mul", columns, b.i64(4)))
    nothing = b.op("CastLike", b.i64(0), "terms")
    terms = b.op("Concat", near, b.op("Expand", nothing, b.shape(bins, beyond)), axis=1)
    entries = b.op("Mul", bins, stretch)
    blocks = _Blocks(b, o, bins, lanes, entries)
    offsets = b.cast32(b.op("Mul", b.op("Range", b.i64(0), bins, b.i64(1)), stretch))
    offsets = b.op("Reshape", offsets, b.i64([-1, 1, 1, 1]))
    output = _Output(b)
    ladder = _Ladder(b, "thresholds", blocks.copies)
    constants = b.op("Reshape", b.cast64("constants"), b.i64([-1, 1, 1, 1]))
    shift = b.reshape(code_shift, blocks.groups, b.i64(1), blocks.channels)

    # Everything a loop captures is made out here: ONNX Runtime 1.32 loses values that the branch of an If makes and
    # a subgraph inside that branch captures.
    table = _Table(b, terms, blocks.copies)
    loops = {}
    for mode in ("saturate", "wrap"):
        fit = _Fit(b, mode)
        # the bias starts bin 0 (spec 4.5)
        initial = b.reshape(fit.start(b, bias), b.i64(1), blocks.groups, b.i64(1), blocks.channels)
        first = b.op("Where", b.op("Equal", offsets, b.i32(0)), initial, nothing)
        start = table.split(b, b.op("Expand", first, blocks.acc_shape))
        # a single term of a step is fitted in the table already
        loops[mode] = fit, _Table(b, fit.step(b, terms), blocks.copies), start
    saturate = b.op("Greater", b.attribute("saturate"), b.i64(0))
    single = b.op("Equal", lanes, b.i64(1))
    by_lane = b.shape(lanes, b.i64(-1))

    def run(mode: str, one: bool, keys: str) -> Callable[[Body], str]:
        fit, fitted, start = loops[mode]

        def step(t: Body, names: list[str]) -> str:
            acc, x, y = names
            index = table.split(t, t.op("Add", x, t.op("Add", y, offsets)))
            if one:
                return fit(t, t.op("Add", acc, fitted(t, index)))
            every = t.op("Reshape", table(t, index), by_lane, allowzero=1)
            total = fit.step(t, t.op("ReduceSum", every, t.i64([0]), keepdims=0))
            return fit(t, t.op("Add", acc, table.split(t, total)))

        return lambda s: s.scan([start], [keys, blocks.weights], step)

    def reduce(s: Body, keys: str) -> str:
        return s.branch(
            single,
            lambda t: t.branch(saturate, run("saturate", True, keys), run("wrap", True, keys)),
            lambda t: t.branch(saturate, run("saturate", False, keys), run("wrap", False, keys)),
        )

    signed = loops["wrap"][0]

    def finish(s: Body, acc: str) -> str:
        # wrapped accumulators lie in 0 … 2^W − 1, saturated ones are as they were
        acc = s.op("Where", saturate, acc, signed.signed(s, acc, "acc_bits"))
        total = s.op("ReduceSum", s.op("Mul", s.cast64(acc), constants), s.i64([0]), keepdims=0)
        codes = s.op("Add", ladder(s, s.op("Abs", total)), shift)
        return output(s, codes, s.op("Less", total, s.i64(0)), s.op("Equal", total, s.i64(0)))

    return blocks.words(b, reduce, finish)


class _Fit:
    """Fitting to a width, with the constants made outside the loop (spec 4.4).

    While it is added to, an accumulator that wraps is held modulo 2^W: one operation instead of three.
    """

    def __init__(self, outer: Body, mode: str):
        self.mode = mode
        self.made = {}
        for width in ("psum_bits", "acc_bits"):
            half = outer.power(outer.op("Sub", outer.attribute(width), outer.i64(1)))
            below = outer.op("Sub", half, outer.i64(1))
            first, second = (
                (outer.op("Neg", below), below) if mode == "saturate" else (half, outer.op("Add", half, below))
            )
            self.made[width] = (outer.op("CastLike", first, "terms"), outer.op("CastLike", second, "terms"))

    def __call__(self, b: Body, acc: str) -> str:
        """The accumulator after an addition."""
        first, second = self.made["acc_bits"]
        if self.mode == "saturate":
            return self.clamped(b, acc, first, second)
        return b.op("BitwiseAnd", acc, second)

    @staticmethod
    def clamped(b: Body, value: str, low: str, high: str) -> str:
        """Not Clip: ONNX Runtime 1.23 has it wrong for 64-bit integers and limits above 32 bits."""
        return b.op("Min", b.op("Max", value, low), high)

    def start(self, b: Body, bias: str) -> str:
        """The accumulator's initial value."""
        return self(b, b.op("CastLike", bias, "terms"))

    def step(self, b: Body, total: str) -> str:
        """The sum of a step."""
        if self.mode == "saturate":
            return self.clamped(b, total, *self.made["psum_bits"])
        return self.signed(b, total, "psum_bits")

    def signed(self, b: Body, value: str, width: str) -> str:
        """Two's complement of a width."""
        half, mask = self.made[width]
        return b.op("Sub", b.op("BitwiseAnd", b.op("Add", value, half), mask), half)


# ---------------------------------------------------------------------------------------------------
# Log accumulation (spec 5)


class _Deltas:
    """Δ by the difference of two keys, the signs' relation included (spec 5.2)."""

    def __init__(self, b: Body):
        plus, minus = b.cast32("delta_plus"), b.cast32("delta_minus")
        # as many rows as the largest Δ⁺ too: zero and zero, whose keys are equal, must stay below every code
        highest = b.cast64(b.op("ReduceMax", b.op("Concat", b.i32([0]), plus, axis=0), b.i64([0]), keepdims=0))
        rows = b.op("Max", b.op("Size", plus), b.op("Size", minus), highest)
        rows = b.op("Add", rows, b.i64(1))
        more = b.op("Add", rows, b.i64(1))

        def padded(table: str, to: str) -> str:
            return b.op("Pad", table, b.shape(b.i64(0), b.op("Sub", to, b.op("Size", table))), b.i32(0))

        same = b.op("Mul", padded(plus, rows), b.i32(4))
        differ = b.op("Mul", padded(minus, more), b.i32(-4))
        # equal codes of different sign cancel: down to below every code
        index = b.op("Range", b.i64(0), more, b.i64(1))
        differ = b.op("Where", b.op("Equal", index, b.i64(0)), b.i32(_CANCEL), differ)
        here = b.op("Slice", differ, b.i64([0]), b.op("Reshape", rows, b.i64([1])))
        following = b.op("Slice", differ, b.i64([1]), b.op("Reshape", more, b.i64([1])))
        columns = [b.op("Unsqueeze", t, b.i64([-1])) for t in (same, here, b.op("Sub", same, same), following)]
        # a difference of keys is 4·d for equal signs, 4·d ± 1 for different ones; its sign does not matter: the
        # entries of negative ones are counted from the end, as negative indices are
        positive = b.op("Reshape", b.op("Concat", *columns, axis=1), b.i64([-1]))
        self.entries = b.op("Mul", rows, b.i64(8))
        last = b.op("Sub", b.op("Mul", rows, b.i64(4)), b.i64(1))
        negative = b.op("Slice", positive, b.op("Reshape", last, b.i64([1])), b.i64([0]), b.i64([0]), b.i64([-1]))
        self.values = b.op("Concat", positive, negative, axis=0)
        self.last = b.cast32(last)
        self.least = b.op("Neg", self.last)
        self.limit = b.cast32(b.op("Sub", b.power(b.attribute("acc_bits")), b.i64(1)))
        # a key is raised + 4·code + sign, or 0 for zero
        self.raised = b.cast32(b.op("Mul", rows, b.i64(4)))
        self.below = b.op("Add", self.raised, b.i32(3))
        self.top = b.op("Add", self.raised, b.op("Mul", self.limit, b.i32(4)))

    def keys(self, b: Body, codes: str, signs: str, zero: str) -> str:
        """Accumulator keys of int32 codes."""
        keys = b.op("Add", b.op("Add", b.op("Mul", codes, b.i32(4)), self.raised), b.cast32(signs))
        return b.op("Where", zero, b.i32(0), keys)


class _Adder:
    """The LNS adder on keys [copies, …] (spec 5.2, 5.3)."""

    def __init__(self, b: Body, deltas: _Deltas, copies: str | None = None):
        self.deltas = deltas
        self.table = _Table(b, deltas.values, copies)

    def __call__(self, b: Body, x: str, y: str) -> str:
        d = self.deltas
        # beyond the table's ends nothing changes, so that zero, far from every code, is the identity
        change = self.table(b, b.op("Clip", b.op("Sub", x, y), d.least, d.last))
        total = b.op("Add", b.op("Max", x, y), change)
        most = b.op("Add", b.op("BitwiseAnd", total, b.i32(1)), d.top)
        # faster than Where: 0 where the code is below 1
        kept = b.cast32(b.op("Greater", total, d.below))
        return b.op("Mul", b.op("Min", total, most), kept)


def _enter(b: Body, codes: str, signs: str, nothing: str, deltas: _Deltas) -> str:
    """Accumulator keys of int64 codes at the scale of 1/γ, relative to the accumulator (spec 5.1)."""
    scaled = b.op("Mul", codes, b.power(b.attribute("guard_bits")))
    limited = b.op("Max", b.op("Min", scaled, b.cast64(deltas.limit)), b.i64(0))
    return deltas.keys(b, b.cast32(limited), signs, b.op("Or", nothing, b.op("Less", scaled, b.i64(1))))


def _tree_levels(b: Body) -> str:
    """The depth of the tree over the lanes, int64: lanes up to 2^levels are identities."""
    return b.op("ReduceSum", b.cast64(b.op("Less", b.i64(_POWERS[:10]), b.attribute("lanes"))), b.i64([0]), keepdims=0)


def _tree(b: Body, keys: str, levels: str, adder: _Adder) -> str:
    """Keys [2^levels, …] added as a balanced binary tree: [1, …] (spec 5.4)."""
    name = b._name("Loop")
    inner = Body(f"{name}_")
    count, condition, values = (f"{name}_{part}" for part in ("count", "condition", "values"))
    half = inner.op("Div", inner.at(inner.op("Shape", values), 0), inner.i64(2))
    pairs = inner.reshape(values, half, inner.i64([2, -1]))
    halves = [adder.table.split(inner, inner.op("Gather", pairs, inner.i64(i), axis=1)) for i in (0, 1)]
    added = inner.reshape(adder(inner, *halves), half, inner.i64(-1))
    body = inner.graph([count, condition, values], [inner.op("Identity", condition), inner.op("Identity", added)])
    # ONNX Runtime asks for the shapes of a Loop's counter and condition
    body.input[0].CopyFrom(helper.make_tensor_value_info(count, TensorProto.INT64, []))
    body.input[1].CopyFrom(helper.make_tensor_value_info(condition, TensorProto.BOOL, []))
    return b.op("Loop", levels, b.constant(True, TensorProto.BOOL), keys, body=body)


def _log(
    b: Body,
    operands: Callable[[str, str], _Operands],
    shifts: Callable[[_Blocks], tuple[str, str]] = lambda blocks: ("bias", "code_shift"),
) -> str:
    """int32 words [M, G·N]; `operands` takes the key of zero and what is added to each channel's weight codes.

    Args:
        shifts: gives the bias and the code shift, [G·N].
    """
    deltas = _Deltas(b)
    least = b.op("ReduceMin", "entry_shift", b.i64([0]), keepdims=0)
    spread = b.op("Sub", "entry_shift", least)
    largest = b.op("Add", _largest(b, "activation"), _largest(b, "weight"))
    reach = b.op("Add", b.op("Add", largest, b.op("ReduceMax", spread, b.i64([0]), keepdims=0)), b.i64(1))
    zero64 = b.op("Mul", reach, b.i64(4))
    o = operands(b.cast32(zero64), b.cast32(spread))
    # by 4·P + signs, as in the linear case: the accumulator's key of a product (spec 5.1)
    entries = b.op("Add", b.op("Mul", zero64, b.i64(2)), b.i64(1))
    index = b.op("Range", b.i64(0), entries, b.i64(1))
    flags = b.op("BitwiseAnd", index, b.i64(3))
    codes = b.op("Add", b.op("Div", index, b.i64(4)), least)
    beyond = b.op("GreaterOrEqual", index, zero64)
    entered = _enter(b, codes, b.op("Equal", flags, b.i64(1)), beyond, deltas)
    levels = _tree_levels(b)
    width = b.power(levels)
    blocks = _Blocks(b, o, b.i64(1), width, b.op("Max", entries, deltas.entries))
    entry = _Table(b, entered, blocks.copies)
    adder = _Adder(b, deltas, blocks.copies)
    output, result = _Output(b), _FromLog(b, deltas)
    bias, code_shift = shifts(blocks)
    shift = b.reshape(code_shift, blocks.groups, b.i64(1), blocks.channels)
    # the bias: sign · 2^acc_bits + code (spec 5.5)
    limit = b.cast64(deltas.limit)
    bias_code, bias_sign = b.op("BitwiseAnd", bias, limit), b.op("Greater", bias, limit)
    keys = deltas.keys(b, b.cast32(bias_code), bias_sign, b.op("Equal", bias_code, b.i64(0)))
    first = b.reshape(keys, b.i64(1), blocks.groups, b.i64(1), blocks.channels)
    start = entry.split(b, b.op("Expand", first, blocks.acc_shape))
    single = b.op("Equal", b.attribute("lanes"), b.i64(1))
    by_lane = b.shape(width, b.i64(-1))

    def run(one: bool, keys: str) -> Callable[[Body], str]:
        def step(t: Body, names: list[str]) -> str:
            acc, x, y = names
            entering = entry(t, entry.split(t, t.op("Add", x, y)))
            if not one:
                lanes = t.op("Reshape", entering, by_lane, allowzero=1)
                # a Loop hides the shape, and a Scan wants that of its state
                entering = t.op("Reshape", _tree(t, lanes, levels, adder), t.op("Shape", acc), allowzero=1)
            return adder(t, acc, entering)

        return lambda s: s.scan([start], [keys, blocks.weights], step)

    def reduce(s: Body, keys: str) -> str:
        return s.branch(single, run(True, keys), run(False, keys))

    def finish(s: Body, acc: str) -> str:
        codes, signs, zero = result(s, s.op("Squeeze", acc, s.i64([0])))
        return output(s, s.op("Add", codes, shift), signs, zero)

    return blocks.words(b, reduce, finish)


def _largest(b: Body, side: str) -> str:
    """The largest widened code of an operand, int64."""
    return b.op("Mul", _mask(b, f"{side}_bits", f"{side}_signed"), b.attribute(f"{side}_widen"))


class _FromLog:
    """Codes without guard bits (int64), signs and zeros of accumulator keys (spec 5.6, 6.5)."""

    def __init__(self, b: Body, deltas: _Deltas):
        self.raised = deltas.raised
        self.scale = b.power(b.attribute("guard_bits"))
        self.half = b.op("Div", self.scale, b.i64(2))

    def __call__(self, b: Body, keys: str, divisor: str | None = None) -> tuple[str, str, str]:
        zero = b.op("Equal", keys, b.i32(0))
        codes = b.cast64(b.op("Div", b.op("Max", b.op("Sub", keys, self.raised), b.i32(0)), b.i32(4)))
        if divisor is not None:
            codes = b.op("Max", b.op("Sub", codes, divisor), b.i64(0))
            zero = b.op("Or", zero, b.op("Equal", codes, b.i64(0)))
        rounded = b.op("Div", b.op("Add", codes, self.half), self.scale)
        negative = b.op("Equal", b.op("BitwiseAnd", keys, b.i32(1)), b.i32(1))
        return rounded, b.op("And", negative, b.op("Not", zero)), zero


# ---------------------------------------------------------------------------------------------------
# Where activations are: matrices and windows (spec 7.1)


class _Windows:
    """Places of windows over int32 x [B, C, 1 to 3 axes]; attributes describe three axes, leading ones added."""

    def __init__(self, b: Body, x: str, fill: str):
        shape = b.op("Shape", x)
        self.batch, self.channels = b.at(shape, 0), b.at(shape, 1)
        self.rank = b.op("Sub", b.op("Size", shape), b.i64(2))
        ones = b.op("Expand", b.i64(1), b.shape(b.op("Sub", b.i64(3), self.rank)))
        head, tail = b.op("Slice", shape, b.i64([0]), b.i64([2])), b.op("Slice", shape, b.i64([2]), b.i64([5]))
        pads = b.attribute("pads", several=True)
        begin, end = b.op("Slice", pads, b.i64([0]), b.i64([3])), b.op("Slice", pads, b.i64([3]), b.i64([6]))
        widths = b.shape(b.i64([0, 0]), begin, b.i64([0, 0]), end)
        value = b.op("Pad", b.reshape(x, head, ones, tail), widths, fill)
        # one more, so that there is an element to point to
        self.keys = b.op("Concat", b.op("Reshape", value, b.i64([-1])), b.op("Reshape", fill, b.i64([1])), axis=0)
        sizes = b.op("Shape", value)
        self.outs: list[str] = []
        self.kernel: list[str] = []
        stride_of = b.i64(1)
        row: str | None = None
        depth: str | None = None
        for axis in (2, 1, 0):
            kernel, stride, dilation = (
                b.at(b.attribute(name, several=True), axis) for name in ("kernel_shape", "strides", "dilations")
            )
            size = b.at(sizes, 2 + axis)
            reach = b.op("Add", b.op("Mul", dilation, b.op("Sub", kernel, b.i64(1))), b.i64(1))
            out = b.op("Add", b.op("Div", b.op("Sub", size, reach), stride), b.i64(1))
            row = b.outer(b.steps(out, b.op("Mul", stride, stride_of)), row)
            depth = b.outer(b.steps(kernel, b.op("Mul", dilation, stride_of)), depth)
            stride_of = b.op("Mul", stride_of, size)
            self.outs.insert(0, out)
            self.kernel.insert(0, kernel)
        self.plane = stride_of
        images = b.steps(self.batch, b.op("Mul", self.channels, stride_of))
        self.rows = b.outer(images, row)
        self.depth = b.steps(b.i64(1), b.i64(1)) if depth is None else depth

    def back(self, b: Body, result: str) -> str:
        """[B·outputs, C'] as [B, C', outputs]."""
        channels = b.at(b.op("Shape", result), 1)
        split = b.reshape(result, self.batch, b.product(*self.outs), channels)
        last = b.op("Reshape", b.op("Sub", b.i64(3), self.rank), b.i64([1]))
        spatial = b.op("Slice", b.shape(*self.outs), last, b.i64([3]))
        return b.reshape(b.op("Transpose", split, perm=[0, 2, 1]), self.batch, channels, spatial)

    def bases(self, b: Body) -> str:
        """The first element of every channel's every window: int32 [1, C·B·outputs]."""
        return b.op("Reshape", b.cast32(b.outer(b.steps(self.channels, self.plane), self.rows)), b.i64([1, -1]))

    def by_channel(self, b: Body, result: str) -> str:
        """[C·B·outputs] as [B, C, outputs]."""
        matrix = b.reshape(result, self.channels, b.op("Mul", self.batch, b.product(*self.outs)))
        return self.back(b, b.op("Transpose", matrix, perm=[1, 0]))


def _conv_operands(b: Body, x: str, w: str, zero: str) -> tuple[_Operands, _Windows]:
    """Keys x [B, C, …] and w [O, C/G, …] of a convolution: depth is (C/G, kernel)."""
    windows = _Windows(b, x, zero)
    groups = b.attribute("group")
    each = b.op("Div", windows.channels, groups)
    shape = b.op("Shape", w)
    outputs = b.op("Div", b.at(shape, 0), groups)
    rest = b.op("ReduceProd", b.op("Slice", shape, b.i64([1]), b.i64([5])), b.i64([0]), keepdims=0)
    depth = b.outer(b.steps(each, windows.plane), windows.depth)
    group = b.steps(groups, b.op("Mul", each, windows.plane))
    weights = b.reshape(w, groups, outputs, rest)
    rows, group, depth = (b.cast32(place) for place in (windows.rows, group, depth))
    return _Operands(windows.keys, rows, group, depth, weights, zero), windows


def _gemm_operands(b: Body, x: str, w: str, zero: str) -> _Operands:
    """Keys x [..., K] and w [N, K] of a matrix product."""
    shape = b.op("Shape", x)
    depth = b.op("Squeeze", b.op("Slice", shape, b.i64([-1]), b.i64([1 << 30])), b.i64([0]))
    rows = b.op("ReduceProd", b.op("Slice", shape, b.i64([0]), b.i64([-1])), b.i64([0]), keepdims=0)
    keys = b.op("Concat", b.op("Reshape", x, b.i64([-1])), b.op("Reshape", zero, b.i64([1])), axis=0)
    places = [b.cast32(b.steps(*p)) for p in ((rows, depth), (b.i64(1), b.i64(1)), (depth, b.i64(1)))]
    return _Operands(keys, places[0], places[1], places[2], b.op("Unsqueeze", w, b.i64([0])), zero)


def _matmul_operands(b: Body, x: str, w: str, zero: str) -> _Operands:
    """Keys x [..., M, K] and w [..., K, N] of products of two tensors: the axes before are groups."""
    shape, other = b.op("Shape", x), b.op("Shape", w)
    depth, rows, columns = b.at(shape, -1), b.at(shape, -2), b.at(other, -1)
    given = b.op("ReduceProd", b.op("Slice", shape, b.i64([0]), b.i64([-2])), b.i64([0]), keepdims=0)
    # steps over no group have no shape: without any matrix, one of zeros is multiplied, and its words are left out
    count = b.op("Max", given, b.i64(1))
    more = b.op("Sub", count, given)
    zeros = b.op("Reshape", zero, b.i64([1]))

    def flat(values: str, size: str) -> list[str]:
        return [b.op("Reshape", values, b.i64([-1])), b.op("Expand", zeros, b.shape(b.product(more, depth, size)))]

    keys = b.op("Concat", *flat(x, rows), zeros, axis=0)
    places = [b.cast32(b.steps(*p)) for p in ((rows, depth), (count, b.op("Mul", rows, depth)), (depth, b.i64(1)))]
    # swapping the last two axes needs a known rank, so the leading ones are joined first
    joined = b.reshape(b.op("Concat", *flat(w, columns), axis=0), count, depth, columns)
    weights = b.op("Transpose", joined, perm=[0, 2, 1])
    return _Operands(keys, places[0], places[1], places[2], weights, zero)


def _matmul_words(b: Body, words: str) -> None:
    """Output Y: words [M, G·N] in the shape [..., M, N]."""
    shape, columns = b.op("Shape", "A"), b.at(b.op("Shape", "B"), -1)
    head, rows = b.op("Slice", shape, b.i64([0]), b.i64([-2])), b.at(shape, -2)
    count = b.op("ReduceProd", head, b.i64([0]), keepdims=0)
    groups = b.reshape(words, rows, b.op("Max", count, b.i64(1)), columns)
    groups = b.op("Slice", groups, b.i64([0]), b.op("Reshape", count, b.i64([1])), b.i64([1]))
    typed = b.cast_to_attribute(groups, "output_type")
    b.op("Reshape", b.op("Transpose", typed, perm=[1, 0, 2]), b.shape(head, rows, columns), allowzero=1, output="Y")


def _gemm_words(b: Body, words: str) -> None:
    """Output Y: words [M, N] in the shape [..., N]."""
    head = b.op("Slice", b.op("Shape", "X"), b.i64([0]), b.i64([-1]))
    typed = b.cast_to_attribute(words, "output_type")
    b.op("Reshape", typed, b.shape(head, b.at(b.op("Shape", words), 1)), allowzero=1, output="Y")


def _channel_shift(b: Body, shift: str) -> str:
    """[N] as it is added to weights [N, ...]."""
    ones = b.op("Expand", b.i64(1), b.shape(b.op("Sub", b.op("Size", b.op("Shape", "W")), b.i64(1))))
    return b.op("Reshape", shift, b.shape(b.i64(-1), ones), allowzero=0)


# ---------------------------------------------------------------------------------------------------
# The operators


@dataclass(frozen=True)
class Value:
    """An input or output, or an attribute, of an operator.

    Args:
        name: as in the node.
        type: element type and shape, or the attribute's kind.
        meaning: one sentence, with the paragraph of the specification.
    """

    name: str
    type: str
    meaning: str


@dataclass(frozen=True)
class Operator:
    """An operator: its schema, and what makes its body.

    Args:
        name: in the domain `lnsdeploy`.
        summary: what it computes.
        inputs, outputs, attributes: its signature; never changed once published.
        make: fills a body whose inputs and outputs have the names of the signature.
        notes: what else its page says, paragraphs.
        native: whether the native library has it; else its body runs beside the library's operators as well.
        torch: whether torch has it.
    """

    name: str
    summary: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    attributes: tuple[Value, ...]
    make: Callable[[Body], None]
    notes: tuple[str, ...] = ()
    native: bool = True
    torch: bool = True


_WORDS = "uint8 or uint16"
_WORD_NOTE = (
    "Words are as in specification 1: uint8 up to 8 bits, uint16 above; the sign, if the format has one, is the top "
    "bit of its width. A word with a sign and code 0 is read as zero and never produced."
)
_LINEAR_NOTE = (
    "P is the sum of both operands' largest widened codes. Columns 0 and 1 of `terms` are not used: a product of two "
    "words that are not zero has P ≥ 2, and any other contributes nothing. `terms` and `bias` have one type, and the "
    "accumulators have it too: int32 is for plans in which neither a step's sum nor an accumulator leaves 32 bits.",
    "`thresholds` is sorted, and has an entry for every raw code that the accumulators can reach, whatever the encoder "
    "(exact, table or Mitchell): all are monotone.",
)
_LOG_NOTE = (
    "`delta_plus` and `delta_minus` are all in which the methods of specification 5.7 differ. A function body holds a "
    "sign beside four times the code in 32 bits, hence the limit of `acc_bits`.",
)
_DEPTH_NOTE = "The depth runs over (C/group, kernel axes) in this order."
_WINDOW_NOTE = (
    "Window attributes always describe three spatial axes; those that X does not have come first, with kernel 1, "
    "stride 1, dilation 1 and no padding. Sizes are rounded down; there is no automatic padding.",
)
_X = Value("X", f"{_WORDS}", "Words.")
_OUTPUT = (
    Value("output_bits", "int, 2 to 16", "Width of the result's words."),
    Value("output_signed", "int, 0 or 1", "Whether they have a sign bit."),
    Value("output_type", "int", "Their ONNX element type: 2 (uint8) up to 8 bits, 4 (uint16) above."),
    Value("underflow", "int, 0 or 1", "What results below code 1 become: zero, or code 1 (spec 2.4)."),
)
_OPERANDS = tuple(
    value
    for side in ("activation", "weight")
    for value in (
        Value(f"{side}_bits", "int, 2 to 16", f"Width of the {side} words."),
        Value(f"{side}_signed", "int, 0 or 1", "Whether they have a sign bit."),
        Value(f"{side}_widen", "int, ≥ 1", "Factor of their codes that brings both operands to one γ (spec 3.2)."),
    )
)
_LINEAR_INPUTS = (
    Value("bias", "int32 or int64 [N]", "Initial value at the accumulator's least significant bit (spec 4.5)."),
    Value(
        "terms",
        "int32 or int64 [B, P + 1]",
        "Aligned magnitude of a product by bin and code sum (spec 4.1 to 4.3); the accumulator has its type.",
    ),
    Value("constants", "int64 [B]", "Factor of each bin: T with remainder bins, 1 without (spec 4.6)."),
    Value("thresholds", "int64 [E]", "Entry e − 1: the smallest |A| whose raw code is at least e (spec 4.6)."),
    Value("code_shift", "int64 [N]", "γ·λ' + S − o_out of each output channel (spec 4.6)."),
)
_LINEAR = (
    Value("lanes", "int, 1 to 1024", "Products of a vector step (spec 4.4)."),
    Value("acc_bits", "int, 2 to 62", "Width of the accumulator (spec 4.4)."),
    Value("psum_bits", "int, 2 to 62", "Width that a step's sum is fitted to (spec 4.4)."),
    Value("saturate", "int, 0 or 1", "Overflow wraps or saturates (spec 4.4)."),
)
_DELTAS = (
    Value("delta_plus", "int32 [D]", "Δ⁺(d), zero past its end (spec 5.7)."),
    Value("delta_minus", "int32 [D']", "Δ⁻(d), zero past its end; entry 0 is not used (spec 5.7)."),
)
_LOG_INPUTS = (
    Value("bias", "int64 [N]", "Initial value, a word: sign · 2^acc_bits + code (spec 5.5)."),
    *_DELTAS,
    Value("entry_shift", "int64 [N]", "S − o_acc of each output channel (spec 5.1)."),
    Value("code_shift", "int64 [N]", "o_acc − o_out of each output channel (spec 5.6)."),
)
_LOG = (
    Value("lanes", "int, 1 to 1024", "Products of a step, added as a tree (spec 5.4)."),
    Value("acc_bits", "int, 1 to 26", "Bits of the accumulator's code (spec 5)."),
    Value("guard_bits", "int, 0 to 8", "g: the accumulator has γ·2^g codes per octave (spec 5)."),
)
_WINDOW = (
    Value("kernel_shape", "ints [3]", "Window; leading ones for fewer than three spatial axes."),
    Value("strides", "ints [3]", "Strides."),
    Value("pads", "ints [6]", "Padding: beginnings, then ends."),
    Value("dilations", "ints [3]", "Dilations."),
)
_GROUP = (Value("group", "int, ≥ 1", "Groups of channels (spec 7.1)."),)
_GEMM_X = Value("X", f"{_WORDS} [..., K]", "Activations.")
_GEMM_W = Value("W", f"{_WORDS} [N, K]", "Weights.")
_CONV_X = Value("X", f"{_WORDS} [B, C, 1 to 3 axes]", "Activations; padding is the zero word.")
_CONV_W = Value("W", f"{_WORDS} [O, C/group, 1 to 3 axes]", "Weights.")


_MATMUL = (
    Value("A", f"{_WORDS} [..., M, K]", "Words of the first tensor."),
    Value("B", f"{_WORDS} [..., K, N]", "Words of the second, with the same axes before the last two."),
)
_CODE_SHIFT = Value("code_shift", "int", "What is added to the code of a sum: γ·λ' + S − o_out, or o_acc − o_out.")


def _y(shape: str = "") -> tuple[Value, ...]:
    return (Value("Y", f"{_WORDS}{shape}", "Words of the output format."),)


def _make_linear_gemm(b: Body) -> None:
    zero = _linear_zero(b)
    x, w = _keys(b, "X", "activation", zero), _keys(b, "W", "weight", zero)
    _gemm_words(b, _linear(b, _gemm_operands(b, x, w, zero)))


def _make_linear_conv(b: Body) -> None:
    zero = _linear_zero(b)
    x, w = _keys(b, "X", "activation", zero), _keys(b, "W", "weight", zero)
    operands, windows = _conv_operands(b, x, w, zero)
    b.op("Identity", windows.back(b, b.cast_to_attribute(_linear(b, operands), "output_type")), output="Y")


def _make_log_gemm(b: Body) -> None:
    def operands(zero: str, shift: str) -> _Operands:
        x, w = _keys(b, "X", "activation", zero), _keys(b, "W", "weight", zero, _channel_shift(b, shift))
        return _gemm_operands(b, x, w, zero)

    _gemm_words(b, _log(b, operands))


def _make_log_conv(b: Body) -> None:
    found = []

    def operands(zero: str, shift: str) -> _Operands:
        x, w = _keys(b, "X", "activation", zero), _keys(b, "W", "weight", zero, _channel_shift(b, shift))
        made, windows = _conv_operands(b, x, w, zero)
        found.append(windows)
        return made

    words = b.cast_to_attribute(_log(b, operands), "output_type")
    b.op("Identity", found[0].back(b, words), output="Y")


def _make_linear_matmul(b: Body) -> None:
    zero = _linear_zero(b)
    x, w = _keys(b, "A", "activation", zero), _keys(b, "B", "weight", zero)
    operands = _matmul_operands(b, x, w, zero)
    shape = b.op("Shape", operands.weights)
    columns = b.shape(b.op("Mul", b.at(shape, 0), b.at(shape, 1)))
    bias = b.op("Expand", b.op("CastLike", b.i64(0), "terms"), columns)
    _matmul_words(b, _linear(b, operands, bias, b.op("Expand", b.attribute("code_shift"), columns)))


def _make_log_matmul(b: Body) -> None:
    def operands(zero: str, shift: str) -> _Operands:
        x, w = _keys(b, "A", "activation", zero), _keys(b, "B", "weight", zero)
        return _matmul_operands(b, x, w, zero)

    def shifts(blocks: _Blocks) -> tuple[str, str]:
        columns = b.shape(b.op("Mul", blocks.groups, blocks.channels))
        return b.op("Expand", b.i64(0), columns), b.op("Expand", b.attribute("code_shift"), columns)

    _matmul_words(b, _log(b, operands, shifts))


def _make_multiply(b: Body) -> None:
    output = _Output(b)
    (a, a_signs), (c, c_signs) = (
        _codes(b, x, f"{side}_bits", f"{side}_signed") for x, side in (("A", "a"), ("B", "b"))
    )
    zero = b.op("Or", b.op("Equal", a, b.i32(0)), b.op("Equal", c, b.i32(0)))
    codes = b.op("Add", b.cast64(b.op("Add", a, c)), b.attribute("code_shift"))
    b.cast_to_attribute(output(b, codes, b.op("Xor", a_signs, c_signs), zero), "output_type", "Y")


def _make_lookup(b: Body) -> None:
    b.op("Identity", _Table(b, "table").any(b, b.cast32("X")), output="Y")


def _make_pad(b: Body) -> None:
    # ONNX Runtime pads no uint16
    padded = b.op("Pad", b.cast32("X"), b.attribute("pads", several=True), b.i32(0))
    b.op("CastLike", padded, "X", output="Y")


def _make_broadcast(b: Body) -> None:
    batch = b.op("Slice", b.op("Shape", "like"), b.i64([0]), b.i64([1]))
    rest = b.op("Slice", b.op("Shape", "X"), b.i64([1]), b.i64([1 << 30]))
    b.op("Expand", "X", b.op("Concat", batch, rest, axis=0), output="Y")


def _make_encode(b: Body) -> None:
    nothing = b.op("CastLike", b.i64(0), "X")
    negative = b.op("Less", "X", nothing)
    unsigned = b.op("Equal", b.attribute("output_signed"), b.i64(0))
    magnitude = b.op("Where", b.op("And", negative, unsigned), nothing, b.op("Abs", "X"))
    codes = _Ladder(b, "thresholds")(b, magnitude)
    minus = b.op("And", b.op("And", negative, b.op("Not", unsigned)), b.op("Greater", codes, b.i64(0)))
    bit = b.op("Add", _mask(b, "output_bits", "output_signed"), b.i64(1))
    word = b.op("Add", codes, b.op("Where", minus, bit, b.i64(0)))
    b.cast_to_attribute(word, "output_type", "Y")


def _make_decode(b: Body) -> None:
    b.op("Identity", _Table(b, "table").any(b, b.cast32("X")), output="Y")


def _ordered(b: Body) -> str:
    """X as int32 in the order of values (spec 6.1)."""
    codes, signs = _codes(b, "X", "bits", "signed")
    return b.op("Where", signs, b.op("Neg", codes), codes)


def _unordered(b: Body, keys: str) -> None:
    """Output Y: words of X's type."""
    bit = b.cast32(b.op("Add", _mask(b, "bits", "signed"), b.i64(1)))
    negative = b.op("Where", b.op("Less", keys, b.i32(0)), bit, b.i32(0))
    b.op("CastLike", b.op("Add", b.op("Abs", keys), negative), "X", output="Y")


def _make_relu(b: Body) -> None:
    _unordered(b, b.op("Max", _ordered(b), b.i32(0)))


def _make_clip(b: Body) -> None:
    low, high = (b.cast32(b.attribute(name)) for name in ("low", "high"))
    _unordered(b, b.op("Min", b.op("Max", _ordered(b), low), high))


def _make_max_pool(b: Body) -> None:
    windows = _Windows(b, _ordered(b), b.i32(LOWEST))
    table, bases = _Table(b, windows.keys), windows.bases(b)

    def step(t: Body, names: list[str]) -> str:
        return t.op("Max", names[0], table(t, t.op("Add", bases, names[1])))

    start = b.op("Expand", b.i32(LOWEST), b.op("Shape", bases))
    _unordered(b, windows.by_channel(b, b.scan([start], [b.cast32(windows.depth)], step)))


def _entered(b: Body, x: str, side: str, deltas: _Deltas) -> str:
    """Keys of words at an adder's place (spec 6.4)."""
    codes, signs = _codes(b, x, f"{side}_bits", f"{side}_signed")
    shifted = b.op("Add", b.cast64(codes), b.attribute(f"{side}_shift"))
    return _enter(b, shifted, signs, b.op("Equal", codes, b.i32(0)), deltas)


def _make_add(b: Body) -> None:
    deltas = _Deltas(b)
    adder, output, result = _Adder(b, deltas), _Output(b), _FromLog(b, deltas)
    x, y = _entered(b, "A", "a", deltas), _entered(b, "B", "b", deltas)
    shape = b.op("Shape", b.op("Add", x, y))
    x, y = (adder.table.split(b, b.op("Expand", v, shape)) for v in (x, y))
    codes, signs, zero = result(b, b.op("Reshape", adder(b, x, y), shape, allowzero=1))
    b.cast_to_attribute(output(b, b.op("Add", codes, b.attribute("code_shift")), signs, zero), "output_type", "Y")


def _make_average_pool(b: Body) -> None:
    deltas = _Deltas(b)
    adder, output, result = _Adder(b, deltas), _Output(b), _FromLog(b, deltas)
    windows = _Windows(b, _entered(b, "X", "input", deltas), b.i32(0))
    lanes, levels = b.attribute("lanes"), _tree_levels(b)
    table, bases = _Table(b, windows.keys), windows.bases(b)
    # the last key is a zero: what fills the last step, and its lanes up to a power of two, leads there
    last = b.op("Sub", b.op("Size", windows.keys), b.i64(1))
    depth = b.op("Size", windows.depth)
    steps = b.ceil_div(depth, lanes)
    places = b.op("Pad", windows.depth, b.shape(b.i64(0), b.op("Sub", b.op("Mul", steps, lanes), depth)), last)
    width = b.power(levels)
    places = b.reshape(places, steps, lanes)
    places = b.op("Pad", places, b.shape(b.i64([0, 0, 0]), b.op("Sub", width, lanes)), last)
    places, last = b.op("Unsqueeze", b.cast32(places), b.i64([2])), b.cast32(last)
    by_lane = b.shape(width, b.op("Size", bases))

    def step(t: Body, names: list[str]) -> str:
        place = t.op("Min", t.op("Add", bases, names[1]), last)
        entering = t.op("Reshape", table(t, table.split(t, place)), by_lane, allowzero=1)
        # a Loop hides the shape, and a Scan wants that of its state
        added = t.op("Reshape", _tree(t, entering, levels, adder), t.op("Shape", names[0]), allowzero=1)
        return adder(t, names[0], added)

    acc = b.scan([b.op("Expand", b.i32(0), b.op("Shape", bases))], [places], step)
    codes, signs, zero = result(b, b.reshape(acc, windows.channels, windows.batch, *windows.outs), "log_counts")
    words = output(b, b.op("Add", codes, b.attribute("code_shift")), signs, zero)
    b.cast_to_attribute(windows.by_channel(b, words), "output_type", "Y")


def _make_rescale(b: Body) -> None:
    codes, signs = _codes(b, "X", "input_bits", "input_signed")
    zero = b.op("Equal", codes, b.i32(0))
    absolute = b.op("Add", b.cast64(codes), b.attribute("input_offset"))
    absolute = b.op("Mul", absolute, b.attribute("multiply"))
    # ⌊(2x + ρ)/(2ρ)⌋; Mod has the divisor's sign, so the division is a floor
    divide = b.attribute("divide")
    top = b.op("Add", b.op("Mul", absolute, b.i64(2)), divide)
    bottom = b.op("Mul", divide, b.i64(2))
    floor = b.op("Div", b.op("Sub", top, b.op("Mod", top, bottom)), bottom)
    limited = b.op("Sub", floor, b.attribute("output_offset"))
    most = _mask(b, "output_bits", "output_signed")
    unsigned = b.op("Equal", b.attribute("output_signed"), b.i64(0))
    nothing = b.op("Or", zero, b.op("And", signs, unsigned))
    inside = b.op("Max", b.op("Min", limited, most), b.attribute("underflow"))
    inside = b.op("Max", inside, b.i64(0))
    code = b.op("Where", nothing, b.i64(0), inside)
    minus = b.op("And", signs, b.op("Greater", code, b.i64(0)))
    word = b.op("Add", code, b.op("Where", minus, b.op("Add", most, b.i64(1)), b.i64(0)))
    b.cast_to_attribute(word, "output_type", "Y")


_FORMAT = (
    Value("bits", "int, 2 to 16", "Width of the words."),
    Value("signed", "int, 0 or 1", "Whether they have a sign bit."),
)

OPERATORS: tuple[Operator, ...] = (
    Operator(
        "Encode",
        "Rounds floating-point numbers to words, to nearest in the log domain (spec 2.1, 2.4). NaN becomes zero.",
        (
            Value("X", "float", "Numbers."),
            Value(
                "thresholds",
                "float [C]",
                "Entry k − 1: the smallest float32 not below the lower bound of code k; "
                "0 first if underflow gives code 1.",
            ),
        ),
        _y(),
        _OUTPUT[:3],
        _make_encode,
        (
            "The code is the number of thresholds that the magnitude reaches; the offset is in the thresholds alone. "
            "An infinity takes the largest code, NaN the zero word, and a negative number into an unsigned format the "
            "word of 0.",
            _WORD_NOTE,
        ),
    ),
    Operator(
        "Decode",
        "The float32 nearest to each word's value (spec 2.5).",
        (_X, Value("table", "float [2^bits]", "The value of every word.")),
        (Value("Y", "float", "Values."),),
        (),
        _make_decode,
        ("The offset is in the table alone. A word of a sign and code 0 has the table's entry 0.0.",),
    ),
    Operator(
        "LinearGemm",
        "Matrix product with linear accumulation (spec 3, 4).",
        (_GEMM_X, _GEMM_W, *_LINEAR_INPUTS),
        _y(" [..., N]"),
        (*_OPERANDS, *_LINEAR, *_OUTPUT),
        _make_linear_gemm,
        (_WORD_NOTE, *_LINEAR_NOTE),
    ),
    Operator(
        "LinearConv",
        "Convolution with linear accumulation (spec 3, 4, 7.1).",
        (_CONV_X, _CONV_W, *_LINEAR_INPUTS),
        _y(" [B, O, 1 to 3 axes]"),
        (*_OPERANDS, *_LINEAR, *_OUTPUT, *_WINDOW, *_GROUP),
        _make_linear_conv,
        (_DEPTH_NOTE, _WORD_NOTE, *_LINEAR_NOTE, *_WINDOW_NOTE),
    ),
    Operator(
        "LogGemm",
        "Matrix product with log accumulation (spec 3, 5).",
        (_GEMM_X, _GEMM_W, *_LOG_INPUTS),
        _y(" [..., N]"),
        (*_OPERANDS, *_LOG, *_OUTPUT),
        _make_log_gemm,
        (_WORD_NOTE, *_LOG_NOTE),
    ),
    Operator(
        "LogConv",
        "Convolution with log accumulation (spec 3, 5, 7.1).",
        (_CONV_X, _CONV_W, *_LOG_INPUTS),
        _y(" [B, O, 1 to 3 axes]"),
        (*_OPERANDS, *_LOG, *_OUTPUT, *_WINDOW, *_GROUP),
        _make_log_conv,
        (_DEPTH_NOTE, _WORD_NOTE, *_LOG_NOTE, *_WINDOW_NOTE),
    ),
    Operator(
        "LinearMatMul",
        "Matrix products of two tensors of words with linear accumulation (spec 3, 4, 7.2).",
        (*_MATMUL, *_LINEAR_INPUTS[1:4]),
        _y(" [..., M, N]"),
        (*_OPERANDS, *_LINEAR, _CODE_SHIFT, *_OUTPUT),
        _make_linear_matmul,
        (_WORD_NOTE, *_LINEAR_NOTE),
        torch=False,
    ),
    Operator(
        "LogMatMul",
        "Matrix products of two tensors of words with log accumulation (spec 3, 5, 7.2).",
        (*_MATMUL, *_DELTAS, Value("entry_shift", "int64 [1]", "S − o_acc (spec 5.1).")),
        _y(" [..., M, N]"),
        (*_OPERANDS, *_LOG, _CODE_SHIFT, *_OUTPUT),
        _make_log_matmul,
        (_WORD_NOTE, *_LOG_NOTE),
        torch=False,
    ),
    Operator("Relu", "Negative words become zero (spec 6.1).", (_X,), _y(), _FORMAT, _make_relu),
    Operator(
        "Clip",
        "Words limited between two values (spec 6.1).",
        (_X,),
        _y(),
        (
            *_FORMAT,
            Value("low", "int", "The lower limit's code, negative if its sign is."),
            Value("high", "int", "The upper limit's code, negative if its sign is."),
        ),
        _make_clip,
        (_WORD_NOTE,),
    ),
    Operator(
        "MaxPool",
        "The largest value of each window; padding never wins (spec 6.1).",
        (Value("X", f"{_WORDS} [B, C, 1 to 3 axes]", "Words."),),
        _y(" [B, C, 1 to 3 axes]"),
        (*_FORMAT, *_WINDOW),
        _make_max_pool,
        (_WORD_NOTE, *_WINDOW_NOTE),
    ),
    Operator(
        "Add",
        "Element-wise sum by the LNS adder (spec 6.4), with broadcasting.",
        (Value("A", _WORDS, "Words."), Value("B", _WORDS, "Words."), *_DELTAS),
        _y(),
        (
            *(
                Value(f"{side}_{what}", kind, meaning)
                for side in ("a", "b")
                for what, kind, meaning in (
                    ("bits", "int, 2 to 16", f"Width of {side.upper()}'s words."),
                    ("signed", "int, 0 or 1", "Whether they have a sign bit."),
                    ("shift", "int", "Their offset less the accumulator's."),
                )
            ),
            *_LOG[1:],
            Value("code_shift", "int", "o_acc − o_out (spec 5.6)."),
            *_OUTPUT,
        ),
        _make_add,
        (_WORD_NOTE, *_LOG_NOTE),
    ),
    Operator(
        "AveragePool",
        "Average of each window by the LNS adder (spec 6.5); the sum where log_counts is zero.",
        (
            Value("X", f"{_WORDS} [B, C, 1 to 3 axes]", "Words; padding is the zero word."),
            *_DELTAS,
            Value("log_counts", "int64 [o0, o1, o2]", "round(γ_acc·log2 n) at each output position, or sizes of 1."),
        ),
        _y(" [B, C, 1 to 3 axes]"),
        (
            Value("input_bits", "int, 2 to 16", "Width of X's words."),
            Value("input_signed", "int, 0 or 1", "Whether they have a sign bit."),
            Value("input_shift", "int", "Their offset less the accumulator's."),
            *_LOG,
            Value("code_shift", "int", "o_acc − o_out (spec 5.6)."),
            *_OUTPUT,
            *_WINDOW,
        ),
        _make_average_pool,
        (
            "Words enter and are added in the order of the kernel's axes, `lanes` at a time. `log_counts` broadcasts "
            "over the three output axes: one entry [1, 1, 1] serves windows without padding.",
            _WORD_NOTE,
            *_LOG_NOTE,
            *_WINDOW_NOTE,
        ),
    ),
    Operator(
        "Multiply",
        "Element-wise product of words: codes add (spec 6.2), with broadcasting.",
        (Value("A", _WORDS, "Words."), Value("B", _WORDS, "Words.")),
        _y(),
        (
            *(
                Value(f"{side}_{what}", kind, meaning)
                for side in ("a", "b")
                for what, kind, meaning in (
                    ("bits", "int, 2 to 16", f"Width of {side.upper()}'s words."),
                    ("signed", "int, 0 or 1", "Whether they have a sign bit."),
                )
            ),
            Value("code_shift", "int", "o_a + o_b − o_out."),
            *_OUTPUT,
        ),
        _make_multiply,
        ("Both operands have one γ, which is the result's.", _WORD_NOTE),
        native=False,
        torch=False,
    ),
    Operator(
        "Lookup",
        "A function of one number, as a table of words (spec 6.7).",
        (_X, Value("table", f"{_WORDS} [2^bits]", "The result's word for every word of X.")),
        _y(),
        (),
        _make_lookup,
        (_WORD_NOTE,),
        native=False,
        torch=False,
    ),
    Operator(
        "Pad",
        "Zero words around a tensor (spec 6.1).",
        (_X,),
        _y(),
        (Value("pads", "ints [2·rank]", "Zeros before each axis, then after each; none is negative."),),
        _make_pad,
        native=False,
        torch=False,
    ),
    Operator(
        "Broadcast",
        "One tensor repeated for every input of the batch (spec 6.1).",
        (Value("X", f"{_WORDS} [1, ...]", "Words."), Value("like", f"{_WORDS} [B, ...]", "Gives the batch.")),
        _y(" [B, ...]"),
        (),
        _make_broadcast,
        native=False,
        torch=False,
    ),
    Operator(
        "Rescale",
        "Words of another format or offset (spec 6.3).",
        (_X,),
        _y(),
        (
            Value("input_bits", "int, 2 to 16", "Width of X's words."),
            Value("input_signed", "int, 0 or 1", "Whether they have a sign bit."),
            Value("input_offset", "int", "Their offset."),
            Value("multiply", "int, ≥ 1", "The output's γ over the input's, where it is larger; else 1."),
            Value("divide", "int, ≥ 1", "The input's γ over the output's, where it is larger; else 1."),
            Value("output_offset", "int", "The result's offset."),
            *_OUTPUT,
        ),
        _make_rescale,
        ("Zero stays zero under either rule of underflow.", _WORD_NOTE),
    ),
)


@cache
def function(name: str) -> FunctionProto:
    """The body of an operator."""
    operator = next(o for o in OPERATORS if o.name == name)
    body = Body()
    operator.make(body)
    made = helper.make_function(
        DOMAIN,
        operator.name,
        [v.name for v in operator.inputs],
        [v.name for v in operator.outputs],
        body.nodes,
        [helper.make_opsetid("", OPSET)],
        [v.name for v in operator.attributes],
    )
    made.doc_string = operator.summary
    return made


def functions(names: set[str] | None = None) -> list[FunctionProto]:
    """The bodies of some operators (or all), in a fixed order."""
    return [function(o.name) for o in OPERATORS if names is None or o.name in names]


def every_node(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Nodes, and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from every_node(attribute.g.node)


def operator_page(operator: Operator) -> str:
    """The documentation page of an operator, in Markdown."""
    lines = [f"# {DOMAIN}.{operator.name}, version {VERSION}", "", operator.summary, ""]
    for title, values in (
        ("Inputs", operator.inputs),
        ("Outputs", operator.outputs),
        ("Attributes", operator.attributes),
    ):
        if values:
            lines += [f"## {title}", "", "| name | type | meaning |", "| --- | --- | --- |"]
            # a bar would end the cell
            lines += [f"| `{v.name}` | {v.type} | {v.meaning} |".replace("|A|", r"\|A\|") for v in values]
            lines.append("")
    if operator.notes:
        lines += ["## Notes", ""]
        lines += [line for note in operator.notes for line in (note, "")]
    every = list(every_node(function(operator.name).node))
    kinds = sorted({node.op_type for node in every})
    lines += [
        "## Function body",
        "",
        f"{len(every)} nodes of opset {OPSET}, with those of loops and branches: {', '.join(kinds)}.",
        "",
    ]
    return "\n".join(lines)


def operator_pages() -> dict[str, str]:
    """All pages of docs/operators, by file name."""
    index = [
        "# ONNX operators",
        "",
        f"Domain `{DOMAIN}`, operator set version {VERSION}. Each operator is also a model-local function of",
        f"opset {OPSET}; what its words and tables mean is in [the specification](../datapath.md), whose paragraphs",
        "the pages cite. Signatures never change once published. These pages are generated:",
        "`python -m lnsdeploy.exporters.functions docs/operators`.",
        "",
        "| operator | what it does |",
        "| --- | --- |",
    ]
    pages = {}
    for operator in OPERATORS:
        name = f"{operator.name}-{VERSION}.md"
        pages[name] = operator_page(operator)
        index.append(f"| [{operator.name}]({name}) | {operator.summary} |")
    return {"README.md": "\n".join(index) + "\n", **pages}


def main() -> None:
    """Write the pages into the folder named on the command line."""
    import sys
    from pathlib import Path

    from lnsdeploy.files import make_folder, write_text

    folder = make_folder(Path(sys.argv[1]))
    for name, text in operator_pages().items():
        write_text(folder / name, text)


if __name__ == "__main__":
    main()
