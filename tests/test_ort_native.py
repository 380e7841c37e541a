"""The native library's ONNX Runtime operators against the function bodies of the same files (spec 1 to 7).

The library's own counter says which of the two ran.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from lnsdeploy.datapath import Datapath, LinearAccumulator, LogAccumulator, default_adder
from lnsdeploy.delta import Exact, Table
from lnsdeploy.emulator import artifact as artifacts
from lnsdeploy.emulator import graph as g
from lnsdeploy.emulator import reference
from lnsdeploy.emulator.plan import AddPlan, DotPlan, PoolPlan, RescalePlan, Window
from lnsdeploy.errors import UnsupportedError
from lnsdeploy.exporters import functions, nodes
from lnsdeploy.formats import LNSFormat
from tests import cases, fuzz_ort, strategies
from tests.fuzz_ort import Case

Array = np.ndarray[Any, Any]
LIBRARY = fuzz_ort.library()
BYTES = LNSFormat(8, 8)
OPERATORS = [operator.name for operator in functions.OPERATORS if operator.native]


@pytest.fixture(autouse=True)
def _built() -> None:
    if LIBRARY is None:
        pytest.skip("the native library has not been built")


def library() -> Path:
    assert LIBRARY is not None
    return LIBRARY


def runs() -> int:
    return fuzz_ort.counter(library())()


def native_session(made: ModelProto) -> onnxruntime.InferenceSession:
    return fuzz_ort.session_of(made, library())


def activations(case: Case) -> dict[str, Array]:
    return dict(list(case.inputs.items())[: case.words])


def by_library(case: Case, variable: set[str] | None = None) -> Array:
    """The result by the library, which computed exactly once."""
    session = native_session(fuzz_ort.model_of(case, variable))
    before = runs()
    found = session.run(None, activations(case) if variable is None else {n: case.inputs[n] for n in variable})[0]
    assert runs() == before + 1
    return np.asarray(found)


def by_body(case: Case) -> Array:
    """The result by the function body, which the library had no part in."""
    session = fuzz_ort.session_of(fuzz_ort.model_of(case), None)
    before = runs()
    found = session.run(None, activations(case))[0]
    assert runs() == before
    return np.asarray(found)


def check(case: Case, expected: Array | None = None) -> None:
    """The library's result is the body's, or what is expected."""
    found, expected = by_library(case), by_body(case) if expected is None else expected
    assert found.dtype == expected.dtype == case.output
    np.testing.assert_array_equal(found, expected)


def words(shape: tuple[int, ...], fmt: LNSFormat = BYTES, seed: int = 0) -> Array:
    return np.asarray(np.random.default_rng(seed).integers(0, 1 << fmt.bits, shape).astype(fmt.dtype))


def every_word(fmt: LNSFormat) -> Array:
    return np.arange(1 << fmt.bits).astype(fmt.dtype)


def a_plan(accumulate: Any, fmt: LNSFormat = BYTES, **places: Any) -> DotPlan:
    path = Datapath("d", fmt, fmt, fmt, accumulate, default_adder(fmt))
    return DotPlan(path, fmt, fmt, fmt, 0, 0, **{"output_offset": fmt.max_code, **places})


LINEAR = a_plan(LinearAccumulator(20, table_bits=3), lsb=17)
LOG = a_plan(LogAccumulator(9, 1), acc_offset=100)
ADD = AddPlan(LogAccumulator(9, 2), BYTES, BYTES, BYTES, 4, -9, -3, -20)
POOL = PoolPlan(LogAccumulator(11, 1, 3, Exact()), LNSFormat(12, 16), LNSFormat(9, 16, False), 3, -5, 0)

# ---------------------------------------------------------------------------------------------------------------------
# Results


@pytest.mark.parametrize("seeds", [range(0, 10), range(10, 20)], ids=["0-9", "10-19"])
@pytest.mark.parametrize("op", OPERATORS)
def test_random_nodes_of_every_operator(op: str, seeds: range) -> None:
    """Formats, datapaths, windows and shapes at random, with axes of size 0."""
    for seed in seeds:
        check(fuzz_ort.valid(op, seed))


@settings(max_examples=25)
@given(st.data(), st.sampled_from([None, 1, 2, 3]))
def test_dot_products_of_any_datapath(data: st.DataObject, axes: int | None) -> None:
    groups = 1 if axes is None else data.draw(st.integers(1, 2))
    channels = groups * data.draw(st.integers(1, 2))
    plan = data.draw(strategies.dot_plans(channels))
    bias = data.draw(strategies.biases(plan, channels))
    if axes is None:
        depth = data.draw(st.integers(0, 12))
        x = data.draw(strategies.words(plan.activation, (3, depth)))
        w = data.draw(strategies.words(plan.weight, (channels, depth)))
        window = None
    else:
        spatial, window = data.draw(strategies.geometries(axes))
        x = words((2, groups * 2, *spatial), plan.activation)
        w = words((channels, 2, *window.kernel), plan.weight, 1)
    try:
        case = fuzz_ort.dot_case(plan, x, w, bias, window, groups)
    except UnsupportedError:
        assume(False)
        return
    expected = (
        reference.dot(x, w, bias, plan) if window is None else reference.convolution(x, w, bias, plan, window, groups)
    )
    check(case, expected)


@pytest.mark.parametrize("case", cases.DOTS, ids=lambda case: case.name)
def test_named_cases_by_the_oracle(case: cases.DotCase) -> None:
    """spec 3, 4, 5: every named edge case."""
    x, w, bias = case.arrays()
    expected = case.by_oracle() if case.expected is None else case.expected
    assert by_library(fuzz_ort.dot_case(case.plan(), x, w, bias)).tolist() == expected


@pytest.mark.parametrize("fmt", [LNSFormat(5, 2), BYTES, LNSFormat(7, 4, False), LNSFormat(9, 16)], ids=str)
@pytest.mark.parametrize("log", [False, True], ids=["linear", "log"])
def test_all_products_of_two_words(log: bool, fmt: LNSFormat) -> None:
    accumulate = LogAccumulator(9, 1) if log else LinearAccumulator(24, table_bits=1)
    places = {"acc_offset": fmt.max_code // 2} if log else {"lsb": fmt.max_code // fmt.gamma - 12}
    every = every_word(fmt)[:, None]
    check(fuzz_ort.dot_case(a_plan(accumulate, fmt, **places), every, every, None))


@pytest.mark.parametrize("fmt", [BYTES, LNSFormat(6, 8, False), LNSFormat(10, 8)], ids=str)
def test_all_sums_of_two_words(fmt: LNSFormat) -> None:
    """spec 6.4, a column and a row of every word each."""
    plan = replace(ADD, a=fmt)
    check(fuzz_ort.add_case(plan, every_word(fmt)[:, None], every_word(BYTES)))


@pytest.mark.parametrize("method", [Table(6, 2), Table(1, 1)], ids=["6", "1"])
def test_tables_of_delta_shorter_than_their_entries_are_large(method: Table) -> None:
    """spec 5.2: zero plus zero is zero, whatever Δ⁺ says for equal codes. By the reference, all operators that add."""
    part = LogAccumulator(9, 2, 5, method)
    plan, x, w = a_plan(part, acc_offset=100), words((6, 20)), words((5, 20), seed=1)
    x[:, ::2] = 0
    check(fuzz_ort.dot_case(plan, x, w, None), reference.dot(x, w, None, plan))
    add = replace(ADD, accumulator=part)
    check(fuzz_ort.add_case(add, x, x[::-1].copy()), reference.add(x, x[::-1].copy(), add))
    pool, window = PoolPlan(part, BYTES, BYTES, 0, 0, -32), Window((3,))
    images = x.reshape(2, 3, 20)
    expected = reference.sum_window(images, pool, window)
    check(fuzz_ort.average_case(pool, images, window, np.zeros(1)), expected)


@pytest.mark.parametrize("fmt", [LNSFormat(2, 1), BYTES, LNSFormat(5, 3, False), LNSFormat(16, 1024)], ids=str)
def test_every_word_through_the_operations_on_single_words(fmt: LNSFormat) -> None:
    """spec 2.5, 6.1, 6.3, minus zero too."""
    every = every_word(fmt)
    check(fuzz_ort.decode_case(fmt, -7, every))
    check(fuzz_ort.relu_case(fmt, every))
    low = -fmt.max_code // 2 if fmt.signed else 1
    check(fuzz_ort.clip_case(fmt, low, fmt.max_code * 2 // 3, every))
    for gamma in {fmt.gamma, 4 * fmt.gamma, 1}:
        for made in (LNSFormat(8, gamma), LNSFormat(11, gamma, False)):
            for rule in ("zero", "min"):
                check(fuzz_ort.rescale_case(RescalePlan(fmt, made, 5, -9, rule), every))


@pytest.mark.parametrize("fmt", [LNSFormat(3, 1), BYTES, LNSFormat(5, 3, False), LNSFormat(12, 64)], ids=str)
@pytest.mark.parametrize("underflow", ["zero", "min"])
def test_numbers_beside_every_threshold_are_encoded(fmt: LNSFormat, underflow: str) -> None:
    """spec 2.1, 2.4: each threshold and its neighbours, zeros, subnormals, infinities and NaN."""
    bounds = nodes.encode_thresholds(fmt, -40, underflow)
    near = [np.nextafter(bounds, np.float32(-1)), bounds, np.nextafter(bounds, np.float32(np.inf))]
    special = np.array([0.0, 1e-45, 1e-40, 3.4e38, np.inf, np.nan], dtype=np.float32)
    x = np.concatenate([*near, special])
    check(fuzz_ort.encode_case(fmt, -40, underflow, np.concatenate([x, -x])))


@pytest.mark.parametrize("fmt", [LNSFormat(4, 1), LNSFormat(9, 8, False)], ids=str)
def test_the_larger_of_all_pairs(fmt: LNSFormat) -> None:
    """spec 6.1: windows of two words."""
    every = every_word(fmt)
    pairs = np.stack(np.meshgrid(every, every), axis=-1).reshape(1, -1, 2)
    check(fuzz_ort.max_pool_case(fmt, pairs, Window((2,))))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((), ()), ((), (3,)), ((2, 1, 3), (4, 1)), ((2, 3, 4, 5), (3, 1, 5)), ((0, 3), (3,)), ((2, 0), (1, 1)),
        ((2, 1, 2, 1, 2, 1, 2, 1), (1, 2, 1, 2, 1, 2, 1, 2)), ((1, 1, 1, 1, 2, 1, 1, 3, 1, 2), (2,)),
    ],
    ids=str,
)  # fmt: skip
def test_broadcasting(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    x, y = words(a), words(b, seed=1)
    check(fuzz_ort.add_case(ADD, x, y), reference.add(x, y, ADD))
    check(fuzz_ort.add_case(ADD, y, x), reference.add(y, x, ADD))


@pytest.mark.parametrize("plan", [LINEAR, LOG], ids=["linear", "log"])
def test_sizes_of_zero_and_leading_axes(plan: DotPlan) -> None:
    for lead in ((), (0,), (2,), (2, 0, 3), (2, 1, 3)):
        for depth, channels in ((6, 5), (1, 1), (0, 2)):
            x, w = words((*lead, depth)), words((channels, depth), seed=1)
            expected = reference.dot(x.reshape(int(np.prod(lead)), depth), w, None, plan)
            check(fuzz_ort.dot_case(plan, x, w, None), expected.reshape(*lead, channels))
    if plan.datapath.is_linear:
        check(fuzz_ort.dot_case(plan, words((3, 4)), words((0, 4)), None))
    for images in (0, 1, 2):
        x, w, window = words((images, 3, 4, 4)), words((4, 3, 2, 2), seed=1), Window((2, 2))
        check(fuzz_ort.dot_case(plan, x, w, None, window), reference.convolution(x, w, None, plan, window))


@pytest.mark.parametrize("plan", [LINEAR, LOG], ids=["linear", "log"])
def test_products_of_two_tensors(plan: DotPlan) -> None:
    """spec 7.2: matrices at every index of the axes before, also of no axes, and of sizes of zero."""
    for lead in ((), (3,), (0,), (2, 2), (1, 0, 3)):
        for rows, depth, columns in ((4, 6, 5), (1, 1, 1), (3, 0, 2), (0, 2, 2)):
            a, b = words((*lead, rows, depth)), words((*lead, depth, columns), seed=1)
            check(fuzz_ort.matmul_case(plan, a, b), reference.matmul(a, b, plan))


@pytest.mark.parametrize(
    ("a", "b"), [((2, 3, 4), (2, 5, 6)), ((2, 3, 4), (3, 4, 6)), ((3, 4), (2, 4, 6)), ((4,), (4,))], ids=str
)
def test_products_of_tensors_that_do_not_fit(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    case = fuzz_ort.matmul_case(LINEAR, words((3, 4)), words((4, 6)))
    case = replace(case, inputs={**case.inputs, "A": words(a), "B": words(b)})
    with pytest.raises(Exception, match=r"LinearMatMul 'node': A has shape .* B .*, not \[..., M, K\] and"):
        by_library(case)


def test_a_convolution_of_no_input_channels() -> None:
    window = Window((2, 2))
    x, w = words((2, 0, 4, 4)), words((3, 0, 2, 2))
    found = by_library(fuzz_ort.dot_case(LINEAR, x, w, np.array([1 << 10, 0, -5]), window))
    single = by_library(fuzz_ort.dot_case(LINEAR, words((1, 0)), words((3, 0)), np.array([1 << 10, 0, -5])))
    np.testing.assert_array_equal(found, np.broadcast_to(single.reshape(1, 3, 1, 1), (2, 3, 3, 3)))


# ---------------------------------------------------------------------------------------------------------------------
# Nets


def typed(made: ModelProto) -> ModelProto:
    """With the element types of all tensors, which ONNX Runtime does not infer from attributes."""
    stated = {value.name for value in (*made.graph.value_info, *made.graph.output)}
    if any(name not in stated for node in made.graph.node for name in node.output):
        made = onnx.shape_inference.infer_shapes(made)
        for value in made.graph.value_info:
            value.type.tensor_type.ClearField("shape")
    return made


def a_net() -> ModelProto:
    wide = LNSFormat(10, 8)
    first = replace(LINEAR, output=wide)
    second = replace(LOG, activation=wide)
    second = replace(second, datapath=replace(LOG.datapath, activation=wide))
    first = replace(first, datapath=replace(LINEAR.datapath, output=wide))
    tensors = {
        "xw": g.TensorInfo(BYTES, -100),
        "a": g.TensorInfo(wide, first.output_offset),
        "b": g.TensorInfo(wide, first.output_offset),
        "yw": g.TensorInfo(BYTES, second.output_offset),
    }
    graph = g.LNSGraph(
        input="x",
        input_shape=(0, 6),
        encoded="xw",
        underflow="zero",
        nodes=(
            g.Gemm("fc1", ("xw",), "a", words((9, 6)), None, first),
            g.Relu("relu", ("a",), "b", wide),
            g.Gemm("fc2", ("b",), "yw", words((4, 9), seed=1), None, second),
        ),
        words_output="yw",
        output="y",
        output_shape=(0, 4),
        tensors=tensors,
        datapaths={plan.datapath.fingerprint: plan.datapath for plan in (first, second)},
    )
    return typed(onnx.load_model_from_string(artifacts.build(graph, {}).data))


def test_an_exported_net_with_words_of_both_widths() -> None:
    made = a_net()
    for name, kind in (("xw", TensorProto.UINT8), ("a", TensorProto.UINT16), ("yw", TensorProto.UINT8)):
        made.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    x = np.exp2(np.random.default_rng(0).normal(-6, 3, (7, 6))).astype(np.float32)
    expected = fuzz_ort.session_of(made, None).run(None, {"x": x})
    session, before = native_session(made), runs()
    for found, wanted in zip(session.run(None, {"x": x}), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert runs() == before + 5


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
def test_the_library_is_used_at_every_optimisation_level(level: str) -> None:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library()))
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    made = a_net().SerializeToString()
    session, before = onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"]), runs()
    session.run(None, {"x": np.ones((2, 6), dtype=np.float32)})
    assert runs() == before + 5


def test_types_that_the_model_does_not_state() -> None:
    """What `typed` is for: the error names the node, and is ONNX Runtime's."""
    made = a_net()
    kept = [value for value in made.graph.value_info if value.name != "xw"]
    del made.graph.value_info[:]
    made.graph.value_info.extend(kept)
    with pytest.raises(Exception, match=r"Encode.*\(xw\) type inference failed"):
        native_session(made)


def test_a_node_in_a_branch() -> None:
    inner = fuzz_ort.dot_case(LINEAR, words((2, 4)), words((3, 4)), None)
    made = fuzz_ort.model_of(inner)
    branches = [
        helper.make_graph(
            [fuzz_ort.node_of(case)], name, [], [helper.make_tensor_value_info("Y", TensorProto.UINT8, None)]
        )
        for name, case in (("then", inner), ("other", replace(inner, attributes={**inner.attributes, "underflow": 1})))
    ]
    node = helper.make_node("If", ["C"], ["Y"], then_branch=branches[0], else_branch=branches[1])
    made.graph.node[0].CopyFrom(node)
    made.graph.input.append(helper.make_tensor_value_info("C", TensorProto.BOOL, []))
    x, session, plain = inner.inputs["X"] & 1, native_session(made), fuzz_ort.session_of(made, None)
    for condition in (True, False):
        feed, before = {"X": x, "C": np.array(condition)}, runs()
        found = session.run(None, feed)[0]
        assert runs() == before + 1
        np.testing.assert_array_equal(found, plain.run(None, feed)[0])


def test_sessions_share_the_library_and_end_in_any_order() -> None:
    case = fuzz_ort.relu_case(BYTES, every_word(BYTES))
    expected = by_body(case)
    made = fuzz_ort.model_of(case)
    first, second = native_session(made), native_session(made)
    del first
    third = native_session(made)
    for session in (second, third):
        np.testing.assert_array_equal(session.run(None, {"X": case.inputs["X"]})[0], expected)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs that are not constants, threads


@pytest.mark.parametrize("op", ["LinearGemm", "LinearConv", "LogGemm", "LogConv"])
def test_weights_and_tables_that_are_not_constants(op: str) -> None:
    for seed in range(4):
        case = fuzz_ort.valid(op, seed)
        expected = by_body(case)
        for variable in (set(case.inputs), {"X", "W"}, {"W"}, {"code_shift"}, set()):
            np.testing.assert_array_equal(by_library(case, variable), expected)


@pytest.mark.parametrize("plan", [LINEAR, LOG], ids=["linear", "log"])
def test_weights_that_change_from_run_to_run(plan: DotPlan) -> None:
    x = words((5, 8))
    case = fuzz_ort.dot_case(plan, x, words((3, 8)), None)
    session = native_session(fuzz_ort.model_of(case, {"X", "W"}))
    for seed in range(5):
        w = words((3, 8), seed=seed)
        np.testing.assert_array_equal(session.run(None, {"X": x, "W": w})[0], reference.dot(x, w, None, plan))
    # the memory is the same, the content is not
    w = words((3, 8), seed=9)
    for _ in range(2):
        w ^= 0x35
        np.testing.assert_array_equal(session.run(None, {"X": x, "W": w})[0], reference.dot(x, w, None, plan))


def test_initializers_that_inputs_override_are_not_constants() -> None:
    x, w = words((5, 8)), words((3, 8))
    made = fuzz_ort.model_of(fuzz_ort.dot_case(LINEAR, x, w, None))
    made.graph.input.append(helper.make_tensor_value_info("W", TensorProto.UINT8, None))
    session = native_session(made)
    for given_w in (w, words((3, 8), seed=1), w):
        found = session.run(None, {"X": x, "W": given_w})[0]
        np.testing.assert_array_equal(found, reference.dot(x, given_w, None, LINEAR))
    np.testing.assert_array_equal(session.run(None, {"X": x})[0], reference.dot(x, w, None, LINEAR))


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "changing"])
@pytest.mark.parametrize("plan", [LINEAR, LOG], ids=["linear", "log"])
def test_many_runs_of_one_session_at_once(plan: DotPlan, constant: bool) -> None:
    w = words((16, 24))
    case = fuzz_ort.dot_case(plan, words((1, 24)), w, None)
    session = native_session(fuzz_ort.model_of(case, {"X"} if constant else {"X", "W"}))
    tasks = []
    for seed in range(24):
        x, own = words((1 + seed, 24), seed=seed), w if constant else words((16, 24), seed=seed)
        tasks.append(({"X": x} if constant else {"X": x, "W": own}, reference.dot(x, own, None, plan)))
    before = runs()
    with ThreadPoolExecutor(4) as pool:
        for found, (_, expected) in zip(
            pool.map(lambda t: session.run(None, t[0])[0], tasks * 3), tasks * 3, strict=True
        ):
            np.testing.assert_array_equal(found, expected)
    assert runs() == before + 3 * len(tasks)


@pytest.mark.parametrize("threads", ["1", "2", "7", "0", "-1", "x", "", "99999999999999999999"])
def test_any_number_of_threads(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """spec 7.3; what is no positive integer counts as not given."""
    monkeypatch.setenv("LNSDEPLOY_THREADS", threads)
    x, w = words((33, 40)), words((17, 40), seed=1)
    for plan in (LINEAR, LOG):
        check(fuzz_ort.dot_case(plan, x, w, None), reference.dot(x, w, None, plan))


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit


def dot(**changes: Any) -> Case:
    made = fuzz_ort.dot_case(LINEAR, words((2, 4)), words((3, 4)), None)
    return replace(made, attributes={**made.attributes, **changes})


def conv(**changes: Any) -> Case:
    made = fuzz_ort.dot_case(LINEAR, words((1, 4, 5, 5)), words((6, 2, 3, 3)), None, Window((3, 3)), 2)
    return replace(made, attributes={**made.attributes, **changes})


def pool(**changes: Any) -> Case:
    made = fuzz_ort.max_pool_case(BYTES, words((1, 2, 5, 5)), Window((3, 3)))
    return replace(made, attributes={**made.attributes, **changes})


def tables(case: Case, **arrays: Array) -> Case:
    return replace(case, inputs={**case.inputs, **arrays})


LOG_CASE = fuzz_ort.dot_case(LOG, words((2, 4)), words((3, 4)), None)
ADD_CASE = fuzz_ort.add_case(ADD, words((2, 3)), words((3,)))
AVERAGE = fuzz_ort.average_case(POOL, words((1, 2, 4, 4), POOL.input), Window((2, 2)), np.zeros((3, 3)))
RESCALE = fuzz_ort.rescale_case(RescalePlan(BYTES, LNSFormat(6, 2), 4, -3), words((3,)))
ENCODE = fuzz_ort.encode_case(BYTES, 0, "zero", np.ones(3, dtype=np.float32))
WIDE = np.zeros((2, 4), dtype=np.uint16)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (dot(lanes=0), "LinearGemm.*attribute lanes is 0, not 1 to 1024"),
        (dot(lanes=1 << 40), "attribute lanes is 1099511627776, not 1 to 1024"),
        (dot(acc_bits=63), "attribute acc_bits is 63, not 2 to 62"),
        (dot(output_type=4), r"attribute output_type is 4, but words of 8 bits are uint8 \(2\)"),
        (dot(output_bits=9), r"attribute output_type is 2, but words of 9 bits are uint16 \(4\)"),
        (dot(activation_widen=2), r"terms has shape \[1, 255\], not \[B, 382\]"),
        (dot(activation_widen=1 << 62), "attribute activation_widen is"),
        (dot(saturate=2), "attribute saturate is 2, not 0 to 1"),
        (dot(saturate=1.5), "attribute saturate is missing or not an integer"),
        (tables(dot(), X=words((2, 5))), r"X has shape \[2, 5\], not \[..., 4\]"),
        (tables(dot(), X=words(())), r"X has shape \[\], not \[..., 4\]"),
        (tables(dot(), X=WIDE), "X has elements of uint16, not uint8"),
        (tables(dot(), W=WIDE), "W has elements of uint16, not uint8"),
        (tables(dot(), W=words((3, 4, 1))), r"W has shape \[3, 4, 1\], not \[N, K\]"),
        (tables(dot(), W=words((2, 4))), r"code_shift has shape \[3\], not \[2\]"),
        (tables(dot(), bias=np.zeros(2, dtype=np.int32)), r"bias has shape \[2\], not \[3\]"),
        (tables(dot(), terms=np.zeros(255, dtype=np.int32)), r"terms has shape \[255\], not \[B, 255\]"),
        (tables(dot(), terms=np.zeros((0, 255), dtype=np.int32)), "terms has shape"),
        (tables(dot(), constants=np.ones(2, dtype=np.int64)), r"constants has shape \[2\], not \[1\]"),
        (tables(dot(), thresholds=np.ones((1, 2), dtype=np.int64)), "thresholds has shape"),
        (tables(dot(), code_shift=np.full(3, -(1 << 63))), "code_shift has an entry"),
        (conv(group=3), "its output channels are not those of|which does not fit 3 groups"),
        (conv(group=4), "its output channels are not those of 4 groups"),
        (conv(group=0), "attribute group is 0"),
        (conv(kernel_shape=[1, 3, 2]), r"W has shape \[6, 2, 3, 3\], but kernel_shape is \[1, 3, 2\]"),
        (conv(strides=[1, 1]), "attribute strides has 2 integers, not 3"),
        (conv(strides=[1, 1, 0]), "attribute strides is 0"),
        (conv(pads=[0, 0, -1, 0, 0, 0]), "attribute pads is -1"),
        (conv(pads=[0, 0, 1 << 62, 0, 0, 0]), "attribute pads is 4611686018427387904"),
        (conv(pads=[0, 0, 0, 1, 0, 0]), "the window covers an axis that X"),
        (conv(dilations=[1, 4, 1]), "LinearConv"),
        (tables(conv(), X=words((1, 3, 5, 5))), "which does not fit 2 groups"),
        (tables(conv(), X=words((1, 4, 5))), "not the same axes|covers an axis"),
        (tables(conv(), X=words((4, 5))), r"X has shape \[4, 5\], not \[B, C, 1 to 3 axes\]"),
        (tables(conv(), X=words((1, 4, 1, 1, 5, 5))), "not .B, C, 1 to 3 axes"),
        (tables(LOG_CASE, bias=np.full(3, 1 << 20)), "LogGemm.*bias has an entry 1048576, not 0 to 1023"),
        (tables(LOG_CASE, bias=np.full(3, -1)), "bias has an entry -1"),
        (tables(LOG_CASE, delta_plus=np.zeros((2, 2), dtype=np.int32)), "delta_plus has shape"),
        (tables(LOG_CASE, entry_shift=np.zeros(1, dtype=np.int64)), "entry_shift has shape"),
        (replace(LOG_CASE, attributes={**LOG_CASE.attributes, "acc_bits": 27}), "acc_bits is 27, not 1 to 26"),
        (replace(LOG_CASE, attributes={**LOG_CASE.attributes, "guard_bits": 9}), "guard_bits is 9, not 0 to 8"),
        (tables(ADD_CASE, B=words((2,))), r"A of shape \[2, 3\] and B of shape \[2\] do not broadcast"),
        (tables(ADD_CASE, B=words((0,))), "do not broadcast"),
        (tables(ADD_CASE, A=words((2, 1) * 5 + (2,)), B=words((1, 2) * 5 + (1,))), "more axes than 8"),
        (tables(ADD_CASE, delta_minus=np.zeros((), dtype=np.int32)), "delta_minus has shape"),
        (tables(AVERAGE, log_counts=np.zeros((3, 3), dtype=np.int64)), "AveragePool.*log_counts has shape"),
        (tables(AVERAGE, log_counts=np.zeros((1, 2, 3), dtype=np.int64)), r"not \[1, 3, 3\] or ones"),
        (tables(AVERAGE, log_counts=np.full((1, 1, 1), -1)), "log_counts has an entry -1"),
        (tables(AVERAGE, X=words((1, 2, 1, 4), POOL.input)), "AveragePool"),
        (pool(pads=[0, 3, 0, 0, 0, 0]), "MaxPool.*holds padding only"),
        (pool(kernel_shape=[1, 7, 1]), "MaxPool"),
        (pool(bits=9), "X has elements of uint8, not uint16"),
        (pool(signed=-1), "attribute signed is -1, not 0 to 1"),
        (replace(RESCALE, attributes={**RESCALE.attributes, "multiply": 2}), "multiply and divide are 2 and 4"),
        (replace(RESCALE, attributes={**RESCALE.attributes, "divide": 0}), "Rescale.*attribute divide is 0"),
        (fuzz_ort.clip_case(BYTES, 3, 2, words((3,))), "Clip.*attribute high is 2, not 3 to 127"),
        (fuzz_ort.clip_case(LNSFormat(8, 8, False), -1, 2, words((3,))), "attribute low is -1, not 0 to 255"),
        (tables(ENCODE, thresholds=ENCODE.inputs["thresholds"][1:]), r"thresholds has shape \[126\], not \[127\]"),
        (tables(fuzz_ort.decode_case(BYTES, 0, words((3,))), table=np.zeros(255, np.float32)), "Decode.*255 entries"),
        (tables(fuzz_ort.decode_case(BYTES, 0, words((3,))), table=np.zeros(512, np.float32)), "512 entries"),
        (pool(bits=17), "attribute bits is 17, not 2 to 16"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(case: Case, message: str) -> None:
    """At the latest when it runs, whether or not tables are constants; by a message that names the operator."""
    for variable in (None, set(case.inputs)):
        with pytest.raises(Exception, match=rf"lnsdeploy\.{case.op} 'node': ") as caught:
            by_library(case, variable)
        assert caught.match(message)


def test_constants_that_do_not_fit_are_refused_when_the_model_is_loaded() -> None:
    """So they are looked at, and weights packed, once a session."""
    for case in (
        tables(dot(), W=words((2, 4))),
        tables(LOG_CASE, bias=np.full(3, -1)),
        tables(conv(), W=words((6, 2))),
    ):
        with pytest.raises(Exception, match=rf"lnsdeploy\.{case.op} 'node': "):
            native_session(fuzz_ort.model_of(case))
        native_session(fuzz_ort.model_of(case, set(case.inputs)))


@pytest.mark.parametrize("op", OPERATORS)
def test_attributes_that_are_missing(op: str) -> None:
    case = fuzz_ort.valid(op, 0)
    for name in case.attributes:
        fewer = {key: value for key, value in case.attributes.items() if key != name}
        with pytest.raises(Exception, match=rf"lnsdeploy\.{op} 'node': attribute {name} is missing"):
            by_library(replace(case, attributes=fewer))


@pytest.mark.parametrize("op", OPERATORS)
def test_inputs_that_are_missing_and_other_types(op: str) -> None:
    """ONNX Runtime's own checks, which rest on what the library declares."""
    case = fuzz_ort.valid(op, 0)
    for name in case.inputs:
        for how in ("empty", "removed"):
            made = fuzz_ort.model_of(case)
            index = list(case.inputs).index(name)
            if how == "empty":
                made.graph.node[0].input[index] = ""
            else:
                del made.graph.node[0].input[index]
            with pytest.raises(Exception, match=op):
                native_session(made).run(None, activations(case))
        with pytest.raises(Exception, match=op):
            by_library(tables(case, **{name: case.inputs[name].astype(np.float64)}))


@pytest.mark.parametrize("op", OPERATORS)
def test_an_output_of_another_type(op: str) -> None:
    case = fuzz_ort.valid(op, 0)
    for dtype in (np.uint8, np.uint16, np.float32, np.int64):
        if np.dtype(dtype) != np.dtype(case.output):
            with pytest.raises(Exception, match=r"output arg \(Y\)|elements of .* for Y"):
                by_library(replace(case, output=dtype))


def test_an_output_that_nobody_asks_for() -> None:
    made = fuzz_ort.model_of(dot())
    made.graph.node[0].output[0] = ""
    made.graph.node.append(helper.make_node("Identity", ["X"], ["Y"]))
    with pytest.raises(Exception, match=r"lnsdeploy\.LinearGemm 'node': Y is missing"):
        native_session(made).run(None, {"X": words((2, 4))})


def test_an_old_runtime_is_refused_with_its_version() -> None:
    """What the library asks of ONNX Runtime when it is registered, played by this test."""
    told: list[tuple[int, bytes]] = []
    asked: list[int] = []
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(
        lambda code, message: told.append((code, message)) or 77
    )
    table = (ctypes.c_void_p * 200)()
    table[0] = ctypes.cast(create, ctypes.c_void_p).value

    def get_api(version: int) -> int | None:
        asked.append(version)
        return ctypes.addressof(table) if version <= 16 else None

    class Base(ctypes.Structure):
        _fields_ = (
            ("get_api", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)),
            ("version", ctypes.CFUNCTYPE(ctypes.c_char_p)),
        )

    version = ctypes.create_string_buffer(b"1.16.3")
    base = Base(
        ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(get_api),
        ctypes.cast(ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(version)), Base._fields_[1][1]),
    )
    register = ctypes.CDLL(str(library())).RegisterCustomOps
    register.restype = ctypes.c_void_p
    register.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, ctypes.addressof(base)) == 77
    assert asked == [17, 1]
    assert told == [(9, b"lnsdeploy: ONNX Runtime 1.16.3 is too old for these operators: use 1.18 or later")]


@pytest.mark.parametrize("seed", [0, 1 << 20])
def test_malformed_models_end_no_process(seed: int) -> None:
    """Some hundred of what `tests/fuzz_ort.py` makes by the thousand."""
    summary = fuzz_ort.fuzz(300, seed, jobs=1)
    assert summary.crashes == []
    assert sum(summary.outcomes.values()) == 300
    assert min(summary.outcomes.values()) > 30


def test_the_fuzzer_finds_crashes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A child that dies is reported with its seed, and the seeds after it are run."""
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(fuzz_ort.__file__).parent)!r})\n"
        "import fuzz_ort\n"
        "run_one = fuzz_ort.run_one\n"
        "fuzz_ort.run_one = lambda seed, path: os.abort() if seed == 7 else run_one(seed, path)\n"
        "sys.exit(fuzz_ort.main())\n"
    )
    monkeypatch.setattr(fuzz_ort, "_SCRIPT", script)
    summary = fuzz_ort.fuzz(10, 0, jobs=1)
    assert [(crash["seed"], crash["status"]) for crash in summary.crashes] == [(7, -6)]
    assert sum(summary.outcomes.values()) == 9
