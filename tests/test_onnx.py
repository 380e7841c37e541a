"""The ONNX operators' function bodies against the reference executor, in a plain ONNX Runtime (spec 2 to 7)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from lnsdeploy.datapath import Datapath, LinearAccumulator, LogAccumulator, default_adder, named_datapaths
from lnsdeploy.delta import Cordic, Cotransform, Exact, Interpolated, Max, Mitchell, Polynomial, Shift, Table
from lnsdeploy.emulator import artifact as artifacts
from lnsdeploy.emulator import graph as g
from lnsdeploy.emulator.compare import compare
from lnsdeploy.emulator.executor import get_executor
from lnsdeploy.emulator.plan import AddPlan, DotPlan, PoolPlan, RescalePlan, Window
from lnsdeploy.errors import UnsupportedError
from lnsdeploy.exporters import functions, nodes
from lnsdeploy.formats import LNSFormat, decode, encode

METHODS = [
    Exact(), Table(6, 2), Table(5, 4, "middle"), Interpolated(4, "equal", 6), Interpolated(2, "octave", 8),
    Cotransform(2), Mitchell(), Shift(), Polynomial(2, 2, "octave", 6), Cordic(8, 12), Max(),
]  # fmt: skip


def net(node, tensors, shape, output_shape, datapath, encoded="x_words", words_output="y_words"):
    """A net of one node between an encoding and a decoding."""
    return g.LNSGraph(
        input="x",
        input_shape=(0, *shape),
        encoded=encoded,
        underflow=datapath.underflow,
        nodes=tuple(node),
        words_output=words_output,
        output="y",
        output_shape=(0, *output_shape),
        tensors=tensors,
        datapaths={datapath.fingerprint: datapath},
    )


def check(graph, x, checker=False):
    """The words of every tensor are the reference's; returns them."""
    try:
        made = artifacts.build(graph, {})
    except UnsupportedError as error:
        # several lanes of terms beyond 64 bits: refused, and tested below
        assume("exceed 64 bits" not in str(error))
        raise
    if checker:
        onnx.checker.check_model(onnx.load_model_from_string(made.data), full_check=True)
    again = artifacts.read_artifact(made.data, where="net.onnx")
    assert again.table_differences == ()
    result = compare([get_executor("reference"), get_executor("ort")], again, x)
    assert result.equal, str(result.first_difference)
    words = {}
    get_executor("reference").run(again, x, visit=words.__setitem__)
    return words


def values_for(fmt, offset, rng, shape):
    """Floats whose words use the whole format: random words, decoded, some zeros."""
    words = rng.integers(0, 1 << fmt.bits, shape).astype(fmt.dtype)
    words[rng.random(shape) < 0.15] = 0
    return decode(words, fmt, offset)


def random_words(fmt, rng, shape):
    words = rng.integers(0, 1 << fmt.bits, shape).astype(fmt.dtype)
    words[words == fmt.sign_bit] = 0
    return words


@st.composite
def linear_datapaths(draw):
    f = draw(st.integers(0, 4))
    weight = LNSFormat(draw(st.integers(2, 9)), 1 << f, draw(st.booleans()))
    narrow = draw(st.integers(0, f))
    activation = LNSFormat(draw(st.integers(2, 9)), 1 << narrow, draw(st.booleans()))
    output = LNSFormat(draw(st.integers(2, 12)), 1 << f, draw(st.booleans()))
    encoder = draw(st.sampled_from(["exact", "table", "mitchell"]))
    bits = draw(st.integers(2, 34))
    accumulate = LinearAccumulator(
        bits=bits,
        conversion=draw(st.sampled_from(["product", "bin"])),
        table_bits=draw(st.integers(0, f)),
        constant_bits=draw(st.integers(0, 10)),
        lanes=draw(st.sampled_from([1, 1, 2, 3, 8])),
        psum_bits=draw(st.sampled_from([None, max(bits - 3, 2), bits + 2])),
        overflow=draw(st.sampled_from(["wrap", "saturate"])),
        shift=draw(st.sampled_from(["truncate", "round"])),
        encoder=encoder,
        encoder_bits=draw(st.integers(1, 6)) if encoder == "table" else None,
    )
    underflow = draw(st.sampled_from(["zero", "min"]))
    return Datapath("random", weight, activation, output, accumulate, default_adder(output), underflow)


@st.composite
def log_datapaths(draw):
    gamma = draw(st.sampled_from([1, 2, 3, 4, 8, 10, 16]))
    weight = LNSFormat(draw(st.integers(2, 9)), gamma, draw(st.booleans()))
    activation = LNSFormat(draw(st.integers(2, 9)), gamma, draw(st.booleans()))
    output = LNSFormat(draw(st.integers(2, 12)), gamma, draw(st.booleans()))
    accumulate = LogAccumulator(
        bits=draw(st.integers(1, 14)),
        guard_bits=draw(st.integers(0, 3)),
        lanes=draw(st.sampled_from([1, 1, 2, 3, 5, 8])),
        delta=draw(st.sampled_from(METHODS)),
    )
    underflow = draw(st.sampled_from(["zero", "min"]))
    return Datapath("random", weight, activation, output, accumulate, default_adder(output), underflow)


def dot_plan(datapath, rng, channels):
    gamma = datapath.gamma
    per_channel = rng.random() < 0.5
    weight_offset = rng.integers(-20, 20, channels) if per_channel else int(rng.integers(-20, 20))
    output_offset = int(rng.integers(-30, 60))
    lsb = int(rng.integers(-14, 8))
    acc_offset = rng.integers(-40, 40, channels) if per_channel else int(rng.integers(-40, 40))
    if datapath.is_linear:
        acc_offset = 0
    plan = DotPlan(
        datapath, datapath.activation, datapath.weight, datapath.output, int(rng.integers(-20, 20)), weight_offset,
        output_offset, lsb, acc_offset,
    )  # fmt: skip
    assert plan.gamma == gamma
    return plan


def a_bias(datapath, rng, channels):
    accumulator = datapath.accumulate
    if rng.random() < 0.3:
        return None
    if datapath.is_linear:
        limit = 1 << (accumulator.bits - 1)
        return rng.integers(-limit, limit, channels, dtype=np.int64)
    codes = rng.integers(0, 1 << accumulator.bits, channels, dtype=np.int64)
    return codes + (rng.integers(0, 2, channels) << accumulator.bits) * (codes > 0)


@settings(max_examples=24, deadline=None)
@given(st.one_of(linear_datapaths(), log_datapaths()), st.integers(0, 2**32 - 1))
def test_gemm(datapath, seed):
    rng = np.random.default_rng(seed)
    rows, channels, depth = int(rng.integers(1, 6)), int(rng.integers(1, 5)), int(rng.integers(1, 20))
    plan = dot_plan(datapath, rng, channels)
    words = random_words(datapath.weight, rng, (channels, depth))
    node = g.Gemm("layer", ("x_words",), "y_words", words, a_bias(datapath, rng, channels), plan)
    tensors = {
        "x_words": g.TensorInfo(datapath.activation, plan.input_offset),
        "y_words": g.TensorInfo(datapath.output, plan.output_offset),
    }
    x = values_for(datapath.activation, plan.input_offset, rng, (rows, depth))
    check(net([node], tensors, (depth,), (channels,), datapath), x)


@settings(max_examples=16, deadline=None)
@given(st.one_of(linear_datapaths(), log_datapaths()), st.integers(0, 2**32 - 1))
def test_conv(datapath, seed):
    rng = np.random.default_rng(seed)
    axes, groups = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    each_in, each_out, rows = int(rng.integers(1, 3)), int(rng.integers(1, 3)), int(rng.integers(1, 4))
    kernel = tuple(rng.integers(1, 4, axes).tolist())
    window = Window(
        kernel,
        tuple(rng.integers(1, 3, axes).tolist()),
        tuple(rng.integers(0, 3, 2 * axes).tolist()),
        tuple(rng.integers(1, 3, axes).tolist()),
    )
    spatial = tuple(rng.integers(5, 8, axes).tolist())
    channels = groups * each_out
    plan = dot_plan(datapath, rng, channels)
    words = random_words(datapath.weight, rng, (channels, each_in, *kernel))
    node = g.Conv("layer", ("x_words",), "y_words", words, a_bias(datapath, rng, channels), plan, window, groups)
    tensors = {
        "x_words": g.TensorInfo(datapath.activation, plan.input_offset),
        "y_words": g.TensorInfo(datapath.output, plan.output_offset),
    }
    x = values_for(datapath.activation, plan.input_offset, rng, (rows, groups * each_in, *spatial))
    graph = net([node], tensors, x.shape[1:], (channels, *window.output_shape(spatial)), datapath)
    check(graph, x)


@settings(max_examples=24, deadline=None)
@given(log_datapaths(), st.integers(0, 2**32 - 1))
def test_add_pool_rescale_relu_clip_max(datapath, seed):
    """A chain of the operations of spec 6 on one input."""
    rng = np.random.default_rng(seed)
    fmt = LNSFormat(int(rng.integers(3, 10)), datapath.gamma)
    other = LNSFormat(int(rng.integers(3, 10)), datapath.gamma, bool(rng.integers(0, 2)))
    offset, acc = int(rng.integers(-30, 30)), int(rng.integers(-40, 40))
    accumulator = datapath.log
    low, high = sorted(rng.integers(-fmt.max_code, fmt.max_code + 1, 2).tolist())
    word = lambda key: key if key >= 0 else -key | fmt.sign_bit  # noqa: E731
    pool = Window((2, 3), (2, 1), (1, 1, 0, 1))
    average = Window((3, 2), (1, 2), (1, 0, 1, 1))
    factor = int(rng.integers(1, 5))
    wider = LNSFormat(int(rng.integers(3, 14)), datapath.gamma * factor)
    o1, o2, o3 = (int(v) for v in rng.integers(-40, 40, 3))
    pool_plan = PoolPlan(accumulator, fmt, other, o1, o2, acc, datapath.underflow)
    widen = RescalePlan(other, wider, o2, o3, datapath.underflow)
    narrow = RescalePlan(wider, fmt, o3, offset, datapath.underflow)
    chain = [
        g.MaxPool("max", ("x_words",), "a", fmt, pool),
        g.Clip("clip", ("a",), "b", fmt, word(low), word(high)),
        g.Relu("relu", ("a",), "c", fmt),
        g.Add("add", ("b", "c"), "d", AddPlan(accumulator, fmt, fmt, fmt, offset, offset, o1, acc, datapath.underflow)),
        g.AveragePool("average", ("d",), "e", pool_plan, average, bool(rng.integers(0, 2)), (3, 5)),
        g.Rescale("widen", ("e",), "f", widen),
        g.Rescale("narrow", ("f",), "y_words", narrow),
    ]
    tensors = {name: g.TensorInfo(fmt, offset) for name in ("x_words", "a", "b", "c", "y_words")}
    tensors |= {"d": g.TensorInfo(fmt, o1), "e": g.TensorInfo(other, o2), "f": g.TensorInfo(wider, o3)}
    x = values_for(fmt, offset, rng, (3, 2, 6, 5))
    made = datapath
    graph = net(chain, tensors, (2, 6, 5), (2, 3, 3), made)
    check(graph, x)


@pytest.mark.parametrize("name", named_datapaths())
def test_every_named_datapath_at_a_larger_size(name):
    from lnsdeploy.datapath import load_datapath

    datapath = load_datapath(name)
    rng = np.random.default_rng(7)
    operands = datapath.activation, datapath.weight, datapath.output
    plan = DotPlan(datapath, *operands, -3, rng.integers(-4, 4, 24), 40, lsb=2, acc_offset=9)
    words = random_words(datapath.weight, rng, (24, 97))
    node = g.Gemm("layer", ("x_words",), "y_words", words, None, plan)
    tensors = {"x_words": g.TensorInfo(datapath.activation, -3), "y_words": g.TensorInfo(datapath.output, 40)}
    x = values_for(datapath.activation, -3, rng, (50, 97))
    check(net([node], tensors, (97,), (24,), datapath), x, checker=True)


@pytest.mark.parametrize(
    "fmt", [LNSFormat(8, 8), LNSFormat(4, 2), LNSFormat(5, 3, False), LNSFormat(16, 1024), LNSFormat(12, 100)]
)
@pytest.mark.parametrize("underflow", ["zero", "min"])
@pytest.mark.parametrize("offset", [-1100, -3, 900])
def test_encode_at_and_around_every_bound(fmt, underflow, offset):
    """Spec 2.1, 2.4 by comparison with thresholds: the floats at every bound and beside it."""
    offset = offset * fmt.gamma // 8
    thresholds = nodes.encode_thresholds(fmt, offset, underflow)
    assert (thresholds[1:] >= thresholds[:-1]).all()
    near = [thresholds, np.nextafter(thresholds, np.float32(0)), np.nextafter(thresholds, np.float32(np.inf))]
    x = np.concatenate([*near, [0.0, np.inf, 1e-45, 3.4e38, 1.0]]).astype(np.float32)
    x = np.concatenate([x, -x])[:, None]
    tensors = {"x_words": g.TensorInfo(fmt, offset)}
    datapath = Datapath("d", fmt, fmt, fmt, LogAccumulator(8), LogAccumulator(8), underflow)
    graph = net([], tensors, (1,), (1,), datapath, words_output="x_words")
    words = check(graph, x)["x_words"]
    np.testing.assert_array_equal(words, encode(x, fmt, offset, underflow=underflow, negative="clip"))


def test_nan_becomes_the_zero_word_in_the_file_and_is_refused_by_executors():
    fmt = LNSFormat(8, 8)
    datapath = Datapath("d", fmt, fmt, fmt, LogAccumulator(8), LogAccumulator(8))
    graph = net([], {"x_words": g.TensorInfo(fmt, -100)}, (1,), (1,), datapath, words_output="x_words")
    made = artifacts.build(graph, {})
    x = np.array([[np.nan], [1.0]], dtype=np.float32)
    session = onnxruntime.InferenceSession(made.data)
    assert session.run(None, {"x": x})[0][0, 0] == 0
    for name in ("reference", "ort"):
        with pytest.raises(ValueError, match="NaN"):
            get_executor(name).run(made, x)


@pytest.mark.smoke
@pytest.mark.parametrize("operator", functions.OPERATORS, ids=lambda o: o.name)
def test_bodies_are_integer_and_named(operator):
    """No float in any body but the two that convert, and every node of every subgraph has a name."""
    body = functions.function(operator.name)
    names = set()

    def walk(node_list):
        for node in node_list:
            assert node.name
            assert node.name not in names
            names.add(node.name)
            assert node.op_type not in ("Log", "Exp", "BitShift", "Floor", "Ceil", "Round", "Sqrt", "Reciprocal")
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    assert attribute.t.data_type in (TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL)
                if attribute.name == "to" and not attribute.ref_attr_name:
                    assert attribute.i in (TensorProto.INT32, TensorProto.INT64)
                if attribute.type == onnx.AttributeProto.GRAPH:
                    walk(attribute.g.node)

    walk(body.node)
    assert {v.name for v in operator.attributes} == set(body.attribute)
    used = {name for node in body.node for name in node.input}
    assert {v.name for v in operator.inputs} <= used | _captured(body)


def _captured(body):
    found = set()

    def walk(node_list):
        for node in node_list:
            found.update(node.input)
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    walk(attribute.g.node)

    walk(body.node)
    return found


def test_operators_that_cannot_be_expressed_say_so():
    wide = LNSFormat(20, 8)
    datapath = Datapath("d", wide, wide, wide, LogAccumulator(22), LogAccumulator(22))
    graph = net([], {"x_words": g.TensorInfo(wide, 0)}, (1,), (1,), datapath, words_output="x_words")
    with pytest.raises(UnsupportedError, match="at most 16 bits"):
        artifacts.build(graph, {})
    fmt = LNSFormat(8, 8)
    many = Datapath(
        "d", LNSFormat(8, 1), LNSFormat(8, 1), LNSFormat(8, 1), LinearAccumulator(24, lanes=2), LogAccumulator(8)
    )
    plan = DotPlan(many, many.activation, many.weight, many.output, 0, 0, 0, lsb=0)
    node = g.Gemm("layer", ("x_words",), "y_words", np.zeros((1, 1), np.uint8), None, plan)
    tensors = {"x_words": g.TensorInfo(many.activation, 0), "y_words": g.TensorInfo(many.output, 0)}
    with pytest.raises(UnsupportedError, match=r"2 lanes of terms up to .* exceed 64 bits"):
        artifacts.build(net([node], tensors, (1,), (1,), many), {})
    huge = Datapath("d", fmt, fmt, fmt, LogAccumulator(30), LogAccumulator(8))
    plan = DotPlan(huge, fmt, fmt, fmt, 0, 0, 0)
    node = g.Gemm("layer", ("x_words",), "y_words", np.zeros((1, 1), np.uint8), None, plan)
    tensors = {"x_words": g.TensorInfo(fmt, 0), "y_words": g.TensorInfo(fmt, 0)}
    with pytest.raises(UnsupportedError, match="26 is the most"):
        artifacts.build(net([node], tensors, (1,), (1,), huge), {})


def test_operator_pages_are_current():
    """docs/operators is what the schemas generate."""
    folder = Path(__file__).parent.parent / "docs" / "operators"
    pages = functions.operator_pages()
    assert {p.name for p in folder.iterdir()} == set(pages)
    for name, text in pages.items():
        assert (folder / name).read_text(encoding="utf-8") == text, f"regenerate docs/operators/{name}"
