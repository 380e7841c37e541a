"""Fake quantization: float tensors that hold exactly the values of LNS words (docs/training.md).

The forward pass is decode(encode(x)) of :mod:`lnsdeploy.formats` to the bit; the backward pass is the
straight-through estimator (Bengio et al. 2013), the derivative of the identity. A training step rounds many
small tensors, so formats of up to 16 bits have a path of their own that looks values up by the float's
leading bits, without words in between.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lnsdeploy import tables
from lnsdeploy.emulator import native
from lnsdeploy.errors import BadTypeError, BadValueError, UnknownNameError
from lnsdeploy.formats import UNDERFLOWS, LNSFormat, Method, Underflow, calibrate, decode, encode, offset_for
from lnsdeploy.training.processes import averaged, largest

Saturated = Literal["pass", "zero"]

SATURATED = ("pass", "zero")
PERCENTILE = 99.9

_Bits = npt.NDArray[np.int32]

_CHUNK = 1 << 15
_MANTISSA = 23
_BIAS = 127
_INFINITY = 0x7F800000
_MAGNITUDE = np.int32(0x7FFFFFFF)
_BY_BITS = (torch.float32, torch.float16, torch.bfloat16)
# Above, a table would no longer be small beside the tensors that go through it.
_TABLE_BITS = 16
_TABLE_GAMMA = 1 << 12
# Above the error of a float64 log2, whose result is at most 1,100; relative to γ.
_LOG_ERROR = 1e-11
# Octaves of a table are rounded out to multiples of this, so that drifting offsets find it in the cache.
_OCTAVES = 16


# ---------------------------------------------------------------------------------------------------
# Rounding floats to the grid 2^(k/γ), by their bits


class _Grid:
    """Rounds magnitudes of float32 to the nearest (in the log domain) 2^(k/γ), over some octaves.

    A bucket of leading bits holds at most one threshold (spec 2.1). Below it the value is the bucket's own, from
    it on the next bucket's.
    """

    def __init__(self, gamma: int, low: int, high: int):
        thresholds = _thresholds(gamma)
        self.drop = _MANTISSA - min(gamma.bit_length() + 1, _MANTISSA)
        while True:
            starts = np.arange(1 << (_MANTISSA - self.drop), dtype=np.int64) << self.drop
            first = np.searchsorted(thresholds, starts, side="right")
            if self.drop == 0 or int(np.diff(first, append=gamma).max()) <= 1:
                break
            self.drop -= 1
        exponents = np.arange(low, high + 1, dtype=np.int64)[:, None]
        # no bits reach a threshold beyond the octave's end: in such a bucket there is none
        padded = np.append(thresholds, np.int64(1) << _MANTISSA)
        bounds = ((exponents + _BIAS) << _MANTISSA) + padded[first]
        codes = (exponents * gamma + first).reshape(-1)
        # the largest bits below the threshold
        self.bounds = (bounds.reshape(-1) - 1).astype(np.int32)
        self.values = _powers(gamma, np.append(codes, (high + 1) * gamma)).view(np.int32)
        self.first = (low + _BIAS) << (_MANTISSA - self.drop)
        self._tensors: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`bounds` and `values` as int32 tensors on a device."""
        if device not in self._tensors:
            self._tensors[device] = tuple(torch.from_numpy(a).to(device) for a in (self.bounds, self.values))  # type: ignore[assignment]
        return self._tensors[device]

    def __call__(self, bits: _Bits) -> _Bits:
        """Bits of the values of magnitudes given as bits, int32 of any shape within the grid's octaves."""
        key = (bits >> self.drop).astype(np.intp)
        key -= self.first
        # −1 from the threshold on, else 0
        above = self.bounds.take(key)
        above -= bits
        above >>= 31
        key -= above
        return self.values.take(key)


@lru_cache(maxsize=32)
def _thresholds(gamma: int) -> npt.NDArray[np.int64]:
    """Mantissas from which on a significand rounds to the next code of its octave."""
    return tables.octave_thresholds(gamma, _MANTISSA, "nearest").astype(np.int64) - (1 << _MANTISSA)


def _powers(gamma: int, exponents: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """2^(exponents/γ), the nearest float32; for normal results, and infinity beyond."""
    octave, remainder = np.divmod(exponents, gamma)
    significands = tables.octave_significands(gamma, _MANTISSA).astype(np.float64)[remainder]
    with np.errstate(over="ignore"):
        values: npt.NDArray[np.float32] = np.ldexp(significands, octave - _MANTISSA).astype(np.float32)
    return values


@lru_cache(maxsize=64)
def _grid(gamma: int, low: int, high: int) -> _Grid:
    return _Grid(gamma, low, high)


def _grid_for(gamma: int, low: int, high: int) -> _Grid:
    """The grid that covers all magnitudes with bits from `low` to `high`."""
    first = ((low >> _MANTISSA) - _BIAS) // _OCTAVES * _OCTAVES
    last = -(-((high >> _MANTISSA) - _BIAS + 1) // _OCTAVES) * _OCTAVES
    return _grid(gamma, max(first, 1 - _BIAS), min(last, _BIAS))


def _bound_bits(codes: npt.NDArray[np.int64], gamma: int) -> _Bits:
    """Bits of the smallest float32 not below 2^((codes + ½)/γ): where `codes` passes to `codes` + 1."""
    octave, remainder = np.divmod(codes, gamma)
    bits: _Bits = (((octave + _BIAS) << _MANTISSA) + _thresholds(gamma)[remainder]).astype(np.int32)
    return bits


@dataclass(frozen=True, eq=False)
class _Limits:
    """Where codes 1 … C lie, for one offset or for several, and the grid that serves them.

    Args:
        low, high: bits of the least and the largest magnitude that has such a code: [1] or [channels, 1].
        grid: covers all of them.
    """

    low: _Bits
    high: _Bits
    grid: _Grid


@lru_cache(maxsize=512)
def _limits(fmt: LNSFormat, offsets: bytes) -> _Limits | None:
    """The limits for int64 offsets, given as bytes because integers rarely change from step to step.

    Returns: None where the tables do not serve: the format is too wide, or a value is not a normal float32.
    """
    channels = np.frombuffer(offsets, dtype=np.int64)
    if fmt.bits > _TABLE_BITS or fmt.gamma > _TABLE_GAMMA:
        return None
    least, most = int(channels.min()), int(channels.max()) + fmt.max_code
    if least // fmt.gamma < 1 - _BIAS or most // fmt.gamma + 1 > _BIAS:
        return None
    low = _bound_bits(channels, fmt.gamma)
    high = _bound_bits(channels + fmt.max_code, fmt.gamma) - np.int32(1)
    return _Limits(low[:, None], high[:, None], _grid_for(fmt.gamma, int(low.min()), int(high.max())))


def _round(x: npt.NDArray[np.float32], fmt: LNSFormat, limits: _Limits, underflow: Underflow, name: str) -> _Bits:
    """Bits of decode(encode(x)) for x [1 or channels, n], contiguous."""
    raw_all = x.view(np.int32)
    result = np.empty_like(raw_all)
    # pieces whose temporaries stay in the cache
    rows, columns = max(1, _CHUNK // max(x.shape[1], 1)), max(1, min(x.shape[1], _CHUNK))
    for top in range(0, x.shape[0], rows):
        part = slice(top, top + rows)
        low, high = (limits.low, limits.high) if len(limits.low) == 1 else (limits.low[part], limits.high[part])
        for left in range(0, x.shape[1], columns):
            piece = part, slice(left, left + columns)
            result[piece] = _round_piece(raw_all[piece], fmt, low, high, limits.grid, underflow, name)
    return result


def _round_piece(
    raw: _Bits, fmt: LNSFormat, low: _Bits, high: _Bits, grid: _Grid, underflow: Underflow, name: str
) -> _Bits:
    bits = raw & _MAGNITUDE
    if int(bits.max()) > _INFINITY:
        raise BadValueError(f"{name} contains NaN, which has no LNS word")
    clamped = np.maximum(bits, low)
    np.minimum(clamped, high, out=clamped)
    values = grid(clamped)
    # shifts make masks, −1 or 0, in less time than booleans
    if underflow == "zero":
        if fmt.signed:
            values |= raw ^ bits
        else:
            values &= ~(raw >> 31)
        # low − 1 − bits is negative where there is a code
        np.subtract(low - np.int32(1), bits, out=clamped)
        clamped >>= 31
        values &= clamped
        return values
    # −0 is no negative number: it becomes +code 1
    negative = (raw >> 31) & (-bits >> 31)
    if fmt.signed:
        values |= negative << 31
        return values
    smallest = grid(np.broadcast_to(low, bits.shape))
    return (values & ~negative) | (smallest & negative)


def _round_natively(x: Tensor, fmt: LNSFormat, limits: _Limits, underflow: Underflow, name: str) -> Tensor:
    """:func:`_round` by the native library, in one pass and all of torch's threads."""
    made = torch.empty_like(x)
    grid = limits.grid
    try:
        native.round_floats(
            x.data_ptr(),
            (x.shape[0], x.shape[1]),
            (grid.drop, grid.first, grid.bounds, grid.values),
            (limits.low, limits.high),
            made.data_ptr(),
            signed=fmt.signed,
            underflow=underflow,
            threads=torch.get_num_threads(),
        )
    except BadValueError as error:
        raise BadValueError(f"{name} contains NaN, which has no LNS word") from error
    return made


def _round_tensor(x: Tensor, fmt: LNSFormat, limits: _Limits, underflow: Underflow, name: str) -> Tensor:
    """:func:`_round` by torch operations, for float32 tensors [1 or channels, n] of any device."""
    grid = limits.grid
    bounds, values = grid.on(x.device)
    low, high = (torch.from_numpy(a).to(x.device) for a in (limits.low, limits.high))
    raw = x.view(torch.int32)
    bits = raw & int(_MAGNITUDE)
    if bool((bits > _INFINITY).any()):
        raise BadValueError(f"{name} contains NaN, which has no LNS word")
    negative = (raw < 0) & (bits > 0)

    def rounded(magnitudes: Tensor) -> Tensor:
        key = (magnitudes >> grid.drop) - grid.first
        return values[key + (magnitudes > bounds[key])]

    made = rounded(torch.minimum(torch.maximum(bits, low), high))
    if underflow == "zero":
        signed = made | (raw ^ bits) if fmt.signed else made & _mask(raw >= 0)
        return signed & _mask(bits >= low)
    if fmt.signed:
        return torch.where(negative, made | -(1 << 31), made)
    return torch.where(negative, rounded(low.expand_as(bits)), made)


def _mask(condition: Tensor) -> Tensor:
    """−1 where a condition holds, else 0; int32."""
    return -condition.to(torch.int32)


def _quantize(
    x: Tensor, fmt: LNSFormat, offset: int | Tensor, axis: int | None, underflow: Underflow, mask: bool, name: str
) -> tuple[Tensor, Tensor | None]:
    """decode(encode(x)), and where x was above the largest code's bound (None: not asked for)."""
    limits = None
    if x.dtype in _BY_BITS and x.numel():
        if isinstance(offset, int):
            limits = _limits(fmt, offset.to_bytes(8, sys.byteorder, signed=True))
        elif axis is not None and axis % x.ndim == 0:
            channels = np.ascontiguousarray(offset.detach().cpu().numpy(), dtype=np.int64)
            limits = _limits(fmt, channels.tobytes())
    if limits is None:
        return _quantize_widely(x, fmt, offset, axis, underflow, mask, name)
    flat = x.detach().to(torch.float32).contiguous().view(len(limits.low), -1)
    if x.device.type != "cpu":
        made = _round_tensor(flat, fmt, limits, underflow, name).view(torch.float32).view(x.shape).to(x.dtype)
        if not mask:
            return made, None
        high = torch.from_numpy(limits.high).to(x.device)
        return made, ((flat.view(torch.int32) & int(_MAGNITUDE)) > high).view(x.shape)
    array = flat.numpy()
    if native.is_available():
        values = _round_natively(flat, fmt, limits, underflow, name)
    else:
        values = torch.from_numpy(_round(array, fmt, limits, underflow, name).view(np.float32))
    above = None
    if mask:
        above = torch.from_numpy((array.view(np.int32) & _MAGNITUDE) > limits.high).view(x.shape)
    return values.view(x.shape).to(x.dtype), above


def _quantize_widely(
    x: Tensor, fmt: LNSFormat, offset: int | Tensor, axis: int | None, underflow: Underflow, mask: bool, name: str
) -> tuple[Tensor, Tensor | None]:
    words = encode(x, fmt, offset, underflow=underflow, negative="clip", name=name, axis=axis)
    values: Tensor = decode(words, fmt, offset, torch.float64 if x.dtype == torch.float64 else torch.float32, axis=axis)
    above = None
    if mask:
        # code 1 of a format whose offset is o + C begins where code C ends
        beyond = encode(x, LNSFormat(2, fmt.gamma), offset + fmt.max_code, name=name, axis=axis)
        above = (beyond & 1).bool()
    return values.to(x.dtype), above


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        fmt: LNSFormat,
        offset: int | Tensor,
        axis: int | None,
        underflow: Underflow,
        saturated: Saturated,
        name: str,
    ) -> Tensor:
        values, above = _quantize(x, fmt, offset, axis, underflow, saturated == "zero", name)
        ctx.masked = above is not None
        if above is not None:
            ctx.save_for_backward(above)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if ctx.masked:
            grad = grad.masked_fill(ctx.saved_tensors[0], 0.0)
        return grad, None, None, None, None, None, None


def fake_quantize(
    x: Tensor,
    fmt: LNSFormat,
    offset: int | Tensor | npt.NDArray[np.int64],
    *,
    axis: int | None = None,
    underflow: Underflow = "zero",
    saturated: Saturated = "pass",
    name: str = "tensor",
) -> Tensor:
    """Round a tensor to the values of LNS words; gradients pass straight through.

    Args:
        x: float16, bfloat16, float32 or float64, any shape.
        fmt: the words' format. An unsigned one takes negative numbers as zero.
        offset: o, an integer, or integers [channels] with `axis`.
        axis: the channel axis of several offsets.
        underflow: what becomes of magnitudes below code 1: ``"zero"``, or ``"min"`` for code 1.
        saturated: the gradient where |x| is above the largest code's upper bound: ``"pass"``, as everywhere,
            or ``"zero"``.
        name: names the tensor in error messages.
    Returns: the values, exactly ``decode(encode(x))``, of the shape and dtype of `x`.

    Raises:
        BadValueError: NaN in `x`, or offsets that do not fit it.
        BadTypeError: `x` is not floating point, or offsets are not integers.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise BadTypeError(f"{name}: a floating-point tensor is needed, not {getattr(x, 'dtype', type(x).__name__)}")
    if underflow not in UNDERFLOWS:
        raise UnknownNameError("underflow rule", underflow, UNDERFLOWS)
    if saturated not in SATURATED:
        raise UnknownNameError("gradient rule", saturated, SATURATED)
    made = _checked_offset(offset, axis, x, name)
    result: Tensor = _StraightThrough.apply(x, fmt, made, axis, underflow, saturated, name)  # type: ignore[no-untyped-call]
    return result


def _checked_offset(offset: Any, axis: int | None, x: Tensor, name: str) -> int | Tensor:
    if isinstance(offset, (int, np.integer)) and not isinstance(offset, bool):
        return int(offset)
    if isinstance(offset, np.ndarray):
        offset = torch.from_numpy(offset)
    if not isinstance(offset, Tensor) or offset.is_floating_point() or offset.dtype == torch.bool:
        raise BadTypeError(f"{name}: offsets are integers, not {getattr(offset, 'dtype', type(offset).__name__)}")
    if offset.ndim == 0:
        return int(offset)
    if axis is None:
        raise BadValueError(f"{name}: several offsets were given, so name the channel axis they belong to (axis=…)")
    if offset.ndim != 1 or not -x.ndim <= axis < x.ndim or offset.shape[0] != x.shape[axis]:
        raise BadValueError(
            f"{name}: offsets of shape {tuple(offset.shape)} do not fit axis {axis} of a tensor of shape "
            f"{tuple(x.shape)}"
        )
    return offset


class _QuantizedBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fmt: LNSFormat, method: Method, per_channel: bool, shared: bool, name: str
    ) -> Tensor:
        ctx.rule = fmt, method, per_channel, shared, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        fmt, method, per_channel, shared, name = ctx.rule
        grad = averaged(grads[0]) if shared else grads[0]
        made = quantize_now(grad, fmt, method=method, per_channel=per_channel, shared=shared, name=name)
        return made, *[None] * 5


def quantize_backward(
    x: Tensor,
    fmt: LNSFormat,
    *,
    method: Method = "absmax",
    per_channel: bool = False,
    shared: bool = False,
    name: str = "gradient",
) -> Tensor:
    """`x` itself, whose gradient is rounded to the values of LNS words on its way back.

    Placed behind a layer it quantizes the layer's error, in front of a weight the weight's gradient (Q_E and Q_G of
    Zhao et al. 2022). Gradients change from step to step by orders of magnitude, so the offset is calibrated on the
    very tensor that is rounded.

    Args:
        x: any shape, floating point.
        fmt: the words' format.
        method: ``"absmax"``, ``"percentile"`` or ``"lsq"``.
        per_channel: one offset for each index of axis 0.
        shared: whether `x` is the same in all processes of a training, as weights are; their gradients are averaged
            before they are rounded.
        name: names the gradient in error messages.

    Raises:
        BadValueError: in the backward pass, NaN or infinity in the gradient.
    """
    made: Tensor = _QuantizedBackward.apply(x, fmt, method, per_channel, shared, name)  # type: ignore[no-untyped-call]
    return made


def quantize_now(
    x: Tensor,
    fmt: LNSFormat,
    *,
    method: Method = "absmax",
    per_channel: bool = False,
    shared: bool = False,
    name: str = "tensor",
) -> Tensor:
    """decode(encode(x)) with offsets calibrated on `x` itself (spec 2.6).

    Args:
        x, fmt, method, per_channel, name: as in :func:`quantize_backward`.
        shared: whether all processes of a training have the same `x`, so that none need be asked for its maximum.

    Raises:
        BadValueError: NaN or infinity in `x`.
    """
    if not x.numel():
        return x
    found: int | npt.NDArray[np.int64]
    if method == "absmax" and not per_channel:
        # the largest of all processes, since each has but its part of the batch
        maximum = _absmax(x) if shared else largest(_absmax(x))
        found = _offset(_finite(maximum, name), fmt)
    else:
        found = calibrate_weight(x, fmt, method=method, per_channel=per_channel, name=name)
    offset = torch.from_numpy(found) if isinstance(found, np.ndarray) else found
    return _quantize(x, fmt, offset, 0 if per_channel else None, "zero", False, name)[0]


# ---------------------------------------------------------------------------------------------------
# Offsets


def offsets_for(maxima: npt.NDArray[Any], fmt: LNSFormat) -> npt.NDArray[np.int64]:
    """:func:`lnsdeploy.formats.offset_for` of many maxima at once.

    Args:
        maxima: float32 or float64 [n], finite and not negative.
    Returns: int64 [n].
    """
    wide = np.asarray(maxima, dtype=np.float64)
    if wide.size and not 0 <= float(wide.min()) <= float(wide.max()) < math.inf:
        raise BadValueError("maxima must be finite and not negative")
    # zeros are given another number here and their own offset below
    exponents = np.log2(np.maximum(wide, np.finfo(np.float64).tiny))
    exponents *= fmt.gamma
    offsets: npt.NDArray[np.int64] = np.ceil(exponents).astype(np.int64) - fmt.max_code
    # float64 decides unless an integer is as near as its error; then integers do
    doubt = np.abs(exponents - np.rint(exponents)) < _LOG_ERROR * fmt.gamma
    doubt |= wide < np.finfo(np.float64).tiny
    if doubt.any():
        for index in np.flatnonzero(doubt):
            offsets[index] = offset_for(float(wide[index]), fmt)
    return offsets


def _offset(maximum: float, fmt: LNSFormat) -> int:
    """:func:`lnsdeploy.formats.offset_for`, faster where float64 can decide."""
    if maximum > np.finfo(np.float64).tiny:
        exponent = fmt.gamma * math.log2(maximum)
        if abs(exponent - round(exponent)) >= _LOG_ERROR * fmt.gamma:
            return math.ceil(exponent) - fmt.max_code
    return offset_for(maximum, fmt)


def calibrate_weight(
    weight: Tensor, fmt: LNSFormat, *, method: Method, per_channel: bool, name: str = "weight"
) -> int | npt.NDArray[np.int64]:
    """Offsets of a weight, equal to :func:`lnsdeploy.formats.calibrate` but fast for many channels.

    Args:
        weight: [channels, …].
        method: ``"absmax"``, ``"percentile"`` or ``"lsq"``.
        per_channel: one offset for each index of axis 0, instead of one for the tensor.
    Returns: int, or int64 [channels].

    Raises:
        BadValueError: NaN or infinity in `weight`.
    """
    if method == "absmax" and weight.dtype in (torch.float32, torch.float64) and weight.numel():
        tensor, channels = weight.detach(), len(weight) if per_channel else 1
        maxima: npt.NDArray[Any]
        if _is_native(tensor):
            maxima = _maxima(tensor, channels)
        else:
            low, high = torch.aminmax(tensor.reshape(channels, -1), dim=1)
            maxima = torch.maximum(-low, high).cpu().numpy()
        if not np.isfinite(maxima).all():
            raise BadValueError(f"{name} contains NaN or infinity; it cannot be calibrated")
        offsets = offsets_for(maxima, fmt)
        return offsets if per_channel else int(offsets[0])
    array = weight.detach().cpu().numpy()
    if method == "lsq" or array.dtype not in (np.float32, np.float64) or not array.size:
        found = calibrate(weight, fmt, method=method, axis=0 if per_channel else None, percentile=PERCENTILE, name=name)
        return found if per_channel else int(found)
    rows = np.abs(array).reshape(len(array) if per_channel else 1, -1)
    rank = max(math.ceil(rows.shape[1] * PERCENTILE / 100), 1) - 1
    maxima = np.partition(rows, rank, axis=1)[:, rank]
    if not np.isfinite(rows).all():
        raise BadValueError(f"{name} contains NaN or infinity; it cannot be calibrated")
    offsets = offsets_for(maxima, fmt)
    return offsets if per_channel else int(offsets[0])


def _finite(maximum: float, name: str) -> float:
    if not math.isfinite(maximum):
        raise BadValueError(
            f"{name} contains NaN or infinity: training has diverged (lower the learning rate), or the data is damaged"
        )
    return maximum


def _is_native(x: Tensor) -> bool:
    """Whether the native library finds a tensor's maxima."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and native.is_available()


def _absmax(x: Tensor) -> float:
    """The largest magnitude, NaN where there is one; reads the tensor once."""
    if _is_native(x):
        return float(_maxima(x, 1)[0])
    low, high = torch.aminmax(x.detach())
    return max(-float(low), float(high))


def _maxima(x: Tensor, channels: int) -> npt.NDArray[np.float32]:
    """The largest magnitude of each channel of a float32 tensor on the CPU, NaN where there is one."""
    flat = x.detach()
    if channels == 1:
        # the order of elements does not matter
        dense = flat.is_contiguous() or (flat.ndim == 4 and flat.is_contiguous(memory_format=torch.channels_last))
        flat = flat if dense else flat.contiguous()
    else:
        flat = flat.contiguous()
    return native.largest(flat.data_ptr(), (channels, flat.numel() // channels), torch.get_num_threads())


class ActivationQuantizer(nn.Module):
    """Fake quantization of a layer's input, with a running calibration of its offset.

    In training mode every batch moves a running maximum μ, from which the offset follows as in calibration
    (spec 2.6); in eval mode both are frozen. The batch's own maximum m is

    - ``"absmax"``: the largest magnitude; μ rises to it at once and decays towards it;
    - ``"percentile"``: the magnitude that 99.9 % of the elements do not exceed;
    - ``"lsq"``: the one whose offset has the least squared error.

    For the last two μ is the exponential moving average. The buffers `offset` (int64) and `maximum`
    (float32, −1 before the first batch) are part of the state dict.

    Args:
        fmt: the format of activations.
        method: ``"absmax"``, ``"percentile"`` or ``"lsq"``.
        decay: of the running maximum, per batch, 0 to 1.
        saturated: see :func:`fake_quantize`.
        name: names the tensor in error messages.
    """

    offset: Tensor
    maximum: Tensor

    def __init__(
        self,
        fmt: LNSFormat,
        method: Method = "absmax",
        *,
        decay: float = 0.99,
        saturated: Saturated = "pass",
        name: str = "activation",
    ):
        super().__init__()
        if not 0 <= decay < 1:
            raise BadValueError(f"decay must be at least 0 and below 1, not {decay}")
        self.format, self.method, self.decay, self.saturated, self.name = fmt, method, decay, saturated, name
        self.register_buffer("offset", torch.zeros((), dtype=torch.int64))
        self.register_buffer("maximum", torch.full((), -1.0))
        self._cached: tuple[tuple[int, int], int] | None = None

    @property
    def calibrated(self) -> bool:
        """Whether any batch has been seen, or an offset loaded."""
        return float(self.maximum) >= 0

    def observe(self, x: Tensor) -> None:
        """Move the running maximum by one batch.

        Raises:
            BadValueError: NaN or infinity in `x`.
        """
        if not x.numel():
            return
        found = _finite(largest(self._batch_maximum(x.detach())), self.name)
        before = float(self.maximum)
        if before < 0:
            after = found
        else:
            after = self.decay * before + (1 - self.decay) * found
            if self.method == "absmax":
                after = max(after, found)
        self.maximum.fill_(after)
        # from the stored float32, so that a loaded statistic gives the same offset
        self.offset.fill_(_offset(float(self.maximum), self.format))

    def _batch_maximum(self, x: Tensor) -> float:
        if self.method == "absmax":
            return _absmax(x)
        magnitudes = x.abs().reshape(-1)
        if not bool(torch.isfinite(magnitudes).all()):
            return math.nan
        if self.method == "percentile":
            rank = max(math.ceil(magnitudes.numel() * PERCENTILE / 100), 1)
            # the rank-th smallest from the top: far fewer candidates to sort
            return float(torch.topk(magnitudes, magnitudes.numel() - rank + 1).values[-1])
        if not bool(magnitudes.any()):
            return 0.0
        code = int(calibrate(x, self.format, method="lsq", name=self.name)) + self.format.max_code
        # half a code lower, so that the offset for this maximum is the one found, not the next
        return math.pow(2.0, (code - 0.5) / self.format.gamma)

    def forward(self, x: Tensor) -> Tensor:
        """x̂, of the shape and dtype of `x`.

        Raises:
            BadValueError: NaN in `x`; or in eval mode, if no batch has ever been seen.
        """
        if self.training:
            self.observe(x)
        elif not self.calibrated:
            raise BadValueError(
                f"{self.name} has never been calibrated: run real inputs through the model in train mode, or through "
                "lnsdeploy.training.calibrate_activations, before using it in eval mode"
            )
        return fake_quantize(x, self.format, int(self.offset), saturated=self.saturated, name=self.name)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        keys = [prefix + name for name in ("offset", "maximum")]
        if all(key in missing_keys for key in keys):
            # the state of a float model: calibration stays as it is
            for key in keys:
                missing_keys.remove(key)

    def extra_repr(self) -> str:
        return f"{self.format}, {self.method}, offset={int(self.offset)}"
