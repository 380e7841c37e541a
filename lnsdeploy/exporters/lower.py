"""From a float ONNX model to a net on words: fold, calibrate, encode (docs/lowering.md).

Every tensor of the float net belongs to a class of tensors that share one offset, because the operations
between them (ReLU, max pooling, reshaping) do not change words' scale. Offsets come from a layer's own
recorded one (quantization-aware training), or from a sample of real inputs; accumulators are placed by
running the net so far, on words.

A tensor exists on words, in float, or both, and is converted when something first reads it the other way. Functions
of one number are not computed at all but looked up: however many operations lie between two tensors, if one number
alone decides them, they are one table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lnsdeploy.datapath import Datapath, LogAccumulator, load_datapath, widened
from lnsdeploy.emulator import graph as g
from lnsdeploy.emulator import reference
from lnsdeploy.emulator.plan import AddPlan, Counts, DotPlan, MultiplyPlan, PoolPlan, RescalePlan, Window
from lnsdeploy.errors import BadValueError, UnsupportedError
from lnsdeploy.exporters import placement
from lnsdeploy.exporters.calibration import Statistics
from lnsdeploy.exporters.floatnet import (
    MOVEMENT,
    SUPPORTED,
    UNARY,
    WITH_SCALARS,
    FloatNet,
    FloatNode,
    Floats,
    NotOnWordsError,
    float_node,
    read_net,
)
from lnsdeploy.formats import LNSFormat, Method, Offset, Words, calibrate, decode, encode
from lnsdeploy.recipe import LayerRecipe, Recipe

__all__ = ["SUPPORTED", "LowerOptions", "Lowered", "float_values", "layer_errors", "layer_name", "lower", "sqnr_db"]

# Operations whose MACs count: what of them runs in float lowers the coverage.
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum")
_WHY = {
    "Softmax": "a softmax divides by a sum of exponentials",
    "LogSoftmax": "a softmax divides by a sum of exponentials",
    "LayerNormalization": "a normalization by the values' own spread",
    "GroupNormalization": "a normalization by the values' own spread",
    "InstanceNormalization": "a normalization by the values' own spread",
    "MeanVarianceNormalization": "a normalization by the values' own spread",
    "LRN": "a normalization by a window of channels",
}


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
        UnsupportedError: an operation can be computed neither on words nor in float; the message names it.
        BadValueError, BadFileError: the model is not of this form.
    """
    if len(inputs) == 0:
        raise BadValueError("calibration needs at least one input")
    known = dict(specs or {})
    fixed = frozenset(f"{name}.weight" for name in known) | frozenset(known)
    return _Lowering(read_net(model, inputs, fixed), options, known, progress).run(dict(metadata or {}))


def float_values(model: Any, inputs: npt.NDArray[Any]) -> dict[str, Floats]:
    """Every tensor of a float ONNX model that lowering keeps, by name, for some inputs [n, …]."""
    net = read_net(model, inputs)
    kept = {net.input, *(node.output for node in net.nodes)}
    return {name: value for name, value in net.values.items() if name in kept}


# ---------------------------------------------------------------------------------------------------
# Lowering


class _Lowering:
    def __init__(
        self,
        net: FloatNet,
        options: LowerOptions,
        specs: dict[str, LayerSpec],
        progress: Callable[[str], None] | None,
    ):
        from lnsdeploy.emulator import cpu

        self.net, self.values, self.options, self.specs = net, net.values, options, specs
        self.progress = progress or (lambda name: None)
        self.step_of = cpu.step_of
        self.nodes: list[g.Node] = []
        self.tensors: dict[str, g.TensorInfo] = {}
        self.constants: dict[str, Words] = {}
        self.datapaths: dict[str, Datapath] = {}
        # what the tensors of the new net hold for the sample: words, or float numbers
        self.held: dict[str, npt.NDArray[Any]] = {}
        # the float net's tensors on words and in float, by the new net's names
        self.alias: dict[str, str] = {}
        self.floats: dict[str, str] = {}
        self.macs = self.float_macs = 0
        self.float_ops: list[str] = []
        self.names: set[str] = set()
        self.roots = self._roots()
        self.class_of = self._classes()
        self.class_info = self._class_infos()

    def run(self, metadata: dict[str, str]) -> Lowered:
        net, options = self.net, self.options
        encoded = f"{net.input}_words"
        info = self.info(net.input)
        self.tensors[encoded] = info
        self.alias = {net.input: encoded}
        sample = self.values[net.input][: options.sample]
        self.held[encoded] = encode(sample, info.format, info.offset, negative="clip", name=net.input)
        self.encoded = encoded
        for node in net.nodes:
            self.progress(node.name)
            if not self.is_lazy(node):
                self.make(node)
        last = self.words_of(net.output)
        output = net.output if net.output not in {n.output for n in self.nodes} else f"{net.output}_float"
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
            constants=self.constants,
        )
        count = max(len(sample), 1)
        every = self.macs + self.float_macs
        coverage = self.macs / every if every else 1.0
        return Lowered(graph, self.macs // count, coverage, tuple(self.float_ops))

    # functions of one number

    def _roots(self) -> dict[str, str]:
        """For each tensor, the one whose numbers alone decide its own, place by place; itself where there is none."""
        roots = {name: name for name in self.values}
        for node in self.net.nodes:
            if node.op not in UNARY | WITH_SCALARS or node.reason or not node.inputs:
                continue
            constants = [a for a in node.arguments if isinstance(a, np.ndarray)]
            found = {roots[name] for name in node.inputs}
            shapes = {self.values[name].shape for name in (*node.inputs, node.output)}
            plain = all(c.size == 1 for c in constants) and len(shapes) == 1 and len(found) == 1
            if not plain or (node.op in ("Relu", "Clip") and roots[node.inputs[0]] == node.inputs[0]):
                continue
            if self.values[node.output].dtype == np.float32 and self.values[node.inputs[0]].dtype == np.float32:
                roots[node.output] = found.pop()
        return roots

    def is_lazy(self, node: FloatNode) -> bool:
        """Whether a node is made only when something reads it."""
        if self.roots[node.output] != node.output:
            return True
        # what follows operations in float stays there until it is read on words
        moves = node.op in MOVEMENT | {"Relu", "Clip"} and len(node.inputs) == 1
        return moves and node.inputs[0] not in self.alias

    def table(self, root: str, name: str, info: g.TensorInfo) -> tuple[Words, str]:
        """The words of a function of one number for every word of its argument, and what it is called."""
        have = self.tensors[self.alias[root]]
        every = np.arange(1 << have.format.bits, dtype=np.int64).astype(have.format.dtype)
        known: dict[str, npt.NDArray[Any]] = {root: decode(every, have.format, have.offset)}
        chain: list[str] = []

        def value(tensor: str) -> npt.NDArray[Any]:
            if tensor not in known:
                node = self.net.makers[tensor]
                flat = replace(
                    node,
                    original=_scalars(*(node.original or (node.op, node.attributes, node.arguments))),
                )
                chain.append(node.op)
                made = float_node(flat, node.name)
                known[tensor] = made.run([value(source) for source in made.inputs], Counts())
            return known[tensor]

        with np.errstate(all="ignore"):
            numbers = g.numbers(value(name), name)
        words = encode(numbers, info.format, info.offset, underflow=self.underflow, negative="clip", name=name)
        # a word of a sign and code 0 is read as zero; it never comes
        return words, " of ".join(chain)

    @property
    def underflow(self) -> Any:
        return self.options.datapath.underflow

    # classes of tensors that share an offset

    def preserves(self, node: FloatNode) -> bool:
        """Whether output and inputs of a node share format and offset."""
        if node.op in ("Relu", "Clip"):
            return self.roots[node.output] == node.output
        pools = node.op == "MaxPool"
        return (node.op in MOVEMENT or pools) and not node.reason

    def _classes(self) -> dict[str, str]:
        parent = {name: name for name in self.values}

        def find(name: str) -> str:
            while parent[name] != name:
                parent[name] = parent[parent[name]]
                name = parent[name]
            return name

        for node in self.net.nodes:
            if self.preserves(node) or node.op == "Concat":
                for name in node.inputs:
                    parent[find(name)] = find(node.output)
        return {name: find(name) for name in parent}

    def _class_infos(self) -> dict[str, g.TensorInfo]:
        """One format and offset a class: the layers' that read it, or calibrated where it is read."""
        members: dict[str, list[str]] = {}
        for name, root in self.class_of.items():
            if self.values[name].dtype == np.float32:
                members.setdefault(root, []).append(name)
        infos = {}
        for root, names in members.items():
            readers = [
                node
                for name in names
                for node in self.net.uses.get(name, [])
                if not self.preserves(node) and node.op != "Concat"
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
        if not values.size:
            return 0
        return int(calibrate(values, fmt, method=method, percentile=percentile, name=names[0]))

    def info(self, name: str) -> g.TensorInfo:
        return self.class_info[self.class_of[name]]

    def _calibrated(self, name: str, fmt: LNSFormat) -> g.TensorInfo:
        return g.TensorInfo(fmt, self.offset([name], fmt))

    def spec(self, node: FloatNode) -> LayerSpec | None:
        return self.specs.get(node.weight_name.removesuffix(".weight"))

    def layer_formats(self, node: FloatNode) -> tuple[LNSFormat, LNSFormat]:
        """Formats of weights and activations."""
        spec, datapath = self.spec(node), self.options.datapath
        if spec is None:
            found = self.recipe(node)
            if found is None:
                return datapath.weight, datapath.activation
            return found.weight or datapath.weight, found.activation or datapath.activation
        return spec.weight or datapath.weight, spec.activation or datapath.activation

    def recipe(self, node: FloatNode) -> LayerRecipe | None:
        """What the recipe says of a layer that has no recorded formats."""
        if self.options.recipe is None:
            return None
        name = layer_name(node.weight_name, node.name)
        names = [layer_name(other.weight_name, other.name) for other in self.net.nodes if other.weight_name]
        return self.options.recipe.for_layer(name, layer_types(node.op), Recipe.positions(name, names))

    # nodes

    def unique(self, name: str) -> str:
        made, count = name, 1
        while made in self.names:
            made, count = f"{name}_{count}", count + 1
        self.names.add(made)
        return made

    def output_name(self, name: str) -> str:
        return self.unique(f"{name}_words")

    def emit(self, node: g.Node, info: g.TensorInfo | None) -> None:
        inputs = [self.held[name] for name in node.inputs]
        made = self.step_of(node)(inputs, Counts())
        self.macs += node.macs([a.shape for a in inputs], made.shape)
        self.held[node.output] = made
        if info is not None:
            self.tensors[node.output] = info
        self.nodes.append(node)

    def words_of(self, name: str) -> str:
        """The tensor of words that stands for a tensor of the float net."""
        if name in self.alias:
            return self.alias[name]
        if name in self.net.batch_constants:
            constant = self.constant(name, self.net.batch_constants[name], self.info(name))
            output = self.output_name(name)
            self.emit(g.Broadcast(self.unique(f"{name}_batch"), (constant, self.encoded), output), self.info(name))
            self.alias[name] = output
            return output
        root = self.roots[name]
        if name not in self.floats and root != name and root in self.alias:
            info = self.info(name)
            table, function = self.table(root, name, info)
            output = self.output_name(name)
            node = self.net.makers[name]
            source = self.alias[root]
            self.emit(
                g.Lookup(self.unique(node.name), (source,), output, table, self.tensors[source], info, function), info
            )
            self.alias[name] = output
            return output
        made = self.float_of(name)
        info, output = self.info(name), self.output_name(name)
        self.emit(g.Encode(self.unique(f"{name}_encode"), (made,), output, info, self.underflow), info)
        self.alias[name] = output
        return output

    def float_of(self, name: str) -> str:
        """The tensor in float that stands for a tensor of the float net."""
        if name in self.floats:
            return self.floats[name]
        if name in self.alias or name in self.net.batch_constants:
            source = self.words_of(name)
            output = self.unique(f"{name}_decoded")
            self.emit(g.Decode(self.unique(f"{name}_decode"), (source,), output, self.tensors[source]), None)
            self.floats[name] = output
            return output
        if name not in self.net.makers:
            raise UnsupportedError(f"tensor {name!r} follows the batch's size, which an operation in float cannot read")
        self.make_float(self.net.makers[name])
        return self.floats[name]

    def constant(self, name: str, value: npt.NDArray[Any], info: g.TensorInfo) -> str:
        """A tensor of words that the net holds itself."""
        made = self.unique(f"{name}_constant")
        words = encode(
            np.asarray(value, dtype=np.float32),
            info.format,
            info.offset,
            underflow=self.underflow,
            negative="clip",
            name=name,
        )
        self.constants[made] = self.held[made] = words
        self.tensors[made] = info
        return made

    def make(self, node: FloatNode) -> None:
        """Lower a node: on words where that is possible, else in float."""
        if node.output in self.alias or node.output in self.floats:
            return
        method = getattr(self, f"lower_{node.op.lower()}", None)
        if node.weight is not None:
            method = self.lower_layer
        elif self.preserves(node):
            method = self.lower_preserving
        if node.reason or method is None:
            self.make_float(node)
            return
        marks = len(self.nodes)
        try:
            method(node)
        except NotOnWordsError as why:
            # conversions that were made on the way may be of use later; nothing else was made
            assert all(isinstance(n, (g.Encode, g.Decode, g.Lookup, g.Broadcast, g.Float)) for n in self.nodes[marks:])
            node.reason = str(why)
            self.make_float(node)

    def make_float(self, node: FloatNode) -> None:
        """An operation in float."""
        if node.op == "Identity":
            self.floats[node.output] = self.float_of(node.inputs[0])
            return
        for made, output in self._float_forms(node):
            inputs = tuple(self.float_of(name) for name in made.inputs)
            name = self.unique(made.name)
            target = self.unique(f"{output}_float")
            ready = replace(made, name=name, inputs=inputs, output=target)
            self.emit(ready, None)
            self.floats[output] = target
            # of functions of one number only those that were not looked up
            self.float_ops.append(f"{name} ({made.kind}): {made.reason or _WHY.get(made.kind, 'no form on words')}")
            if made.kind in _PRODUCTS:
                self.float_macs += _macs(made, [self.held[i] for i in inputs], self.held[target])

    def _float_forms(self, node: FloatNode) -> list[tuple[g.Float, str]]:
        """The operations of ONNX that make a node, with the float net's names of what they make."""
        reason = node.reason
        if not reason and (node.op in MOVEMENT or self.roots[node.output] != node.output or node.op in UNARY):
            reason = "between operations in float"
        if node.op == "Reshape":
            try:
                shape: Any = np.array(self.net.open_shape(node.output), dtype=np.int64)
            except NotOnWordsError as why:
                raise UnsupportedError(f"Reshape {node.name!r}: {why}") from why
            made = replace(node, original=("Reshape", {}, [node.arguments[0], shape]), reason=reason)
            return [(float_node(made, node.name), node.output)]
        if node.op == "Take" and node.original is None:
            forms, source = [], node.arguments[0]
            for i, (axis, places) in enumerate(node.steps):
                output = node.output if i == len(node.steps) - 1 else f"{node.output}_{i}"
                part = replace(node, original=("Gather", {"axis": axis}, [source, places]), reason=reason)
                forms.append((float_node(part, node.name), output))
                source = output
            return forms
        return [(float_node(replace(node, reason=reason), node.name), node.output)]

    def finish(self, name: str, made: str, info: g.TensorInfo) -> None:
        """The tensor `made` stands for the float tensor `name`, rescaled to its class where it differs."""
        self.alias[name] = self.at(made, self.info(name), name)

    def at(self, tensor: str, info: g.TensorInfo, name: str) -> str:
        """`tensor` at another format or offset: itself, or a rescaled copy."""
        have = self.tensors[tensor]
        if have == info:
            return tensor
        plan = RescalePlan(have.format, info.format, have.offset, info.offset, self.underflow)
        output = self.unique(f"{name}_rescaled")
        self.emit(g.Rescale(output, (tensor,), output, plan), info)
        return output

    def operand(self, argument: Any, name: str, wanted: LNSFormat) -> str:
        """The words of an argument, at the γ of `wanted`."""
        if isinstance(argument, str):
            tensor = self.words_of(argument)
            if self.tensors[tensor].format.gamma != wanted.gamma:
                tensor = self.at(tensor, self._calibrated(argument, wanted), argument)
            return tensor
        value = np.asarray(argument, dtype=np.float32)
        return self.constant(name, value, g.TensorInfo(wanted, int(calibrate(value, wanted, name=name))))

    def sampled(self, argument: Any) -> npt.NDArray[np.float64]:
        value = self.values[argument][: self.options.sample] if isinstance(argument, str) else argument
        return np.asarray(value, dtype=np.float64)

    def adder(self, fmt: LNSFormat) -> LogAccumulator:
        datapath = self.options.datapath
        return datapath.add if fmt == datapath.output else datapath.with_formats(datapath.weight, fmt).add

    # layers

    def lower_layer(self, node: FloatNode) -> None:
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
        read = node.inputs[0]
        source = self.at(
            self.words_of(read),
            g.TensorInfo(activation, self.info(read).offset)
            if activation == self.info(read).format
            else self._calibrated(read, activation),
            read,
        )
        if node.stuff:
            source = self._stuffed(node, source)
        target = self._target(node.output, datapath)
        plan = DotPlan(
            datapath, activation, weight_format, target.format, self.tensors[source].offset, offset, target.offset
        )
        name = self.unique(layer_name(node.weight_name, node.name))
        output = self.output_name(node.output)

        def placed(bias: npt.NDArray[np.float64] | None) -> g.Node:
            if node.op == "Conv":
                assert node.window is not None
                made, integers = placement.place_convolution(
                    plan, self.held[source], words, bias, node.window, node.groups, self.options.headroom
                )
                return g.Conv(name, (source,), output, words, integers, made, node.window, node.groups)
            x = self.held[source]
            rows = x.reshape(-1, x.shape[-1])
            made, integers = placement.place_dot(plan, rows, words, bias, self.options.headroom)
            return g.Gemm(name, (source,), output, words, integers, made)

        lowered = placed(node.bias)
        if self.options.correct_bias:
            lacking = self._lacking(node, lowered, target)
            lowered = placed(lacking if node.bias is None else node.bias + lacking)
        self.emit(lowered, target)
        self.finish(node.output, output, target)

    def _target(self, name: str, datapath: Datapath) -> g.TensorInfo:
        """Format and offset in which a product gives a tensor, before it is rescaled to its class."""
        wanted = self.info(name)
        ratio = datapath.gamma // wanted.format.gamma if datapath.gamma >= wanted.format.gamma else 1
        made = widened(wanted.format, datapath.gamma) if datapath.gamma >= wanted.format.gamma else datapath.output
        if made.gamma == wanted.format.gamma * ratio:
            return g.TensorInfo(made, wanted.offset * ratio)
        return g.TensorInfo(made, self._calibrated(name, made).offset)

    def _stuffed(self, node: FloatNode, source: str) -> str:
        """The input of a transposed convolution with zeros between its words."""
        info, shape = self.tensors[source], self.held[source].shape
        axes = len(node.stuff)
        apart = [n for size in shape[2:] for n in (size, 1)]
        pads = [0, 0] + [0] * 2 * axes
        ends = [0, 0] + [n for stride in node.stuff for n in (0, stride - 1)]
        sizes = [size * stride for size, stride in zip(shape[2:], node.stuff, strict=True)]
        forms: tuple[tuple[str, Callable[[str, str, str], g.Node]], ...] = (
            ("apart", lambda name, x, y: g.Reshape(name, (x,), y, (-1, shape[1], *apart))),
            ("zeros", lambda name, x, y: g.Pad(name, (x,), y, (*pads, *ends))),
            ("joined", lambda name, x, y: g.Reshape(name, (x,), y, (-1, shape[1], *sizes))),
        )
        for what, make in forms:
            output = self.unique(f"{node.output}_{what}")
            self.emit(make(self.unique(f"{node.name}_{what}"), source, output), info)
            source = output
        for axis, (size, stride) in enumerate(zip(shape[2:], node.stuff, strict=True)):
            if stride > 1:
                places = np.arange((size - 1) * stride + 1)
                source = self._take(node, source, 2 + axis, places)
        return source

    def _take(self, node: FloatNode, source: str, axis: int, places: npt.NDArray[np.int64]) -> str:
        output = self.unique(f"{node.output}_taken")
        taken = g.Take(self.unique(f"{node.name}_take"), (source,), output, axis, tuple(int(i) for i in places))
        self.emit(taken, self.tensors[source])
        return output

    def _lacking(self, node: FloatNode, lowered: g.Node, target: g.TensorInfo) -> npt.NDArray[np.float64]:
        """What the words of a layer's outputs lack on the sample's average, a channel: float64 [channels].

        Layers before it are corrected already, so this is the error that is left, that of this layer's own words among
        it (Nagel et al. 2019, empirical bias correction).
        """
        words = self.step_of(lowered)([self.held[name] for name in lowered.inputs], Counts())
        got = np.asarray(decode(words, target.format, target.offset, np.float64))
        wanted = self.values[node.output][: len(got)].astype(np.float64)
        axes = tuple(a for a in range(got.ndim) if a != (1 if node.op == "Conv" else got.ndim - 1))
        return np.asarray((wanted - got).mean(axis=axes))

    def lower_matmul(self, node: FloatNode) -> None:
        """A product of two tensors (spec 7.2)."""
        if node.weight is not None:
            self.lower_layer(node)
            return
        first, second = node.arguments[0], node.arguments[1]
        shapes = [np.shape(self._float(v)) for v in (first, second)]
        leading = [shape[:-2] for shape in shapes]
        if leading[0] != leading[1]:
            raise NotOnWordsError(f"a product of tensors of shapes {shapes[0]} and {shapes[1]}, whose axes differ")
        fmt = self.options.datapath.activation
        a, b = (self.operand(v, f"{node.name}_{i}", fmt) for i, v in enumerate((first, second)))
        have = [self.tensors[t] for t in (a, b)]
        datapath = self.options.datapath.with_formats(have[1].format, have[0].format)
        datapath = self.datapaths.setdefault(datapath.fingerprint, datapath)
        target = self._target(node.output, datapath)
        plan = DotPlan(
            datapath, have[0].format, have[1].format, target.format, have[0].offset, have[1].offset, target.offset
        )
        plan = placement.place_matmul(plan, self.held[a], self.held[b], self.options.headroom)
        output = self.output_name(node.output)
        self.emit(g.MatMul(self.unique(node.name), (a, b), output, plan), target)
        self.finish(node.output, output, target)

    # element by element

    def lower_add(self, node: FloatNode) -> None:
        self._add(node, node.arguments[0], node.arguments[1], node.output)

    def lower_sub(self, node: FloatNode) -> None:
        first, second = node.arguments
        fmt = self.info(node.output).format
        if not fmt.signed:
            raise NotOnWordsError(f"a difference in the unsigned format {fmt}")
        if isinstance(second, np.ndarray):
            self._add(node, first, -second, node.output)
            return
        assert isinstance(second, str)
        source = self.operand(second, second, fmt)
        info = self.tensors[source]
        if not info.format.signed:
            raise NotOnWordsError(f"a difference in the unsigned format {info.format}")
        every = np.arange(1 << info.format.bits, dtype=np.int64).astype(info.format.dtype)
        output = self.unique(f"{second}_negated")
        table = reference.negate(every, info.format)
        self.emit(g.Lookup(self.unique(f"{node.name}_negate"), (source,), output, table, info, info, "Neg"), info)
        minus = f"{node.output} minus"
        self.alias[minus], self.values[minus] = output, -self.values[second]
        self._add(node, first, minus, node.output)

    def lower_sum(self, node: FloatNode) -> None:
        total = node.arguments[0]
        if len(node.arguments) == 1:
            self.alias[node.output] = self.words_of(node.inputs[0])
            return
        for i, argument in enumerate(node.arguments[1:], start=1):
            name = node.output
            if i < len(node.arguments) - 1:
                name = f"{node.output} of {i + 1}"
                self.values[name] = self._float(total) + self._float(argument)
                root = self.class_of[name] = name
                fmt = self.info(node.output).format
                self.class_info[root] = g.TensorInfo(fmt, int(calibrate(self.values[name], fmt, name=name)))
            self._add(node, total, argument, name)
            total = name

    def _float(self, argument: Any) -> npt.NDArray[Any]:
        value: npt.NDArray[Any] = self.values[argument] if isinstance(argument, str) else argument
        return value

    def _add(self, node: FloatNode, first: Any, second: Any, name: str) -> None:
        wanted = self.info(name)
        operands = [self.operand(v, f"{node.name}_{i}", wanted.format) for i, v in enumerate((first, second))]
        a, b = (self.tensors[t] for t in operands)
        plan = AddPlan(
            self.adder(wanted.format),
            a.format,
            b.format,
            wanted.format,
            a.offset,
            b.offset,
            wanted.offset,
            0,
            self.underflow,
        )
        plan = placement.place_add(plan, self.sampled(first), self.sampled(second), self.options.headroom)
        output = self.output_name(name)
        self.emit(g.Add(self.unique(node.name), (operands[0], operands[1]), output, plan), wanted)
        self.finish(name, output, wanted)

    def lower_mul(self, node: FloatNode) -> None:
        wanted = self.info(node.output)
        operands = [self.operand(v, f"{node.name}_{i}", wanted.format) for i, v in enumerate(node.arguments)]
        a, b = (self.tensors[t] for t in operands)
        plan = MultiplyPlan(a.format, b.format, wanted.format, a.offset, b.offset, wanted.offset, self.underflow)
        output = self.output_name(node.output)
        self.emit(g.Multiply(self.unique(node.name), (operands[0], operands[1]), output, plan), wanted)
        self.finish(node.output, output, wanted)

    # windows and places

    def lower_concat(self, node: FloatNode) -> None:
        wanted = self.info(node.output)
        axis = int(node.attributes["axis"])
        if axis in self.net.batch_axes(node.output):
            raise NotOnWordsError("it joins along the batch axis")
        if any(not isinstance(a, str) for a in node.arguments):
            raise NotOnWordsError("it joins constants without a batch axis")
        tensors = tuple(self.at(self.words_of(n), wanted, n) for n in node.inputs)
        output = self.output_name(node.output)
        self.emit(g.Concat(self.unique(node.name), tensors, output, axis), wanted)
        self.alias[node.output] = output

    def lower_averagepool(self, node: FloatNode) -> None:
        assert node.window is not None
        include = bool(node.attributes.get("count_include_pad", 0))
        self._average(node, node.inputs[0], node.window, include, node.output)

    def _average(self, node: FloatNode, source: str, window: Window, include: bool, name: str) -> None:
        wanted = self.info(name)
        tensor = self.operand(source, source, wanted.format)
        have = self.tensors[tensor]
        plan = PoolPlan(
            self.adder(wanted.format), have.format, wanted.format, have.offset, wanted.offset, 0, self.underflow
        )
        sample = self.sampled(source)
        view = reference.windows(sample, window)
        flat = view.reshape(*view.shape[: 2 + len(window.kernel)], -1)
        plan = placement.place_pool(plan, flat, self.options.headroom)
        output = self.output_name(name)
        self.emit(
            g.AveragePool(self.unique(node.name), (tensor,), output, plan, window, include, sample.shape[2:]), wanted
        )
        self.finish(name, output, wanted)

    def lower_preserving(self, node: FloatNode) -> None:
        source = self.words_of(node.inputs[0])
        info = self.tensors[source]
        if node.op == "Identity":
            self.alias[node.output] = source
            return
        if node.op == "Take":
            if not node.steps:
                self.alias[node.output] = source
                return
            for axis, places in node.steps[:-1]:
                source = self._take(node, source, axis, places)
        lowered = self._preserved(node, source, info)
        self.emit(lowered, info)
        self.alias[node.output] = lowered.output

    def _preserved(self, node: FloatNode, source: str, info: g.TensorInfo) -> g.Node:
        if node.op == "Reshape":
            shape = self.net.open_shape(node.output)
        name, output = self.unique(node.name), self.output_name(node.output)
        if node.op == "Take":
            axis, places = node.steps[-1]
            return g.Take(name, (source,), output, axis, tuple(int(i) for i in places))
        if node.op == "Pad":
            return g.Pad(name, (source,), output, node.pads)
        if node.op == "Relu":
            return g.Relu(name, (source,), output, info.format)
        if node.op == "Clip":
            low, high = node.attributes.get("min", -np.inf), node.attributes.get("max", np.inf)
            bounds = encode(np.array([low, high]), info.format, info.offset, negative="clip", name=node.name)
            return g.Clip(name, (source,), output, info.format, int(bounds[0]), int(bounds[1]))
        if node.op == "MaxPool":
            assert node.window is not None
            return g.MaxPool(name, (source,), output, info.format, node.window)
        if node.op == "Transpose":
            return g.Transpose(name, (source,), output, tuple(node.attributes["perm"]))
        return g.Reshape(name, (source,), output, shape)


def _scalars(kind: str, attributes: dict[str, Any], arguments: list[Any]) -> tuple[str, dict[str, Any], list[Any]]:
    """An operation of one number with its constants as scalars, so that they fit numbers of any shape."""
    made = [np.reshape(a, ()) if isinstance(a, np.ndarray) and kind != "PRelu" else a for a in arguments]
    if kind == "PRelu":
        made[1] = np.reshape(arguments[1], (1,))
    return kind, attributes, made


def _macs(node: g.Float, inputs: list[npt.NDArray[Any]], output: npt.NDArray[Any]) -> int:
    """Multiply-accumulate operations of an operation in float."""
    shapes = [inputs[a].shape if isinstance(a, int) else np.shape(a) for a in node.arguments if a is not None]
    if node.kind == "Conv":
        return int(output.size) * int(np.prod(shapes[1][1:]))
    if node.kind == "ConvTranspose":
        return int(np.prod(shapes[0])) * int(np.prod(shapes[1][1:]))
    if node.kind == "Gemm":
        return int(output.size) * int(shapes[0][0 if node.attributes.get("transA") else 1])
    if node.kind == "MatMul":
        return int(output.size) * int(shapes[0][-1])
    # Einsum: every combination of its letters
    terms = str(node.attributes["equation"]).replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=False):
        letters = term.replace("...", "." * (len(shape) - len(term) + 3))
        # axes that dots stand for are counted from the end
        for i, (letter, size) in enumerate(zip(letters, shape, strict=False)):
            key = f".{i - letters.rindex('.')}" if letter == "." else letter
            sizes[key] = max(sizes.get(key, 1), int(size))
    return int(np.prod(list(sizes.values())))


def layer_name(weight: str, node: str) -> str:
    """The name of a layer in recipes and reports: of its weights without ``.weight``, or of its node.

    Weights that an exporter has made (``onnx::Conv_88``, where it folds a normalisation) are named after the module
    that the node's name tells: ``/blocks.0/Conv`` is ``blocks.0``.
    """
    if weight.startswith("onnx::") and node.startswith("/"):
        module, _, op = node.strip("/").rpartition("/")
        return ".".join(part for part in (module.replace("/", "."), op.partition("_")[2]) if part) or weight
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
