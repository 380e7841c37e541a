"""An LNS net as data: what lowering makes, ONNX files hold, and executors run.

Tensors between the input's encoding and the output's decoding are words; each node carries the plan that,
with the datapath, determines its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lnsdeploy.datapath import Datapath, accumulator_to_dict, log_accumulator_from_dict
from lnsdeploy.emulator import reference
from lnsdeploy.emulator.plan import (
    AddPlan,
    Counts,
    DotPlan,
    Ints,
    MultiplyPlan,
    PoolPlan,
    RescalePlan,
    Window,
)
from lnsdeploy.errors import BadFileError, BadValueError, UnknownNameError
from lnsdeploy.formats import LNSFormat, Words, decode, encode


@dataclass(frozen=True)
class TensorInfo:
    """Format and offset of a tensor of words."""

    format: LNSFormat
    offset: int


Infos = list[TensorInfo | None]


@dataclass(frozen=True, eq=False)
class Node:
    """One operation on words.

    Args:
        name: unique in the net; the layer's name where it has one.
        inputs: names of tensors.
        output: name of the tensor that it makes.
    """

    name: str
    inputs: tuple[str, ...]
    output: str
    op: ClassVar[str] = ""
    # whether the output holds words; else it holds float numbers
    makes_words: ClassVar[bool] = True

    def run(self, tensors: list[Words], counts: Counts) -> Words:
        """The output's words by the reference executor."""
        raise NotImplementedError

    def macs(self, shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
        """Multiply-accumulate operations for tensors of these shapes."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """What a file must keep beside the words: plain data."""
        return {}

    def expects(self, have: Infos) -> tuple[Infos, TensorInfo | None]:
        """Formats and offsets of inputs and output by the node's plan, for inputs that have those of `have`.

        None stands for float numbers.
        """
        if not have or have[0] is None or any(info != have[0] for info in have):
            raise BadFileError(f"node {self.name!r}: its inputs must share one format and offset")
        return have, have[0]


@dataclass(frozen=True, eq=False)
class Gemm(Node):
    """x [..., K] times weights [N, K] (spec 3 to 5)."""

    words: Words
    bias: Ints | None
    plan: DotPlan
    op: ClassVar[str] = "Gemm"

    def run(self, tensors: list[Words], counts: Counts) -> Words:
        x = tensors[0]
        rows = reference.dot(x.reshape(-1, x.shape[-1]), self.words, self.bias, self.plan, counts)
        return rows.reshape(*x.shape[:-1], self.words.shape[0])

    def macs(self, shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
        return int(np.prod(output)) * int(self.words.shape[1])

    def expects(self, have: Infos) -> tuple[Infos, TensorInfo | None]:
        return _dot_expects(self.plan)

    def to_dict(self) -> dict[str, Any]:
        return dot_plan_to_dict(self.plan) | {"bias": self.bias is not None}


@dataclass(frozen=True, eq=False)
class Conv(Node):
    """Convolution of x [B, C, *spatial] with weights [O, C/groups, *kernel] (spec 7)."""

    words: Words
    bias: Ints | None
    plan: DotPlan
    window: Window
    groups: int = 1
    op: ClassVar[str] = "Conv"

    def run(self, tensors: list[Words], counts: Counts) -> Words:
        return reference.convolution(tensors[0], self.words, self.bias, self.plan, self.window, self.groups, counts)

    def macs(self, shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
        return int(np.prod(output)) * int(np.prod(self.words.shape[1:]))

    def expects(self, have: Infos) -> tuple[Infos, TensorInfo | None]:
        return _dot_expects(self.plan)

    def to_dict(self) -> dict[str, Any]:
        return dot_plan_to_dict(self.plan) | {"bias": self.bias is not None}


def _dot_expects(plan: DotPlan) -> tuple[Infos, TensorInfo | None]:
    return [TensorInfo(plan.activation, plan.input_offset)], TensorInfo(plan.output, plan.output_offset)


@dataclass(frozen=True, eq=False)
class Relu(Node):
    """Negative words become zero (spec 6.1)."""

    format: LNSFormat
    op: ClassVar[str] = "Relu"

    def run(self, tensors: list[Words], counts: Counts) -> Words:
        return reference.relu(tensors[0], self.format)


@dataclass(frozen=True, eq=False)
class Clip(Node):
    """Words limited to two words (spec 6.1)."""

    format: LNSFormat
    low: int
    high: int
    op: ClassVar[str] = "Clip"

    def run(self, tensors: list[Words], counts: Counts) -> Words:
        return reference.clip(tensors[0], self.format, self.low, self.high)


@dataclass(frozen=True, eq=False)
class MaxPool(Node):
    """Largest value of each window (spec 6.1)."""

    format: LNSFormat
    window: Window
    op: ClassVar[str] = "MaxPool"

    def run(self, tensors: list[Words], counts: Counts) -> Words:
        return reference.max_pool(tensors[0], self.format, self.window)

    def to_dict(self) -> dict[str, Any]:
        return {"axes": len(self.window.kernel)}


@dataclass(frozen=True, eq=False)
class AveragePool(Node):
    """Average of each window by the log adder (spec 6.5).

    Args:
        spatial: the input's spatial shape, which the number of words in each window depends on.
    """

    plan: PoolPlan
    window: Window
    count_include_pad: bool = False
    spatial: tuple[int, ...] | None = None
    op: ClassVar[str] = "AveragePool"

    def run(self, tensors: list[Words], counts: Counts) -> Words:
        return reference.average_pool(tensors[0], self.plan, self.window, self.count_include_pad, counts)

    def expects(self, have: Infos) -> tuple[Infos, TensorInfo | None]:
        p = self.plan
        return [TensorInfo(p.input, p.input_offset)], TensorInfo(p.output, p.output_offset)

    def to_dict(self) -> dict[str, Any]:
        p = self.plan
        return {
            "accumulator": accumulator_to_dict(p.accumulator),
            "input": str(p.input),
            "output": str(p.output),
            "input_offset": p.input_offset,
            "output_offset": p.output_offset,
            "acc_offset": p.acc_offset,
            "underflow": p.underflow,
            "count_include_pad": self.count_include_pad,
            "window": window_to_dict(self.window),
            "spatial": list(self.spatial or ()),
        }


def _pair_expects(plan: AddPlan | MultiplyPlan) -> tuple[Infos, TensorInfo | None]:
    operands: Infos = [TensorInfo(plan.a, plan.a_offset), TensorInfo(plan.b, plan.b_offset)]
    return operands, TensorInfo(plan.output, plan.output_offset)


def _pair_to_dict(plan: AddPlan | MultiplyPlan) -> dict[str, Any]:
    return {
        "a": str(plan.a),
        "b": str(plan.b),
        "output": str(plan.output),
        "a_offset": plan.a_offset,
        "b_offset": plan.b_offset,
        "output_offset": plan.output_offset,
        "underflow": plan.underflow,
    }


@dataclass(frozen=True, eq=False)
class Add(Node):
    """Element-wise sum by the log adder (spec 6.4)."""

    plan: AddPlan
    op: ClassVar[str] = "Add"

    def run(self, tensors: list[Words], counts: Counts) -> Words:
        return reference.add(tensors[0], tensors[1], self.plan, counts)

    def expects(self, have: Infos) -> tuple[Infos, TensorInfo | None]:
        return _pair_expects(self.plan)

    def to_dict(self) -> dict[str, Any]:
        p = self.plan
        return _pair_to_dict(p) | {"accumulator": accumulator_to_dict(p.accumulator), "acc_offset": p.acc_offset}


@dataclass(frozen=True, eq=False)
class Rescale(Node):
    """Words of another format or offset (spec 6.3)."""

    plan: RescalePlan
    op: ClassVar[str] = "Rescale"

    def run(self, tensors: list[Words], counts: Counts) -> Words:
        return reference.rescale(tensors[0], self.plan, counts)

    def expects(self, have: Infos) -> tuple[Infos, TensorInfo | None]:
        p = self.plan
        return [TensorInfo(p.input, p.input_offset)], TensorInfo(p.output, p.output_offset)

    def to_dict(self) -> dict[str, Any]:
        p = self.plan
        return {
            "input": str(p.input),
            "output": str(p.output),
            "input_offset": p.input_offset,
            "output_offset": p.output_offset,
            "underflow": p.underflow,
        }


@dataclass(frozen=True, eq=False)
class Reshape(Node):
    """Another shape; 0 keeps an axis of the input, −1 is whatever is left, as in ONNX (spec 6.1)."""

    shape: tuple[int, ...]
    op: ClassVar[str] = "Reshape"

    def run(self, tensors: list[Words], counts: Counts) -> Words:
        x = tensors[0]
        try:
            shape = [x.shape[i] if n == 0 else n for i, n in enumerate(self.shape)]
            return x.reshape(shape)
        except (ValueError, IndexError) as error:
            raise BadValueError(f"{self.name}: shape {x.shape} cannot become {self.shape}") from error


@dataclass(frozen=True, eq=False)
class Transpose(Node):
    """Axes in another order (spec 6.1)."""

    order: tuple[int, ...]
    op: ClassVar[str] = "Transpose"

    def run(self, tensors: list[Words], counts: Counts) -> Words:
        return tensors[0].transpose(self.order)


@dataclass(frozen=True, eq=False)
class Concat(Node):
    """Tensors of one format and offset joined along an axis (spec 6.1)."""

    axis: int
    op: ClassVar[str] = "Concat"

    def run(self, tensors: list[Words], counts: Counts) -> Words:
        return np.concatenate(tensors, axis=self.axis)


@dataclass(frozen=True, eq=False)
class MatMul(Node):
    """Matrix products of two tensors of words, [..., M, K] and [..., K, N] (spec 7.2).

    Args:
        plan: one offset for all channels; no bias.
    """

    plan: DotPlan
    op: ClassVar[str] = "MatMul"

    def run(self, tensors: list[Words], counts: Counts) -> Words:
        return reference.matmul(tensors[0], tensors[1], self.plan, counts)

    def macs(self, shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
        return int(np.prod(output)) * int(shapes[0][-1])

    def expects(self, have: Infos) -> tuple[Infos, TensorInfo | None]:
        p = self.plan
        if np.ndim(p.weight_offset) or np.ndim(p.acc_offset):
            raise BadFileError(f"node {self.name!r}: a product of two tensors has one offset, not one a channel")
        second = TensorInfo(p.weight, int(p.weight_offset))
        return [TensorInfo(p.activation, p.input_offset), second], TensorInfo(p.output, p.output_offset)

    def to_dict(self) -> dict[str, Any]:
        return dot_plan_to_dict(self.plan)


@dataclass(frozen=True, eq=False)
class Multiply(Node):
    """Element-wise product of words (spec 6.2)."""

    plan: MultiplyPlan
    op: ClassVar[str] = "Multiply"

    def run(self, tensors: list[Words], counts: Counts) -> Words:
        return reference.product(tensors[0], tensors[1], self.plan, counts)

    def expects(self, have: Infos) -> tuple[Infos, TensorInfo | None]:
        return _pair_expects(self.plan)

    def to_dict(self) -> dict[str, Any]:
        return _pair_to_dict(self.plan)


@dataclass(frozen=True, eq=False)
class Lookup(Node):
    """A function of one number, as a table of words (spec 6.7).

    Args:
        table: the result's word for every word of the input, [2^bits].
        source, result: formats and offsets of input and output.
        function: what the table is of, for people.
    """

    table: Words
    source: TensorInfo
    result: TensorInfo
    function: str = ""
    op: ClassVar[str] = "Lookup"

    def run(self, tensors: list[Words], counts: Counts) -> Words:
        return reference.lookup(tensors[0], self.table, self.source.format)

    def expects(self, have: Infos) -> tuple[Infos, TensorInfo | None]:
        return [self.source], self.result

    def to_dict(self) -> dict[str, Any]:
        return {"function": self.function}


@dataclass(frozen=True, eq=False)
class Take(Node):
    """Some places of an axis, in any order and number: slices, splits, repetition, nearest resizing (spec 6.1)."""

    axis: int
    indices: tuple[int, ...]
    op: ClassVar[str] = "Take"

    def run(self, tensors: list[Words], counts: Counts) -> Words:
        x = tensors[0]
        try:
            return np.take(x, np.array(self.indices, dtype=np.int64), axis=self.axis)
        except (IndexError, ValueError) as error:
            raise BadValueError(f"{self.name}: no such places on axis {self.axis} of the shape {x.shape}") from error


@dataclass(frozen=True, eq=False)
class Pad(Node):
    """Zero words around a tensor; `pads` before each axis, then after each (spec 6.1)."""

    pads: tuple[int, ...]
    op: ClassVar[str] = "Pad"

    def run(self, tensors: list[Words], counts: Counts) -> Words:
        return reference.pad(tensors[0], self.pads)


@dataclass(frozen=True, eq=False)
class Broadcast(Node):
    """The first input, [1, ...], repeated for every input of the batch of the second (spec 6.1)."""

    op: ClassVar[str] = "Broadcast"

    def run(self, tensors: list[Words], counts: Counts) -> Words:
        x = tensors[0]
        return np.array(np.broadcast_to(x, (len(tensors[1]), *x.shape[1:])))

    def expects(self, have: Infos) -> tuple[Infos, TensorInfo | None]:
        return have, have[0]


@dataclass(frozen=True, eq=False)
class Decode(Node):
    """The float32 values of words, for operations in float (spec 2.5, 6.6)."""

    source: TensorInfo
    op: ClassVar[str] = "Decode"
    makes_words: ClassVar[bool] = False

    def run(self, tensors: list[Words], counts: Counts) -> npt.NDArray[Any]:
        made: npt.NDArray[np.float32] = decode(tensors[0], self.source.format, self.source.offset)
        return made

    def expects(self, have: Infos) -> tuple[Infos, TensorInfo | None]:
        return [self.source], None


@dataclass(frozen=True, eq=False)
class Encode(Node):
    """Words of what operations in float gave; NaN becomes the zero word (spec 2.1, 6.6)."""

    result: TensorInfo
    underflow: str
    op: ClassVar[str] = "Encode"

    def run(self, tensors: list[Words], counts: Counts) -> Words:
        made: Words = encode(
            numbers(tensors[0], self.name),
            self.result.format,
            self.result.offset,
            underflow=self.underflow,  # type: ignore[arg-type]
            negative="clip",
            name=self.name,
        )
        return made

    def expects(self, have: Infos) -> tuple[Infos, TensorInfo | None]:
        return [None], self.result

    def to_dict(self) -> dict[str, Any]:
        return {"underflow": self.underflow}


@dataclass(frozen=True, eq=False)
class Float(Node):
    """One operation in float: that of ONNX, as ONNX Runtime's CPU provider computes it by itself (spec 6.6).

    Args:
        kind: the operator.
        attributes: its attributes: integers, floats, texts, and lists of these.
        arguments: for each of its inputs, in order: the number of one of `inputs`, a constant array, or None.
        reason: why it is not on words.
    """

    kind: str
    attributes: Mapping[str, Any]
    arguments: tuple[int | npt.NDArray[Any] | None, ...]
    reason: str = ""
    op: ClassVar[str] = "Float"
    makes_words: ClassVar[bool] = False

    def run(self, tensors: list[Words], counts: Counts) -> npt.NDArray[Any]:
        from lnsdeploy.emulator.floats import run_float

        return run_float(self, tensors)

    def expects(self, have: Infos) -> tuple[Infos, TensorInfo | None]:
        return [None] * len(self.inputs), None

    def to_dict(self) -> dict[str, Any]:
        return {"float": self.reason}


def numbers(values: npt.NDArray[Any], name: str) -> npt.NDArray[np.float32]:
    """What an operation in float gave, as float32 without NaN.

    Raises:
        BadFileError: it is no array of float32.
    """
    if values.dtype != np.float32:
        raise BadFileError(f"node {name!r} encodes {values.dtype}; float32 is needed")
    return np.where(np.isnan(values), np.float32(0), values)


@dataclass(frozen=True, eq=False)
class LNSGraph:
    """A whole net on words.

    Args:
        input: name of the float input.
        input_shape: its shape; 0 for the batch axis.
        encoded: name of the input's tensor of words.
        underflow: the encoding's rule.
        nodes: in an order in which they can run.
        words_output: name of the last tensor of words.
        output: name of the float output, its decoding.
        output_shape: its shape; 0 for the batch axis.
        tensors: format and offset of every tensor of words.
        datapaths: those that the nodes use, by fingerprint.
        metadata: further text to keep with the net (source, recipe, …).
        constants: tensors of words that the net holds itself.
    """

    input: str
    input_shape: tuple[int, ...]
    encoded: str
    underflow: str
    nodes: tuple[Node, ...]
    words_output: str
    output: str
    output_shape: tuple[int, ...]
    tensors: dict[str, TensorInfo]
    datapaths: dict[str, Datapath]
    metadata: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Words] = field(default_factory=dict)

    @property
    def uses_float(self) -> bool:
        """Whether some operation runs in float."""
        return any(isinstance(node, Float) for node in self.nodes)

    @property
    def datapath(self) -> Datapath:
        """The datapath of most nodes, the first among equals."""
        uses: dict[str, int] = {}
        for node in self.nodes:
            if isinstance(node, (Gemm, Conv, MatMul)):
                key = node.plan.datapath.fingerprint
                uses[key] = uses.get(key, 0) + 1
        if not uses:
            return next(iter(self.datapaths.values()))
        return self.datapaths[max(uses, key=lambda key: uses[key])]

    def check(self) -> None:
        """Refuse a net whose nodes cannot run in order, or whose plans and tensors contradict each other.

        Raises:
            BadFileError: the message names the node.
        """
        known = {self.encoded, *self.constants}
        for name in known:
            if name not in self.tensors:
                raise BadFileError(f"tensor {name!r} has no recorded format")
        for name, words in self.constants.items():
            self.tensors[name].format.check(words, f"constant {name!r}")
        for node in self.nodes:
            for name in node.inputs:
                if name not in known:
                    raise BadFileError(f"node {node.name!r} reads {name!r} before anything makes it")
            if node.output in known:
                raise BadFileError(f"node {node.name!r} makes {node.output!r} a second time")
            known.add(node.output)
            have = [self.tensors.get(name) for name in node.inputs]
            inputs, output = node.expects(have)
            if inputs != have or output != self.tensors.get(node.output):
                raise BadFileError(f"node {node.name!r}: its plan contradicts the formats or offsets of its tensors")
        if self.words_output not in known or self.words_output not in self.tensors:
            raise BadFileError(f"nothing makes the output {self.words_output!r}")

    def read_by_relu(self, name: str) -> Node | None:
        """The ReLU that alone reads a tensor, if one does: what it removes never mattered."""
        readers = [node for node in self.nodes if name in node.inputs]
        alone = len(readers) == 1 and isinstance(readers[0], Relu) and name != self.words_output
        return readers[0] if alone else None

    def encode_input(self, x: npt.NDArray[Any]) -> Words:
        """The words of a batch of inputs."""
        info = self.tensors[self.encoded]
        words: Words = encode(
            check_input(x, self.input_shape, self.input),
            info.format,
            info.offset,
            underflow=self.underflow,  # type: ignore[arg-type]
            negative="clip",
            name=f"input {self.input!r}",
        )
        return words

    def decode_output(self, words: Words) -> npt.NDArray[np.float32]:
        """The float32 values of output words."""
        info = self.tensors[self.words_output]
        values: npt.NDArray[np.float32] = decode(words, info.format, info.offset)
        return values


@dataclass(eq=False)
class LayerRecord:
    """What one node did over a run.

    Args:
        name, op: of the node.
        macs: multiply-accumulate operations.
        counts: saturated and flushed results; negative ones that a ReLU removes do not count as saturated.
    """

    name: str
    op: str
    macs: int = 0
    counts: Counts = field(default_factory=Counts)


def check_input(x: npt.NDArray[Any], shape: tuple[int, ...], name: str) -> npt.NDArray[np.float32]:
    """The input as float32, if its shape and type fit.

    Raises:
        BadValueError: another shape; the message gives both.
    """
    array = np.asarray(x)
    if array.dtype.kind != "f":
        raise BadValueError(f"input {name!r} must be floating point, not {array.dtype}")
    fits = array.ndim == len(shape) and all(w in (0, h) for w, h in zip(shape, array.shape, strict=True))
    if not fits:
        wanted = ", ".join("batch" if n == 0 else str(n) for n in shape)
        raise BadValueError(f"input {name!r} must have the shape [{wanted}], not {list(array.shape)}")
    return np.ascontiguousarray(array, dtype=np.float32)


def run_reference(
    graph: LNSGraph,
    x: npt.NDArray[Any],
    records: dict[str, LayerRecord] | None = None,
    visit: Callable[[str, Words], None] | None = None,
) -> Words:
    """Run a batch through the reference executor.

    Args:
        x: float inputs [batch, …].
        records: filled in, one record a node.
        visit: called with the name and words of every tensor, in order.
    Returns: the words of the output tensor.
    """
    return run_graph(graph, x, [node.run for node in graph.nodes], LNSGraph.encode_input, records, visit)


def run_graph(
    graph: LNSGraph,
    x: npt.NDArray[Any],
    steps: Sequence[Callable[[list[Words], Counts], Words]],
    encode_input: Callable[[LNSGraph, npt.NDArray[Any]], Words],
    records: dict[str, LayerRecord] | None = None,
    visit: Callable[[str, Words], None] | None = None,
    *,
    constants: Mapping[str, Any] | None = None,
) -> Words:
    """Run a batch, each node by its step; the rest as :func:`run_reference`.

    Args:
        steps: for each node, what makes its output's words from those of its inputs.
        encode_input: what makes the input's words.
        constants: the net's own tensors, where the steps take others than arrays.
    """
    env: dict[str, Words] = dict(graph.constants if constants is None else constants)
    env[graph.encoded] = encode_input(graph, x)
    last = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    if visit:
        visit(graph.encoded, env[graph.encoded])
    for i, node in enumerate(graph.nodes):
        inputs = [env[name] for name in node.inputs]
        record = LayerRecord(node.name, node.op)
        if records is not None:
            record = records.setdefault(node.name, record)
        env[node.output] = steps[i](inputs, record.counts)
        record.macs += node.macs([a.shape for a in inputs], env[node.output].shape)
        if graph.read_by_relu(node.output):
            record.counts.saturated -= record.counts.negative
            record.counts.negative = 0
        if visit and node.makes_words:
            visit(node.output, env[node.output])
        for name in node.inputs:
            if last[name] == i and name != graph.words_output:
                env.pop(name, None)
    return env[graph.words_output]


# ---------------------------------------------------------------------------------------------------
# Plans as plain data


def window_to_dict(window: Window) -> dict[str, Any]:
    """A window as plain data."""
    return {
        "kernel": list(window.kernel),
        "strides": list(window.strides),
        "pads": list(window.pads),
        "dilations": list(window.dilations),
    }


def dot_plan_to_dict(plan: DotPlan) -> dict[str, Any]:
    """A dot product's plan as plain data; the datapath by its fingerprint."""
    return {
        "datapath": plan.datapath.fingerprint,
        "activation": str(plan.activation),
        "weight": str(plan.weight),
        "output": str(plan.output),
        "input_offset": plan.input_offset,
        "weight_offset": _plain(plan.weight_offset),
        "output_offset": plan.output_offset,
        "lsb": plan.lsb,
        "acc_offset": _plain(plan.acc_offset),
    }


def _plain(value: Any) -> Any:
    return [int(v) for v in value] if np.ndim(value) else int(value)


def _integer(data: Mapping[str, Any], key: str) -> int:
    value = data[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadFileError(f"{key} must be an integer, not {value!r}")
    return value


def _integers(data: Mapping[str, Any], key: str) -> int | Ints:
    value = data[key]
    if isinstance(value, list):
        if not all(isinstance(v, int) and not isinstance(v, bool) and abs(v) < 1 << 62 for v in value):
            raise BadFileError(f"{key} must hold integers")
        return np.array(value, dtype=np.int64)
    return _integer(data, key)


def _tuple(data: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = _integers(data, key)
    if isinstance(value, int):
        raise BadFileError(f"{key} must be a list of integers, not {value!r}")
    return tuple(int(v) for v in value)


def window_from_dict(data: Mapping[str, Any]) -> Window:
    """Inverse of :func:`window_to_dict`."""
    return Window(*(_tuple(data, key) for key in ("kernel", "strides", "pads", "dilations")))


def dot_plan_from_dict(data: Mapping[str, Any], datapaths: Mapping[str, Datapath]) -> DotPlan:
    """Inverse of :func:`dot_plan_to_dict`.

    Raises:
        BadFileError, UnknownNameError, BadValueError, KeyError: the data do not describe a plan.
    """
    fingerprint = data["datapath"]
    if fingerprint not in datapaths:
        raise UnknownNameError("datapath fingerprint", fingerprint, datapaths)
    return DotPlan(
        datapath=datapaths[fingerprint],
        activation=LNSFormat.parse(data["activation"]),
        weight=LNSFormat.parse(data["weight"]),
        output=LNSFormat.parse(data["output"]),
        input_offset=_integer(data, "input_offset"),
        weight_offset=_integers(data, "weight_offset"),
        output_offset=_integer(data, "output_offset"),
        lsb=_integer(data, "lsb"),
        acc_offset=_integers(data, "acc_offset"),
    )


def add_plan_from_dict(data: Mapping[str, Any]) -> AddPlan:
    """An addition's plan from plain data."""
    return AddPlan(
        accumulator=log_accumulator_from_dict("accumulator", data["accumulator"]),
        acc_offset=_integer(data, "acc_offset"),
        **_pair_from_dict(data),
    )


def _pair_from_dict(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{side: LNSFormat.parse(data[side]) for side in ("a", "b", "output")},
        **{key: _integer(data, key) for key in ("a_offset", "b_offset", "output_offset")},
        "underflow": data["underflow"],
    }


def pool_plan_from_dict(data: Mapping[str, Any]) -> PoolPlan:
    """A pooling's plan from plain data."""
    return PoolPlan(
        accumulator=log_accumulator_from_dict("accumulator", data["accumulator"]),
        input=LNSFormat.parse(data["input"]),
        output=LNSFormat.parse(data["output"]),
        input_offset=_integer(data, "input_offset"),
        output_offset=_integer(data, "output_offset"),
        acc_offset=_integer(data, "acc_offset"),
        underflow=data["underflow"],
    )


def multiply_plan_from_dict(data: Mapping[str, Any]) -> MultiplyPlan:
    """A multiplication's plan from plain data."""
    return MultiplyPlan(**_pair_from_dict(data))


def rescale_plan_from_dict(data: Mapping[str, Any]) -> RescalePlan:
    """A rescaling's plan from plain data."""
    return RescalePlan(
        input=LNSFormat.parse(data["input"]),
        output=LNSFormat.parse(data["output"]),
        input_offset=_integer(data, "input_offset"),
        output_offset=_integer(data, "output_offset"),
        underflow=data["underflow"],
    )
