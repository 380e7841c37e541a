"""The executors under test: a new one is conformant when its name is added here and this folder passes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
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


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module of one executor."""
    if request.param in ("torch", "cuda"):
        yield OnTensors(portable, "cpu") if request.param == "torch" else OnTensors(gpu, "cuda")
        return
    if request.param == "cuda-host":
        with cuda.host_runtime(cuda_host.HostRuntime()):
            yield OnTensors(gpu, "cpu")
        return
    module = importlib.import_module(EXECUTORS[request.param])
    if module.__name__ != CPU:
        yield module
        return
    with native.forced_isa(request.param.removeprefix("cpu-")):
        yield module
