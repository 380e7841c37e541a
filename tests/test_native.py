"""The native library: every kernel of every instruction set against the reference, and its face in Python."""

from __future__ import annotations

import ctypes
import hashlib
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lnsdeploy.datapath import (
    Accumulator,
    Datapath,
    LinearAccumulator,
    LogAccumulator,
    default_adder,
    load_datapath,
    named_datapaths,
)
from lnsdeploy.delta import Exact, Max, Mitchell, Table
from lnsdeploy.emulator import cpu, native, operands, reference
from lnsdeploy.emulator.plan import AddPlan, Counts, DotPlan, PoolPlan, RescalePlan, Window
from lnsdeploy.errors import BadTypeError, BadValueError, MissingDependencyError, UnsupportedError
from lnsdeploy.exporters.placement import place_dot
from lnsdeploy.formats import LNSFormat, calibrate, decode, encode, random_bytes

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"no native library: {native.unavailable()}")
ISAS = native.isas() if native.unavailable() is None else []
BYTE, WORD = LNSFormat(8, 8), LNSFormat(16, 1024)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Any:
    """Every instruction set of the machine, forced."""
    with native.forced_isa(request.param):
        yield request.param


def path_of(fmt: LNSFormat, accumulate: Accumulator) -> Datapath:
    return Datapath("test", fmt, fmt, fmt, accumulate, default_adder(fmt))


@cache
def placed(path: Datapath, shape: tuple[int, int, int], seed: int = 0, headroom: float = 1.0) -> tuple[Any, ...]:
    """A plan as lowering places it, words of activations and weights, with an offset per channel, and a bias."""
    rows, channels, depth = shape
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((max(rows, 2), depth)), rng.standard_normal((channels, depth))
    bias = rng.standard_normal(channels)
    a = calibrate(x, path.activation) if depth else 0
    b = calibrate(w, path.weight, axis=0) if depth else 0
    o = calibrate(x @ w.T + bias, path.output)
    words = encode(x, path.activation, a, negative="clip")
    weights = encode(w, path.weight, b, axis=0 if depth else None, negative="clip")
    plan = DotPlan(path, path.activation, path.weight, path.output, a, b, o)
    plan, start = place_dot(plan, words, weights, bias, headroom)
    return plan, words[:rows], weights, start


_expected: dict[bytes, tuple[Any, Counts]] = {}


def expected(plan: DotPlan, a: Any, w: Any, bias: Any) -> tuple[Any, Counts]:
    """Words and counts of the reference: slow, and the same for every instruction set."""
    key = hashlib.sha256(pickle.dumps((plan, a, w, bias))).digest()
    if key not in _expected:
        counts = Counts()
        _expected[key] = reference.dot(a, w, bias, plan, counts), counts
    return _expected[key]


def same(plan: DotPlan, a: Any, w: Any, bias: Any) -> native.NativeDot:
    """The layer, after its words and counts were found to be the reference's on one and on three threads."""
    want, want_counts = expected(plan, a, w, bias)
    layer = native.NativeDot(plan, w, bias)
    for threads in (1, 3):
        counts = Counts()
        np.testing.assert_array_equal(layer.dot(a, counts, threads), want)
        assert counts == want_counts
    return layer


# kernel: format, accumulator, rows
KERNELS: dict[str, tuple[LNSFormat, Accumulator]] = {
    "fp32-wrap": (BYTE, LinearAccumulator(24, table_bits=3, overflow="wrap")),
    "fp32-wrap, 16 bits": (WORD, LinearAccumulator(32, table_bits=10, constant_bits=10, overflow="wrap")),
    "fp32-saturate": (BYTE, LinearAccumulator(24, table_bits=3)),
    "fp32-saturate, 16 bits": (WORD, LinearAccumulator(24, table_bits=10, constant_bits=10)),
    "fp32-lanes": (BYTE, LinearAccumulator(22, table_bits=3, lanes=5, psum_bits=20)),
    "fp32-wide": (BYTE, LinearAccumulator(44, table_bits=3, overflow="wrap")),
    "fp64-wrap": (WORD, LinearAccumulator(44, table_bits=10, constant_bits=16, overflow="wrap")),
    "fp64-saturate": (WORD, LinearAccumulator(40, table_bits=10, constant_bits=16)),
    "fp64-saturate, 8 bits": (BYTE, LinearAccumulator(38, table_bits=3)),
    "fp64-lanes": (WORD, LinearAccumulator(40, table_bits=10, constant_bits=16, lanes=5, psum_bits=37)),
    "fp32-wide, two parts": (BYTE, LinearAccumulator(38, table_bits=3, constant_bits=5, overflow="wrap")),
    "fp32-wide, exact encoder": (BYTE, LinearAccumulator(35, table_bits=3, constant_bits=2, overflow="wrap")),
    "fp32-wrap, unsigned": (LNSFormat(8, 8, False), LinearAccumulator(24, table_bits=3, overflow="wrap")),
    "fp32-wrap, coarse": (LNSFormat(7, 2), LinearAccumulator(32, table_bits=1, overflow="wrap")),
    "mitchell-wrap": (BYTE, LinearAccumulator(24, overflow="wrap")),
    "mitchell-saturate": (BYTE, LinearAccumulator(24)),
    "mitchell-lanes": (BYTE, LinearAccumulator(22, lanes=4)),
    "gather-wrap": (BYTE, LinearAccumulator(30, table_bits=3, overflow="wrap", shift="round")),
    "gather-saturate": (BYTE, LinearAccumulator(24, table_bits=2)),
    "gather-lanes": (BYTE, LinearAccumulator(24, table_bits=3, lanes=3, shift="round")),
    "gather-wrap, 16 bits": (WORD, LinearAccumulator(32, table_bits=4, overflow="wrap")),
    "bins-saturate": (BYTE, LinearAccumulator(24, conversion="bin", table_bits=3)),
    "bins-wrap": (BYTE, LinearAccumulator(20, conversion="bin", table_bits=2, overflow="wrap")),
    # one bin: its constant is divided into the thresholds, whatever takes the logarithm
    "mitchell-saturate, one bin": (BYTE, LinearAccumulator(24, conversion="bin", table_bits=0)),
    "mitchell-wrap, one bin": (
        BYTE,
        LinearAccumulator(20, conversion="bin", table_bits=0, constant_bits=3, overflow="wrap", encoder="mitchell"),
    ),
    "bins-saturate, two": (BYTE, LinearAccumulator(18, conversion="bin", table_bits=1)),
    "general": (BYTE, LinearAccumulator(50, table_bits=2)),
    "general, psum": (BYTE, LinearAccumulator(24, table_bits=3, overflow="wrap", psum_bits=12, lanes=2)),
    "bins-saturate, sixteen": (LNSFormat(8, 16), LinearAccumulator(20, conversion="bin", table_bits=4)),
    "bins-saturate, 16 bits": (WORD, LinearAccumulator(24, conversion="bin", table_bits=3)),
    "bins-lanes": (BYTE, LinearAccumulator(24, conversion="bin", table_bits=3, lanes=4)),
    "bins-lanes, psum": (BYTE, LinearAccumulator(20, conversion="bin", table_bits=2, lanes=40, psum_bits=16)),
    "general, bins": (
        BYTE,
        LinearAccumulator(24, conversion="bin", table_bits=3, lanes=4, overflow="wrap", psum_bits=20),
    ),
    "log8": (BYTE, LogAccumulator(7)),
    "log8, five bits": (BYTE, LogAccumulator(5, delta=Mitchell())),
    "log16": (WORD, LogAccumulator(15, delta=Table(20, 512))),
    "log16, middle": (WORD, LogAccumulator(15, delta=Table(40, 256, "middle"))),
    "log16, max": (WORD, LogAccumulator(15, delta=Max())),
    "log16, guard": (BYTE, LogAccumulator(11, 1, delta=Table(12, 4))),
    "log16-gather": (WORD, LogAccumulator(15)),
    "log16-gather, stepped": (WORD, LogAccumulator(15, delta=Table(1024, 16))),
    "log16-gather, guard": (BYTE, LogAccumulator(12, 3)),
    "log32": (WORD, LogAccumulator(16, 1)),
    "log32, lanes": (BYTE, LogAccumulator(10, 1, lanes=7)),
    "log-general": (BYTE, LogAccumulator(33, delta=Exact())),
}
ON_VECTORS = {"log8", "log16", "log16-gather"}


@pytest.mark.parametrize("rows", [37, 260])
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel(isa: str, name: str, rows: int) -> None:
    """spec 3 to 5: each kernel is chosen for what it is made for, and gives the reference's words and counts.

    From some rows on, narrow activations take other kernels; sizes are odd on purpose.
    """
    fmt, accumulate = KERNELS[name]
    for headroom in (1.0, -2.0):
        plan, a, w, bias = placed(path_of(fmt, accumulate), (rows, 35, 41), headroom=headroom)
        layer = same(plan, a, w, bias)
        wanted = name.partition(",")[0]
        if headroom > 0 and not (wanted in ON_VECTORS and isa == "portable"):
            assert layer.kernel == f"{wanted} {isa}"
        same(plan, a, w, None)


@pytest.mark.parametrize("name", named_datapaths())
@pytest.mark.parametrize(
    "shape", [(3, 5, 300), (1, 1, 5000), (0, 4, 3), (4, 0, 3), (5, 3, 0), (300, 3, 2), (1, 70, 9)], ids=str
)
def test_named_datapaths(isa: str, name: str, shape: tuple[int, int, int]) -> None:
    """spec 8: shapes with zeros and ones, and a depth of 5000."""
    same(*placed(load_datapath(name), shape))


@pytest.mark.parametrize(
    "name", ["fp32-saturate", "fp32-lanes", "mitchell-saturate", "gather-saturate", "bins-saturate"]
)
@pytest.mark.parametrize("rows", [4, 200])
def test_saturation_at_every_step(isa: str, name: str, rows: int) -> None:
    """spec 4.4: sums that leave the range again and again, in both directions, and come back."""
    fmt, accumulate = KERNELS[name]
    rng = np.random.default_rng(1)
    a = (rng.integers(100, 128, (rows, 60)) | (rng.integers(0, 2, (rows, 60)) << 7)).astype(np.uint8)
    w = rng.integers(100, 128, (9, 60)).astype(np.uint8)
    assert isinstance(accumulate, LinearAccumulator)
    for lsb in (6, 8, 9, 12):
        plan = DotPlan(path_of(fmt, accumulate), fmt, fmt, fmt, 0, 0, 130, lsb=lsb)
        same(plan, a, w, rng.integers(-(1 << 22), 1 << 22, 9))


@pytest.mark.parametrize(
    "name", ["log8", "log16, guard", "log16-gather, guard", "log32, lanes", "fp32-wrap", "bins-saturate"]
)
def test_cancellation_and_zeros(isa: str, name: str) -> None:
    """spec 5.2: equal codes of different signs, zeros between them, sums of exactly zero."""
    fmt, accumulate = KERNELS[name]
    rng = np.random.default_rng(2)
    a = (rng.integers(60, 66, (50, 64)) | (rng.integers(0, 2, (50, 64)) << 7)).astype(np.uint8)
    a[rng.random(a.shape) < 0.3] = rng.choice([0, 128])
    w = (rng.integers(60, 63, (33, 64)) | (rng.integers(0, 2, (33, 64)) << 7)).astype(np.uint8)
    w[rng.random(w.shape) < 0.3] = 128
    a[:, 1::2], w[:, 1::2] = a[:, ::2] ^ 128, w[:, ::2]
    changes = {"lsb": 10} if isinstance(accumulate, LinearAccumulator) else {"acc_offset": 60 - 2 * accumulate.bits}
    same(DotPlan(path_of(fmt, accumulate), fmt, fmt, fmt, 0, 0, 60, **changes), a, w, None)


@pytest.mark.parametrize("name", ["elma-8", "gauss-8", "lns-madam-8", "mitchell-8", "max-plus-8", "gauss-8-guard"])
def test_all_pairs_of_words(isa: str, name: str) -> None:
    """spec 3.1: all 65,536 pairs of 8-bit words as products of depth one."""
    path = load_datapath(name)
    words = np.arange(256, dtype=np.uint8).reshape(-1, 1)
    for lsb, acc_offset in ((0, 40), (12, 100), (-4, 90)):
        plan = DotPlan(path, BYTE, BYTE, BYTE, 0, 0, 60)
        plan = replace(plan, lsb=lsb) if path.is_linear else replace(plan, acc_offset=acc_offset)
        same(plan, words, words, None)


def test_strides_and_alignment(isa: str) -> None:
    """Activations of any layout are read as they are."""
    plan, a, w, bias = placed(load_datapath("elma-8"), (20, 9, 30))
    layer = native.NativeDot(plan, w, bias)
    want = layer.dot(a)
    wide = np.zeros((20, 67), dtype=np.uint8)
    wide[:, 3:63:2] = a
    for view in (wide[:, 3:63:2], np.asfortranarray(a), a[::-1][::-1], np.repeat(a, 2, axis=0)[::2]):
        np.testing.assert_array_equal(layer.dot(view), want)
    np.testing.assert_array_equal(layer.dot(a[:, ::-1][:, ::-1]), want)
    np.testing.assert_array_equal(layer.dot(np.broadcast_to(a[0], (7, 30))), np.tile(want[0], (7, 1)))
    plan, a, w, bias = placed(load_datapath("gauss-16"), (4, 3, 6))
    odd = np.frombuffer(b"\0" + a.tobytes(), dtype=np.uint16, offset=1).reshape(a.shape)
    layer = native.NativeDot(plan, w, bias)
    np.testing.assert_array_equal(layer.dot(odd), layer.dot(a))


@given(st.data())
@settings(max_examples=60)
def test_convolutions(data: st.DataObject) -> None:
    """spec 7.1: any geometry, on many images, so that narrow activations take the kernels of many rows."""
    axes = data.draw(st.integers(1, 3))
    kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(axes))
    window = Window(
        kernel,
        tuple(data.draw(st.integers(1, 2)) for _ in range(axes)),
        tuple(data.draw(st.integers(0, 2)) for _ in range(2 * axes)),
        tuple(data.draw(st.integers(1, 2)) for _ in range(axes)),
    )
    groups, inputs, outputs = (data.draw(st.integers(1, 3)) for _ in range(3))
    sizes = tuple(data.draw(st.integers(5, 7)) for _ in range(axes))
    path = load_datapath(data.draw(st.sampled_from(["elma-8", "gauss-8", "lns-madam-8", "mitchell-8", "gauss-16"])))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    bits, gamma = path.activation.bits, path.gamma
    x = rng.integers(0, 1 << bits, (2, groups * inputs, *sizes)).astype(path.activation.dtype)
    w = rng.integers(0, 1 << bits, (groups * outputs, inputs, *kernel)).astype(path.weight.dtype)
    plan = DotPlan(path, path.activation, path.weight, path.output, 0, 0, 15 * gamma)
    plan = replace(plan, lsb=8) if path.is_linear else replace(plan, acc_offset=14 * gamma)
    want = reference.convolution(x, w, None, plan, window, groups)
    layer = native.NativeDot(plan, w, None, groups)
    np.testing.assert_array_equal(layer.convolution(x, window), want)


def test_large_convolutions_do_not_copy_windows() -> None:
    """Memory stays within twice inputs, weights and outputs: no copy of K times the input is made."""
    code = """
import resource, numpy as np
from dataclasses import replace
from lnsdeploy.datapath import load_datapath
from lnsdeploy.emulator import native
from lnsdeploy.emulator.plan import DotPlan, Window
path = load_datapath("elma-8")
x = np.random.default_rng(0).integers(0, 256, (4, 32, 224, 224)).astype(np.uint8)
w = np.random.default_rng(1).integers(0, 256, (4, 32, 5, 5)).astype(np.uint8)
layer = native.NativeDot(DotPlan(path, path.activation, path.weight, path.output, 0, 0, 120, lsb=8), w)
layer.convolution(x[:, :, :30, :30], Window((5, 5)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = layer.convolution(x, Window((5, 5), pads=(2, 2, 2, 2)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, x.nbytes + w.nbytes + y.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, all_of_it = map(int, done.stdout.split())
    assert grown < 2 * all_of_it


@pytest.mark.parametrize(
    "fmt", [LNSFormat(8, 8), LNSFormat(5, 2, False), LNSFormat(16, 1024), LNSFormat(12, 100)], ids=str
)
@pytest.mark.parametrize("underflow", ["zero", "min"])
def test_encode_and_decode(fmt: LNSFormat, underflow: Any) -> None:
    """spec 2.1, 2.4, 2.5: at every bound, one float below and above, at zeros, infinities and subnormal numbers."""
    for offset in (0, -fmt.max_code // 2, -140 * fmt.gamma, 120 * fmt.gamma):
        bounds = operands.encode_thresholds(fmt, offset, underflow)
        bounds = bounds[np.isfinite(bounds)]
        values = np.concatenate(
            [
                bounds,
                np.nextafter(bounds, np.float32(0)),
                np.nextafter(bounds, np.float32(np.inf)),
                np.array([0, 1e-45, 1e-38, 3e38, np.inf], dtype=np.float32),
            ]
        ).astype(np.float32)
        values = np.concatenate([values, -values])
        want = encode(values, fmt, offset, underflow=underflow, negative="clip")
        np.testing.assert_array_equal(native.encode(values, fmt, offset, underflow), want)
        words = np.arange(1 << fmt.bits).astype(fmt.dtype)
        got, exact = native.decode(words, fmt, offset), decode(words, fmt, offset)
        np.testing.assert_array_equal(got.view(np.uint32), exact.view(np.uint32))
    with pytest.raises(BadValueError, match="NaN"):
        native.encode(np.array([1, np.nan], dtype=np.float32), fmt, 0)


def test_broadcast_sums() -> None:
    """spec 6.4: operands of other shapes are repeated, in any layout."""
    rng = np.random.default_rng(3)
    plan = AddPlan(LogAccumulator(12, 3), BYTE, BYTE, BYTE, 3, -2, 1, -4)
    a = rng.integers(0, 256, (3, 1, 5, 2)).astype(np.uint8)
    for shape in ((4, 1, 2), (1,), (), (3, 4, 5, 2)):
        b = rng.integers(0, 256, shape).astype(np.uint8)
        counts, want_counts = Counts(), Counts()
        np.testing.assert_array_equal(native.add(a, b, plan, counts), reference.add(a, b, plan, want_counts))
        assert counts == want_counts
    t = a.transpose(2, 3, 0, 1)
    np.testing.assert_array_equal(native.add(t, t[::-1], plan), reference.add(t, t[::-1], plan))


@pytest.mark.parametrize("other", [BYTE, LNSFormat(6, 8, False)], ids=str)
def test_so_many_sums_that_each_pair_is_added_once(other: LNSFormat) -> None:
    """spec 6.4: from 2^17 sums of narrow words on, words and counts come from a table of all pairs; here every pair."""
    plan = AddPlan(LogAccumulator(9, 2), BYTE, other, LNSFormat(7, 8), 3, -2, 40, -4)
    a, b = np.arange(256, dtype=np.uint8)[:, None], np.arange(1 << other.bits, dtype=np.uint8)
    copies = -(-(1 << 17) // (a.size * b.size))
    one, counts = Counts(), Counts()
    want = reference.add(a, b, plan, one)
    assert min(one.saturated, one.negative, one.flushed) > 0
    found = native.add(np.broadcast_to(a, (copies, *a.shape)), b, plan, counts)
    np.testing.assert_array_equal(found, np.broadcast_to(want, found.shape))
    parts = (one.words, one.saturated, one.flushed, one.negative)
    assert counts == Counts(*(copies * part for part in parts))


def test_scalars_and_far_offsets() -> None:
    """Arrays without axes keep their shape; offsets up to the limit of 32 bits (spec 6.3)."""
    word = np.array(200, dtype=np.uint8)
    assert native.relu(word, BYTE).shape == native.decode(word, BYTE, 0).shape == ()
    assert native.encode(np.float32(1.5), BYTE, 0).shape == ()
    words = np.arange(256, dtype=np.uint8)
    for offset in ((1 << 31) - 1, -(1 << 31) + 1):
        for to in (LNSFormat(8, 1), LNSFormat(12, 64)):
            change = RescalePlan(BYTE, to, offset, offset // 8 * to.gamma)
            np.testing.assert_array_equal(native.rescale(words, change), reference.rescale(words, change))


def test_many_callers_at_once() -> None:
    """Layers are immutable: concurrent runs, on several threads each, give the words of one."""
    plan, a, w, bias = placed(load_datapath("gauss-8"), (90, 20, 50))
    layer = native.NativeDot(plan, w, bias)
    want = layer.dot(a)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda i: layer.dot(a, None, i % 4 + 1), range(64)):
            np.testing.assert_array_equal(got, want)


def test_a_forked_child_computes() -> None:
    """Threads do not survive a fork; the child gets its own."""
    code = """
import os, numpy as np
from lnsdeploy.datapath import load_datapath
from lnsdeploy.emulator import native
from lnsdeploy.emulator.plan import DotPlan
path = load_datapath("elma-8")
a = np.random.default_rng(0).integers(0, 256, (99, 40)).astype(np.uint8)
layer = native.NativeDot(DotPlan(path, path.activation, path.weight, path.output, 0, 0, 90, lsb=5), a[:9])
want = layer.dot(a, None, 4)
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(layer.dot(a, None, 4), want) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---------------------------------------------------------------------------------------------------------------------
# The face in Python


def test_what_does_not_fit_is_told() -> None:
    plan, a, w, bias = placed(load_datapath("elma-8"), (4, 3, 6))
    layer = native.NativeDot(plan, w, bias)
    with pytest.raises(BadTypeError, match="words of 8:8 are uint8, not uint16"):
        layer.dot(a.astype(np.uint16))
    with pytest.raises(BadValueError, match=r"activations \[M, 6\], not \(4, 5\)"):
        layer.dot(a[:, :5])
    with pytest.raises(BadValueError, match="threads must be at least 1"):
        layer.dot(a, None, -1)
    with pytest.raises(BadValueError, match=r"bias for 3 output channels has shape \(2,\)"):
        native.NativeDot(plan, w, bias[:2])
    with pytest.raises(BadValueError, match="does not fit"):
        layer.convolution(a.reshape(1, 4, 6), Window((6,)))
    wide = LNSFormat(20, 8)
    with pytest.raises(UnsupportedError, match="at most 16 bits"):
        native.relu(np.zeros(3, dtype=wide.dtype), wide)
    with (
        pytest.raises(UnsupportedError, match="instruction set"),
        native.forced_isa("neon" if "neon" not in ISAS else "avx2"),
    ):
        pass


def test_what_the_library_does_not_hold_is_left_to_the_reference() -> None:
    """Formats above 16 bits run, by the reference."""
    wide = LNSFormat(20, 8)
    path = replace(path_of(wide, LogAccumulator(22)), activation=wide)
    plan, a, w, bias = placed(path, (4, 3, 6))
    with pytest.raises(UnsupportedError):
        native.NativeDot(plan, w, bias)
    np.testing.assert_array_equal(cpu.dot(a, w, bias, plan), reference.dot(a, w, bias, plan))
    pool = PoolPlan(LogAccumulator(22), wide, wide, 0, 0, 0)
    x = a.reshape(1, 2, -1)
    np.testing.assert_array_equal(
        cpu.average_pool(x, pool, Window((2,))), reference.average_pool(x, pool, Window((2,)))
    )
    change = RescalePlan(wide, BYTE, 0, 5)
    np.testing.assert_array_equal(cpu.rescale(a, change), reference.rescale(a, change))


def test_threads_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.THREADS_VARIABLE, "3")
    assert native.threads() == 3
    for bad in ("0", "-1", "many", "4096", "1.5"):
        monkeypatch.setenv(native.THREADS_VARIABLE, bad)
        with pytest.raises(BadValueError, match="LNSDEPLOY_THREADS must be an integer"):
            native.threads()
    monkeypatch.delenv(native.THREADS_VARIABLE)
    assert native.threads() >= 1


def test_a_missing_library_says_what_it_costs(tmp_path: Any) -> None:
    """Without the library: `info` says why, `cpu` refuses, the reference runs."""
    code = """
from lnsdeploy.emulator import native
from lnsdeploy.emulator.executor import availability
from lnsdeploy.errors import MissingDependencyError
why = native.unavailable()
assert why and "install lnsdeploy again" in why, why
assert availability()["reference"] is None and availability()["cpu"] == why
try:
    native.isa()
except MissingDependencyError as error:
    assert str(error) == why
else:
    raise AssertionError("no error")
"""
    for content in (None, b"not a library"):
        path = tmp_path / "library.so"
        if content is not None:
            path.write_bytes(content)
        import os

        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"LNSDEPLOY_LIBRARY": str(path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The C interface itself refuses what Python never sends


def raw(**changes: Any) -> Any:
    """A description of a small linear layer, with changes."""
    plan, _, w, _ = placed(load_datapath("elma-8"), (4, 3, 6))
    made = operands.linear_tables(plan, 3, None)
    terms = made["terms"].astype(np.int64)
    keep = {key: np.ascontiguousarray(value) for key, value in made.items()} | {"terms": terms, "w": w}
    desc = native._DotDesc(
        activation=native._Format(8, 1),
        weight=native._Format(8, 1),
        activation_widen=1,
        weight_widen=1,
        output=native._Output(native._Format(8, 1), 0),
        groups=1,
        channels=3,
        depth=6,
        weight_words=keep["w"].ctypes.data,
        lanes=1,
        acc_bits=38,
        psum_bits=38,
        terms=terms.ctypes.data,
        terms_are_64=1,
        bins=1,
        term_columns=terms.shape[1],
        constants=keep["constants"].ctypes.data,
        thresholds=keep["thresholds"].ctypes.data,
        threshold_count=len(keep["thresholds"]),
        code_shift=keep["code_shift"].ctypes.data,
    )
    for key, value in changes.items():
        setattr(desc, key, value)
    return desc, keep


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 0}, "lanes must be 1 to 1024, not 0"),
        ({"acc_bits": 63}, "acc_bits must be 2 to 62"),
        ({"psum_bits": 1}, "psum_bits must be 2 to 62"),
        ({"bins": 0}, "bins must be 1 to 65536"),
        ({"groups": 2}, "3 channels do not divide into 2 groups"),
        ({"term_columns": 12}, "terms have 12 columns; code sums up to 254 need 255"),
        ({"activation": native._Format(17, 1)}, "activations: bits must be 2 to 16, not 17"),
        ({"weight": native._Format(8, 2)}, "weights: signed must be 0 or 1"),
        ({"output": native._Output(native._Format(1, 1), 0)}, "output: bits must be 2 to 16"),
        ({"weight_widen": 0}, "weight_widen must be 1"),
        ({"depth": -1}, "depth must be 0"),
        ({"weight_words": None}, "weight_words is missing"),
        ({"code_shift": None}, "code_shift is missing"),
        ({"terms": None}, "terms is missing"),
        ({"log": 1, "acc_bits": 12}, "entry_shift is missing"),
        ({"log": 2}, "log must be 0 to 1"),
    ],
)
def test_the_c_interface_checks(changes: dict[str, Any], message: str) -> None:
    desc, keep = raw(**changes)
    handle = ctypes.c_void_p()
    with pytest.raises(BadValueError, match=message):
        native._call("lns_dot_create", ctypes.byref(desc), ctypes.byref(handle))
    assert not handle.value
    assert keep


def test_a_missing_dependency_is_an_import_error() -> None:
    assert issubclass(MissingDependencyError, ImportError)


# ---------------------------------------------------------------------------------------------------
# encoding at offsets that change, and histograms


@pytest.mark.parametrize("underflow", ["zero", "min"])
@pytest.mark.parametrize("text", ["2:1", "6:3", "8:8", "u8:8", "u5:2", "16:1024", "13:7", "16:16384"])
def test_encode_channels(text: str, underflow: str) -> None:
    fmt = LNSFormat.parse(text)
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 300)) * np.exp2(rng.integers(-30, 30, (64, 1)))).astype(np.float32)
    x[3, :9] = [0, -0.0, 1e-45, -1e-45, 1e-40, np.inf, -np.inf, 3e38, -1]
    # the floats around every bound of an octave, among them subnormal ones
    octave = (1 << 23) + native.octave_bounds(fmt.gamma)[: x.shape[1] // 3].astype(np.float64)
    for row, power in ((5, -23), (6, -163), (7, 90)):
        bounds = np.ldexp(octave, power).astype(np.float32)
        around = np.concatenate([bounds, np.nextafter(bounds, np.float32(0)), np.nextafter(bounds, np.float32(np.inf))])
        x[row, : len(around)] = around
    if not fmt.signed:
        x = np.abs(x)
    offsets = rng.integers(-200, 100, 64) * max(fmt.gamma // 3, 1)
    counts = np.zeros(1 << fmt.bits, dtype=np.int64)
    words = native.encode_channels(x, fmt, offsets, underflow, counts)
    wanted = encode(x, fmt, offsets, axis=0, underflow=underflow)  # type: ignore[arg-type]
    np.testing.assert_array_equal(words, wanted)
    np.testing.assert_array_equal(counts, np.bincount(words.reshape(-1), minlength=1 << fmt.bits))
    np.testing.assert_array_equal(native.histogram(words, fmt.bits), counts)
    one = native.encode_channels(x, fmt, 7, underflow)
    np.testing.assert_array_equal(one, encode(x, fmt, 7, underflow=underflow))  # type: ignore[arg-type]


def test_encode_channels_of_far_offsets_nan_and_negative_numbers() -> None:
    fmt = LNSFormat(8, 8)
    x = np.array([[1.0, -2.0, np.nan]] * 2, dtype=np.float32)
    words = native.encode_channels(x, fmt, np.array([-(1 << 40), 1 << 40]))
    np.testing.assert_array_equal(words, [[127, 255, 0], [0, 0, 0]])
    unsigned = LNSFormat(8, 8, signed=False)
    assert native.encode_channels(x[:1], unsigned, -20)[0, 1] == 0
    assert native.encode_channels(x[:1], unsigned, -20, "min")[0, 1] == 1
    assert native.encode_channels(x[:0], fmt, np.zeros(0, dtype=np.int64)).shape == (0, 3)


def test_encode_channels_and_histogram_refuse() -> None:
    x = np.ones((2, 3), dtype=np.float32)
    fmt = LNSFormat(8, 8)
    with pytest.raises(BadValueError, match="do not fit the first axis"):
        native.encode_channels(x, fmt, np.zeros(3, dtype=np.int64))
    with pytest.raises(BadValueError, match=r"a histogram of 8:8 is int64 \[256\]"):
        native.encode_channels(x, fmt, 0, "zero", np.zeros(255, dtype=np.int64))
    with pytest.raises(UnsupportedError, match="gammas up to 16384"):
        native.encode_channels(x, LNSFormat(16, 1 << 15), 0)
    with pytest.raises(BadValueError, match="bits must be 1 to 16"):
        native.histogram(np.zeros(3, dtype=np.uint8), 0)
    with pytest.raises(BadTypeError, match="uint8 or uint16"):
        native.histogram(np.zeros(3, dtype=np.int64), 8)


def test_decode_by_encode() -> None:
    table = np.arange(256, dtype=np.float32)
    words = np.random.default_rng(0).integers(0, 256, (3, 50)).astype(np.uint8)
    np.testing.assert_array_equal(native.decode_by(words, table), words.astype(np.float32))


@pytest.mark.parametrize(
    ("start", "count"), [(0, 1), (0, 4096), (5, 11), (7, 300), (16, 256), (31, 33000), (1 << 37, 50)]
)
def test_random_bytes_are_those_of_the_formats(start, count):
    for seed, stream in ((0, 0), (-3, 1), ((1 << 64) - 1, 1 << 63), (123456789123, 77)):
        expected = random_bytes(seed, stream, count, start)
        assert np.array_equal(native.random_bytes(seed, stream, count, start, 2), expected)


def floats_for_a_step(count: int, seed: int) -> tuple[Any, Any, Any]:
    """Weights with zeros, gradients with zeros of both signs, and second moments down to none."""
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal(count) * rng.choice([0, 1e-3, 1.0], count)).astype(np.float32)
    grad = (rng.standard_normal(count) * rng.choice([0, 1e-9, 1, 30.0], count)).astype(np.float32)
    moment = (rng.random(count) ** 6 * rng.choice([0, 1.0], count, p=[0.1, 0.9])).astype(np.float32)
    return weight, grad, moment


def shrinkage(sign: Any, grad: Any, moment: Any, limits: tuple[float, float, float]) -> Any:
    least, rate, bound = (np.float32(x) for x in limits)
    with np.errstate(over="ignore"):
        return np.clip(rate * (grad / np.float32(1) * (1 / np.sqrt(np.maximum(moment, least)))) * sign, -bound, bound)


def turned(sign: Any, below: Any, grad: Any, flip: bool, ascend: bool) -> Any:
    against = np.sign(grad) if ascend else -np.sign(grad)
    return np.where(sign == 0, against, np.where(below & flip, -sign, sign))


@pytest.mark.parametrize("count", [1, 7, 64, 1001, 40003])
@pytest.mark.parametrize(
    ("flip", "ascend", "spread"), [(False, False, False), (True, True, True), (True, False, False)]
)
def test_steps_of_madam_round_as_numpy_does(isa, count, flip, ascend, spread):
    weight, grad, moment = floats_for_a_step(count, count)
    limits = (1e-12, -0.05, 0.4)
    x, y = np.empty_like(weight), np.empty_like(weight)
    native.madam_octaves(
        count, weight.ctypes.data, grad.ctypes.data, moment.ctypes.data, limits, x.ctypes.data, threads=2
    )
    sign = np.sign(weight)
    assert np.array_equal(x, shrinkage(sign, grad, moment, limits))
    factor = np.exp2(x)
    high = np.linspace(0.5, 2, count if spread else 1, dtype=np.float32)
    low = high * np.float32(2**-10)
    size = np.abs(weight) * factor
    expected = np.clip(size, low, high) * turned(sign, size < low, grad, flip, ascend)
    where = (weight.ctypes.data, grad.ctypes.data, factor.ctypes.data)
    found = native.madam_move(count, *where, (low, high), y.ctypes.data, flip=flip, ascend=ascend, threads=2)
    assert np.array_equal(y.view(np.int32), expected.view(np.int32))
    assert found == (size >= high).sum()


@pytest.mark.parametrize("count", [1, 7, 64, 1001, 40003])
@pytest.mark.parametrize(("bits", "drop"), [(2, 0), (8, 0), (12, 4), (16, 0), (16, 8)])
@pytest.mark.parametrize(
    ("stochastic", "flip", "ascend", "spread"), [(True, False, False, True), (False, True, True, False)]
)
def test_steps_of_codes_are_exact(isa, count, bits, drop, stochastic, flip, ascend, spread):
    _, grad, moment = floats_for_a_step(count, bits)
    rng = np.random.default_rng(count)
    top = (1 << (bits - 1)) - 1
    codes = (rng.integers(-top, top + 1, count) * rng.choice([0, 1], count, p=[0.1, 0.9])).astype(np.int16)
    random = rng.integers(0, 256, count).astype(np.uint8) if stochastic else None
    parts = 256 if stochastic else 1
    limits = (1e-12, parts * 3.7, float(parts * top))
    table = np.exp2(np.arange(top + 40) / 1024).astype(np.float32)
    bases = rng.integers(-1, 40, count if spread else 1)
    sign, before = np.sign(codes).astype(np.float32), np.abs(codes.astype(np.int64))
    steps = np.rint(shrinkage(sign, grad, moment, limits)).astype(np.int64)
    if random is not None:
        steps = (steps + random) >> 8
    size = before - steps
    sign = turned(sign, size < 1, grad, flip, ascend)
    size = np.clip(size, 1, top)
    half = 1 << drop >> 1
    upper = np.clip((size + half) >> drop, 1, top >> drop) << drop
    y, made = np.empty_like(grad), codes.copy()
    found = native.madam_codes(
        made,
        grad.ctypes.data,
        moment.ctypes.data,
        limits,
        random,
        (bits, drop),
        table,
        bases,
        y.ctypes.data,
        flip=flip,
        ascend=ascend,
        threads=2,
    )
    assert np.array_equal(made, size * sign)
    expected = table[upper + bases] * sign
    assert np.array_equal(y.view(np.int32), expected.astype(np.float32).view(np.int32))
    assert found == (size == top).sum()


def test_steps_of_codes_refuse_what_leads_out_of_the_table():
    grad = np.ones(4, dtype=np.float32)
    where = (grad.ctypes.data, grad.ctypes.data, (1.0, 1.0, 7.0), None)

    def call(codes: Any, width: tuple[int, int], entries: int, bases: Any) -> None:
        table = np.ones(entries, dtype=np.float32)
        native.madam_codes(codes, *where, width, table, bases, grad.ctypes.data, flip=False, ascend=False, threads=1)

    codes = np.ones(4, dtype=np.int16)
    for entries, base in ((7, 0), (8, 1), (8, -2)):
        with pytest.raises(BadValueError, match="base 0 leads out of the table"):
            call(codes, (4, 0), entries, np.array([base]))
    with pytest.raises(BadValueError, match="as many bases as codes"):
        call(codes, (4, 0), 8, np.zeros(3, dtype=np.int64))
    with pytest.raises(BadValueError, match="2 to 16 bits"):
        call(codes, (4, 3), 8, np.zeros(1, dtype=np.int64))
    with pytest.raises(BadValueError, match="contiguous int16"):
        call(codes.astype(np.int32), (4, 0), 8, np.zeros(1, dtype=np.int64))
    assert np.array_equal(codes, np.ones(4))
