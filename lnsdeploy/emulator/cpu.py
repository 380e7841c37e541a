"""The `cpu` executor: the native library's kernels, equal to the reference to the bit.

The functions have the names and signatures of :mod:`lnsdeploy.emulator.reference`. What the library's integers do not
hold (formats above 16 bits, tables of millions of entries) is left to the reference, which is slow and always
right; so every net runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.emulator import graph as g
from lnsdeploy.emulator import native, reference
from lnsdeploy.emulator.artifact import Artifact
from lnsdeploy.emulator.plan import AddPlan, Counts, DotPlan, Ints, PoolPlan, RescalePlan, Window
from lnsdeploy.emulator.reference import divide, maximum, minimum, multiply, negate, square_root
from lnsdeploy.errors import BadTypeError, BadValueError, UnsupportedError
from lnsdeploy.formats import LNSFormat, Words

__all__ = [
    "CpuExecutor",
    "add",
    "average_pool",
    "clip",
    "convolution",
    "divide",
    "dot",
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


def _bias(bias: Ints | None, channels: int) -> Ints | None:
    if bias is None:
        return None
    array = np.asarray(bias)
    if array.dtype.kind not in "iu":
        raise BadTypeError(f"a bias holds integers at the accumulator's scale, not {array.dtype}")
    if array.shape != (channels,):
        raise BadValueError(f"a bias for {channels} output channels has shape {array.shape}")
    return array.astype(np.int64)


def _layer(plan: DotPlan, words: Words, bias: Ints | None, groups: int = 1) -> native.NativeDot | None:
    """The layer in the native library, or None where it does not fit."""
    try:
        return native.NativeDot(plan, words, bias, groups)
    except UnsupportedError:
        return None


def dot(a: Words, w: Words, bias: Ints | None, plan: DotPlan, counts: Counts | None = None) -> Words:
    """Matrix product of words (spec 3, 4, 5); see :func:`lnsdeploy.emulator.reference.dot`."""
    a, w = np.asarray(a), np.asarray(w)
    plan.activation.check(a, "activations")
    plan.weight.check(w, "weights")
    if a.ndim != 2 or w.ndim != 2 or a.shape[1] != w.shape[1]:
        raise BadValueError(f"a product needs activations [M, K] and weights [N, K], not {a.shape} and {w.shape}")
    start = _bias(bias, w.shape[0])
    layer = _layer(plan, w, start)
    return reference.dot(a, w, start, plan, counts) if layer is None else layer.dot(a, counts)


def convolution(
    x: Words,
    w: Words,
    bias: Ints | None,
    plan: DotPlan,
    window: Window,
    groups: int = 1,
    counts: Counts | None = None,
) -> Words:
    """Convolution (spec 7.1); see :func:`lnsdeploy.emulator.reference.convolution`."""
    x, w = np.asarray(x), np.asarray(w)
    axes = len(window.kernel)
    fits = (
        x.ndim == w.ndim == axes + 2
        and groups >= 1
        and w.shape[2:] == window.kernel
        and x.shape[1] == w.shape[1] * groups
        and w.shape[0] % groups == 0
    )
    plan.activation.check(x, "activations")
    plan.weight.check(w, "weights")
    layer = _layer(plan, w, _bias(bias, w.shape[0]), groups) if fits else None
    if layer is None:
        # what does not fit together is told by the reference
        return reference.convolution(x, w, bias, plan, window, groups, counts)
    return layer.convolution(x, window, counts)


def matmul(a: Words, b: Words, plan: DotPlan, counts: Counts | None = None) -> Words:
    """Matrix products of two tensors of words (spec 7.2); see :func:`lnsdeploy.emulator.reference.matmul`."""
    return reference.each_product(np.asarray(a), np.asarray(b), lambda x, w: dot(x, w, None, plan, counts), plan.output)


def _native(fmt: LNSFormat) -> bool:
    return fmt.bits <= 16


def relu(words: Words, fmt: LNSFormat) -> Words:
    """Negative words become zero (spec 6.1)."""
    fmt.check(words)
    return native.relu(words, fmt) if _native(fmt) else reference.relu(words, fmt)


def clip(words: Words, fmt: LNSFormat, low: int, high: int) -> Words:
    """Words limited to two words (spec 6.1)."""
    fmt.check(words)
    return native.clip(words, fmt, low, high) if _native(fmt) else reference.clip(words, fmt, low, high)


def max_pool(x: Words, fmt: LNSFormat, window: Window) -> Words:
    """Largest value of each window (spec 6.1)."""
    fmt.check(x)
    return native.max_pool(x, fmt, window) if _native(fmt) else reference.max_pool(x, fmt, window)


def add(a: Words, b: Words, plan: AddPlan, counts: Counts | None = None) -> Words:
    """Element-wise sum by the log adder (spec 6.4)."""
    plan.a.check(np.asarray(a), "first operand")
    plan.b.check(np.asarray(b), "second operand")
    if all(map(_native, (plan.a, plan.b, plan.output))) and max(np.ndim(a), np.ndim(b)) <= 8:
        return native.add(a, b, plan, counts)
    return reference.add(a, b, plan, counts)


def sum_window(x: Words, plan: PoolPlan, window: Window, counts: Counts | None = None) -> Words:
    """Sum of each window (spec 6.5)."""
    plan.input.check(np.asarray(x))
    if _native(plan.input) and _native(plan.output):
        return native.sum_window(x, plan, window, counts)
    return reference.sum_window(x, plan, window, counts)


def average_pool(
    x: Words, plan: PoolPlan, window: Window, count_include_pad: bool = False, counts: Counts | None = None
) -> Words:
    """Average of each window (spec 6.5)."""
    plan.input.check(np.asarray(x))
    if _native(plan.input) and _native(plan.output):
        return native.average_pool(x, plan, window, count_include_pad, counts)
    return reference.average_pool(x, plan, window, count_include_pad, counts)


def rescale(words: Words, plan: RescalePlan, counts: Counts | None = None) -> Words:
    """Words of another format or offset (spec 6.3)."""
    plan.input.check(np.asarray(words))
    if _native(plan.input) and _native(plan.output):
        return native.rescale(words, plan, counts)
    return reference.rescale(words, plan, counts)


# ---------------------------------------------------------------------------------------------------

_Step = Callable[[list[Words], Counts], Words]


def _step(node: g.Node) -> _Step:
    """What runs a node: its layer packed once, or the reference where the library has nothing."""
    if isinstance(node, (g.Gemm, g.Conv)):
        layer = _layer(node.plan, node.words, node.bias, node.groups if isinstance(node, g.Conv) else 1)
        if layer is not None:
            return _gemm(layer) if isinstance(node, g.Gemm) else _conv(layer, node.window)
    elif isinstance(node, g.Relu) and _native(node.format):
        fmt = node.format
        return lambda tensors, counts: native.relu(tensors[0], fmt)
    elif isinstance(node, g.Clip) and _native(node.format):
        return _clip(node)
    elif isinstance(node, g.MaxPool) and _native(node.format):
        return _max_pool(node)
    elif isinstance(node, g.Add):
        plan = node.plan
        return lambda tensors, counts: add(tensors[0], tensors[1], plan, counts)
    elif isinstance(node, g.AveragePool):
        return _average_pool(node)
    elif isinstance(node, g.Rescale):
        change = node.plan
        return lambda tensors, counts: rescale(tensors[0], change, counts)
    elif isinstance(node, g.MatMul):
        product = node.plan
        return lambda tensors, counts: matmul(tensors[0], tensors[1], product, counts)
    elif isinstance(node, g.Encode):
        return _encoding(node)
    return node.run


def _encoding(node: g.Encode) -> _Step:
    info = node.result
    if not _native(info.format):
        return node.run
    return lambda tensors, counts: native.encode(
        g.numbers(tensors[0], node.name), info.format, info.offset, node.underflow
    )


def step_of(node: g.Node) -> _Step:
    """The fastest that runs a node here, to the reference's bits."""
    return node.run if native.unavailable() else _step(node)


def _gemm(layer: native.NativeDot) -> _Step:
    def run(tensors: list[Words], counts: Counts) -> Words:
        x = tensors[0]
        rows = layer.dot(x.reshape(-1, x.shape[-1]), counts)
        return rows.reshape(*x.shape[:-1], layer.channels)

    return run


def _conv(layer: native.NativeDot, window: Window) -> _Step:
    return lambda tensors, counts: layer.convolution(tensors[0], window, counts)


def _clip(node: g.Clip) -> _Step:
    return lambda tensors, counts: native.clip(tensors[0], node.format, node.low, node.high)


def _max_pool(node: g.MaxPool) -> _Step:
    return lambda tensors, counts: native.max_pool(tensors[0], node.format, node.window)


def _average_pool(node: g.AveragePool) -> _Step:
    return lambda tensors, counts: average_pool(tensors[0], node.plan, node.window, node.count_include_pad, counts)


class CpuExecutor:
    """Runs nets through the native library; layers are packed once for each net."""

    name = "cpu"

    def __init__(self) -> None:
        self._steps: weakref.WeakKeyDictionary[Artifact, tuple[str, list[_Step]]] = weakref.WeakKeyDictionary()

    def unavailable(self) -> str | None:
        """Why it cannot run here, or None."""
        return native.unavailable()

    def run(
        self,
        artifact: Artifact,
        x: npt.NDArray[Any],
        *,
        records: dict[str, g.LayerRecord] | None = None,
        visit: Callable[[str, Words], None] | None = None,
    ) -> Words:
        """See :class:`lnsdeploy.emulator.executor.Executor`."""
        isa = native.isa()
        found = self._steps.get(artifact)
        if found is None or found[0] != isa:
            found = isa, [_step(node) for node in artifact.graph.nodes]
            self._steps[artifact] = found
        return g.run_graph(artifact.graph, x, found[1], _encode, records, visit)


def _encode(graph: g.LNSGraph, x: npt.NDArray[Any]) -> Words:
    info = graph.tensors[graph.encoded]
    x = g.check_input(x, graph.input_shape, graph.input)
    if not _native(info.format) or np.isnan(x).any():
        return graph.encode_input(x)
    return native.encode(x, info.format, info.offset, graph.underflow)
