"""The ONNX operators of domain `lnsdeploy`, version 1, as functions in standard operators.

Each operator has one body for every datapath: what differs is data (tables, attributes). Inside a body words are
int32 keys 4·code + sign, so that one addition of two keys indexes a table by code sum and product sign at once
(spec 3.1), and the difference of two keys indexes Δ with the signs' relation included (spec 5.2). The key of zero lies
beyond every sum of two others (as an operand), or far below every key (as an accumulator).

Every node has a name: ONNX Runtime 1.18 and 1.20 refuse functions with nameless nodes.
"""

from __future__ import annotations

from collections.abc import Callable
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
# The key of zero in a log accumulator: below every other by more than any difference that has a Δ.
LOG_ZERO = -(1 << 29)
# Below every word in the order of values; what padding holds in max pooling.
LOWEST = -(1 << 30)
_POWERS = [1 << i for i in range(24, -1, -1)]


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

    def cast_to_attribute(self, value: str, attribute: str, output: str) -> None:
        """A cast to the type that an attribute of the operator names."""
        name = self._name("Cast")
        node = NodeProto(op_type="Cast", name=name, input=[value], output=[output])
        entry = node.attribute.add()
        entry.name, entry.type, entry.ref_attr_name = "to", AttributeProto.INT, attribute
        self.nodes.append(node)

    def power(self, exponent: str) -> str:
        """2^exponent, int64."""
        return self.op("Pow", self.i64(2), exponent)

    def at(self, value: str, index: int) -> str:
        """One element of a list, as a scalar."""
        return self.op("Gather", value, self.i64(index), axis=0)

    def shape(self, *parts: str) -> str:
        """A list from scalars and lists."""
        return self.op("Concat", *(self.op("Reshape", p, self.i64([-1])) for p in parts), axis=0)

    def reshape(self, value: str, *parts: str) -> str:
        """Reshape to a list of scalars and lists; zero-sized axes stay zero."""
        return self.op("Reshape", value, self.shape(*parts), allowzero=1)

    def graph(self, inputs: list[str], outputs: list[str]) -> GraphProto:
        """The nodes as a subgraph."""
        return helper.make_graph(
            self.nodes,
            f"{self.prefix}graph",
            [onnx.ValueInfoProto(name=name) for name in inputs],
            [onnx.ValueInfoProto(name=name) for name in outputs],
        )

    def scan(self, states: list[str], sequences: list[str], step: Callable[[Body, list[str]], list[str]]) -> str:
        """A Scan over axis 0 of sequences; returns the final value of the only state."""
        name = self._name("Scan")
        inner = Body(f"{name}_")
        inputs = [f"{name}_in_{i}" for i in range(len(states) + len(sequences))]
        outputs = [inner.op("Identity", value) for value in step(inner, inputs)]
        return self.op("Scan", *states, *sequences, num_scan_inputs=len(sequences), body=inner.graph(inputs, outputs))

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
# Words and keys


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


def _words(b: Body, codes: str, negative: str, zero: str) -> None:
    """Output Y: words of int64 codes, limited to the output format (spec 2.4)."""
    most = _mask(b, "output_bits", "output_signed")
    unsigned = b.op("Equal", b.attribute("output_signed"), b.i64(0))
    nothing = b.op("Or", zero, b.op("And", negative, unsigned))
    under = b.op("Or", nothing, b.op("Less", codes, b.i64(1)))
    limited = b.op("Where", under, b.attribute("underflow"), b.op("Min", codes, most))
    signed = b.op("And", b.op("And", negative, b.op("Not", nothing)), b.op("Greater", limited, b.i64(0)))
    word = b.op("Add", limited, b.op("Where", signed, b.op("Add", most, b.i64(1)), b.i64(0)))
    b.cast_to_attribute(word, "output_type", "Y")


def _count_reached(b: Body, thresholds: str, values: str) -> str:
    """How many of sorted thresholds are at most each value, int64: a binary search."""
    size = b.op("Size", thresholds)
    powers = b.i64(_POWERS)
    steps = b.op("Compress", powers, b.op("LessOrEqual", powers, size))
    last = b.op("Sub", size, b.i64(1))
    start = b.op("Expand", b.i64(0), b.op("Shape", values))

    def step(s: Body, names: list[str]) -> list[str]:
        found, weight = names
        tried = s.op("Add", found, weight)
        inside = s.op("LessOrEqual", tried, size)
        index = s.op("Min", s.op("Sub", tried, s.i64(1)), last)
        # written as "not above" would make NaN the largest number
        reached = s.op("LessOrEqual", s.op("Gather", thresholds, index), values)
        return [s.op("Where", s.op("And", inside, reached), tried, found)]

    return b.scan([start], [steps], step)


# ---------------------------------------------------------------------------------------------------
# Linear accumulation (spec 4)


def _linear(b: Body, a: str, w: str) -> str:
    """Accumulators [B, G, M, N] of keys a [G, M, K] and w [G, N, K]; zero keys are `4·P`."""
    lanes = b.attribute("lanes")
    columns = b.at(b.op("Shape", "terms"), 1)
    bins = b.at(b.op("Shape", "terms"), 0)
    zero = b.cast32(b.op("Mul", columns, b.i64(4)))
    # by 4·P + signs: +, −, + (two negatives), unused; zeros for every sum with a zero key
    plus = b.op("Unsqueeze", "terms", b.i64([-1]))
    none = b.op("Sub", plus, plus)
    quads = b.op("Concat", plus, b.op("Neg", plus), plus, none, axis=-1)
    flat = b.reshape(quads, bins, b.op("Mul", columns, b.i64(4)))
    nothing = b.op("CastLike", b.i64(0), "terms")
    beyond = b.op("Expand", nothing, b.shape(bins, b.op("Add", b.op("Mul", columns, b.i64(4)), b.i64(1))))
    table = b.op("Concat", flat, beyond, axis=1)
    a_steps, w_steps = _steps(b, a, zero, lanes), _steps(b, w, zero, lanes)
    groups, rows = b.at(b.op("Shape", a), 0), b.at(b.op("Shape", a), 1)
    channels = b.at(b.op("Shape", w), 1)

    # Everything a loop captures is made out here: ONNX Runtime 1.32 loses values that the branch of an If makes and
    # a subgraph inside that branch captures.
    loops = {mode: _loop_inputs(b, mode, table, (bins, groups, rows, channels)) for mode in ("saturate", "wrap")}

    def run(mode: str, single: bool) -> Callable[[Body], str]:
        fit, fitted, start = loops[mode]

        def step(t: Body, names: list[str]) -> list[str]:
            acc, x, y = names
            if single:
                x, y = t.op("Squeeze", x, t.i64([0])), t.op("Squeeze", y, t.i64([0]))
            index = t.op("Add", t.op("Unsqueeze", x, t.i64([-1])), t.op("Unsqueeze", y, t.i64([-2])))
            # a single term is fitted in the table already
            terms = t.op("Gather", fitted if single else table, index, axis=1)
            if not single:
                terms = fit(t, t.op("ReduceSum", terms, t.i64([1]), keepdims=0), "psum_bits")
            return [fit(t, t.op("Add", acc, terms), "acc_bits")]

        return lambda s: s.scan([start], [a_steps, w_steps], step)

    saturate = b.op("Greater", b.attribute("saturate"), b.i64(0))
    return b.branch(
        b.op("Equal", lanes, b.i64(1)),
        lambda s: s.branch(saturate, run("saturate", True), run("wrap", True)),
        lambda s: s.branch(saturate, run("saturate", False), run("wrap", False)),
    )


def _loop_inputs(b: Body, mode: str, table: str, shape: tuple[str, str, str, str]) -> tuple[_Fit, str, str]:
    """How to fit, the table of fitted terms, and the initial accumulators (spec 4.4, 4.5)."""
    bins, groups, rows, channels = shape
    fit = _Fit(b, mode)
    fitted = fit(b, table, "psum_bits")
    # the bias starts bin 0
    bias = b.reshape(fit(b, "bias", "acc_bits"), b.i64(1), groups, b.i64(1), channels)
    which = b.reshape(b.op("Range", b.i64(0), bins, b.i64(1)), bins, b.i64([1, 1, 1]))
    first = b.op("Where", b.op("Equal", which, b.i64(0)), bias, b.op("CastLike", b.i64(0), "terms"))
    return fit, fitted, b.op("Expand", first, b.shape(bins, groups, rows, channels))


class _Fit:
    """Fitting to a width with the constants made outside the loop (spec 4.4)."""

    def __init__(self, outer: Body, mode: str):
        self.mode = mode
        self.made = {}
        for width in ("psum_bits", "acc_bits"):
            half = outer.power(outer.op("Sub", outer.attribute(width), outer.i64(1)))
            if mode == "saturate":
                limit = outer.op("CastLike", outer.op("Sub", half, outer.i64(1)), "terms")
                self.made[width] = (outer.op("Neg", limit), limit)
            else:
                mask = outer.op("Sub", outer.op("Mul", half, outer.i64(2)), outer.i64(1))
                self.made[width] = (outer.op("CastLike", half, "terms"), outer.op("CastLike", mask, "terms"))

    def __call__(self, b: Body, value: str, width: str) -> str:
        first, second = self.made[width]
        if self.mode == "saturate":
            return b.op("Min", b.op("Max", value, first), second)
        return b.op("Sub", b.op("BitwiseAnd", b.op("Add", value, first), second), first)


def _steps(b: Body, keys: str, zero: str, lanes: str) -> str:
    """Keys [G, M, K] as [steps, lanes, G, M], padded with zeros; at least one step."""
    shape = b.op("Shape", keys)
    depth = b.at(shape, 2)
    steps = b.op("Div", b.op("Sub", b.op("Add", depth, lanes), b.i64(1)), lanes)
    steps = b.op("Max", steps, b.i64(1))
    missing = b.op("Sub", b.op("Mul", steps, lanes), depth)
    padded = b.op("Pad", keys, b.shape(b.i64([0, 0, 0, 0, 0]), missing), zero)
    split = b.reshape(padded, b.at(shape, 0), b.at(shape, 1), steps, lanes)
    return b.op("Transpose", split, perm=[2, 3, 0, 1])


def _linear_words(b: Body, acc: str) -> tuple[str, str, str]:
    """Codes, signs and zeros [G, M, N] of accumulators [B, G, M, N] (spec 4.6)."""
    constants = b.reshape(b.cast64("constants"), b.i64([-1, 1, 1, 1]))
    total = b.op("ReduceSum", b.op("Mul", b.cast64(acc), constants), b.i64([0]), keepdims=0)
    raw = _count_reached(b, "thresholds", b.op("Abs", total))
    shape = b.op("Shape", total)
    shift = b.reshape("code_shift", b.at(shape, 0), b.i64(1), b.at(shape, 2))
    return b.op("Add", raw, shift), b.op("Less", total, b.i64(0)), b.op("Equal", total, b.i64(0))


# ---------------------------------------------------------------------------------------------------
# Log accumulation (spec 5)


class _Adder:
    """The LNS adder on keys (spec 5.2, 5.3), its table made once outside every loop."""

    def __init__(self, b: Body):
        plus, minus = b.cast32("delta_plus"), b.cast32("delta_minus")
        sizes = b.op("Max", b.op("Size", plus), b.op("Size", minus))
        rows = b.op("Add", sizes, b.i64(1))

        def padded(table: str, to: str) -> str:
            missing = b.op("Sub", to, b.op("Size", table))
            return b.op("Pad", table, b.shape(b.i64(0), missing), b.i32(0))

        same = b.op("Mul", padded(plus, rows), b.i32(4))
        differ = b.op("Mul", padded(minus, b.op("Add", rows, b.i64(1))), b.i32(-4))
        # equal codes of different sign cancel: down to below every code
        index = b.op("Range", b.i64(0), b.op("Add", rows, b.i64(1)), b.i64(1))
        differ = b.op("Where", b.op("Equal", index, b.i64(0)), b.i32(LOG_ZERO), differ)
        here = b.op("Slice", differ, b.i64([0]), b.op("Reshape", rows, b.i64([1])))
        following = b.op("Slice", differ, b.i64([1]), b.op("Reshape", b.op("Add", rows, b.i64(1)), b.i64([1])))
        columns = [b.op("Unsqueeze", t, b.i64([-1])) for t in (same, here, b.op("Sub", same, same), following)]
        # the difference of keys: 4·d for equal signs, 4·d ± 1 for different ones
        self.table = b.op("Reshape", b.op("Concat", *columns, axis=1), b.i64([-1]))
        self.last = b.cast32(b.op("Sub", b.op("Mul", rows, b.i64(4)), b.i64(1)))
        limit = b.op("Sub", b.power(b.attribute("acc_bits")), b.i64(1))
        self.limit = b.cast32(limit)
        self.top = b.cast32(b.op("Mul", limit, b.i64(4)))
        self.over = b.op("Add", self.top, b.i32(1))

    def __call__(self, b: Body, x: str, y: str) -> str:
        large = b.op("Max", x, y)
        difference = b.op("Sub", large, b.op("Min", x, y))
        change = b.op("Gather", self.table, b.op("Min", difference, self.last))
        total = b.op("Add", large, change)
        flushed = b.op("Where", b.op("Less", total, b.i32(4)), b.i32(LOG_ZERO), total)
        capped = b.op("Add", self.top, b.op("BitwiseAnd", flushed, b.i32(1)))
        return b.op("Where", b.op("Greater", flushed, self.over), capped, flushed)


def _enter(b: Body, codes: str, signs: str, nothing: str, limit: str) -> str:
    """int32 keys of int64 codes at the scale of 1/γ, relative to the accumulator (spec 5.1)."""
    scaled = b.op("Mul", codes, b.power(b.attribute("guard_bits")))
    capped = b.op("Min", scaled, b.cast64(limit))
    keys = b.op("Add", b.op("Mul", b.cast32(capped), b.i32(4)), b.cast32(signs))
    return b.op("Where", b.op("Or", nothing, b.op("Less", scaled, b.i64(1))), b.i32(LOG_ZERO), keys)


def _reduce_log(
    b: Body,
    start: str,
    sequences: list[str],
    entry: Callable[[Body, list[str], bool], str],
    adder: _Adder,
) -> str:
    """Add keys in the order of spec 5.4; `entry` makes [(lanes,) …] keys of a step's slices."""
    lanes = b.attribute("lanes")
    powers = b.i64([1 << i for i in range(10)])
    levels = b.op("ReduceSum", b.cast64(b.op("Less", powers, lanes)), b.i64([0]), keepdims=0)
    whole = b.power(levels)

    def single(s: Body) -> str:
        return s.scan([start], sequences, lambda t, names: [adder(t, names[0], entry(t, names[1:], True))])

    def tree(s: Body) -> str:
        def step(t: Body, names: list[str]) -> list[str]:
            keys = entry(t, names[1:], False)
            rank = t.op("Size", t.op("Shape", keys))
            # zeros up to a power of two are identities: the tree's shape stays that of spec 5.4
            others = t.op("Expand", t.i64(0), t.shape(t.op("Sub", t.op("Mul", rank, t.i64(2)), t.i64(1))))
            before = t.op("Slice", others, t.i64([0]), t.op("Reshape", rank, t.i64([1])))
            after = t.op("Slice", others, t.i64([0]), t.op("Reshape", t.op("Sub", rank, t.i64(1)), t.i64([1])))
            pads = t.shape(before, t.op("Sub", whole, lanes), after)
            padded = t.op("Pad", keys, pads, t.i32(LOG_ZERO))
            name = t._name("Loop")
            inner = Body(f"{name}_")
            count, condition, values = (f"{name}_{part}" for part in ("count", "condition", "values"))
            shape = inner.op("Shape", values)
            rest = inner.op("Slice", shape, inner.i64([1]), inner.i64([1 << 30]))
            pairs = inner.reshape(values, inner.op("Div", inner.at(shape, 0), inner.i64(2)), inner.i64(2), rest)
            even = inner.op("Gather", pairs, inner.i64(0), axis=1)
            odd = inner.op("Gather", pairs, inner.i64(1), axis=1)
            outputs = [inner.op("Identity", condition), inner.op("Identity", adder(inner, even, odd))]
            body = inner.graph([count, condition, values], outputs)
            # ONNX Runtime asks for the shapes of a Loop's counter and condition
            body.input[0].CopyFrom(helper.make_tensor_value_info(count, TensorProto.INT64, []))
            body.input[1].CopyFrom(helper.make_tensor_value_info(condition, TensorProto.BOOL, []))
            true = t.constant(True, TensorProto.BOOL)
            summed = t.op("Loop", levels, true, padded, body=body)
            # a Loop hides the shape, and a Scan wants that of its state
            own = t.op("Reshape", summed, t.op("Shape", names[0]))
            return [adder(t, names[0], own)]

        return s.scan([start], sequences, step)

    return b.branch(b.op("Equal", lanes, b.i64(1)), single, tree)


def _log(b: Body, x: str, w: str, arrange: Callable[[str, str, str], tuple[str, str]]) -> tuple[str, str, str]:
    """Codes, signs and zeros [G, M, N] of dot products of words.

    `arrange` takes the operands' keys and the key of zero, and gives keys [G, M, K] and [G, N, K].
    """
    adder = _Adder(b)
    least = b.op("ReduceMin", "entry_shift", b.i64([0]), keepdims=0)
    spread = b.op("Sub", "entry_shift", least)
    largest = b.op("Add", _largest(b, "activation"), _largest(b, "weight"))
    reach = b.op("Add", b.op("Add", largest, b.op("ReduceMax", spread, b.i64([0]), keepdims=0)), b.i64(1))
    zero64 = b.op("Mul", reach, b.i64(4))
    zero = b.cast32(zero64)
    # each output channel's own shift goes into its weights' keys
    rank = b.op("Size", b.op("Shape", w))
    spread_shape = b.shape(b.i64(-1), b.op("Expand", b.i64(1), b.shape(b.op("Sub", rank, b.i64(1)))))
    shift = b.op("Reshape", b.cast32(spread), spread_shape)
    a_keys = _keys(b, x, "activation", zero)
    w_keys = _keys(b, w, "weight", zero, shift)
    a, v = arrange(a_keys, w_keys, zero)
    # by 4·P + signs, as in the linear case: the accumulator's key of a product (spec 5.1)
    index = b.op("Range", b.i64(0), b.op("Add", b.op("Mul", zero64, b.i64(2)), b.i64(1)), b.i64(1))
    flags = b.op("BitwiseAnd", index, b.i64(3))
    codes = b.op("Add", b.op("Div", index, b.i64(4)), least)
    beyond = b.op("GreaterOrEqual", index, zero64)
    table = _enter(b, codes, b.op("Equal", flags, b.i64(1)), beyond, adder.limit)
    lanes = b.attribute("lanes")
    a_steps, w_steps = _steps(b, a, zero, lanes), _steps(b, v, zero, lanes)
    groups, rows = b.at(b.op("Shape", a), 0), b.at(b.op("Shape", a), 1)
    channels = b.at(b.op("Shape", v), 1)
    # the bias: sign · 2^acc_bits + code (spec 5.5)
    bias_code = b.op("BitwiseAnd", "bias", b.cast64(adder.limit))
    bias_sign = b.op("Greater", "bias", b.cast64(adder.limit))
    keys = b.op("Add", b.op("Mul", b.cast32(bias_code), b.i32(4)), b.cast32(bias_sign))
    keys = b.op("Where", b.op("Equal", bias_code, b.i64(0)), b.i32(LOG_ZERO), keys)
    start = b.op("Expand", b.reshape(keys, groups, b.i64(1), channels), b.shape(groups, rows, channels))

    def entry(t: Body, names: list[str], single: bool) -> str:
        p, q = names
        if single:
            p, q = t.op("Squeeze", p, t.i64([0])), t.op("Squeeze", q, t.i64([0]))
        both = t.op("Add", t.op("Unsqueeze", p, t.i64([-1])), t.op("Unsqueeze", q, t.i64([-2])))
        return t.op("Gather", table, both)

    acc = _reduce_log(b, start, [a_steps, w_steps], entry, adder)
    return _from_log(b, acc, b.reshape("code_shift", groups, b.i64(1), channels))


def _largest(b: Body, side: str) -> str:
    """The largest widened code of an operand, int64."""
    return b.op("Mul", _mask(b, f"{side}_bits", f"{side}_signed"), b.attribute(f"{side}_widen"))


def _from_log(b: Body, keys: str, shift: str, divisor: str | None = None) -> tuple[str, str, str]:
    """Codes, signs and zeros of accumulator keys (spec 5.6, 6.5)."""
    zero = b.op("Less", keys, b.i32(4))
    codes = b.cast64(b.op("Div", b.op("Max", keys, b.i32(0)), b.i32(4)))
    if divisor is not None:
        codes = b.op("Max", b.op("Sub", codes, divisor), b.i64(0))
        zero = b.op("Or", zero, b.op("Equal", codes, b.i64(0)))
    scale = b.power(b.attribute("guard_bits"))
    half = b.op("Div", scale, b.i64(2))
    rounded = b.op("Div", b.op("Add", codes, half), scale)
    negative = b.op("Equal", b.op("BitwiseAnd", keys, b.i32(1)), b.i32(1))
    return b.op("Add", rounded, shift), b.op("And", negative, b.op("Not", zero)), zero


# ---------------------------------------------------------------------------------------------------
# Windows (spec 7.1): attributes describe three spatial axes, leading ones added


def _patches(b: Body, x: str, fill: str) -> tuple[str, str, list[str]]:
    """int32 x [B, C, (1 to 3 axes)] as [B, C, k0, o0, k1, o1, k2, o2]; the spatial rank; the sizes [o0, o1, o2]."""
    shape = b.op("Shape", x)
    rank = b.op("Sub", b.op("Size", shape), b.i64(2))
    ones = b.op("Expand", b.i64(1), b.shape(b.op("Sub", b.i64(3), rank)))
    head, tail = (
        b.op("Slice", shape, b.i64([0]), b.i64([2])),
        b.op("Slice", shape, b.i64([2]), b.i64([5])),
    )
    cube = b.reshape(x, head, ones, tail)
    pads = b.attribute("pads", several=True)
    begin, end = b.op("Slice", pads, b.i64([0]), b.i64([3])), b.op("Slice", pads, b.i64([3]), b.i64([6]))
    value = b.op("Pad", cube, b.shape(b.i64([0, 0]), begin, b.i64([0, 0]), end), fill)
    sizes = b.op("Shape", value)
    outs: list[str] = []
    for axis in (2, 1, 0):
        kernel, stride, dilation = (
            b.at(b.attribute(name, several=True), axis) for name in ("kernel_shape", "strides", "dilations")
        )
        reach = b.op("Add", b.op("Mul", dilation, b.op("Sub", kernel, b.i64(1))), b.i64(1))
        room = b.op("Sub", b.at(sizes, 2 + axis), reach)
        out = b.op("Add", b.op("Div", room, stride), b.i64(1))
        inside = b.op("Mul", b.op("Range", b.i64(0), kernel, b.i64(1)), dilation)
        starts = b.op("Mul", b.op("Range", b.i64(0), out, b.i64(1)), stride)
        index = b.op("Add", b.op("Unsqueeze", inside, b.i64([1])), b.op("Unsqueeze", starts, b.i64([0])))
        value = b.op("Gather", value, index, axis=2 + axis)
        outs.insert(0, out)
    return value, rank, outs


def _spatial(b: Body, outs: list[str], rank: str) -> str:
    """The last `rank` of the three output sizes."""
    from_ = b.op("Reshape", b.op("Sub", b.i64(3), rank), b.i64([1]))
    return b.op("Slice", b.shape(*outs), from_, b.i64([3]))


def _convolve(b: Body, keys: str, zero: str) -> tuple[str, Callable[[str], str]]:
    """Keys [B, C, …] as [G, M, K], and how [G, M, N] words become [B, G·N, …]."""
    value, rank, outs = _patches(b, keys, zero)
    shape = b.op("Shape", value)
    batch, groups = b.at(shape, 0), b.attribute("group")
    each = b.op("Div", b.at(shape, 1), groups)
    kernels = [b.at(shape, i) for i in (2, 4, 6)]
    split = b.reshape(value, batch, groups, each, kernels[0], outs[0], kernels[1], outs[1], kernels[2], outs[2])
    ordered = b.op("Transpose", split, perm=[1, 0, 4, 6, 8, 2, 3, 5, 7])
    rows, depth = batch, each
    for out, kernel in zip(outs, kernels, strict=True):
        rows, depth = b.op("Mul", rows, out), b.op("Mul", depth, kernel)
    matrix = b.reshape(ordered, groups, rows, depth)

    def back(result: str) -> str:
        channels = b.at(b.op("Shape", result), 2)
        split = b.reshape(result, groups, batch, *outs, channels)
        ordered = b.op("Transpose", split, perm=[1, 0, 5, 2, 3, 4])
        return b.reshape(ordered, batch, b.op("Mul", groups, channels), _spatial(b, outs, rank))

    return matrix, back


def _grouped_weights(b: Body, keys: str) -> str:
    """Weight keys [O, C/G, …] as [G, O/G, K]."""
    groups = b.attribute("group")
    shape = b.op("Shape", keys)
    outputs = b.at(shape, 0)
    rest = b.op("ReduceProd", b.op("Slice", shape, b.i64([1]), b.i64([5])), b.i64([0]), keepdims=0)
    return b.reshape(keys, groups, b.op("Div", outputs, groups), rest)


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
    """

    name: str
    summary: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    attributes: tuple[Value, ...]
    make: Callable[[Body], None]


_WORDS = "uint8 or uint16"
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


def _y(shape: str = "") -> tuple[Value, ...]:
    return (Value("Y", f"{_WORDS}{shape}", "Words of the output format."),)


def _rows(b: Body, keys: str) -> str:
    shape = b.op("Shape", keys)
    return b.reshape(keys, b.i64(1), _row_count(b, shape), b.op("Slice", shape, b.i64([-1]), b.i64([1 << 30])))


def _row_count(b: Body, shape: str) -> str:
    return b.op("ReduceProd", b.op("Slice", shape, b.i64([0]), b.i64([-1])), b.i64([0]), keepdims=0)


def _gemm_result(b: Body, x: str, *results: str) -> list[str]:
    """[1, M, N] as [..., N]."""
    shape = b.op("Shape", x)
    head = b.op("Slice", shape, b.i64([0]), b.i64([-1]))
    return [b.reshape(r, head, b.op("Slice", b.op("Shape", r), b.i64([2]), b.i64([3]))) for r in results]


def _make_linear_gemm(b: Body) -> None:
    zero = b.cast32(b.op("Mul", b.at(b.op("Shape", "terms"), 1), b.i64(4)))
    a = _rows(b, _keys(b, "X", "activation", zero))
    w = b.op("Unsqueeze", _keys(b, "W", "weight", zero), b.i64([0]))
    _words(b, *_gemm_result(b, "X", *_linear_words(b, _linear(b, a, w))))


def _make_linear_conv(b: Body) -> None:
    zero = b.cast32(b.op("Mul", b.at(b.op("Shape", "terms"), 1), b.i64(4)))
    a, back = _convolve(b, _keys(b, "X", "activation", zero), zero)
    w = _grouped_weights(b, _keys(b, "W", "weight", zero))
    _words(b, *(back(part) for part in _linear_words(b, _linear(b, a, w))))


def _make_log_gemm(b: Body) -> None:
    def arrange(a: str, w: str, zero: str) -> tuple[str, str]:
        return _rows(b, a), b.op("Unsqueeze", w, b.i64([0]))

    _words(b, *_gemm_result(b, "X", *_log(b, "X", "W", arrange)))


def _make_log_conv(b: Body) -> None:
    backs = []

    def arrange(a: str, w: str, zero: str) -> tuple[str, str]:
        matrix, back = _convolve(b, a, zero)
        backs.append(back)
        return matrix, _grouped_weights(b, w)

    parts = _log(b, "X", "W", arrange)
    _words(b, *(backs[0](part) for part in parts))


def _make_encode(b: Body) -> None:
    nothing = b.op("CastLike", b.i64(0), "X")
    negative = b.op("Less", "X", nothing)
    unsigned = b.op("Equal", b.attribute("output_signed"), b.i64(0))
    magnitude = b.op("Where", b.op("And", negative, unsigned), nothing, b.op("Abs", "X"))
    codes = _count_reached(b, "thresholds", magnitude)
    minus = b.op("And", b.op("And", negative, b.op("Not", unsigned)), b.op("Greater", codes, b.i64(0)))
    bit = b.op("Add", _mask(b, "output_bits", "output_signed"), b.i64(1))
    word = b.op("Add", codes, b.op("Where", minus, bit, b.i64(0)))
    b.cast_to_attribute(word, "output_type", "Y")


def _make_decode(b: Body) -> None:
    b.op("Gather", "table", b.cast32("X"), output="Y")


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
    value, rank, outs = _patches(b, _ordered(b), b.i32(LOWEST))
    best = b.op("ReduceMax", value, b.i64([2, 4, 6]), keepdims=0)
    head = b.op("Slice", b.op("Shape", best), b.i64([0]), b.i64([2]))
    _unordered(b, b.reshape(best, head, _spatial(b, outs, rank)))


def _entered(b: Body, x: str, side: str, adder: _Adder) -> str:
    codes, signs = _codes(b, x, f"{side}_bits", f"{side}_signed")
    shifted = b.op("Add", b.cast64(codes), b.attribute(f"{side}_shift"))
    return _enter(b, shifted, signs, b.op("Equal", codes, b.i32(0)), adder.limit)


def _make_add(b: Body) -> None:
    adder = _Adder(b)
    total = adder(b, _entered(b, "A", "a", adder), _entered(b, "B", "b", adder))
    _words(b, *_from_log(b, total, b.attribute("code_shift")))


def _make_average_pool(b: Body) -> None:
    adder = _Adder(b)
    value, rank, outs = _patches(b, _entered(b, "X", "input", adder), b.i32(LOG_ZERO))
    shape = b.op("Shape", value)
    ordered = b.op("Transpose", value, perm=[2, 4, 6, 0, 1, 3, 5, 7])
    batch, channels = b.at(shape, 0), b.at(shape, 1)
    depth = b.op("Mul", b.op("Mul", b.at(shape, 2), b.at(shape, 4)), b.at(shape, 6))
    # [1, rest, K] is the layout that steps are made of
    matrix = b.op("Transpose", b.reshape(ordered, b.i64(1), depth, b.i64(-1)), perm=[0, 2, 1])
    steps = _steps(b, matrix, b.i32(LOG_ZERO), b.attribute("lanes"))
    rest = b.op("Slice", b.op("Shape", matrix), b.i64([0]), b.i64([2]))
    start = b.op("Expand", b.i32(LOG_ZERO), rest)

    def entry(t: Body, names: list[str], single: bool) -> str:
        return t.op("Squeeze", names[0], t.i64([0])) if single else names[0]

    acc = b.reshape(_reduce_log(b, start, [steps], entry, adder), batch, channels, *outs)
    codes, signs, zero = _from_log(b, acc, b.attribute("code_shift"), "log_counts")
    back = b.shape(batch, channels, _spatial(b, outs, rank))
    _words(b, *(b.op("Reshape", part, back, allowzero=1) for part in (codes, signs, zero)))


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
    ),
    Operator(
        "Decode",
        "The float32 nearest to each word's value (spec 2.5).",
        (_X, Value("table", "float [2^bits]", "The value of every word.")),
        (Value("Y", "float", "Values."),),
        (),
        _make_decode,
    ),
    Operator(
        "LinearGemm",
        "Matrix product with linear accumulation (spec 3, 4).",
        (_GEMM_X, _GEMM_W, *_LINEAR_INPUTS),
        _y(" [..., N]"),
        (*_OPERANDS, *_LINEAR, *_OUTPUT),
        _make_linear_gemm,
    ),
    Operator(
        "LinearConv",
        "Convolution with linear accumulation (spec 3, 4, 7.1).",
        (_CONV_X, _CONV_W, *_LINEAR_INPUTS),
        _y(" [B, O, 1 to 3 axes]"),
        (*_OPERANDS, *_LINEAR, *_OUTPUT, *_WINDOW, *_GROUP),
        _make_linear_conv,
    ),
    Operator(
        "LogGemm",
        "Matrix product with log accumulation (spec 3, 5).",
        (_GEMM_X, _GEMM_W, *_LOG_INPUTS),
        _y(" [..., N]"),
        (*_OPERANDS, *_LOG, *_OUTPUT),
        _make_log_gemm,
    ),
    Operator(
        "LogConv",
        "Convolution with log accumulation (spec 3, 5, 7.1).",
        (_CONV_X, _CONV_W, *_LOG_INPUTS),
        _y(" [B, O, 1 to 3 axes]"),
        (*_OPERANDS, *_LOG, *_OUTPUT, *_WINDOW, *_GROUP),
        _make_log_conv,
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
    ),
    Operator(
        "MaxPool",
        "The largest value of each window; padding never wins (spec 6.1).",
        (Value("X", f"{_WORDS} [B, C, 1 to 3 axes]", "Words."),),
        _y(" [B, C, 1 to 3 axes]"),
        (*_FORMAT, *_WINDOW),
        _make_max_pool,
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
    ),
    Operator(
        "AveragePool",
        "Average of each window by the LNS adder (spec 6.5); the sum where log_counts is zero.",
        (
            Value("X", f"{_WORDS} [B, C, 1 to 3 axes]", "Words; padding is the zero word."),
            *_DELTAS,
            Value("log_counts", "int64 [o0, o1, o2]", "round(γ_acc·log2 n) at each output position."),
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
    body = function(operator.name)
    kinds = sorted({node.op_type for node in body.node})
    lines += [
        "## Function body",
        "",
        f"{len(body.node)} nodes of opset {OPSET}: {', '.join(kinds)}.",
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
