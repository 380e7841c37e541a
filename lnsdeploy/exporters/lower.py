"""From a float ONNX model to a net on words: fold, calibrate, encode (docs/lowering.md).

Every tensor of the float net belongs to a class of tensors that share one offset, because the operations
between them (ReLU, max pooling, reshaping) do not change words' scale. Offsets come from a layer's own
recorded one (quantization-aware training), or from a sample of real inputs; accumulators are placed by
running the net so far, on words, through the reference executor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lnsdeploy.datapath import Datapath, load_datapath, widened
from lnsdeploy.emulator import graph as g
from lnsdeploy.emulator import reference
from lnsdeploy.emulator.plan import AddPlan, Counts, DotPlan, PoolPlan, RescalePlan, Window
from lnsdeploy.errors import BadFileError, BadValueError, UnsupportedError
from lnsdeploy.exporters import placement
from lnsdeploy.exporters.calibration import Statistics
from lnsdeploy.formats import LNSFormat, Method, Offset, Words, calibrate, decode, encode
from lnsdeploy.recipe import LayerRecipe, Recipe

Floats = npt.NDArray[np.float32]

# Shapes change, words do not.
_RESHAPING = ("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Dropout")
# Input and output share format and offset.
_PRESERVING = (*_RESHAPING, "Relu", "Clip", "MaxPool", "Transpose")
_LAYERS = ("Conv", "Gemm", "MatMul")
SUPPORTED = (
    *_LAYERS,
    *_PRESERVING,
    "BatchNormalization",
    "Add",
    "Concat",
    "AveragePool",
    "GlobalAveragePool",
    "ReduceMean",
)


class LayerSpec(Protocol):
    """How a layer was trained: what lowering must keep."""

    @property
    def weight(self) -> LNSFormat | None:
        """The weights' format, None for float."""

    @property
    def weight_offset(self) -> Offset:
        """Their offset, or one per output channel."""

    @property
    def weight_axis(self) -> int | None:
        """The axis of several offsets."""

    @property
    def activation(self) -> LNSFormat | None:
        """The input's format, None for float."""

    @property
    def input_offset(self) -> int:
        """The input's offset."""

    @property
    def datapath(self) -> str | None:
        """The layer's own datapath: a name or a TOML file."""


@dataclass(frozen=True)
class LowerOptions:
    """Choices of lowering.

    Args:
        datapath: the arithmetic of layers that name none.
        method, percentile: calibration of activations without a recorded offset.
        weight_method: calibration of weights without a recorded offset.
        per_channel: one offset per output channel of weights without a recorded one.
        headroom: octaves kept free above the largest partial sum of the sample.
        sample: inputs used to place accumulators, at most.
        recipe: formats by layer, of layers without recorded ones; None for the datapath's.
        statistics: magnitudes of the float net's tensors by name, over more inputs than lowering sees at once;
            offsets follow from them where they are there, else from the inputs.
        correct_bias: add to each layer's bias what the words of the sample lack on average, channel by channel.
    """

    datapath: Datapath
    method: Method = "absmax"
    percentile: float = 99.9
    weight_method: Method = "absmax"
    per_channel: bool = True
    headroom: float = 1.0
    sample: int = 64
    recipe: Recipe | None = None
    statistics: Mapping[str, Statistics] | None = None
    correct_bias: bool = False


@dataclass(frozen=True)
class Lowered:
    """The result of lowering.

    Args:
        graph: the net on words.
        macs: multiply-accumulate operations per input.
        coverage: share of them that run in LNS.
        float_ops: operations left in float, by name (spec 6.6).
    """

    graph: g.LNSGraph
    macs: int
    coverage: float
    float_ops: tuple[str, ...] = ()


@dataclass(eq=False)
class _FloatNode:
    op: str
    name: str
    inputs: list[str]
    output: str
    attributes: dict[str, Any]
    weight: Floats | None = None
    bias: npt.NDArray[np.float64] | None = None
    weight_name: str = ""
    window: Window | None = None
    groups: int = 1


@dataclass(eq=False)
class _FloatNet:
    """A float net reduced to the operations that lowering knows, with batch norms folded."""

    nodes: list[_FloatNode]
    input: str
    output: str
    uses: dict[str, list[_FloatNode]] = field(default_factory=dict)


def lower(
    model: Any,
    inputs: npt.NDArray[Any],
    options: LowerOptions,
    *,
    specs: Mapping[str, LayerSpec] | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Lowered:
    """Turn a float ONNX model into a net on words.

    Args:
        model: onnx.ModelProto with one float input (batch first) and one float output.
        inputs: real inputs [n, …] that offsets and accumulators are calibrated on.
        options: the datapath and the rules of calibration.
        specs: by layer name (the weight initializer's name without ``.weight``), how it was trained.
        metadata: text to keep with the net.
        progress: called with each layer's name.

    Raises:
        UnsupportedError: an operation has no LNS form here; the message names it.
        BadValueError, BadFileError: the model is not of this form.
    """
    if len(inputs) == 0:
        raise BadValueError("calibration needs at least one input")
    net = _read(model)
    values = _float_values(model, net, inputs)
    return _Lowering(net, values, options, dict(specs or {}), progress).run(dict(metadata or {}))


# ---------------------------------------------------------------------------------------------------
# Reading the float net


def _read(model: Any) -> _FloatNet:
    from onnx import numpy_helper

    proto = model.graph
    constants: dict[str, npt.NDArray[Any]] = {}
    for tensor in proto.initializer:
        if tensor.data_location:
            raise BadFileError(f"initializer {tensor.name!r} lies in another file; embed it in the model")
        constants[tensor.name] = numpy_helper.to_array(tensor)
    dynamic = [i.name for i in proto.input if i.name not in constants]
    if len(dynamic) != 1 or len(proto.output) != 1:
        raise UnsupportedError(
            f"a net with one input and one output is needed; this has {len(dynamic)} and {len(proto.output)}"
        )
    producer = {}
    for node in proto.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            constants[node.output[0]] = _constant(node)
        for output in node.output:
            if output:
                producer[output] = node
    wanted: list[Any] = []
    seen: set[str] = set()

    def visit(name: str, depth: int) -> None:
        stack = [(name, False)]
        while stack:
            tensor, done = stack.pop()
            if done:
                wanted.append(producer[tensor])
                continue
            if tensor in seen or tensor in constants or tensor == dynamic[0]:
                continue
            seen.add(tensor)
            if tensor not in producer:
                raise BadFileError(f"tensor {tensor!r} is used but nothing makes it")
            stack.append((tensor, True))
            stack += [(source, False) for source in _data_inputs(producer[tensor])]

    visit(proto.output[0].name, 0)
    nodes = [_float_node(node, constants) for node in wanted]
    net = _FloatNet(nodes, dynamic[0], proto.output[0].name)
    _merge_biases(net)
    _fold_batch_norms(net)
    for node in net.nodes:
        for name in node.inputs:
            net.uses.setdefault(name, []).append(node)
    return net


def _constant(node: Any) -> npt.NDArray[Any]:
    from onnx import numpy_helper

    for attribute in node.attribute:
        if attribute.name == "value":
            return np.asarray(numpy_helper.to_array(attribute.t))
        if attribute.name in ("value_int", "value_float"):
            return np.asarray(attribute.i if attribute.name == "value_int" else attribute.f)
        if attribute.name in ("value_ints", "value_floats"):
            values = attribute.ints if attribute.name == "value_ints" else attribute.floats
            return np.asarray(list(values))
    raise UnsupportedError(f"constant {node.name or node.output[0]!r} holds neither numbers nor a tensor")


def _data_inputs(node: Any) -> list[str]:
    """The inputs that carry activations: a shape, an axis or a mode does not."""
    if node.op_type in (*_RESHAPING, "Clip", "ReduceMean"):
        return list(node.input[:1])
    return [name for name in node.input if name]


def _float_node(node: Any, constants: Mapping[str, npt.NDArray[Any]]) -> _FloatNode:
    from onnx import helper

    name = node.name or node.output[0]
    if node.domain not in ("", "ai.onnx") or node.op_type not in SUPPORTED:
        # spec 6.6: never silently in float
        operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        raise UnsupportedError(
            f"operator {operator} (node {name!r}) has no LNS form here; lowering knows {', '.join(SUPPORTED)}"
        )
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    for key, value in attributes.items():
        if isinstance(value, bytes):
            attributes[key] = value.decode("utf-8", "replace")
    made = _FloatNode(node.op_type, name, [], node.output[0], attributes)
    given = list(node.input)

    def constant(index: int) -> npt.NDArray[Any] | None:
        return constants.get(given[index]) if index < len(given) and given[index] else None

    if node.op_type in _LAYERS:
        weight = constant(1)
        if weight is None or weight.dtype.kind != "f":
            raise UnsupportedError(f"{node.op_type} {name!r}: its weights must be constant floats")
        made.inputs, made.weight_name = given[:1], given[1]
        _read_layer(made, np.asarray(weight, dtype=np.float32), constant(2))
        return made
    if node.op_type == "BatchNormalization":
        made.inputs = given[:1]
        scale, shift, mean, variance = (constant(i) for i in range(1, 5))
        if scale is None or shift is None or mean is None or variance is None:
            raise UnsupportedError(f"BatchNormalization {name!r}: its statistics must be constants")
        factor = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + attributes.get("epsilon", 1e-5))
        made.attributes = {"factor": factor, "shift": shift.astype(np.float64) - mean * factor}
        return made
    if node.op_type == "Add":
        made.inputs = [n for n in given if n not in constants]
        if len(made.inputs) != 2:
            both = [constants[n] for n in given if n in constants]
            if len(both) != 1:
                raise UnsupportedError(f"Add {name!r} of constants only; simplify the model first")
            made.bias = both[0].astype(np.float64)
        return made
    made.inputs = given if node.op_type == "Concat" else given[:1]
    if node.op_type == "Clip":
        for key, index in (("min", 1), ("max", 2)):
            value = constant(index)
            if value is not None:
                made.attributes[key] = float(value)
    elif node.op_type == "ReduceMean":
        axes = constant(1)
        if axes is not None:
            made.attributes["axes"] = [int(v) for v in np.ravel(axes)]
    elif node.op_type in ("MaxPool", "AveragePool"):
        made.window = _window(made, made.attributes.get("kernel_shape", []))
        if made.attributes.get("ceil_mode"):
            raise UnsupportedError(f"{node.op_type} {name!r}: ceil_mode has no LNS form here; pad explicitly")
    return made


def _window(node: _FloatNode, kernel: Any) -> Window:
    a = node.attributes
    auto = a.get("auto_pad", "NOTSET")
    if auto not in ("NOTSET", "VALID"):
        raise UnsupportedError(f"{node.op} {node.name!r}: auto_pad={auto}; give explicit pads instead")
    pads = () if auto == "VALID" else tuple(a.get("pads", ()))
    return Window(tuple(kernel), tuple(a.get("strides", ())), pads, tuple(a.get("dilations", ())))


def _read_layer(node: _FloatNode, weight: Floats, bias: npt.NDArray[Any] | None) -> None:
    a = node.attributes
    if node.op == "Conv":
        node.weight, node.groups = weight, int(a.get("group", 1))
        node.window = _window(node, weight.shape[2:])
    elif node.op == "Gemm":
        if a.get("alpha", 1.0) != 1.0 or a.get("beta", 1.0) != 1.0 or a.get("transA", 0):
            raise UnsupportedError(f"Gemm {node.name!r}: alpha, beta and transA must be 1, 1 and 0")
        node.weight = weight if a.get("transB", 0) else np.ascontiguousarray(weight.T)
    else:
        if weight.ndim != 2:
            raise UnsupportedError(f"MatMul {node.name!r}: weights of {weight.ndim} axes; two are needed")
        node.weight = np.ascontiguousarray(weight.T)
    if bias is not None:
        node.bias = np.broadcast_to(bias.astype(np.float64).reshape(-1), (len(node.weight),)).copy()


def _merge_biases(net: _FloatNet) -> None:
    """An addition of constants right after a layer is its bias."""
    uses: dict[str, int] = {}
    for node in net.nodes:
        for name in node.inputs:
            uses[name] = uses.get(name, 0) + 1
    makers = {node.output: node for node in net.nodes}
    kept = []
    for node in net.nodes:
        if node.op == "Add" and len(node.inputs) == 1:
            layer = makers.get(node.inputs[0])
            if layer is None or layer.weight is None or uses[node.inputs[0]] != 1:
                raise UnsupportedError(f"Add {node.name!r} of a constant has no LNS form here, but as a bias")
            assert node.bias is not None
            count = len(layer.weight)
            where = -1 if layer.op != "Conv" else -(len(layer.weight.shape) - 1)
            shape = [1] * max(abs(where), node.bias.ndim)
            shape[where] = count
            if node.bias.size != 1 and list(node.bias.shape) != shape[-node.bias.ndim :]:
                raise UnsupportedError(f"Add {node.name!r}: a constant of shape {node.bias.shape} is no bias")
            layer.bias = (0 if layer.bias is None else layer.bias) + np.broadcast_to(node.bias.reshape(-1), (count,))
            layer.output = node.output
            makers[node.output] = layer
        else:
            kept.append(node)
    net.nodes = kept


def _fold_batch_norms(net: _FloatNet) -> None:
    """Batch normalisation becomes weights and bias of the layer before, or a 1×1 depthwise convolution."""
    uses: dict[str, int] = {}
    for node in net.nodes:
        for name in node.inputs:
            uses[name] = uses.get(name, 0) + 1
    makers = {node.output: node for node in net.nodes}
    kept = []
    for node in net.nodes:
        if node.op == "BatchNormalization":
            factor, shift = node.attributes["factor"], node.attributes["shift"]
            layer = makers.get(node.inputs[0])
            if layer is not None and layer.weight is not None and uses[node.inputs[0]] == 1:
                spread = factor.reshape(-1, *[1] * (layer.weight.ndim - 1))
                layer.weight = (layer.weight * spread).astype(np.float32)
                layer.bias = shift + (0 if layer.bias is None else layer.bias * factor)
                layer.output = node.output
                makers[node.output] = layer
                continue
            node.op, node.groups, node.bias = "Conv", len(factor), shift
            node.weight = factor.astype(np.float32).reshape(-1, 1, 1, 1)
            node.window = Window((1, 1))
        kept.append(node)
    net.nodes = kept


def float_values(model: Any, inputs: npt.NDArray[Any]) -> dict[str, Floats]:
    """Every tensor of a float ONNX model that lowering keeps, by name, for some inputs [n, …]."""
    return _float_values(model, _read(model), inputs)


def _float_values(model: Any, net: _FloatNet, inputs: npt.NDArray[Any]) -> dict[str, Floats]:
    """Every tensor of the float net for the calibration inputs, by ONNX Runtime."""
    from onnx import TensorProto, helper

    from lnsdeploy.emulator.ort import float_session

    names = [node.output for node in net.nodes]
    tapped = type(model)()
    tapped.CopyFrom(model)
    present = {output.name for output in tapped.graph.output}
    for name in names:
        if name not in present:
            tapped.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = float_session(tapped.SerializeToString())
    feed = session.get_inputs()[0]
    shape = tuple(n if isinstance(n, int) else 0 for n in feed.shape)
    x = g.check_input(inputs, (0, *shape[1:]), feed.name)
    values = dict(zip(names, session.run(names, {feed.name: x}), strict=True))
    values[net.input] = x
    for name, value in values.items():
        if value.shape[:1] != (len(x),):
            raise UnsupportedError(f"tensor {name!r} of shape {value.shape} does not keep the batch axis first")
        if not np.isfinite(value).all():
            raise BadValueError(f"the float net gives NaN or infinity in {name!r} for the calibration inputs")
    return values


# ---------------------------------------------------------------------------------------------------
# Lowering


class _Lowering:
    def __init__(
        self,
        net: _FloatNet,
        values: dict[str, Floats],
        options: LowerOptions,
        specs: dict[str, LayerSpec],
        progress: Callable[[str], None] | None,
    ):
        self.net, self.values, self.options, self.specs = net, values, options, specs
        self.progress = progress or (lambda name: None)
        self.nodes: list[g.Node] = []
        self.tensors: dict[str, g.TensorInfo] = {}
        self.datapaths: dict[str, Datapath] = {}
        self.words: dict[str, Words] = {}
        self.macs = 0
        self.names: set[str] = set()
        self.class_of = self._classes()
        self.class_info = self._class_infos()

    def run(self, metadata: dict[str, str]) -> Lowered:
        net, options = self.net, self.options
        encoded = f"{net.input}_words"
        info = self.info(net.input)
        self.tensors[encoded] = info
        self.alias = {net.input: encoded}
        sample = self.values[net.input][: options.sample]
        self.words[encoded] = encode(sample, info.format, info.offset, negative="clip", name=net.input)
        for node in net.nodes:
            self.progress(node.name)
            getattr(self, f"lower_{node.op.lower()}", self.lower_preserving)(node)
        last = self.alias[net.output]
        output = net.output if net.output not in self.tensors else f"{net.output}_float"
        graph = g.LNSGraph(
            input=net.input,
            input_shape=(0, *self.values[net.input].shape[1:]),
            encoded=encoded,
            underflow=options.datapath.underflow,
            nodes=tuple(self.nodes),
            words_output=last,
            output=output,
            output_shape=(0, *self.values[net.output].shape[1:]),
            tensors=self.tensors,
            datapaths=self.datapaths or {options.datapath.fingerprint: options.datapath},
            metadata=metadata,
        )
        return Lowered(graph, self.macs // max(len(sample), 1), 1.0)

    # classes of tensors that share an offset

    def _classes(self) -> dict[str, str]:
        parent = {name: name for name in self.values}

        def find(name: str) -> str:
            while parent[name] != name:
                parent[name] = parent[parent[name]]
                name = parent[name]
            return name

        for node in self.net.nodes:
            if node.op in (*_PRESERVING, "Concat"):
                for name in node.inputs:
                    parent[find(name)] = find(node.output)
        return {name: find(name) for name in parent}

    def _class_infos(self) -> dict[str, g.TensorInfo]:
        """One format and offset a class: the layers' that read it, or calibrated where it is read."""
        members: dict[str, list[str]] = {}
        for name, root in self.class_of.items():
            members.setdefault(root, []).append(name)
        infos = {}
        for root, names in members.items():
            readers = [
                node
                for name in names
                for node in self.net.uses.get(name, [])
                if node.op not in (*_PRESERVING, "Concat")
            ]
            layers = [node for node in readers if node.weight is not None]
            formats = {self.layer_formats(node)[1] for node in layers}
            fmt = formats.pop() if len(formats) == 1 else self.options.datapath.activation
            recorded = [
                spec.input_offset for node in layers if (spec := self.spec(node)) is not None and spec.activation == fmt
            ]
            if recorded:
                infos[root] = g.TensorInfo(fmt, max(recorded))
                continue
            # values that only a ReLU reads need no room for what it removes
            read = [n for n in names if n == self.net.output or any(r in readers for r in self.net.uses.get(n, []))]
            infos[root] = g.TensorInfo(fmt, self.offset(read or names, fmt))
        return infos

    def offset(self, names: list[str], fmt: LNSFormat) -> int:
        """The offset for some tensors together: by what is known of them, or by the inputs at hand."""
        known = self.options.statistics or {}
        method, percentile = self.options.method, self.options.percentile
        if all(name in known for name in names):
            joined = known[names[0]]
            for name in names[1:]:
                joined = joined.joined(known[name])
            return joined.offset(fmt, method, percentile)
        values = np.concatenate([self.values[n].reshape(-1) for n in names])
        return int(calibrate(values, fmt, method=method, percentile=percentile, name=names[0]))

    def info(self, name: str) -> g.TensorInfo:
        return self.class_info[self.class_of[name]]

    def spec(self, node: _FloatNode) -> LayerSpec | None:
        return self.specs.get(node.weight_name.removesuffix(".weight"))

    def layer_formats(self, node: _FloatNode) -> tuple[LNSFormat, LNSFormat]:
        """Formats of weights and activations."""
        spec, datapath = self.spec(node), self.options.datapath
        if spec is None:
            found = self.recipe(node)
            if found is None:
                return datapath.weight, datapath.activation
            return found.weight or datapath.weight, found.activation or datapath.activation
        return spec.weight or datapath.weight, spec.activation or datapath.activation

    def recipe(self, node: _FloatNode) -> LayerRecipe | None:
        """What the recipe says of a layer that has no recorded formats."""
        if self.options.recipe is None:
            return None
        name = layer_name(node.weight_name, node.name)
        names = [layer_name(other.weight_name, other.name) for other in self.net.nodes if other.op in _LAYERS]
        return self.options.recipe.for_layer(name, layer_types(node.op), Recipe.positions(name, names))

    # nodes

    def unique(self, name: str) -> str:
        made, count = name, 1
        while made in self.names:
            made, count = f"{name}_{count}", count + 1
        self.names.add(made)
        return made

    def emit(self, node: g.Node, info: g.TensorInfo) -> None:
        counts = Counts()
        inputs = [self.words[name] for name in node.inputs]
        words = node.run(inputs, counts)
        self.macs += node.macs([a.shape for a in inputs], words.shape)
        self.words[node.output] = words
        self.tensors[node.output] = info
        self.nodes.append(node)

    def finish(self, name: str, made: str, info: g.TensorInfo) -> None:
        """The tensor `made` stands for the float tensor `name`, rescaled to its class where it differs."""
        self.alias[name] = self.at(made, self.info(name), name)

    def at(self, tensor: str, info: g.TensorInfo, name: str) -> str:
        """`tensor` at another format or offset: itself, or a rescaled copy."""
        have = self.tensors[tensor]
        if have == info:
            return tensor
        plan = RescalePlan(have.format, info.format, have.offset, info.offset, self.options.datapath.underflow)
        output = self.unique(f"{name}_rescaled")
        self.emit(g.Rescale(output, (tensor,), output, plan), info)
        return output

    def lower_conv(self, node: _FloatNode) -> None:
        self.lower_layer(node)

    def lower_gemm(self, node: _FloatNode) -> None:
        self.lower_layer(node)

    def lower_matmul(self, node: _FloatNode) -> None:
        self.lower_layer(node)

    def lower_layer(self, node: _FloatNode) -> None:
        assert node.weight is not None
        spec = self.spec(node)
        weight_format, activation = self.layer_formats(node)
        recipe = None if spec is not None else self.recipe(node)
        own = spec.datapath if spec is not None else recipe.datapath if recipe is not None else None
        base = load_datapath(own) if own else self.options.datapath
        datapath = base.with_formats(weight_format, activation)
        datapath = self.datapaths.setdefault(datapath.fingerprint, datapath)
        offset: Offset
        if spec is not None and spec.weight is not None:
            offset, axis = spec.weight_offset, spec.weight_axis
        else:
            per_channel = self.options.per_channel if recipe is None else recipe.granularity == "channel"
            method = self.options.weight_method if recipe is None else recipe.calibration
            axis = 0 if per_channel else None
            offset = calibrate(node.weight, weight_format, axis=axis, method=method)
        words = encode(node.weight, weight_format, offset, axis=axis, name=node.weight_name or node.name)
        if axis not in (None, 0):
            raise BadValueError(f"{node.name!r}: weights may have offsets per output channel only, not axis {axis}")
        source = self.at(
            self.alias[node.inputs[0]],
            g.TensorInfo(activation, self.info(node.inputs[0]).offset)
            if activation == self.info(node.inputs[0]).format
            else self._calibrated(node.inputs[0], activation),
            node.inputs[0],
        )
        wanted = self.info(node.output)
        ratio = datapath.gamma // wanted.format.gamma if datapath.gamma >= wanted.format.gamma else 1
        made = widened(wanted.format, datapath.gamma) if datapath.gamma >= wanted.format.gamma else datapath.output
        target = g.TensorInfo(
            made,
            wanted.offset * ratio
            if made.gamma == wanted.format.gamma * ratio
            else self._calibrated(node.output, made).offset,
        )
        plan = DotPlan(datapath, activation, weight_format, made, self.tensors[source].offset, offset, target.offset)
        name = self.unique(layer_name(node.weight_name, node.name))
        output = self.unique(f"{node.output}_words")

        def placed(bias: npt.NDArray[np.float64] | None) -> g.Node:
            if node.op == "Conv":
                assert node.window is not None
                made, integers = placement.place_convolution(
                    plan, self.words[source], words, bias, node.window, node.groups, self.options.headroom
                )
                return g.Conv(name, (source,), output, words, integers, made, node.window, node.groups)
            x = self.words[source]
            rows = x.reshape(-1, x.shape[-1])
            made, integers = placement.place_dot(plan, rows, words, bias, self.options.headroom)
            return g.Gemm(name, (source,), output, words, integers, made)

        lowered = placed(node.bias)
        if self.options.correct_bias:
            lacking = self._lacking(node, lowered, target)
            lowered = placed(lacking if node.bias is None else node.bias + lacking)
        self.emit(lowered, target)
        self.finish(node.output, output, target)

    def _lacking(self, node: _FloatNode, lowered: g.Node, target: g.TensorInfo) -> npt.NDArray[np.float64]:
        """What the words of a layer's outputs lack on the sample's average, a channel: float64 [channels].

        Layers before it are corrected already, so this is the error that is left, that of this layer's own words among
        it (Nagel et al. 2019, empirical bias correction).
        """
        words = lowered.run([self.words[name] for name in lowered.inputs], Counts())
        got = np.asarray(decode(words, target.format, target.offset, np.float64))
        wanted = self.values[node.output][: len(got)].astype(np.float64)
        axes = tuple(a for a in range(got.ndim) if a != (1 if node.op == "Conv" else got.ndim - 1))
        return np.asarray((wanted - got).mean(axis=axes))

    def _calibrated(self, name: str, fmt: LNSFormat) -> g.TensorInfo:
        return g.TensorInfo(fmt, self.offset([name], fmt))

    def lower_add(self, node: _FloatNode) -> None:
        wanted = self.info(node.output)
        datapath = self.options.datapath
        operands = []
        for name in node.inputs:
            tensor = self.alias[name]
            have = self.tensors[tensor]
            if have.format.gamma != wanted.format.gamma:
                tensor = self.at(tensor, self._calibrated(name, wanted.format), name)
            operands.append(tensor)
        a, b = (self.tensors[t] for t in operands)
        accumulator = (
            datapath.with_formats(datapath.weight, wanted.format).add
            if (wanted.format != datapath.output)
            else datapath.add
        )
        plan = AddPlan(
            accumulator,
            a.format,
            b.format,
            wanted.format,
            a.offset,
            b.offset,
            wanted.offset,
            0,
            datapath.underflow,
        )
        x, y = (self.values[n][: self.options.sample].astype(np.float64) for n in node.inputs)
        plan = placement.place_add(plan, x, y, self.options.headroom)
        output = self.unique(f"{node.output}_words")
        self.emit(g.Add(self.unique(node.name), tuple(operands), output, plan), wanted)
        self.finish(node.output, output, wanted)

    def lower_concat(self, node: _FloatNode) -> None:
        wanted = self.info(node.output)
        axis = int(node.attributes.get("axis", 1))
        if axis == 0:
            raise UnsupportedError(f"Concat {node.name!r} joins along the batch axis")
        tensors = tuple(self.at(self.alias[n], wanted, n) for n in node.inputs)
        output = self.unique(f"{node.output}_words")
        self.emit(g.Concat(self.unique(node.name), tensors, output, axis), wanted)
        self.alias[node.output] = output

    def lower_averagepool(self, node: _FloatNode) -> None:
        assert node.window is not None
        include = bool(node.attributes.get("count_include_pad", 0))
        self._average(node, node.inputs[0], node.window, include, node.output)

    def lower_globalaveragepool(self, node: _FloatNode) -> None:
        spatial = self.values[node.inputs[0]].shape[2:]
        self._average(node, node.inputs[0], Window(spatial), False, node.output)

    def lower_reducemean(self, node: _FloatNode) -> None:
        shape = self.values[node.inputs[0]].shape
        axes = sorted(a % len(shape) for a in node.attributes.get("axes", range(len(shape))))
        if axes != list(range(2, len(shape))):
            raise UnsupportedError(f"ReduceMean {node.name!r} over axes {axes}: only all spatial axes have an LNS form")
        self._average(node, node.inputs[0], Window(shape[2:]), False, node.output)

    def _average(self, node: _FloatNode, source: str, window: Window, include: bool, name: str) -> None:
        wanted = self.info(name)
        tensor = self.alias[source]
        if self.tensors[tensor].format.gamma != wanted.format.gamma:
            tensor = self.at(tensor, self._calibrated(source, wanted.format), source)
        have = self.tensors[tensor]
        datapath = self.options.datapath
        accumulator = (
            datapath.with_formats(datapath.weight, wanted.format).add
            if (wanted.format != datapath.output)
            else datapath.add
        )
        plan = PoolPlan(accumulator, have.format, wanted.format, have.offset, wanted.offset, 0, datapath.underflow)
        sample = self.values[source][: self.options.sample].astype(np.float64)
        view = reference.windows(sample, window)
        flat = view.reshape(*view.shape[: 2 + len(window.kernel)], -1)
        plan = placement.place_pool(plan, flat, self.options.headroom)
        output = self.unique(f"{name}_words")
        self.emit(
            g.AveragePool(self.unique(node.name), (tensor,), output, plan, window, include, sample.shape[2:]), wanted
        )
        shape = self.values[name].shape
        if len(shape) != self.words[output].ndim:
            flat_name = self.unique(f"{name}_flat")
            self.emit(g.Reshape(self.unique(f"{node.name}_shape"), (output,), flat_name, (-1, *shape[1:])), wanted)
            output = flat_name
        self.finish(name, output, wanted)

    def lower_preserving(self, node: _FloatNode) -> None:
        source = self.alias[node.inputs[0]]
        info = self.tensors[source]
        if node.op in ("Identity", "Dropout"):
            self.alias[node.output] = source
            return
        name, output = self.unique(node.name), self.unique(f"{node.output}_words")
        lowered: g.Node
        if node.op == "Relu":
            lowered = g.Relu(name, (source,), output, info.format)
        elif node.op == "Clip":
            lowered = self._clip(node, name, source, output, info)
        elif node.op == "MaxPool":
            assert node.window is not None
            lowered = g.MaxPool(name, (source,), output, info.format, node.window)
        elif node.op == "Transpose":
            rank = self.values[node.inputs[0]].ndim
            order = tuple(node.attributes.get("perm", range(rank - 1, -1, -1)))
            if order[:1] != (0,):
                raise UnsupportedError(f"Transpose {node.name!r} moves the batch axis")
            lowered = g.Transpose(name, (source,), output, order)
        else:
            lowered = g.Reshape(name, (source,), output, (-1, *self.values[node.output].shape[1:]))
        self.emit(lowered, info)
        self.alias[node.output] = output

    def _clip(self, node: _FloatNode, name: str, source: str, output: str, info: g.TensorInfo) -> g.Node:
        low, high = node.attributes.get("min", -np.inf), node.attributes.get("max", np.inf)
        bounds = encode(np.array([low, high]), info.format, info.offset, negative="clip", name=node.name)
        return g.Clip(name, (source,), output, info.format, int(bounds[0]), int(bounds[1]))


def layer_name(weight: str, node: str) -> str:
    """The name of a layer in recipes and reports: of its weights without ``.weight``, or of its node."""
    return weight.removesuffix(".weight") or node


def layer_types(op: str) -> tuple[str, ...]:
    """What a recipe's rule may call a layer of an ONNX operator."""
    return ("conv", op) if op.startswith("Conv") else ("linear", op)


def sqnr_db(exact: npt.NDArray[Any], got: npt.NDArray[Any]) -> float | None:
    """Signal-to-quantization-noise ratio in decibels; None where there is no signal, infinity if equal."""
    signal = float(np.square(exact, dtype=np.float64).sum())
    noise = float(np.square(np.subtract(exact, got, dtype=np.float64)).sum())
    if signal == 0:
        return None
    return float("inf") if noise == 0 else 10 * float(np.log10(signal / noise))


def layer_errors(
    net_values: Mapping[str, Floats], graph: g.LNSGraph, words: Mapping[str, Words]
) -> dict[str, float | None]:
    """SQNR in dB of each node's output against the float tensor it stands for, where there is one.

    Where a ReLU alone reads the output, it is measured behind it.
    """
    errors = {}
    for node in graph.nodes:
        output = (graph.read_by_relu(node.output) or node).output
        name = output.removesuffix("_words")
        if name in net_values and output in words:
            info = graph.tensors[output]
            errors[node.name] = sqnr_db(net_values[name], decode(words[output], info.format, info.offset))
    return errors
