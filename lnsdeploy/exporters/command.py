"""What `lnsdeploy export` does for a float net: options as text, a source by name, and the table that it prints."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lnsdeploy.errors import BadFileError, BadValueError, UnsupportedError
from lnsdeploy.exporters.calibration import Preparation
from lnsdeploy.exporters.convert import ExportOptions, Result, export
from lnsdeploy.exporters.source import parse_shape
from lnsdeploy.fields import check_choice
from lnsdeploy.formats import METHODS, LNSFormat
from lnsdeploy.recipe import LayerRecipe, load_recipe

_UNITS = {"b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def parse_budget(text: str) -> float:
    """Average bits (up to 16), or bytes as ``3.5MB``.

    Raises:
        BadValueError: it is neither.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b)?\s*", text.lower())
    if found is None:
        raise BadValueError(f"a budget is average bits of a weight, as 5.5, or a size, as 3.5MB, not {text!r}")
    value = float(found[1]) * _UNITS[found[2] or "b"]
    if found[2] is None and not 2 <= value <= 16:
        raise BadValueError(f"a budget without a unit is average bits of a weight, 2 to 16, not {text!r}")
    if found[2] is not None and value <= 16:
        raise BadValueError(f"a budget of {text} holds no net")
    return value


def parse_widths(text: str) -> tuple[int, ...]:
    """Widths as ``4,5,6,8``.

    Raises:
        BadValueError: they are none.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and 2 <= int(part) <= 16 for part in parts):
        raise BadValueError(f"widths are numbers of bits from 2 to 16, as 4,5,6,8, not {text!r}")
    return tuple(sorted({int(part) for part in parts}))


def export_named(
    source: str, options: Mapping[str, Any], *, progress: Callable[[str, int, int], None] | None = None
) -> Result:
    """Export what the command line names.

    Args:
        source: an ONNX file, or the name of a torch model.
        options: of the command line, by name; None where not given.

    Raises:
        LNSError: one line says what is wrong.
    """
    from lnsdeploy.evaluation.names import is_model_name

    chosen = _options(options)
    preparation = Preparation.parse(options["mean"], options["std"])
    what: Any = source
    example = None
    foreign = [name for name in ("weights", "image_size") if options[name] is not None]
    if is_model_name(source):
        module, shape, own = _torch_model(source, options)
        what, example = module, _zeros(shape)
        preparation = own if options["mean"] is None and options["std"] is None else preparation
    elif foreign:
        raise BadValueError(f"--{foreign[0].replace('_', '-')} is for torch models by name; {source!r} is a file")
    elif not Path(source).exists() and not source.endswith(".onnx"):
        raise BadFileError(f"cannot read {source}: no such file; a torch model is named as in timm:{source}")
    return export(
        what,
        options["calibration"],
        options=chosen,
        example_inputs=example,
        evaluation=options["evaluation"],
        data_dir=options["data_dir"],
        preparation=preparation,
        name=source,
        progress=progress,
    )


def _options(given: Mapping[str, Any]) -> ExportOptions:
    fields: dict[str, Any] = {}
    plain = ("bits", "gamma", "datapath", "percentile", "correct_bias", "sample", "seed", "calibrate_on", "evaluate_on")
    for name in plain:
        if given[name] is not None:
            fields[name] = given[name]
    for option, name in (("weights_format", "weight"), ("activations_format", "activation")):
        if given[option] is not None:
            fields[name] = LNSFormat.parse(given[option])
    for name in ("method", "weight_method"):
        if given[name] is not None:
            check_choice(name.replace("_", " "), given[name], METHODS)
            fields[name] = given[name]
    fields["pack"] = given["pack"]
    if given["per_tensor"]:
        fields["per_channel"] = False
    if given["input_shape"] is not None:
        fields["input_shape"] = parse_shape(given["input_shape"])
    if given["model_output"] is not None:
        fields["output"] = given["model_output"]
    if given["budget"] is not None:
        fields["budget"] = parse_budget(given["budget"])
    if given["widths"] is not None:
        if given["budget"] is None:
            raise BadValueError("--widths is for --budget: the widths that it may give")
        fields["widths"] = parse_widths(given["widths"])
    if given["recipe"] is not None:
        if given["budget"] is not None:
            raise BadValueError("--recipe gives the formats of layers, --budget finds them: give one of the two")
        weight, activation = ExportOptions(**fields).formats
        fields["recipe"] = load_recipe(given["recipe"], base=LayerRecipe(weight, activation))
    return ExportOptions(**fields)


def _torch_model(source: str, options: Mapping[str, Any]) -> tuple[Any, tuple[int, ...], Preparation]:
    """A torch module that gives scores, the shape of its inputs with a batch of two, and how pictures become these."""
    import torch

    from lnsdeploy.evaluation.inputs import ImageInput, TokenInput
    from lnsdeploy.evaluation.models import load_model, with_inputs

    size = {} if options["image_size"] is None else {"image_size": options["image_size"]}
    model = load_model(source, weights=options["weights"], seed=options["seed"] or 0, **size)
    if options["input_shape"] is not None:
        shape = parse_shape(options["input_shape"])
    else:
        model = with_inputs(model, None)
        if isinstance(model.inputs, TokenInput):
            raise UnsupportedError(
                f"{source} takes {model.inputs}; an LNS model takes float numbers (export what follows the embedding)"
            )
        assert model.inputs is not None
        shape = (2, *model.inputs.shape)

    class Scores(torch.nn.Module):
        """The module, its scores as a tensor."""

        def __init__(self) -> None:
            super().__init__()
            self.module = model.module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Its scores."""
            from lnsdeploy.evaluation.models import scores_of

            return scores_of(self.module(x), source)

    known = model.inputs if isinstance(model.inputs, ImageInput) else None
    preparation = Preparation() if known is None else Preparation(known.mean, known.std)
    return Scores(), (2, *shape[1:]), preparation


def _zeros(shape: tuple[int, ...]) -> Any:
    import numpy as np

    return np.zeros(shape, dtype=np.float32)


# ---------------------------------------------------------------------------------------------------
# Text


def size_text(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def decibels(value: float | None) -> str:
    """A ratio for people."""
    return "–" if value is None else "exact" if value >= 999 else f"{value:.1f} dB"


def text_of(result: Result, path: str, *, layers: bool = False) -> str:
    """What the command prints."""
    data, fidelity, sizes = result.to_dict(), result.fidelity, result.sizes()
    lines = [
        f"{path}: {data['layers']} layers, datapath {data['datapath']['name']} ({data['datapath']['fingerprint']})"
    ]

    def row(name: str, value: str) -> None:
        lines.append(f"  {name:<22} {value}")

    row("coverage", f"{100 * data['coverage']:.2f} % of {data['macs']:,} MACs an input in LNS")
    for operation in data["float_ops"]:
        row("  in float", str(operation))
    row("calibrated on", result.calibration + (" (made up: give --calibration)" if result.synthetic else ""))
    row("measured on", fidelity.source + (" (made up)" if fidelity.synthetic else ""))
    at = (
        ""
        if fidelity.output_sqnr_db == fidelity.sqnr_db
        else f" before the softmax ({decibels(fidelity.output_sqnr_db)} behind it)"
    )
    row("signal to noise", decibels(fidelity.sqnr_db) + at)
    if fidelity.cosine is not None:
        row("cosine", f"{fidelity.cosine:.6f}")
    row("same first answer", f"{100 * fidelity.agreement:.2f} %")
    if fidelity.accuracy_float is not None and fidelity.accuracy_lns is not None:
        row("accuracy", f"{100 * fidelity.accuracy_float:.2f} % float, {100 * fidelity.accuracy_lns:.2f} % LNS")
    words = f"{size_text(sizes['word_bytes'])} of words" if sizes["word_bytes"] else "no words"
    row(
        "size",
        f"{size_text(sizes['float_bytes'])} of parameters before, {words} ({size_text(sizes['file_bytes'])} the file)",
    )
    if result.recipe is not None and sizes["weight_bits"] is not None:
        row("bits of a weight", f"{sizes['weight_bits']:.2f} on average")
    row("time, memory", f"{data['seconds']:.1f} s, {size_text(result.peak_bytes)} at most")
    for note in result.source.notes:
        row("note", note)
    if layers:
        lines.append(f"  {'operation':<16} {'name':<32} {'formats':<18} {'MACs':>13} {'SQNR':>9} {'saturated':>9}")
        lines += [
            f"  {layer.op:<16} {layer.name[-32:]:<32} {' '.join(layer.formats):<18} {layer.macs:>13,} "
            f"{decibels(layer.sqnr_db):>9} {100 * layer.saturated:>8.3f}%"
            for layer in fidelity.layers
        ]
    return "\n".join(lines)
