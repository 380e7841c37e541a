"""The torch operators and nets of them, against the reference (spec 1 to 7)."""

from __future__ import annotations

import copy
import gc
import io
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from lnsdeploy.datapath import Datapath, LinearAccumulator, LogAccumulator, default_adder, load_datapath
from lnsdeploy.delta import Exact
from lnsdeploy.emulator import graph as g
from lnsdeploy.emulator import native, operands, ops, reference
from lnsdeploy.emulator.plan import AddPlan, DotPlan, PoolPlan, RescalePlan, Window
from lnsdeploy.errors import BadTypeError, BadValueError, LNSError, MissingDependencyError, UnsupportedError
from lnsdeploy.exporters import functions, nodes
from lnsdeploy.exporters.lower import LowerOptions, lower
from lnsdeploy.formats import LNSFormat, decode, encode
from tests import cases, fuzz_ort, nets, strategies

Array = np.ndarray[Any, Any]
BYTES = LNSFormat(8, 8)
NAMES = {
    re.sub(r"(?<!^)(?=[A-Z])", "_", operator.name).lower(): operator
    for operator in functions.OPERATORS
    if operator.torch
}

needs_library = pytest.mark.skipif(native.unavailable() is not None, reason="the native library has not been built")


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    ops.clear_cache()
    yield
    ops.clear_cache()


# ---------------------------------------------------------------------------------------------------------------------
# Operators called by plans


def tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))


def run_case(case: fuzz_ort.Case) -> Tensor:
    """A node of an ONNX file as a call."""
    name = next(n for n, operator in NAMES.items() if operator.name == case.op)
    made: Tensor = getattr(torch.ops.lnsdeploy, name)(*(tensor(v) for v in case.inputs.values()), **case.attributes)
    return made


def layer(
    plan: DotPlan, w: Array, bias: Array | None = None, window: Window | None = None, groups: int = 1
) -> tuple[str, list[Tensor], dict[str, Any]]:
    """A product's or convolution's operator, weights and tables, and attributes."""
    linear = plan.datapath.is_linear
    tables = (operands.linear_tables if linear else operands.log_tables)(plan, w.shape[0], bias)
    attributes = ops._dot_attributes(plan)
    if window is not None:
        attributes |= {**ops._window_attributes(window), "group": groups}
    name = f"{'linear' if linear else 'log'}_{'gemm' if window is None else 'conv'}"
    return name, [tensor(w), *(tensor(t) for t in tables.values())], attributes


def product(plan: DotPlan, x: Any, *rest: Any) -> Tensor:
    name, tensors, attributes = layer(plan, *rest)
    x = x if isinstance(x, Tensor) else tensor(x)
    made: Tensor = getattr(torch.ops.lnsdeploy, name)(x, *tensors, **attributes)
    return made


def check(found: Tensor, expected: Array) -> None:
    assert found.is_contiguous()
    assert found.numpy().dtype == expected.dtype
    np.testing.assert_array_equal(found.numpy(), expected)


def words(shape: tuple[int, ...], fmt: LNSFormat = BYTES, seed: int = 0) -> Array:
    return np.asarray(np.random.default_rng(seed).integers(0, 1 << fmt.bits, shape).astype(fmt.dtype))


def every_word(fmt: LNSFormat) -> Array:
    return np.arange(1 << fmt.bits).astype(fmt.dtype)


def a_plan(accumulate: Any, fmt: LNSFormat = BYTES, **places: Any) -> DotPlan:
    path = Datapath("d", fmt, fmt, fmt, accumulate, default_adder(fmt))
    return DotPlan(path, fmt, fmt, fmt, 0, 0, **{"output_offset": fmt.max_code, **places})


WIDE = LNSFormat(12, 64)
LINEAR = a_plan(LinearAccumulator(20, table_bits=3), lsb=17)
LOG = a_plan(LogAccumulator(9, 1), acc_offset=100)
WIDE_LINEAR = a_plan(LinearAccumulator(30, table_bits=6), WIDE, lsb=20)
WIDE_LOG = a_plan(LogAccumulator(40, 3, 2), WIDE, acc_offset=500)
PLANS = {"linear": LINEAR, "log": LOG, "wide-linear": WIDE_LINEAR, "wide-log": WIDE_LOG}
ADD = AddPlan(LogAccumulator(9, 2), BYTES, BYTES, BYTES, 4, -9, -3, -20)
POOL = PoolPlan(LogAccumulator(11, 1, 3, Exact()), WIDE, LNSFormat(9, 64, False), 3, -5, 0)

every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_the_onnx_operators(name: str) -> None:
    operator, schema = NAMES[name], getattr(torch.ops.lnsdeploy, name).default._schema
    tensors = [a.name for a in schema.arguments if not a.kwarg_only]
    attributes = {a.name: str(a.type) for a in schema.arguments if a.kwarg_only}
    assert tensors == [v.name.lower() for v in operator.inputs]
    assert attributes == {v.name: "List[int]" if v.type.startswith("ints") else "int" for v in operator.attributes}
    assert list(attributes) == [v.name for v in operator.attributes]
    assert [str(r.type) for r in schema.returns] == ["Tensor"]


def test_every_operator_is_there() -> None:
    assert list(NAMES) == list(ops._OPERATORS)


@needs_library
@pytest.mark.parametrize("name", NAMES)
def test_calls_are_what_nodes_of_a_file_are(name: str) -> None:
    """By the function bodies, with axes of size 0 and every other rank."""
    for seed in range(4):
        case = fuzz_ort.valid(NAMES[name].name, seed)
        session = fuzz_ort.session_of(fuzz_ort.model_of(case), None)
        check(run_case(case), session.run(None, dict(list(case.inputs.items())[: case.words]))[0])


@needs_library
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [1, 3])
def test_torch_finds_the_operators_in_order(name: str, seed: int) -> None:
    case = fuzz_ort.valid(NAMES[name].name, seed)
    tensors = tuple(tensor(v) for v in case.inputs.values())
    torch.library.opcheck(getattr(torch.ops.lnsdeploy, name).default, tensors, dict(case.attributes))


@needs_library
@every_plan
def test_torch_finds_operators_on_other_strides_in_order(plan: DotPlan) -> None:
    name, tensors, attributes = layer(plan, words((5, 6), plan.weight))
    x = tensor(words((6, 4), plan.activation)).t()
    torch.library.opcheck(getattr(torch.ops.lnsdeploy, name).default, (x, *tensors), attributes)


# ---------------------------------------------------------------------------------------------------------------------
# Results


@needs_library
@pytest.mark.parametrize("case", cases.DOTS, ids=lambda case: case.name)
def test_named_dot_products(case: cases.DotCase) -> None:
    """spec 3, 4, 5: every named edge case, also as a convolution by a kernel of one position."""
    x, w, bias = case.arrays()
    plan = case.plan()
    try:
        layer(plan, w, bias)
    except UnsupportedError as error:
        pytest.skip(str(error))
    expected = reference.dot(x, w, bias, plan)
    check(product(plan, x, w, bias), expected)
    check(product(plan, x[:, :, None], w[:, :, None], bias, Window((1,))), expected[:, :, None])


@needs_library
@settings(max_examples=60)
@given(st.data(), st.sampled_from([None, 1, 2, 3]))
def test_dot_products_of_any_datapath(data: st.DataObject, axes: int | None) -> None:
    groups = 1 if axes is None else data.draw(st.integers(1, 2))
    channels = groups * data.draw(st.integers(1, 2))
    plan = data.draw(strategies.dot_plans(channels))
    bias = data.draw(strategies.biases(plan, channels))
    try:
        if axes is None:
            depth = data.draw(st.integers(0, 12))
            x = data.draw(strategies.words(plan.activation, (3, depth)))
            w = data.draw(strategies.words(plan.weight, (channels, depth)))
            check(product(plan, x, w, bias), reference.dot(x, w, bias, plan))
        else:
            spatial, window = data.draw(strategies.geometries(axes))
            x = words((2, groups * 2, *spatial), plan.activation)
            w = words((channels, 2, *window.kernel), plan.weight, 1)
            expected = reference.convolution(x, w, bias, plan, window, groups)
            check(product(plan, x, w, bias, window, groups), expected)
    except UnsupportedError:
        assume(False)


@needs_library
@settings(max_examples=40)
@given(st.data())
def test_sums_and_averages_of_any_adder(data: st.DataObject) -> None:
    """spec 6.4, 6.5"""
    plan = data.draw(strategies.add_plans())
    a, b = data.draw(strategies.words(plan.a, (3, 4))), data.draw(strategies.words(plan.b, (4,)))
    deltas = [tensor(t) for t in operands.delta_tables(plan.accumulator, plan.output.gamma).values()]
    check(run_add(plan, tensor(a), tensor(b), deltas), reference.add(a, b, plan))
    pool = data.draw(strategies.pool_plans())
    spatial, window = data.draw(strategies.geometries(data.draw(st.integers(1, 3)), small_pads=True))
    x, include = words((2, 2, *spatial), pool.input), data.draw(st.booleans())
    check(run_average(pool, tensor(x), window, include), reference.average_pool(x, pool, window, include))
    check(run_average(pool, tensor(x), window, None), reference.sum_window(x, pool, window))


def run_add(plan: AddPlan, a: Tensor, b: Tensor, deltas: list[Tensor] | None = None) -> Tensor:
    if deltas is None:
        deltas = [tensor(t) for t in operands.delta_tables(plan.accumulator, plan.output.gamma).values()]
    made: Tensor = torch.ops.lnsdeploy.add(
        a,
        b,
        *deltas,
        **ops._format_attributes("a_", plan.a),
        a_shift=plan.a_offset - plan.acc_offset,
        **ops._format_attributes("b_", plan.b),
        b_shift=plan.b_offset - plan.acc_offset,
        **ops._adder_attributes(plan.accumulator),
        code_shift=plan.acc_offset - plan.output_offset,
        **ops._output_attributes(plan.output, plan.underflow),
    )
    return made


def run_average(plan: PoolPlan, x: Tensor, window: Window, include: bool | None) -> Tensor:
    """An average, or the sum without `include`."""
    counts = np.zeros((1,), dtype=np.int64)
    if include is not None:
        counts = reference.log_counts(tuple(x.shape[2:]), plan, window, include)
    made: Tensor = torch.ops.lnsdeploy.average_pool(
        x,
        *(tensor(t) for t in operands.delta_tables(plan.accumulator, plan.input.gamma).values()),
        tensor(counts.reshape((1,) * (3 - counts.ndim) + counts.shape)),
        **ops._format_attributes("input_", plan.input),
        input_shift=plan.input_offset - plan.acc_offset,
        lanes=plan.accumulator.lanes,
        **ops._adder_attributes(plan.accumulator),
        code_shift=plan.acc_offset - plan.output_offset,
        **ops._output_attributes(plan.output, plan.underflow),
        **ops._window_attributes(window),
    )
    return made


@needs_library
@pytest.mark.parametrize("fmt", [LNSFormat(2, 1), BYTES, LNSFormat(5, 3, False), LNSFormat(16, 1024)], ids=str)
def test_every_word_through_the_operations_on_single_words(fmt: LNSFormat) -> None:
    """spec 2.5, 6.1, 6.3; minus zero too, and a view of every second word."""
    ours, given_ = ops._format_attributes("", fmt), every_word(fmt)
    every, half = tensor(given_), tensor(given_)[::2]
    table = tensor(operands.decode_values(fmt, -7))
    low, high = fmt.sign_bit | fmt.max_code // 2, fmt.max_code * 2 // 3
    keys = -(fmt.max_code // 2) if fmt.signed else fmt.max_code // 2, high
    for x in (every, half, every.reshape(-1, 2).t()):
        array = x.numpy()
        check(torch.ops.lnsdeploy.decode(x, table), decode(array, fmt, -7))
        check(torch.ops.lnsdeploy.relu(x, **ours), reference.relu(array, fmt))
        check(torch.ops.lnsdeploy.clip(x, **ours, low=keys[0], high=keys[1]), reference.clip(array, fmt, low, high))
        for gamma in {fmt.gamma, 4 * fmt.gamma, 1}:
            for made in (LNSFormat(8, gamma), LNSFormat(11, gamma, False)):
                for rule in ("zero", "min"):
                    plan = RescalePlan(fmt, made, 5, -9, rule)
                    check(run_case(fuzz_ort.rescale_case(plan, array)), reference.rescale(array, plan))


@needs_library
@pytest.mark.parametrize("fmt", [LNSFormat(3, 1), BYTES, LNSFormat(5, 3, False), WIDE], ids=str)
@pytest.mark.parametrize("underflow", ["zero", "min"])
def test_numbers_beside_every_threshold_are_encoded(fmt: LNSFormat, underflow: Any) -> None:
    """spec 2.1, 2.4; NaN has no word, and becomes zero."""
    bounds = operands.encode_thresholds(fmt, -40, underflow)
    near = [np.nextafter(bounds, np.float32(-1)), bounds, np.nextafter(bounds, np.float32(np.inf))]
    x = np.concatenate([*near, np.array([0.0, 1e-45, 1e-40, 3.4e38, np.inf], dtype=np.float32)])
    x = np.concatenate([x, -x])
    attributes = ops._output_attributes(fmt, underflow)
    del attributes["underflow"]
    expected = encode(x, fmt, -40, underflow=underflow, negative="clip")
    check(torch.ops.lnsdeploy.encode(tensor(x), tensor(bounds), **attributes), expected)
    both = torch.stack([tensor(x), torch.zeros(len(x))], 1)[:, 0]
    assert not both.is_contiguous()
    check(torch.ops.lnsdeploy.encode(both, tensor(bounds), **attributes), expected)
    nothing = torch.ops.lnsdeploy.encode(torch.tensor([np.nan]), tensor(bounds), **attributes)
    assert nothing.tolist() == [0]


@needs_library
@settings(max_examples=30)
@given(st.data(), st.integers(1, 3), st.sampled_from(["3:1", "8:8", "u7:2", "11:4"]))
def test_the_largest_word_of_windows(data: st.DataObject, axes: int, text: str) -> None:
    """spec 6.1"""
    fmt = LNSFormat.parse(text)
    spatial, window = data.draw(strategies.geometries(axes, small_pads=True))
    x = words((2, 3, *spatial), fmt, data.draw(st.integers(0, 9)))
    attributes = {**ops._format_attributes("", fmt), **ops._window_attributes(window)}
    check(torch.ops.lnsdeploy.max_pool(tensor(x), **attributes), reference.max_pool(x, fmt, window))


@settings(max_examples=200)
@given(*(st.integers(low, high) for low, high in ((0, 5), (1, 4), (1, 4), (0, 6), (0, 6), (1, 4))))
def test_windows_of_padding_only_are_found(
    size: int, kernel: int, stride: int, begin: int, end: int, dilation: int
) -> None:
    window = Window((kernel,), (stride,), (begin, end), (dilation,))
    try:
        (out,) = window.output_shape((size,))
    except BadValueError:
        assume(False)
    inside = reference.windows(np.ones((1, 1, size), dtype=np.bool_), window)
    assert ops._padding_only(size, out, kernel, stride, begin, dilation) == (not inside.any(axis=-1).all())


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and strides


@needs_library
@every_plan
def test_activations_of_any_strides(plan: DotPlan) -> None:
    w = words((5, 6), plan.weight, 1)
    x = tensor(words((4, 12, 6), plan.activation))
    views = [x[0], x[0, :6].t(), x[1, ::3], x[:, 0], tensor(words((7, 12), plan.activation))[:, ::2]]
    views += [x[0, :1].expand(9, 6), x[:1, :1, :1].expand(2, 3, 6), x, x.transpose(0, 1), x[2, 3], x[:, :6, :].mT]
    views += [x[::2, ::5], x[:, 1:, :].permute(1, 0, 2)]
    for view in views:
        rows = reference.dot(view.reshape(-1, 6).numpy(), w, None, plan)
        check(product(plan, view, w), rows.reshape(*view.shape[:-1], 5))


@needs_library
@every_plan
def test_weights_and_tables_of_any_strides(plan: DotPlan) -> None:
    x, w = words((4, 6), plan.activation), words((5, 6), plan.weight, 1)
    name, tensors, attributes = layer(plan, w)

    def strided(t: Tensor) -> Tensor:
        wide = torch.empty((*t.shape, 2), dtype=t.dtype)
        wide[..., 0] = t
        return wide[..., 0]

    found = getattr(torch.ops.lnsdeploy, name)(tensor(x), *map(strided, tensors), **attributes)
    check(found, reference.dot(x, w, None, plan))


@needs_library
@every_plan
def test_sizes_of_zero_and_leading_axes(plan: DotPlan) -> None:
    for lead in ((), (0,), (2,), (2, 0, 3), (2, 1, 3)):
        for depth, channels in ((6, 5), (1, 1), (0, 2), (3, 0)):
            x, w = words((*lead, depth), plan.activation), words((channels, depth), plan.weight, 1)
            expected = reference.dot(x.reshape(int(np.prod(lead)), depth), w, None, plan)
            check(product(plan, x, w), expected.reshape(*lead, channels))
    for images, channels, inputs in ((0, 4, 3), (1, 4, 3), (2, 0, 3), (2, 4, 0)):
        x, window = words((images, inputs, 4, 4), plan.activation), Window((2, 2))
        w = words((channels, inputs, 2, 2), plan.weight, 1)
        check(product(plan, x, w, None, window), reference.convolution(x, w, None, plan, window))


@needs_library
@every_plan
def test_images_of_any_strides(plan: DotPlan) -> None:
    window, w = Window((3, 2), (2, 1), (1, 0, 2, 1), (1, 2)), words((4, 2, 3, 2), plan.weight, 1)
    x = tensor(words((3, 4, 6, 5), plan.activation))
    for view in (x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[:, :, ::2], x[:1].expand(2, 4, 6, 5)):
        expected = reference.convolution(view.numpy(), w, None, plan, window, 2)
        check(product(plan, view, w, None, window, 2), expected)


@needs_library
@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((), ()), ((), (3,)), ((2, 1, 3), (4, 1)), ((2, 3, 4, 5), (3, 1, 5)), ((0, 3), (3,)), ((2, 0), (1, 1)),
        ((2, 1, 2, 1, 2, 1, 2, 1), (1, 2, 1, 2, 1, 2, 1, 2)), ((1, 1, 1, 1, 2, 1, 1, 3, 1, 2), (2,)),
        ((2,) * 10, (2,) * 10),
    ],
    ids=str,
)  # fmt: skip
def test_broadcasting(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    x, y = words(a), words(b, seed=1)
    check(run_add(ADD, tensor(x), tensor(y)), reference.add(x, y, ADD))
    check(run_add(ADD, tensor(y), tensor(x)), reference.add(y, x, ADD))


@needs_library
def test_operands_of_any_strides_are_added() -> None:
    x = tensor(words((4, 6, 5)))
    pairs = [(x[:, :5], x[:, :5].mT), (x[0], x[1, :1]), (x[::2, 1::2], x[1::2, ::2]), (x[:1].expand(4, 6, 5), x)]
    many = tensor(words((2,) * 10))
    pairs += [(x[0, :1].expand(6, 5), x[0]), (many.permute(*range(9, -1, -1)), many)]
    for a, b in pairs:
        check(run_add(ADD, a, b), reference.add(a.numpy(), b.numpy(), ADD))


@needs_library
def test_pools_of_empty_batches_and_other_strides() -> None:
    window = Window((2, 2), (1, 2))
    x = tensor(words((3, 2, 5, 4), WIDE))
    attributes = {**ops._format_attributes("", WIDE), **ops._window_attributes(window)}
    for view in (x, x[:0], x[:, :0], x.mT, x[:, :, ::2], x.to(memory_format=torch.channels_last)):
        array = view.numpy()
        check(torch.ops.lnsdeploy.max_pool(view, **attributes), reference.max_pool(array, WIDE, window))
        check(run_average(POOL, view, window, True), reference.average_pool(array, POOL, window, True))


# ---------------------------------------------------------------------------------------------------------------------
# Packed weights


class Counted:
    """A layer, and how often weights were packed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, plan: DotPlan = LINEAR, seed: int = 0):
        self.packed = 0
        pack = ops._pack

        def counted(*arguments: Any) -> Any:
            self.packed += 1
            return pack(*arguments)

        monkeypatch.setattr(ops, "_pack", counted)
        self.plan = plan
        self.name, self.tensors, self.attributes = layer(plan, words((5, 6), plan.weight, seed + 1))
        self.x = tensor(words((4, 6), plan.activation, seed))

    def __call__(self) -> Tensor:
        made: Tensor = getattr(torch.ops.lnsdeploy, self.name)(self.x, *self.tensors, **self.attributes)
        return made

    def check(self) -> None:
        check(self(), reference.dot(self.x.numpy(), self.tensors[0].numpy(), None, self.plan))


@needs_library
@every_plan
def test_weights_are_packed_once_and_again_after_every_change(plan: DotPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Counted(monkeypatch, plan)
    for _ in range(3):
        run.check()
    assert run.packed == 1
    w = run.tensors[0]
    changes: list[Callable[[], Any]] = [
        lambda: w.copy_(tensor(words((5, 6), plan.weight, 7))),
        lambda: w[2].zero_(),
        lambda: w.detach().view(-1)[3:9].fill_(5),
        lambda: setattr(w, "data", tensor(words((5, 6), plan.weight, 8))),
    ]
    for i, change in enumerate(changes):
        change()
        run.check()
        run.check()
        assert run.packed == 2 + i
    with torch.inference_mode():
        w.fill_(9)
        run.check()
    assert run.packed == 2 + len(changes)
    assert len(ops._layers) == 1


@needs_library
@every_plan
def test_tables_that_change_count_too(plan: DotPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Counted(monkeypatch, plan)
    before = run()
    run.tensors[-1].add_(3)
    after = run()
    assert run.packed == 2
    assert not torch.equal(before, after)
    check(
        after,
        reference.dot(run.x.numpy(), run.tensors[0].numpy(), None, replace(plan, output_offset=plan.output_offset - 3)),
    )
    run.attributes["underflow"] = 1
    run()
    assert run.packed == 3
    assert len(ops._layers) == 2


@needs_library
def test_tensors_without_version_counters_are_packed_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Counted(monkeypatch)
    with torch.inference_mode():
        run.tensors[0] = run.tensors[0].clone()
        run.check()
        run.tensors[0].fill_(77)
        run.check()
    assert run.packed == 2
    assert len(ops._layers) == 0


@needs_library
def test_changes_that_torch_does_not_see_need_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Counted(monkeypatch)
    run.check()
    run.tensors[0].numpy()[:] = 100
    ops.clear_cache()
    run.check()
    assert run.packed == 2


@needs_library
def test_packed_weights_go_with_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Counted(monkeypatch)
    run()
    destroyed = []
    monkeypatch.setattr(ops._Layer, "__del__", lambda self: destroyed.append(self))
    assert len(ops._layers) == 1
    run.tensors.pop(0)
    gc.collect()
    assert len(ops._layers._entries) == 0
    assert len(destroyed) == 1


@needs_library
def test_few_packed_weights_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_layers", ops._Layers(most=3, most_words=100))
    runs = [Counted(monkeypatch, seed=i) for i in range(5)]
    for run in runs:
        run.check()
    assert len(ops._layers) == 3
    runs[2].check()  # the oldest now is that of run 3
    runs[0].check()
    before = runs[2].packed, runs[3].packed
    runs[2].check()
    assert runs[2].packed == before[0]
    runs[3].check()
    assert runs[3].packed == before[1] + 1
    # by words: of a large layer alone the last stays
    large = words((20, 10), seed=3)
    x = words((2, 10))
    check(product(LINEAR, x, large), reference.dot(x, large, None, LINEAR))
    name, tensors, attributes = layer(LINEAR, large)
    getattr(torch.ops.lnsdeploy, name)(tensor(x), *tensors, **attributes)
    assert len(ops._layers) == 1


@needs_library
def test_an_identity_given_out_again_is_another_tensor() -> None:
    """Weights that come and go at the same place, with the same version."""
    name, tensors, attributes = layer(LINEAR, words((5, 6)))
    x, tables = words((4, 6), seed=1), tensors[1:]
    for seed in range(30):
        w = words((5, 6), seed=seed)
        found = getattr(torch.ops.lnsdeploy, name)(tensor(x), torch.from_numpy(w), *tables, **attributes)
        check(found, reference.dot(x, w, None, LINEAR))


@needs_library
def test_threads_share_layers_and_change_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_layers", ops._Layers(most=2))
    run = Counted(monkeypatch, LOG)
    expected = run()
    stop = threading.Event()

    def others(seed: int) -> None:
        w = words((5, 6), seed=seed)
        own, x = tensor(w), words((3, 6), seed=seed + 1)
        _, tensors, attributes = layer(LOG, w)
        while not stop.is_set():
            own.copy_(tensor(w))
            found = torch.ops.lnsdeploy.log_gemm(tensor(x), own, *tensors[1:], **attributes)
            check(found, reference.dot(x, w, None, LOG))

    with ThreadPoolExecutor(5) as pool:
        busy = [pool.submit(others, seed) for seed in range(3)]
        same = [pool.submit(lambda: [torch.equal(run(), expected) for _ in range(40)]) for _ in range(2)]
        assert all(all(found.result()) for found in same)
        stop.set()
        for found in busy:
            found.result()
    assert len(ops._layers) <= 2


@needs_library
@pytest.mark.parametrize("plan", [LINEAR, LOG], ids=["linear", "log"])
def test_another_instruction_set_has_its_own_layers(plan: DotPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Counted(monkeypatch, plan)
    for isa in native.isas():
        with native.forced_isa(isa):
            run.check()
    assert run.packed == len(native.isas())


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def dot_call(name: str, **changes: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """A valid call with some tensors or attributes changed."""
    plan = LINEAR if name.startswith("linear") else LOG
    window = Window((2, 2)) if name.endswith("conv") else None
    w = words((4, 3, 2, 2)) if window else words((4, 6))
    _, tensors, attributes = layer(plan, w, None, window, 1)
    x = tensor(words((2, 3, 5, 5)) if window else words((2, 6)))
    given_ = dict(zip(ops._OPERATORS[name].tensors, [x, *tensors], strict=True))
    for key, value in changes.items():
        (given_ if key in given_ else attributes)[key] = value
    return list(given_.values()), attributes


def other_call(name: str, **changes: Any) -> tuple[list[Tensor], dict[str, Any]]:
    case = {
        "encode": lambda: fuzz_ort.encode_case(BYTES, 0, "zero", np.ones((2, 3), dtype=np.float32)),
        "decode": lambda: fuzz_ort.decode_case(BYTES, 0, words((2, 3))),
        "relu": lambda: fuzz_ort.relu_case(BYTES, words((2, 3))),
        "clip": lambda: fuzz_ort.clip_case(BYTES, -5, 9, words((2, 3))),
        "max_pool": lambda: fuzz_ort.max_pool_case(BYTES, words((2, 3, 4, 5)), Window((2, 2), (1, 1), (1, 1, 1, 1))),
        "add": lambda: fuzz_ort.add_case(ADD, words((2, 3)), words((3,))),
        "average_pool": lambda: fuzz_ort.average_case(
            POOL, words((2, 3, 4, 5), WIDE), Window((2, 2)), np.zeros((3, 4))
        ),
        "rescale": lambda: fuzz_ort.rescale_case(RescalePlan(BYTES, WIDE, 0, 0), words((2, 3))),
    }[name]()
    given_ = {key.lower(): tensor(value) for key, value in case.inputs.items()}
    attributes = dict(case.attributes)
    for key, value in changes.items():
        (given_ if key in given_ else attributes)[key] = value
    return list(given_.values()), attributes


def call(name: str, **changes: Any) -> tuple[list[Tensor], dict[str, Any]]:
    return (dot_call if "gemm" in name or "conv" in name else other_call)(name, **changes)


U8, U16, I32, I64, F32 = torch.uint8, torch.uint16, torch.int32, torch.int64, torch.float32


def zeros(*shape: int, dtype: torch.dtype = U8) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


DOTS = ["linear_gemm", "linear_conv", "log_gemm", "log_conv"]
# name, changes, error, message
WRONG: list[tuple[str, dict[str, Any], type[LNSError], str]] = [
    ("encode", {"x": zeros(2, dtype=torch.float64)}, BadTypeError, "x has elements of torch.float64"),
    ("encode", {"thresholds": zeros(127, dtype=torch.float16)}, BadTypeError, "thresholds has elements"),
    ("encode", {"thresholds": zeros(126, dtype=F32)}, BadValueError, r"thresholds has shape \[126\], not \[127\]"),
    ("encode", {"output_type": 4}, BadValueError, "output_type is 4, but that of words of 8 bits is 2"),
    ("encode", {"output_bits": 17}, BadValueError, "output_bits must be 2 to 16, not 17"),
    ("encode", {"output_bits": 8 + (1 << 32)}, BadValueError, "output_bits"),
    ("decode", {"x": zeros(2, dtype=I32)}, BadTypeError, "torch.int32, not torch.uint8 or torch.uint16"),
    ("decode", {"table": zeros(255, dtype=F32)}, BadValueError, "table has 255 entries"),
    ("decode", {"table": zeros(512, dtype=F32)}, BadValueError, "table has 512 entries"),
    ("decode", {"table": zeros(256, dtype=torch.float64)}, BadTypeError, "table"),
    ("decode", {"table": zeros(16, 16, dtype=F32)}, BadValueError, "one axis"),
    ("relu", {"x": zeros(2, dtype=U16)}, BadTypeError, "words of 8 bits are torch.uint8"),
    ("relu", {"bits": 9}, BadTypeError, "words of 9 bits are torch.uint16"),
    ("relu", {"bits": 1}, BadValueError, "bits must be 2 to 16"),
    ("relu", {"signed": 2}, BadValueError, "signed must be 0 to 1, not 2"),
    ("clip", {"low": 10}, BadValueError, "limits 10 and 9"),
    ("clip", {"high": 128}, BadValueError, "limits -5 and 128"),
    ("clip", {"signed": 0}, BadValueError, "limits -5 and 9"),
    ("max_pool", {"x": zeros(2, 3)}, BadValueError, "1 to 3 axes"),
    ("max_pool", {"x": zeros(2, 3, 4)}, BadValueError, "an axis that x"),
    ("max_pool", {"x": zeros(1, 1, 1, 1, 1, 1)}, BadValueError, "1 to 3 axes"),
    ("max_pool", {"kernel_shape": [1, 2]}, BadValueError, "kernel_shape must be 3 integers"),
    ("max_pool", {"strides": [1, 0, 1]}, BadValueError, "strides must be 3 integers from 1"),
    ("max_pool", {"pads": [0, 0, 0, 0, -1, 0]}, BadValueError, "pads must be 6 integers from 0"),
    ("max_pool", {"pads": [0, 2, 2, 0, 0, 0]}, BadValueError, "padding only"),
    ("max_pool", {"pads": [0, 0, 0, 0, 0, 3]}, BadValueError, "padding only"),
    ("max_pool", {"x": zeros(2, 3, 0, 5)}, BadValueError, "padding only"),
    ("max_pool", {"dilations": [1, 9, 1]}, BadValueError, "does not fit an axis of 4"),
    ("add", {"b": zeros(4)}, BadValueError, "do not broadcast"),
    ("add", {"b": zeros(3, dtype=U16)}, BadTypeError, "b has elements of torch.uint16"),
    ("add", {"delta_plus": zeros(3, dtype=I64)}, BadTypeError, "delta_plus"),
    ("add", {"delta_minus": zeros(3, 1, dtype=I32)}, BadValueError, "one axis"),
    ("add", {"acc_bits": 41}, BadValueError, "acc_bits must be 1 to 40"),
    ("add", {"guard_bits": 9}, BadValueError, "guard_bits"),
    ("add", {"a_shift": (1 << 56) + 1}, BadValueError, "a_shift"),
    ("add", {"underflow": 2}, BadValueError, "underflow"),
    ("average_pool", {"log_counts": zeros(1, 3, 3, dtype=I64)}, BadValueError, r"\[1, 3, 3\], not \[1, 3, 4\] or ones"),
    ("average_pool", {"log_counts": zeros(3, 4, dtype=I64)}, BadValueError, "log_counts has shape"),
    ("average_pool", {"log_counts": zeros(1, 1, 1, dtype=I32)}, BadTypeError, "log_counts"),
    ("average_pool", {"x": zeros(2, 3, 4, 5)}, BadTypeError, "words of 12 bits"),
    ("average_pool", {"x": zeros(3, dtype=U16)}, BadValueError, "1 to 3 axes"),
    ("average_pool", {"lanes": 1025}, BadValueError, "lanes must be 1 to 1024"),
    ("rescale", {"multiply": 2, "divide": 2}, BadValueError, "one of them is 1"),
    ("rescale", {"divide": 0}, BadValueError, "divide"),
    ("linear_gemm", {"x": zeros(2, 5)}, BadValueError, r"x has shape \[2, 5\], not \[..., 6\]"),
    ("linear_gemm", {"x": zeros()}, BadValueError, r"x has shape \[\]"),
    ("linear_gemm", {"w": zeros(4)}, BadValueError, r"not \[N, K\]"),
    ("linear_gemm", {"terms": zeros(2, 5, dtype=I32)}, BadValueError, "one column a code sum"),
    ("linear_gemm", {"terms": zeros(0, 255, dtype=I32)}, BadValueError, "one column a code sum"),
    ("linear_gemm", {"terms": zeros(1, 255, dtype=F32)}, BadTypeError, "terms has elements"),
    ("linear_gemm", {"bias": zeros(4, dtype=I64)}, BadTypeError, "bias has elements of torch.int64, not torch.int32"),
    ("linear_gemm", {"constants": zeros(2, dtype=I64)}, BadValueError, "constants"),
    ("linear_gemm", {"thresholds": zeros(2, dtype=I32)}, BadTypeError, "thresholds"),
    ("linear_gemm", {"psum_bits": 63}, BadValueError, "psum_bits"),
    ("linear_gemm", {"saturate": -1}, BadValueError, "saturate"),
    ("linear_gemm", {"acc_bits": 1}, BadValueError, "acc_bits must be 2 to 62"),
    ("linear_gemm", {"weight_widen": 2}, BadValueError, "terms has shape"),
    ("log_gemm", {"entry_shift": zeros(3, dtype=I64)}, BadValueError, r"entry_shift has shape \[3\], not \[4\]"),
    ("log_gemm", {"entry_shift": zeros(4, dtype=I32)}, BadTypeError, "entry_shift"),
    ("log_gemm", {"bias": zeros(4, dtype=I32)}, BadTypeError, "bias"),
    ("log_gemm", {"guard_bits": -1}, BadValueError, "guard_bits"),
    ("log_gemm", {"delta_plus": zeros(1, 1, dtype=I32)}, BadValueError, "delta_plus"),
    ("linear_conv", {"w": zeros(4, 6)}, BadValueError, r"not \[O, C/group, 1 to 3 axes\]"),
    ("linear_conv", {"w": zeros(4, 3, 2, 3)}, BadValueError, r"but kernel_shape is \[1, 2, 2\]"),
    ("log_conv", {"group": 3}, BadValueError, "do not divide into 3 groups"),
    ("log_conv", {"group": 2}, BadValueError, "does not fit 2 groups"),
    ("log_conv", {"group": 0}, BadValueError, "group must be 1"),
    ("log_conv", {"x": zeros(2, 3, 5)}, BadValueError, "x has shape"),
    ("linear_conv", {"x": zeros(2, 3, 1, 5)}, BadValueError, "does not fit an axis of 1"),
    *((name, {"x": zeros(2, 3, dtype=U16)}, BadTypeError, "x has elements of torch.uint16") for name in DOTS),
    *((name, {"w": zeros(4, 6, 2, 2)[..., 0, 0].to(I32)}, BadTypeError, "w has") for name in DOTS[::2]),
    *((name, {"bias": zeros(5, dtype=dtype)}, BadValueError, r"bias has shape \[5\]")
      for name, dtype in zip(DOTS, (I32, I32, I64, I64), strict=True)),
    *((name, {"code_shift": zeros(5, dtype=I64)}, BadValueError, r"code_shift has shape \[5\]") for name in DOTS),
    *((name, {"code_shift": zeros(4, dtype=I32)}, BadTypeError, "code_shift") for name in DOTS),
    *((name, {"activation_bits": 17}, BadValueError, "activation_bits") for name in DOTS),
    *((name, {"lanes": 0}, BadValueError, "lanes must be 1 to 1024, not 0") for name in DOTS),
    *((name, {"output_type": 3}, BadValueError, "output_type is 3") for name in DOTS),
]  # fmt: skip


@needs_library
@pytest.mark.parametrize("name", NAMES)
def test_calls_that_errors_are_made_of_are_right_themselves(name: str) -> None:
    tensors, attributes = call(name)
    getattr(torch.ops.lnsdeploy, name)(*tensors, **attributes)


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"), WRONG, ids=[f"{i}-{w[0]}-{'-'.join(w[1])}" for i, w in enumerate(WRONG)]
)
def test_what_does_not_fit_is_refused(name: str, changes: dict[str, Any], error: type[LNSError], message: str) -> None:
    """Both computed and traced, and the message names the operator."""
    tensors, attributes = call(name, **changes)
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=f"^lnsdeploy::{name}: .*{message}"):
            getattr(torch.ops.lnsdeploy, name)(*(t.to(device) for t in tensors), **attributes)


@needs_library
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("encode", {"thresholds": torch.arange(127, 0, -1, dtype=F32)}, "sorted"),
        ("log_gemm", {"bias": torch.full((4,), 1024)}, "bias has an entry 1024, not 0 to 1023"),
        ("log_conv", {"bias": torch.full((4,), -1)}, "bias has an entry -1"),
        ("linear_gemm", {"code_shift": torch.full((4,), 1 << 60)}, "code_shift"),
        ("linear_gemm", {"terms": torch.full((1, 255), -1, dtype=I32)}, "terms are magnitudes"),
        ("log_gemm", {"delta_plus": torch.full((3,), -1, dtype=I32)}, "no negative numbers"),
        ("average_pool", {"log_counts": torch.full((1, 1, 1), -1)}, "log_counts has an entry -1"),
    ],
)
def test_contents_that_are_refused_when_computing(name: str, changes: dict[str, Any], message: str) -> None:
    tensors, attributes = call(name, **changes)
    with pytest.raises(BadValueError, match=f"^lnsdeploy::{name}: .*{message}"):
        getattr(torch.ops.lnsdeploy, name)(*tensors, **attributes)
    assert len(ops._layers) == 0


@needs_library
def test_too_many_axes_to_broadcast() -> None:
    a, b = zeros(*(2, 1) * 5), zeros(*(1, 2) * 5)
    with pytest.raises(UnsupportedError, match=r"lnsdeploy::add: .*10 axes"):
        run_add(ADD, a, b)


@pytest.mark.parametrize("name", NAMES)
def test_without_the_library_operators_say_why(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    why = "the native library is missing: no compiler was found"
    monkeypatch.setattr(native, "_load", lambda: (None, why))
    assert native.unavailable() == why
    tensors, attributes = call(name)
    operator = getattr(torch.ops.lnsdeploy, name)
    with pytest.raises(MissingDependencyError) as caught:
        operator(*tensors, **attributes)
    assert str(caught.value) == why
    # tracing needs none
    assert operator(*(t.to("meta") for t in tensors), **attributes).device.type == "meta"


def test_attributes_are_given_by_name() -> None:
    with pytest.raises((TypeError, RuntimeError)):
        torch.ops.lnsdeploy.relu(zeros(3), 8, 1)


def test_nothing_else_imports_torch() -> None:
    code = (
        "import sys, lnsdeploy.cli, lnsdeploy.emulator.native, lnsdeploy.emulator.cpu, lnsdeploy.emulator.operands\n"
        "import lnsdeploy.emulator.graph, lnsdeploy.emulator.executor\n"
        "assert 'torch' not in sys.modules\n"
        "import lnsdeploy.emulator.ops, torch\n"
        "assert 'onnx' not in sys.modules\n"
        "torch.ops.lnsdeploy.encode\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# Nets


@cache
def lowered(kind: str, name: str) -> tuple[g.LNSGraph, Array]:
    _, model, x = getattr(nets, kind)()
    return lower(model, x[:16], LowerOptions(load_datapath(name))).graph, x


def by_reference(graph: g.LNSGraph, x: Array) -> Array:
    return graph.decode_output(g.run_reference(graph, x))


def every_kind() -> g.LNSGraph:
    """Every node there is, of words of both widths."""
    wide = LNSFormat(10, 8)
    conv = replace(LINEAR, output=wide, datapath=replace(LINEAR.datapath, output=wide))
    info = {
        "e": g.TensorInfo(BYTES, 0),
        "c": g.TensorInfo(wide, conv.output_offset),
        "h": g.TensorInfo(BYTES, 150),
        "v": g.TensorInfo(BYTES, 140),
        "z": g.TensorInfo(BYTES, 145),
    }
    pool = PoolPlan(LogAccumulator(9, 1), wide, BYTES, conv.output_offset, 150, 60)
    add = AddPlan(LogAccumulator(9, 1), BYTES, BYTES, BYTES, 150, 140, 145, 100)
    last = replace(LOG, input_offset=145, acc_offset=190, output_offset=330)
    made = (
        g.Conv("conv 1", ("e",), "c", words((4, 1, 3, 3)), np.arange(4) << 3, conv, Window((3, 3), (), (1,) * 4), 2),
        g.Relu("relu", ("c",), "r", wide),
        g.Clip("clip", ("r",), "k", wide, 3, 500),
        g.AveragePool("mean", ("k",), "h", pool, Window((2, 2), (2, 2)), False, (6, 4)),
        g.Rescale("rescale", ("k",), "v0", RescalePlan(wide, BYTES, conv.output_offset, 140)),
        g.MaxPool("most", ("v0",), "v", BYTES, Window((2, 2), (2, 2))),
        g.Add("add", ("h", "v"), "z", add),
        g.Transpose("swap", ("z",), "t", (0, 2, 3, 1)),
        g.Concat("cat", ("t", "t"), "u", 3),
        g.Reshape("flat", ("u",), "f", (0, -1)),
        g.Gemm("fc", ("f",), "y0", words((3, 48), seed=5), None, last),
        g.Reshape("last", ("y0",), "yw", (-1, 3, 1)),
    )  # fmt: skip
    result = g.TensorInfo(BYTES, 330)
    tensors = info | dict.fromkeys(("r", "k"), info["c"]) | dict.fromkeys(("t", "u", "f"), info["z"])
    tensors |= {"v0": info["v"], "y0": result, "yw": result}
    paths = {plan.datapath.fingerprint: plan.datapath for plan in (conv, last)}
    return g.LNSGraph("x", (0, 2, 6, 4), "e", "min", made, "yw", "y", (0, 3, 1), tensors, paths)


def inputs_of(graph: g.LNSGraph, count: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    shape = (count, *graph.input_shape[1:])
    return np.asarray(np.exp2(rng.normal(11, 2, shape)) * rng.choice([-1, 1], shape), dtype=np.float32)


@needs_library
@pytest.mark.parametrize("name", ["lns-madam-8", "gauss-12", "elma-8", "table-16", "lns-madam-8-lut2"])
@pytest.mark.parametrize("kind", ["residual", "dense"])
def test_nets_equal_the_reference(kind: str, name: str) -> None:
    graph, x = lowered(kind, name)
    module = ops.LNSModule(graph)
    check(module(tensor(x[:8])), by_reference(graph, x[:8]))
    for other in (np.float64, np.float16):
        check(module(tensor(x[:2].astype(other))), by_reference(graph, x[:2].astype(other)))


@needs_library
def test_a_net_of_every_kind_of_node() -> None:
    graph = every_kind()
    module, x = ops.LNSModule(graph), inputs_of(graph, 5)
    expected = by_reference(graph, x)
    assert len(np.unique(expected)) > 5
    check(module(tensor(x)), expected)
    assert module(tensor(x[:0])).shape == (0, 3, 1)
    # the reference refuses NaN, here it becomes the zero word
    x[0, 0, 0, 0] = np.nan
    check(module(tensor(x))[1:], expected[1:])


def test_operators_are_those_of_the_file() -> None:
    """Operands and attributes of each node are those of the ONNX model."""
    for graph in (every_kind(), lowered("residual", "gauss-12")[0], lowered("dense", "lns-madam-8")[0]):
        module = ops.LNSModule(graph)
        model = nodes.model_of(graph, {})
        arrays = {t.name: np.asarray(numpy_helper.to_array(t)) for t in model.graph.initializer}
        assert len(model.graph.node) == len(module._steps)
        for proto, step in zip(model.graph.node, module._steps, strict=True):
            assert step.output == proto.output[0]
            assert step.inputs == tuple(n for n in proto.input if n not in arrays)
            if proto.domain != functions.DOMAIN:
                continue
            assert NAMES[step.name].name == proto.op_type
            assert dict(step.attributes) == {a.name: helper.get_attribute_value(a) for a in proto.attribute}
            stored = [arrays[n] for n in proto.input if n in arrays]
            for name, array in zip(step.operands, stored, strict=True):
                check(getattr(module, name), array)
    assert (TensorProto.UINT8, TensorProto.UINT16) == (ops._UINT8, ops._UINT16)


@pytest.mark.parametrize("kind", ["residual", "dense", "every"])
@pytest.mark.parametrize("name", ["lns-madam-8", "gauss-12"])
@needs_library
def test_nets_are_exported_with_a_dynamic_batch(kind: str, name: str) -> None:
    if kind == "every":
        graph, x = every_kind(), inputs_of(every_kind(), 9)
    else:
        graph, x = lowered(kind, name)
    module = ops.LNSModule(graph)
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (tensor(x[:3]),), dynamic_shapes={"x": {0: batch}})
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    ours = [str(target) for target in called if "lnsdeploy" in str(target)]
    steps = [step.name for step in module._steps if step.name in NAMES]
    assert ours == [f"lnsdeploy.{step}.default" for step in steps]
    assert program.graph_signature.buffers
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for made in (program.module(), torch.export.load(file).module()):
        for count in (1, 2, 7):
            check(made(tensor(x[:count])), by_reference(graph, x[:count]))
        assert made(tensor(x[:0])).shape[0] == 0


@needs_library
def test_nets_are_compiled() -> None:
    graph, x = lowered("residual", "lns-madam-8")
    compiled = torch.compile(ops.LNSModule(graph), backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (5, 3):
        check(compiled(tensor(x[:count])), by_reference(graph, x[:count]))


@needs_library
def test_words_and_tables_are_buffers() -> None:
    graph, x = lowered("residual", "gauss-12")
    module = ops.LNSModule(graph)
    expected = module(tensor(x))
    state = module.state_dict()
    assert not list(module.parameters())
    assert {torch.uint16, torch.float32, torch.int64, torch.int32} <= {t.dtype for t in state.values()}
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False), ops.LNSModule(graph)):
        other.load_state_dict(state)
        assert torch.equal(other(tensor(x)), expected)
    # equal tables are held once: this net's adders have the same
    tables = [name for name in state if name.endswith("delta_plus")]
    assert len({state[name].numpy().tobytes() for name in tables}) == len(tables)
    assert "encode" in repr(module)


@needs_library
def test_weights_of_a_net_change_in_place() -> None:
    graph, x = lowered("dense", "lns-madam-8")
    module = ops.LNSModule(graph)
    module(tensor(x))
    changed = []
    for node in graph.nodes:
        if isinstance(node, g.Gemm):
            node = replace(node, words=words(node.words.shape, node.plan.weight, 3))
            name = next(n for n, _ in module.named_buffers() if n == f"{node.name}_w")
            getattr(module, name).copy_(tensor(node.words))
        changed.append(node)
    check(module(tensor(x)), by_reference(replace(graph, nodes=tuple(changed)), x))


def test_equal_weights_of_two_layers_stay_apart() -> None:
    graph, _ = lowered("dense", "lns-madam-8")
    same = [
        replace(node, words=np.zeros_like(node.words)) if isinstance(node, g.Gemm) else node for node in graph.nodes
    ]
    first = next(node for node in same if isinstance(node, g.Gemm))
    twin = replace(first, name="twin", output="twin")
    tensors = graph.tensors | {"twin": graph.tensors[first.output]}
    module = ops.LNSModule(replace(graph, nodes=(*same, twin), tensors=tensors))
    assert module.twin_w is not getattr(module, f"{first.name}_w")
    shared = {step.output: step.operands[2] for step in module._steps if step.operands[2:]}
    assert shared["twin"] == shared[first.output]


def test_inputs_that_are_no_inputs() -> None:
    graph = every_kind()
    module = ops.LNSModule(graph)
    with pytest.raises(BadValueError, match=r"'x' must have the shape \[batch, 2, 6, 4\], not \[3, 2, 6, 5\]"):
        module(torch.zeros(3, 2, 6, 5))
    with pytest.raises(BadValueError, match="must have the shape"):
        module(torch.zeros(2, 6, 4))
    with pytest.raises(BadValueError, match=r"floating point, not torch\.int64"):
        module(torch.zeros(3, 2, 6, 4, dtype=torch.int64))


def test_nets_without_a_torch_form() -> None:
    graph = every_kind()
    huge = LNSFormat(20, 8)
    alone = replace(graph, nodes=(), words_output="e", tensors={"e": g.TensorInfo(huge, 0)})
    with pytest.raises(UnsupportedError, match="at most 16 bits"):
        ops.LNSModule(alone)
    mean = next(node for node in graph.nodes if isinstance(node, g.AveragePool))
    open_ended = [replace(node, spatial=None) if node is mean else node for node in graph.nodes]
    with pytest.raises(UnsupportedError, match=r"node 'mean' \(AveragePool\): the size of its input"):
        ops.LNSModule(replace(graph, nodes=tuple(open_ended)))
    unknown = g.Node("new", ("yw",), "more")
    tensors = graph.tensors | {"more": graph.tensors["yw"]}
    with pytest.raises(UnsupportedError, match="node 'new'"):
        ops.LNSModule(replace(graph, nodes=(*graph.nodes, unknown), tensors=tensors))


@pytest.mark.parametrize(
    ("have", "shape", "expected"),
    [
        ((2, 3, 4), (0, -1), [2, 12]),
        ((0, 3, 4), (0, -1), [0, 12]),
        ((0, 3, 4), (-1, 12), [0, 12]),
        ((5, 6), (0, 2, -1), [5, 2, 3]),
        ((5, 6), (-1,), [30]),
        ((5, 0), (5, 0), [5, 0]),
    ],
    ids=str,
)
def test_shapes_are_resolved(have: tuple[int, ...], shape: tuple[int, ...], expected: list[int]) -> None:
    """spec 6.1"""
    assert ops._resolved(have, shape) == expected
