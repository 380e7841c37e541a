"""The executors under test: a new one is conformant when its name is added here and this folder passes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest

from lnsdeploy.emulator import native

# An executor of stages offers the functions of `lnsdeploy.emulator.reference`, under the same names and signatures:
# dot, convolution, relu, negate, maximum, minimum, clip, max_pool, add, sum_window, average_pool, rescale, multiply,
# divide, square_root. The native one is tested with every instruction set that the machine has.
CPU = "lnsdeploy.emulator.cpu"
EXECUTORS = {"reference": "lnsdeploy.emulator.reference"}
if native.unavailable() is None:
    EXECUTORS |= {f"cpu-{isa}": CPU for isa in native.isas()}


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module of one executor."""
    module = importlib.import_module(EXECUTORS[request.param])
    if module.__name__ != CPU:
        yield module
        return
    with native.forced_isa(request.param.removeprefix("cpu-")):
        yield module
