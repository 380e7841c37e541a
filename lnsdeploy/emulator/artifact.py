"""The LNS ONNX model: the artifact in the middle, written and read (docs/artifact.md).

The file's structure, words and tables are ONNX; what ONNX cannot say (formats, offsets, plans, the datapaths) lies
beside it as text in the model's metadata. Reading checks everything and executes nothing: a file whose nodes do not
follow from its plans is refused, and a table whose entries are not the datapath's is reported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy import __version__
from lnsdeploy.datapath import SPEC_VERSION, Datapath
from lnsdeploy.emulator import graph as g
from lnsdeploy.errors import BadFileError, LNSError, MissingDependencyError, UnsupportedError
from lnsdeploy.files import read_bytes, write_bytes
from lnsdeploy.formats import LNSFormat

MAX_FILE_BYTES = (1 << 31) - 1
METADATA = "lnsdeploy"


@dataclass(frozen=True)
class TableDifference:
    """A table of the file that is not what its datapath says.

    Args:
        node, op: the first node that uses it.
        table: the initializer's name.
        index: of the first entry that differs.
        expected, found: that entry by the datapath, and in the file.
        differing: entries that differ.
    """

    node: str
    op: str
    table: str
    index: tuple[int, ...]
    expected: int | float
    found: int | float
    differing: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "node": self.node,
            "op": self.op,
            "table": self.table,
            "index": list(self.index),
            "expected": self.expected,
            "found": self.found,
            "differing": self.differing,
        }


@dataclass(eq=False)
class Artifact:
    """An LNS net with its ONNX form.

    Args:
        graph: the net on words; what the reference runs.
        data: the ONNX file's bytes; what ONNX Runtime runs.
        where: names it in messages.
        macs: multiply-accumulate operations per input, by node.
        coverage: share of them in LNS.
        float_ops: operations left in float.
        table_differences: tables that are not the datapath's.
    """

    graph: g.LNSGraph
    data: bytes
    where: str
    macs: dict[str, int]
    coverage: float = 1.0
    float_ops: tuple[str, ...] = ()
    table_differences: tuple[TableDifference, ...] = field(default=())

    def require_intact(self) -> None:
        """Refuse a file whose tables are not its datapath's.

        Raises:
            BadFileError: the message names the first entry that differs.
        """
        if self.table_differences:
            t = self.table_differences[0]
            raise BadFileError(
                f"{self.where}: entry {list(t.index)} of table {t.table!r} (node {t.node!r}) is {t.found}, "
                f"but its datapath says {t.expected}; the file was changed (lnsdeploy verify shows what follows)"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ONNX file, atomically."""
        write_bytes(path, self.data)

    @cached_property
    def formats(self) -> list[str]:
        """The formats of the net's tensors, as text."""
        return sorted({str(info.format) for info in self.graph.tensors.values()})


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError(
            "the onnx package is not installed: pip install 'lnsdeploy[onnx]' (or pip install onnx)"
        ) from error
    return onnx


# ---------------------------------------------------------------------------------------------------
# Writing


def build(
    graph: g.LNSGraph,
    macs: Mapping[str, int],
    *,
    coverage: float = 1.0,
    float_ops: tuple[str, ...] = (),
    where: str = "net",
    pack: bool = True,
) -> Artifact:
    """The ONNX form of a net.

    Args:
        pack: store weights of up to 4 bits two to a byte; ONNX Runtime reads such models from 1.23 on.

    Raises:
        UnsupportedError: a part of it has no ONNX form (formats over 16 bits).
        MissingDependencyError: the onnx package is not installed.
    """
    data = to_model(graph, macs, coverage, float_ops, pack=pack).SerializeToString(deterministic=True)
    return Artifact(graph, data, where, dict(macs), coverage, float_ops)


def to_model(
    graph: g.LNSGraph, macs: Mapping[str, int], coverage: float, float_ops: tuple[str, ...], *, pack: bool = True
) -> Any:
    """onnx.ModelProto of a net; the same net gives the same bytes."""
    _onnx()
    from lnsdeploy.exporters.nodes import model_of

    main = graph.datapath
    description = {
        "input_shape": list(graph.input_shape),
        "output_shape": list(graph.output_shape),
        "encoded": graph.encoded,
        "words_output": graph.words_output,
        "underflow": graph.underflow,
        "datapaths": {key: datapath.to_dict() for key, datapath in sorted(graph.datapaths.items())},
        "tensors": {name: [str(info.format), info.offset] for name, info in graph.tensors.items()},
        "plans": {node.name: node.to_dict() for node in graph.nodes if node.to_dict()},
        "macs": dict(macs),
        "float_ops": list(float_ops),
        "net": graph.metadata,
    }
    if graph.constants:
        description["constants"] = sorted(graph.constants)
    metadata = {
        f"{METADATA}.version": __version__,
        f"{METADATA}.spec": str(SPEC_VERSION),
        f"{METADATA}.datapath": main.name,
        f"{METADATA}.fingerprint": main.fingerprint,
        f"{METADATA}.formats": ", ".join(sorted({str(t.format) for t in graph.tensors.values()})),
        f"{METADATA}.coverage": f"{coverage:.6f}",
        f"{METADATA}.graph": json.dumps(description, sort_keys=True, separators=(",", ":")),
    }
    return model_of(graph, metadata, pack=pack)


# ---------------------------------------------------------------------------------------------------
# Reading


def load_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Read an LNS ONNX file.

    Raises:
        BadFileError: missing, truncated, not ONNX, not made by lnsdeploy, or inconsistent; nothing of it was
            executed.
    """
    file = Path(path)
    if file.is_dir():
        raise BadFileError(f"{file} is a folder; an LNS ONNX file is needed (lnsdeploy export makes one of a run)")
    return read_artifact(read_bytes(file, limit=MAX_FILE_BYTES), where=str(file))


def read_artifact(data: bytes, *, where: str) -> Artifact:
    """As :func:`load_artifact`, from bytes."""
    model = parse_model(data, where)
    try:
        return _interpret(model, data, where)
    except LNSError as error:
        message = str(error)
        raise BadFileError(message if message.startswith(where) else f"{where}: {message}") from error
    except (
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise BadFileError(
            f"{where}: damaged, or not made by lnsdeploy export ({type(error).__name__}: {error})"
        ) from error


def parse_model(data: bytes, where: str) -> Any:
    """onnx.ModelProto of a file's bytes.

    Raises:
        BadFileError: truncated, or not ONNX.
    """
    onnx = _onnx()
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's errors have no common base class
        raise BadFileError(f"{where}: truncated, or not an ONNX file") from error
    if not model.graph.node:
        raise BadFileError(f"{where}: not an ONNX file, or one without nodes")
    return model


def _interpret(model: Any, data: bytes, where: str) -> Artifact:
    from lnsdeploy.exporters.functions import DOMAIN
    from lnsdeploy.exporters.nodes import is_unpacking, unpack

    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if f"{METADATA}.graph" not in metadata:
        raise BadFileError("an ONNX file, but not an LNS one: make one with lnsdeploy export")
    spec = metadata.get(f"{METADATA}.spec")
    if spec != str(SPEC_VERSION):
        raise UnsupportedError(
            f"made for specification {spec}, this lnsdeploy {__version__} executes {SPEC_VERSION}: export it again"
        )
    for tensor in model.graph.initializer:
        if tensor.data_location or tensor.external_data:
            raise BadFileError(f"initializer {tensor.name!r} refers to another file; LNS ONNX files hold everything")
    description = json.loads(metadata[f"{METADATA}.graph"])
    datapaths = {}
    for key, value in description["datapaths"].items():
        datapath = Datapath.from_dict(value, where=f"datapath {key}")
        if datapath.fingerprint != key:
            raise BadFileError(
                f"datapath {datapath.name!r} has the fingerprint {datapath.fingerprint}, but the file says {key}"
            )
        datapaths[key] = datapath
    tensors = {
        str(name): g.TensorInfo(LNSFormat.parse(text), _int(offset))
        for name, (text, offset) in description["tensors"].items()
    }
    arrays = unpack(model, _arrays(model))
    plans = description["plans"]
    constants = {str(name): arrays[name] for name in description.get("constants", ())}
    ends = f"{description['encoded']}.encode", f"{model.graph.output[0].name}.decode"
    nodes = []
    for proto in model.graph.node:
        if proto.domain == DOMAIN and proto.op_type in ("Encode", "Decode") and proto.name in ends:
            continue
        if is_unpacking(proto):
            continue
        nodes.append(_node(proto, arrays, plans, tensors, datapaths, constants))
    macs = {str(name): _int(count) for name, count in description["macs"].items()}
    graph = g.LNSGraph(
        input=model.graph.input[0].name,
        input_shape=tuple(_int(n) for n in description["input_shape"]),
        encoded=description["encoded"],
        underflow=description["underflow"],
        nodes=tuple(nodes),
        words_output=description["words_output"],
        output=model.graph.output[0].name,
        output_shape=tuple(_int(n) for n in description["output_shape"]),
        tensors=tensors,
        datapaths=datapaths,
        metadata={str(k): str(v) for k, v in description["net"].items()},
        constants={name: constants[name] for name in _in_order(model, constants)},
    )
    coverage = float(metadata.get(f"{METADATA}.coverage", "1"))
    float_ops = tuple(str(op) for op in description["float_ops"])
    graph.check()
    differences = _check_against_plans(model, graph, macs, coverage, float_ops)
    return Artifact(graph, data, where, macs, coverage, float_ops, differences)


def _in_order(model: Any, constants: Mapping[str, Any]) -> list[str]:
    return [tensor.name for tensor in model.graph.initializer if tensor.name in constants]


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadFileError(f"an integer is needed, not {value!r}")
    return value


def _arrays(model: Any) -> dict[str, npt.NDArray[Any]]:
    from onnx import numpy_helper

    arrays = {}
    for tensor in model.graph.initializer:
        # a tensor that claims more than it holds would be allocated before it fails
        if any(n < 0 for n in tensor.dims) or int(np.prod([int(n) for n in tensor.dims] or [1], dtype=object)) > (
            MAX_FILE_BYTES
        ):
            raise BadFileError(f"initializer {tensor.name!r} has the impossible shape {list(tensor.dims)}")
        arrays[tensor.name] = numpy_helper.to_array(tensor)
    return arrays


def _node(
    proto: Any,
    arrays: Mapping[str, npt.NDArray[Any]],
    plans: Mapping[str, Any],
    tensors: Mapping[str, g.TensorInfo],
    datapaths: Mapping[str, Datapath],
    constants: Mapping[str, npt.NDArray[Any]],
) -> g.Node:
    from lnsdeploy.exporters.functions import DOMAIN
    from lnsdeploy.exporters.nodes import node_of

    if proto.domain not in (DOMAIN, ""):
        raise UnsupportedError(f"node {proto.name!r}: operator domain {proto.domain!r} is unknown")
    node = node_of(proto, arrays, plans.get(proto.name, {}), tensors, datapaths, constants)
    if node.makes_words and node.output not in tensors:
        raise BadFileError(f"node {proto.name!r}: its output {node.output!r} has no recorded format")
    return node


def _check_against_plans(
    model: Any, graph: g.LNSGraph, macs: Mapping[str, int], coverage: float, float_ops: tuple[str, ...]
) -> tuple[TableDifference, ...]:
    """Rebuild the file from its plans: its nodes must be those, and differing tables are reported."""
    from onnx import numpy_helper

    from lnsdeploy.exporters.functions import DOMAIN
    from lnsdeploy.exporters.nodes import is_packed

    rebuilt = to_model(graph, macs, coverage, float_ops, pack=is_packed(model))
    if len(rebuilt.graph.node) != len(model.graph.node):
        raise BadFileError(f"{len(model.graph.node)} nodes, where its plans give {len(rebuilt.graph.node)}")
    for have, want in zip(model.graph.node, rebuilt.graph.node, strict=True):
        if have.SerializeToString(deterministic=True) != want.SerializeToString(deterministic=True):
            raise BadFileError(f"node {have.name!r} ({have.op_type}) is not the one that its plan gives")
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    differences = []
    for want in rebuilt.graph.initializer:
        have = found.get(want.name)
        if have is None:
            raise BadFileError(f"initializer {want.name!r} is missing")
        if have.data_type != want.data_type or list(have.dims) != list(want.dims):
            raise BadFileError(
                f"initializer {want.name!r} has another type or shape than its plan gives: {list(have.dims)}, not "
                f"{list(want.dims)}"
            )
        a, b = numpy_helper.to_array(want), numpy_helper.to_array(have)
        if np.array_equal(a, b):
            continue
        user = next((n for n in model.graph.node if want.name in n.input), None)
        if user is None or user.domain != DOMAIN:
            continue
        where = np.argwhere(a != b)
        first = tuple(int(i) for i in where[0])
        differences.append(
            TableDifference(user.name, user.op_type, want.name, first, a[first].item(), b[first].item(), len(where))
        )
    return tuple(differences)
