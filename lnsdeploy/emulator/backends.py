"""What an emulation on the fly runs on: one object for each kind of tensor, with words that it alone looks into.

CPU tensors go through the native library as NumPy views, without copies; CUDA tensors through the GPU kernels; and
``executor="reference"`` through the specification in NumPy, wherever the tensors are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lnsdeploy import formats
from lnsdeploy.emulator import native, reference
from lnsdeploy.emulator.plan import DotPlan, Ints, Window
from lnsdeploy.errors import MissingDependencyError, UnknownNameError, UnsupportedError
from lnsdeploy.formats import LNSFormat

EXECUTORS = ("cpu", "cuda", "reference")


class Layer(Protocol):
    """A product with its second operand packed."""

    @property
    def kernel(self) -> str:
        """What runs it, for people."""

    def dot(self, a: Any) -> Any:
        """Words [M, N] of words [M, K]."""

    def convolution(self, x: Any, window: Window) -> Any:
        """Words [B, N, *output spatial] of words [B, C, *spatial]."""


class Backend(Protocol):
    """Words of tensors. What `encode` and a layer give goes back into a layer, `histogram` and `decode` only."""

    name: str

    def encode(self, x: Tensor, fmt: LNSFormat, offsets: int | Ints, underflow: str) -> tuple[Any, Ints]:
        """Words of float32 or float64 numbers (contiguous), at one offset or one for each entry of the first axis; and
        how often each word came, int64 [2^bits]."""

    def reshape(self, words: Any, shape: tuple[int, ...]) -> Any:
        """The same words in another shape."""

    def layer(self, plan: DotPlan, words: Any, bias: Ints | None, groups: int) -> Layer:
        """A product with weights [N, K] or [N, C/groups, *kernel]."""

    def histogram(self, words: Any, bits: int) -> Ints:
        """How often each of 2^bits words came."""

    def decode(self, words: Any, table: npt.NDArray[np.float32], like: Tensor) -> Tensor:
        """Entry `words` of a table of 2^bits values, on the device of `like`."""

    def largest(self, words: Any, axis: int, fmt: LNSFormat) -> Ints:
        """The largest code of words of a format for each entry of an axis."""


class _ReferenceLayer:
    kernel = "reference"

    def __init__(self, plan: DotPlan, words: Any, bias: Ints | None, groups: int):
        self.plan, self.words, self.bias, self.groups = plan, words, bias, groups

    def dot(self, a: Any) -> Any:
        return reference.dot(a, self.words, self.bias, self.plan)

    def convolution(self, x: Any, window: Window) -> Any:
        return reference.convolution(x, self.words, self.bias, self.plan, window, self.groups)


class ReferenceBackend:
    """The specification in NumPy."""

    name = "reference"

    def encode(self, x: Tensor, fmt: LNSFormat, offsets: int | Ints, underflow: str) -> tuple[Any, Ints]:
        """See :class:`Backend`."""
        values = x.detach().cpu().numpy()
        words = formats.encode(
            values,
            fmt,
            offsets,
            axis=0 if np.ndim(offsets) else None,
            underflow=underflow,  # type: ignore[arg-type]
        )
        return words, np.bincount(words.reshape(-1), minlength=1 << fmt.bits).astype(np.int64)

    def reshape(self, words: Any, shape: tuple[int, ...]) -> Any:
        """See :class:`Backend`."""
        return words.reshape(shape)

    def layer(self, plan: DotPlan, words: Any, bias: Ints | None, groups: int) -> Layer:
        """See :class:`Backend`."""
        return _ReferenceLayer(plan, words, bias, groups)

    def histogram(self, words: Any, bits: int) -> Ints:
        """See :class:`Backend`."""
        return np.bincount(words.reshape(-1), minlength=1 << bits).astype(np.int64)

    def decode(self, words: Any, table: npt.NDArray[np.float32], like: Tensor) -> Tensor:
        """See :class:`Backend`."""
        return torch.from_numpy(table[words]).to(like.device)

    def largest(self, words: Any, axis: int, fmt: LNSFormat) -> Ints:
        """See :class:`Backend`."""
        codes = np.moveaxis(words & words.dtype.type(fmt.max_code), axis, 0).reshape(words.shape[axis], -1)
        found: Ints = codes.max(axis=1, initial=0).astype(np.int64)
        return found


class CpuBackend(ReferenceBackend):
    """The native library; what it does not hold is left to the reference."""

    name = "cpu"

    def encode(self, x: Tensor, fmt: LNSFormat, offsets: int | Ints, underflow: str) -> tuple[Any, Ints]:
        """See :class:`Backend`."""
        if x.dtype != torch.float32 or fmt.gamma > 1 << 14:
            return super().encode(x, fmt, offsets, underflow)
        counts = np.zeros(1 << fmt.bits, dtype=np.int64)
        return native.encode_channels(x.detach().numpy(), fmt, offsets, underflow, counts), counts

    def layer(self, plan: DotPlan, words: Any, bias: Ints | None, groups: int) -> Layer:
        """See :class:`Backend`."""
        try:
            return native.NativeDot(plan, words, bias, groups)
        except UnsupportedError:
            return super().layer(plan, words, bias, groups)

    def histogram(self, words: Any, bits: int) -> Ints:
        """See :class:`Backend`."""
        return native.histogram(words, bits)

    def decode(self, words: Any, table: npt.NDArray[np.float32], like: Tensor) -> Tensor:
        """See :class:`Backend`."""
        return torch.from_numpy(native.decode_by(words, table))


class DeviceBackend:
    """Words as torch tensors on a device of any make: products by kernels of its own, the rest by torch's integers.

    Args:
        name: of the executor.
        layer: makes a product of (plan, words, bias, groups), as :class:`lnsdeploy.emulator.native.NativeDot` does, on
            tensors.
    """

    def __init__(self, name: str, layer: Callable[[DotPlan, Tensor, Ints | None, int], Layer]):
        self.name, self._layer = name, layer

    def encode(self, x: Tensor, fmt: LNSFormat, offsets: int | Ints, underflow: str) -> tuple[Any, Ints]:
        """See :class:`Backend`."""
        if x.dtype != torch.float32 or fmt.gamma > 1 << 14:
            words, counts = ReferenceBackend().encode(x, fmt, offsets, underflow)
            return torch.from_numpy(words).to(x.device), counts
        words = encode_tensor(x, fmt, offsets, underflow)
        return words, self._counts(words, 1 << fmt.bits)

    def reshape(self, words: Any, shape: tuple[int, ...]) -> Any:
        """See :class:`Backend`."""
        return words.reshape(shape)

    def layer(self, plan: DotPlan, words: Any, bias: Ints | None, groups: int) -> Layer:
        """See :class:`Backend`."""
        return self._layer(plan, words, bias, groups)

    def histogram(self, words: Any, bits: int) -> Ints:
        """See :class:`Backend`."""
        return self._counts(words, 1 << bits)

    @staticmethod
    def _counts(words: Tensor, bins: int) -> Ints:
        counted = torch.bincount(words.reshape(-1).to(torch.int32), minlength=bins)
        found: Ints = counted.cpu().numpy().astype(np.int64)
        return found

    def decode(self, words: Any, table: npt.NDArray[np.float32], like: Tensor) -> Tensor:
        """See :class:`Backend`."""
        return torch.from_numpy(table).to(words.device)[words.to(torch.int32)]

    def largest(self, words: Any, axis: int, fmt: LNSFormat) -> Ints:
        """See :class:`Backend`."""
        codes = (words.to(torch.int32) & fmt.max_code).movedim(axis, 0).flatten(1)
        found = codes.amax(1) if codes.shape[1] else codes.new_zeros(codes.shape[0])
        made: Ints = found.cpu().numpy().astype(np.int64)
        return made


def encode_tensor(x: Tensor, fmt: LNSFormat, offsets: int | Ints, underflow: str) -> Tensor:
    """Words of float32 numbers by torch's integer operations, on any device (spec 2.1, 2.4); γ up to 2^14.

    NaN becomes zero; a negative number into an unsigned format is taken as 0.
    """
    bits = x.contiguous().view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    # a subnormal number is its stored integer, which a float32 holds exactly, times 2^-149
    subnormal = magnitude < 1 << 23
    scaled = torch.where(subnormal, magnitude.to(torch.float32).view(torch.int32), magnitude)
    exponent = (scaled >> 23) - torch.where(subnormal, 127 + 149, 127)
    bounds = torch.from_numpy(native.octave_bounds(fmt.gamma)).to(x.device)
    codes = torch.bucketize(scaled & 0x7FFFFF, bounds, out_int32=True, right=True)
    shift = torch.as_tensor(np.clip(offsets, -(1 << 29), 1 << 29).astype(np.int32), device=x.device)
    codes += (
        exponent * fmt.gamma - shift.reshape(-1, *[1] * (x.ndim - 1)) if shift.ndim else exponent * fmt.gamma - shift
    )
    least = 0 if underflow == "zero" else 1
    codes = codes.clamp(least, fmt.max_code)
    nothing = (magnitude == 0) | (magnitude > 0x7F800000)
    codes = torch.where(magnitude == 0x7F800000, fmt.max_code, torch.where(nothing, least, codes))
    if fmt.signed:
        codes |= torch.where((bits < 0) & (codes > 0) & ~nothing, fmt.sign_bit, 0)
    else:
        codes = torch.where(bits < 0, least, codes)
    return codes.to(torch.uint8 if fmt.bits <= 8 else torch.uint16)


@lru_cache(maxsize=1)
def _cpu() -> Backend:
    if why := native.unavailable():
        raise MissingDependencyError(f"executor 'cpu' is not available: {why}")
    return CpuBackend()


def backend_for(executor: str | None, device: torch.device) -> Backend:
    """The backend of an executor for tensors of a device; None chooses by the device, and takes the reference for the
    CPU where the native library is missing.

    Raises:
        UnknownNameError: no such executor for emulation on the fly.
        MissingDependencyError: it cannot run here.
        UnsupportedError: tensors of this device cannot be emulated, or not by this executor.
    """
    if executor is not None and executor not in EXECUTORS:
        raise UnknownNameError("executor", executor, EXECUTORS)
    if executor == "reference":
        return ReferenceBackend()
    if device.type == "cpu" and executor in (None, "cpu"):
        if executor is None and native.unavailable():
            return ReferenceBackend()
        return _cpu()
    if device.type == "cuda" and executor in (None, "cuda"):
        return _cuda()
    if executor is None:
        raise UnsupportedError(
            f"tensors on {device.type!r} have no executor: move the model to the CPU or a CUDA device, or choose "
            "executor='reference'"
        )
    raise UnsupportedError(f"executor {executor!r} does not take tensors on {device.type!r}")


@lru_cache(maxsize=1)
def _cuda() -> Backend:
    try:
        kernels = importlib.import_module("lnsdeploy.emulator.cuda")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"executor 'cuda' is not available: {error}; executor='reference' runs anywhere, slowly"
        ) from error
    if why := kernels.unavailable():
        raise MissingDependencyError(f"executor 'cuda' is not available: {why}")
    return DeviceBackend("cuda", kernels.CudaDot)
