"""What an emulation on the fly runs on: one object for each kind of tensor, with words that it alone looks into.

CPU tensors go through the native library as NumPy views, without copies; CUDA tensors through the GPU kernels; and
``executor="reference"`` through the specification in NumPy, wherever the tensors are.
"""

from __future__ import annotations

import importlib
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

    def histogram(self, words: Any) -> Ints:
        """How often each of 2^16 words came."""

    def decode(self, words: Any, table: npt.NDArray[np.float32], like: Tensor) -> Tensor:
        """Entry `words` of a table of 2^16 values, on the device of `like`."""

    def largest(self, words: Any, axis: int) -> Ints:
        """The largest code (the low 15 bits) of words for each entry of an axis."""


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

    def histogram(self, words: Any) -> Ints:
        """See :class:`Backend`."""
        return np.bincount(words.reshape(-1), minlength=1 << 16).astype(np.int64)

    def decode(self, words: Any, table: npt.NDArray[np.float32], like: Tensor) -> Tensor:
        """See :class:`Backend`."""
        return torch.from_numpy(table[words]).to(like.device)

    def largest(self, words: Any, axis: int) -> Ints:
        """See :class:`Backend`."""
        codes = np.moveaxis(words & np.uint16(0x7FFF), axis, 0).reshape(words.shape[axis], -1)
        return codes.max(axis=1, initial=0).astype(np.int64)


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

    def histogram(self, words: Any) -> Ints:
        """See :class:`Backend`."""
        return native.histogram(words)

    def decode(self, words: Any, table: npt.NDArray[np.float32], like: Tensor) -> Tensor:
        """See :class:`Backend`."""
        return torch.from_numpy(native.decode_by(words, table))


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
        module = importlib.import_module("lnsdeploy.emulator.cuda")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"executor 'cuda' is not available: {error}; executor='reference' runs anywhere, slowly"
        ) from error
    if why := module.unavailable():
        raise MissingDependencyError(f"executor 'cuda' is not available: {why}")
    made: Backend = module.backend()
    return made
