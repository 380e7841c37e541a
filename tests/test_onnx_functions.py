"""Function bodies on their own: by the oracle, at sizes 0 and 1, over blocks of rows, threads, optimisation levels.

`test_onnx.py` compares whole nets with the reference executor; here single nodes meet the oracle of `tests/oracle.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from lnsdeploy.datapath import Datapath, LinearAccumulator, LogAccumulator, default_adder
from lnsdeploy.delta import Exact, Table
from lnsdeploy.emulator import reference
from lnsdeploy.emulator.plan import AddPlan, DotPlan, PoolPlan, RescalePlan, Window
from lnsdeploy.errors import UnsupportedError
from lnsdeploy.exporters import functions, nodes
from lnsdeploy.formats import LNSFormat
from tests import cases

Array = np.ndarray[Any, Any]
LEVELS = [
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
]
BYTES = LNSFormat(8, 8)


def model(
    op: str,
    words: dict[str, Any],
    output: Any,
    tables: dict[str, Array],
    attributes: dict[str, Any],
    rank: int | None = None,
) -> ModelProto:
    """One node; `words` are the types of its first inputs, of any shape or of a rank."""
    shape = None if rank is None else [f"d{i}" for i in range(rank)]

    def kind(dtype: Any) -> int:
        return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    node = helper.make_node(op, [*words, *tables], ["Y"], name="node", domain=functions.DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, kind(dtype), shape) for name, dtype in words.items()],
        [helper.make_tensor_value_info("Y", kind(output), shape and [f"{d}_out" for d in shape])],
        [numpy_helper.from_array(np.ascontiguousarray(table), name) for name, table in tables.items()],
    )
    return helper.make_model(
        graph,
        opset_imports=[
            helper.make_opsetid("", functions.OPSET),
            helper.make_opsetid(functions.DOMAIN, functions.VERSION),
        ],
        functions=functions.functions({op}),
        ir_version=functions.IR_VERSION,
    )


def session(made: ModelProto, threads: int = 1, level: Any = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if level is not None:
        options.graph_optimization_level = level
    return onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def dot_model(
    plan: DotPlan,
    w: Array,
    bias: Array | None,
    window: Window | None = None,
    groups: int = 1,
    rank: int | None = None,
) -> ModelProto:
    linear = plan.datapath.is_linear
    make = nodes.linear_tables if linear else nodes.log_tables
    attributes: dict[str, Any] = dict(nodes._dot_attributes(plan))
    if window is not None:
        attributes |= {**nodes._window_attributes(window), "group": groups}
    op = ("Linear" if linear else "Log") + ("Gemm" if window is None else "Conv")
    tables = {"W": w, **make(plan, w.shape[0], bias)}
    return model(op, {"X": plan.activation.dtype}, plan.output.dtype, tables, attributes, rank)


def pool_model(plan: PoolPlan, window: Window, counts: Array) -> ModelProto:
    part = plan.accumulator
    attributes: dict[str, Any] = {
        **nodes._format_attributes("input", plan.input),
        "input_shift": plan.input_offset - plan.acc_offset,
        "lanes": part.lanes,
        "acc_bits": part.bits,
        "guard_bits": part.guard_bits,
        "code_shift": plan.acc_offset - plan.output_offset,
        **nodes._output_attributes(plan.output, plan.underflow),
        **nodes._window_attributes(window),
    }
    tables = {
        **nodes._delta_inputs(part, plan.input.gamma),
        "log_counts": counts.astype(np.int64).reshape((1,) * (3 - counts.ndim) + counts.shape),
    }
    return model("AveragePool", {"X": plan.input.dtype}, plan.output.dtype, tables, attributes)


def run(made: ModelProto, **inputs: Array) -> Array:
    return np.asarray(session(made).run(None, inputs)[0])


def a_datapath(accumulate: Any, fmt: LNSFormat = BYTES, underflow: str = "zero") -> Datapath:
    return Datapath("d", fmt, fmt, fmt, accumulate, default_adder(fmt), underflow)


def a_plan(accumulate: Any, fmt: LNSFormat = BYTES, underflow: str = "zero", **places: Any) -> DotPlan:
    places = {"output_offset": fmt.max_code, **places}
    return DotPlan(a_datapath(accumulate, fmt, underflow), fmt, fmt, fmt, 0, 0, **places)


def words(shape: tuple[int, ...], fmt: LNSFormat = BYTES, seed: int = 0) -> Array:
    found = np.random.default_rng(seed).integers(0, 1 << fmt.bits, shape)
    return np.asarray(found.astype(fmt.dtype))


# One of each loop: wrap and saturate, one lane and several, one bin and several; log accumulation, also with a tree.
LOOPS = {
    "wrap": a_plan(LinearAccumulator(24, table_bits=3, overflow="wrap"), lsb=17),
    "saturate": a_plan(LinearAccumulator(20, table_bits=3), lsb=17),
    "wrap-lanes": a_plan(LinearAccumulator(22, table_bits=1, lanes=3, psum_bits=19, overflow="wrap"), lsb=17),
    "saturate-lanes": a_plan(LinearAccumulator(20, table_bits=3, lanes=5, psum_bits=18), lsb=17),
    "bins": a_plan(LinearAccumulator(20, "bin", table_bits=3), lsb=12),
    "bins-lanes": a_plan(LinearAccumulator(18, "bin", table_bits=2, lanes=4, overflow="wrap"), lsb=14),
    "64-bit": a_plan(LinearAccumulator(50, table_bits=3, constant_bits=12), lsb=-8),
    "log": a_plan(LogAccumulator(8, 1), acc_offset=100),
    "log-lanes": a_plan(LogAccumulator(9, 2, lanes=3, delta=Table(20, 2, "middle")), acc_offset=120),
}
LOOP = pytest.mark.parametrize("plan", LOOPS.values(), ids=LOOPS.keys())


# ---------------------------------------------------------------------------------------------------------------------
# Against the oracle


@pytest.mark.parametrize("case", cases.DOTS, ids=lambda case: case.name)
def test_named_cases_by_the_oracle(case: cases.DotCase) -> None:
    """spec 3, 4, 5: every named edge case."""
    a, w, bias = case.arrays()
    expected = case.by_oracle() if case.expected is None else case.expected
    assert run(dot_model(case.plan(), w, bias), X=a).tolist() == expected


@LOOP
@pytest.mark.parametrize(
    ("shape", "kernel", "groups", "window"),
    [
        ((2, 4, 5), (3,), 2, Window((3,), (2,), (1, 0), (1,))),
        ((1, 2, 4, 5), (2, 3), 1, Window((2, 3), (1, 2), (1, 0, 0, 2), (2, 1))),
        ((2, 2, 3, 2, 3), (2, 1, 2), 2, Window((2, 1, 2), (1, 1, 2), (0, 1, 0, 1, 0, 1), (1, 1, 1))),
    ],
    ids=["1d", "2d", "3d"],
)
def test_convolution_by_the_oracle(
    plan: DotPlan, shape: tuple[int, ...], kernel: tuple[int, ...], groups: int, window: Window
) -> None:
    """spec 7.1."""
    x, w = words(shape), words((2 * groups, shape[1] // groups, *kernel), seed=1)
    bias = np.arange(2 * groups, dtype=np.int64) * 5
    expected = cases.oracle_convolution(x, w, bias, plan, window, groups)
    np.testing.assert_array_equal(run(dot_model(plan, w, bias, window, groups), X=x), expected)


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("average", [True, False])
def test_pooling_by_the_oracle(lanes: int, average: bool) -> None:
    """spec 6.5, sums too, with words of 16 bits."""
    fmt = LNSFormat(12, 16)
    plan = PoolPlan(LogAccumulator(11, 1, lanes, Exact()), fmt, LNSFormat(9, 16, False), 3, -5, 0)
    window = Window((2, 3), (2, 1), (1, 0, 0, 2))
    x = words((2, 3, 4, 5), fmt)
    counts = reference.log_counts((4, 5), plan, window, False) if average else np.zeros((1, 1))
    expected = cases.oracle_pool(x, plan, window, average)
    np.testing.assert_array_equal(run(pool_model(plan, window, counts), X=x), expected)


@pytest.mark.parametrize(
    "fmt", [LNSFormat(4, 1), LNSFormat(8, 8), LNSFormat(9, 8, False), LNSFormat(16, 1024)], ids=str
)
def test_max_pooling_and_order(fmt: LNSFormat) -> None:
    """spec 6.1: every word of the format, minus zero too, beside padding."""
    window = Window((3, 2), (1, 2), (1, 1, 1, 0))
    attributes = {**nodes._format_attributes("", fmt), **nodes._window_attributes(window)}
    x = words((2, 3, 5, 6), fmt)
    x[0, 0, :3] = fmt.sign_bit | 1 if fmt.signed else 1
    x[0, 1, 0, :2] = fmt.sign_bit
    made = model("MaxPool", {"X": fmt.dtype}, fmt.dtype, {}, attributes)
    np.testing.assert_array_equal(run(made, X=x), reference.max_pool(x, fmt, window))


@pytest.mark.parametrize("shapes", [((3, 1), (1, 4)), ((2, 3), (3,)), ((1,), (1,)), ((0, 3), (3,))], ids=str)
def test_addition_by_the_oracle(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """spec 6.4, with broadcasting."""
    plan = AddPlan(LogAccumulator(9, 2), BYTES, LNSFormat(6, 8, False), LNSFormat(12, 8), 4, -9, -3, -20)
    a, b = words(shapes[0]), words(shapes[1], plan.b, 1)
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
    tables = nodes._delta_inputs(part, plan.output.gamma)
    made = model("Add", {"A": plan.a.dtype, "B": plan.b.dtype}, plan.output.dtype, tables, attributes)
    np.testing.assert_array_equal(run(made, A=a, B=b), cases.oracle_add(a, b, plan))


# ---------------------------------------------------------------------------------------------------------------------
# Sizes, blocks, threads, optimisation levels


@LOOP
def test_sizes_zero_and_one_and_a_dynamic_batch(plan: DotPlan) -> None:
    """One session, whatever the batch; and no depth, no channels."""
    for depth in (0, 1, 7):
        for channels in (0, 1, 5):
            w, bias = words((channels, depth), seed=1), np.arange(channels, dtype=np.int64)
            if not plan.datapath.is_linear and channels == 0:
                with pytest.raises(UnsupportedError, match="no output channels"):
                    dot_model(plan, w, bias)
                continue
            one = session(dot_model(plan, w, bias))
            for rows in (0, 1, 3):
                x = words((rows, depth))
                np.testing.assert_array_equal(one.run(None, {"X": x})[0], reference.dot(x, w, bias, plan))


@LOOP
def test_leading_axes(plan: DotPlan) -> None:
    """spec 7.2: X of one to four axes."""
    w = words((5, 6), seed=1)
    one = session(dot_model(plan, w, None))
    for lead in ((), (2,), (2, 3), (2, 0, 3), (2, 1, 3)):
        x = words((*lead, 6))
        expected = reference.dot(x.reshape(-1, 6), w, None, plan).reshape(*lead, 5)
        np.testing.assert_array_equal(one.run(None, {"X": x})[0], expected)


@LOOP
def test_an_empty_batch_of_images(plan: DotPlan) -> None:
    w, window = words((4, 3, 2, 2), seed=1), Window((2, 2))
    one = session(dot_model(plan, w, None, window))
    for images in (0, 1, 2):
        x = words((images, 3, 4, 4))
        np.testing.assert_array_equal(one.run(None, {"X": x})[0], reference.convolution(x, w, None, plan, window))


@LOOP
def test_blocks_of_rows_and_threads_change_nothing(plan: DotPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """spec 7.3: rows in one block and in many, the last not full, tables shared by threads or not."""
    x, w = words((203, 9)), words((6, 9), seed=1)
    expected = reference.dot(x, w, None, plan)
    for block in (1, 100, 1 << 17):
        monkeypatch.setattr(functions, "_BLOCK", block)
        functions.function.cache_clear()
        made = dot_model(plan, w, None)
        for threads in (1, 2):
            np.testing.assert_array_equal(session(made, threads).run(None, {"X": x})[0], expected)
    functions.function.cache_clear()


@LOOP
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_optimisation_levels(plan: DotPlan, level: Any) -> None:
    x, w = words((5, 11)), words((4, 11), seed=1)
    found = session(dot_model(plan, w, None), level=level).run(None, {"X": x})[0]
    np.testing.assert_array_equal(found, reference.dot(x, w, None, plan))


@pytest.mark.parametrize("images", [0, 1, 3])
def test_pooling_of_any_number_of_images(images: int) -> None:
    plan = PoolPlan(LogAccumulator(10, 1, 2), BYTES, BYTES, 0, 5, 0)
    window = Window((2, 2), (2, 2))
    x = words((images, 3, 4, 6))
    counts = reference.log_counts((4, 6), plan, window, False)
    expected = cases.oracle_pool(x, plan, window, True)
    np.testing.assert_array_equal(run(pool_model(plan, window, counts[:1, :1]), X=x), expected)
    attributes = {**nodes._format_attributes("", BYTES), **nodes._window_attributes(window)}
    made = model("MaxPool", {"X": BYTES.dtype}, BYTES.dtype, {}, attributes)
    np.testing.assert_array_equal(run(made, X=x), reference.max_pool(x, BYTES, window))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 2)], ids=str)
def test_encode_decode_rescale_relu_of_any_shape(shape: tuple[int, ...]) -> None:
    x = words(shape)
    values = np.asarray(nodes.decode_values(BYTES, -100)[x], dtype=np.float32)
    table = {"table": nodes.decode_values(BYTES, -100)}
    decoded = run(model("Decode", {"X": BYTES.dtype}, np.float32, table, {}), X=x)
    np.testing.assert_array_equal(decoded, values)
    attributes = nodes._output_attributes(BYTES, "zero")
    attributes.pop("underflow")
    thresholds = {"thresholds": nodes.encode_thresholds(BYTES, -100, "zero")}
    encoded = run(model("Encode", {"X": np.float32}, BYTES.dtype, thresholds, attributes), X=values)
    np.testing.assert_array_equal(encoded, np.where(x == BYTES.sign_bit, 0, x).astype(np.uint8))
    plan = RescalePlan(BYTES, LNSFormat(6, 2), 4, -3)
    attributes = {
        **nodes._format_attributes("input", plan.input),
        "input_offset": plan.input_offset,
        "multiply": 1,
        "divide": 4,
        "output_offset": plan.output_offset,
        **nodes._output_attributes(plan.output, "zero"),
    }
    np.testing.assert_array_equal(
        run(model("Rescale", {"X": BYTES.dtype}, np.uint8, {}, attributes), X=x), reference.rescale(x, plan)
    )
    made = model("Relu", {"X": BYTES.dtype}, np.uint8, {}, nodes._format_attributes("", BYTES))
    np.testing.assert_array_equal(run(made, X=x), reference.relu(x, BYTES))


# ---------------------------------------------------------------------------------------------------------------------
# Form


@LOOP
@pytest.mark.parametrize("window", [None, Window((2, 2))], ids=["Gemm", "Conv"])
def test_the_checker_and_strict_inference_pass(plan: DotPlan, window: Window | None) -> None:
    w = words((4, 3) if window is None else (4, 3, 2, 2))
    made = dot_model(plan, w, None, window, rank=w.ndim)
    onnx.checker.check_model(made, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True, data_prop=True)
    assert inferred.graph.output[0].type.tensor_type.elem_type == TensorProto.UINT8


@pytest.mark.parametrize("operator", functions.OPERATORS, ids=lambda operator: operator.name)
def test_bodies_are_the_same_at_every_call(operator: functions.Operator) -> None:
    first = functions.function(operator.name).SerializeToString(deterministic=True)
    functions.function.cache_clear()
    assert functions.function(operator.name).SerializeToString(deterministic=True) == first


@pytest.mark.parametrize("operator", functions.OPERATORS, ids=lambda operator: operator.name)
def test_loops_look_tables_up_by_the_fast_operator(operator: functions.Operator) -> None:
    """`Gather` of single elements is twenty times slower than `GatherElements` in ONNX Runtime.

    In a loop it takes whole rows, or numbers of a shape.
    """

    def walk(body: Any) -> None:
        made = {name: node for node in body for name in node.output}
        for node in body:
            if node.op_type == "Gather":
                axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
                source = made.get(node.input[0])
                assert axis == 1 or (source is not None and source.op_type in ("Shape", "Constant"))
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    walk(attribute.g.node)

    for node in functions.function(operator.name).node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                walk(attribute.g.node)
    gathers = [n for n in functions.every_node(functions.function(operator.name).node) if n.op_type == "GatherElements"]
    assert bool(gathers) == (operator.name not in ("Relu", "Clip", "Rescale", "Multiply", "Pad", "Broadcast"))


@pytest.mark.parametrize("operator", functions.OPERATORS, ids=lambda operator: operator.name)
def test_the_rank_of_what_loops_give_is_a_constant(operator: functions.Operator) -> None:
    """ONNX Runtime up to 1.20 loads a Scan whose outputs have no inferred rank, and then refuses to run it."""
    for node in functions.every_node(functions.function(operator.name).node):
        if node.op_type != "Scan":
            continue
        body = next(a.g for a in node.attribute if a.name == "body")
        made = {name: inner for inner in body.node for name in inner.output}
        for output in body.output:
            assert made[output.name].op_type == "Reshape"
            shape = made[made[output.name].input[1]]
            assert numpy_helper.to_array(shape.attribute[0].t).tolist()[-1] == -1


# ---------------------------------------------------------------------------------------------------------------------
# Tables


@pytest.mark.parametrize("overflow", ["wrap", "saturate"])
@pytest.mark.parametrize(
    ("bits", "psum_bits", "narrow"), [(24, None, True), (30, 30, True), (12, 31, False), (31, 9, False)]
)
def test_int32_exactly_where_no_sum_leaves_it(overflow: str, bits: int, psum_bits: int | None, narrow: bool) -> None:
    """A partial sum wider than the accumulator decides as much as the accumulator."""
    part = LinearAccumulator(bits, table_bits=3, lanes=2, psum_bits=psum_bits, overflow=overflow)
    plan = a_plan(part, lsb=17)
    tables = nodes.linear_tables(plan, 3, None)
    assert (tables["terms"].dtype == np.int32) == narrow
    assert tables["bias"].dtype == tables["terms"].dtype
    x, w = words((4, 40)) | 0x70, words((3, 40), seed=1) | 0x70
    np.testing.assert_array_equal(run(dot_model(plan, w, None), X=x), reference.dot(x, w, None, plan))


def test_tables_beyond_a_model_are_refused_with_what_to_do() -> None:
    """Before they are made: a table of 2^30 entries would take the memory first."""
    wide, narrow = LNSFormat(16, 1 << 14), LNSFormat(16, 1)
    linear = Datapath("d", narrow, wide, wide, LinearAccumulator(24), LogAccumulator(8))
    plan = DotPlan(linear, wide, narrow, wide, 0, 0, 0)
    with pytest.raises(UnsupportedError, match=r"terms of products need a table of \d+ entries; 16777216 are the most"):
        nodes.linear_tables(plan, 1, None)
    log = Datapath("d", narrow, wide, wide, LogAccumulator(20), LogAccumulator(8))
    with pytest.raises(UnsupportedError, match=r"codes of products need a table of \d+ entries"):
        nodes.log_tables(DotPlan(log, wide, narrow, wide, 0, 0, 0), 1, None)


@pytest.mark.parametrize(("overflow", "advice"), [("wrap", "fewer lanes or psum_bits"), ("saturate", "a larger lsb")])
def test_lanes_beyond_64_bits_say_what_helps(overflow: str, advice: str) -> None:
    """Advice that fits the accumulator: one that wraps already is not told to wrap."""
    plan = a_plan(LinearAccumulator(62, table_bits=3, lanes=8, overflow=overflow), lsb=-60)
    with pytest.raises(UnsupportedError, match=f"8 lanes of terms .* exceed 64 bits; use {advice}"):
        nodes.linear_tables(plan, 1, None)


def test_channels_far_apart_are_refused() -> None:
    plan = a_plan(LogAccumulator(8), acc_offset=np.array([0, 1 << 21]))
    with pytest.raises(UnsupportedError, match="differs by 2097152 codes between output channels"):
        nodes.log_tables(plan, 2, None)
