"""Convolutions in other guises as convolutions of the specification (docs/emulation.md, "Order of k").

A transposed convolution, and the two products of a convolution's backward pass, are dot products too. Here they are
laid out as plain convolutions, whose order of k the specification fixes (7.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from lnsdeploy.emulator.plan import Window


def padded(x: Tensor, pads: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """Negative pads (beginnings, then ends) are cut off; what is left is not negative."""
    axes = len(pads) // 2
    cut: list[slice] = [slice(None), slice(None)]
    for i in range(axes):
        begin, end = max(-pads[i], 0), max(-pads[axes + i], 0)
        size = x.shape[2 + i]
        cut.append(slice(min(begin, size), max(size - end, 0)))
    return x[tuple(cut)].contiguous(), tuple(max(p, 0) for p in pads)


def transposed_weights(w: Tensor, groups: int, strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """Weights [C_in, C_out/groups, *kernel] of a transposed convolution as those of a convolution of stride 1.

    Returns: [groups · C_out/groups · phases, C_in/groups, *taps]: each phase of the output, the residue of its
    position modulo the stride, has a kernel of its own, with taps in reverse. Kernels are filled up with zeros at
    their end to a multiple of the stride, dilated ones before that.
    """
    axes = len(strides)
    made = w.reshape(groups, w.shape[0] // groups, w.shape[1], *w.shape[2:])
    for i, (s, d) in enumerate(zip(strides, dilations, strict=True)):
        axis = 3 + i
        size = made.shape[axis]
        if s > 1 and d > 1:
            shape = [*made.shape[:axis], d * (size - 1) + 1, *made.shape[axis + 1 :]]
            wide = made.new_zeros(shape)
            wide[(*(slice(None),) * axis, slice(None, None, d))] = made
            made, size = wide, shape[axis]
        if size % s:
            pads = [0, 0] * (made.ndim - 1 - axis) + [0, s - size % s]
            made = functional.pad(made, pads)
    # each kernel axis [taps, phase]
    split: list[int] = []
    for i, s in enumerate(strides):
        split += [made.shape[3 + i] // s, s]
    made = made.reshape(*made.shape[:3], *split).flip([3 + 2 * i for i in range(axes)])
    taps, phases = [3 + 2 * i for i in range(axes)], [4 + 2 * i for i in range(axes)]
    made = made.permute(0, 2, *phases, 1, *taps)
    count = made.shape[0] * made.shape[1] * math.prod(strides)
    return made.reshape(count, w.shape[0] // groups, *(made.shape[-axes:])).contiguous()


def transposed_input(
    x: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    output: Sequence[int],
) -> tuple[Tensor, Window, tuple[int, ...]]:
    """The input of a transposed convolution for weights of :func:`transposed_weights`.

    Args:
        kernel: sizes as the weights come, before they are laid out.
        output: spatial sizes of the result.
    Returns: the input, the window, and for each axis the first position of the result that is wanted.
    """
    begins, ends, taps, steps, first = [], [], [], [], []
    for i, (k, s, p, d, o) in enumerate(zip(kernel, strides, pads, dilations, output, strict=True)):
        if s > 1 and d > 1:
            k, d = d * (k - 1) + 1, 1
        n = -(-k // s)
        low, high = p // s, (o - 1 + p) // s
        # with stride 1 taps keep their dilation
        reach = (n - 1) * d
        begins.append(reach - low)
        ends.append(high - (x.shape[2 + i] - 1))
        taps.append(n)
        steps.append(d)
        first.append(p - low * s)
    cut, kept = padded(x, (*begins, *ends))
    return cut, Window(tuple(taps), (), kept, tuple(steps)), tuple(first)


def transposed_result(y: Tensor, strides: Sequence[int], first: Sequence[int], output: Sequence[int]) -> Tensor:
    """Phases side by side [B, C·phases, *sizes] as one tensor [B, C, *output]."""
    axes, phases = len(strides), math.prod(strides)
    if phases > 1:
        made = y.reshape(y.shape[0], y.shape[1] // phases, *strides, *y.shape[2:])
        order = [0, 1]
        for i in range(axes):
            order += [2 + axes + i, 2 + i]
        shape = [n * s for n, s in zip(y.shape[2:], strides, strict=True)]
        y = made.permute(order).reshape(y.shape[0], -1, *shape)
    window = tuple(slice(f, f + o) for f, o in zip(first, output, strict=True))
    return y[(slice(None), slice(None), *window)]


def weight_gradient(
    x: Tensor,
    grad: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Window]:
    """The gradient of a convolution's weights as a convolution of the input by the errors.

    k runs over (images, *positions of the output). Batch and channels change places: the result is
    [C/groups, N, *kernel].

    Args:
        x: the convolution's input [B, groups·C, *spatial]; grad: the gradient of its result [B, N, *output].
    Returns: input, weights and window of a convolution with `groups`.
    """
    axes, batch = len(kernel), x.shape[0]
    ends = []
    for i, (k, s, p, d) in enumerate(zip(kernel, strides, pads, dilations, strict=True)):
        # positions that no window reached
        reach = s * (grad.shape[2 + i] - 1) + d * (k - 1) + 1
        ends.append(reach - x.shape[2 + i] - p)
    made = x.reshape(batch, groups, -1, *x.shape[2:])
    made = made.permute(2, 1, 0, *range(3, 3 + axes)).reshape(made.shape[2], groups * batch, *x.shape[2:])
    made, kept = padded(made, (*pads, *ends))
    window = Window(tuple(grad.shape[2:]), tuple(dilations), kept, tuple(strides))
    return made, grad.transpose(0, 1).contiguous(), window
