"""The native library (native/lnsdeploy.h) through ctypes: the kernels of the `cpu` executor.

Arrays are passed as they are, without copies. Everything is checked here or there; the library never sees a
Python object.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy import tables
from lnsdeploy._native import build_info, library_path
from lnsdeploy.datapath import LinearAccumulator, LogAccumulator
from lnsdeploy.emulator import operands, reference
from lnsdeploy.emulator.plan import AddPlan, Counts, DotPlan, Ints, PoolPlan, RescalePlan, Window
from lnsdeploy.errors import BadTypeError, BadValueError, LNSError, MissingDependencyError, UnsupportedError
from lnsdeploy.formats import LNSFormat, Words

ABI = 4
THREADS_VARIABLE = "LNSDEPLOY_THREADS"
ISAS = {"portable": 0, "avx2": 1, "avx512": 2, "neon": 3}


class _Format(Structure):
    _fields_ = (("bits", c_int32), ("is_signed", c_int32))


class _Output(Structure):
    _fields_ = (("format", _Format), ("underflow_min", c_int32))


class _Error(Structure):
    _fields_ = (("text", c_char_p), ("size", c_size_t))


class _Counts(Structure):
    _fields_ = (
        ("total", c_int64),
        ("saturated", c_int64),
        ("flushed", c_int64),
        ("saturated_negative", c_int64),
    )


class _Window(Structure):
    _fields_ = (
        ("kernel", c_int64 * 3),
        ("strides", c_int64 * 3),
        ("pads", c_int64 * 6),
        ("dilations", c_int64 * 3),
    )


class _DotDesc(Structure):
    _fields_ = (
        ("log", c_int32),
        ("activation", _Format),
        ("weight", _Format),
        ("activation_widen", c_int64),
        ("weight_widen", c_int64),
        ("output", _Output),
        ("groups", c_int64),
        ("channels", c_int64),
        ("depth", c_int64),
        ("weight_words", c_void_p),
        ("lanes", c_int32),
        ("acc_bits", c_int32),
        ("psum_bits", c_int32),
        ("saturate", c_int32),
        ("terms", c_void_p),
        ("terms_are_64", c_int32),
        ("bins", c_int64),
        ("term_columns", c_int64),
        ("constants", c_void_p),
        ("thresholds", c_void_p),
        ("threshold_count", c_int64),
        ("guard_bits", c_int32),
        ("delta_plus", c_void_p),
        ("delta_plus_count", c_int64),
        ("delta_minus", c_void_p),
        ("delta_minus_count", c_int64),
        ("entry_shift", c_void_p),
        ("bias", c_void_p),
        ("code_shift", c_void_p),
    )


class _RescaleDesc(Structure):
    _fields_ = (
        ("input", _Format),
        ("input_offset", c_int64),
        ("multiply", c_int64),
        ("divide", c_int64),
        ("output_offset", c_int64),
        ("output", _Output),
    )


class _Adder(Structure):
    _fields_ = (
        ("acc_bits", c_int32),
        ("guard_bits", c_int32),
        ("delta_plus", c_void_p),
        ("delta_plus_count", c_int64),
        ("delta_minus", c_void_p),
        ("delta_minus_count", c_int64),
    )


class _AddDesc(Structure):
    _fields_ = (
        ("adder", _Adder),
        ("a", _Format),
        ("b", _Format),
        ("a_shift", c_int64),
        ("b_shift", c_int64),
        ("code_shift", c_int64),
        ("output", _Output),
    )


class _AverageDesc(Structure):
    _fields_ = (
        ("adder", _Adder),
        ("input", _Format),
        ("input_shift", c_int64),
        ("code_shift", c_int64),
        ("lanes", c_int32),
        ("output", _Output),
        ("log_counts", c_void_p),
        ("log_count_shape", c_int64 * 3),
    )


_COUNTS, _ERROR = POINTER(_Counts), POINTER(_Error)
_P, _N, _I, _F = c_void_p, c_int64, c_int32, c_float
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "lns_force_isa": (_I, _ERROR),
    "lns_dot_create": (POINTER(_DotDesc), POINTER(c_void_p), _ERROR),
    "lns_dot_run": (_P, _P, _N, _N, _N, _P, _I, _COUNTS, _ERROR),
    "lns_conv_run": (_P, POINTER(_Window), _P, _N, POINTER(_N), _P, _I, _COUNTS, _ERROR),
    "lns_encode": (_P, _N, _P, _N, _Format, _P, _I, _ERROR),
    "lns_encode_channels": (_P, _N, _N, _N, _P, _P, _Output, _P, _P, _I, _ERROR),
    "lns_round_floats": (_P, _N, _N, _I, _I, _P, _P, _N, _P, _P, _N, _I, _I, _P, _I, _ERROR),
    "lns_largest": (_P, _N, _N, _P, _I, _ERROR),
    "lns_largest_sums": (_N, _N, _N, _N, _N, _P, _P, _P, _P, _P, _P, _I, _ERROR),
    "lns_madam_octaves": (_N, _P, _P, _P, _F, _F, _F, _P, _I, _ERROR),
    "lns_madam_move": (_N, _P, _P, _P, _P, _P, _N, _I, _I, _P, POINTER(_N), _I, _ERROR),
    "lns_madam_codes": (
        *(_N, _P, _P, _P, _F, _F, _F, _I, _I, _P, _I, _I),
        *(_P, _N, _P, _N, _P, POINTER(_N), _I, _ERROR),
    ),
    "lns_random_bytes": (c_uint64, c_uint64, c_uint64, _N, _P, _I, _ERROR),
    "lns_histogram": (_P, _I, _N, _I, _P, _I, _ERROR),
    "lns_decode": (_P, _I, _N, _P, _N, _P, _I, _ERROR),
    "lns_relu": (_P, _N, _Format, _P, _I, _ERROR),
    "lns_clip": (_P, _N, _Format, _N, _N, _P, _I, _ERROR),
    "lns_max_pool": (_P, _N, POINTER(_N), _Format, POINTER(_Window), _P, _I, _ERROR),
    "lns_rescale": (POINTER(_RescaleDesc), _P, _N, _P, _I, _COUNTS, _ERROR),
    "lns_add": (POINTER(_AddDesc), _I, POINTER(_N), _P, POINTER(_N), _P, POINTER(_N), _P, _I, _COUNTS, _ERROR),
    "lns_average_pool": (POINTER(_AverageDesc), _P, _N, POINTER(_N), POINTER(_Window), _P, _I, _COUNTS, _ERROR),
}


@lru_cache(maxsize=1)
def _load() -> tuple[Any, str | None]:
    """The library, or None and why there is none."""
    path = library_path()
    if path is None:
        why = build_info().get("why") or "it was not built"
        return None, (
            f"the native library is missing: {why}. Install a C++ compiler and install lnsdeploy again; until then the "
            "reference runs everything, some thousand times slower"
        )
    try:
        library = ctypes.CDLL(str(path))
        found = int(library.lns_abi())
    except (OSError, AttributeError) as error:
        return None, f"the native library {path} cannot be loaded: {error}; install lnsdeploy again"
    if found != ABI:
        return None, f"the native library {path} has interface {found}, {ABI} is needed; install lnsdeploy again"
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int32
    library.lns_dot_destroy.argtypes, library.lns_dot_destroy.restype = (_P,), None
    library.lns_dot_kernel.argtypes, library.lns_dot_kernel.restype = (_P,), c_char_p
    library.lns_isa_available.argtypes = (_I,)
    return library, None


def unavailable() -> str | None:
    """Why the native library cannot be used and what that costs, or None."""
    return _load()[1]


def is_available() -> bool:
    """Whether the native library can be used."""
    return unavailable() is None


def library() -> dict[str, Any]:
    """What `info` says: whether it is available, instruction sets, threads, and how it was built."""
    if why := unavailable():
        return {"available": False, "why": why, "build": build_info()}
    return {"available": True, "isa": isa(), "isas": isas(), "threads": threads(), "build": build_info()}


def _library() -> Any:
    library, why = _load()
    if library is None:
        raise MissingDependencyError(str(why))
    return library


_KINDS: dict[int, type[LNSError]] = {1: BadValueError, 3: UnsupportedError}


def _call(name: str, *arguments: Any) -> None:
    text = ctypes.create_string_buffer(512)
    error = _Error(ctypes.cast(text, c_char_p), len(text))
    status = getattr(_library(), name)(*arguments, byref(error))
    if status == 2:
        raise MemoryError(f"{name}: out of memory")
    if status:
        raise _KINDS.get(status, LNSError)(f"{name.removeprefix('lns_')}: {text.value.decode('utf-8', 'replace')}")


def isas() -> list[str]:
    """Instruction sets that this machine and build can use, the slowest first."""
    library = _library()
    return [name for name, number in ISAS.items() if library.lns_isa_available(number)]


def isa() -> str:
    """The instruction set in use."""
    number = _library().lns_isa_in_use()
    return next(name for name, known in ISAS.items() if known == number)


@contextmanager
def forced_isa(name: str | None) -> Any:
    """Use one instruction set for all layers that are made inside; None for the best.

    Raises:
        UnsupportedError: this machine or build does not have it.
    """
    before = isa()
    best = isas()[-1]
    _call("lns_force_isa", -1 if name is None else ISAS.get(name, -2))
    try:
        yield
    finally:
        _call("lns_force_isa", -1 if before == best else ISAS[before])


def threads() -> int:
    """Threads to compute with: ``LNSDEPLOY_THREADS``, or one for each core that this process may use.

    Raises:
        BadValueError: the variable is not a positive integer.
    """
    text = os.environ.get(THREADS_VARIABLE)
    if text:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1024:
            raise BadValueError(f"{THREADS_VARIABLE} must be an integer from 1 to 1024, not {text!r}")
        return int(text)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------


def _format(fmt: LNSFormat) -> _Format:
    if fmt.bits > 16:
        raise UnsupportedError(f"format {fmt}: the native library has words of at most 16 bits; use the reference")
    return _Format(fmt.bits, int(fmt.signed))


def _output(fmt: LNSFormat, underflow: str) -> _Output:
    return _Output(_format(fmt), int(underflow == "min"))


def _words(x: Any, fmt: LNSFormat, what: str) -> Words:
    """Words as an array of the format's dtype, contiguous."""
    # not ascontiguousarray, which gives a scalar an axis and leaves odd addresses
    array: Words = np.require(x, requirements=["C", "ALIGNED"])
    if array.dtype != fmt.dtype:
        raise BadTypeError(f"{what}: words of {fmt} are {fmt.dtype}, not {array.dtype}")
    return array


def _window(window: Window) -> _Window:
    missing = 3 - len(window.kernel)
    ones, zeros = (1,) * missing, (0,) * missing
    axes = len(window.kernel)
    return _Window(
        (*ones, *window.kernel),
        (*ones, *window.strides),
        (*zeros, *window.pads[:axes], *zeros, *window.pads[axes:]),
        (*ones, *window.dilations),
    )


def _sizes(shape: Sequence[int]) -> Any:
    return (c_int64 * 3)(*[1] * (3 - len(shape)), *shape)


def _flush(found: _Counts, counts: Counts | None) -> None:
    if counts is not None:
        counts.add(found.total, found.saturated, found.flushed, found.saturated_negative)


class NativeDot:
    """A layer in the native library: its weights are packed once (spec 3 to 5, 7).

    Args:
        plan: its datapath, formats and offsets.
        words: weights [N, K], or [N, C/groups, *kernel] of a convolution.
        bias: as for :func:`lnsdeploy.emulator.reference.dot`.
        groups: of a convolution.

    Raises:
        UnsupportedError: a format or table is beyond the library's integers.
        BadTypeError, BadValueError: shapes or dtypes do not fit.
    """

    def __init__(self, plan: DotPlan, words: Words, bias: Ints | None = None, groups: int = 1):
        self._handle = c_void_p()
        self.plan, self.groups = plan, groups
        words = _words(words, plan.weight, "weights")
        if words.ndim < 2:
            raise BadValueError(f"weights have the shape [N, K] or [N, C, *kernel], not {words.shape}")
        self.shape = words.shape
        self.channels, self.depth = words.shape[0], int(np.prod(words.shape[1:]))
        if bias is not None:
            bias = np.require(bias, dtype=np.int64, requirements=["C", "ALIGNED"])
            if bias.shape != (self.channels,):
                raise BadValueError(f"a bias for {self.channels} output channels has shape {bias.shape}")
        accumulator = plan.datapath.accumulate
        desc = _DotDesc(
            log=int(not plan.datapath.is_linear),
            activation=_format(plan.activation),
            weight=_format(plan.weight),
            activation_widen=plan.widen_activation,
            weight_widen=plan.widen_weight,
            output=_output(plan.output, plan.datapath.underflow),
            groups=groups,
            channels=self.channels,
            depth=self.depth,
            weight_words=words.ctypes.data,
            lanes=accumulator.lanes,
            acc_bits=accumulator.bits,
        )
        # arrays stay alive until the layer is made
        keep: list[npt.NDArray[Any]] = [words]

        def pointer(array: npt.NDArray[Any]) -> int:
            keep.append(np.require(array, requirements=["C", "ALIGNED"]))
            return int(keep[-1].ctypes.data)

        if isinstance(accumulator, LinearAccumulator):
            made = operands.linear_tables(plan, self.channels, bias)
            terms = made["terms"]
            desc.psum_bits, desc.saturate = accumulator.step_bits, int(accumulator.overflow == "saturate")
            desc.terms, desc.terms_are_64 = pointer(terms), int(terms.dtype == np.int64)
            desc.bins, desc.term_columns = terms.shape
            desc.constants = pointer(made["constants"])
            desc.thresholds, desc.threshold_count = pointer(made["thresholds"]), len(made["thresholds"])
        else:
            made = operands.log_tables(plan, self.channels, bias)
            desc.guard_bits = accumulator.guard_bits
            desc.delta_plus, desc.delta_plus_count = pointer(made["delta_plus"]), len(made["delta_plus"])
            desc.delta_minus, desc.delta_minus_count = pointer(made["delta_minus"]), len(made["delta_minus"])
            desc.entry_shift = pointer(made["entry_shift"])
        if bias is not None:
            desc.bias = pointer(made["bias"].astype(np.int64))
        desc.code_shift = pointer(made["code_shift"])
        _call("lns_dot_create", byref(desc), byref(self._handle))

    def __del__(self) -> None:
        # at interpreter exit the library may be gone already
        if getattr(self, "_handle", None):
            try:  # noqa: SIM105 (and `suppress` with it)
                _library().lns_dot_destroy(self._handle)
            except Exception:
                pass

    @property
    def kernel(self) -> str:
        """The kernel that was chosen, and its instruction set."""
        name: bytes = _library().lns_dot_kernel(self._handle)
        return name.decode()

    def dot(self, a: Words, counts: Counts | None = None, count_threads: int | None = None) -> Words:
        """Matrix product of activations [M, K], of any strides, with the weights: words [M, N]."""
        a = np.asarray(a)
        if a.dtype != self.plan.activation.dtype:
            raise BadTypeError(
                f"activations: words of {self.plan.activation} are {self.plan.activation.dtype}, not {a.dtype}"
            )
        if a.ndim != 2 or a.shape[1] != self.depth:
            raise BadValueError(f"a product needs activations [M, {self.depth}], not {a.shape}")
        if any(stride % a.itemsize for stride in a.strides) or not a.flags.aligned:
            a = np.require(a, requirements=["C", "ALIGNED"])
        row, column = (stride // a.itemsize for stride in a.strides)
        result = np.empty((a.shape[0], self.channels), dtype=self.plan.output.dtype)
        found = _Counts()
        _call(
            "lns_dot_run",
            self._handle,
            a.ctypes.data,
            a.shape[0],
            row,
            column,
            result.ctypes.data,
            count_threads or threads(),
            byref(found),
        )
        _flush(found, counts)
        return result

    def convolution(
        self, x: Words, window: Window, counts: Counts | None = None, count_threads: int | None = None
    ) -> Words:
        """Convolution of x [B, C, *spatial] with the weights (spec 7.1): words [B, N, *output spatial]."""
        x = _words(x, self.plan.activation, "activations")
        axes = len(window.kernel)
        if x.ndim != axes + 2 or self.shape[2:] != window.kernel or x.shape[1] != self.shape[1] * self.groups:
            raise BadValueError(
                f"a convolution of {x.shape} with weights {self.shape}, kernel {window.kernel} and {self.groups} "
                "groups does not fit"
            )
        sizes = window.output_shape(x.shape[2:])
        result = np.empty((x.shape[0], self.channels, *sizes), dtype=self.plan.output.dtype)
        found = _Counts()
        _call(
            "lns_conv_run",
            self._handle,
            byref(_window(window)),
            x.ctypes.data,
            x.shape[0],
            _sizes(x.shape[2:]),
            result.ctypes.data,
            count_threads or threads(),
            byref(found),
        )
        _flush(found, counts)
        return result


@lru_cache(maxsize=256)
def _thresholds(fmt: LNSFormat, offset: int, underflow: str) -> npt.NDArray[np.float32]:
    return operands.encode_thresholds(fmt, offset, underflow)


@lru_cache(maxsize=256)
def _values(fmt: LNSFormat, offset: int) -> npt.NDArray[np.float32]:
    return operands.decode_values(fmt, offset)


def encode(x: npt.NDArray[np.float32], fmt: LNSFormat, offset: int, underflow: str = "zero") -> Words:
    """Words of float32 numbers, to nearest (spec 2.1, 2.4); negative ones into an unsigned format are taken as 0.

    Raises:
        BadValueError: NaN in `x`.
    """
    x = np.require(x, dtype=np.float32, requirements=["C", "ALIGNED"])
    native = _format(fmt)
    if np.isnan(x).any():
        raise BadValueError("NaN has no LNS word")
    table = _thresholds(fmt, offset, underflow)
    words = np.empty(x.shape, dtype=fmt.dtype)
    _call("lns_encode", x.ctypes.data, x.size, table.ctypes.data, len(table), native, words.ctypes.data, threads())
    return words


@lru_cache(maxsize=32)
def octave_bounds(gamma: int) -> npt.NDArray[np.int32]:
    """Mantissas from which on a float32 rounds to the next code of its octave (spec 2.1)."""
    return (tables.octave_thresholds(gamma, 23, "nearest").astype(np.int64) - (1 << 23)).astype(np.int32)


def encode_channels(
    x: npt.NDArray[np.float32],
    fmt: LNSFormat,
    offsets: int | Ints,
    underflow: str = "zero",
    histogram: Ints | None = None,
) -> Words:
    """Words of float32 numbers, to nearest, at one offset or at one for each entry of the first axis (spec 2.1, 2.4).

    As :func:`encode`, without tables of the offset: for offsets that change from call to call.

    Args:
        histogram: int64 [2^bits]; how often each word came is added.

    Raises:
        UnsupportedError: γ above 2^14.
    """
    x = np.require(x, dtype=np.float32, requirements=["C", "ALIGNED"])
    shifts = np.require(offsets, dtype=np.int64, requirements=["C", "ALIGNED"])
    channels = x.shape[0] if shifts.ndim else 1
    if shifts.ndim and shifts.shape != x.shape[:1]:
        raise BadValueError(f"offsets of shape {shifts.shape} do not fit the first axis of {x.shape}")
    if histogram is not None and (histogram.shape != (1 << fmt.bits,) or histogram.dtype != np.int64):
        raise BadValueError(f"a histogram of {fmt} is int64 [{1 << fmt.bits}], not {histogram.dtype} {histogram.shape}")
    if fmt.gamma > 1 << 14:
        raise UnsupportedError(f"format {fmt}: the native library encodes gammas up to 16384; use formats.encode")
    thresholds = octave_bounds(fmt.gamma)
    words = np.empty(x.shape, dtype=fmt.dtype)
    _call(
        "lns_encode_channels",
        x.ctypes.data,
        channels,
        x.size // max(channels, 1),
        fmt.gamma,
        thresholds.ctypes.data,
        shifts.ctypes.data,
        _output(fmt, underflow),
        words.ctypes.data,
        None if histogram is None else histogram.ctypes.data,
        threads(),
    )
    return words


def round_floats(
    x: int,
    shape: tuple[int, int],
    grid: tuple[int, int, npt.NDArray[np.int32], npt.NDArray[np.int32]],
    limits: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]],
    y: int,
    *,
    signed: bool,
    underflow: str,
    threads: int,
) -> None:
    """decode(encode(x)) without words, for float32 numbers [channels, inner] at addresses `x` and `y`.

    Args:
        grid: bits below a bucket, the first bucket, bounds [buckets] and bits of values [buckets + 1].
        limits: bits of the least and of the largest magnitude with a code of its own, [1] or [channels] each.

    Raises:
        BadValueError: NaN in `x`, or limits outside the grid.
    """
    drop, first, bounds, values = grid
    low, high = limits
    if len(values) != len(bounds) + 1 or len(low) != len(high):
        raise BadValueError(f"{len(values)} values for {len(bounds)} bounds, {len(low)} and {len(high)} limits")
    _call(
        "lns_round_floats",
        x,
        *shape,
        drop,
        first,
        bounds.ctypes.data,
        values.ctypes.data,
        len(bounds),
        low.ctypes.data,
        high.ctypes.data,
        low.size,
        signed,
        underflow == "min",
        y,
        threads,
    )


def largest(x: int, shape: tuple[int, int], threads: int) -> npt.NDArray[np.float32]:
    """The largest magnitude of each row of float32 numbers [channels, inner] at address `x`; NaN where there is one."""
    found = np.zeros(shape[0], dtype=np.float32)
    _call("lns_largest", x, *shape, found.ctypes.data, threads)
    return found


def largest_sums(
    a: npt.NDArray[np.int32],
    w: npt.NDArray[np.int32],
    values: npt.NDArray[np.float64],
    bins_of: npt.NDArray[np.uint8] | None,
    start: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """The largest magnitude of each channel's partial sums, float64 [N], for placing accumulators.

    Args:
        a: codes with the sign of their value [M, K]; w: likewise [K, N].
        values: what a product adds, by the sum of its codes' magnitudes; bins_of: to which bin, None for one alone.
        start: initial sums [N], of bin 0.
    """
    a, w = (np.require(x, dtype=np.int32, requirements=["C", "ALIGNED"]) for x in (a, w))
    values, start = (np.require(x, dtype=np.float64, requirements=["C", "ALIGNED"]) for x in (values, start))
    if bins_of is not None:
        bins_of = np.require(bins_of, dtype=np.uint8, requirements=["C", "ALIGNED"])
    if a.ndim != 2 or w.ndim != 2 or a.shape[1] != w.shape[0] or start.shape != w.shape[1:]:
        raise BadValueError(
            f"sums need codes [M, K] and [K, N] and a start [N], not {a.shape}, {w.shape}, {start.shape}"
        )
    peak = np.zeros(w.shape[1], dtype=np.float64)
    bins = 1 if bins_of is None else int(bins_of.max(initial=0)) + 1
    place = None if bins_of is None else bins_of.ctypes.data
    _call(
        "lns_largest_sums",
        *a.shape,
        w.shape[1],
        bins,
        len(values),
        values.ctypes.data,
        place,
        a.ctypes.data,
        w.ctypes.data,
        start.ctypes.data,
        peak.ctypes.data,
        threads(),
    )
    return peak


def madam_octaves(
    count: int, weight: int, grad: int, moment: int, limits: tuple[float, float, float], x: int, threads: int
) -> None:
    """By how much log2 |w| changes in a step of Madam, for float32 numbers [count] at addresses.

    Args:
        limits: the least second moment, what the normalised gradient is multiplied by, and the bound of the product.
    """
    _call("lns_madam_octaves", count, weight, grad, moment, *limits, x, threads)


def madam_move(
    count: int,
    weight: int,
    grad: int,
    factor: int,
    bounds: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]],
    y: int,
    *,
    flip: bool,
    ascend: bool,
    threads: int,
) -> int:
    """Weights times factors, float32 [count] at addresses; `y` may be `weight`.

    Args:
        bounds: the least and the largest magnitude, [1] or [count] each.
        flip: magnitudes below the least change their sign.
        ascend: zeros wake along their gradient rather than against it.
    Returns: how many weights are at the largest magnitude.

    Raises:
        BadValueError: another number of bounds.
    """
    low, high = (np.ascontiguousarray(side, dtype=np.float32) for side in bounds)
    if low.shape != high.shape:
        raise BadValueError(f"bounds have shapes {low.shape} and {high.shape}")
    found = c_int64()
    _call(
        "lns_madam_move",
        *(count, weight, grad, factor, low.ctypes.data, high.ctypes.data, low.size, flip, ascend, y),
        *(byref(found), threads),
    )
    return found.value


def madam_codes(
    codes: npt.NDArray[np.int16],
    grad: int,
    moment: int,
    limits: tuple[float, float, float],
    random: npt.NDArray[np.uint8] | None,
    width: tuple[int, int],
    table: npt.NDArray[np.float32],
    bases: npt.NDArray[np.int64],
    y: int,
    *,
    flip: bool,
    ascend: bool,
    threads: int,
) -> int:
    """A step of integer Madam on signed codes, in place, and the values that their upper bits have.

    Args:
        codes: contiguous; `grad` and `moment` are addresses of as many float32 numbers, as is `y`.
        limits: as for :func:`madam_octaves`, the rate in codes, or in 256ths with `random`.
        random: a byte for each code, for stochastic rounding; None rounds to nearest.
        width: bits of a code, and how many of them are below those that are computed with.
        table: values by exponent.
        bases: what is added to a code's magnitude to index the table, [1] or one for each code.
    Returns: how many codes are at the largest magnitude.

    Raises:
        BadValueError: arrays do not belong together, or a base leads out of the table.
    """
    if not codes.flags.c_contiguous or codes.dtype != np.int16 or (random is not None and random.size != codes.size):
        raise BadValueError(f"codes must be contiguous int16, with a random byte each, not {codes.dtype}")
    table, bases = np.ascontiguousarray(table, np.float32), np.ascontiguousarray(bases, np.int64)
    drawn = None if random is None else np.ascontiguousarray(random, np.uint8)
    found = c_int64()
    _call(
        "lns_madam_codes",
        *(codes.size, codes.ctypes.data, grad, moment, *limits, flip, ascend),
        *(None if drawn is None else drawn.ctypes.data, *width),
        *(table.ctypes.data, table.size, bases.ctypes.data, bases.size, y, byref(found), threads),
    )
    return found.value


def random_bytes(seed: int, stream: int, count: int, start: int, threads: int) -> npt.NDArray[np.uint8]:
    """As :func:`lnsdeploy.formats.random_bytes`."""
    made = np.empty(count, dtype=np.uint8)
    mask = (1 << 64) - 1
    _call("lns_random_bytes", seed & mask, stream & mask, start, count, made.ctypes.data, threads)
    return made


def histogram(words: Words, bits: int) -> Ints:
    """How often each word of a width comes (of uint8 or uint16; further bits are ignored): int64 [2^bits]."""
    words = np.require(words, requirements=["C", "ALIGNED"])
    if words.dtype not in (np.uint8, np.uint16):
        raise BadTypeError(f"words of the native library are uint8 or uint16, not {words.dtype}")
    found = np.zeros(1 << bits, dtype=np.int64)
    _call("lns_histogram", words.ctypes.data, words.itemsize, words.size, bits, found.ctypes.data, threads())
    return found


def decode_by(words: Words, table: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Entry `words` of a table of 2^bits float32 values."""
    words = np.require(words, requirements=["C", "ALIGNED"])
    table = np.ascontiguousarray(table, dtype=np.float32)
    x = np.empty(words.shape, dtype=np.float32)
    _call(
        "lns_decode",
        words.ctypes.data,
        words.itemsize,
        words.size,
        table.ctypes.data,
        len(table),
        x.ctypes.data,
        threads(),
    )
    return x


def decode(words: Words, fmt: LNSFormat, offset: int) -> npt.NDArray[np.float32]:
    """The float32 values of words (spec 2.5)."""
    words, _ = _words(words, fmt, "words"), _format(fmt)
    table = _values(fmt, offset)
    x = np.empty(words.shape, dtype=np.float32)
    _call(
        "lns_decode",
        words.ctypes.data,
        words.itemsize,
        words.size,
        table.ctypes.data,
        len(table),
        x.ctypes.data,
        threads(),
    )
    return x


def relu(x: Words, fmt: LNSFormat) -> Words:
    """Negative words become zero (spec 6.1)."""
    x = _words(x, fmt, "words")
    result = np.empty_like(x)
    _call("lns_relu", x.ctypes.data, x.size, _format(fmt), result.ctypes.data, threads())
    return result


def clip(x: Words, fmt: LNSFormat, low: int, high: int) -> Words:
    """Words limited to two words (spec 6.1)."""
    x = _words(x, fmt, "words")
    keys = [-(w & fmt.max_code) if w & fmt.sign_bit else w & fmt.max_code for w in (int(low), int(high))]
    result = np.empty_like(x)
    _call("lns_clip", x.ctypes.data, x.size, _format(fmt), *keys, result.ctypes.data, threads())
    return result


def _spatial(x: Words, window: Window) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    if x.ndim != len(window.kernel) + 2:
        raise BadValueError(
            f"a window over {len(window.kernel)} axes needs an array [B, C, …] of {len(window.kernel) + 2} axes, "
            f"not {x.shape}"
        )
    return x.shape[0] * x.shape[1], x.shape[2:], (*x.shape[:2], *window.output_shape(x.shape[2:]))


def max_pool(x: Words, fmt: LNSFormat, window: Window) -> Words:
    """The largest value of each window of x [B, C, *spatial] (spec 6.1)."""
    x = _words(x, fmt, "words")
    outer, size, shape = _spatial(x, window)
    result = np.empty(shape, dtype=x.dtype)
    _call(
        "lns_max_pool",
        x.ctypes.data,
        outer,
        _sizes(size),
        _format(fmt),
        byref(_window(window)),
        result.ctypes.data,
        threads(),
    )
    return result


@lru_cache(maxsize=64)
def _deltas(accumulator: LogAccumulator, gamma: int) -> operands.Arrays:
    return operands.delta_tables(accumulator, gamma)


def _adder(accumulator: LogAccumulator, gamma: int) -> _Adder:
    made = _deltas(accumulator, gamma)
    plus, minus = made["delta_plus"], made["delta_minus"]
    return _Adder(accumulator.bits, accumulator.guard_bits, plus.ctypes.data, len(plus), minus.ctypes.data, len(minus))


def add(a: Words, b: Words, plan: AddPlan, counts: Counts | None = None) -> Words:
    """Element-wise sum by the log adder (spec 6.4), with NumPy broadcasting."""
    a, b = np.asarray(a), np.asarray(b)
    for x, fmt, what in ((a, plan.a, "first operand"), (b, plan.b, "second operand")):
        if x.dtype != fmt.dtype:
            raise BadTypeError(f"{what}: words of {fmt} are {fmt.dtype}, not {x.dtype}")
    x, y = np.broadcast_arrays(*(np.require(v, requirements=["ALIGNED"]) for v in (a, b)))
    desc = _AddDesc(
        _adder(plan.accumulator, plan.output.gamma),
        _format(plan.a),
        _format(plan.b),
        plan.a_offset - plan.acc_offset,
        plan.b_offset - plan.acc_offset,
        plan.acc_offset - plan.output_offset,
        _output(plan.output, plan.underflow),
    )
    if x.ndim > 8:
        raise UnsupportedError(f"at most 8 axes can be added, not {x.ndim}; reshape first")
    numbers = c_int64 * max(x.ndim, 1)
    result = np.empty(x.shape, dtype=plan.output.dtype)
    found = _Counts()
    _call(
        "lns_add",
        byref(desc),
        x.ndim,
        numbers(*x.shape),
        x.ctypes.data,
        numbers(*(s // x.itemsize for s in x.strides)),
        y.ctypes.data,
        numbers(*(s // y.itemsize for s in y.strides)),
        result.ctypes.data,
        threads(),
        byref(found),
    )
    _flush(found, counts)
    return result


def average_pool(
    x: Words,
    plan: PoolPlan,
    window: Window,
    count_include_pad: bool = False,
    counts: Counts | None = None,
) -> Words:
    """Average of each window of x [B, C, *spatial] by the log adder (spec 6.5)."""
    return _pool(x, plan, window, reference.log_counts(np.shape(x)[2:], plan, window, count_include_pad), counts)


def sum_window(x: Words, plan: PoolPlan, window: Window, counts: Counts | None = None) -> Words:
    """Sum of each window of x [B, C, *spatial] by the log adder (spec 6.5)."""
    return _pool(x, plan, window, np.zeros((1,) * len(window.kernel), dtype=np.int64), counts)


def _pool(x: Words, plan: PoolPlan, window: Window, divisor: Ints, counts: Counts | None) -> Words:
    x = _words(x, plan.input, "words")
    outer, size, shape = _spatial(x, window)
    divisor = np.ascontiguousarray(divisor, dtype=np.int64)
    desc = _AverageDesc(
        _adder(plan.accumulator, plan.input.gamma),
        _format(plan.input),
        plan.input_offset - plan.acc_offset,
        plan.acc_offset - plan.output_offset,
        plan.accumulator.lanes,
        _output(plan.output, plan.underflow),
        divisor.ctypes.data,
        _sizes(divisor.shape),
    )
    result = np.empty(shape, dtype=plan.output.dtype)
    found = _Counts()
    _call(
        "lns_average_pool",
        byref(desc),
        x.ctypes.data,
        outer,
        _sizes(size),
        byref(_window(window)),
        result.ctypes.data,
        threads(),
        byref(found),
    )
    _flush(found, counts)
    return result


def rescale(x: Words, plan: RescalePlan, counts: Counts | None = None) -> Words:
    """Words of another format or offset (spec 6.3)."""
    x = _words(x, plan.input, "words")
    desc = _RescaleDesc(
        _format(plan.input),
        plan.input_offset,
        max(plan.output.gamma // plan.input.gamma, 1),
        max(plan.input.gamma // plan.output.gamma, 1),
        plan.output_offset,
        _output(plan.output, plan.underflow),
    )
    result = np.empty(x.shape, dtype=plan.output.dtype)
    found = _Counts()
    _call("lns_rescale", byref(desc), x.ctypes.data, x.size, result.ctypes.data, threads(), byref(found))
    _flush(found, counts)
    return result
