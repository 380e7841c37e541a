"""Executors on tensors, with the arrays that the tests have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


class OnTensors:
    """A module of functions on tensors as one of functions on arrays.

    Args:
        module: it.
        device: where it computes.
    """

    def __init__(self, module: Any, device: str):
        self.module, self.device = module, device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self.module, name)

        @functools.wraps(function)
        def run(*arguments: Any, **named: Any) -> Any:
            # the bias is an array, as a plan's offsets are
            bias = 2 if name in ("dot", "convolution") else None
            made = function(
                *(self._tensor(v) if i != bias else v for i, v in enumerate(arguments)),
                **{key: self._tensor(v) for key, v in named.items()},
            )
            return made.cpu().numpy()

        return run

    def _tensor(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        if any(stride < 0 for stride in value.strides):
            value = value.copy()
        return torch.from_numpy(value).to(self.device)
