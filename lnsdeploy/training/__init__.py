"""Training in LNS: Madam, quantization-aware layers, recipes, the trainer. Needs the extra `train`.

The names below are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Dataset": "data",
    "IntegerMadam": "madam",
    "LNSConv2d": "layers",
    "LNSLinear": "layers",
    "LayerRecipe": "lnsdeploy.recipe",
    "LayerSpec": "layers",
    "Madam": "madam",
    "Recipe": "lnsdeploy.recipe",
    "Run": "run",
    "TrainConfig": "run",
    "TrainResult": "trainer",
    "build_model": "models",
    "calibrate_activations": "layers",
    "config_from_options": "trainer",
    "deployable": "layers",
    "evaluate": "trainer",
    "fake_quantize": "fake_quantize",
    "load_data": "data",
    "load_recipe": "lnsdeploy.recipe",
    "load_run": "run",
    "prepare_": "layers",
    "train": "trainer",
}

__all__ = [
    "Dataset",
    "IntegerMadam",
    "LNSConv2d",
    "LNSLinear",
    "LayerRecipe",
    "LayerSpec",
    "Madam",
    "Recipe",
    "Run",
    "TrainConfig",
    "TrainResult",
    "build_model",
    "calibrate_activations",
    "config_from_options",
    "deployable",
    "evaluate",
    "fake_quantize",
    "load_data",
    "load_recipe",
    "load_run",
    "prepare_",
    "train",
]

if TYPE_CHECKING:
    from lnsdeploy.recipe import LayerRecipe, Recipe, load_recipe
    from lnsdeploy.training.data import Dataset, load_data
    from lnsdeploy.training.fake_quantize import fake_quantize
    from lnsdeploy.training.layers import LayerSpec, LNSConv2d, LNSLinear, calibrate_activations, deployable, prepare_
    from lnsdeploy.training.madam import IntegerMadam, Madam
    from lnsdeploy.training.models import build_model
    from lnsdeploy.training.run import Run, TrainConfig, load_run
    from lnsdeploy.training.trainer import TrainResult, config_from_options, evaluate, train


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lnsdeploy.training' has no attribute {name!r}")
    try:
        home = _HOME[name]
        module = importlib.import_module(home if "." in home else f"lnsdeploy.training.{home}")
    except ModuleNotFoundError as error:
        if error.name == "torch":
            from lnsdeploy.errors import MissingDependencyError

            raise MissingDependencyError("training needs torch: pip install 'lnsdeploy[train]'") from error
        raise
    value = getattr(module, name)
    # `fake_quantize` is a module's name too: from now on the name means the function
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
