"""Settings shared by all tests: one thread each, and hypothesis examples that are the same in every run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# The suite runs on a few cores beside other processes; more threads a process only contend.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

settings.register_profile(
    "lnsdeploy",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("lnsdeploy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins early, or one process would still be at it when the other has nothing left."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def curves_are_not_drawn() -> Iterator[None]:
    """Most of a small training is matplotlib: test_trainer draws a curve, and so do commands that run by themselves."""
    trainer = sys.modules.get("lnsdeploy.training.trainer")
    with pytest.MonkeyPatch.context() as patch:
        if trainer is not None:

            def write_curve(path: str, *_: Any) -> None:
                Path(path).write_bytes(b"\x89PNG, not drawn")

            patch.setattr(trainer, "write_curve", write_curve)
        yield
