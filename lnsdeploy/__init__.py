"""lnsdeploy: train, emulate bit for bit and export neural networks for log-domain hardware.

The names below are imported when first used; only `emulate`, and those of `lnsdeploy.training`, need torch.
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
    "emulate": "emulator.mode",
    "export": "exporters.convert",
    "Recipe": "recipe",
    "load_recipe": "recipe",
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
    "Recipe",
    "__version__",
    "calibrate",
    "compare",
    "decode",
    "emulate",
    "encode",
    "export",
    "get_executor",
    "load_artifact",
    "load_datapath",
    "load_recipe",
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
    from lnsdeploy.emulator.mode import emulate
    from lnsdeploy.emulator.ort import register
    from lnsdeploy.errors import LNSError
    from lnsdeploy.exporters.convert import export
    from lnsdeploy.formats import LNSFormat, LNSTensor, calibrate, decode, encode
    from lnsdeploy.recipe import Recipe, load_recipe


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lnsdeploy' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"lnsdeploy.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from lnsdeploy.errors import MissingDependencyError

        raise MissingDependencyError(f"lnsdeploy.{name} needs torch: pip install 'lnsdeploy[train]'") from error


def __dir__() -> list[str]:
    return sorted(__all__)
