"""The GPU kernels without a GPU: their text built for the host and launched as on a card, compiled by NVRTC for cards,
and what Python knows of them. The conformance suite runs all of it once more, stage by stage."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lnsdeploy.datapath import Accumulator, Datapath, LinearAccumulator, LogAccumulator, default_adder, load_datapath
from lnsdeploy.delta import Exact, Max, Mitchell, Table
from lnsdeploy.emulator import cuda, gpu, nvrtc, ops, reference
from lnsdeploy.emulator import cuda_products as products
from lnsdeploy.emulator.artifact import build
from lnsdeploy.emulator.compare import compare
from lnsdeploy.emulator.executor import availability, get_executor
from lnsdeploy.emulator.graph import LayerRecord
from lnsdeploy.emulator.nvrtc import Program
from lnsdeploy.emulator.plan import Counts, DotPlan, Window
from lnsdeploy.errors import BadTypeError, BadValueError, LNSError, MissingDependencyError, UnsupportedError
from lnsdeploy.exporters.export import node_macs
from lnsdeploy.exporters.lower import LowerOptions, lower
from lnsdeploy.formats import LNSFormat
from tests import cuda_host, fuzz_ort, nets
from tests.cuda_host import HostRuntime
from tests.test_ops import NAMES, tensor

Array = np.ndarray[Any, Any]
BYTE, WORD = LNSFormat(8, 8), LNSFormat(16, 1024)

needs_host = pytest.mark.skipif(cuda_host.unavailable() is not None, reason=str(cuda_host.unavailable()))
needs_nvrtc = pytest.mark.skipif(nvrtc.compiler_unavailable() is not None, reason=str(nvrtc.compiler_unavailable()))


@pytest.fixture
def runtime() -> Iterator[HostRuntime]:
    made = HostRuntime()
    with cuda.host_runtime(made):
        yield made


def plan_of(fmt: LNSFormat, part: Accumulator, **places: Any) -> DotPlan:
    path = Datapath("d", fmt, fmt, fmt, part, default_adder(fmt))
    return replace(DotPlan(path, fmt, fmt, fmt, 0, 0, fmt.max_code), **places)


def words_of(fmt: LNSFormat, shape: tuple[int, ...], seed: int = 0) -> Array:
    """Words of all codes, a twentieth of them zero, some of them minus zero."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 1 << fmt.bits, shape)
    words[rng.random(shape) < 0.05] &= fmt.sign_bit
    return words.astype(fmt.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Every kernel, at every tile


# A name, a plan, and the kernel that it gets on an H100.
KERNELS: dict[str, tuple[DotPlan, str]] = {
    "wrap": (plan_of(BYTE, LinearAccumulator(32, table_bits=3, overflow="wrap"), lsb=4), "table-wrap-x32"),
    "saturate": (plan_of(BYTE, LinearAccumulator(20, table_bits=3), lsb=14), "table-saturate-x32"),
    "wide": (
        plan_of(BYTE, LinearAccumulator(38, table_bits=3, constant_bits=5, overflow="wrap"), lsb=-8),
        "table-wrap-64-x16",
    ),
    "wide-saturate": (plan_of(BYTE, LinearAccumulator(36, table_bits=3), lsb=-5), "table-saturate-64-x16"),
    "psum": (
        plan_of(BYTE, LinearAccumulator(20, table_bits=3, psum_bits=12, overflow="wrap"), lsb=9),
        "table-wrap-x32",
    ),
    "lanes": (plan_of(BYTE, LinearAccumulator(20, table_bits=3, lanes=3, psum_bits=19), lsb=12), "table-lanes-x32"),
    "rounding": (plan_of(BYTE, LinearAccumulator(20, table_bits=1, shift="round"), lsb=12), "table-saturate-x32"),
    "fp32": (
        plan_of(WORD, LinearAccumulator(32, table_bits=10, constant_bits=10, overflow="wrap"), lsb=45),
        "fp32-wrap",
    ),
    "fp32-saturate": (plan_of(WORD, LinearAccumulator(24, table_bits=10, constant_bits=10), lsb=44), "fp32-saturate"),
    "fp32-lanes": (
        plan_of(WORD, LinearAccumulator(24, table_bits=10, constant_bits=10, lanes=4), lsb=46),
        "fp32-lanes",
    ),
    "mitchell": (plan_of(WORD, LinearAccumulator(30), lsb=40), "mitchell-saturate"),
    "global": (plan_of(WORD, LinearAccumulator(30, table_bits=10, shift="round"), lsb=40), "table-saturate-global"),
    "bins": (plan_of(BYTE, LinearAccumulator(14, "bin", table_bits=3), lsb=13), "bins-saturate-x16"),
    "bins-wrap": (plan_of(BYTE, LinearAccumulator(14, "bin", table_bits=2, overflow="wrap"), lsb=12), "bins-wrap-x32"),
    "pair": (plan_of(BYTE, LogAccumulator(7), acc_offset=100), "pair-x32"),
    "pair-guard": (plan_of(BYTE, LogAccumulator(6, 1), acc_offset=170), "pair-x32"),
    "log": (plan_of(BYTE, LogAccumulator(12), acc_offset=-200), "log-direct-x32"),
    "log-low": (plan_of(BYTE, LogAccumulator(12), acc_offset=-5), "log-direct-low-x32"),
    "log-all": (plan_of(BYTE, LogAccumulator(8, delta=Table(8, 2)), acc_offset=3), "log-direct-entry-high-low-x32"),
    "log-max": (plan_of(BYTE, LogAccumulator(8, delta=Max()), acc_offset=60), "log-direct-entry-x32"),
    "log-guard": (
        plan_of(BYTE, LogAccumulator(12, 3, delta=Mitchell()), acc_offset=20),
        "log-indexed-entry-low-x32",
    ),
    "log-16": (plan_of(WORD, LogAccumulator(20, delta=Table(1024, 16)), acc_offset=-50000), "log-indexed-x1"),
    "log-16-low": (plan_of(WORD, LogAccumulator(20, delta=Table(1024, 16)), acc_offset=-5), "log-indexed-low-x1"),
    "log-16-all": (plan_of(WORD, LogAccumulator(15), acc_offset=40000), "log-indexed-entry-high-low-x1"),
    "log-16-global": (plan_of(WORD, LogAccumulator(20, 2), acc_offset=-50000), "log-indexed-global"),
    "lanes-general": (plan_of(BYTE, LogAccumulator(9, lanes=5), acc_offset=80), "general"),
    "bins-general": (plan_of(BYTE, LinearAccumulator(20, "bin", table_bits=3, lanes=3), lsb=6), "general"),
}


def _run(plan: DotPlan, shape: tuple[int, int, int], choice: Any = None, tile: Any = None, bias: Any = None) -> str:
    """Compare words and counts with the reference; the kernel's name."""
    m, n, k = shape
    a, w = words_of(plan.activation, (m, k)), words_of(plan.weight, (n, k), 1)
    layer = products.layer_of(plan, n, 1, bias)
    packed = cuda.Packed(layer, torch.from_numpy(w), choice, tile)
    out = torch.empty((1, m, n), dtype=cuda.word_dtype(plan.output.bits))
    found, want_counts = torch.zeros(3, dtype=torch.int64), Counts()
    cuda.matrix(packed, torch.from_numpy(a)[None], out, found)
    want = reference.dot(a, w, bias, plan, want_counts)
    np.testing.assert_array_equal(out[0].numpy(), want)
    assert found.tolist() == [want_counts.saturated, want_counts.flushed, want_counts.negative]
    return packed.kernel


@needs_host
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_gives_the_words_of_the_reference(runtime: HostRuntime, name: str) -> None:
    """Sizes that no tile divides, words of all codes, a bias, counters; and the kernel is the one that was meant."""
    plan, kernel = KERNELS[name]
    rng = np.random.default_rng(3)
    limit = 1 << (plan.datapath.accumulate.bits - int(plan.datapath.is_linear))
    bias = rng.integers(-limit + 1, limit, 21) if plan.datapath.is_linear else rng.integers(0, 2 * limit, 21)
    assert _run(plan, (37, 21, 43), bias=bias.astype(np.int64)) == kernel
    assert _run(plan, (1, 1, 1)) == kernel


@needs_host
@pytest.mark.parametrize(
    ("name", "tile"),
    [
        *(("saturate", tile) for tile in ("128x128", "128x64", "64x64", "32x32")),
        *(("bins", tile) for tile in ("64x64", "32x32")),
        ("log-low", "128x128"),
        ("wide", "128x64"),
        ("lanes", "64x64"),
        ("fp32", "128x128"),
        ("pair", "128x128"),
    ],
)
def test_every_tile_gives_the_words_of_the_reference(runtime: HostRuntime, name: str, tile: str) -> None:
    plan, _ = KERNELS[name]
    channels = products.TILES[tile].n + 3
    choice = products.choose(products.layer_of(plan, channels, 1, None), runtime.shared_memory)
    chosen = choice.tile(tile)
    _run(plan, (chosen.m + 5, channels, 2 * chosen.depth + 1), choice, chosen)
    assert runtime.launches[-1][2] == (2, 2, 1)
    assert runtime.launches[-1][3] == chosen.threads


@needs_host
def test_the_general_kernels_give_the_same(runtime: HostRuntime) -> None:
    for plan, _ in KERNELS.values():
        layer = products.layer_of(plan, 7, 1, None)
        assert _run(plan, (5, 7, 11), products.general(layer)) == "general"


@needs_host
@pytest.mark.parametrize("shared", [100 << 10, 164 << 10])
def test_less_shared_memory_means_other_kernels_not_other_words(shared: int) -> None:
    """An RTX 4090's, and an A100's."""
    with cuda.host_runtime(HostRuntime(shared)):
        for name in ("saturate", "wide", "bins", "pair", "log-low", "log-16-low"):
            _run(KERNELS[name][0], (9, 18, 20))


@needs_host
def test_per_channel_offsets(runtime: HostRuntime) -> None:
    """Channels that enter a log accumulator at other places share one table of products."""
    for part in (LogAccumulator(7), LogAccumulator(12)):
        offsets = np.arange(19) * 3 + 60
        plan = plan_of(BYTE, part, acc_offset=offsets, weight_offset=np.arange(19) - 9, output_offset=110)
        _run(plan, (18, 19, 30))


@needs_host
@pytest.mark.parametrize("name", ["saturate", "bins", "log-16-low", "pair", "lanes-general"])
def test_convolutions_and_batches(runtime: HostRuntime, name: str) -> None:
    """spec 7.1, 7.2: groups, strides, pads, dilations; independent products with weights of their own."""
    plan, _ = KERNELS[name]
    x, w = words_of(plan.activation, (2, 6, 9, 8)), words_of(plan.weight, (8, 3, 3, 2), 1)
    window = Window((3, 2), (2, 1), (1, 0, 2, 1), (1, 2))
    counts, want = Counts(), Counts()
    made = cuda.CudaDot(plan, torch.from_numpy(w), groups=2)
    got = made.convolution(torch.from_numpy(x), window, counts)
    np.testing.assert_array_equal(got.numpy(), reference.convolution(x, w, None, plan, window, 2, want))
    assert counts == want
    a, b = words_of(plan.activation, (3, 5, 17)), words_of(plan.weight, (12, 17), 2)
    batched = cuda.CudaDot(plan, torch.from_numpy(b), groups=3).batched(torch.from_numpy(a))
    for group in range(3):
        expected = reference.dot(a[group], b[4 * group : 4 * group + 4], None, plan)
        np.testing.assert_array_equal(batched[group].numpy(), expected)


@needs_host
def test_large_batches_are_split(runtime: HostRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets of a launch stay below 2^31, or here below a thousand; many groups take several launches."""
    monkeypatch.setattr(cuda, "_MAX_ELEMENTS", 1000)
    monkeypatch.setattr(cuda, "_MAX_GRID", 2)
    plan, _ = KERNELS["saturate"]
    x, w = words_of(BYTE, (7, 6, 6, 6)), words_of(BYTE, (6, 2, 3, 3), 1)
    window = Window((3, 3), (1, 1), (1, 1, 1, 1))
    got = cuda.CudaDot(plan, torch.from_numpy(w), groups=3).convolution(torch.from_numpy(x), window)
    np.testing.assert_array_equal(got.numpy(), reference.convolution(x, w, None, plan, window, 3))
    # two padded images at a time, and two of three groups
    assert len([1 for launch in runtime.launches if launch[1] == "lns_product"]) == 8
    a, b = words_of(BYTE, (90, 30)), words_of(BYTE, (5, 30), 1)
    got = cuda.CudaDot(plan, torch.from_numpy(b)).dot(torch.from_numpy(a))
    np.testing.assert_array_equal(got.numpy(), reference.dot(a, b, None, plan))
    with pytest.raises(UnsupportedError, match="beyond 32-bit offsets"):
        cuda.CudaDot(plan, torch.from_numpy(words_of(BYTE, (40, 30)))).dot(torch.from_numpy(a))


# ---------------------------------------------------------------------------------------------------------------------
# What is proven before a limit is left out


@given(st.data())
@settings(max_examples=60)
def test_no_sum_grows_beyond_its_bound(data: st.DataObject) -> None:
    """The bound holds for every sequence of products, and ends where it is not followed."""
    delta = np.array(data.draw(st.lists(st.integers(0, 12), max_size=8)), dtype=np.int64)
    product, first = data.draw(st.integers(-5, 30)), data.draw(st.integers(0, 40))
    steps = data.draw(st.integers(0, 12))
    bound = products.largest_sum(first, product, delta, steps, 1 << 20)
    reached = {first}
    for _ in range(steps):
        reached = {
            max(x, y) + (int(delta[abs(x - y)]) if abs(x - y) < len(delta) else 0)
            for x in reached
            for y in range(product - 10, product + 1)
        } | reached
    assert max(reached) <= bound
    assert products.largest_sum(first, product, delta, steps, bound - 1) == bound


def test_structures_are_found_and_checked() -> None:
    """Terms that are no rounded float32 products are not taken for them."""
    for bits, there in ((10, True), (11, True), (12, False)):
        plan = plan_of(WORD, LinearAccumulator(24, table_bits=10, constant_bits=bits), lsb=46)
        layer = products.layer_of(plan, 1, 1, None)
        assert (products._structure(layer.terms[0]) is not None) == there, bits
        if there:
            changed = layer.terms[0].copy()
            changed[60_000] += 1
            assert products._structure(changed) is None


@needs_host
def test_structs_are_those_of_the_kernels(tmp_path: Path) -> None:
    """Sizes, and the place of every field."""
    lines, want = [], []
    for name, struct in cuda.STRUCTS.items():
        lines.append(f'printf("%zu\\n", sizeof(lns::{name}));')
        want.append(ctypes.sizeof(struct))
        for field, *_ in struct._fields_:  # type: ignore[misc]
            lines.append(f'printf("%zu\\n", offsetof(lns::{name}, {field}));')
            want.append(getattr(struct, field).offset)
    unit = tmp_path / "unit.cpp"
    unit.write_text(f'#include <cstddef>\n#include <cstdio>\n#include "params.h"\nint main() {{ {" ".join(lines)} }}\n')
    kernels = Path(nvrtc.__file__).parent.parent / "kernels"
    subprocess.run([str(cuda_host.compiler()), "-I", kernels, unit, "-o", tmp_path / "unit"], check=True)
    found = subprocess.run([tmp_path / "unit"], capture_output=True, text=True, check=True).stdout.split()
    assert [int(v) for v in found] == want


# ---------------------------------------------------------------------------------------------------------------------
# Barriers


_WITHOUT_BARRIER = """
import os, sys
import numpy as np, torch
from lnsdeploy.datapath import Datapath, LinearAccumulator, default_adder
from lnsdeploy.emulator import cuda, nvrtc, reference
from lnsdeploy.emulator.plan import Counts, DotPlan
from lnsdeploy.formats import LNSFormat
from tests.cuda_host import HostRuntime
fmt = LNSFormat(8, 8)
path = Datapath("d", fmt, fmt, fmt, LinearAccumulator(20, table_bits=3), default_adder(fmt))
plan = DotPlan(path, fmt, fmt, fmt, 0, 0, fmt.max_code, lsb=14)
rng = np.random.default_rng(0)
a, w = (rng.integers(0, 256, (40, 100)).astype(np.uint8) for _ in range(2))
text = nvrtc.source("products.cu")
parts = text.split(b"__syncthreads();")
want = Counts()
words = reference.dot(a, w, None, plan, want)

def run(without):
    left = list(parts)
    if without >= 0:
        left[without : without + 2] = [left[without] + b";" + left[without + 1]]
    with cuda.host_runtime(HostRuntime(texts={"products.cu": b"__syncthreads();".join(left)})):
        counts = Counts()
        got = cuda.CudaDot(plan, torch.from_numpy(w)).dot(torch.from_numpy(a), counts)
        np.testing.assert_array_equal(got.numpy(), words)
        assert counts == want

# what reads rubbish may end its process: each run has one, of this one, which has imported torch
for without in range(-1, len(parts) - 1):
    sys.stdout.flush()
    if not (child := os.fork()):
        run(without)
        print(without, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""

BARRIERS = nvrtc.source("products.cu").count(b"__syncthreads();")


@needs_host
def test_a_missing_barrier_shows() -> None:
    """Words or counts differ, or threads read rubbish, whichever barrier is taken out; with all, nothing does."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_BARRIER],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert BARRIERS > 0
    # those whose words were right: the text as it is
    assert done.stdout.split() == ["-1"], done.stderr[-2000:]


# ---------------------------------------------------------------------------------------------------------------------
# NVRTC


@cache
def _program(name: str) -> Program:
    """The kernel of a named plan with its largest tile."""
    choice = products.choose(products.layer_of(KERNELS[name][0], 128, 1, None), 227 << 10)
    return choice.program(choice.tile(choice.tiles[0]), 227 << 10, depth_fast=True)


@needs_nvrtc
@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("saturate", "sm_80"),
        ("general", "sm_80"),
        *((name, "sm_90") for name in ("fp32-saturate", "bins", "pair", "general")),
    ],
)
def test_kernels_compile_without_a_card(name: str, architecture: str) -> None:
    """On sm_90 no register is spilled, at two blocks of 256 threads to a multiprocessor where tables allow it."""
    program = Program("general.cu") if name == "general" else _program(name)
    code, log = nvrtc.compile_program(program, architecture)
    assert code[:4] == b"\x7fELF"
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    assert spilled
    if architecture == "sm_90":
        assert not any(spilled), log


@needs_nvrtc
@pytest.mark.parametrize("row", ["linear-8-saturate", "log-16-1024-flush", "elma-8"])
def test_instructions_stay_within_their_budget(row: str) -> None:
    """At most 15 % more instructions a multiply-accumulate than are aimed at, none of them on spilled registers."""
    from benchmarks import gpu as benchmark

    tool = benchmark.disassembler()
    if tool is None:
        pytest.skip("no nvdisasm: install nvidia-cuda-nvdisasm")
    found = benchmark.static_row(row, tool)
    assert found["spill_bytes"] == found["local_memory"] == 0
    assert found["goal"] is None or 0.5 <= found["of_goal"] <= 1.15
    assert found["instructions_per_mac"] > 2
    assert found["registers"] <= 255
    assert found["bound_tmacs"] > 1


@needs_host
@pytest.mark.parametrize("datapath", ["lns-madam-8", "gauss-8"])
def test_the_benchmark_s_net_runs(runtime: HostRuntime, datapath: str) -> None:
    """A narrow and shallow one."""
    from benchmarks.gpu import ResNet

    net = ResNet(load_datapath(datapath), torch.device("cpu"), width=16, blocks=(1, 1, 1, 1))
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32))
    made = net.run(x)
    assert made.shape == (2, 62)
    assert made.dtype == torch.uint8
    # images do not know of each other
    np.testing.assert_array_equal(net.run(x[1:])[0].numpy(), made[1].numpy())


@needs_nvrtc
def test_a_text_that_does_not_compile_is_told() -> None:
    with pytest.raises(LNSError, match=r"products\.cu does not compile for sm_90"):
        nvrtc.compile_program(Program("products.cu", (("LNS_TM", 1),)), "sm_90")


def _cached(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """A compiler that is quick, and what it was asked for."""
    asked: list[str] = []

    def compile_program(program: Program, architecture: str) -> tuple[bytes, str]:
        asked.append(architecture)
        return f"{program} {architecture}".encode(), ""

    monkeypatch.setenv(nvrtc.CACHE_VARIABLE, str(folder))
    monkeypatch.setattr(nvrtc, "compile_program", compile_program)
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: "13.0")
    return asked


def test_compiled_kernels_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = _cached(monkeypatch, tmp_path / "cache")
    program = Program("general.cu")
    first = nvrtc.compiled(program, "sm_90")
    assert nvrtc.compiled(program, "sm_90") == first
    assert len(asked) == 1
    nvrtc.compiled(program, "sm_80")
    nvrtc.compiled(Program("general.cu", (("A", 1),)), "sm_90")
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: "13.1")
    nvrtc.compiled(program, "sm_90")
    assert len(asked) == 4
    assert len(list((tmp_path / "cache").iterdir())) == 4


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "other"])
def test_damaged_entries_are_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str) -> None:
    asked = _cached(monkeypatch, tmp_path)
    program = Program("general.cu")
    want = nvrtc.compiled(program, "sm_90")
    (entry,) = tmp_path.iterdir()
    content = entry.read_bytes()
    changed = content[:-1] + bytes([content[-1] ^ 1])
    entry.write_bytes({"cut": content[:-3], "changed": changed, "empty": b"", "other": b"something else"}[damage])
    assert nvrtc.compiled(program, "sm_90") == want
    assert len(asked) == 2
    assert entry.read_bytes() == content


def test_a_folder_that_cannot_be_written_only_costs_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    asked = _cached(monkeypatch, tmp_path / "file")
    assert nvrtc.compiled(Program("general.cu"), "sm_90") == nvrtc.compiled(Program("general.cu"), "sm_90")
    assert len(asked) == 2


def test_keys_depend_on_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Program("general.cu")
    before = nvrtc.cache_key(program, "sm_90", "13.0")
    texts = {name: nvrtc.source(name) for name in ("general.cu", *nvrtc.HEADERS)}
    for changed in texts:
        monkeypatch.setattr(nvrtc, "source", lambda name, other=changed: texts[name] + b" " * (name == other))
        assert nvrtc.cache_key(program, "sm_90", "13.0") != before


# ---------------------------------------------------------------------------------------------------------------------
# Executors, operators, errors


class _HostExecutor(gpu.CudaExecutor):
    """The executor `cuda` on the host build."""

    def device(self) -> torch.device:
        return torch.device("cpu")


@needs_host
@pytest.mark.parametrize("datapath", ["lns-madam-8", "elma-8", "gauss-8"])
def test_nets_give_the_words_of_the_reference(runtime: HostRuntime, datapath: str) -> None:
    """Every tensor of a net, and what each layer counted."""
    _, onnx_model, x = nets.residual()
    lowered = lower(onnx_model, x, LowerOptions(load_datapath(datapath), sample=8))
    artifact = build(lowered.graph, node_macs(lowered.graph))
    want: dict[str, LayerRecord] = {}
    get_executor("reference").run(artifact, x, records=want)
    for engine in (_HostExecutor(), gpu.TorchExecutor()):
        outcome = compare([get_executor("reference"), engine], artifact, x)
        assert outcome.first_difference is None
        records: dict[str, LayerRecord] = {}
        engine.run(artifact, x, records=records)
        assert {k: (r.macs, r.counts) for k, r in records.items()} == {k: (r.macs, r.counts) for k, r in want.items()}
        np.testing.assert_array_equal(engine.run(artifact, x), get_executor("reference").run(artifact, x))


@needs_host
@pytest.mark.parametrize("name", NAMES)
def test_operators_on_gpu_tensors(runtime: HostRuntime, name: str) -> None:
    """What torch's dispatcher calls for CUDA tensors, by the function bodies of ONNX files."""
    for seed in range(4):
        case = fuzz_ort.valid(NAMES[name].name, seed)
        session = fuzz_ort.session_of(fuzz_ort.model_of(case), None)
        want = session.run(None, dict(list(case.inputs.items())[: case.words]))[0]
        tensors = tuple(tensor(v) for v in case.inputs.values())
        made = ops._OPERATORS[name].result(*tensors, case.attributes)
        ops.on_gpu(name, made, tensors, case.attributes)
        np.testing.assert_array_equal(made.numpy(), want)


@needs_host
def test_operands_are_checked(runtime: HostRuntime) -> None:
    plan = KERNELS["saturate"][0]
    w = torch.from_numpy(words_of(BYTE, (4, 6)))
    made = cuda.CudaDot(plan, w)
    with pytest.raises(BadTypeError, match="activations: words of 8:8 are uint8, not int64"):
        made.dot(w.to(torch.int64))
    with pytest.raises(BadTypeError, match="weights: words of 8:8 are uint8, not float32"):
        cuda.CudaDot(plan, w.float())
    with pytest.raises(BadValueError, match=r"activations \[M, 6\] and one group"):
        made.dot(w[:, :5])
    with pytest.raises(BadValueError, match=r"batched products need activations \[1, M, 6\]"):
        made.batched(w)
    with pytest.raises(BadValueError, match=r"bias for 4 output channels has shape \(3,\)"):
        cuda.CudaDot(plan, w, np.zeros(3, dtype=np.int64))
    with pytest.raises(BadValueError, match="4 channels do not divide into 3 groups"):
        cuda.CudaDot(plan, w, groups=3)
    with pytest.raises(BadValueError, match="kernel"):
        made.convolution(w[None], Window((2,)))
    with pytest.raises(BadValueError, match="activations are on meta, weights on cpu"):
        made.dot(torch.empty((2, 6), dtype=torch.uint8, device="meta"))
    with pytest.raises(UnsupportedError, match="words of at most 16 bits"):
        cuda.relu(torch.zeros(3, dtype=torch.uint32), LNSFormat(20, 8))
    with pytest.raises(BadValueError, match="NaN"):
        cuda.encode(torch.tensor([1.0, float("nan")]), BYTE, 0)
    assert cuda.encode(torch.tensor([float("nan")]), BYTE, 0, check=False).tolist() == [0]


def test_tensors_of_other_devices_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="CUDA tensors, not on those of cpu"):
        cuda.CudaDot(KERNELS["saturate"][0], torch.from_numpy(words_of(BYTE, (2, 2))))


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a card, and without a compiler."""
    why = availability()["cuda"]
    if not torch.cuda.is_available():
        assert why is not None
        assert "CUDA" in why
        with pytest.raises(MissingDependencyError, match="executor 'cuda' is not available"):
            get_executor("cuda")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    nvrtc._nvrtc.cache_clear()
    try:
        assert "install lnsdeploy[cuda]" in str(nvrtc.compiler_unavailable())
        with pytest.raises(MissingDependencyError, match="cuda-bindings cannot be imported"):
            nvrtc.compile_program(Program("general.cu"), "sm_90")
    finally:
        nvrtc._nvrtc.cache_clear()


def test_the_torch_executor_names_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = gpu.TorchExecutor()
    assert engine.unavailable() is None
    monkeypatch.setenv(gpu.DEVICE_VARIABLE, "nonsense")
    assert "LNSDEPLOY_TORCH_DEVICE=nonsense" in str(engine.unavailable())


def test_exact_tables_are_the_reference_s() -> None:
    """The pair table is the reference's adder, for every pair."""
    accumulator = LogAccumulator(7, delta=Exact())
    layer = products.layer_of(plan_of(BYTE, accumulator), 1, 1, None)
    delta = layer.delta_plus.tobytes(), layer.delta_minus.tobytes()
    table = products._pairs(delta, 7)
    assert table[5, 0] == 5
    assert table[0, 133] == 133
    assert table[100, 228] == 0
    assert table[127, 127] == 127


@needs_host
@pytest.mark.parametrize("datapath", ["lns-madam-8", "gauss-8"])
def test_any_torch_model_gives_the_same_on_gpu_tensors(
    runtime: HostRuntime, monkeypatch: pytest.MonkeyPatch, datapath: str
) -> None:
    """The context manager's products, forward and backward: grouped and transposed convolutions, linear, attention."""
    import lnsdeploy
    from lnsdeploy.emulator import backends, mode

    torch.manual_seed(0)
    convolutions = torch.nn.Sequential(
        torch.nn.Conv2d(4, 6, 3, 2, 1, groups=2), torch.nn.ReLU(), torch.nn.ConvTranspose2d(6, 4, 2, 2)
    )
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    x, tokens = torch.randn(2, 4, 6, 6), torch.randn(2, 5, 16)

    def run() -> list[torch.Tensor]:
        for part in (convolutions, attention):
            part.zero_grad()
        with lnsdeploy.emulate(datapath, backward=True):
            y = convolutions(x)
            z = attention(tokens, tokens, tokens, need_weights=False)[0]
            (y.square().sum() + z.square().sum()).backward()
        return [y.detach(), z.detach(), *(p.grad for part in (convolutions, attention) for p in part.parameters())]

    want = run()
    on_tensors = backends.DeviceBackend("cuda", cuda.CudaDot)
    monkeypatch.setattr(mode, "backend_for", lambda executor, device: on_tensors)
    runtime.launches.clear()
    got = run()
    assert any(name == "lns_product" for _, name, *_ in runtime.launches)
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)
