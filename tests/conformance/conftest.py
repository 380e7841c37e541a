"""The executors under test: a new one is conformant when its name is added here and this folder passes."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

# An executor of stages offers the functions of `lnsdeploy.emulator.reference`, under the same names and signatures:
# dot, convolution, relu, negate, maximum, minimum, clip, max_pool, add, sum_window, average_pool, rescale, multiply,
# divide, square_root.
EXECUTORS = {"reference": "lnsdeploy.emulator.reference"}


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Any:
    """The module of one executor."""
    return importlib.import_module(EXECUTORS[request.param])
