"""Products on the fly are those of the reference, word for word; and every form of every operation arrives there."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import lnsdeploy
from lnsdeploy.datapath import LinearAccumulator, LogAccumulator, load_datapath, named_datapaths
from lnsdeploy.delta import Table
from lnsdeploy.emulator import native, reference
from lnsdeploy.emulator.products import Traced, spread
from lnsdeploy.errors import BadTypeError, BadValueError, MissingDependencyError, UnknownNameError, UnsupportedError
from lnsdeploy.formats import LNSFormat, decode

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

MODES = (contextlib.nullcontext, torch.no_grad, torch.inference_mode)


def again(t: Traced) -> np.ndarray[Any, Any]:
    """The words of a product by the reference."""
    if t.window is not None:
        return reference.convolution(t.a, t.w, t.bias, t.plan, t.window, t.groups)
    if t.a.ndim == 3:
        return np.stack([reference.dot(a, w, t.bias, t.plan) for a, w in zip(t.a, t.w, strict=True)])
    return reference.dot(t.a, t.w, t.bias, t.plan)


def emulated(
    run: Callable[[], Any], datapath: Any = "lns-madam-8", **options: Any
) -> tuple[Any, list[Traced], lnsdeploy.emulator.mode.Emulation]:
    """What `run` gives inside the context, with every product compared with the reference."""
    found: list[Traced] = []
    with lnsdeploy.emulate(datapath, trace=found.append, **options) as seen:
        result = run()
    for t in found:
        words = again(t)
        assert words.dtype == t.result.dtype
        np.testing.assert_array_equal(words, t.result, err_msg=t.name)
    return result, found, seen


def near(made: Tensor, wanted: Tensor, bound: float = 0.12) -> None:
    assert made.shape == wanted.shape
    assert made.dtype == wanted.dtype
    made, wanted = made.detach().double(), wanted.detach().double()
    assert float((made - wanted).norm()) <= bound * float(wanted.norm()) + 1e-12


def r(*shape: int) -> Tensor:
    return torch.randn(*shape)


# ---------------------------------------------------------------------------------------------------
# every operation


MATRIX: dict[str, tuple[int, Callable[[], Tensor]]] = {
    "mm": (1, lambda: torch.mm(r(5, 40), r(40, 3))),
    "mm of views": (1, lambda: torch.mm(r(40, 5).T, r(3, 80)[:, ::2].T)),
    "addmm, bias": (1, lambda: torch.addmm(r(3), r(5, 40), r(40, 3))),
    "addmm, bias times beta": (1, lambda: torch.addmm(r(1, 3), r(5, 40), r(40, 3), beta=2)),
    "addmm, matrix": (1, lambda: torch.addmm(r(5, 3), r(5, 40), r(40, 3), beta=0.5, alpha=2)),
    "addmm, no beta": (1, lambda: torch.addmm(torch.full((3,), torch.nan), r(5, 40), r(40, 3), beta=0)),
    "bmm": (1, lambda: torch.bmm(r(6, 5, 40), r(6, 40, 3))),
    "bmm of views": (1, lambda: torch.bmm(r(6, 40, 5).mT, r(6, 3, 40).mT)),
    "bmm, one matrix for all": (1, lambda: torch.bmm(r(6, 5, 40), r(1, 40, 3).expand(6, 40, 3))),
    "baddbmm": (1, lambda: torch.baddbmm(r(6, 5, 3), r(6, 5, 40), r(6, 40, 3), beta=0.5, alpha=0.25)),
    "addbmm": (1, lambda: torch.addbmm(r(5, 3), r(6, 5, 40), r(6, 40, 3))),
    "mv": (1, lambda: torch.mv(r(5, 40), r(40))),
    "addmv": (1, lambda: torch.addmv(r(5), r(5, 40), r(40))),
    "addmv, alpha": (1, lambda: torch.addmv(r(5), r(5, 40), r(40), alpha=3)),
    "dot": (1, lambda: torch.dot(torch.arange(1.0, 41), torch.arange(1.0, 41))),
    "vdot": (1, lambda: torch.vdot(torch.arange(1.0, 41), torch.arange(1.0, 41))),
    "inner": (1, lambda: torch.inner(r(2, 40), r(4, 40))),
    "matmul, many axes": (1, lambda: torch.matmul(r(2, 3, 4, 40), r(40, 6))),
    "matmul, broadcast": (1, lambda: torch.matmul(r(2, 1, 4, 40), r(3, 40, 6))),
    "tensordot": (1, lambda: torch.tensordot(r(3, 8, 5), r(8, 5, 6), 2)),
    "einsum, batch": (1, lambda: torch.einsum("bhqd,bhkd->bhqk", r(2, 2, 3, 40), r(2, 2, 5, 40))),
    "einsum, matrix": (1, lambda: torch.einsum("ij,kj->ik", r(3, 40), r(5, 40))),
    "linear": (1, lambda: functional.linear(r(2, 7, 40), r(3, 40), r(3))),
    "linear of a view": (1, lambda: functional.linear(r(2, 40, 7).mT, r(3, 40), r(3))),
    "linear without bias": (1, lambda: functional.linear(r(2, 7, 40), r(3, 40))),
    "chain": (2, lambda: torch.linalg.multi_dot([r(3, 30), r(30, 30), r(30, 4)])),
    "attention": (2, lambda: functional.scaled_dot_product_attention(r(2, 2, 5, 8), r(2, 2, 6, 8), r(2, 2, 6, 8))),
    "causal attention": (
        2,
        lambda: functional.scaled_dot_product_attention(r(1, 2, 5, 8), r(1, 2, 5, 8), r(1, 2, 5, 8), is_causal=True),
    ),
    "gelu in one": (1, lambda: torch.ops.aten._addmm_activation(r(3), r(5, 40), r(40, 3), use_gelu=True)),
}


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("name", MATRIX)
def test_matrix_products(name: str, mode: Any) -> None:
    count, run = MATRIX[name]
    with mode():
        torch.manual_seed(0)
        wanted = run()
        torch.manual_seed(0)
        made, found, seen = emulated(run)
    assert len(found) == count, [t.name for t in found]
    assert not seen.not_emulated
    near(made, wanted)


def test_the_bias_is_in_the_accumulator() -> None:
    for run in (MATRIX["addmm, bias"][1], MATRIX["linear of a view"][1], MATRIX["addmv"][1]):
        _, found, _ = emulated(run)
        assert found[0].bias is not None
        assert found[0].bias.any()
    _, found, _ = emulated(MATRIX["addmm, matrix"][1])
    assert found[0].bias is None


def test_forms_that_write() -> None:
    a, b = r(5, 40), r(40, 3)
    a3, b3 = r(2, 5, 40), r(2, 40, 3)

    def run() -> list[Tensor]:
        out, grown = torch.empty(5, 3), torch.empty(0)
        assert torch.mm(a, b, out=out) is out
        torch.bmm(a3, b3, out=grown)
        inplace, batched, vector = torch.ones(5, 3), torch.ones(2, 5, 3), torch.ones(5)
        assert inplace.addmm_(a, b) is inplace
        batched.baddbmm_(a3, b3)
        vector.addmv_(a, b[:, 0])
        return [out, grown, inplace, batched, vector]

    wanted = run()
    made, found, _ = emulated(run)
    assert len(found) == 5
    for x, y in zip(made, wanted, strict=True):
        near(x, y)


def test_empty_products() -> None:
    def run() -> list[Tensor]:
        return [
            torch.mm(r(0, 7), r(7, 3)),
            torch.mm(r(5, 0), r(0, 3)),
            torch.addmm(torch.ones(3), r(5, 0), r(0, 3)),
            torch.bmm(r(0, 5, 7), r(0, 7, 3)),
            functional.linear(r(2, 0, 7), r(3, 7)),
            functional.conv2d(r(0, 2, 4, 4), r(3, 2, 3, 3)),
            torch.mm(torch.zeros(2, 3), r(3, 4)),
        ]

    made, _, seen = emulated(run)
    for x, y in zip(made, run(), strict=True):
        assert x.shape == y.shape
    assert not made[1].any()
    torch.testing.assert_close(made[2], torch.ones(5, 3), rtol=0.05, atol=0)
    assert not made[6].any()
    assert all(not np.isnan(record.sqnr_db or 0.0) for record in seen.report())


CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


@settings(max_examples=40)
@given(
    axes=st.integers(1, 3),
    sizes=st.tuples(*[st.integers(3, 9)] * 3),
    kernel=st.tuples(*[st.integers(1, 3)] * 3),
    stride=st.tuples(*[st.integers(1, 3)] * 3),
    padding=st.tuples(*[st.integers(0, 2)] * 3),
    dilation=st.tuples(*[st.integers(1, 2)] * 3),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_convolutions(axes, sizes, kernel, stride, padding, dilation, groups, bias, seed) -> None:  # type: ignore[no-untyped-def]
    sizes, kernel, stride, padding, dilation = (v[:axes] for v in (sizes, kernel, stride, padding, dilation))
    if any(n + 2 * p < d * (k - 1) + 1 for n, k, p, d in zip(sizes, kernel, padding, dilation, strict=True)):
        return
    torch.manual_seed(seed)
    x, w, b = r(2, 4, *sizes), r(8, 4 // groups, *kernel), r(8) if bias else None

    def run() -> Tensor:
        return CONVOLUTIONS[axes](x, w, b, stride, padding, dilation, groups)

    wanted = run()
    made, found, seen = emulated(run)
    assert len(found) == 1
    near(made, wanted, 0.2)
    assert seen.macs == wanted[:, 0].numel() * w.numel()


@settings(max_examples=60)
@given(
    axes=st.integers(1, 3),
    sizes=st.tuples(*[st.integers(2, 5)] * 3),
    kernel=st.tuples(*[st.integers(1, 4)] * 3),
    stride=st.tuples(*[st.integers(1, 3)] * 3),
    padding=st.tuples(*[st.integers(0, 2)] * 3),
    dilation=st.tuples(*[st.integers(1, 3)] * 3),
    extra=st.tuples(*[st.integers(0, 2)] * 3),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
)
def test_transposed_convolutions(axes, sizes, kernel, stride, padding, dilation, extra, groups, bias) -> None:  # type: ignore[no-untyped-def]
    sizes, kernel, stride, padding, dilation, extra = (
        v[:axes] for v in (sizes, kernel, stride, padding, dilation, extra)
    )
    extra = tuple(min(e, max(s, d) - 1) for e, s, d in zip(extra, stride, dilation, strict=True))
    full = [
        (n - 1) * s + d * (k - 1) + e + 1 - 2 * p
        for n, s, d, k, e, p in zip(sizes, stride, dilation, kernel, extra, padding, strict=True)
    ]
    if min(full) < 1:
        return
    x, w, b = r(2, 4, *sizes), r(4, 6 // groups, *kernel), r(6) if bias else None

    def run() -> Tensor:
        return TRANSPOSED[axes](x, w, b, stride, padding, extra, groups, dilation)

    wanted = run()
    made, found, seen = emulated(run)
    assert len(found) == 1
    # a zero product here is a zero there: positions that no tap reaches hold the bias alone
    near(made, wanted, 0.2)
    assert seen.macs == x.numel() // 4 * w.numel()


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.__name__)
def test_modules_that_torch_fuses(mode: Any) -> None:
    torch.manual_seed(0)
    x = r(2, 5, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    lstm = nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True).eval()
    gru, rnn, cell = nn.GRU(8, 6).eval(), nn.RNN(8, 6, batch_first=True).eval(), nn.LSTMCell(8, 6).eval()
    cases: list[tuple[int, Callable[[], Tensor]]] = [
        (4, lambda: attention(x, x, x)[0]),
        (6, lambda: block(x)),
        (4 * (1 + 5), lambda: lstm(x)[0]),
        (1 + 2, lambda: gru(x)[0]),
        (1 + 5, lambda: rnn(x)[0]),
        (2, lambda: cell(x[0])[0]),
    ]
    with mode():
        for count, run in cases:
            wanted = run()
            made, found, seen = emulated(run)
            assert len(found) == count
            assert not seen.not_emulated
            near(made, wanted)
            # linear layers have their bias in the accumulator, however torch would have added it
            assert sum(t.bias is not None for t in found) == count - 2 * (run in (cases[0][1], cases[1][1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_floats(dtype: torch.dtype) -> None:
    a, b, c = r(5, 40).to(dtype), r(40, 3).to(dtype), r(3).to(dtype)
    x, w = r(1, 2, 5, 5).to(dtype), r(3, 2, 3, 3).to(dtype)
    for run in (lambda: torch.addmm(c, a, b), lambda: torch.bmm(a[None], b[None]), lambda: functional.conv2d(x, w)):
        made, found, seen = emulated(run)
        near(made, run())
        assert len(found) == 1
        assert not seen.not_emulated


def test_float64_operands_are_encoded_and_decoded_exactly() -> None:
    a = torch.tensor([[1 + 2.0**-40, 3.0]], dtype=torch.float64)
    made, found, _ = emulated(lambda: torch.mm(a, torch.eye(2, dtype=torch.float64)))
    t = found[0]
    np.testing.assert_array_equal(made.numpy(), decode(t.result, t.plan.output, t.plan.output_offset, np.float64))


# ---------------------------------------------------------------------------------------------------
# every datapath


def test_the_result_is_the_decoded_words() -> None:
    x, w = r(4, 50), r(50, 6)
    made, found, _ = emulated(lambda: torch.mm(x, w))
    t = found[0]
    np.testing.assert_array_equal(made.numpy(), decode(t.result, t.plan.output, t.plan.output_offset))


@pytest.mark.parametrize("name", named_datapaths())
def test_named_datapaths(name: str) -> None:
    torch.manual_seed(0)
    x, w, b = r(3, 4, 7, 7), r(6, 4, 3, 3), r(6)
    q, k = r(2, 3, 20), r(2, 4, 20)
    emulated(lambda: functional.conv2d(x, w, b, padding=1), name)
    emulated(lambda: q @ k.mT, name)
    emulated(lambda: functional.conv_transpose2d(x, w.transpose(0, 1), b, 2), name)


ACCUMULATORS = [
    LinearAccumulator(24, "bin", 2, 8, lanes=4, psum_bits=20),
    LinearAccumulator(30, "product", 3, 6, overflow="wrap", shift="round", lanes=8),
    LinearAccumulator(12, "product", 0, 0, encoder="mitchell"),
    LinearAccumulator(60, "product", 3, 24, encoder="table", encoder_bits=5, overflow="wrap"),
    LogAccumulator(7),
    LogAccumulator(12, 3, lanes=4),
    LogAccumulator(5, delta=Table(8, 2)),
    LogAccumulator(20, 2),
]


@pytest.mark.parametrize("underflow", ["zero", "min"])
@pytest.mark.parametrize("accumulate", ACCUMULATORS, ids=lambda a: f"{type(a).__name__}-{a.bits}")
@pytest.mark.parametrize("output", ["8:8", "u6:8", "16:8", "3:8"])
def test_accumulators_and_outputs(accumulate: Any, output: str, underflow: str) -> None:
    import dataclasses

    path = dataclasses.replace(
        load_datapath("lns-madam-8"), accumulate=accumulate, output=LNSFormat.parse(output), underflow=underflow
    )
    torch.manual_seed(0)
    x, w, b = r(9, 30) * torch.exp2(4 * r(9, 1)), r(5, 30), r(5)
    emulated(lambda: functional.linear(x, w, b), path)
    emulated(lambda: r(3, 4, 30) @ r(3, 30, 2), path)


@pytest.mark.parametrize("weight", ["4:2", "8:8", "12:128", "16:1024"])
@pytest.mark.parametrize("activation", ["u8:8", "6:4", "16:1024"])
@pytest.mark.parametrize("name", ["elma-8", "gauss-8-guard"])
def test_mixed_formats(weight: str, activation: str, name: str) -> None:
    path = load_datapath(name)
    formats = LNSFormat.parse(weight), LNSFormat.parse(activation)
    path = path.with_formats(*formats)
    x = r(4, 20)
    emulated(lambda: functional.linear(x.abs() if activation[0] == "u" else x, r(3, 20), r(3)), path)


def test_saturated_and_flushed_are_those_of_the_words() -> None:
    path = load_datapath("lns-madam-8").with_formats(LNSFormat(8, 8), LNSFormat(8, 8))
    import dataclasses

    path = dataclasses.replace(path, output=LNSFormat(4, 8))
    x = r(40, 30) * torch.exp2(3 * r(40, 1))
    _, found, seen = emulated(lambda: torch.mm(x, r(30, 7)), path)
    t, record = found[0], seen.report()[0]
    from lnsdeploy.emulator.plan import Counts

    counts = Counts()
    reference.dot(t.a, t.w, t.bias, t.plan, counts)
    assert (counts.words, counts.saturated, counts.flushed) == (record.words, record.saturated, record.flushed)
    assert record.flushed > 0
    for histogram, words, fmt in (
        (record.inputs, t.a, t.plan.activation),
        (record.weights, t.w, t.plan.weight),
        (record.outputs, t.result, t.plan.output),
    ):
        codes, _ = fmt.split(words)
        assert histogram is not None
        assert histogram.zeros == int((codes == 0).sum())
        np.testing.assert_array_equal(histogram.bars, np.bincount(codes.reshape(-1), minlength=fmt.max_code + 1)[1:])


def test_executors_agree() -> None:
    torch.manual_seed(0)
    x, net = r(2, 3, 8, 8), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    with torch.no_grad():
        with lnsdeploy.emulate("gauss-8", executor="cpu") as fast:
            a = net(x)
        with lnsdeploy.emulate("gauss-8", executor="reference") as slow:
            b = net(x)
    assert torch.equal(a, b)
    assert [record.kernel for record in slow.report()] == ["reference"] * 2
    assert all(record.kernel != "reference" for record in fast.report())
    assert [record.sqnr_db for record in slow.report()] == [record.sqnr_db for record in fast.report()]


# ---------------------------------------------------------------------------------------------------
# placing


@pytest.mark.parametrize("name", ["lns-madam-8", "elma-8", "mitchell-8", "gauss-8-guard", "gauss-12"])
@pytest.mark.parametrize("spread_of", [0.0, 6.0])
def test_accumulators_hold_what_is_summed(name: str, spread_of: float) -> None:
    """Whatever the scale, and however rare the large rows: the noise stays that of the format."""
    torch.manual_seed(1)
    limit = {"mitchell-8": 20.0, "gauss-12": 30.0}.get(name, 22.0)
    x = r(600, 64) * torch.exp2(spread_of * r(600, 1))
    x[377] *= 1000
    w = r(64, 32) * torch.exp2(r(1, 32) * 3)
    with lnsdeploy.emulate(name, sqnr="full") as seen:
        torch.mm(x, w)
        torch.mm(x.abs(), w.abs())
        # terms cancel in the end
        torch.mm(torch.cat([x, -x], 1), torch.cat([w, w + 0.1 * r(64, 32)]))
    for record in seen.report()[:2]:
        assert record.sqnr_db is not None
        assert record.sqnr_db > limit
        assert record.saturated == 0


def test_rows_of_a_sample() -> None:
    assert spread(16, 5) == [0, 1, 2, 3, 4]
    found = spread(16, 3136)
    assert len(found) == 16
    assert max(found) < 3136
    assert len({i % 56 for i in found}) > 10


def test_results_do_not_depend_on_what_came_before() -> None:
    torch.manual_seed(0)
    net = nn.Linear(20, 5)
    x, other = r(7, 20), 100 * r(9, 20)
    with torch.no_grad(), lnsdeploy.emulate("lns-madam-8"):
        first = net(x)
        net(other)
        assert torch.equal(net(x), first)


# ---------------------------------------------------------------------------------------------------
# what is refused, and what is listed


def test_arguments_are_checked() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'lns-madam-8'"):
        lnsdeploy.emulate("lns-madam-9")
    with pytest.raises(UnknownNameError, match="executor 'ort'"):
        lnsdeploy.emulate("elma-8", executor="ort")
    with pytest.raises(BadTypeError, match="a datapath, a recipe"):
        lnsdeploy.emulate(8)  # type: ignore[arg-type]
    with pytest.raises(BadTypeError, match=r"model must be a torch\.nn\.Module"):
        lnsdeploy.emulate("elma-8", model=torch.relu)  # type: ignore[arg-type]
    with pytest.raises(BadValueError, match="headroom must be from 0 to 16"):
        lnsdeploy.emulate("elma-8", headroom=-1)
    with pytest.raises(UnknownNameError, match="sqnr"):
        lnsdeploy.emulate("elma-8", sqnr="some")


def test_emulations_do_not_nest() -> None:
    outer = lnsdeploy.emulate("elma-8")
    with outer:
        with pytest.raises(BadValueError, match="do not nest"), lnsdeploy.emulate("gauss-8"):
            pass
        with pytest.raises(BadValueError, match="already active"), outer:
            pass
        torch.mm(r(2, 2), r(2, 2))
    assert len(outer.report()) == 1


def test_bad_numbers_are_named() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    for value, run in ((torch.nan, lambda x: net(x)), (torch.nan, lambda x: torch.bmm(x[None], r(1, 3, 2)))):
        x = r(2, 3)
        x[1, 1] = value
        with pytest.raises(BadValueError, match="NaN"), lnsdeploy.emulate("elma-8"):
            run(x)
    with pytest.raises(BadValueError, match="the first operand of 0 contains NaN"), lnsdeploy.emulate("elma-8"):
        net(torch.full((2, 3), torch.nan))
    path = load_datapath("elma-8").with_formats(LNSFormat(8, 8), LNSFormat(8, 8, False))
    with pytest.raises(BadValueError, match="negative numbers, which the unsigned format u8:8"):
        emulated(lambda: net(r(2, 3)), path)


def test_infinity_is_the_largest_code() -> None:
    x = torch.tensor([[torch.inf, 1.0], [2.0, -torch.inf]])
    made, found, _ = emulated(lambda: torch.mm(x, torch.eye(2)))
    assert torch.isfinite(made).all()
    assert found[0].plan.activation.split(found[0].a)[0].max() == 127


def test_words_are_at_most_16_bits() -> None:
    path = load_datapath("gauss-16").with_formats(LNSFormat(20, 1024), LNSFormat(20, 1024))
    with pytest.raises(UnsupportedError, match="at most 16 bits"):
        emulated(lambda: torch.mm(r(2, 2), r(2, 2)), path)


def test_what_is_not_emulated_is_listed() -> None:
    @torch.library.custom_op("lnstest::fused", mutates_args=())
    def fused(x: Tensor) -> Tensor:
        return x @ x.T

    a = torch.ones(3, 3, dtype=torch.int64)

    def run() -> None:
        a @ a
        torch.mm(r(3, 3).to(torch.complex64), r(3, 3).to(torch.complex64))
        torch.sparse.mm(r(3, 3).to_sparse(), r(3, 3))
        torch.fft.rfft(r(8))
        torch.linalg.inv(torch.eye(3))
        nn.Bilinear(3, 4, 5)(r(2, 3), r(2, 4))
        fused(r(3, 3))
        fused(r(3, 3))

    _, _, seen = emulated(run)
    assert seen.not_emulated["lnstest.fused"] == 2
    assert seen.not_emulated["aten.mm (int64)"] == 1
    assert seen.not_emulated["aten.mm (complex64)"] == 1
    for part in ("sparse", "_fft_r2c", "linalg_inv", "_trilinear"):
        assert any(part in name for name in seen.not_emulated), (part, seen.not_emulated)
    assert "lnstest.fused (2×)" in seen.table()
    assert seen.to_dict()["not_emulated"] == dict(sorted(seen.not_emulated.items()))


def test_quantized_operations_are_listed() -> None:
    if "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch has no quantized engine here")
    linear = torch.ao.nn.quantized.dynamic.Linear(4, 3)
    _, _, seen = emulated(lambda: linear(r(2, 4)))
    assert any("quantized" in name for name in seen.not_emulated)


def test_composite_custom_operators_come_apart() -> None:
    library = torch.library.Library("lnstest2", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x @ x, "CompositeImplicitAutograd")
    for mode in MODES:
        with mode():
            _, found, seen = emulated(lambda: torch.ops.lnstest2.twice(r(3, 3)))
        assert len(found) == 1
        assert not seen.not_emulated


def test_replicas_in_threads_are_refused() -> None:
    net = nn.DataParallel(nn.Linear(2, 2))
    net.device_ids = [0, 1]
    with pytest.raises(UnsupportedError, match="DataParallel"), lnsdeploy.emulate("elma-8"):
        net(r(2, 2))


# ---------------------------------------------------------------------------------------------------
# leaving


def switches() -> list[Any]:
    return [
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch._C._get_mkldnn_enabled(),
        torch.cuda.CUDAGraph.replay,
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
        len(nn.modules.module._global_forward_pre_hooks),
        len(nn.modules.module._global_forward_hooks),
    ]


def test_everything_is_as_it_was() -> None:
    class Failure(Exception):
        pass

    for before in itertools.product([True, False], repeat=2):
        torch.backends.mha.set_fastpath_enabled(before[0])
        torch.backends.cuda.enable_flash_sdp(before[1])
        try:
            found = switches()
            with lnsdeploy.emulate("elma-8"):
                assert switches() != found
            assert switches() == found
            with pytest.raises(Failure), lnsdeploy.emulate("elma-8"):
                raise Failure
            assert switches() == found
            with pytest.raises(BadValueError), lnsdeploy.emulate("elma-8"):
                nn.Linear(2, 2)(torch.full((1, 2), torch.nan))
            assert switches() == found
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
            torch.backends.cuda.enable_flash_sdp(True)
    x = r(4, 4)
    wanted = x @ x
    with lnsdeploy.emulate("elma-8"):
        assert not torch.equal(x @ x, wanted)
    assert torch.equal(x @ x, wanted)


def test_a_decorator() -> None:
    @lnsdeploy.emulate("elma-8")
    def product(a: Tensor, b: Tensor) -> Tensor:
        """Multiply."""
        return a @ b

    a, b = r(3, 30), r(30, 2)
    made = product(a, b)
    near(made, a @ b)
    assert not torch.equal(made, a @ b)
    assert product.__doc__ == "Multiply."
    product(a, b)
    assert [record.calls for record in product.emulation.report()] == [2]  # type: ignore[attr-defined]


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable", lambda: "there is none")
    _, _, seen = emulated(lambda: torch.mm(r(2, 3), r(3, 2)))
    assert seen.report()[0].kernel == "reference"
    from lnsdeploy.emulator import backends

    backends._cpu.cache_clear()
    with pytest.raises(MissingDependencyError, match="executor 'cpu' is not available: there is none"):
        emulated(lambda: torch.mm(r(2, 3), r(3, 2)), executor="cpu")
    with pytest.raises(UnsupportedError, match="does not take tensors on 'cpu'"):
        emulated(lambda: torch.mm(r(2, 3), r(3, 2)), executor="cuda")
