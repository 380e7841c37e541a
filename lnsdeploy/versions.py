"""What is installed, and on what machine: for `info`, artifacts and reports."""

from __future__ import annotations

import os
import platform
from importlib import metadata

PACKAGES = (
    "numpy",
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "scikit-learn",
    "plotly",
    "matplotlib",
    "timm",
    "transformers",
    "torchvision",
)


def installed() -> dict[str, str | None]:
    """Version by package; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, str | int]:
    """Processor, cores, system and Python."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:  # noqa: PTH123 - not a file of ours
            for line in handle:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
