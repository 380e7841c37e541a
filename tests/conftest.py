"""Settings shared by all tests: one thread each, and hypothesis examples that are the same in every run."""

from __future__ import annotations

import os

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
