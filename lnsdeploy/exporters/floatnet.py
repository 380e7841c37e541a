"""A float ONNX model as lowering reads it: its operations, brought to few forms, and what they make of some inputs.

What a node does with shapes (slices, splits, shapes computed on the way) is settled here by running the model on two
batch sizes: what stays is a constant, and the one size that follows the batch is the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.emulator import graph as g
from lnsdeploy.emulator.floats import OPERATORS
from lnsdeploy.emulator.plan import Counts, Window
from lnsdeploy.errors import BadFileError, BadValueError, UnsupportedError

Floats = npt.NDArray[np.float32]
Argument = str | npt.NDArray[Any] | None

# Operations of one number, and those that are with constants of one element.
_UNARY = """
    Abs Acos Acosh Asin Asinh Atan Atanh Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid HardSwish LeakyRelu Log
    Mish Neg Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Tan Tanh ThresholdedRelu
"""
UNARY = frozenset(_UNARY.split())
WITH_SCALARS = frozenset(("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "PRelu", "Clip", "Sum", "Mean"))
# Operations that only move words.
MOVEMENT = frozenset(("Identity", "Reshape", "Transpose", "Take", "Pad"))
# Operations that make a product of weights.
LAYERS = frozenset(("Conv", "Gemm", "MatMul"))
# Operators that only ever make shapes and constants.
_OF_SHAPES = frozenset(("Constant", "ConstantOfShape", "EyeLike"))
# What lowering knows a form on words for; anything else that ONNX Runtime can run by itself runs in float.
SUPPORTED = tuple(
    sorted(
        UNARY
        | WITH_SCALARS - {"Mean"}
        | LAYERS
        | MOVEMENT - {"Take"}
        | {
            "AveragePool",
            "BatchNormalization",
            "Concat",
            "ConvTranspose",
            "DepthToSpace",
            "Dropout",
            "Expand",
            "Flatten",
            "Gather",
            "GlobalAveragePool",
            "GlobalMaxPool",
            "MaxPool",
            "ReduceMax",
            "ReduceMean",
            "Resize",
            "Slice",
            "SpaceToDepth",
            "Split",
            "Squeeze",
            "Tile",
            "Unsqueeze",
        }
    )
)


class NotOnWordsError(Exception):
    """An operation has no form on words; the text says why."""


@dataclass(eq=False)
class FloatNode:
    """One operation.

    Args:
        op: the operator, of few: what it does may have been written with another.
        name: the node's.
        arguments: all its inputs: names of tensors, constants, or None.
        output: its tensor.
        attributes: plain data.
        weight, bias, weight_name, window, groups: of a product with constant weights; weights have output channels
            first, and a transposed convolution is one of an input with zeros put in between.
        stuff: of a transposed convolution, its strides.
        steps: of Take, axes and places.
        pads: of Pad, zeros before each axis, then after each.
        original: the node as it was, for computing it in float.
        reason: why it cannot be on words, where that is known already.
    """

    op: str
    name: str
    arguments: list[Argument]
    output: str
    attributes: dict[str, Any]
    weight: Floats | None = None
    bias: npt.NDArray[np.float64] | None = None
    weight_name: str = ""
    window: Window | None = None
    groups: int = 1
    stuff: tuple[int, ...] = ()
    steps: list[tuple[int, npt.NDArray[np.int64]]] = field(default_factory=list)
    pads: tuple[int, ...] = ()
    original: tuple[str, dict[str, Any], list[Argument]] | None = None
    reason: str = ""

    @property
    def inputs(self) -> list[str]:
        """The tensors that it reads."""
        return [a for a in self.arguments if isinstance(a, str)]


@dataclass(eq=False)
class FloatNet:
    """A float net reduced to the operations that lowering knows, with batch norms folded.

    Args:
        nodes: in an order in which they can run.
        input, output: names.
        values: every tensor for the calibration inputs.
        other: their shapes for another number of inputs.
        batch_constants: tensors that are the same for every input, [1, ...].
    """

    nodes: list[FloatNode]
    input: str
    output: str
    values: dict[str, npt.NDArray[Any]]
    other: dict[str, tuple[int, ...]]
    batch_constants: dict[str, Floats]
    uses: dict[str, list[FloatNode]] = field(default_factory=dict)
    makers: dict[str, FloatNode] = field(default_factory=dict)

    def batch_axes(self, name: str) -> list[int]:
        """The axes of a tensor whose sizes follow the batch."""
        return [i for i, (a, b) in enumerate(zip(self.values[name].shape, self.other[name], strict=True)) if a != b]

    def open_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor with −1 for the axis that follows the batch.

        Raises:
            NotOnWordsError: no axis, or several, follow it.
        """
        axes = self.batch_axes(name)
        if len(axes) != 1:
            raise NotOnWordsError(f"{len(axes)} of its result's axes follow the batch, not one")
        return tuple(-1 if i == axes[0] else int(n) for i, n in enumerate(self.values[name].shape))

    def index(self) -> None:
        """Who reads and makes what."""
        self.uses, self.makers = {}, {}
        for node in self.nodes:
            self.makers[node.output] = node
            for name in node.inputs:
                self.uses.setdefault(name, []).append(node)


def read_net(model: Any, inputs: npt.NDArray[Any], fixed: frozenset[str] = frozenset()) -> FloatNet:
    """The operations of a float model, and the values of its tensors.

    Args:
        model: onnx.ModelProto with one float input (batch first) and one float output.
        inputs: inputs [n, …].
        fixed: names of weights that must stay as they are: nothing is multiplied into them.

    Raises:
        UnsupportedError: it has another form, or an operator that nothing here can run.
        BadFileError, BadValueError: it is damaged, or gives NaN or infinity.
    """
    return _Reader(model, inputs, fixed).read()


class _Reader:
    def __init__(self, model: Any, inputs: npt.NDArray[Any], fixed: frozenset[str]):
        from onnx import numpy_helper

        self.model, self.fixed = model, fixed
        proto = model.graph
        self.constants: dict[str, npt.NDArray[Any]] = {}
        for tensor in proto.initializer:
            if tensor.data_location:
                raise BadFileError(f"initializer {tensor.name!r} lies in another file; embed it in the model")
            self.constants[tensor.name] = numpy_helper.to_array(tensor)
        dynamic = [i.name for i in proto.input if i.name not in self.constants]
        if len(dynamic) != 1 or len(proto.output) != 1:
            raise UnsupportedError(
                f"a net with one input and one output is needed; this has {len(dynamic)} and {len(proto.output)}"
            )
        self.input, self.output = dynamic[0], proto.output[0].name
        self.producer: dict[str, Any] = {}
        for node in proto.node:
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                self.constants[node.output[0]] = _constant(node)
            for output in node.output:
                if output:
                    self.producer[output] = node
        self.protos = self._wanted()
        _check_operators(self.protos)
        self.shapely = self._shapely()
        self.values, self.other, varying = self._run(inputs)
        self.batch_constants: dict[str, Floats] = {}
        for name in self.shapely:
            value = self.values[name]
            if name not in varying:
                self.constants[name] = value
            elif value.dtype == np.float32 and value.ndim and (value == value[:1]).all():
                self.batch_constants[name] = value[:1]

    def read(self) -> FloatNet:
        nodes: list[FloatNode] = []
        for proto in self.protos:
            if any(name in self.shapely for name in proto.output):
                continue
            nodes += self._convert(proto)
        net = FloatNet(nodes, self.input, self.output, self.values, self.other, self.batch_constants)
        _merge_constants(net, self.fixed)
        _fold_batch_norms(net)
        net.index()
        for name, value in self.values.items():
            if value.dtype == np.float32 and not np.isfinite(value).all():
                raise BadValueError(f"the float net gives NaN or infinity in {name!r} for the calibration inputs")
        return net

    def _wanted(self) -> list[Any]:
        """The nodes that the output depends on, in order."""
        wanted: list[Any] = []
        seen: set[str] = set()
        done: set[int] = set()
        stack = [(self.output, False)]
        while stack:
            tensor, ready = stack.pop()
            if ready:
                if id(self.producer[tensor]) not in done:
                    done.add(id(self.producer[tensor]))
                    wanted.append(self.producer[tensor])
                continue
            if tensor in seen or tensor in self.constants or tensor == self.input:
                continue
            seen.add(tensor)
            if tensor not in self.producer:
                raise BadFileError(f"tensor {tensor!r} is used but nothing makes it")
            stack.append((tensor, True))
            stack += [(source, False) for source in self.producer[tensor].input if source]
        return wanted

    def _shapely(self) -> set[str]:
        """Tensors that depend on the input's shape alone."""
        found: set[str] = set()
        for node in self.protos:
            read = [name for name in node.input if name]
            if node.op_type in ("Shape", "Size") or all(n in self.constants or n in found for n in read):
                found.update(name for name in node.output if name)
        return found

    def _run(self, inputs: npt.NDArray[Any]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], set[str]]:
        """Every tensor by ONNX Runtime, shapes for another batch, and which depend on the shape with the batch."""
        import onnx

        from lnsdeploy.emulator.ort import float_session

        names = [name for node in self.protos for name in node.output if name]
        tapped = type(self.model)()
        tapped.CopyFrom(self.model)
        present = {output.name for output in tapped.graph.output}
        tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
        session = float_session(tapped.SerializeToString())
        feed = session.get_inputs()[0]
        shape = tuple(n if isinstance(n, int) else 0 for n in feed.shape)
        x = g.check_input(inputs, (0, *shape[1:]), feed.name)
        values = dict(zip(names, session.run(names, {feed.name: x}), strict=True))
        values[self.input] = x
        less = x[:1] if len(x) > 1 else np.concatenate([x, x])
        fewer = dict(zip(names, session.run(names, {feed.name: less}), strict=True))
        fewer[self.input] = less
        varying = {name for name in self.shapely if not _same(values[name], fewer[name])}
        return values, {name: value.shape for name, value in fewer.items()}, varying

    def _arguments(self, proto: Any) -> list[Argument]:
        return [None if not name else self.constants.get(name, name) for name in proto.input]

    def _convert(self, proto: Any) -> Iterator[FloatNode]:
        from lnsdeploy.exporters.nodes import plain_attributes

        name = proto.name or proto.output[0]
        attributes = {key: _text(value) for key, value in plain_attributes(proto).items()}
        arguments = self._arguments(proto)
        if proto.op_type == "Split":
            return iter(self._split(proto, name, arguments, attributes))
        used = [output for output in proto.output if output]
        if len(used) > 1 and any(output in self.producer and self._is_read(output) for output in used[1:]):
            raise UnsupportedError(f"{proto.op_type} {name!r}: its further outputs are used; only the first can be")
        node = FloatNode(proto.op_type, name, list(arguments), proto.output[0], dict(attributes))
        node.original = (proto.op_type, attributes, arguments)
        try:
            return iter(getattr(self, f"_read_{node.op.lower()}", self._as_it_is)(node, proto))
        except NotOnWordsError as why:
            made = FloatNode(proto.op_type, name, arguments, proto.output[0], attributes, reason=str(why))
            made.original = node.original
            return iter([made])

    def _is_read(self, name: str) -> bool:
        return name == self.output or any(name in node.input for node in self.protos)

    def _as_it_is(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        return [node]

    # operations that are others in disguise

    def _read_dropout(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        node.op, node.arguments = "Identity", node.arguments[:1]
        return [node]

    def _read_cast(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        same = self.values[node.output].dtype == np.float32
        if same and isinstance(node.arguments[0], str) and self.values[node.arguments[0]].dtype == np.float32:
            node.op = "Identity"
        return [node]

    def _read_sub(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        constant = node.arguments[1]
        if isinstance(constant, np.ndarray) and isinstance(node.arguments[0], str):
            node.op, node.arguments = "Add", [node.arguments[0], -constant]
        return [node]

    def _read_div(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        constant = node.arguments[1]
        if isinstance(constant, np.ndarray) and constant.size > 1 and isinstance(node.arguments[0], str):
            node.op, node.arguments = "Mul", [node.arguments[0], (1 / constant.astype(np.float64)).astype(np.float32)]
        return [node]

    def _read_reshape(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        node.op, node.arguments = "Reshape", node.arguments[:1]
        return [node]

    _read_flatten = _read_squeeze = _read_unsqueeze = _read_reshape

    def _split(self, proto: Any, name: str, arguments: list[Argument], attributes: dict[str, Any]) -> list[FloatNode]:
        axis = int(attributes.get("axis", 0)) % self.values[proto.input[0]].ndim
        first, made = 0, []
        for i, output in enumerate(proto.output):
            size = self.values[output].shape[axis] if output in self.values else 0
            if output and self._is_read(output):
                node = FloatNode("Take", f"{name}_{i}", arguments[:1], output, {})
                node.steps = [(axis, np.arange(first, first + size))]
                places = np.arange(first, first + size)
                node.original = ("Gather", {"axis": axis}, [arguments[0], places])
                made.append(node)
            first += size
        return made

    def _data(self, node: FloatNode) -> npt.NDArray[Any]:
        """The values of the first input, which must not be constant."""
        source = node.arguments[0]
        if not isinstance(source, str):
            raise NotOnWordsError("its data are a constant")
        value: npt.NDArray[Any] = self.values[source]
        return value

    def _constant_at(self, node: FloatNode, index: int) -> npt.NDArray[Any] | None:
        """A constant input; None where there is none."""
        value = node.arguments[index] if index < len(node.arguments) else None
        if isinstance(value, str):
            raise NotOnWordsError(f"its input {index} is no constant")
        return value

    def _places(self, node: FloatNode, places: list[npt.NDArray[np.int64]]) -> list[FloatNode]:
        """Take some places of every axis."""
        x = self._data(node)
        node.op = "Take"
        node.steps = [
            (axis, p.astype(np.int64))
            for axis, p in enumerate(places)
            if not np.array_equal(p, np.arange(x.shape[axis]))
        ]
        source = node.arguments[0]
        assert isinstance(source, str)
        other = self.other[source]
        for axis, _ in node.steps:
            if other[axis] != x.shape[axis]:
                raise NotOnWordsError("it takes apart the batch")
        node.arguments = [source]
        return [node]

    def _read_slice(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        x = self._data(node)
        starts, ends = self._constant_at(node, 1), self._constant_at(node, 2)
        axes, steps = self._constant_at(node, 3), self._constant_at(node, 4)
        if starts is None or ends is None:
            raise NotOnWordsError("its bounds are not given")
        places = [np.arange(n) for n in x.shape]
        for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            axis = int(axes[i]) % x.ndim if axes is not None else i
            step = int(steps[i]) if steps is not None else 1
            stop = None if step < 0 and end < -x.shape[axis] else end
            places[axis] = places[axis][slice(start, stop, step)]
        return self._places(node, places)

    def _read_gather(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        x, indices = self._data(node), self._constant_at(node, 1)
        assert indices is not None
        axis = int(node.attributes.get("axis", 0)) % x.ndim
        places = [np.arange(n) for n in x.shape]
        places[axis] = np.arange(x.shape[axis])[np.ravel(indices)]
        return self._reshaped(node, self._places(node, places), indices.ndim != 1)

    def _reshaped(self, node: FloatNode, made: list[FloatNode], wanted: bool) -> list[FloatNode]:
        """A Take whose result has another shape."""
        if not wanted:
            return made
        # what lies between is this reader's own tensor; only its shape matters
        between = f"{node.output}_taken"
        value, other = self.values[str(made[0].arguments[0])], self.other[str(made[0].arguments[0])]
        shape, less = list(value.shape), list(other)
        for axis, places in made[0].steps:
            value = np.take(value, places, axis=axis)
            shape[axis] = less[axis] = len(places)
        self.values[between], self.other[between] = value, tuple(less)
        reshape = FloatNode("Reshape", f"{node.name}_shape", [between], node.output, {})
        made[0].output = between
        made[0].original = None
        return [*made, reshape]

    def _read_tile(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        x, repeats = self._data(node), self._constant_at(node, 1)
        assert repeats is not None
        return self._places(node, [np.tile(np.arange(n), int(r)) for n, r in zip(x.shape, repeats, strict=True)])

    def _read_expand(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        x, y = self._data(node), self.values[node.output]
        if x.ndim != y.ndim:
            raise NotOnWordsError("it adds axes")
        return self._places(
            node,
            [np.zeros(b, dtype=np.int64) if a != b else np.arange(a) for a, b in zip(x.shape, y.shape, strict=True)],
        )

    def _read_resize(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        x, y = self._data(node), self.values[node.output]
        if node.attributes.get("mode", "nearest") != "nearest":
            raise NotOnWordsError(f"{node.attributes['mode']} interpolation")
        if any(isinstance(a, str) for a in node.arguments[1:]):
            raise NotOnWordsError("its sizes are not constant")
        places = []
        for axis, (size, made) in enumerate(zip(x.shape, y.shape, strict=True)):
            if size == made:
                places.append(np.arange(size))
                continue
            # the operator itself says which place it takes
            ramp = np.arange(size, dtype=np.float32).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
            taken = self._probe(node, np.broadcast_to(ramp, x.shape))
            places.append(np.moveaxis(taken, axis, 0).reshape(made, -1)[:, 0].astype(np.int64))
        return self._places(node, places)

    def _probe(self, node: FloatNode, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        made: npt.NDArray[Any] = float_node(node, "probe").run([np.ascontiguousarray(x)], Counts())
        return made

    def _read_pad(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        x, pads = self._data(node), self._constant_at(node, 1)
        value, axes = self._constant_at(node, 2), self._constant_at(node, 3)
        assert pads is not None
        chosen = [int(a) % x.ndim for a in axes] if axes is not None else list(range(x.ndim))
        both = [(0, 0)] * x.ndim
        for i, axis in enumerate(chosen):
            both[axis] = int(pads[i]), int(pads[len(chosen) + i])
        mode = str(node.attributes.get("mode", "constant"))
        if mode == "constant" and min(min(b) for b in both) >= 0:
            if value is not None and value.size and float(np.ravel(value)[0]) != 0:
                raise NotOnWordsError("it pads with another number than zero")
            node.arguments = node.arguments[:1]
            node.pads = (*(b[0] for b in both), *(b[1] for b in both))
            return [node]
        if mode not in ("reflect", "edge", "wrap") or min(min(b) for b in both) < 0:
            raise NotOnWordsError(f"padding of mode {mode} with pads {[int(p) for p in pads]}")
        return self._places(node, [np.pad(np.arange(n), b, mode=mode) for n, b in zip(x.shape, both, strict=True)])  # type: ignore[call-overload]

    def _read_depthtospace(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        n, c, h, w = self._data(node).shape
        size = int(node.attributes["blocksize"])
        each = c // size**2
        crd = node.attributes.get("mode", "DCR") == "CRD"
        shape = (n, each, size, size, h, w) if crd else (n, size, size, each, h, w)
        return self._shuffled(node, shape, (0, 1, 4, 2, 5, 3) if crd else (0, 3, 4, 1, 5, 2))

    def _read_spacetodepth(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        n, c, h, w = self._data(node).shape
        size = int(node.attributes["blocksize"])
        return self._shuffled(node, (n, c, h // size, size, w // size, size), (0, 3, 5, 1, 2, 4))

    def _shuffled(self, node: FloatNode, shape: tuple[int, ...], order: tuple[int, ...]) -> list[FloatNode]:
        source = str(node.arguments[0])
        x, batch = self.values[source], self.other[source][0]
        split, moved = f"{node.output}_split", f"{node.output}_moved"
        self.values[split] = x.reshape(shape)
        self.values[moved] = self.values[split].transpose(order)
        self.other[split] = (batch, *shape[1:])
        self.other[moved] = tuple(self.other[split][i] for i in order)
        return [
            FloatNode("Reshape", f"{node.name}_split", [source], split, {}),
            FloatNode("Transpose", f"{node.name}_order", [split], moved, {"perm": list(order)}),
            FloatNode("Reshape", node.name, [moved], node.output, {}),
        ]

    def _read_transpose(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        rank = self._data(node).ndim
        node.attributes = {"perm": [int(a) for a in node.attributes.get("perm", range(rank - 1, -1, -1))]}
        return [node]

    def _read_clip(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        for key, index in (("min", 1), ("max", 2)):
            value = self._constant_at(node, index)
            if value is not None:
                node.attributes[key] = float(value)
        return [node]

    def _read_concat(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        axis = int(node.attributes["axis"]) % self.values[node.output].ndim
        node.attributes = {"axis": axis}
        return [node]

    def _read_batchnormalization(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        x = self._data(node)
        scale, shift, mean, variance = (self._constant_at(node, i) for i in range(1, 5))
        if scale is None or shift is None or mean is None or variance is None:
            raise NotOnWordsError("its statistics are missing")
        epsilon = float(node.attributes.get("epsilon", 1e-5))
        factor = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
        node.arguments = node.arguments[:1]
        node.attributes = {"factor": factor, "shift": shift.astype(np.float64) - mean * factor}
        if x.ndim > 5:
            raise NotOnWordsError(f"a tensor of {x.ndim} axes")
        return [node]

    # poolings

    def _window_of(self, node: FloatNode, kernel: tuple[int, ...]) -> Window:
        """The window with its padding spelled out."""
        a, axes = node.attributes, len(kernel)
        if not 1 <= axes <= 3:
            raise NotOnWordsError(f"a window over {axes} axes")
        strides = tuple(int(v) for v in a.get("strides", ())) or (1,) * axes
        dilations = tuple(int(v) for v in a.get("dilations", ())) or (1,) * axes
        pads = [int(v) for v in a.get("pads", ())] or [0] * (2 * axes)
        auto = a.get("auto_pad", "NOTSET")
        sizes, outs = self._data(node).shape[2:], self.values[node.output].shape[2:]
        extra = [0] * axes
        for i in range(axes):
            needed = (outs[i] - 1) * strides[i] + dilations[i] * (kernel[i] - 1) + 1 - sizes[i]
            if auto in ("SAME_UPPER", "SAME_LOWER"):
                total = max(needed, 0)
                pads[i] = total // 2 if auto == "SAME_UPPER" else total - total // 2
                pads[axes + i] = total - pads[i]
            elif auto == "VALID":
                pads[i] = pads[axes + i] = 0
            elif needed > pads[i] + pads[axes + i]:
                # sizes that are rounded up
                extra[i] = needed - pads[i] - pads[axes + i]
                pads[axes + i] += extra[i]
        if min(pads) < 0:
            raise NotOnWordsError("negative padding")
        if any(extra) and a.get("count_include_pad"):
            raise NotOnWordsError("an average that counts padding, with sizes rounded up")
        return Window(kernel, strides, tuple(pads), dilations)

    def _read_maxpool(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        node.window = self._window_of(node, tuple(int(n) for n in node.attributes["kernel_shape"]))
        return [node]

    _read_averagepool = _read_maxpool

    def _read_globalaveragepool(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        return self._over(node, "AveragePool", list(range(2, self._data(node).ndim)))

    def _read_globalmaxpool(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        return self._over(node, "MaxPool", list(range(2, self._data(node).ndim)))

    def _read_reducemean(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        return self._over(node, "AveragePool", self._axes(node))

    def _read_reducemax(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        return self._over(node, "MaxPool", self._axes(node))

    def _axes(self, node: FloatNode) -> list[int]:
        rank, given = self._data(node).ndim, self._constant_at(node, 1)
        axes = node.attributes.get("axes") if given is None else [int(v) for v in np.ravel(given)]
        if not axes:
            if node.attributes.get("noop_with_empty_axes"):
                raise NotOnWordsError("a reduction over nothing")
            return list(range(rank))
        return sorted(a % rank for a in axes)

    def _over(self, node: FloatNode, op: str, axes: list[int]) -> list[FloatNode]:
        """A pooling over all of some axes."""
        source = str(node.arguments[0])
        x, other = self._data(node), self.other[source]
        if not axes or any(other[a] != x.shape[a] for a in axes):
            raise NotOnWordsError("a reduction over the batch")
        kept = [a for a in range(x.ndim) if a not in axes]
        window = tuple(x.shape[a] for a in axes)
        if not all(window):
            raise NotOnWordsError("a reduction over nothing")
        plain = x.ndim >= 3 and axes == list(range(2, x.ndim)) and x.ndim <= 5 and other[0] != x.shape[0]
        if plain:
            made = replace(node, op=op, window=Window(window), arguments=[source], attributes={})
            if self.values[node.output].ndim == x.ndim:
                return [made]
            pooled = f"{node.output}_pooled"
            self._note(pooled, self.values[node.output].reshape(*x.shape[:2], *[1] * len(axes)), other[0])
            made.output, made.original = pooled, None
            return [made, FloatNode("Reshape", f"{node.name}_shape", [pooled], node.output, {})]
        # [batch, what is kept, what is reduced]
        if not kept or other[kept[0]] == x.shape[kept[0]]:
            raise NotOnWordsError("the batch is not the first of the axes that are kept")
        moved, flat, pooled = (f"{node.output}_{what}" for what in ("moved", "flat", "pooled"))
        ordered = x.transpose([*kept, *axes])
        count = int(np.prod(window))
        rest = int(np.prod([x.shape[a] for a in kept[1:]])) if len(kept) > 1 else 1
        batch = other[kept[0]]
        self._note(moved, ordered, batch)
        self._note(flat, ordered.reshape(len(ordered), rest, count), batch)
        self._note(pooled, self.values[node.output].reshape(len(ordered), rest, 1), batch)
        return [
            FloatNode("Transpose", f"{node.name}_order", [source], moved, {"perm": [*kept, *axes]}),
            FloatNode("Reshape", f"{node.name}_flat", [moved], flat, {}),
            FloatNode(op, node.name, [flat], pooled, {}, window=Window((count,))),
            FloatNode("Reshape", f"{node.name}_shape", [pooled], node.output, {}),
        ]

    def _note(self, name: str, value: npt.NDArray[Any], batch: int) -> None:
        """A tensor of this reader's own, whose first axis is the batch."""
        self.values[name], self.other[name] = value, (batch, *value.shape[1:])

    # products

    def _weights(self, node: FloatNode, proto: Any) -> npt.NDArray[Any]:
        weight = node.arguments[1]
        if not isinstance(weight, np.ndarray):
            raise NotOnWordsError("its weights are no constants")
        node.weight_name = proto.input[1]
        return weight.astype(np.float32)

    def _read_conv(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        weight, bias = self._weights(node, proto), self._constant_at(node, 2)
        self._data(node)
        node.groups = int(node.attributes.get("group", 1))
        node.window = self._window_of(node, tuple(int(n) for n in weight.shape[2:]))
        return [_with_bias(node, weight, bias)]

    def _read_convtranspose(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        weight, bias = self._weights(node, proto), self._constant_at(node, 2)
        x, y, a = self._data(node), self.values[node.output], node.attributes
        kernel, axes, groups = weight.shape[2:], weight.ndim - 2, int(a.get("group", 1))
        if not 1 <= axes <= 3:
            raise NotOnWordsError(f"a window over {axes} axes")
        strides = tuple(int(v) for v in a.get("strides", ())) or (1,) * axes
        dilations = tuple(int(v) for v in a.get("dilations", ())) or (1,) * axes
        more = [int(v) for v in a.get("output_padding", ())] or [0] * axes
        given = [int(v) for v in a.get("pads", ())] or [0] * (2 * axes)
        begin, end = [], []
        for i in range(axes):
            reach = dilations[i] * (kernel[i] - 1)
            whole = strides[i] * (x.shape[2 + i] - 1) + more[i] + reach + 1
            total = whole - y.shape[2 + i]
            first = given[i]
            if a.get("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER") or a.get("output_shape"):
                half = total // 2
                first = half if a.get("auto_pad") == "SAME_UPPER" else total - half
            last = total - first
            begin.append(reach - first)
            end.append(reach - last + more[i])
        if min(*begin, *end) < 0:
            raise NotOnWordsError("more padding than its window reaches")
        parts = np.split(weight, groups, axis=0)
        turned = np.concatenate([np.swapaxes(part, 0, 1) for part in parts])
        turned = np.ascontiguousarray(np.flip(turned, axis=tuple(range(2, 2 + axes))))
        node.op, node.groups, node.stuff = "Conv", groups, strides
        node.window = Window(tuple(kernel), (1,) * axes, (*begin, *end), dilations)
        return [_with_bias(node, turned, bias)]

    def _read_gemm(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        a, bias = node.attributes, self._constant_at(node, 2)
        if a.get("transA", 0):
            raise NotOnWordsError("its first factor is transposed")
        self._data(node)
        if isinstance(node.arguments[1], str):
            return self._dynamic_gemm(node, bias)
        weight = self._weights(node, proto) * np.float32(a.get("alpha", 1.0))
        rows = weight if a.get("transB", 0) else np.ascontiguousarray(weight.T)
        if bias is not None:
            bias = bias.astype(np.float64) * float(a.get("beta", 1.0))
        return [_with_bias(node, rows, bias)]

    def _dynamic_gemm(self, node: FloatNode, bias: npt.NDArray[Any] | None) -> list[FloatNode]:
        a = node.attributes
        if a.get("transB", 0) or a.get("alpha", 1.0) != 1.0 or (bias is not None and a.get("beta", 1.0) != 1.0):
            raise NotOnWordsError("a product of two tensors with factors, or of a transposed one")
        if bias is None:
            return [FloatNode("MatMul", node.name, node.arguments[:2], node.output, {})]
        product = f"{node.output}_product"
        self._note(product, self.values[node.output] - bias, self.other[node.output][0])
        return [
            FloatNode("MatMul", node.name, node.arguments[:2], product, {}),
            FloatNode("Add", f"{node.name}_bias", [product, bias.astype(np.float32)], node.output, {}),
        ]

    def _read_matmul(self, node: FloatNode, proto: Any) -> list[FloatNode]:
        a, b = (
            self.values[value] if isinstance(value, str) else value for value in (node.arguments[0], node.arguments[1])
        )
        if a is None or b is None:
            raise NotOnWordsError("a factor is missing")
        if isinstance(node.arguments[0], str) and isinstance(node.arguments[1], np.ndarray) and b.ndim == 2:
            weight = self._weights(node, proto)
            return [_with_bias(node, np.ascontiguousarray(weight.T), None)]
        if a.ndim < 2 or b.ndim < 2:
            raise NotOnWordsError("a product with a vector")
        return [node]


def _check_operators(protos: Iterable[Any]) -> None:
    for proto in protos:
        known = proto.op_type in OPERATORS or proto.op_type in SUPPORTED or proto.op_type in _OF_SHAPES
        if proto.domain in ("", "ai.onnx") and known:
            continue
        operator = f"{proto.domain}.{proto.op_type}" if proto.domain else proto.op_type
        raise UnsupportedError(
            f"operator {operator} (node {proto.name or proto.output[0]!r}) can be computed neither on words nor in "
            f"float; lowering knows {', '.join(SUPPORTED)}, and runs in float what else ONNX defines without subgraphs"
        )


def float_node(node: FloatNode, name: str) -> g.Float:
    """An operation as the graph's nodes in float are."""
    kind, attributes, arguments = node.original or (node.op, node.attributes, node.arguments)
    inputs: list[str] = []
    made: list[Any] = []
    for argument in arguments:
        if isinstance(argument, str):
            if argument not in inputs:
                inputs.append(argument)
            made.append(inputs.index(argument))
        else:
            made.append(argument)
    while made and made[-1] is None:
        made.pop()
    return g.Float(name, tuple(inputs), f"{name}_out", kind, dict(attributes), tuple(made), node.reason)


def _same(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    return a.shape == b.shape and np.array_equal(a, b)


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list):
        return [_text(v) for v in value]
    return value


def _constant(node: Any) -> npt.NDArray[Any]:
    from onnx import numpy_helper

    for attribute in node.attribute:
        if attribute.name == "value":
            return np.asarray(numpy_helper.to_array(attribute.t))
        if attribute.name in ("value_int", "value_float"):
            is_int = attribute.name == "value_int"
            return np.asarray(attribute.i, dtype=np.int64) if is_int else np.asarray(attribute.f, dtype=np.float32)
        if attribute.name in ("value_ints", "value_floats"):
            is_int = attribute.name == "value_ints"
            return np.asarray(
                list(attribute.ints if is_int else attribute.floats), dtype=np.int64 if is_int else np.float32
            )
    raise UnsupportedError(f"constant {node.name or node.output[0]!r} holds neither numbers nor a tensor")


def _with_bias(node: FloatNode, weight: Floats, bias: npt.NDArray[Any] | None) -> FloatNode:
    node.weight, node.arguments = weight, node.arguments[:1]
    if bias is not None:
        flat = bias.astype(np.float64).reshape(-1)
        if flat.size not in (1, len(weight)):
            raise NotOnWordsError(f"a bias of shape {bias.shape}")
        node.bias = np.broadcast_to(flat, (len(weight),)).copy()
    return node


def _counts(net: FloatNet) -> Mapping[str, int]:
    uses: dict[str, int] = {net.output: 1}
    for node in net.nodes:
        for name in node.inputs:
            uses[name] = uses.get(name, 0) + 1
    return uses


def _per_channel(layer: FloatNode, constant: npt.NDArray[Any]) -> npt.NDArray[np.float64] | None:
    """A constant as one number an output channel of a layer, if it is one."""
    assert layer.weight is not None
    count = len(layer.weight)
    where = -1 if layer.op != "Conv" else -(layer.weight.ndim - 1)
    shape = [1] * max(-where, constant.ndim)
    shape[where] = count
    if constant.size != 1 and list(constant.shape) != shape[len(shape) - constant.ndim :]:
        return None
    return np.broadcast_to(constant.astype(np.float64).reshape(-1), (count,))


def _merge_constants(net: FloatNet, fixed: frozenset[str]) -> None:
    """Constants added to a layer's output alone are its bias; factors go into its weights, unless these are fixed."""
    uses = _counts(net)
    makers = {node.output: node for node in net.nodes}
    kept = []
    for node in net.nodes:
        layer, constant = None, None
        if node.op in ("Add", "Mul") and len(node.inputs) == 1 and len(node.arguments) == 2:
            layer = makers.get(node.inputs[0])
            constant = next((a for a in node.arguments if isinstance(a, np.ndarray)), None)
        if layer is None or constant is None or layer.weight is None or uses[node.inputs[0]] != 1:
            kept.append(node)
            continue
        each = _per_channel(layer, constant)
        same = net.values[node.output].shape == net.values[layer.output].shape
        if each is None or not same or (node.op == "Mul" and layer.weight_name in fixed):
            kept.append(node)
            continue
        if node.op == "Add":
            layer.bias = each if layer.bias is None else layer.bias + each
        else:
            _scale(layer, each)
        layer.original = None
        layer.output = node.output
        makers[node.output] = layer
    net.nodes = kept


def _scale(layer: FloatNode, factor: npt.NDArray[np.float64]) -> None:
    assert layer.weight is not None
    layer.weight = (layer.weight * factor.reshape(-1, *[1] * (layer.weight.ndim - 1))).astype(np.float32)
    layer.bias = None if layer.bias is None else layer.bias * factor


def _fold_batch_norms(net: FloatNet) -> None:
    """Batch normalisation becomes weights and bias of the layer before, or a depthwise convolution of size 1."""
    uses = _counts(net)
    makers = {node.output: node for node in net.nodes}
    kept = []
    for node in net.nodes:
        if node.op != "BatchNormalization" or "factor" not in node.attributes:
            kept.append(node)
            continue
        factor, shift = node.attributes["factor"], node.attributes["shift"]
        layer = makers.get(node.inputs[0])
        if layer is not None and layer.weight is not None and uses[node.inputs[0]] == 1 and not layer.stuff:
            _scale(layer, factor)
            layer.bias = shift + (0 if layer.bias is None else layer.bias)
            layer.output, layer.original = node.output, None
            makers[node.output] = layer
            continue
        rank = net.values[node.output].ndim
        if rank == 2:
            scaled = f"{node.output}_scaled"
            value = net.values[node.inputs[0]] * factor.astype(np.float32)
            net.values[scaled], net.other[scaled] = value, (net.other[node.output][0], *value.shape[1:])
            kept.append(FloatNode("Mul", f"{node.name}_scale", [node.inputs[0], factor.astype(np.float32)], scaled, {}))
            kept.append(FloatNode("Add", node.name, [scaled, shift.astype(np.float32)], node.output, {}))
            continue
        node.op, node.groups, node.bias, node.original = "Conv", len(factor), shift, None
        node.weight = factor.astype(np.float32).reshape(-1, *[1] * (rank - 1))
        node.window = Window((1,) * (rank - 2))
        kept.append(node)
    net.nodes = kept
