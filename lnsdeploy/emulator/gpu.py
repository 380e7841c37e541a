"""The executors `cuda` and `torch`: nets on tensors, equal to the reference to the bit.

The functions have the names and signatures of :mod:`lnsdeploy.emulator.reference`, with tensors for arrays. CUDA
tensors go to the GPU kernels (:mod:`lnsdeploy.emulator.cuda`); those of any other device, and what the kernels'
integers do not hold, through plain torch operations (:mod:`lnsdeploy.emulator.portable`), on the same device. So every
net runs.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lnsdeploy.emulator import cuda, portable
from lnsdeploy.emulator import graph as g
from lnsdeploy.emulator.artifact import Artifact
from lnsdeploy.emulator.plan import AddPlan, Counts, DotPlan, PoolPlan, RescalePlan, Window
from lnsdeploy.emulator.portable import divide, maximum, minimum, multiply, negate, square_root
from lnsdeploy.errors import BadValueError, MissingDependencyError, UnsupportedError
from lnsdeploy.formats import LNSFormat, Words

__all__ = [
    "CudaExecutor",
    "TorchExecutor",
    "add",
    "average_pool",
    "clip",
    "convolution",
    "decode",
    "divide",
    "dot",
    "encode",
    "max_pool",
    "maximum",
    "minimum",
    "multiply",
    "negate",
    "relu",
    "rescale",
    "square_root",
    "sum_window",
]

DEVICE_VARIABLE = "LNSDEPLOY_TORCH_DEVICE"


def _either(name: str) -> Callable[..., Tensor]:
    """A function of the kernels, or the portable one where they cannot."""
    kernel, other = getattr(cuda, name), getattr(portable, name)

    def run(first: Tensor, *arguments: Any) -> Tensor:
        try:
            made: Tensor = kernel(first, *arguments)
        except UnsupportedError:
            made = other(first, *arguments)
        return made

    return run


_encode, _decode, _relu, _clip = (_either(name) for name in ("encode", "decode", "relu", "clip"))
_max_pool, _add, _rescale = (_either(name) for name in ("max_pool", "add", "rescale"))
_sum_window, _average_pool = (_either(name) for name in ("sum_window", "average_pool"))


def layer(plan: DotPlan, words: Tensor, bias: Any = None, groups: int = 1) -> cuda.CudaDot | None:
    """A layer for the kernels, or None where they cannot compute it."""
    try:
        return cuda.CudaDot(plan, words, bias, groups)
    except UnsupportedError:
        return None


def dot(a: Tensor, w: Tensor, bias: Any, plan: DotPlan, counts: Counts | None = None) -> Tensor:
    """Matrix product of words (spec 3, 4, 5); see :func:`lnsdeploy.emulator.reference.dot`."""
    portable.check_product(a, w, plan)
    made = layer(plan, w, portable.start_values(bias, w.shape[0]))
    return portable.dot(a, w, bias, plan, counts) if made is None else made.dot(a, counts)


def convolution(
    x: Tensor,
    w: Tensor,
    bias: Any,
    plan: DotPlan,
    window: Window,
    groups: int = 1,
    counts: Counts | None = None,
) -> Tensor:
    """Convolution (spec 7.1); see :func:`lnsdeploy.emulator.reference.convolution`."""
    portable.check_convolution(x, w, plan, window, groups)
    made = layer(plan, w, portable.start_values(bias, w.shape[0]), groups)
    if made is None:
        return portable.convolution(x, w, bias, plan, window, groups, counts)
    return made.convolution(x, window, counts)


def encode(x: Tensor, fmt: LNSFormat, offset: int, underflow: str = "zero") -> Tensor:
    """Words of float32 numbers (spec 2.1, 2.4); negative ones into an unsigned format are taken as 0."""
    return _encode(x, fmt, offset, underflow)


def decode(words: Tensor, fmt: LNSFormat, offset: int) -> Tensor:
    """The float32 values of words (spec 2.5)."""
    return _decode(words, fmt, offset)


def relu(words: Tensor, fmt: LNSFormat) -> Tensor:
    """Negative words become zero (spec 6.1)."""
    return _relu(words, fmt)


def clip(words: Tensor, fmt: LNSFormat, low: int, high: int) -> Tensor:
    """Words limited to two words (spec 6.1)."""
    return _clip(words, fmt, low, high)


def max_pool(x: Tensor, fmt: LNSFormat, window: Window) -> Tensor:
    """Largest value of each window (spec 6.1)."""
    return _max_pool(x, fmt, window)


def add(a: Tensor, b: Tensor, plan: AddPlan, counts: Counts | None = None) -> Tensor:
    """Element-wise sum by the log adder (spec 6.4)."""
    return _add(a, b, plan, counts)


def sum_window(x: Tensor, plan: PoolPlan, window: Window, counts: Counts | None = None) -> Tensor:
    """Sum of each window (spec 6.5)."""
    return _sum_window(x, plan, window, counts)


def average_pool(
    x: Tensor, plan: PoolPlan, window: Window, count_include_pad: bool = False, counts: Counts | None = None
) -> Tensor:
    """Average of each window (spec 6.5)."""
    return _average_pool(x, plan, window, count_include_pad, counts)


def rescale(words: Tensor, plan: RescalePlan, counts: Counts | None = None) -> Tensor:
    """Words of another format or offset (spec 6.3)."""
    return _rescale(words, plan, counts)


# ---------------------------------------------------------------------------------------------------

_Step = Callable[[list[Any], Counts], Any]


def _step(node: g.Node, functions: Any, device: torch.device) -> _Step:
    """What runs a node on tensors; the weights of a layer go to the device now."""
    if isinstance(node, (g.Gemm, g.Conv)):
        return _product(node, functions, device)
    if isinstance(node, g.Relu):
        fmt = node.format
        return lambda tensors, counts: functions.relu(tensors[0], fmt)
    if isinstance(node, g.Clip):
        low, high, limited = node.low, node.high, node.format
        return lambda tensors, counts: functions.clip(tensors[0], limited, low, high)
    if isinstance(node, g.MaxPool):
        pooled, window = node.format, node.window
        return lambda tensors, counts: functions.max_pool(tensors[0], pooled, window)
    if isinstance(node, g.Add):
        plan = node.plan
        return lambda tensors, counts: functions.add(tensors[0], tensors[1], plan, counts)
    if isinstance(node, g.AveragePool):
        average, pool_window, include = node.plan, node.window, node.count_include_pad
        return lambda tensors, counts: functions.average_pool(tensors[0], average, pool_window, include, counts)
    if isinstance(node, g.Rescale):
        change = node.plan
        return lambda tensors, counts: functions.rescale(tensors[0], change, counts)
    if isinstance(node, g.Transpose):
        order = node.order
        return lambda tensors, counts: tensors[0].permute(order)
    if isinstance(node, g.Concat):
        axis = node.axis
        return lambda tensors, counts: torch.cat(tensors, axis)
    if isinstance(node, g.MatMul):
        product = node.plan
        return lambda tensors, counts: _matmul(tensors[0], tensors[1], product, functions, counts)
    if isinstance(node, g.Multiply):
        times = node.plan
        return lambda tensors, counts: portable.product(tensors[0], tensors[1], times, counts)
    if isinstance(node, g.Lookup):
        table = torch.from_numpy(np.array(node.table)).to(device)
        return lambda tensors, counts: table[tensors[0].to(torch.int64)]
    if isinstance(node, g.Take):
        places, along = torch.tensor(node.indices, dtype=torch.int64, device=device), node.axis
        return lambda tensors, counts: tensors[0].index_select(along, places)
    if isinstance(node, g.Pad):
        pads = node.pads
        return lambda tensors, counts: _pad(tensors[0], pads)
    if isinstance(node, g.Broadcast):
        return lambda tensors, counts: tensors[0].expand(len(tensors[1]), *tensors[0].shape[1:])
    if isinstance(node, g.Decode):
        source = node.source
        return lambda tensors, counts: functions.decode(tensors[0].contiguous(), source.format, source.offset)
    if isinstance(node, g.Encode):
        return _encoding(node, functions, device)
    if isinstance(node, g.Float):
        run = node.run
        # on the CPU, as everywhere (spec 6.6); what is no array of a net's words stays there
        return lambda tensors, counts: run([_on_host(value) for value in tensors], counts)
    # a change of shape is the same for arrays and tensors
    return node.run


def _on_host(value: Any) -> npt.NDArray[Any]:
    return value.cpu().numpy() if isinstance(value, Tensor) else value


def _encoding(node: g.Encode, functions: Any, device: torch.device) -> _Step:
    info = node.result

    def encode_numbers(tensors: list[Any], counts: Counts) -> Any:
        values = g.numbers(np.asarray(_on_host(tensors[0])), node.name)
        return functions.encode(torch.from_numpy(values).to(device), info.format, info.offset, node.underflow)

    return encode_numbers


def _matmul(a: Tensor, b: Tensor, plan: DotPlan, functions: Any, counts: Counts | None) -> Tensor:
    """Matrix products of two tensors of words (spec 7.2); see :func:`lnsdeploy.emulator.reference.matmul`."""
    if a.ndim < 2 or a.ndim != b.ndim or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise BadValueError(
            f"products need words [..., M, K] and [..., K, N], not {tuple(a.shape)} and {tuple(b.shape)}"
        )
    x, w = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]).transpose(1, 2)
    made = [functions.dot(x[i].contiguous(), w[i].contiguous(), None, plan, counts) for i in range(len(x))]
    if not made:
        return torch.empty((*a.shape[:-1], b.shape[-1]), dtype=portable.word_dtype(plan.output), device=a.device)
    return torch.stack(made).reshape(*a.shape[:-1], b.shape[-1])


def _pad(x: Tensor, pads: tuple[int, ...]) -> Tensor:
    axes = x.ndim
    result = x.new_zeros([n + pads[i] + pads[axes + i] for i, n in enumerate(x.shape)])
    result[tuple(slice(pads[i], pads[i] + n) for i, n in enumerate(x.shape))] = x
    return result


def _product(node: g.Gemm | g.Conv, functions: Any, device: torch.device) -> _Step:
    words = torch.from_numpy(np.array(node.words)).to(device)
    groups = node.groups if isinstance(node, g.Conv) else 1
    made = layer(node.plan, words, node.bias, groups) if functions is not portable else None
    plan, bias = node.plan, node.bias

    def matrix(tensors: list[Any], counts: Counts) -> Any:
        x = tensors[0]
        rows = x.reshape(-1, x.shape[-1])
        y = functions.dot(rows, words, bias, plan, counts) if made is None else made.dot(rows, counts)
        return y.reshape(*x.shape[:-1], words.shape[0])

    if isinstance(node, g.Gemm):
        return matrix
    window = node.window

    def convolve(tensors: list[Any], counts: Counts) -> Any:
        if made is not None:
            return made.convolution(tensors[0], window, counts)
        return functions.convolution(tensors[0], words, bias, plan, window, groups, counts)

    return convolve


class _TensorExecutor:
    """Runs nets on tensors of a device; layers are packed once for each net."""

    name = ""

    def __init__(self) -> None:
        self._steps: weakref.WeakKeyDictionary[Artifact, tuple[torch.device, list[_Step]]] = weakref.WeakKeyDictionary()

    def unavailable(self) -> str | None:
        """Why it cannot run here and what to do about it, or None."""
        raise NotImplementedError

    def device(self) -> torch.device:
        """Where it computes."""
        raise NotImplementedError

    def functions(self) -> Any:
        """What has the functions of the arithmetic."""
        raise NotImplementedError

    def run(
        self,
        artifact: Artifact,
        x: npt.NDArray[Any],
        *,
        records: dict[str, g.LayerRecord] | None = None,
        visit: Callable[[str, Words], None] | None = None,
    ) -> Words:
        """See :class:`lnsdeploy.emulator.executor.Executor`."""
        device, functions = self.device(), self.functions()
        found = self._steps.get(artifact)
        if found is None or found[0] != device:
            found = device, [_step(node, functions, device) for node in artifact.graph.nodes]
            self._steps[artifact] = found

        def encode_input(graph: g.LNSGraph, x: npt.NDArray[Any]) -> Any:
            info = graph.tensors[graph.encoded]
            x = g.check_input(x, graph.input_shape, graph.input)
            if np.isnan(x).any():
                return graph.encode_input(x)  # which names the input
            return functions.encode(
                torch.from_numpy(np.require(x, requirements="W")).to(device), info.format, info.offset, graph.underflow
            )

        def show(name: str, words: Any) -> None:
            if visit:
                visit(name, words.cpu().numpy())

        constants = {
            name: torch.from_numpy(np.array(words)).to(device) for name, words in artifact.graph.constants.items()
        }
        steps = found[1]
        if records is None:
            # nobody reads the counters, so nothing waits for them
            steps = [lambda tensors, counts, step=step: step(tensors, None) for step in steps]  # type: ignore[misc]
        made: Any = g.run_graph(
            artifact.graph, x, steps, encode_input, records, show if visit else None, constants=constants
        )
        words: Words = made.cpu().numpy()
        return words


class CudaExecutor(_TensorExecutor):
    """The GPU kernels, on torch's current CUDA device."""

    name = "cuda"

    def unavailable(self) -> str | None:
        """Why it cannot run here and what to do about it, or None."""
        return cuda.unavailable()

    def device(self) -> torch.device:
        """torch's current CUDA device."""
        return torch.device("cuda", torch.cuda.current_device())

    def functions(self) -> Any:
        """This module."""
        import lnsdeploy.emulator.gpu as here

        return here


class TorchExecutor(_TensorExecutor):
    """Plain torch operations, on the CPU or the device that ``LNSDEPLOY_TORCH_DEVICE`` names."""

    name = "torch"

    def unavailable(self) -> str | None:
        """Why it cannot run here and what to do about it, or None."""
        try:
            torch.zeros(1, dtype=torch.int64, device=self.device()) + 1
        except (RuntimeError, AssertionError, MissingDependencyError, TypeError) as error:
            return f"{DEVICE_VARIABLE}={os.environ.get(DEVICE_VARIABLE)}: {str(error).splitlines()[0]}"
        return None

    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device(os.environ.get(DEVICE_VARIABLE) or "cpu")

    def functions(self) -> Any:
        """The portable ones."""
        return portable
