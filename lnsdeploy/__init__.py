"""lnsdeploy: train, emulate bit for bit and export neural networks for log-domain hardware.

The names below are imported when first used; none of them needs torch, except those of `lnsdeploy.training`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "LNSFormat": "formats",
    "LNSTensor": "formats",
    "calibrate": "formats",
    "decode": "formats",
    "encode": "formats",
    "Datapath": "datapath",
    "LinearAccumulator": "datapath",
    "LogAccumulator": "datapath",
    "load_datapath": "datapath",
    "named_datapaths": "datapath",
    "Artifact": "emulator.artifact",
    "load_artifact": "emulator.artifact",
    "compare": "emulator.compare",
    "get_executor": "emulator.executor",
    "register": "emulator.ort",
    "LNSError": "errors",
}

__all__ = [
    "Artifact",
    "Datapath",
    "LNSError",
    "LNSFormat",
    "LNSTensor",
    "LinearAccumulator",
    "LogAccumulator",
    "__version__",
    "calibrate",
    "compare",
    "decode",
    "encode",
    "get_executor",
    "load_artifact",
    "load_datapath",
    "named_datapaths",
    "register",
]

if TYPE_CHECKING:
    from lnsdeploy.datapath import (
        Datapath,
        LinearAccumulator,
        LogAccumulator,
        load_datapath,
        named_datapaths,
    )
    from lnsdeploy.emulator.artifact import Artifact, load_artifact
    from lnsdeploy.emulator.compare import compare
    from lnsdeploy.emulator.executor import get_executor
    from lnsdeploy.emulator.ort import register
    from lnsdeploy.errors import LNSError
    from lnsdeploy.formats import LNSFormat, LNSTensor, calibrate, decode, encode


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lnsdeploy' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lnsdeploy.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
