"""Nodes of the LNS ONNX model from plans, and back.

The tables that a node takes as inputs follow from its plan alone; equal tables are stored once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from lnsdeploy.datapath import Datapath, LinearAccumulator, LogAccumulator
from lnsdeploy.emulator import graph as g
from lnsdeploy.emulator import operands, reference
from lnsdeploy.emulator.operands import Arrays, decode_values, delta_tables, encode_thresholds, linear_tables
from lnsdeploy.emulator.plan import DotPlan, Window
from lnsdeploy.errors import BadFileError, UnsupportedError
from lnsdeploy.exporters.functions import DOMAIN, IR_VERSION, MAX_LOG_BITS, OPSET, VERSION, functions
from lnsdeploy.formats import LNSFormat

# A log adder's keys span the channels' shifts; beyond this the operands cannot be meant.
_MAX_SPREAD = 1 << 20


class _Pool:
    """Initializers, each content stored once under the first name it had."""

    def __init__(self) -> None:
        self.tensors: list[TensorProto] = []
        self._names: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def add(self, name: str, array: npt.NDArray[Any]) -> str:
        array = np.ascontiguousarray(array)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._names:
            self._names[key] = name
            self.tensors.append(numpy_helper.from_array(array, name))
        return self._names[key]


# ---------------------------------------------------------------------------------------------------
# Tables


def _delta_inputs(accumulator: LogAccumulator, gamma: int) -> Arrays:
    if accumulator.bits > MAX_LOG_BITS:
        raise UnsupportedError(
            f"a log accumulator of {accumulator.bits} bits has no ONNX form; {MAX_LOG_BITS} is the most"
        )
    return delta_tables(accumulator, gamma)


def log_tables(plan: DotPlan, channels: int, bias: npt.NDArray[np.int64] | None) -> Arrays:
    """The table inputs of LogGemm and LogConv.

    Raises:
        UnsupportedError: the accumulator is beyond what a function body holds.
    """
    if not channels:
        raise UnsupportedError("a layer with no output channels has no log accumulator to place")
    _delta_inputs(plan.datapath.log, plan.gamma)
    made = operands.log_tables(plan, channels, bias)
    entry = made["entry_shift"]
    if int(entry.max()) - int(entry.min()) > _MAX_SPREAD:
        raise UnsupportedError(
            f"the accumulator's place differs by {int(entry.max()) - int(entry.min())} codes between output channels; "
            f"{_MAX_SPREAD} is the most that an ONNX model holds"
        )
    return made


# ---------------------------------------------------------------------------------------------------
# Attributes


def _format_attributes(side: str, fmt: LNSFormat) -> dict[str, int]:
    if fmt.bits > 16:
        raise UnsupportedError(f"format {fmt}: words of an ONNX model have at most 16 bits")
    prefix = f"{side}_" if side else ""
    return {f"{prefix}bits": fmt.bits, f"{prefix}signed": int(fmt.signed)}


def _output_attributes(fmt: LNSFormat, underflow: str) -> dict[str, int]:
    return {
        **_format_attributes("output", fmt),
        "output_type": TensorProto.UINT8 if fmt.bits <= 8 else TensorProto.UINT16,
        "underflow": int(underflow == "min"),
    }


def _dot_attributes(plan: DotPlan) -> dict[str, int]:
    accumulator = plan.datapath.accumulate
    attributes = {
        **_format_attributes("activation", plan.activation),
        "activation_widen": plan.widen_activation,
        **_format_attributes("weight", plan.weight),
        "weight_widen": plan.widen_weight,
        "lanes": accumulator.lanes,
        "acc_bits": accumulator.bits,
        **_output_attributes(plan.output, plan.datapath.underflow),
    }
    if isinstance(accumulator, LinearAccumulator):
        attributes |= {"psum_bits": accumulator.step_bits, "saturate": int(accumulator.overflow == "saturate")}
    else:
        attributes |= {"guard_bits": accumulator.guard_bits}
    return attributes


def _window_attributes(window: Window) -> dict[str, list[int]]:
    axes = len(window.kernel)
    missing = 3 - axes
    zeros, ones = [0] * missing, [1] * missing
    return {
        "kernel_shape": ones + list(window.kernel),
        "strides": ones + list(window.strides),
        "pads": zeros + list(window.pads[:axes]) + zeros + list(window.pads[axes:]),
        "dilations": ones + list(window.dilations),
    }


def _window(attributes: Mapping[str, Any], axes: int) -> Window:
    pads = list(attributes["pads"])
    if not 1 <= axes <= 3 or len(pads) != 6:
        raise BadFileError(f"a window over {axes} axes with {len(pads)} pads")
    return Window(
        tuple(attributes["kernel_shape"][3 - axes :]),
        tuple(attributes["strides"][3 - axes :]),
        tuple(pads[3 - axes : 3] + pads[6 - axes :]),
        tuple(attributes["dilations"][3 - axes :]),
    )


# ---------------------------------------------------------------------------------------------------
# A net as an ONNX model


def model_of(graph: g.LNSGraph, metadata: Mapping[str, str], *, pack: bool = True) -> ModelProto:
    """The ONNX model of a net; deterministic.

    Args:
        pack: store weights of up to 4 bits two to a byte, in ONNX's type for such.

    Raises:
        UnsupportedError: a format, table or accumulator has no ONNX form.
    """
    pool = _Pool()
    for name, words in graph.constants.items():
        pool.tensors.append(numpy_helper.from_array(np.ascontiguousarray(words), name))
    nodes = [_encode_node(graph, pool)]
    nodes += [_node(node, graph, pool) for node in graph.nodes]
    nodes.append(_decode_node(graph, pool))
    tensors = pool.tensors
    if pack:
        nodes, tensors = _pack(nodes, tensors, narrow_layers(graph))
    batch = ["batch", *graph.input_shape[1:]]
    proto = helper.make_graph(
        nodes,
        "lnsdeploy",
        [helper.make_tensor_value_info(graph.input, TensorProto.FLOAT, batch)],
        [helper.make_tensor_value_info(graph.output, TensorProto.FLOAT, ["batch", *graph.output_shape[1:]])],
        tensors,
        # a custom operator's result has the type that the model states
        value_info=[
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(graph.tensors[name].format.dtype), None)
            for name in (graph.encoded, *(node.output for node in graph.nodes if node.makes_words))
        ]
        + [
            helper.make_tensor_value_info(node.output, TensorProto.FLOAT, None)
            for node in graph.nodes
            if isinstance(node, g.Decode)
        ],
    )
    used = {node.op_type for node in nodes if node.domain == DOMAIN}
    model = helper.make_model(
        proto,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=functions(used),
        producer_name="lnsdeploy",
        ir_version=IR_VERSION,
    )
    helper.set_model_props(model, dict(metadata))
    return model


_PACKED = ".packed"


def narrow_layers(graph: g.LNSGraph) -> set[str]:
    """Names of the layers whose weights fit half a byte each."""
    return {n.name for n in graph.nodes if isinstance(n, (g.Gemm, g.Conv)) and n.plan.weight.bits <= 4}


def _pack(
    nodes: list[NodeProto], tensors: list[TensorProto], layers: set[str]
) -> tuple[list[NodeProto], list[TensorProto]]:
    """Store the weights of some layers two to a byte, and unpack them by a Cast before the first that reads them.

    ONNX Runtime folds that Cast when it loads the model, so nothing runs more slowly for it.
    """
    narrow = {node.input[1] for node in nodes if node.domain == DOMAIN and node.name in layers}
    made: list[NodeProto] = []
    unpacked: set[str] = set()
    for node in nodes:
        for name in node.input:
            if name in narrow - unpacked:
                unpacked.add(name)
                made.append(
                    helper.make_node("Cast", [name + _PACKED], [name], name=f"{name}.unpack", to=TensorProto.UINT8)
                )
        made.append(node)
    return made, [_packed(tensor) if tensor.name in narrow else tensor for tensor in tensors]


def _packed(tensor: TensorProto) -> TensorProto:
    """A tensor of words as UINT4: the first of two words lies in the lower half of their byte."""
    words = numpy_helper.to_array(tensor).reshape(-1)
    words = np.append(words, np.zeros(words.size % 2, dtype=np.uint8))
    data = (words[0::2] | words[1::2] << 4).astype(np.uint8).tobytes()
    return TensorProto(name=tensor.name + _PACKED, data_type=TensorProto.UINT4, dims=list(tensor.dims), raw_data=data)


def is_packed(model: ModelProto) -> bool:
    """Whether a model stores weights of up to 4 bits two to a byte."""
    return any(int(tensor.data_type) == int(TensorProto.UINT4) for tensor in model.graph.initializer)


def is_unpacking(node: NodeProto) -> bool:
    """Whether a node is the Cast that unpacks weights."""
    return bool(node.domain == "" and node.op_type == "Cast" and node.input[0] == node.output[0] + _PACKED)


def unpack(model: ModelProto, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a model, packed ones by the name that they are unpacked to."""
    found = dict(arrays)
    for node in model.graph.node:
        if is_unpacking(node) and node.input[0] in arrays:
            found[node.output[0]] = arrays[node.input[0]].astype(np.uint8)
    return found


def _make(op: str, name: str, inputs: list[str], output: str, attributes: Mapping[str, Any]) -> NodeProto:
    return helper.make_node(op, inputs, [output], name=name, domain=DOMAIN, **attributes)


def ends(graph: g.LNSGraph) -> tuple[str, str]:
    """The names of the nodes that encode the input and decode the output."""
    return f"{graph.encoded}.encode", f"{graph.output}.decode"


def _encode_node(graph: g.LNSGraph, pool: _Pool) -> NodeProto:
    info = graph.tensors[graph.encoded]
    return _encoding(ends(graph)[0], graph.input, graph.encoded, info, graph.underflow, pool)


def _encoding(name: str, source: str, output: str, info: g.TensorInfo, underflow: str, pool: _Pool) -> NodeProto:
    attributes = _output_attributes(info.format, underflow)
    attributes.pop("underflow")
    thresholds = pool.add(f"{name}.thresholds", encode_thresholds(info.format, info.offset, underflow))
    return _make("Encode", name, [source, thresholds], output, attributes)


def _decode_node(graph: g.LNSGraph, pool: _Pool) -> NodeProto:
    return _decoding(ends(graph)[1], graph.words_output, graph.output, graph.tensors[graph.words_output], pool)


def _decoding(name: str, source: str, output: str, info: g.TensorInfo, pool: _Pool) -> NodeProto:
    _format_attributes("", info.format)
    table = pool.add(f"{name}.table", decode_values(info.format, info.offset))
    return _make("Decode", name, [source, table], output, {})


def _node(node: g.Node, graph: g.LNSGraph, pool: _Pool) -> NodeProto:
    inputs = list(node.inputs)

    def with_tables(op: str, arrays: Arrays, attributes: Mapping[str, Any], words: bool = False) -> NodeProto:
        added = [pool.add(f"{node.name}.{key}", array) for key, array in arrays.items()]
        return _make(op, node.name, inputs + added, node.output, attributes)

    if isinstance(node, (g.Gemm, g.Conv)):
        plan, channels = node.plan, node.words.shape[0]
        linear = plan.datapath.is_linear
        make = linear_tables if linear else log_tables
        arrays = {"weight": node.words, **make(plan, channels, node.bias)}
        attributes: dict[str, Any] = _dot_attributes(plan)
        if isinstance(node, g.Conv):
            attributes |= {**_window_attributes(node.window), "group": node.groups}
        return with_tables(("Linear" if linear else "Log") + node.op, arrays, attributes)
    if isinstance(node, g.MatMul):
        plan = node.plan
        if plan.datapath.is_linear:
            arrays = linear_tables(plan, 1, None)
        else:
            arrays = log_tables(plan, 1, None)
        del arrays["bias"]
        attributes = _dot_attributes(plan) | {"code_shift": int(arrays.pop("code_shift")[0])}
        return with_tables("LinearMatMul" if plan.datapath.is_linear else "LogMatMul", arrays, attributes)
    if isinstance(node, g.Multiply):
        times = node.plan
        attributes = {
            **_format_attributes("a", times.a),
            **_format_attributes("b", times.b),
            "code_shift": times.code_shift,
            **_output_attributes(times.output, times.underflow),
        }
        return _make("Multiply", node.name, inputs, node.output, attributes)
    if isinstance(node, g.Lookup):
        return with_tables("Lookup", {"table": node.table}, {})
    if isinstance(node, g.Take):
        places = pool.add(f"{node.name}.indices", np.array(node.indices, dtype=np.int64))
        return helper.make_node("Gather", [*inputs, places], [node.output], name=node.name, axis=node.axis)
    if isinstance(node, g.Pad):
        return _make("Pad", node.name, inputs, node.output, {"pads": list(node.pads)})
    if isinstance(node, g.Broadcast):
        return _make("Broadcast", node.name, inputs, node.output, {})
    if isinstance(node, g.Decode):
        return _decoding(node.name, inputs[0], node.output, node.source, pool)
    if isinstance(node, g.Encode):
        return _encoding(node.name, inputs[0], node.output, node.result, node.underflow, pool)
    if isinstance(node, g.Float):
        return _float(node, pool)
    if isinstance(node, (g.Relu, g.MaxPool, g.Clip)):
        attributes = {**_format_attributes("", node.format)}
        if isinstance(node, g.MaxPool):
            attributes.update(_window_attributes(node.window))
        elif isinstance(node, g.Clip):
            attributes |= {"low": _ordered(node.low, node.format), "high": _ordered(node.high, node.format)}
        return _make(node.op, node.name, inputs, node.output, attributes)
    if isinstance(node, g.Add):
        add = node.plan
        attributes = {
            **_format_attributes("a", add.a),
            "a_shift": add.a_offset - add.acc_offset,
            **_format_attributes("b", add.b),
            "b_shift": add.b_offset - add.acc_offset,
            "acc_bits": add.accumulator.bits,
            "guard_bits": add.accumulator.guard_bits,
            "code_shift": add.acc_offset - add.output_offset,
            **_output_attributes(add.output, add.underflow),
        }
        return with_tables("Add", _delta_inputs(add.accumulator, add.output.gamma), attributes)
    if isinstance(node, g.AveragePool):
        pool_plan = node.plan
        shape = _spatial_shape(graph, node)
        counts = reference.log_counts(shape, pool_plan, node.window, node.count_include_pad)
        arrays = {
            **_delta_inputs(pool_plan.accumulator, pool_plan.input.gamma),
            "log_counts": counts.reshape((1,) * (3 - counts.ndim) + counts.shape),
        }
        attributes = {
            **_format_attributes("input", pool_plan.input),
            "input_shift": pool_plan.input_offset - pool_plan.acc_offset,
            "lanes": pool_plan.accumulator.lanes,
            "acc_bits": pool_plan.accumulator.bits,
            "guard_bits": pool_plan.accumulator.guard_bits,
            "code_shift": pool_plan.acc_offset - pool_plan.output_offset,
            **_output_attributes(pool_plan.output, pool_plan.underflow),
            **_window_attributes(node.window),
        }
        return with_tables("AveragePool", arrays, attributes)
    if isinstance(node, g.Rescale):
        p = node.plan
        attributes = {
            **_format_attributes("input", p.input),
            "input_offset": p.input_offset,
            "multiply": max(p.output.gamma // p.input.gamma, 1),
            "divide": max(p.input.gamma // p.output.gamma, 1),
            "output_offset": p.output_offset,
            **_output_attributes(p.output, p.underflow),
        }
        return _make("Rescale", node.name, inputs, node.output, attributes)
    if isinstance(node, g.Reshape):
        shape_name = pool.add(f"{node.name}.shape", np.array(node.shape, dtype=np.int64))
        return helper.make_node("Reshape", [*inputs, shape_name], [node.output], name=node.name)
    if isinstance(node, g.Transpose):
        return helper.make_node("Transpose", inputs, [node.output], name=node.name, perm=list(node.order))
    if isinstance(node, g.Concat):
        return helper.make_node("Concat", inputs, [node.output], name=node.name, axis=node.axis)
    raise UnsupportedError(f"node {node.name!r} ({type(node).__name__}) has no ONNX form")


def _float(node: g.Float, pool: _Pool) -> NodeProto:
    names = []
    for i, argument in enumerate(node.arguments):
        if argument is None:
            names.append("")
        elif isinstance(argument, int):
            names.append(node.inputs[argument])
        else:
            names.append(pool.add(f"{node.name}.{i}", argument))
    return helper.make_node(node.kind, names, [node.output], name=node.name, **node.attributes)


def _ordered(word: int, fmt: LNSFormat) -> int:
    code = word & fmt.max_code
    return -code if word & fmt.sign_bit else code


def _unordered(key: int, fmt: LNSFormat) -> int:
    if abs(key) > fmt.max_code or (key < 0 and not fmt.signed):
        raise BadFileError(f"a limit of {key} is no code of {fmt}")
    return -key | fmt.sign_bit if key < 0 else key


def _spatial_shape(graph: g.LNSGraph, node: g.AveragePool) -> tuple[int, ...]:
    if node.spatial is None:
        raise UnsupportedError(f"AveragePool {node.name!r}: the size of its input is not known")
    return node.spatial


# ---------------------------------------------------------------------------------------------------
# And back


def node_of(
    proto: NodeProto,
    arrays: Mapping[str, npt.NDArray[Any]],
    plan: Mapping[str, Any],
    tensors: Mapping[str, g.TensorInfo],
    datapaths: Mapping[str, Datapath],
    constants: Iterable[str] = (),
) -> g.Node:
    """The node of a net from its ONNX form and its plan.

    Args:
        constants: names of the net's own tensors of words.

    Raises:
        LNSError, KeyError, ValueError, TypeError: it is not one that :func:`model_of` makes.
    """
    attributes = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
    name, output, op = proto.name, proto.output[0], proto.op_type
    own = set(constants)
    inputs = tuple(i for i in proto.input if i and (i not in arrays or i in own))
    if "float" in plan:
        return _float_of(proto, arrays, str(plan["float"]))
    if not name or not inputs:
        raise BadFileError(f"a node {op} without name or inputs")
    given = list(proto.input)
    if op in ("LinearGemm", "LogGemm", "LinearConv", "LogConv"):
        words = arrays[given[1]]
        made = g.dot_plan_from_dict(plan, datapaths)
        made.weight.check(words, f"weights of {name!r}")
        if words.ndim < 2:
            raise BadFileError(f"weights of {name!r} have the shape {words.shape}")
        stored = arrays[given[2]].astype(np.int64)
        bias = None if plan.get("bias") is False else stored
        if op.endswith("Gemm"):
            return g.Gemm(name, inputs, output, words, bias, made)
        return g.Conv(
            name, inputs, output, words, bias, made, _window(attributes, words.ndim - 2), int(attributes["group"])
        )
    if op in ("LinearMatMul", "LogMatMul"):
        return g.MatMul(name, inputs, output, g.dot_plan_from_dict(plan, datapaths))
    if proto.domain == DOMAIN and op == "Multiply":
        return g.Multiply(name, inputs, output, g.multiply_plan_from_dict(plan))
    if proto.domain == DOMAIN and op == "Lookup":
        return _lookup_of(proto, arrays, str(plan["function"]), tensors)
    if proto.domain == DOMAIN and op == "Pad":
        return g.Pad(name, inputs, output, tuple(int(n) for n in attributes["pads"]))
    if proto.domain == DOMAIN and op == "Broadcast":
        return g.Broadcast(name, inputs, output)
    if proto.domain == DOMAIN and op == "Decode":
        return g.Decode(name, inputs, output, tensors[inputs[0]])
    if proto.domain == DOMAIN and op == "Encode":
        return g.Encode(name, inputs, output, tensors[output], str(plan["underflow"]))
    if proto.domain == "" and op == "Gather":
        places = arrays[given[1]]
        if places.ndim != 1 or places.dtype != np.int64:
            raise BadFileError(f"the places that {name!r} takes are a list of integers, not {places.dtype}")
        return g.Take(name, inputs, output, int(attributes["axis"]), tuple(int(n) for n in places))
    if proto.domain == DOMAIN and op in ("Relu", "Clip", "MaxPool"):
        fmt = tensors[output].format
        if op == "Relu":
            return g.Relu(name, inputs, output, fmt)
        if op == "Clip":
            low, high = (_unordered(int(attributes[key]), fmt) for key in ("low", "high"))
            return g.Clip(name, inputs, output, fmt, low, high)
        return g.MaxPool(name, inputs, output, fmt, _window(attributes, int(plan["axes"])))
    if proto.domain == DOMAIN and op == "Add":
        return g.Add(name, inputs, output, g.add_plan_from_dict(plan))
    if proto.domain == DOMAIN and op == "AveragePool":
        window = g.window_from_dict(plan["window"])
        spatial = tuple(int(n) for n in plan["spatial"])
        include = bool(plan["count_include_pad"])
        return g.AveragePool(name, inputs, output, g.pool_plan_from_dict(plan), window, include, spatial)
    if proto.domain == DOMAIN and op == "Rescale":
        return g.Rescale(name, inputs, output, g.rescale_plan_from_dict(plan))
    if proto.domain == "" and op == "Reshape":
        return g.Reshape(name, inputs, output, tuple(int(n) for n in arrays[given[1]]))
    if proto.domain == "" and op == "Transpose":
        return g.Transpose(name, inputs, output, tuple(int(n) for n in attributes["perm"]))
    if proto.domain == "" and op == "Concat":
        return g.Concat(name, inputs, output, int(attributes["axis"]))
    raise UnsupportedError(f"node {name!r}: operator {proto.domain}.{op} is not one that lnsdeploy writes")


def _lookup_of(
    proto: NodeProto, arrays: Mapping[str, npt.NDArray[Any]], function: str, tensors: Mapping[str, g.TensorInfo]
) -> g.Lookup:
    table, (source, output) = arrays[proto.input[1]], (proto.input[0], proto.output[0])
    have, made = tensors[source], tensors[output]
    if table.shape != (1 << have.format.bits,):
        raise BadFileError(
            f"the table of {proto.name!r} has the shape {table.shape}, not one word for each of its input"
        )
    made.format.check(table, f"table of {proto.name!r}")
    return g.Lookup(proto.name, (source,), output, table, have, made, function)


def _float_of(proto: NodeProto, arrays: Mapping[str, npt.NDArray[Any]], reason: str) -> g.Float:
    from lnsdeploy.emulator.floats import OPERATORS

    if proto.domain != "" or proto.op_type not in OPERATORS or len(proto.output) != 1:
        raise BadFileError(f"node {proto.name!r}: {proto.domain or 'ai.onnx'}.{proto.op_type} is no operation in float")
    inputs: list[str] = []
    arguments: list[Any] = []
    for name in proto.input:
        if not name:
            arguments.append(None)
        elif name in arrays:
            arguments.append(arrays[name])
        else:
            if name not in inputs:
                inputs.append(name)
            arguments.append(inputs.index(name))
    if not inputs or not proto.name:
        raise BadFileError(f"a node {proto.op_type} without name or inputs")
    return g.Float(
        proto.name, tuple(inputs), proto.output[0], proto.op_type, plain_attributes(proto), tuple(arguments), reason
    )


def plain_attributes(proto: NodeProto) -> dict[str, Any]:
    """The attributes of an operation in float.

    Raises:
        UnsupportedError: one is a tensor, a graph or a type.
    """
    found = {}
    for attribute in proto.attribute:
        if attribute.type not in _PLAIN:
            raise UnsupportedError(f"{proto.op_type} {proto.name!r}: attribute {attribute.name!r} is not plain data")
        found[attribute.name] = helper.get_attribute_value(attribute)
    return found


_PLAIN = (
    AttributeProto.INT,
    AttributeProto.FLOAT,
    AttributeProto.STRING,
    AttributeProto.INTS,
    AttributeProto.FLOATS,
    AttributeProto.STRINGS,
)
