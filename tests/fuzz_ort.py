"""Malformed models of the LNS operators in ONNX Runtime, by the native library.

`python tests/fuzz_ort.py --count 10000`. Each model is a valid node of one operator with a few things wrong:
attributes, shapes, element types, sizes and contents of tables, inputs that are missing. It may run or be refused, with
a message; what it may not do is end the process or never end. Models run in child processes, so that one that does is
found by its seed; then the exit status is 1.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import AttributeProto, ModelProto, NodeProto, helper, numpy_helper

from lnsdeploy.datapath import Accumulator, Datapath, LinearAccumulator, LogAccumulator, default_adder
from lnsdeploy.delta import Exact, Max, Table
from lnsdeploy.emulator import native, reference
from lnsdeploy.emulator.plan import AddPlan, DotPlan, PoolPlan, RescalePlan, Window
from lnsdeploy.errors import UnsupportedError
from lnsdeploy.exporters import functions, nodes
from lnsdeploy.formats import LNSFormat

Array = np.ndarray[Any, Any]

# ---------------------------------------------------------------------------------------------------------------------
# Single nodes


@dataclass(frozen=True)
class Case:
    """One node.

    Args:
        op: its operator.
        inputs: by name, in order.
        words: how many of them, from the first, are activations rather than the model's own.
        attributes: as in the node.
        output: dtype of the result.
    """

    op: str
    inputs: dict[str, Array]
    words: int
    attributes: dict[str, Any]
    output: Any


def dot_case(
    plan: DotPlan, x: Array, w: Array, bias: Array | None, window: Window | None = None, groups: int = 1
) -> Case:
    """A product, or with a window a convolution."""
    linear = plan.datapath.is_linear
    tables = (nodes.linear_tables if linear else nodes.log_tables)(plan, w.shape[0], bias)
    attributes: dict[str, Any] = dict(nodes._dot_attributes(plan))
    if window is not None:
        attributes |= {**nodes._window_attributes(window), "group": groups}
    op = ("Linear" if linear else "Log") + ("Gemm" if window is None else "Conv")
    return Case(op, {"X": x, "W": w, **tables}, 1, attributes, plan.output.dtype)


def matmul_case(plan: DotPlan, a: Array, b: Array) -> Case:
    linear = plan.datapath.is_linear
    tables = dict((nodes.linear_tables if linear else nodes.log_tables)(plan, 1, None))
    del tables["bias"]
    attributes = nodes._dot_attributes(plan) | {"code_shift": int(tables.pop("code_shift")[0])}
    return Case("LinearMatMul" if linear else "LogMatMul", {"A": a, "B": b, **tables}, 2, attributes, plan.output.dtype)


def add_case(plan: AddPlan, a: Array, b: Array) -> Case:
    part = plan.accumulator
    attributes = {
        **nodes._format_attributes("a", plan.a),
        "a_shift": plan.a_offset - plan.acc_offset,
        **nodes._format_attributes("b", plan.b),
        "b_shift": plan.b_offset - plan.acc_offset,
        "acc_bits": part.bits,
        "guard_bits": part.guard_bits,
        "code_shift": plan.acc_offset - plan.output_offset,
        **nodes._output_attributes(plan.output, plan.underflow),
    }
    return Case(
        "Add", {"A": a, "B": b, **nodes._delta_inputs(part, plan.output.gamma)}, 2, attributes, plan.output.dtype
    )


def average_case(plan: PoolPlan, x: Array, window: Window, counts: Array) -> Case:
    part = plan.accumulator
    attributes = {
        **nodes._format_attributes("input", plan.input),
        "input_shift": plan.input_offset - plan.acc_offset,
        "lanes": part.lanes,
        "acc_bits": part.bits,
        "guard_bits": part.guard_bits,
        "code_shift": plan.acc_offset - plan.output_offset,
        **nodes._output_attributes(plan.output, plan.underflow),
        **nodes._window_attributes(window),
    }
    tables = nodes._delta_inputs(part, plan.input.gamma)
    tables["log_counts"] = counts.astype(np.int64).reshape((1,) * (3 - counts.ndim) + counts.shape)
    return Case("AveragePool", {"X": x, **tables}, 1, attributes, plan.output.dtype)


def rescale_case(plan: RescalePlan, x: Array) -> Case:
    attributes = {
        **nodes._format_attributes("input", plan.input),
        "input_offset": plan.input_offset,
        "multiply": max(plan.output.gamma // plan.input.gamma, 1),
        "divide": max(plan.input.gamma // plan.output.gamma, 1),
        "output_offset": plan.output_offset,
        **nodes._output_attributes(plan.output, plan.underflow),
    }
    return Case("Rescale", {"X": x}, 1, attributes, plan.output.dtype)


def encode_case(fmt: LNSFormat, offset: int, underflow: str, x: Array) -> Case:
    attributes = nodes._output_attributes(fmt, underflow)
    attributes.pop("underflow")
    thresholds = nodes.encode_thresholds(fmt, offset, underflow)
    return Case("Encode", {"X": x, "thresholds": thresholds}, 1, attributes, fmt.dtype)


def decode_case(fmt: LNSFormat, offset: int, x: Array) -> Case:
    return Case("Decode", {"X": x, "table": nodes.decode_values(fmt, offset)}, 1, {}, np.float32)


def relu_case(fmt: LNSFormat, x: Array) -> Case:
    return Case("Relu", {"X": x}, 1, nodes._format_attributes("", fmt), fmt.dtype)


def clip_case(fmt: LNSFormat, low: int, high: int, x: Array) -> Case:
    return Case("Clip", {"X": x}, 1, {**nodes._format_attributes("", fmt), "low": low, "high": high}, fmt.dtype)


def max_pool_case(fmt: LNSFormat, x: Array, window: Window) -> Case:
    attributes = {**nodes._format_attributes("", fmt), **nodes._window_attributes(window)}
    return Case("MaxPool", {"X": x}, 1, attributes, fmt.dtype)


def element_type(dtype: Any) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def node_of(case: Case) -> NodeProto:
    return helper.make_node(case.op, list(case.inputs), ["Y"], name="node", domain=functions.DOMAIN, **case.attributes)


def model_of(case: Case, variable: set[str] | None = None, bodies: bool = True) -> ModelProto:
    """A model of one node.

    Args:
        variable: inputs of the node that are inputs of the model; by default the activations. The others are constants.
        bodies: with the operator's function.
    """
    if variable is None:
        variable = set(list(case.inputs)[: case.words])
    graph = helper.make_graph(
        [node_of(case)],
        "one",
        [
            helper.make_tensor_value_info(name, element_type(value.dtype), None)
            for name, value in case.inputs.items()
            if name in variable
        ],
        [helper.make_tensor_value_info("Y", element_type(case.output), None)],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in case.inputs.items() if n not in variable],
    )
    return helper.make_model(
        graph,
        opset_imports=[
            helper.make_opsetid("", functions.OPSET),
            helper.make_opsetid(functions.DOMAIN, functions.VERSION),
        ],
        functions=functions.functions({case.op}) if bodies else [],
        ir_version=functions.IR_VERSION,
    )


def session_of(made: ModelProto, path: Path | None) -> onnxruntime.InferenceSession:
    """A session, with the native library or, without a path, by function bodies."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if path is not None:
        options.register_custom_ops_library(str(path))
    return onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def library() -> Path | None:
    """The native library, or None if it has not been built."""
    found: Path | None = native.library_path()
    return found


@cache
def counter(path: Path) -> Callable[[], int]:
    """How many computations the library has done in this process."""
    runs = ctypes.CDLL(str(path)).lns_ort_runs
    runs.restype = ctypes.c_int64
    found: Callable[[], int] = runs
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Valid nodes at random


def words(rng: np.random.Generator, fmt: LNSFormat, shape: tuple[int, ...]) -> Array:
    made = rng.integers(0, 1 << fmt.bits, shape)
    return np.asarray(np.where(rng.random(shape) < 0.15, 0, made).astype(fmt.dtype))


def a_format(rng: np.random.Generator, gamma: int) -> LNSFormat:
    return LNSFormat(int(rng.choice([2, 3, 4, 6, 8, 8, 9, 10])), gamma, bool(rng.random() < 0.7))


def _log_accumulator(rng: np.random.Generator) -> LogAccumulator:
    how = [Exact(), Table(20, 2), Max()][rng.integers(3)]
    return LogAccumulator(int(rng.integers(6, 13)), int(rng.integers(0, 3)), int(rng.choice([1, 1, 2, 3, 5])), how)


def _linear_accumulator(rng: np.random.Generator, gamma: int) -> LinearAccumulator:
    return LinearAccumulator(
        int(rng.choice([8, 14, 20, 24, 33, 44])),
        conversion=["product", "bin"][rng.integers(2)],
        table_bits=int(rng.integers(0, gamma.bit_length())),
        constant_bits=int(rng.integers(0, 11)),
        lanes=int(rng.choice([1, 1, 2, 3, 8])),
        psum_bits=[None, 12, 30][rng.integers(3)],
        overflow=["wrap", "saturate"][rng.integers(2)],
        encoder=["exact", "mitchell"][rng.integers(2)],
    )


def dot_plan(rng: np.random.Generator, linear: bool) -> DotPlan:
    """A plan whose accumulator stands near the products."""
    gamma = int(rng.choice([2, 4, 8]))
    gammas = [gamma, gamma if rng.random() < 0.7 else 1]
    rng.shuffle(gammas)
    activation, weight = (a_format(rng, g) for g in gammas)
    part: Accumulator = _linear_accumulator(rng, gamma) if linear else _log_accumulator(rng)
    output = a_format(rng, gamma)
    rule = ["zero", "min"][rng.integers(2)]
    path = Datapath("fuzz", weight, activation, output, part, default_adder(output), rule)
    largest = activation.max_code * (gamma // activation.gamma) + weight.max_code * (gamma // weight.gamma)
    middle = largest // 2
    offset = middle - output.max_code // 2 + int(rng.integers(-9, 9))
    if linear:
        return DotPlan(path, activation, weight, output, 0, 0, offset, lsb=middle // gamma - part.bits // 2)
    reach = (1 << part.bits) >> part.guard_bits
    return DotPlan(path, activation, weight, output, 0, 0, offset, acc_offset=middle - reach // 2)


def _window(rng: np.random.Generator, padding_only: bool) -> tuple[tuple[int, ...], Window]:
    """A spatial shape and a window; without `padding_only` every window has an element."""
    axes = int(rng.integers(1, 4))
    kernel = [int(k) for k in rng.integers(1, 4 if axes < 3 else 3, axes)]
    dilations = [int(d) for d in rng.integers(1, 3, axes)]
    each = list(zip(kernel, dilations, strict=True))
    most = [2 if padding_only else 0 if k == 1 else min((k if d == 1 else d) - 1, 2) for k, d in each]
    pads = [int(rng.integers(0, m + 1)) for m in most + most]
    spatial = tuple(int(d * (k - 1) + 1 + rng.integers(0, 4)) for k, d in each)
    return spatial, Window(
        tuple(kernel), tuple(int(s) for s in rng.integers(1, 4, axes)), tuple(pads), tuple(dilations)
    )


def _shape(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(n) for n in rng.integers(0 if rng.random() < 0.2 else 1, 6, rng.integers(0, 5)))


def _dot(rng: np.random.Generator, linear: bool, convolution: bool) -> Case:
    plan = dot_plan(rng, linear)
    window, groups = None, 1
    if convolution:
        spatial, window = _window(rng, True)
        groups, inputs = int(rng.integers(1, 3)), int(rng.integers(1, 4))
        channels = groups * int(rng.integers(1, 4))
        x = words(rng, plan.activation, (int(rng.integers(0, 3)), groups * inputs, *spatial))
        w = words(rng, plan.weight, (channels, inputs, *window.kernel))
    else:
        depth = int(rng.integers(0 if rng.random() < 0.1 else 1, 20))
        channels = int(rng.integers(0 if linear and rng.random() < 0.1 else 1, 8))
        x, w = words(rng, plan.activation, (*_shape(rng), depth)), words(rng, plan.weight, (channels, depth))
    part = plan.datapath.accumulate
    high = (2 << part.bits) - 1 if isinstance(part, LogAccumulator) else 1 << (part.bits - 1)
    bias = rng.integers(0 if isinstance(part, LogAccumulator) else -high, high, channels)
    return dot_case(plan, x, w, bias if rng.random() < 0.7 else None, window, groups)


def _matmul(rng: np.random.Generator, linear: bool) -> Case:
    plan, lead = dot_plan(rng, linear), _shape(rng)[:2]
    rows, depth = (int(n) for n in rng.integers(0 if rng.random() < 0.1 else 1, 8, 2))
    columns = int(rng.integers(1, 8))
    a, b = words(rng, plan.activation, (*lead, rows, depth)), words(rng, plan.weight, (*lead, depth, columns))
    return matmul_case(plan, a, b)


def _add_plan(rng: np.random.Generator) -> AddPlan:
    gamma = int(rng.choice([1, 4, 8]))
    part, (a, b, out) = _log_accumulator(rng), (a_format(rng, gamma) for _ in range(3))
    reach = (1 << part.bits) >> part.guard_bits
    offsets = [int(rng.integers(-9, 9)) + (a.max_code - f.max_code) // 2 for f in (b, out)]
    return AddPlan(part, a, b, out, 0, *offsets, a.max_code // 2 - reach // 2, ["zero", "min"][rng.integers(2)])


def _add(rng: np.random.Generator) -> Case:
    plan, shape = _add_plan(rng), _shape(rng)
    shapes = []
    for _ in range(2):
        kept = [1 if rng.random() < 0.3 else n for n in shape]
        shapes.append(tuple(kept[int(rng.integers(0, len(kept) + 1)) if rng.random() < 0.3 else 0 :]))
    return add_case(plan, words(rng, plan.a, shapes[0]), words(rng, plan.b, shapes[1]))


def _average(rng: np.random.Generator) -> Case:
    made = _add_plan(rng)
    plan = PoolPlan(made.accumulator, made.a, made.output, 0, made.output_offset, made.acc_offset, made.underflow)
    spatial, window = _window(rng, False)
    counts = reference.log_counts(spatial, plan, window, bool(rng.random() < 0.5))
    x = words(rng, plan.input, (int(rng.integers(0, 3)), int(rng.integers(1, 4)), *spatial))
    return average_case(plan, x, window, counts if rng.random() < 0.7 else np.zeros(1))


def _max_pool(rng: np.random.Generator) -> Case:
    fmt = a_format(rng, 4)
    spatial, window = _window(rng, False)
    return max_pool_case(fmt, words(rng, fmt, (int(rng.integers(0, 3)), int(rng.integers(1, 4)), *spatial)), window)


def _rescale(rng: np.random.Generator) -> Case:
    gammas = [int(g) for g in rng.choice([1, 2, 4, 8], 2)]
    given, made = (a_format(rng, g) for g in gammas)
    plan = RescalePlan(given, made, *(int(o) for o in rng.integers(-30, 30, 2)), ["zero", "min"][rng.integers(2)])
    return rescale_case(plan, words(rng, given, _shape(rng)))


def _encode(rng: np.random.Generator) -> Case:
    fmt, offset = a_format(rng, int(rng.choice([1, 3, 8]))), int(rng.integers(-100, 100))
    x = nodes.decode_values(replace(fmt, signed=False), offset)[rng.integers(0, fmt.max_code + 1, _shape(rng))]
    x = np.asarray(x * np.exp2(rng.normal(0, 0.3, x.shape)) * rng.choice([-1, 1], x.shape), dtype=np.float32)
    return encode_case(fmt, offset, ["zero", "min"][rng.integers(2)], x)


def _decode(rng: np.random.Generator) -> Case:
    fmt = a_format(rng, int(rng.choice([1, 3, 8])))
    return decode_case(fmt, int(rng.integers(-100, 100)), words(rng, fmt, _shape(rng)))


def _relu(rng: np.random.Generator) -> Case:
    fmt = a_format(rng, 4)
    return relu_case(fmt, words(rng, fmt, _shape(rng)))


def _clip(rng: np.random.Generator) -> Case:
    fmt = a_format(rng, 4)
    low, high = sorted(int(v) for v in rng.integers(-fmt.max_code if fmt.signed else 0, fmt.max_code + 1, 2))
    return clip_case(fmt, low, high, words(rng, fmt, _shape(rng)))


MAKERS: dict[str, Callable[[np.random.Generator], Case]] = {
    "Encode": _encode,
    "Decode": _decode,
    "LinearGemm": lambda rng: _dot(rng, True, False),
    "LinearConv": lambda rng: _dot(rng, True, True),
    "LogGemm": lambda rng: _dot(rng, False, False),
    "LogConv": lambda rng: _dot(rng, False, True),
    "LinearMatMul": lambda rng: _matmul(rng, True),
    "LogMatMul": lambda rng: _matmul(rng, False),
    "Relu": _relu,
    "Clip": _clip,
    "MaxPool": _max_pool,
    "Add": _add,
    "AveragePool": _average,
    "Rescale": _rescale,
}


def valid(op: str, seed: int) -> Case:
    """A node that fits its operator's page."""
    rng = np.random.default_rng([seed, list(MAKERS).index(op)])
    while True:
        try:
            return MAKERS[op](rng)
        except UnsupportedError:  # sums of a step beyond 64 bits
            continue


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with them

# No sizes between: what they ask for would be granted, and take minutes.
_INTEGERS = [
    -(1 << 63),
    -(1 << 31),
    -2,
    -1,
    0,
    1,
    2,
    3,
    5,
    8,
    9,
    16,
    17,
    63,
    64,
    1 << 31,
    1 << 40,
    1 << 62,
    (1 << 63) - 1,
]
_DTYPES = [
    np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64, np.float16, np.float32,
    np.float64, np.bool_,
]  # fmt: skip


@dataclass
class Draft:
    """A model being spoilt.

    Args:
        made: the model; its node is the only one.
        arrays: contents of the node's inputs.
        variable: those that are inputs of the model.
    """

    made: ModelProto
    arrays: dict[str, Array]
    variable: set[str]
    what: list[str] = field(default_factory=list)

    @property
    def node(self) -> NodeProto:
        return self.made.graph.node[0]


def _drop_attribute(draft: Draft, rng: random.Random) -> None:
    if draft.node.attribute:
        del draft.node.attribute[rng.randrange(len(draft.node.attribute))]


def _change_integer(draft: Draft, rng: random.Random) -> None:
    found = [a for a in draft.node.attribute if a.type in (AttributeProto.INT, AttributeProto.INTS)]
    if not found:
        return
    attribute = rng.choice(found)

    def changed(value: int) -> int:
        near = rng.choice([-1, 1]) + value
        return near if abs(near) < 1 << 62 and rng.random() < 0.4 else rng.choice(_INTEGERS)

    if attribute.type == AttributeProto.INT:
        attribute.i = changed(attribute.i)
    elif attribute.ints:
        index = rng.randrange(len(attribute.ints))
        attribute.ints[index] = changed(attribute.ints[index])


def _change_attribute_type(draft: Draft, rng: random.Random) -> None:
    if not draft.node.attribute:
        return
    attribute = rng.choice(draft.node.attribute)
    value = rng.choice([1.5, "text", [1.5, 2.5], 3, [1, 2], np.zeros(2)])
    if isinstance(value, np.ndarray):
        value = numpy_helper.from_array(value)
    attribute.CopyFrom(helper.make_attribute(attribute.name, value))


def _change_length(draft: Draft, rng: random.Random) -> None:
    found = [a for a in draft.node.attribute if a.type == AttributeProto.INTS]
    if found:
        attribute = rng.choice(found)
        kept = list(attribute.ints)[: rng.randrange(8)]
        del attribute.ints[:]
        attribute.ints.extend(kept + [1] * rng.randrange(3))


def _drop_input(draft: Draft, rng: random.Random) -> None:
    inputs = draft.node.input
    if not inputs:
        return
    how = rng.random()
    if how < 0.4:
        inputs[rng.randrange(len(inputs))] = ""
    elif how < 0.7:
        del inputs[rng.randrange(len(inputs)) :]
    else:
        del inputs[rng.randrange(len(inputs))]


def _add_input(draft: Draft, rng: random.Random) -> None:
    if draft.node.input:
        draft.node.input.append(rng.choice(draft.node.input))


def _swap_inputs(draft: Draft, rng: random.Random) -> None:
    inputs = draft.node.input
    if len(inputs) > 1:
        i, j = (rng.randrange(len(inputs)) for _ in range(2))
        inputs[i], inputs[j] = inputs[j], inputs[i]


def _set(draft: Draft, name: str, array: Array) -> None:
    draft.arrays[name] = array
    for initializer in draft.made.graph.initializer:
        if initializer.name == name:
            initializer.CopyFrom(numpy_helper.from_array(np.asarray(array), name))
    for value in draft.made.graph.input:
        if value.name == name:
            value.type.tensor_type.elem_type = element_type(array.dtype)


def _change_dtype(draft: Draft, rng: random.Random) -> None:
    name = rng.choice(list(draft.arrays))
    with np.errstate(all="ignore"):
        _set(draft, name, draft.arrays[name].astype(rng.choice(_DTYPES)))


def _change_shape(draft: Draft, rng: random.Random) -> None:
    name = rng.choice(list(draft.arrays))
    array = draft.arrays[name]
    how = rng.randrange(7)
    if how == 0:
        array = array[None]
    elif how == 1:
        array = array.reshape(-1)
    elif how == 2 and array.ndim:
        array = array[..., 0] if array.shape[-1] else array.reshape(0)
    elif how == 3 and array.ndim:
        axis = rng.randrange(array.ndim)
        array = np.delete(array, slice(0, rng.choice([1, array.shape[axis]])), axis)
    elif how == 4 and array.ndim:
        axis = rng.randrange(array.ndim)
        array = np.concatenate([array] * rng.choice([2, 3]), axis)
    elif how == 5:
        array = array.T
    elif how == 6:
        array = np.zeros(rng.choice([(), (0,), (1,) * 9, (0, 1 << 40), (1 << 30, 0, 1 << 20), (2, 0, 3)]), array.dtype)
    _set(draft, name, np.ascontiguousarray(array) if array.ndim else array)


def _change_contents(draft: Draft, rng: random.Random) -> None:
    name = rng.choice(list(draft.arrays))
    array = np.array(draft.arrays[name])
    if not array.size:
        return
    flat = array.reshape(-1)
    if array.dtype.kind == "f":
        values: list[Any] = [np.nan, np.inf, -np.inf, 0.0, -1.0, 1e-45, 3e38]
    elif array.dtype.kind in "iu":
        info = np.iinfo(array.dtype)
        values = [info.min, info.max, info.max // 2, 0, 1, *([-1] if info.min < 0 else [])]
    else:
        values = [0, 1]
    how = rng.randrange(4)
    with np.errstate(all="ignore"):
        if how == 0:
            flat[:] = np.array(rng.choice(values)).astype(array.dtype)
        elif how == 1:
            flat[rng.randrange(flat.size)] = np.array(rng.choice(values)).astype(array.dtype)
        elif how == 2:
            flat[:] = flat[::-1].copy()
        else:
            raw = np.random.default_rng(rng.getrandbits(32)).bytes(array.nbytes)
            flat[:] = np.frombuffer(raw, np.uint8 if array.dtype == np.bool_ else array.dtype).astype(array.dtype)
    _set(draft, name, array)


def _change_output(draft: Draft, rng: random.Random) -> None:
    how = rng.randrange(4)
    if how == 0:
        draft.made.graph.output[0].type.tensor_type.elem_type = element_type(rng.choice(_DTYPES))
    elif how == 1:
        draft.node.output.append("Z")
    elif how == 2:
        draft.node.output[0] = ""
        draft.made.graph.output[0].name = "X"
    else:
        shape = [rng.choice([0, 1, 3])] * rng.randrange(4)
        kind = draft.made.graph.output[0].type.tensor_type.elem_type
        draft.made.graph.output[0].CopyFrom(helper.make_tensor_value_info("Y", kind, shape))


def _lie_about_a_tensor(draft: Draft, rng: random.Random) -> None:
    """An initializer whose shape and data do not agree."""
    if draft.made.graph.initializer:
        tensor = rng.choice(draft.made.graph.initializer)
        if rng.random() < 0.5:
            tensor.dims.append(rng.choice([0, 2, -1, 1 << 62]))
        else:
            tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]


def _overridable(draft: Draft, rng: random.Random) -> None:
    """Initializers that are inputs too: their values may change, so they are not constants."""
    for tensor in draft.made.graph.initializer:
        if rng.random() < 0.5:
            draft.made.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, None))


def _rename(draft: Draft, rng: random.Random) -> None:
    """Another operator's inputs and attributes."""
    draft.node.op_type = rng.choice(list(MAKERS))
    if draft.made.functions:
        draft.made.functions.add().CopyFrom(functions.function(draft.node.op_type))


MUTATIONS = [
    _drop_attribute, _change_integer, _change_integer, _change_integer, _change_integer, _change_attribute_type,
    _change_length, _drop_input, _add_input, _swap_inputs, _change_dtype, _change_dtype, _change_shape, _change_shape,
    _change_shape, _change_contents, _change_contents, _change_contents, _change_output, _lie_about_a_tensor,
    _overridable, _rename,
]  # fmt: skip
# Distinct valid nodes of each operator that the malformed ones are made of.
_BASES = 40


@cache
def _base(op: str, index: int) -> Case:
    return valid(op, index)


def draft_of(seed: int) -> Draft:
    """The malformed model of a seed."""
    rng = random.Random(seed)
    case = _base(rng.choice(list(MAKERS)), rng.randrange(_BASES))
    names = list(case.inputs)
    variable = set(names[: case.words])
    if rng.random() < 0.4:
        variable = {name for name in names if rng.random() < 0.5}
    draft = Draft(model_of(case, variable, bodies=rng.random() < 0.1), dict(case.inputs), variable)
    for _ in range(rng.choice([0, 1, 1, 1, 1, 1, 2, 2, 3, 4])):
        mutation = rng.choice(MUTATIONS)
        draft.what.append(mutation.__name__.strip("_"))
        mutation(draft, rng)
    return draft


def run_one(seed: int, path: Path) -> str:
    """What became of a model: it ran, or who refused it."""
    draft = draft_of(seed)
    try:
        session = session_of(draft.made, path)
        session.run(None, {value.name: draft.arrays[value.name] for value in session.get_inputs()})
    except Exception as error:  # ONNX Runtime has no common base class of its errors
        return "refused by lnsdeploy" if "lnsdeploy." in str(error) else "refused by ONNX Runtime"
    return "ran"


# ---------------------------------------------------------------------------------------------------------------------
# Processes

OUTCOMES = ("ran", "refused by lnsdeploy", "refused by ONNX Runtime")
_SCRIPT = Path(__file__).resolve()
_MEMORY = 8 << 30
_PATIENCE = 60


def child(first: int, count: int, limited: bool) -> None:
    """Run models, saying which before each, and what became of it after."""
    path = library()
    assert path is not None
    if limited:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for seed in range(first, first + count):
        print(f"seed {seed}", flush=True)
        signal.alarm(_PATIENCE)
        outcome = run_one(seed, path)
        signal.alarm(0)
        print(f"done {outcome}", flush=True)


@dataclass
class Summary:
    """What became of many models."""

    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    crashes: list[dict[str, Any]] = field(default_factory=list)


class _Job:
    """A child process and what it has still to do."""

    def __init__(self, first: int, count: int, limited: bool):
        self.first, self.count = first, count
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [
            sys.executable,
            str(_SCRIPT),
            "--child",
            "--seed",
            str(first),
            "--count",
            str(count),
        ]
        command += [] if limited else ["--unlimited"]
        self.process = subprocess.Popen(command, stdout=self.output, stderr=self.errors)

    def collect(self, summary: Summary) -> list[tuple[int, int]]:
        """Add its results; what is left to do after a crash."""
        self.output.seek(0)
        lines = self.output.read().splitlines()
        for line in lines:
            if line.startswith("done "):
                summary.outcomes[line.removeprefix("done ")] += 1
        if self.process.returncode == 0:
            return []
        seeds = [int(line.removeprefix("seed ")) for line in lines if line.startswith("seed ")]
        self.errors.seek(0)
        last = self.errors.read()[-2000:]
        status = self.process.returncode
        if not seeds or lines[-1].startswith("done "):
            raise RuntimeError(f"a child failed outside of a model, with status {status}:\n{last}")
        summary.crashes.append({"seed": seeds[-1], "status": status, "stderr": last})
        left = self.first + self.count - seeds[-1] - 1
        return [(seeds[-1] + 1, left)] if left else []


def fuzz(count: int, seed: int = 0, jobs: int = 2, limited: bool = True, batch: int = 500) -> Summary:
    """Run the models of `count` seeds from `seed`, children `limited` in their memory."""
    summary = Summary()
    waiting = [(first, min(batch, seed + count - first)) for first in range(seed, seed + count, batch)][::-1]
    running: list[_Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Job(*waiting.pop(), limited))
            ended = [job for job in running if job.process.poll() is not None]
            for job in ended:
                running.remove(job)
                waiting += job.collect(summary)
            if not ended:
                time.sleep(0.05)
    finally:
        for job in running:
            job.process.kill()
            job.process.wait()
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description="Malformed models of the LNS operators in ONNX Runtime.")
    parser.add_argument("--count", type=int, default=1000, help="models (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="the first one's seed (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--show", action="store_true", help="print the model of --seed, run it in this process")
    parser.add_argument("--unlimited", action="store_true", help="no limit of memory (sanitizers reserve much)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    path = library()
    if path is None:
        print("the native library has not been built", file=sys.stderr)
        return 2
    if given.child:
        child(given.seed, given.count, not given.unlimited)
        return 0
    if given.show:
        draft = draft_of(given.seed)
        print(", ".join(draft.what), onnx.printer.to_text(draft.made.graph), sep="\n", flush=True)
        print(run_one(given.seed, path))
        return 0
    start = time.monotonic()
    # without a limit children may do more, and fewer of them import onnx and ONNX Runtime, under sanitizers slowly
    batch = 1250 if given.unlimited else 500
    summary = fuzz(given.count, given.seed, given.jobs, not given.unlimited, batch)
    seconds = round(time.monotonic() - start, 1)
    if given.json:
        result = {"count": given.count, "seed": given.seed, "onnxruntime": onnxruntime.__version__, "seconds": seconds}
        print(json.dumps({**result, "outcomes": summary.outcomes, "crashes": summary.crashes}, indent=2))
    else:
        for crash in summary.crashes:
            print(f"seed {crash['seed']}: status {crash['status']}\n{crash['stderr'][-300:]}")
        told = ", ".join(f"{number} {outcome}" for outcome, number in summary.outcomes.items())
        print(f"{given.count} models in {seconds} s: {told}, {len(summary.crashes)} crashes")
    return 1 if summary.crashes else 0


if __name__ == "__main__":
    sys.exit(main())
