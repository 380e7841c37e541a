"""Whatever float model the user has, brought to one form: the first step of an export (docs/export.md).

The form is what lowering reads: opset 21, float32 throughout, one float input whose first axis is a batch of any size,
one output, every other axis known, constants folded, every node named, everything in one piece of memory.

A model file may come from anywhere. So it is read in a process of its own, which has limits of memory and of time:
whatever the libraries that parse, convert and infer shapes make of a hostile file, the caller sees one error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.emulator.artifact import MAX_FILE_BYTES, METADATA, parse_model
from lnsdeploy.errors import BadFileError, BadValueError, MissingDependencyError, UnsupportedError
from lnsdeploy.files import read_bytes

OPSET = 21
OLDEST_OPSET = 7
# Nothing that people train comes near; what says more is damaged or hostile.
MAX_NODES = 200_000
MAX_DEPTH = 16
MAX_NAME = 4096
# Elements of one tensor, and of all tensors of a net for one input.
MAX_ELEMENTS = 1 << 31
_PLAIN_DOMAINS = ("", "ai.onnx")
_QUANTIZED = (
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
)


@dataclass(frozen=True, eq=False)
class Source:
    """A float model in the form that lowering reads.

    Args:
        model: onnx.ModelProto.
        name: where it is from, for messages and reports.
        input_shape: of its input, 0 for the batch axis.
        notes: what was changed that its owner may want to know.
        float_bytes: of its parameters, as they were stored.
        parameters: their number.
    """

    model: Any
    name: str
    input_shape: tuple[int, ...]
    notes: tuple[str, ...] = ()
    float_bytes: int = 0
    parameters: int = 0


@dataclass(frozen=True)
class ReadOptions:
    """What a model does not say by itself.

    Args:
        input_shape: of the input, the batch first; needed where the model leaves sizes open.
        output: the name of the output to keep, where there are several.
    """

    input_shape: tuple[int, ...] | None = None
    output: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"input_shape": None if self.input_shape is None else list(self.input_shape), "output": self.output}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ReadOptions:
        """Inverse of :meth:`to_dict`."""
        shape = data["input_shape"]
        return cls(None if shape is None else tuple(shape), data["output"])


def parse_shape(text: str) -> tuple[int, ...]:
    """A shape from text such as ``1,3,224,224``; the batch comes first, as in the model.

    Raises:
        BadValueError: it is none.
    """
    parts = [part.strip() for part in text.replace("x", ",").split(",")]
    if not 2 <= len(parts) <= 8 or not all(part.isdecimal() and 1 <= int(part) <= 1 << 20 for part in parts):
        raise BadValueError(f"an input shape is two or more sizes with the batch first, as 1,3,224,224, not {text!r}")
    return tuple(int(part) for part in parts)


def _onnx() -> Any:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"reading ONNX models needs onnx, onnxscript and onnxruntime: pip install 'lnsdeploy[onnx]' ({error})"
        ) from error
    del onnxruntime
    return onnx


def load_libraries() -> None:
    """Import all that reading needs.

    Raises:
        MissingDependencyError: something is not installed.
    """
    _onnx()
    from onnx import inliner, shape_inference, version_converter  # noqa: F401
    from onnxscript import optimizer  # noqa: F401


# ---------------------------------------------------------------------------------------------------
# Reading a file


def read_model(path: str | os.PathLike[str]) -> Any:
    """onnx.ModelProto of a file, with the data that lie beside it in its own folder.

    Raises:
        BadFileError: missing, truncated, not ONNX, or its data are missing or lie elsewhere.
    """
    file = Path(path)
    if file.is_dir():
        raise BadFileError(f"{file} is a folder, and not one that lnsdeploy train made")
    model = parse_model(read_bytes(file, limit=MAX_FILE_BYTES), str(file))
    check_structure(model, str(file))
    load_external(model, file.parent, str(file))
    return model


def load_external(model: Any, folder: Path, where: str) -> None:
    """Take in initializers that lie in files beside the model; only files of its own folder are opened.

    Raises:
        BadFileError: a path leads out of the folder, or the file has not what the model says.
    """
    home = folder.resolve()
    total = 0
    for tensor in _tensors(model.graph):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        fields = {entry.key: entry.value for entry in tensor.external_data}
        location = fields.get("location", "")
        told = f"{where}: initializer {tensor.name!r}"
        if not location or Path(location).is_absolute() or "\\" in location or ".." in Path(location).parts:
            raise BadFileError(f"{told} lies at {location!r}, outside of the model's folder; it is not opened")
        file = folder / location
        try:
            found = file.resolve(strict=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise BadFileError(f"{told}: its file {location!r} is not there") from error
        if not found.is_relative_to(home):
            raise BadFileError(f"{told} lies at {location!r}, which leads out of the model's folder; it is not opened")
        if not found.is_file():
            raise BadFileError(f"{told}: {location!r} is not a file")
        wanted = _data_bytes(tensor, told)
        try:
            offset = int(fields.get("offset", "0"))
            length = int(fields.get("length", str(wanted)))
        except ValueError as error:
            raise BadFileError(f"{told}: its place in {location!r} is no number") from error
        size = found.stat().st_size
        if length != wanted or offset < 0 or offset + length > size:
            raise BadFileError(
                f"{told} of {wanted} bytes cannot be {length} bytes at {offset} of {location!r}, which has {size}"
            )
        total += wanted
        if total > MAX_FILE_BYTES:
            raise BadFileError(f"{where}: its parameters take more than {MAX_FILE_BYTES >> 30} GiB, the most there is")
        with found.open("rb") as handle:
            handle.seek(offset)
            tensor.raw_data = handle.read(length)
        tensor.ClearField("external_data")
        tensor.data_location = tensor.DEFAULT


def _tensors(graph: Any, depth: int = 0) -> Iterator[Any]:
    """Every tensor that a graph stores: initializers, and tensors in attributes, of subgraphs too."""
    if depth > MAX_DEPTH:
        raise BadFileError("graphs within graphs, too deep")
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _tensors(attribute.g, depth + 1)
            for inner in attribute.graphs:
                yield from _tensors(inner, depth + 1)


def _elements(dims: Iterable[int], told: str) -> int:
    """The product of a shape.

    Raises:
        BadFileError: negative, or beyond all measure.
    """
    count = 1
    for size in dims:
        if size < 0:
            raise BadFileError(f"{told} has the impossible shape {list(dims)}")
        count *= size
        if count > MAX_ELEMENTS:
            raise BadFileError(f"{told} has the impossible shape {list(dims)}")
    return count


# Bytes of an element by type, and the field that holds numbers which are not raw; halves of bytes are rounded up.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128,
         16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8}  # fmt: skip


def _data_bytes(tensor: Any, told: str) -> int:
    """Bytes that a tensor's shape and type ask for."""
    bits = _BITS.get(tensor.data_type)
    if bits is None:
        raise BadFileError(f"{told} has the unknown type {tensor.data_type}")
    return -(-_elements(tensor.dims, told) * bits // 8)


def _check_tensor(tensor: Any, told: str) -> None:
    """Refuse a tensor whose shape and data do not agree: it would be allocated before it fails."""
    if tensor.data_type == 8:
        if len(tensor.string_data) != _elements(tensor.dims, told):
            raise BadFileError(f"{told} holds {len(tensor.string_data)} texts, but has the shape {list(tensor.dims)}")
        return
    wanted = _data_bytes(tensor, told)
    if tensor.data_location == tensor.EXTERNAL:
        return
    if tensor.HasField("raw_data"):
        if len(tensor.raw_data) != wanted:
            raise BadFileError(
                f"{told} holds {len(tensor.raw_data)} bytes, but its shape {list(tensor.dims)} asks for {wanted}"
            )
        return
    kind = tensor.data_type
    held = {1: tensor.float_data, 14: tensor.float_data, 11: tensor.double_data, 15: tensor.double_data,
            7: tensor.int64_data, 12: tensor.uint64_data,
            13: tensor.uint64_data}.get(kind, tensor.int32_data)  # fmt: skip
    count = _elements(tensor.dims, told) * (2 if kind in (14, 15) else 1)
    if kind in (21, 22, 23):
        count = -(-count // 2)
    if len(held) != count:
        raise BadFileError(f"{told} holds {len(held)} numbers, but its shape {list(tensor.dims)} asks for {count}")


# ---------------------------------------------------------------------------------------------------
# Structure


def check_structure(model: Any, where: str) -> None:
    """Refuse what no library should be given: wrong sizes, cycles, tensors that nothing makes. Pure Python.

    Nodes that are only out of order are put in order.

    Raises:
        BadFileError: the message names the node or tensor. UnsupportedError: of a kind that is not for export.
    """
    versions = {opset.domain: opset.version for opset in model.opset_import}
    opset = next((versions[d] for d in _PLAIN_DOMAINS if d in versions), None)
    if opset is None:
        raise BadFileError(f"{where}: does not say which version of the ONNX operators it uses")
    newest = _newest_opset()
    if opset > newest:
        raise UnsupportedError(
            f"{where}: uses opset {opset}; the installed onnx knows {newest} at most: pip install -U onnx"
        )
    if opset < OLDEST_OPSET:
        raise UnsupportedError(
            f"{where}: uses opset {opset}; {OLDEST_OPSET} or later is needed: export the model again with a newer one"
        )
    if any(entry.key == f"{METADATA}.graph" for entry in model.metadata_props):
        raise BadFileError(f"{where}: an LNS ONNX model already; lnsdeploy emulate runs it as it is")
    names: set[str] = set()
    for function in model.functions:
        _refuse_operators(function.node, where, {(f.domain, f.name) for f in model.functions})
    _check_graph(model.graph, where, set(), {(f.domain, f.name) for f in model.functions}, 0, names)
    for tensor in _tensors(model.graph):
        _check_tensor(tensor, f"{where}: tensor {_short(tensor.name)}")


def _newest_opset() -> int:
    return int(_onnx().defs.onnx_opset_version())


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:79] + "…")


def _refuse_operators(nodes: Iterable[Any], where: str, local: set[tuple[str, str]]) -> None:
    for node in nodes:
        told = f"{where}: node {_short(node.name or (node.output[0] if node.output else ''))}"
        if node.op_type in _QUANTIZED:
            raise UnsupportedError(
                f"{told} is a {node.op_type}: a quantized model; give the float model it was made from, "
                "whose weights LNS words can represent in their own way"
            )
        if node.domain not in _PLAIN_DOMAINS and (node.domain, node.op_type) not in local:
            raise UnsupportedError(
                f"{told} is a {_short(f'{node.domain}.{node.op_type}')[1:-1]}, which is no ONNX operator; export the "
                "model without operators of other domains (and before any optimisation by ONNX Runtime)"
            )


def _check_graph(
    graph: Any, where: str, outer: set[str], local: set[tuple[str, str]], depth: int, counted: set[str]
) -> None:
    if depth > MAX_DEPTH:
        raise BadFileError(f"{where}: graphs within graphs, too deep")
    if len(graph.node) > MAX_NODES:
        raise BadFileError(f"{where}: {len(graph.node)} nodes; {MAX_NODES} are the most that are read")
    _refuse_operators(graph.node, where, local)
    known = set(outer)
    for tensor in graph.initializer:
        if tensor.name in known and tensor.name in {t.name for t in graph.input}:
            continue
        known.add(tensor.name)
    known |= {sparse.values.name for sparse in graph.sparse_initializer}
    known |= {value.name for value in graph.input}
    if len({t.name for t in graph.initializer}) != len(graph.initializer):
        raise BadFileError(f"{where}: two initializers have the same name")
    made: dict[str, int] = {}
    for number, node in enumerate(graph.node):
        for output in node.output:
            if not output:
                continue
            if output in made or output in known - outer:
                raise BadFileError(
                    f"{where}: tensor {_short(output)} is made a second time, by a {_short(node.op_type)[1:-1]}"
                )
            made[output] = number
    for node in graph.node:
        for name in _reads(node):
            if name not in known and name not in made:
                raise BadFileError(
                    f"{where}: {node.op_type} {_short(node.name or ''.join(node.output[:1]))} reads "
                    f"{_short(name)}, which neither a node nor an initializer makes"
                )
    order = _order(graph.node, made, where)
    if order != list(range(len(graph.node))):
        nodes = [graph.node[i] for i in order]
        copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] * attribute.HasField("g") + list(attribute.graphs):
                _check_graph(inner, where, known | set(made), local, depth + 1, counted)
    for value in graph.output:
        if value.name not in known and value.name not in made:
            raise BadFileError(f"{where}: nothing makes the output {_short(value.name)}")


def _reads(node: Any) -> list[str]:
    return [name for name in node.input if name]


def _order(nodes: Sequence[Any], made: Mapping[str, int], where: str) -> list[int]:
    """Numbers of the nodes in an order in which they can run, the given one where that can.

    Raises:
        BadFileError: a cycle; the message names it.
    """
    needs = [{made[name] for name in _captured(node) if name in made} for node in nodes]
    if all(all(source < number for source in need) for number, need in enumerate(needs)):
        return list(range(len(nodes)))
    done: list[int] = []
    state = [0] * len(nodes)
    for root in range(len(nodes)):
        stack = [(root, False)]
        while stack:
            number, leave = stack.pop()
            if leave:
                state[number] = 2
                done.append(number)
                continue
            if state[number]:
                continue
            state[number] = 1
            stack.append((number, True))
            for source in sorted(needs[number], reverse=True):
                if state[source] == 1:
                    name = nodes[source].name or nodes[source].output[0]
                    raise BadFileError(f"{where}: the graph has a cycle through {nodes[source].op_type} {_short(name)}")
                if not state[source]:
                    stack.append((source, False))
    return done


def _captured(node: Any, depth: int = 0) -> Iterator[str]:
    """What a node reads, its subgraphs included."""
    yield from (name for name in node.input if name)
    if depth > MAX_DEPTH:
        return
    for attribute in node.attribute:
        for inner in [attribute.g] * attribute.HasField("g") + list(attribute.graphs):
            for child in inner.node:
                yield from _captured(child, depth + 1)


# ---------------------------------------------------------------------------------------------------
# Normal form


@dataclass(eq=False)
class _Draft:
    model: Any
    where: str
    notes: list[str] = field(default_factory=list)

    @property
    def graph(self) -> Any:
        return self.model.graph

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def normalise(model: Any, options: ReadOptions, where: str, *, checked: bool = False) -> Source:
    """A model in the form that lowering reads; everything that is done to it is done here.

    Args:
        model: onnx.ModelProto; changed.
        checked: it went through :func:`check_structure`.

    Raises:
        UnsupportedError: it cannot be brought to that form. BadFileError: it is damaged.
        BadValueError: `options` do not fit it.
    """
    if not checked:
        check_structure(model, where)
    draft = _Draft(model, where)
    _inline(draft)
    width = _stored_width(draft)
    _to_float32(draft)
    _choose_output(draft, options.output)
    value = _only_input(draft)
    fixed = _set_shape(draft, value, options.input_shape)
    _free_shapes(draft)
    _convert(draft)
    _shapes(draft, strict=True)
    _fold(draft)
    if fixed is not None:
        _free_batch(draft, value.name, fixed)
        _fold(draft)
    _remove_dead(draft)
    _name_nodes(draft)
    _infer(draft)
    shape = tuple(_sizes(_only_input(draft)))
    _dry_run(draft, shape, fixed)
    parameters = sum(_elements(t.dims, where) for t in draft.graph.initializer if t.data_type == 1)
    return Source(
        draft.model,
        where,
        (0, *(int(n) for n in shape[1:] if n is not None)),
        tuple(draft.notes),
        round(width * parameters),
        parameters,
    )


_FLOATS = (1, 10, 11, 16)
_WIDTHS = {10: "float16", 11: "double", 16: "bfloat16"}


def _stored_width(draft: _Draft) -> float:
    """Bytes of a parameter as the model stores them, on average."""
    kept = [t for t in draft.graph.initializer if t.data_type in _FLOATS]
    count = sum(_elements(t.dims, draft.where) for t in kept)
    return sum(_data_bytes(t, draft.where) for t in kept) / count if count else 4.0


def _failed(draft: _Draft, step: str, error: Exception) -> BadFileError:
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, MemoryError) or "bad_alloc" in text:
        raise MemoryError(text)
    return BadFileError(f"{draft.where}: {step}: {text[:300]}")


def _inline(draft: _Draft) -> None:
    """Functions of the model's own become the nodes that they stand for."""
    if not draft.model.functions:
        return
    from onnx import inliner

    try:
        draft.model = inliner.inline_local_functions(draft.model)
    except Exception as error:  # onnx has no common base class of its errors
        raise _failed(draft, "its functions cannot be inlined", error) from error
    _refuse_operators(draft.graph.node, draft.where, set())


def _to_float32(draft: _Draft) -> None:
    """Weights and types of other widths become float32: LNS words are made of it, and each is exact in it or near."""
    from onnx import TensorProto, numpy_helper

    found: set[int] = set()

    def tensor(t: Any) -> None:
        if t.data_type in _WIDTHS:
            found.add(t.data_type)
            values = numpy_helper.to_array(t).astype(np.float64)
            with np.errstate(over="ignore"):
                t.CopyFrom(numpy_helper.from_array(values.astype(np.float32), t.name))

    def typed(value: Any) -> None:
        kind = value.type.tensor_type
        if kind.elem_type in _WIDTHS:
            found.add(kind.elem_type)
            kind.elem_type = TensorProto.FLOAT

    def graph(proto: Any, depth: int) -> None:
        for t in proto.initializer:
            tensor(t)
        for value in (*proto.input, *proto.output):
            typed(value)
        del proto.value_info[:]
        for node in proto.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    tensor(attribute.t)
                if attribute.name in ("to", "dtype") and attribute.i in _WIDTHS:
                    found.add(attribute.i)
                    attribute.i = TensorProto.FLOAT
                for inner in [attribute.g] * attribute.HasField("g") + list(attribute.graphs):
                    graph(inner, depth + 1)

    graph(draft.graph, 0)
    if found:
        names = ", ".join(_WIDTHS[kind] for kind in sorted(found))
        draft.note(f"{names} was read as float32")


def _choose_output(draft: _Draft, wanted: str | None) -> None:
    outputs = [value.name for value in draft.graph.output]
    if not outputs:
        raise BadFileError(f"{draft.where}: a net without an output")
    if wanted is not None:
        if wanted not in outputs:
            raise BadValueError(f"{draft.where}: no output {wanted!r}; its outputs are {', '.join(outputs)}")
        kept = wanted
    elif len(outputs) == 1:
        kept = outputs[0]
    else:
        raise UnsupportedError(
            f"{draft.where}: has the outputs {', '.join(map(_short, outputs))}; an LNS model has one: choose it with "
            "--model-output NAME"
        )
    for index in reversed(range(len(outputs))):
        if outputs[index] != kept:
            del draft.graph.output[index]
    _remove_dead(draft)


def _remove_dead(draft: _Draft) -> None:
    """Nodes, initializers and inputs that the output does not depend on."""
    graph = draft.graph
    maker = {output: node for node in graph.node for output in node.output if output}
    needed: set[str] = set()
    waiting = [value.name for value in graph.output]
    while waiting:
        name = waiting.pop()
        if name in needed:
            continue
        needed.add(name)
        if name in maker:
            waiting += [n for n in _captured(maker[name]) if n not in needed]
    for index in reversed(range(len(graph.node))):
        if not any(output in needed for output in graph.node[index].output):
            del graph.node[index]
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in needed:
            del graph.initializer[index]
    held = {t.name for t in graph.initializer}
    for index in reversed(range(len(graph.input))):
        name = graph.input[index].name
        if name in held:
            # an initializer that may be overridden (ONNX before IR 4) is a constant here
            del graph.input[index]
        elif name not in needed:
            draft.note(f"input {name!r} has no effect on the output and was left out")
            del graph.input[index]


def _only_input(draft: _Draft) -> Any:
    inputs = list(draft.graph.input)
    if not inputs:
        raise UnsupportedError(f"{draft.where}: its output depends on no input; there is nothing to run")
    if len(inputs) > 1:
        names = ", ".join(_short(value.name) for value in inputs)
        raise UnsupportedError(
            f"{draft.where}: has the inputs {names}; an LNS model has one: make the others constants of the model, or "
            "wrap it in a module that takes one"
        )
    value = inputs[0]
    kind = value.type.tensor_type.elem_type
    if kind != 1:
        raise UnsupportedError(
            f"{draft.where}: its input {value.name!r} holds {_type_name(kind)}; an LNS model takes float numbers, "
            "which it encodes as words (of a model of text, export the part behind the embedding)"
        )
    return value


def _type_name(kind: int) -> str:
    from onnx import TensorProto

    try:
        return str(TensorProto.DataType.Name(kind)).lower()
    except ValueError:
        return "no tensor" if kind == 0 else f"the unknown type {kind}"


def _sizes(value: Any) -> list[int | None]:
    """The sizes of an input, None where it leaves them open."""
    shape = value.type.tensor_type.shape
    return [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in shape.dim]


def _set_shape(draft: _Draft, value: Any, wanted: tuple[int, ...] | None) -> int | None:
    """Settle the input's shape, the batch open; returns the batch size that the model was made for, if it says one."""
    where, name = draft.where, value.name
    if value.type.tensor_type.HasField("shape"):
        sizes = _sizes(value)
    elif wanted is None:
        raise BadValueError(f"{where}: does not say the shape of its input {name!r}; give --input-shape 1,3,224,224")
    else:
        sizes = [None] * len(wanted)
    told = "[" + ", ".join("?" if n is None else str(n) for n in sizes) + "]"
    if wanted is not None:
        fits = len(wanted) == len(sizes) and all(
            n is None or n == w for n, w in zip(sizes[1:], wanted[1:], strict=True)
        )
        if not fits:
            raise BadValueError(f"{where}: its input {name!r} has the shape {told}, not {list(wanted)}")
        sizes = [sizes[0], *wanted[1:]]
    if len(sizes) < 2:
        raise UnsupportedError(
            f"{where}: its input {name!r} has the shape {told}; an LNS model takes batches: two axes or more"
        )
    if None in sizes[1:]:
        raise BadValueError(
            f"{where}: its input {name!r} has the shape {told}; give the sizes that are open, as --input-shape "
            + ",".join(str(n or (1 if i == 0 else 224)) for i, n in enumerate(sizes))
        )
    _elements([n or 1 for n in sizes], f"{where}: input {name!r}")
    fixed = sizes[0]
    shape = value.type.tensor_type.shape
    del shape.dim[:]
    for number, size in enumerate(sizes):
        dim = shape.dim.add()
        if number or fixed is not None:
            dim.dim_value = size or 1
        else:
            dim.dim_param = "batch"
    return fixed


def _free_shapes(draft: _Draft) -> None:
    """Shapes that a model states of its outputs may be those of another input: they are inferred anew."""
    del draft.graph.value_info[:]
    for value in draft.graph.output:
        value.type.tensor_type.ClearField("shape")


def _convert(draft: _Draft) -> None:
    """To the operators of opset 21."""
    import onnx
    from onnx import version_converter

    model = draft.model
    version = next(o.version for o in model.opset_import if o.domain in _PLAIN_DOMAINS)
    for index in reversed(range(len(model.opset_import))):
        if model.opset_import[index].domain not in _PLAIN_DOMAINS:
            del model.opset_import[index]
    model.ir_version = max(model.ir_version, 4)
    if version != OPSET:
        names = [t.name for t in model.graph.initializer]
        # the converter copies every number through its own structures: what it need not know stays here
        aside = {t.name: t for t in model.graph.initializer if t.data_type == 1 and len(t.raw_data) > 4096}
        try:
            small = onnx.ModelProto()
            small.CopyFrom(_without(model, set(aside)))
            converted = version_converter.convert_version(small, OPSET)
        except Exception as error:  # as above
            raise UnsupportedError(
                str(_failed(draft, f"cannot be converted from opset {version} to {OPSET}", error))
            ) from error
        _with_back(converted, [aside[name] for name in names if name in aside])
        draft.model = converted
    draft.model.ir_version = 10


def _without(model: Any, names: set[str]) -> Any:
    """The model with some initializers as inputs of their type and shape."""
    from onnx import helper

    kept = type(model)()
    kept.CopyFrom(model) if not names else None
    if names:
        for descriptor, value in model.ListFields():
            if descriptor.name != "graph":
                _copy_field(kept, descriptor, value)
        for descriptor, value in model.graph.ListFields():
            if descriptor.name != "initializer":
                _copy_field(kept.graph, descriptor, value)
        for tensor in model.graph.initializer:
            if tensor.name in names:
                kept.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
            else:
                kept.graph.initializer.add().CopyFrom(tensor)
    return kept


def _copy_field(message: Any, descriptor: Any, value: Any) -> None:
    repeated = getattr(descriptor, "is_repeated", None)
    if repeated is None:
        repeated = descriptor.label == descriptor.LABEL_REPEATED
    if repeated:
        getattr(message, descriptor.name).extend(value)
    elif descriptor.message_type is not None:
        getattr(message, descriptor.name).CopyFrom(value)
    else:
        setattr(message, descriptor.name, value)


def _with_back(model: Any, tensors: list[Any]) -> None:
    held = {tensor.name for tensor in tensors}
    for index in reversed(range(len(model.graph.input))):
        if model.graph.input[index].name in held:
            del model.graph.input[index]
    model.graph.initializer.extend(tensors)


def _fold(draft: _Draft) -> None:
    """Fold constants and shapes, and leave out what does nothing."""
    import logging
    import warnings

    from onnxscript import optimizer

    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    _bound_constants(draft)
    _make_constants(draft)
    limit = 1 << 28
    try:
        with warnings.catch_warnings():
            # of numbers that overflow, which the net's own tensors will show
            warnings.simplefilter("ignore")
            draft.model = optimizer.optimize(
                draft.model, input_size_limit=limit, output_size_limit=limit, onnx_shape_inference=True, inline=True
            )
    except Exception as error:  # as above
        raise _failed(draft, "its constants cannot be folded", error) from error


def _bound_constants(draft: _Draft) -> None:
    """Refuse constants that would be made at a size beyond all measure: before, not while, they are made."""
    from onnx import numpy_helper

    held = {t.name: t for t in draft.graph.initializer}
    for node in draft.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            held[node.output[0]] = node.attribute[0].t
    total = 0
    for node in draft.graph.node:
        index = {"ConstantOfShape": 0, "Expand": 1, "Reshape": 1, "Tile": 1}.get(node.op_type)
        if index is None or index >= len(node.input) or node.input[index] not in held:
            continue
        sizes = numpy_helper.to_array(held[node.input[index]]).reshape(-1)
        if sizes.dtype.kind not in "iu":
            raise BadFileError(f"{draft.where}: {node.op_type} {_short(node.name)} has a shape that is no integers")
        dims = [int(n) for n in sizes if not (node.op_type == "Reshape" and n in (0, -1))]
        made = _elements([abs(n) for n in dims], f"{draft.where}: what {node.op_type} {_short(node.name)} makes")
        total += made if node.op_type == "ConstantOfShape" else 0
        if total > MAX_ELEMENTS // 4:
            raise BadFileError(f"{draft.where}: its constants would take more than {4 * total >> 30} GiB")


def _make_constants(draft: _Draft) -> None:
    """Tensors of one number, which the optimizer leaves to be made at run time, become initializers."""
    from onnx import numpy_helper

    graph = draft.graph
    held = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            held[node.output[0]] = node.attribute[0].t
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if node.op_type != "ConstantOfShape" or node.input[0] not in held:
            continue
        shape = [int(n) for n in numpy_helper.to_array(held[node.input[0]]).reshape(-1)]
        value = numpy_helper.to_array(node.attribute[0].t) if node.attribute else np.zeros(1, dtype=np.float32)
        if value.size != 1:
            raise BadFileError(
                f"{draft.where}: ConstantOfShape {_short(node.name)} has a value of {value.size} numbers"
            )
        _elements(shape, f"{draft.where}: what ConstantOfShape {_short(node.name)} makes")
        graph.initializer.append(numpy_helper.from_array(np.full(shape, value.reshape(-1)[0]), node.output[0]))
        del graph.node[index]


def _free_batch(draft: _Draft, name: str, fixed: int) -> None:
    """A net for batches of one size takes any, if shapes that state the size are all that is in the way."""
    from onnx import helper, numpy_helper

    inferred = _shapes(draft)
    graph = draft.graph
    value = next(v for v in graph.input if v.name == name)
    dim = value.type.tensor_type.shape.dim[0]
    dim.Clear()
    dim.dim_param = "batch"
    held = {t.name: t for t in graph.initializer}
    made = {}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            made[node.output[0]] = node.attribute[0].t
    for node in graph.node:
        if (
            node.op_type != "Reshape"
            or len(node.input) < 2
            or any(a.name == "allowzero" and a.i for a in node.attribute)
        ):
            continue
        tensor = held.get(node.input[1]) or made.get(node.input[1])
        shape = inferred.get(node.input[0])
        if tensor is None or not shape or shape[0] != fixed:
            continue
        sizes = numpy_helper.to_array(tensor).reshape(-1).copy()
        if len(sizes) and sizes[0] in (fixed, -1) and (sizes[0] == fixed or (fixed == 1 and _rest_is(sizes, shape))):
            sizes[0] = 0
        else:
            continue
        fresh = f"{node.output[0]}_any_batch"
        graph.initializer.append(numpy_helper.from_array(sizes.astype(np.int64), fresh))
        node.input[1] = fresh
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    del graph.value_info[:]
    del helper
    draft.note(f"made for batches of {fixed}, freed to take any")


def _rest_is(sizes: npt.NDArray[Any], shape: Sequence[int | None]) -> bool:
    rest = 1
    for size in shape[1:]:
        if size is None:
            return False
        rest *= size
    return all(n > 0 for n in sizes[1:]) and int(np.prod([int(n) for n in sizes[1:]], dtype=object)) == rest


def _shapes(draft: _Draft, strict: bool = False) -> dict[str, list[int | None]]:
    """Shapes of all tensors, None for sizes that are not known; `strict` to refuse those that contradict each other."""
    from onnx import shape_inference

    try:
        # shapes follow from shapes: the numbers of weights are not copied for it
        big = {t.name for t in draft.graph.initializer if t.data_type == 1 and len(t.raw_data) > 4096}
        inferred = shape_inference.infer_shapes(_without(draft.model, big), data_prop=True, strict_mode=strict)
    except Exception as error:  # as above
        raise _failed(draft, "its shapes contradict each other", error) from error
    return {v.name: _sizes(v) for v in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)}


def _infer(draft: _Draft) -> None:
    """State the shapes of all tensors."""
    from onnx import shape_inference

    try:
        big = {t.name: t for t in draft.graph.initializer if t.data_type == 1 and len(t.raw_data) > 4096}
        inferred = shape_inference.infer_shapes(_without(draft.model, set(big)), data_prop=True, strict_mode=True)
    except Exception as error:  # as above
        raise _failed(draft, "its shapes contradict each other", error) from error
    _with_back(inferred, list(big.values()))
    draft.model = inferred
    total = 0
    for value in draft.graph.value_info:
        if value.type.tensor_type.HasField("shape"):
            sizes = [n if n is not None else 1 for n in _sizes(value)]
            total += _elements(sizes, f"{draft.where}: tensor {_short(value.name)}")
    if total > MAX_ELEMENTS:
        raise BadFileError(f"{draft.where}: its tensors take {4 * total >> 30} GiB for one input")


def _name_nodes(draft: _Draft) -> None:
    """Every node has a name of its own."""
    taken: set[str] = set()
    for number, node in enumerate(draft.graph.node):
        name = node.name or f"{node.op_type}_{number}"
        made, count = name, 1
        while made in taken:
            made, count = f"{name}_{count}", count + 1
        taken.add(made)
        node.name = made


def _dry_run(draft: _Draft, shape: Sequence[int | None], fixed: int | None) -> None:
    """Run the net once in ONNX Runtime, on two inputs together and apart: it works, and takes batches."""
    from lnsdeploy.emulator.ort import float_session

    session = float_session(draft.model.SerializeToString())
    rest = [int(n or 1) for n in shape[1:]]
    # sixteenths of −2 … 2: the same everywhere, and nothing that a net would not take
    count = 2 * int(np.prod(rest))
    x = (((np.arange(count, dtype=np.int64) * 2654435761 >> 7) % 64 - 32) / 16).astype(np.float32).reshape(2, *rest)
    name = draft.graph.input[0].name

    def run(values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = session.run(None, {name: values})[0]
        return found

    try:
        together, apart = run(x), [run(x[i : i + 1]) for i in range(2)]
    except Exception as error:  # ONNX Runtime has no common base class of its errors
        if fixed is None:
            raise _failed(draft, "ONNX Runtime cannot run it", error) from error
        raise UnsupportedError(
            str(
                _failed(
                    draft,
                    f"is made for batches of {fixed} alone: export it again with a batch axis of open size",
                    error,
                )
            )
        ) from error
    if together.dtype != np.float32:
        raise UnsupportedError(f"{draft.where}: its output holds {together.dtype}; float numbers are needed")
    joined = np.concatenate(apart) if apart[0].ndim and apart[0].shape[:1] == (1,) else None
    if joined is None or joined.shape != together.shape:
        raise UnsupportedError(
            f"{draft.where}: its output has the shape {list(together.shape)} for two inputs; its first axis must be "
            "the batch"
        )
    if not np.isfinite(together).all():
        return
    if not np.allclose(together, joined, rtol=1e-2, atol=1e-3 * float(np.abs(joined).max(initial=0.0) or 1)):
        raise UnsupportedError(
            f"{draft.where}: what it makes of an input depends on the others of the batch"
            + (
                ""
                if fixed is None
                else f"; it was made for batches of {fixed}: export it with a batch axis of open size"
            )
        )
