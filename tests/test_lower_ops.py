"""Operations that lowering brings onto words, or leaves in float (spec 6.1, 6.2, 6.6, 6.7, 7.2), in every executor."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from lnsdeploy.datapath import for_format, load_datapath
from lnsdeploy.emulator import artifact as artifacts
from lnsdeploy.emulator import cpu, floats, native, reference
from lnsdeploy.emulator import graph as g
from lnsdeploy.emulator.executor import availability, get_executor
from lnsdeploy.emulator.plan import Counts, DotPlan, MultiplyPlan
from lnsdeploy.errors import BadFileError, BadValueError, UnsupportedError
from lnsdeploy.exporters import placement
from lnsdeploy.exporters.export import replan
from lnsdeploy.exporters.lower import Lowered, LowerOptions, lower, sqnr_db
from lnsdeploy.formats import LNSFormat, decode, encode

RNG = np.random.default_rng(11)
WIDE, NARROW = LNSFormat(16, 1024), LNSFormat(8, 8)
EXECUTORS = [name for name in ("reference", "cpu", "ort", "ort-functions", "torch") if availability()[name] is None]


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def node(kind: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    """A node; `inputs` are names apart from each other, ``-`` for none."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(kind, names, [output], name=f"{kind.lower()}_{output}", **attributes)


def net(nodes: list[onnx.NodeProto], weights: dict[str, Any], shape: list[int], out_rank: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", *[None] * (out_rank - 1)])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def lowered_for(model: onnx.ModelProto, x: np.ndarray, fmt: LNSFormat) -> Lowered:
    return lower(model, x, LowerOptions(for_format(fmt)))


def artifact_of(lowered: Lowered) -> artifacts.Artifact:
    """The net as a file that was written and read."""
    made = artifacts.build(lowered.graph, {}, coverage=lowered.coverage, float_ops=lowered.float_ops, where="net")
    onnx.checker.check_model(onnx.load_model_from_string(made.data), full_check=True)
    read = artifacts.read_artifact(made.data, where="net")
    assert [type(a) for a in read.graph.nodes] == [type(a) for a in lowered.graph.nodes]
    assert read.float_ops == lowered.float_ops
    assert read.coverage == pytest.approx(lowered.coverage, abs=1e-6)
    return read


def assert_all_equal(artifact: artifacts.Artifact, x: np.ndarray) -> None:
    """Every executor gives the words of every tensor that the reference gives."""
    found = {}
    for name in EXECUTORS:
        found[name] = {}
        get_executor(name).run(artifact, x, visit=found[name].__setitem__)
    for name in EXECUTORS[1:]:
        assert found[name].keys() == found["reference"].keys()
        for tensor, words in found["reference"].items():
            np.testing.assert_array_equal(found[name][tensor], words, err_msg=f"{name}: {tensor}")


def exact(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    values: np.ndarray = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    return values


IMAGE, ROWS, TOKENS = [4, 6, 6], [10], [5, 8]
HALF = np.float32(0.5)
# name: nodes, constants, the input's shape without the batch, the output's rank, the net's operations
CASES: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], list[int], int, list[str]]] = {
    "sigmoid": ([node("Sigmoid", "x", "y")], {}, ROWS, 2, ["Lookup"]),
    "silu": ([node("Sigmoid", "x", "s"), node("Mul", "x s", "y")], {}, ROWS, 2, ["Lookup"]),
    "hard swish in parts": (
        [node("Add", "x c", "a"), node("Clip", "a lo hi", "b"), node("Mul", "x b", "d"), node("Div", "d six", "y")],
        {"c": np.float32(3), "lo": np.float32(0), "hi": np.float32(6), "six": np.float32([6])},
        ROWS,
        2,
        ["Lookup"],
    ),
    "gelu": (
        [
            node("Div", "x r", "a"),
            node("Erf", "a", "b"),
            node("Add", "b o", "c"),
            node("Mul", "x c", "d"),
            node("Mul", "d h", "y"),
        ],
        {"r": np.float32(np.sqrt(2)), "o": np.float32(1), "h": HALF},
        ROWS,
        2,
        ["Lookup"],
    ),
    "leaky relu": ([node("LeakyRelu", "x", "y", alpha=0.125)], {}, ROWS, 2, ["Lookup"]),
    "prelu of one slope": ([node("PRelu", "x s", "y")], {"s": np.float32([0.25])}, ROWS, 2, ["Lookup"]),
    "prelu of channels": ([node("PRelu", "x s", "y")], {"s": normal(4, 1, 1)}, IMAGE, 4, ["Decode", "Float", "Encode"]),
    "relu": ([node("Relu", "x", "y")], {}, ROWS, 2, ["Relu"]),
    "relu of a function": ([node("Tanh", "x", "a"), node("Relu", "a", "y")], {}, ROWS, 2, ["Lookup"]),
    "gate of a pooled tensor": (
        [
            node("GlobalAveragePool", "x", "p"),
            node("Conv", "p w b", "q"),
            node("HardSigmoid", "q", "s"),
            node("Mul", "x s", "y"),
        ],
        {"w": normal(4, 4, 1, 1), "b": normal(4)},
        IMAGE,
        4,
        ["AveragePool", "Conv", "Lookup", "Multiply"],
    ),
    "product with a constant": ([node("Mul", "x c", "y")], {"c": normal(4, 1, 1)}, IMAGE, 4, ["Multiply"]),
    "quotient by a constant": ([node("Div", "x c", "y")], {"c": normal(4, 1, 1)}, IMAGE, 4, ["Multiply"]),
    "sum with a constant": ([node("Add", "x c", "y")], {"c": normal(5, 8)}, TOKENS, 3, ["Add"]),
    "factor of a layer": (
        [node("MatMul", "x w", "a"), node("Mul", "a c", "y")],
        {"w": normal(8, 6), "c": normal(6)},
        TOKENS,
        3,
        ["Gemm"],
    ),
    "difference": (
        [node("MatMul", "x w", "a"), node("Sub", "x a", "y")],
        {"w": normal(8, 8)},
        TOKENS,
        3,
        ["Gemm", "Lookup", "Add"],
    ),
    "sum of three": (
        [node("MatMul", "x w", "a"), node("MatMul", "x v", "b"), node("Sum", "x a b", "y")],
        {"w": normal(8, 8), "v": normal(8, 8)},
        TOKENS,
        3,
        ["Gemm", "Gemm", "Add", "Add"],
    ),
    "quotient": (
        [node("Exp", "x", "a"), node("ReduceSum", "a i", "s"), node("Div", "a s", "y")],
        {"i": ints(1)},
        ROWS,
        2,
        ["Decode", "Float", "Float", "Float", "Encode"],
    ),
    "layer norm": (
        [node("LayerNormalization", "x s b", "y", axis=-1)],
        {"s": normal(8), "b": normal(8)},
        TOKENS,
        3,
        ["Decode", "Float", "Encode"],
    ),
    "local response normalization": ([node("LRN", "x", "y", size=3)], {}, IMAGE, 4, ["Decode", "Float", "Encode"]),
    "operations in float side by side": (
        [node("Softmax", "x", "a"), node("Softmax", "a", "b"), node("Reshape", "b s", "y")],
        {"s": ints(-1, 8, 5)},
        TOKENS,
        3,
        ["Decode", "Float", "Float", "Float", "Encode"],
    ),
    "softmax of scaled scores": (
        [
            node("Transpose", "x", "t", perm=[0, 2, 1]),
            node("MatMul", "x t", "a"),
            node("Mul", "a h", "b"),
            node("Softmax", "b", "c"),
            node("MatMul", "c x", "y"),
        ],
        {"h": HALF},
        TOKENS,
        3,
        ["Transpose", "MatMul", "Decode", "Float", "Float", "Encode", "MatMul"],
    ),
    "product with the factor first": (
        [node("Transpose", "x", "t", perm=[0, 2, 1]), node("MatMul", "t x", "y")],
        {},
        TOKENS,
        3,
        ["Transpose", "MatMul"],
    ),
    "heads": (
        [
            node("Reshape", "x s", "h"),
            node("Transpose", "h", "q", perm=[0, 2, 1, 3]),
            node("Transpose", "h", "k", perm=[0, 2, 3, 1]),
            node("MatMul", "q k", "y"),
        ],
        {"s": ints(-1, 5, 2, 4)},
        TOKENS,
        4,
        ["Reshape", "Transpose", "Transpose", "MatMul"],
    ),
    "parts of an axis": (
        [helper.make_node("Split", ["x", "sizes"], ["a", "b"], axis=2, name="split"), node("Mul", "a b", "y")],
        {"sizes": ints(4, 4)},
        TOKENS,
        3,
        ["Take", "Take", "Multiply"],
    ),
    "slice with steps": (
        [node("Slice", "x s e a t", "y")],
        {"s": ints(-1, 1), "e": ints(-9, 7), "a": ints(1, 2), "t": ints(-2, 3)},
        TOKENS,
        3,
        ["Take", "Take"],
    ),
    "one place": ([node("Gather", "x i", "y", axis=1)], {"i": np.int64(2)}, TOKENS, 2, ["Take", "Reshape"]),
    "several places": ([node("Gather", "x i", "y", axis=2)], {"i": ints(5, 0, -1)}, TOKENS, 3, ["Take"]),
    "repetition": ([node("Tile", "x r", "y")], {"r": ints(1, 2, 1)}, TOKENS, 3, ["Take"]),
    "expansion": (
        [node("GlobalMaxPool", "x", "p"), node("Expand", "p s", "y")],
        {"s": ints(1, 4, 2, 3)},
        IMAGE,
        4,
        ["MaxPool", "Take", "Take"],
    ),
    "padding with zeros": ([node("Pad", "x p", "y")], {"p": ints(0, 0, 1, 2, 0, 0, 0, 1)}, IMAGE, 4, ["Pad"]),
    "padding by reflection": (
        [node("Pad", "x p", "y", mode="reflect")],
        {"p": ints(0, 0, 1, 2, 0, 0, 0, 1)},
        IMAGE,
        4,
        ["Take", "Take"],
    ),
    "padding with ones": (
        [node("Pad", "x p c", "y")],
        {"p": ints(0, 0, 1, 0, 0, 0, 0, 0), "c": np.float32(1)},
        IMAGE,
        4,
        ["Decode", "Float", "Encode"],
    ),
    "nearest resizing": (
        [node("Resize", "x - s", "y", mode="nearest", coordinate_transformation_mode="asymmetric")],
        {"s": np.float32([1, 1, 2, 1.5])},
        IMAGE,
        4,
        ["Take", "Take"],
    ),
    "linear resizing": (
        [node("Resize", "x - s", "y", mode="linear")],
        {"s": np.float32([1, 1, 2, 2])},
        IMAGE,
        4,
        ["Decode", "Float", "Encode"],
    ),
    "depth to space": (
        [node("DepthToSpace", "x", "y", blocksize=2)],
        {},
        IMAGE,
        4,
        ["Reshape", "Transpose", "Reshape"],
    ),
    "space to depth": (
        [node("SpaceToDepth", "x", "y", blocksize=2)],
        {},
        IMAGE,
        4,
        ["Reshape", "Transpose", "Reshape"],
    ),
    "mean of tokens": (
        [node("ReduceMean", "x a", "y", keepdims=0)],
        {"a": ints(1)},
        TOKENS,
        2,
        ["Transpose", "Reshape", "AveragePool", "Reshape"],
    ),
    "mean of all places": ([node("ReduceMean", "x a", "y")], {"a": ints(2, 3)}, IMAGE, 4, ["AveragePool"]),
    "largest of channels": (
        [node("ReduceMax", "x a", "y")],
        {"a": ints(1)},
        IMAGE,
        4,
        ["Transpose", "Reshape", "MaxPool", "Reshape"],
    ),
    "pooling with sizes rounded up": (
        [node("MaxPool", "x", "y", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)],
        {},
        IMAGE,
        4,
        ["MaxPool"],
    ),
    "average with sizes rounded up": (
        [node("AveragePool", "x", "y", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)],
        {},
        IMAGE,
        4,
        ["AveragePool"],
    ),
    "convolution with automatic padding": (
        [node("Conv", "x w", "y", auto_pad="SAME_LOWER", strides=[2, 2])],
        {"w": normal(3, 4, 4, 4)},
        IMAGE,
        4,
        ["Conv"],
    ),
    "transposed convolution": (
        [node("ConvTranspose", "x w b", "y", strides=[2, 3], pads=[1, 0, 0, 1], output_padding=[1, 0], group=2)],
        {"w": normal(4, 3, 3, 3), "b": normal(6)},
        IMAGE,
        4,
        ["Reshape", "Pad", "Reshape", "Take", "Take", "Conv"],
    ),
    "transposed convolution of a line": (
        [node("ConvTranspose", "x w", "y", dilations=[2])],
        {"w": normal(5, 2, 3)},
        TOKENS,
        3,
        ["Reshape", "Pad", "Reshape", "Conv"],
    ),
    "gemm with factors": (
        [node("Gemm", "x w b", "y", alpha=0.5, beta=2.0)],
        {"w": normal(10, 3), "b": normal(3)},
        ROWS,
        2,
        ["Gemm"],
    ),
    "batch norm of rows": (
        [node("Relu", "x", "h"), node("BatchNormalization", "h s b m v", "y")],
        {"s": normal(10), "b": normal(10), "m": normal(10), "v": np.abs(normal(10)) + HALF},
        ROWS,
        2,
        ["Relu", "Multiply", "Add"],
    ),
    "batch norm of lines": (
        [node("Relu", "x", "h"), node("BatchNormalization", "h s b m v", "y")],
        {"s": normal(5), "b": normal(5), "m": normal(5), "v": np.abs(normal(5)) + HALF},
        TOKENS,
        3,
        ["Relu", "Conv"],
    ),
    "a token in front": (
        [
            node("Shape", "x", "d"),
            node("Gather", "d zero", "n"),
            node("Concat", "n rest", "s", axis=0),
            node("Expand", "token s", "t"),
            node("Concat", "t x", "a", axis=1),
            node("Add", "a place", "y"),
        ],
        {"zero": ints(0), "rest": ints(1, 8), "token": normal(1, 1, 8), "place": normal(1, 6, 8)},
        TOKENS,
        3,
        ["Broadcast", "Concat", "Add"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_operations(case: str) -> None:
    """Each against float at 16 bits, and between executors at 16 and 8 bits (spec 6.6: what is in float is named)."""
    nodes, weights, shape, rank, ops = CASES[case]
    model, x = net(nodes, weights, shape, rank), normal(4, *shape)
    onnx.checker.check_model(model)
    for fmt in (WIDE, NARROW):
        lowered = lowered_for(model, x, fmt)
        assert [n.op for n in lowered.graph.nodes] == ops
        in_float = [n for n in lowered.graph.nodes if isinstance(n, g.Float)]
        assert len(lowered.float_ops) == len(in_float)
        assert all(n.name in told and n.kind in told for n, told in zip(in_float, lowered.float_ops, strict=True))
        assert lowered.coverage == 1.0
        artifact = artifact_of(lowered)
        assert_all_equal(artifact, normal(3, *shape))
        if fmt is WIDE:
            got = artifact.graph.decode_output(get_executor("cpu").run(artifact, x))
            wanted = exact(model, x)
            assert got.shape == wanted.shape
            error = sqnr_db(wanted, got)
            assert error is not None
            assert error > 45, error


@pytest.mark.parametrize("datapath", ["lns-madam-8", "gauss-8-guard", "mitchell-8", "elma-8", "gauss-16"])
def test_products_of_two_tensors(datapath: str) -> None:
    """Spec 7.2: one product for each index of the leading axes, in every executor as in the reference."""
    nodes = [node("Transpose", "x", "t", perm=[0, 1, 3, 2]), node("MatMul", "x t", "y")]
    x = normal(3, 2, 5, 7)
    lowered = lower(net(nodes, {}, [2, 5, 7], 4), x, LowerOptions(load_datapath(datapath)))
    product = lowered.graph.nodes[-1]
    assert isinstance(product, g.MatMul)
    assert lowered.macs == 2 * 5 * 7 * 5
    artifact = artifact_of(lowered)
    assert_all_equal(artifact, x)
    # by hand: each slice a product of its own
    words: dict[str, np.ndarray] = {}
    get_executor("reference").run(artifact, x, visit=words.__setitem__)
    a, b = (words[name] for name in product.inputs)
    for i in np.ndindex(3, 2):
        row = reference.dot(a[i], np.ascontiguousarray(b[i].T), None, product.plan)
        np.testing.assert_array_equal(words[product.output][i], row)


@settings(deadline=None, max_examples=60)
@given(
    st.data(),
    st.integers(2, 16),
    st.booleans(),
    st.sampled_from(["zero", "min"]),
)
def test_element_wise_products(data: st.DataObject, bits: int, signed: bool, underflow: str) -> None:
    """Spec 6.2 by real numbers: the product's own code, limited as in 2.4."""
    gamma = 1 << data.draw(st.integers(0, max(bits - 3, 0)))
    a, b = LNSFormat(bits, gamma), LNSFormat(min(bits + 1, 16), gamma)
    out = LNSFormat(bits, gamma, signed=signed)
    offsets = [data.draw(st.integers(-300, 300)) for _ in range(3)]
    plan = MultiplyPlan(a, b, out, *offsets, underflow)
    words = [
        np.array(data.draw(st.lists(st.integers(0, (1 << f.bits) - 1), min_size=8, max_size=8))).astype(f.dtype)
        for f in (a, b)
    ]
    words = [np.where(w == f.sign_bit, 0, w).astype(f.dtype) for w, f in zip(words, (a, b), strict=True)]
    counts = Counts()
    got = reference.product(*words, plan, counts)
    codes, signs = (a.split(words[0]), b.split(words[1])), out.split(got)
    for i in range(8):
        (x, minus), (y, other) = (codes[0][0][i], codes[0][1][i]), (codes[1][0][i], codes[1][1][i])
        whole = int(x) + int(y) + offsets[0] + offsets[1] - offsets[2]
        negative = bool(minus) != bool(other)
        nothing = x == 0 or y == 0 or (negative and not signed)
        least = 1 if underflow == "min" else 0
        code = (least if underflow == "min" else 0) if nothing else max(min(whole, out.max_code), least)
        if nothing or whole < 1:
            code = least
        assert signs[0][i] == code
        assert bool(signs[1][i]) == (negative and not nothing and code > 0)
    if availability()["torch"] is None:
        import torch

        from lnsdeploy.emulator import portable

        made = portable.product(torch.from_numpy(words[0]), torch.from_numpy(words[1]), plan)
        np.testing.assert_array_equal(made.numpy(), got)


@pytest.mark.parametrize("kind", ["Sigmoid", "Exp", "Reciprocal", "Log", "Round"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_table_is_the_function_of_every_word(kind: str, bits: int) -> None:
    """Spec 6.7, exhaustively: decode, compute, encode, for all words, NaN and infinities included."""
    fmt = LNSFormat(bits, 4)
    x = normal(16, 6)
    lowered = lowered_for(net([node(kind, "x", "y")], {}, [6], 2), np.abs(x) + HALF, fmt)
    (table,) = lowered.graph.nodes
    assert isinstance(table, g.Lookup)
    assert table.function == kind
    every = np.arange(1 << bits).astype(fmt.dtype)
    values = decode(every, table.source.format, table.source.offset)
    model = net([node(kind, "x", "y")], {}, [], 1)
    made = exact(model, values)
    made = np.where(np.isnan(made), np.float32(0), made)
    wanted = encode(made, table.result.format, table.result.offset, negative="clip", name="y")
    np.testing.assert_array_equal(table.table, wanted)


@pytest.mark.parametrize("datapath", ["mitchell-8", "gauss-8-guard"])
def test_another_datapath_for_the_same_words(datapath: str) -> None:
    """Products of two tensors and the net's own constants go along."""
    nodes = [
        node("Add", "x c", "a"),
        node("Transpose", "a", "t", perm=[0, 2, 1]),
        node("MatMul", "a t", "b"),
        node("Softmax", "b", "s"),
        node("MatMul", "s a", "y"),
    ]
    x = normal(4, *TOKENS)
    made = artifact_of(lowered_for(net(nodes, {"c": normal(5, 8)}, TOKENS, 3), x, NARROW))
    other = replan(made, datapath, x)
    assert {n.plan.datapath.fingerprint for n in other.graph.nodes if isinstance(n, g.MatMul)} == set(
        other.graph.datapaths
    )
    assert not set(other.graph.datapaths) & set(made.graph.datapaths)
    assert_all_equal(artifacts.read_artifact(other.data, where="net"), x)


def test_a_function_that_many_read_is_looked_up_once() -> None:
    nodes = [node("Sigmoid", "x", "s"), node("MatMul", "s w", "a"), node("MatMul", "s v", "b"), node("Add", "a b", "y")]
    lowered = lowered_for(net(nodes, {"w": normal(10, 4), "v": normal(10, 4)}, ROWS, 2), normal(4, 10), NARROW)
    assert [n.op for n in lowered.graph.nodes] == ["Lookup", "Gemm", "Gemm", "Add"]


def test_what_runs_in_float_lowers_the_coverage() -> None:
    """A product of weights that depend on the input has no form on words, and is told of."""
    nodes = [node("MatMul", "x w", "a"), node("Einsum", "a a", "y", equation="bij,bkj->bik")]
    lowered = lowered_for(net(nodes, {"w": normal(8, 8)}, TOKENS, 3), normal(4, *TOKENS), WIDE)
    assert lowered.macs == 5 * 8 * 8
    assert lowered.coverage == pytest.approx(320 / (320 + 5 * 5 * 8))
    assert "Einsum" in lowered.float_ops[0]
    assert_all_equal(artifact_of(lowered), normal(2, *TOKENS))


def test_sums_are_followed_the_same_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.unavailable():
        pytest.skip("the native library is missing")
    for name in ("lns-madam-8", "lns-madam-8-lut1", "elma-8", "mitchell-8", "gauss-8"):
        datapath = load_datapath(name)
        fmt = datapath.activation
        plan = DotPlan(datapath, fmt, datapath.weight, datapath.output, -60, np.arange(6) - 70, -50)
        x = encode(normal(9, 20), fmt, -60, name="x")
        w = encode(normal(6, 20), datapath.weight, -60, name="w")
        start = normal(6).astype(np.float64) * 100
        fast = placement._largest(plan, x, w, start)
        monkeypatch.setattr(native, "unavailable", lambda: "gone")
        np.testing.assert_allclose(fast, placement._largest(plan, x, w, start), rtol=1e-12)
        monkeypatch.undo()
        assert (fast >= np.abs(start)).all()


def test_the_batch_may_be_of_any_size_and_order() -> None:
    """What follows the batch is no constant of the file."""
    nodes, weights, shape, rank, _ = CASES["a token in front"]
    artifact = artifact_of(lowered_for(net(nodes, weights, shape, rank), normal(4, *shape), NARROW))
    x = normal(7, *shape)
    for name in EXECUTORS:
        run = get_executor(name).run
        whole = run(artifact, x)
        parts = np.concatenate([run(artifact, x[i : i + 1]) for i in range(7)])
        np.testing.assert_array_equal(whole, parts, err_msg=name)


def test_operations_in_float_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, weights, _, rank, _ = CASES["softmax of scaled scores"]
    shape = [40, 8]
    model, x = net(nodes, weights, shape, rank), normal(6, *shape)
    made = artifacts.build(lowered_for(model, x, WIDE).graph, {}, where="net")
    wanted = get_executor("reference").run(made, x)
    for count in ("1", "2"):
        monkeypatch.setenv("LNSDEPLOY_THREADS", count)
        for name in ("ort", "ort-functions"):
            again = artifacts.read_artifact(made.data, where="net")
            np.testing.assert_array_equal(get_executor(name).run(again, x), wanted)


@pytest.mark.parametrize(
    ("nodes", "weights", "message"),
    [
        ([helper.make_node("Foo", ["x"], ["y"], domain="other")], {}, "other.Foo"),
        ([node("Relu", "nothing", "y")], {}, "nothing makes it"),
        ([node("Bernoulli", "x", "y")], {}, "neither on words nor in float"),
    ],
)
def test_what_nothing_can_run_is_refused_by_name(nodes: Any, weights: Any, message: str) -> None:
    model = net(nodes, weights, [6], 2)
    with pytest.raises((UnsupportedError, BadFileError), match=message):
        lowered_for(model, normal(4, 6), NARROW)


def changed(artifact: artifacts.Artifact, change: Any) -> bytes:
    model = onnx.load_model_from_string(artifact.data)
    change(model)
    return bytes(model.SerializeToString())


def test_damaged_files_with_operations_in_float_are_refused() -> None:
    nodes, weights, shape, rank, _ = CASES["softmax of scaled scores"]
    artifact = artifact_of(lowered_for(net(nodes, weights, shape, rank), normal(4, *shape), NARROW))

    def softmax(model: Any) -> Any:
        return next(n for n in model.graph.node if n.op_type == "Softmax")

    def other_operator(model: Any) -> None:
        softmax(model).op_type = "RandomNormalLike"

    def other_domain(model: Any) -> None:
        softmax(model).domain = "com.microsoft"

    def graph_attribute(model: Any) -> None:
        attribute = softmax(model).attribute.add()
        attribute.name, attribute.type = "body", onnx.AttributeProto.GRAPH

    def unnamed_plan(model: Any) -> None:
        entry = next(e for e in model.metadata_props if e.key == "lnsdeploy.graph")
        data = json.loads(entry.value)
        data["plans"].pop(softmax(model).name)
        entry.value = json.dumps(data)

    def lost_constant(model: Any) -> None:
        entry = next(e for e in model.metadata_props if e.key == "lnsdeploy.graph")
        data = json.loads(entry.value)
        data["constants"] = ["nowhere"]
        entry.value = json.dumps(data)

    for change in (other_operator, other_domain, graph_attribute, unnamed_plan, lost_constant):
        with pytest.raises(BadFileError):
            artifacts.read_artifact(changed(artifact, change), where="net")


def test_places_beyond_a_tensor_are_an_error() -> None:
    with pytest.raises(BadValueError, match="no such places"):
        g.Take("t", ("x",), "y", 1, (9,)).run([np.zeros((2, 3), dtype=np.uint8)], Counts())
    with pytest.raises(BadValueError, match="pads of 2 axes"):
        reference.pad(np.zeros((2, 3), dtype=np.uint8), (1, 2))
    with pytest.raises(BadValueError, match="products need words"):
        reference.each_product(np.zeros((2, 3, 4), np.uint8), np.zeros((3, 4, 2), np.uint8), np.add, NARROW)


def test_every_operation_in_float_is_one_that_onnx_runtime_runs_by_itself() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert known >= floats.OPERATORS
    for banned in ("If", "Loop", "Scan", "RandomNormal", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"):
        assert banned not in floats.OPERATORS


def test_a_step_is_the_fastest_there_is() -> None:
    relu = g.Relu("r", ("x",), "y", NARROW)
    words = np.arange(256, dtype=np.uint8)
    words[NARROW.sign_bit] = 0
    np.testing.assert_array_equal(cpu.step_of(relu)([words], Counts()), relu.run([words], Counts()))
