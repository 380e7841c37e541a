"""What the processes of one training tell each other (docs/training.md).

Each has its part of every batch. Gradients are averaged; magnitudes that offsets follow from are the largest of all,
so that words do not depend on how a batch was split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_active = False


@contextmanager
def joined(world: int) -> Iterator[None]:
    """Inside, the processes of torch's default group train together.

    Args:
        world: their number; 1 changes nothing.
    """
    global _active
    before, _active = _active, world > 1
    try:
        yield
    finally:
        _active = before


def largest(value: float) -> float:
    """The largest of all processes' numbers; infinity where one has NaN, which no maximum tells from others."""
    if not _active:
        return value
    from torch import distributed

    found = torch.tensor([value if value == value else float("inf")], dtype=torch.float64, device=_device())
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return float(found)


def _device() -> torch.device:
    """Where the group's messages lie."""
    from torch import distributed

    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")


def total(values: list[float]) -> list[float]:
    """Numbers, each summed over all processes."""
    if not _active:
        return values
    from torch import distributed

    found = torch.tensor(values, dtype=torch.float64, device=_device())
    distributed.all_reduce(found)
    return [float(v) for v in found]


def average_(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their means over all processes, in one message for each device and dtype."""
    if not _active:
        return
    from torch import distributed

    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    world = distributed.get_world_size()
    for same in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        # gloo works in host memory; so does whatever group is not the card's own
        moved = flat.cpu() if flat.is_cuda and distributed.get_backend() != "nccl" else flat
        distributed.all_reduce(moved)
        flat = moved.to(flat.device).div_(world)
        start = 0
        for tensor in same:
            tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()


def averaged(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    if not _active:
        return tensor
    made = tensor.clone()
    average_([made])
    return made


class _Sum(torch.autograd.Function):
    """A tensor summed over all processes; so is its gradient, since every process's loss depends on the sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _summed(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _summed(gradients[0])


def _summed(tensor: Tensor) -> Tensor:
    from torch import distributed

    # gloo works in host memory
    there = tensor.is_cuda and distributed.get_backend() != "nccl"
    made = tensor.detach().cpu() if there else tensor.detach().clone()
    made = made.contiguous()
    distributed.all_reduce(made)
    return made.to(tensor.device)


def summed(tensor: Tensor) -> Tensor:
    """A tensor summed over all processes, with a gradient."""
    made: Tensor = _Sum.apply(tensor) if _active else tensor  # type: ignore[no-untyped-call]
    return made
