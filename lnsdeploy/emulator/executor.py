"""The executors: interchangeable, and equal to the bit.

`reference` is the specification in NumPy; every other executor is compared with it. To add one, write a class
with `name`, `unavailable` and `run`, and register it in `_FACTORIES`; the conformance suite then runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import numpy.typing as npt

from lnsdeploy.emulator.artifact import Artifact
from lnsdeploy.emulator.graph import LayerRecord, run_reference
from lnsdeploy.errors import MissingDependencyError, UnknownNameError
from lnsdeploy.formats import Words


class Executor(Protocol):
    """What runs an LNS net."""

    @property
    def name(self) -> str:
        """The name on the command line."""

    def unavailable(self) -> str | None:
        """Why it cannot run here and what to do about it, or None."""

    def run(
        self,
        artifact: Artifact,
        x: npt.NDArray[Any],
        *,
        records: dict[str, LayerRecord] | None = None,
        visit: Callable[[str, Words], None] | None = None,
    ) -> Words:
        """Run a batch.

        Args:
            artifact: the net.
            x: float inputs [batch, …].
            records: filled in with what each node did, as far as the executor can tell.
            visit: called with the name and words of every tensor of words, in order.
        Returns: the words of the output tensor.
        """


class ReferenceExecutor:
    """The specification in NumPy."""

    name = "reference"

    def unavailable(self) -> str | None:
        """Never: it needs NumPy only."""
        return None

    def run(
        self,
        artifact: Artifact,
        x: npt.NDArray[Any],
        *,
        records: dict[str, LayerRecord] | None = None,
        visit: Callable[[str, Words], None] | None = None,
    ) -> Words:
        """See :class:`Executor`."""
        return run_reference(artifact.graph, x, records, visit)


def _cpu() -> Executor:
    from lnsdeploy.emulator.cpu import CpuExecutor

    return CpuExecutor()


def _ort() -> Executor:
    from lnsdeploy.emulator.ort import OrtExecutor

    return OrtExecutor()


def _ort_functions() -> Executor:
    from lnsdeploy.emulator.ort import OrtFunctionsExecutor

    return OrtFunctionsExecutor()


def _rtl() -> Executor:
    from lnsdeploy.emulator.rtl import RtlExecutor

    return RtlExecutor()


class _WithoutTorch:
    """Stands for an executor on tensors where there is no torch."""

    def __init__(self, name: str, why: str):
        self.name, self.why = name, why

    def unavailable(self) -> str | None:
        """torch is missing."""
        return self.why

    def run(
        self,
        artifact: Artifact,
        x: npt.NDArray[Any],
        *,
        records: dict[str, LayerRecord] | None = None,
        visit: Callable[[str, Words], None] | None = None,
    ) -> Words:
        """Never."""
        raise MissingDependencyError(self.why)


def _on_tensors(name: str) -> Executor:
    try:
        from lnsdeploy.emulator import gpu
    except ImportError as error:
        return _WithoutTorch(name, f"torch cannot be imported ({error}); install lnsdeploy[train]")
    return gpu.CudaExecutor() if name == "cuda" else gpu.TorchExecutor()


_FACTORIES: dict[str, Callable[[], Executor]] = {
    "reference": ReferenceExecutor,
    "cpu": _cpu,
    "cuda": lambda: _on_tensors("cuda"),
    "torch": lambda: _on_tensors("torch"),
    "ort": _ort,
    "ort-functions": _ort_functions,
    "rtl": _rtl,
}


def executor_names() -> list[str]:
    """Names of all executors, the reference first."""
    return list(_FACTORIES)


@cache
def _made(name: str) -> Executor:
    return _FACTORIES[name]()


def get_executor(name: str) -> Executor:
    """An executor by name.

    Raises:
        UnknownNameError: no such executor; the nearest name is offered.
        MissingDependencyError: it cannot run here; the message says why and what to do.
    """
    if name not in _FACTORIES:
        raise UnknownNameError("executor", name, _FACTORIES)
    executor = _made(name)
    if why := executor.unavailable():
        raise MissingDependencyError(f"executor {name!r} is not available: {why}")
    return executor


def fastest() -> str:
    """The name of the fastest executor that runs here: `cpu`, or `reference` where the native library is missing."""
    return "reference" if _made("cpu").unavailable() else "cpu"


def availability() -> dict[str, str | None]:
    """For each executor None, or why it cannot run here."""
    return {name: _made(name).unavailable() for name in _FACTORIES}
