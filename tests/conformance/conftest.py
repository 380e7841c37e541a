"""The executors under test: a new one is conformant when its name is added here and this folder passes."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import pytest

from lnsdeploy.emulator import cuda, gpu, native, portable
from tests import cuda_host
from tests.conformance.tensors import OnTensors

# An executor of stages offers the functions of `lnsdeploy.emulator.reference`, under the same names and signatures:
# dot, convolution, relu, negate, maximum, minimum, clip, max_pool, add, sum_window, average_pool, rescale, multiply,
# divide, square_root. The native one is tested with every instruction set that the machine has.
CPU = "lnsdeploy.emulator.cpu"
EXECUTORS = {"reference": "lnsdeploy.emulator.reference"}
if native.unavailable() is None:
    EXECUTORS |= {f"cpu-{isa}": CPU for isa in native.isas()}
# Those on tensors: the GPU kernels on a GPU where there is one, their text built for the host, and plain torch.
EXECUTORS["torch"] = "torch"
if cuda_host.unavailable() is None:
    EXECUTORS["cuda-host"] = "cuda-host"
if cuda.unavailable() is None:
    EXECUTORS["cuda"] = "cuda"

# Some of them alone, as the sanitizers' run has it.
ONLY = os.environ.get("LNSDEPLOY_CONFORMANCE", "")
EXECUTORS = {name: what for name, what in EXECUTORS.items() if fnmatchcase(name, ONLY or "*")}


@contextmanager
def opened(name: str) -> Iterator[Any]:
    """The module of an executor, while its instruction set or its runtime is in force."""
    if name in ("torch", "cuda"):
        yield OnTensors(portable, "cpu") if name == "torch" else OnTensors(gpu, "cuda")
    elif name == "cuda-host":
        with cuda.host_runtime(cuda_host.HostRuntime()):
            yield OnTensors(gpu, "cpu")
    elif EXECUTORS[name] == CPU:
        with native.forced_isa(name.removeprefix("cpu-")):
            yield importlib.import_module(CPU)
    else:
        yield importlib.import_module(EXECUTORS[name])


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module of one executor."""
    with opened(request.param) as module:
        yield module


Each = Callable[[Callable[[Any], None]], None]


@pytest.fixture(params=[ONLY or "all"])
def each_executor() -> Each:
    """Calls a function with one executor after the other.

    For what hypothesis draws: examples and the oracle's words are most of the time, and the same for all executors.
    """

    def run(check: Callable[[Any], None]) -> None:
        for name in EXECUTORS:
            with opened(name) as module:
                try:
                    check(module)
                except BaseException as error:
                    raise AssertionError(f"executor {name}") from error

    return run
