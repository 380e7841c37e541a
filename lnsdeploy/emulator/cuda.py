"""The GPU kernels on torch tensors: names and signatures of :mod:`lnsdeploy.emulator.native`, CUDA tensors for arrays.

Kernels (lnsdeploy/kernels) are compiled when they are first needed (:mod:`lnsdeploy.emulator.nvrtc`), and run on the
current stream of torch. Nothing crosses to the CPU inside a layer: tables go to the GPU when a layer is made, and
counters come back only where `counts` are asked for, which waits for the GPU.

A host build of the same kernels takes this module's launches in the tests (tests/cuda_host), for tensors of the CPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import Structure, c_int32, c_int64, c_uint32, c_void_p
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lnsdeploy.datapath import LogAccumulator
from lnsdeploy.emulator import cuda_products as products
from lnsdeploy.emulator import nvrtc, operands, reference
from lnsdeploy.emulator.cuda_products import Choice, Layer, Side, Tile
from lnsdeploy.emulator.nvrtc import Program, Runtime
from lnsdeploy.emulator.plan import AddPlan, Counts, DotPlan, Ints, PoolPlan, RescalePlan, Window
from lnsdeploy.errors import BadTypeError, BadValueError, UnsupportedError
from lnsdeploy.formats import LNSFormat

__all__ = [
    "CudaDot",
    "add",
    "average_pool",
    "clip",
    "decode",
    "encode",
    "max_pool",
    "relu",
    "rescale",
    "sum_window",
    "unavailable",
]

GENERAL = Program("general.cu")
_THREADS = 256
# Offsets inside one launch are 32 bits.
_MAX_ELEMENTS = (1 << 31) - 1
_MAX_GRID = 65535
_MAX_RANK = 8


# ---------------------------------------------------------------------------------------------------
# What kernels are given (lnsdeploy/kernels/params.h)

_P, _N, _I, _U = c_void_p, c_int64, c_int32, c_uint32


class _Words(Structure):
    _fields_ = (("data", _P), ("bytes", _I), ("code", _U), ("sign_bit", _U), ("widen", _I))


class _Result(Structure):
    _fields_ = (
        ("data", _P),
        ("max_code", _N),
        ("bytes", _I),
        ("sign_bit", _U),
        ("least", _U),
        ("unused", _I),
        ("counts", _P),
    )


class _Adder(Structure):
    _fields_ = (
        ("plus", _P),
        ("minus", _P),
        ("plus_count", _N),
        ("minus_count", _N),
        ("largest", _N),
        ("guard", _I),
        ("lanes", _I),
    )


class _Window(Structure):
    _fields_ = tuple((name, _N * 3) for name in ("size", "out", "kernel", "strides", "begins", "dilations"))


class _Product(Structure):
    _fields_ = (
        ("a", _Words),
        ("w", _Words),
        ("out", _Result),
        *((name, _P) for name in ("rows", "depths", "out_rows")),
        *((name, _N) for name in ("a_group", "w_group", "out_group", "w_channel", "w_depth", "out_channel")),
        *((name, _N) for name in ("m", "n", "k", "first_group")),
        *((name, _P) for name in ("bias", "code_shift", "entry_shift", "thresholds", "starts")),
        *((name, _I) for name in ("start_bits", "acc_bits", "psum_bits", "lanes", "saturate", "bins")),
        *((name, _P) for name in ("constants", "table", "table2")),
        ("table_entries", _N),
        ("term_columns", _N),
        ("numbers", _I * 8),
        ("a_values", _P),
        ("w_values", _P),
        ("adder", _Adder),
    )


class _Map(Structure):
    _fields_ = (
        ("x", _Words),
        ("out", _Result),
        ("count", _N),
        ("table", _P),
        ("table2", _P),
        ("table_entries", _N),
        ("numbers", _I * 4),
    )


class _Sum(Structure):
    _fields_ = (
        ("a", _Words),
        ("b", _Words),
        ("out", _Result),
        ("adder", _Adder),
        *((name, _N) for name in ("a_shift", "b_shift", "code_shift", "count")),
        ("rank", _I),
        ("unused", _I),
        *((name, _N * _MAX_RANK) for name in ("shape", "a_strides", "b_strides")),
    )


class _Pool(Structure):
    _fields_ = (
        ("x", _Words),
        ("out", _Result),
        ("adder", _Adder),
        ("window", _Window),
        *((name, _N) for name in ("outer", "input_shift", "code_shift")),
        ("log_counts", _P),
        ("log_shape", _N * 3),
    )


class _Pad(Structure):
    _fields_ = (
        ("x", _P),
        ("out", _P),
        ("outer", _N),
        *((name, _N * 3) for name in ("size", "padded", "begins")),
        ("bytes", _I),
        ("unused", _I),
    )


STRUCTS: dict[str, type[Structure]] = {
    "Words": _Words,
    "Result": _Result,
    "Adder": _Adder,
    "Window": _Window,
    "Product": _Product,
    "Map": _Map,
    "Sum": _Sum,
    "Pool": _Pool,
    "Pad": _Pad,
}


# ---------------------------------------------------------------------------------------------------
# Devices and tensors

_host: list[Runtime] = []


@contextmanager
def host_runtime(runtime: Runtime) -> Iterator[None]:
    """Take launches for tensors of the CPU: the host build of the tests."""
    _host.append(runtime)
    try:
        yield
    finally:
        _host.remove(runtime)


def runtime_of(device: torch.device) -> Runtime:
    """What launches kernels for a device's tensors.

    Raises:
        UnsupportedError: it is no CUDA device.
        MissingDependencyError: what compiles kernels is missing.
    """
    if device.type == "cuda":
        return nvrtc.cuda_runtime(torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "cpu" and _host:
        return _host[-1]
    raise UnsupportedError(f"GPU kernels compute on CUDA tensors, not on those of {device}")


def unavailable() -> str | None:
    """Why GPU kernels cannot be used here and what to do about it, or None."""
    return nvrtc.unavailable()


def word_dtype(bits: int) -> torch.dtype:
    """Of words."""
    return torch.uint8 if bits <= 8 else torch.uint16


def _format(fmt: LNSFormat) -> Side:
    if fmt.bits > 16:
        raise UnsupportedError(f"format {fmt}: GPU kernels have words of at most 16 bits; use the executor torch")
    return Side(fmt.bits, fmt.signed)


def _check(x: Tensor, fmt: LNSFormat, what: str) -> None:
    if x.dtype != word_dtype(_format(fmt).bits):
        raise BadTypeError(f"{what}: words of {fmt} are {fmt.dtype}, not {str(x.dtype).removeprefix('torch.')}")


def _words(x: Tensor, side: Side) -> _Words:
    return _Words(x.data_ptr(), side.bytes, side.max_code, side.sign_bit, side.widen)


def result(x: Tensor, side: Side, underflow_min: bool, counts: Tensor | None = None) -> _Result:
    pointer = None if counts is None else counts.data_ptr()
    return _Result(x.data_ptr(), side.max_code, side.bytes, side.sign_bit, int(underflow_min), 0, pointer)


def upload(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """An array in a device's memory. Its bytes matter, not torch's name for its type."""
    raw = np.array(array, order="C", copy=True).reshape(-1).view(np.uint8)
    # nothing may point to no memory at all
    return torch.from_numpy(raw if raw.size else np.zeros(16, dtype=np.uint8)).to(device)


class _Cache:
    """Tensors by what they were made of, the oldest dropped first."""

    def __init__(self, most: int):
        self.most = most
        self._entries: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        found = self._entries.get(key)
        if found is None:
            found = make()
            self._entries[key] = found
            while len(self._entries) > self.most:
                self._entries.pop(next(iter(self._entries)), None)
        return found


_tables = _Cache(256)
_geometries = _Cache(256)


def _counter(counts: Counts | None, device: torch.device) -> Tensor | None:
    return None if counts is None else torch.zeros(3, dtype=torch.int64, device=device)


def _flush(total: int, found: Tensor | None, counts: Counts | None) -> None:
    if counts is not None and found is not None:
        saturated, flushed, negative = found.tolist()
        counts.add(total, saturated, flushed, negative)


def _elements(device: torch.device, name: str, count: int, parameters: Structure) -> None:
    """Launch a kernel that takes element after element."""
    if count == 0:
        return
    runtime = runtime_of(device)
    blocks = min(-(-count // _THREADS), runtime.multiprocessors * 32)
    runtime.launch(GENERAL, name, (blocks, 1, 1), _THREADS, 0, parameters)


# ---------------------------------------------------------------------------------------------------
# Products


class Packed:
    """A layer with its weights and tables on a device (spec 3 to 5, 7).

    Args:
        layer: what it computes.
        words: weights [channels, K], of the weights' dtype.
        choice: another kernel than the fastest, for tests and benchmarks.
        tile: likewise.
    """

    def __init__(self, layer: Layer, words: Tensor, choice: Choice | None = None, tile: Tile | None = None):
        device = words.device
        runtime = runtime_of(device)
        self.layer, self.device, self.forced_tile = layer, device, tile
        self.choice = choice or products.choose(layer, runtime.shared_memory)
        self.columns, self.depth = layer.channels // layer.groups, int(words.shape[1])
        # [group, K, columns]: neighbours of a tile's row are neighbours in memory
        self.words = words.reshape(layer.groups, self.columns, self.depth).transpose(1, 2).contiguous()
        arrays = {"bias": layer.bias, "code_shift": layer.code_shift, "entry_shift": layer.entry_shift}
        if layer.linear:
            thresholds, starts, bits = products.raw_starts(layer.thresholds)
            arrays |= {"thresholds": thresholds, "starts": starts, "constants": layer.constants}
            self._start_bits = bits
        else:
            arrays |= {"plus": layer.delta_plus.astype(np.int32), "minus": layer.delta_minus.astype(np.int32)}
            self._start_bits = 0
        shared = self.choice.uploaded.get(device)
        if shared is None:
            shared = {name: upload(array, device) for name, array in self.choice.arrays.items()}
            self.choice.uploaded[device] = shared
        self._arrays = {name: upload(array, device) for name, array in arrays.items() if name not in shared} | shared
        self._entries = len(self.choice.arrays["table"]) if "table" in shared else 0

    @property
    def kernel(self) -> str:
        """The kernel that was chosen."""
        return self.choice.name

    def _pointer(self, name: str) -> int | None:
        found = self._arrays.get(name)
        return None if found is None else found.data_ptr()

    def run(
        self,
        a: Tensor,
        out: Tensor,
        places: tuple[Tensor, Tensor, Tensor],
        *,
        a_first: int,
        a_group: int,
        out_first: int,
        out_group: int,
        out_channel: int,
        depth_fast: bool,
        counts: Tensor | None,
    ) -> None:
        """Compute results of all groups.

        Args:
            a: activations; an element of group z, row m and depth k is at a_first + z·a_group + rows[m] + depths[k].
            out: results, at out_first + z·out_group + out_rows[m] + n·out_channel.
            places: rows, depths and out_rows, int32.
            depth_fast: whether neighbours in memory are along k.
            counts: int64 [3], added to.
        """
        layer, choice = self.layer, self.choice
        rows, depths, out_rows = places
        m, n, k = rows.numel(), self.columns, self.depth
        if not m or not n:
            return
        p = _Product(
            a=_words(a, layer.activation),
            w=_words(self.words, layer.weight),
            out=result(out, layer.output, layer.underflow_min, counts),
            rows=rows.data_ptr(),
            depths=depths.data_ptr(),
            out_rows=out_rows.data_ptr(),
            a_group=a_group,
            w_group=n * k,
            out_group=out_group,
            w_channel=1,
            w_depth=n,
            out_channel=out_channel,
            m=m,
            n=n,
            k=k,
            start_bits=self._start_bits,
            acc_bits=layer.acc_bits,
            psum_bits=layer.psum_bits or layer.acc_bits,
            lanes=layer.lanes,
            saturate=int(layer.saturate),
            bins=layer.terms.shape[0],
            table_entries=self._entries,
            term_columns=layer.terms.shape[1],
            adder=_Adder(
                self._pointer("plus"),
                self._pointer("minus"),
                len(layer.delta_plus),
                len(layer.delta_minus),
                (1 << layer.acc_bits) - 1,
                layer.guard_bits,
                layer.lanes,
            ),
        )
        p.a.data = (p.a.data or 0) + a_first * layer.activation.bytes
        p.out.data = (p.out.data or 0) + out_first * layer.output.bytes
        for name in ("bias", "code_shift", "entry_shift", "thresholds", "starts", "constants"):
            setattr(p, name, self._pointer(name))
        for name in ("table", "table2", "a_values", "w_values"):
            setattr(p, name, self._pointer(name))
        p.numbers[: len(choice.numbers)] = choice.numbers
        runtime = runtime_of(self.device)
        for first in range(0, layer.groups, _MAX_GRID):
            p.first_group = first
            groups = min(layer.groups - first, _MAX_GRID)
            if choice.family is None:
                p.numbers[0] = groups
                name = "lns_general_linear" if layer.linear else "lns_general_log"
                blocks = min(-(-m * n * groups // _THREADS), runtime.multiprocessors * 64)
                runtime.launch(GENERAL, name, (blocks, 1, 1), _THREADS, 0, p)
                continue
            tile = self.forced_tile or choice.best_tile(m, n, groups, runtime.multiprocessors, runtime.shared_memory)
            program = choice.program(tile, runtime.shared_memory, depth_fast=depth_fast)
            grid = -(-m // tile.m), -(-n // tile.n), groups
            runtime.launch(program, "lns_product", grid, tile.threads, choice.shared_bytes(tile), p)


def _places(device: torch.device, *arrays: npt.NDArray[np.int64]) -> tuple[Tensor, ...]:
    return tuple(upload(a.astype(np.int32), device).view(torch.int32)[: a.size] for a in arrays)


def _matrix_places(device: torch.device, m: int, k: int, row: int, column: int, out: int) -> tuple[Tensor, ...]:
    def make() -> tuple[Tensor, ...]:
        rows, depths = np.arange(m, dtype=np.int64), np.arange(k, dtype=np.int64)
        return _places(device, rows * row, depths * column, rows * out)

    found: tuple[Tensor, ...] = _geometries.get(("matrix", device, m, k, row, column, out), make)
    return found


def _grid(sizes: tuple[int, ...], strides: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Σ index·stride of all indices below `sizes`, in C order."""
    total = np.zeros(1, dtype=np.int64)
    for size, stride in zip(sizes, strides, strict=True):
        total = np.add.outer(total, np.arange(size, dtype=np.int64) * stride).reshape(-1)
    return total


def _strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(sizes[i + 1 :]) for i in range(len(sizes)))


def matrix(packed: Packed, a: Tensor, out: Tensor, counts: Tensor | None) -> None:
    """Products of activations [groups, M, K], of any strides, into words [groups, M, columns], contiguous."""
    _, m, k = a.shape
    group, row, column = a.stride()
    n = packed.columns
    # rows of one launch, by the offsets that 32 bits hold
    reach = max(row + (k - 1) * column if k else row, n, 1)
    most = max(_MAX_ELEMENTS // reach - 1, 1)
    if (k and (k - 1) * column + n > _MAX_ELEMENTS) or k * n > _MAX_ELEMENTS:
        raise UnsupportedError(f"a row of {k} activations or {k} × {n} weights is beyond 32-bit offsets")
    for first in range(0, m, most):
        count = min(most, m - first)
        packed.run(
            a,
            out,
            _matrix_places(packed.device, count, k, row, column, n),  # type: ignore[arg-type]
            a_first=first * row,
            a_group=group,
            out_first=first * n,
            out_group=m * n,
            out_channel=1,
            depth_fast=column == 1,
            counts=counts,
        )


def padded(x: Tensor, window: Window) -> Tensor:
    """x [B, C, *spatial] with zero words around."""
    axes = len(window.kernel)
    begins, ends = window.pads[:axes], window.pads[axes:]
    x = x.contiguous()
    if not any(window.pads):
        return x
    sizes = [int(n) + b + e for n, b, e in zip(x.shape[2:], begins, ends, strict=True)]
    out = torch.empty((*x.shape[:2], *sizes), dtype=x.dtype, device=x.device)
    three = c_int64 * 3
    lead = (1,) * (3 - axes)
    p = _Pad(
        x.data_ptr(),
        out.data_ptr(),
        x.shape[0] * x.shape[1],
        three(*lead, *x.shape[2:]),
        three(*lead, *sizes),
        three(*(0,) * (3 - axes), *begins),
        x.element_size(),
    )
    _elements(x.device, "lns_pad", out.numel(), p)
    return out


def convolution(packed: Packed, x: Tensor, out: Tensor, window: Window, inputs: int, counts: Tensor | None) -> None:
    """Convolution of x [B, groups · inputs, *spatial] into out [B, channels, *output spatial] (spec 7.1)."""
    axes = len(window.kernel)
    groups, n = packed.layer.groups, packed.columns
    sizes = tuple(int(v) + window.pads[i] + window.pads[axes + i] for i, v in enumerate(x.shape[2:]))
    places = tuple(out.shape[2:])
    plane, positions = prod(sizes), prod(places)
    image, image_out = groups * inputs * plane, groups * n * positions
    if max(image, image_out, inputs * prod(window.kernel) * n) > _MAX_ELEMENTS:
        raise UnsupportedError(f"an image of {tuple(x.shape[1:])} is beyond 32-bit offsets")
    images = max(min(_MAX_ELEMENTS // max(image, image_out, 1), x.shape[0]), 1)
    strides = _strides(sizes)
    for first in range(0, x.shape[0], images):
        part = padded(x[first : first + images], window)
        count = part.shape[0]

        def make(count: int = count) -> tuple[Tensor, ...]:
            steps = tuple(s * v for s, v in zip(strides, window.strides, strict=True))
            taps = tuple(s * v for s, v in zip(strides, window.dilations, strict=True))
            return _places(
                x.device,
                _grid((count, *places), (image, *steps)),
                _grid((inputs, *window.kernel), (plane, *taps)),
                _grid((count, *places), (image_out, *_strides(places))),
            )

        key = "convolution", x.device, count, sizes, places, window, groups, inputs, n
        packed.run(
            part,
            out,
            _geometries.get(key, make),
            a_first=0,
            a_group=inputs * plane,
            out_first=first * image_out,
            out_group=n * positions,
            out_channel=positions,
            depth_fast=False,
            counts=counts,
        )


class CudaDot:
    """A layer on a GPU: its weights are packed once (spec 3 to 5, 7).

    Args:
        plan: its datapath, formats and offsets.
        words: weights [N, K], or [N, C/groups, *kernel] of a convolution, a CUDA tensor.
        bias: as for :func:`lnsdeploy.emulator.reference.dot`, a NumPy array or tensor.
        groups: of a convolution, or of independent products (:meth:`batched`).

    Raises:
        UnsupportedError: a format or table is beyond the kernels' integers, or the tensor is on another device.
        BadTypeError, BadValueError: shapes or dtypes do not fit.
    """

    def __init__(self, plan: DotPlan, words: Tensor, bias: Any = None, groups: int = 1):
        _check(words, plan.weight, "weights")
        if words.ndim < 2:
            raise BadValueError(f"weights have the shape [N, K] or [N, C, *kernel], not {tuple(words.shape)}")
        self.plan, self.groups, self.shape = plan, groups, tuple(words.shape)
        self.channels, self.depth = self.shape[0], prod(self.shape[1:])
        self.device = words.device
        start = None
        if bias is not None:
            start = np.asarray(bias.cpu() if isinstance(bias, Tensor) else bias, dtype=np.int64)
            if start.shape != (self.channels,):
                raise BadValueError(f"a bias for {self.channels} output channels has shape {start.shape}")
        layer = products.layer_of(plan, self.channels, groups, start)
        self.packed = Packed(layer, words.reshape(self.channels, self.depth))

    @property
    def kernel(self) -> str:
        """The kernel that was chosen."""
        return self.packed.kernel

    def _activations(self, a: Tensor) -> None:
        _check(a, self.plan.activation, "activations")
        if a.device != self.device:
            raise BadValueError(f"activations are on {a.device}, weights on {self.device}")

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=word_dtype(self.plan.output.bits), device=self.device)

    def dot(self, a: Tensor, counts: Counts | None = None) -> Tensor:
        """Matrix product of activations [M, K], of any strides, with the weights: words [M, N]."""
        self._activations(a)
        if a.ndim != 2 or a.shape[1] != self.depth or self.groups != 1:
            raise BadValueError(f"a product needs activations [M, {self.depth}] and one group, not {tuple(a.shape)}")
        out, found = self._empty(a.shape[0], self.channels), _counter(counts, self.device)
        matrix(self.packed, a[None], out, found)
        _flush(out.numel(), found, counts)
        return out

    def batched(self, a: Tensor, counts: Counts | None = None) -> Tensor:
        """Independent products (spec 7.2) of activations [groups, M, K] with each group's weights: [groups, M, n]."""
        self._activations(a)
        if a.ndim != 3 or a.shape[0] != self.groups or a.shape[2] != self.depth:
            raise BadValueError(
                f"batched products need activations [{self.groups}, M, {self.depth}], not {tuple(a.shape)}"
            )
        out = self._empty(self.groups, a.shape[1], self.packed.columns)
        found = _counter(counts, self.device)
        matrix(self.packed, a, out, found)
        _flush(out.numel(), found, counts)
        return out

    def convolution(self, x: Tensor, window: Window, counts: Counts | None = None) -> Tensor:
        """Convolution of x [B, C, *spatial] with the weights (spec 7.1): words [B, N, *output spatial]."""
        self._activations(x)
        axes = len(window.kernel)
        if x.ndim != axes + 2 or self.shape[2:] != window.kernel or x.shape[1] != self.shape[1] * self.groups:
            raise BadValueError(
                f"a convolution of {tuple(x.shape)} with weights {self.shape}, kernel {window.kernel} and "
                f"{self.groups} groups does not fit"
            )
        out = self._empty(x.shape[0], self.channels, *window.output_shape(tuple(x.shape[2:])))
        found = _counter(counts, self.device)
        convolution(self.packed, x, out, window, self.shape[1], found)
        _flush(out.numel(), found, counts)
        return out


# ---------------------------------------------------------------------------------------------------
# Element by element


def encode_table(thresholds: npt.NDArray[np.float32]) -> tuple[npt.NDArray[Any], npt.NDArray[Any], int]:
    """Bounds as bits of floats, how many are certain by the leading bits, and how many bits are dropped for that."""
    # no −0: bits of non-negative floats are in the floats' order
    bounds = np.append((thresholds.astype(np.float32) + np.float32(0)).view(np.uint32), np.uint32(0xFFFFFFFF))
    drop = 23
    while drop > 8 and 256 << (23 - drop) < 8 * len(thresholds):
        drop -= 1
    firsts = np.arange((1 << (31 - drop)) + 1, dtype=np.uint64) << np.uint64(drop)
    starts = np.searchsorted(bounds[:-1].astype(np.uint64), firsts, side="right").astype(np.int32)
    return bounds, starts, drop


def encode_words(x: Tensor, thresholds: tuple[Tensor, Tensor, int], side: Side, out: Tensor) -> None:
    """Words of float32 numbers [...] by the tables of :func:`encode_table`."""
    x = x.contiguous()
    bounds, starts, drop = thresholds
    p = _Map(
        _Words(x.data_ptr()),
        result(out, side, False),
        x.numel(),
        bounds.data_ptr(),
        starts.data_ptr(),
        0,
        (c_int32 * 4)(drop),
    )
    _elements(x.device, "lns_encode", x.numel(), p)


@lru_cache(maxsize=256)
def _encode_table(fmt: LNSFormat, offset: int, underflow: str, device: torch.device) -> tuple[Tensor, Tensor, int]:
    bounds, starts, drop = encode_table(operands.encode_thresholds(fmt, offset, underflow))
    return upload(bounds, device), upload(starts, device), drop


def encode(x: Tensor, fmt: LNSFormat, offset: int, underflow: str = "zero", *, check: bool = True) -> Tensor:
    """Words of float32 numbers, to nearest (spec 2.1, 2.4); negative ones into an unsigned format are taken as 0.

    Args:
        check: refuse NaN, which waits for the GPU; without, NaN becomes zero.

    Raises:
        BadValueError: NaN in `x`.
    """
    side = _format(fmt)
    x = x.to(torch.float32)
    if check and bool(torch.isnan(x).any()):
        raise BadValueError("NaN has no LNS word")
    out = torch.empty(x.shape, dtype=word_dtype(fmt.bits), device=x.device)
    encode_words(x, _encode_table(fmt, offset, underflow, x.device), side, out)
    return out


def decode_words(words: Tensor, table: Tensor, bits: int, out: Tensor) -> None:
    """Values of words [...] from a table of 2^bits."""
    words = words.contiguous()
    p = _Map(
        _Words(words.data_ptr(), words.element_size(), (1 << bits) - 1, 0, 1),
        _Result(out.data_ptr()),
        words.numel(),
        table.data_ptr(),
    )
    _elements(words.device, "lns_decode", words.numel(), p)


@lru_cache(maxsize=256)
def _decode_table(fmt: LNSFormat, offset: int, device: torch.device) -> Tensor:
    return upload(operands.decode_values(fmt, offset), device)


def decode(words: Tensor, fmt: LNSFormat, offset: int) -> Tensor:
    """The float32 values of words (spec 2.5)."""
    _check(words, fmt, "words")
    out = torch.empty(words.shape, dtype=torch.float32, device=words.device)
    decode_words(words, _decode_table(fmt, offset, words.device), fmt.bits, out)
    return out


def _map_words(x: Tensor, side: Side, output: Side, table: Tensor, out: Tensor, counts: Tensor | None = None) -> None:
    """A word for every word, from a table of :func:`lns_map` (general.cu)."""
    x = x.contiguous()
    p = _Map(_words(x, side), result(out, output, False, counts), x.numel(), table.data_ptr())
    _elements(x.device, "lns_map", x.numel(), p)


def _mapped(key: tuple[Any, ...], device: torch.device, make: Callable[[], npt.NDArray[Any]]) -> Tensor:
    found: Tensor = _tables.get((*key, device), lambda: upload(make().astype(np.uint32), device))
    return found


def _limit_table(side: Side, low: int, high: int) -> npt.NDArray[Any]:
    words = np.arange(1 << side.bits, dtype=np.int64)
    codes = words & side.max_code
    keys = np.where(words & side.sign_bit != 0, -codes, codes).clip(low, high)
    return np.where(keys < 0, -keys + side.sign_bit, keys)


def limit_words(x: Tensor, side: Side, limits: tuple[int, int], out: Tensor) -> None:
    """Words limited to two signed codes (spec 6.1)."""
    table = _mapped(("limit", side, limits), x.device, lambda: _limit_table(side, *limits))
    _map_words(x, side, side, table, out)


def relu(x: Tensor, fmt: LNSFormat) -> Tensor:
    """Negative words become zero (spec 6.1)."""
    _check(x, fmt, "words")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    limit_words(x, _format(fmt), (0, fmt.max_code), out)
    return out


def clip(x: Tensor, fmt: LNSFormat, low: int, high: int) -> Tensor:
    """Words limited to two words (spec 6.1)."""
    _check(x, fmt, "words")
    keys = [-(w & fmt.max_code) if w & fmt.sign_bit else w & fmt.max_code for w in (int(low), int(high))]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    limit_words(x, _format(fmt), (keys[0], keys[1]), out)
    return out


def rescale_table(
    x: Side, out: Side, underflow_min: bool, offsets: tuple[int, int], multiply: int, divide: int
) -> npt.NDArray[np.uint32]:
    """Words of another format or offset (spec 6.3), and from bit 16 on what to count (general.cu, lns_map)."""
    words = np.arange(1 << x.bits, dtype=np.int64)
    codes = words & x.max_code
    minus = (words & x.sign_bit != 0) & (codes > 0)
    at = codes + offsets[0]
    scaled = (2 * at + divide) // (2 * divide) if divide > 1 else at * multiply
    scaled = scaled - offsets[1]
    used = (codes > 0) & ~(minus & (not out.signed))
    over, under = used & (scaled > out.max_code), used & (scaled < 1)
    limited = np.where(under, int(underflow_min), np.minimum(scaled, out.max_code))
    limited = np.where(used, limited, 0)
    signs = np.where(minus & (limited > 0), out.sign_bit, 0)
    made: npt.NDArray[np.uint32] = limited + signs + (over << 16) + (under << 17) + ((over & minus) << 18)
    return made.astype(np.uint32)


def rescale_words(
    x: Tensor,
    side: Side,
    output: Side,
    underflow_min: bool,
    change: tuple[tuple[int, int], int, int],
    out: Tensor,
    counts: Tensor | None = None,
) -> None:
    """Words of another format or offset; `change` has both offsets, and what codes are multiplied and divided by."""
    key = "rescale", side, output, underflow_min, change
    table = _mapped(key, x.device, lambda: rescale_table(side, output, underflow_min, *change))
    _map_words(x, side, output, table, out, counts)


def rescale(x: Tensor, plan: RescalePlan, counts: Counts | None = None) -> Tensor:
    """Words of another format or offset (spec 6.3)."""
    _check(x, plan.input, "words")
    multiply = max(plan.output.gamma // plan.input.gamma, 1)
    divide = max(plan.input.gamma // plan.output.gamma, 1)
    out = torch.empty(x.shape, dtype=word_dtype(plan.output.bits), device=x.device)
    found = _counter(counts, x.device)
    change = (plan.input_offset, plan.output_offset), multiply, divide
    rescale_words(x, _format(plan.input), _format(plan.output), plan.underflow == "min", change, out, found)
    _flush(out.numel(), found, counts)
    return out


# ---------------------------------------------------------------------------------------------------
# The log adder


@lru_cache(maxsize=64)
def _deltas(accumulator: LogAccumulator, gamma: int, device: torch.device) -> tuple[Tensor, int, Tensor, int]:
    made = operands.delta_tables(accumulator, gamma)
    plus, minus = made["delta_plus"], made["delta_minus"]
    return upload(plus, device), len(plus), upload(minus, device), len(minus)


def adder(plus: Tensor, plus_count: int, minus: Tensor, minus_count: int, bits: int, guard: int, lanes: int) -> _Adder:
    """The log adder's tables and limits."""
    return _Adder(plus.data_ptr(), minus.data_ptr(), plus_count, minus_count, (1 << bits) - 1, guard, lanes)


def _adder(accumulator: LogAccumulator, gamma: int, device: torch.device) -> _Adder:
    tables = _deltas(accumulator, gamma, device)
    return adder(*tables, accumulator.bits, accumulator.guard_bits, accumulator.lanes)


def add_words(
    a: Tensor,
    b: Tensor,
    sides: tuple[Side, Side],
    shifts: tuple[int, int, int],
    with_adder: _Adder,
    into: _Result,
) -> None:
    """Sums of words of one shape, of any strides; shifts are the operands' and the result's."""
    shape, x, y = list(a.shape), list(a.stride()), list(b.stride())
    # neighbouring axes that both walk alike are one
    axes: list[tuple[int, int, int]] = []
    for size, i, j in zip(shape, x, y, strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1:] == (i * size, j * size):
            size *= axes.pop()[0]
        axes.append((size, i, j))
    if len(axes) > _MAX_RANK:
        a, b = a.contiguous(), b.contiguous()
        axes = [(a.numel(), 1, 1)]
    eight = c_int64 * _MAX_RANK
    p = _Sum(
        _words(a, sides[0]),
        _words(b, sides[1]),
        into,
        with_adder,
        *shifts,
        a.numel(),
        len(axes),
        0,
        *(eight(*(axis[i] for axis in axes)) for i in range(3)),
    )
    _elements(a.device, "lns_add", a.numel(), p)


def add(a: Tensor, b: Tensor, plan: AddPlan, counts: Counts | None = None) -> Tensor:
    """Element-wise sum by the log adder (spec 6.4), with broadcasting."""
    _check(a, plan.a, "first operand")
    _check(b, plan.b, "second operand")
    output = _format(plan.output)
    a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
    out = torch.empty(a.shape, dtype=word_dtype(plan.output.bits), device=a.device)
    found = _counter(counts, a.device)
    add_words(
        a,
        b,
        (_format(plan.a), _format(plan.b)),
        (plan.a_offset - plan.acc_offset, plan.b_offset - plan.acc_offset, plan.acc_offset - plan.output_offset),
        _adder(plan.accumulator, plan.output.gamma, a.device),
        result(out, output, plan.underflow == "min", found),
    )
    _flush(out.numel(), found, counts)
    return out


# ---------------------------------------------------------------------------------------------------
# Windows


def _geometry(x: Tensor, window: Window) -> tuple[_Window, tuple[int, ...]]:
    axes = len(window.kernel)
    if x.ndim != axes + 2:
        raise BadValueError(
            f"a window over {axes} axes needs an array [B, C, …] of {axes + 2} axes, not {tuple(x.shape)}"
        )
    out = window.output_shape(tuple(x.shape[2:]))
    three, lead = c_int64 * 3, 3 - axes
    ones, zeros = (1,) * lead, (0,) * lead
    made = _Window(
        three(*ones, *x.shape[2:]),
        three(*ones, *out),
        three(*ones, *window.kernel),
        three(*ones, *window.strides),
        three(*zeros, *window.pads[:axes]),
        three(*ones, *window.dilations),
    )
    return made, (*x.shape[:2], *out)


def holds_padding_only(shape: tuple[int, ...], window: Window) -> bool:
    """Whether some window holds no element of the input."""
    for i, (size, count) in enumerate(zip(shape, window.output_shape(shape), strict=True)):
        starts = np.arange(count)[:, None] * window.strides[i] - window.pads[i]
        taps = starts + np.arange(window.kernel[i]) * window.dilations[i]
        if not ((taps >= 0) & (taps < size)).any(axis=1).all():
            return True
    return False


def max_words(x: Tensor, side: Side, window: Window, out: Tensor) -> None:
    """The largest word of each window; every window holds an element (spec 6.1)."""
    x = x.contiguous()
    geometry, _ = _geometry(x, window)
    p = _Pool(x=_words(x, side), out=result(out, side, False), window=geometry, outer=x.shape[0] * x.shape[1])
    _elements(x.device, "lns_max_pool", out.numel(), p)


def max_pool(x: Tensor, fmt: LNSFormat, window: Window) -> Tensor:
    """The largest value of each window of x [B, C, *spatial] (spec 6.1)."""
    _check(x, fmt, "words")
    _, shape = _geometry(x, window)
    if holds_padding_only(tuple(x.shape[2:]), window):
        raise BadValueError("a window of the max pooling holds padding only: use smaller pads")
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    max_words(x, _format(fmt), window, out)
    return out


def average_pool(
    x: Tensor, plan: PoolPlan, window: Window, count_include_pad: bool = False, counts: Counts | None = None
) -> Tensor:
    """Average of each window of x [B, C, *spatial] by the log adder (spec 6.5)."""

    def make() -> npt.NDArray[np.int64]:
        return reference.log_counts(tuple(x.shape[2:]), plan, window, count_include_pad)

    key = "average", tuple(x.shape[2:]), plan, window, count_include_pad
    return _pool(x, plan, window, key, make, counts)


def sum_window(x: Tensor, plan: PoolPlan, window: Window, counts: Counts | None = None) -> Tensor:
    """Sum of each window of x [B, C, *spatial] by the log adder (spec 6.5)."""
    return _pool(x, plan, window, ("sum",), lambda: np.zeros((1,) * len(window.kernel), dtype=np.int64), counts)


def _pool(
    x: Tensor, plan: PoolPlan, window: Window, key: Any, divisor: Callable[[], Ints], counts: Counts | None
) -> Tensor:
    _check(x, plan.input, "words")
    _, shape = _geometry(x, window)

    def make() -> tuple[Tensor, tuple[int, ...]]:
        made = divisor()
        return upload(made.astype(np.int64), x.device), (1,) * (3 - made.ndim) + made.shape

    logs, log_shape = _tables.get((*key, len(window.kernel), x.device), make)
    output = _format(plan.output)
    out = torch.empty(shape, dtype=word_dtype(plan.output.bits), device=x.device)
    found = _counter(counts, x.device)
    pool_words(
        x,
        _format(plan.input),
        result(out, output, plan.underflow == "min", found),
        _adder(plan.accumulator, plan.input.gamma, x.device),
        window,
        out.numel(),
        (plan.input_offset - plan.acc_offset, plan.acc_offset - plan.output_offset),
        (logs, log_shape),
    )
    _flush(out.numel(), found, counts)
    return out


def pool_words(
    x: Tensor,
    side: Side,
    into: _Result,
    with_adder: _Adder,
    window: Window,
    count: int,
    shifts: tuple[int, int],
    log_counts: tuple[Tensor, tuple[int, ...]],
) -> None:
    """Sums or averages of windows; shifts are the input's and the result's."""
    x = x.contiguous()
    p = _Pool(
        _words(x, side),
        into,
        with_adder,
        _geometry(x, window)[0],
        x.shape[0] * x.shape[1],
        *shifts,
        log_counts[0].data_ptr(),
        (c_int64 * 3)(*log_counts[1]),
    )
    _elements(x.device, "lns_average_pool", count, p)


def wait(device: torch.device) -> None:
    """Until everything that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
