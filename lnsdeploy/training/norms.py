"""Batch norm of a batch that several processes share (docs/training.md, Several processes).

Each process has a part of the batch, and a norm that looked at its part alone would train another net than one process
does. torch's own ``SyncBatchNorm`` needs GPUs; this works wherever processes talk to each other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lnsdeploy.training.layers import FoldedBatchNorm1d, FoldedBatchNorm2d, FoldedBatchNorm3d
from lnsdeploy.training.processes import summed

_Norm = nn.modules.batchnorm._BatchNorm
# Subclasses of others may do more than normalise, and are left as they are.
_KINDS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    FoldedBatchNorm1d,
    FoldedBatchNorm2d,
    FoldedBatchNorm3d,
)


@contextmanager
def synchronised_norms(model: nn.Module, world: int) -> Iterator[None]:
    """Inside, the batch norms of a model take the statistics of the whole batch, of all processes.

    Args:
        world: the number of processes; 1 changes nothing.
    """
    norms = [m for m in model.modules() if isinstance(m, _Norm) and type(m) in _KINDS] if world > 1 else []
    for norm in norms:
        # on the instance: the model keeps its classes, and with them its state and its conversion
        norm.__dict__["forward"] = functools.partial(whole_batch_norm, norm)
    try:
        yield
    finally:
        for norm in norms:
            norm.__dict__.pop("forward", None)


def whole_batch_norm(norm: _Norm, x: Tensor) -> Tensor:
    """What `norm` gives for this process's part [n, channels, …] of a batch, in training with the statistics of all.

    Mean and variance are taken in two passes, as torch does, each in one message. Running statistics take the
    variance of a sample, n/(n − 1).
    """
    if not norm.training:
        return type(norm).forward(norm, x)
    axes = [0, *range(2, x.ndim)]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    count = x.new_full((1,), x.numel() // x.shape[1])
    sums = summed(torch.cat([x.sum(axes), count]))
    size = sums[-1].detach()
    mean = sums[:-1] / size
    centred = x - mean.view(shape)
    variance = summed(centred.square().sum(axes)) / size
    if norm.running_mean is not None and norm.running_var is not None:
        with torch.no_grad():
            share = norm.momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
                if share is None:
                    share = 1.0 / float(norm.num_batches_tracked)
            weight = 0.0 if share is None else share
            norm.running_mean.lerp_(mean.detach().to(norm.running_mean.dtype), weight)
            sample = variance.detach() * (size / (size - 1).clamp(min=1))
            norm.running_var.lerp_(sample.to(norm.running_var.dtype), weight)
    y = centred * torch.rsqrt(variance + norm.eps).view(shape)
    if norm.weight is not None:
        y = y * norm.weight.view(shape) + norm.bias.view(shape)
    return y
