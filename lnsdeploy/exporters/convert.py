"""Any float net to an LNS ONNX model, without training: read, calibrate, lower, measure (docs/export.md)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.datapath import Datapath, for_format, load_datapath
from lnsdeploy.emulator import artifact as artifacts
from lnsdeploy.emulator import graph as g
from lnsdeploy.emulator.executor import fastest, get_executor
from lnsdeploy.errors import BadTypeError, BadValueError, MissingDependencyError, UnknownNameError, UnsupportedError
from lnsdeploy.exporters.calibration import FloatNet, Inputs, Preparation, Statistics, collect, load_inputs, synthetic
from lnsdeploy.exporters.fidelity import Fidelity, measure
from lnsdeploy.exporters.isolated import read_source
from lnsdeploy.exporters.lower import Lowered, LowerOptions, lower
from lnsdeploy.exporters.source import ReadOptions, Source, normalise
from lnsdeploy.files import write_text
from lnsdeploy.formats import LNSFormat, Method, default_gamma
from lnsdeploy.recipe import Recipe

# What all tensors of a float net may take at once, in bytes; as many inputs are run together as fit.
MEMORY = 1 << 28
# Inputs held out for fidelity, at most.
HELD_OUT = 64


@dataclass(frozen=True)
class ExportOptions:
    """Choices of an export.

    Args:
        bits, gamma: of words; γ None for one that fits the width.
        weight, activation: formats, if others than `bits` and `gamma`.
        datapath: name, TOML file or object; None for one that fits the formats.
        recipe: formats by layer.
        method, percentile: calibration of activations: ``"absmax"``, ``"percentile"`` or ``"lsq"``.
        weight_method: calibration of weights.
        per_channel: one offset for each output channel of weights.
        correct_bias: correct each layer's bias by what its words lack on average; None where inputs are not made up.
        sample: inputs on which accumulators are placed, at most; fewer where the net is large.
        headroom: octaves kept free above the largest partial sum of the sample.
        calibrate_on: inputs whose magnitudes are counted, at most.
        budget: average bits of a weight (up to 16), or bytes of all words (above): layers get widths accordingly.
        widths: that a budget may give.
        input_shape, output: of the model, where it does not say; see :class:`~.source.ReadOptions`.
        pack: store weights of up to 4 bits two to a byte (ONNX Runtime 1.23 or later reads such).
        seed: of made-up inputs.
        evaluate_on: inputs for fidelity, at most.
    """

    bits: int = 8
    gamma: int | None = None
    weight: LNSFormat | None = None
    activation: LNSFormat | None = None
    datapath: str | Path | Datapath | None = None
    recipe: Recipe | None = None
    method: Method = "absmax"
    percentile: float = 99.99
    weight_method: Method = "absmax"
    per_channel: bool = True
    correct_bias: bool | None = None
    sample: int = 16
    headroom: float = 1.0
    calibrate_on: int = 512
    budget: float | None = None
    widths: tuple[int, ...] = (4, 5, 6, 8)
    input_shape: tuple[int, ...] | None = None
    output: str | None = None
    pack: bool = True
    seed: int = 0
    evaluate_on: int = HELD_OUT

    @property
    def formats(self) -> tuple[LNSFormat, LNSFormat]:
        """Of weights and activations."""
        both = LNSFormat(self.bits, self.gamma or default_gamma(self.bits))
        return self.weight or both, self.activation or both

    def chosen_datapath(self) -> Datapath:
        """The datapath that layers have which name none."""
        weight, activation = self.formats
        if self.datapath is None:
            return for_format(activation, weight=weight)
        found = load_datapath(self.datapath)
        asked = self.weight or self.activation or self.gamma
        return found.with_formats(weight, activation) if asked else found


@dataclass(frozen=True, eq=False)
class Result:
    """An exported float net.

    Args:
        artifact: the LNS ONNX model.
        source: the float model that it was made of, in the form that was lowered.
        fidelity: how near it comes.
        calibration: where the inputs are from that it was calibrated on.
        calibrated_on: how many.
        synthetic: whether these were made up.
        recipe: the formats by layer that a budget led to, or that were given; None where all are alike.
        sensitivity: of a budget: each layer's damage by width; empty without.
        packed: whether weights of up to 4 bits are stored two to a byte.
        seconds: by step: read, calibrate, budget, lower, fidelity.
        peak_bytes: the most memory that this process had.
    """

    artifact: artifacts.Artifact
    source: Source
    fidelity: Fidelity
    calibration: str
    calibrated_on: int
    synthetic: bool
    recipe: Recipe | None
    seconds: dict[str, float]
    peak_bytes: int
    sensitivity: dict[str, dict[int, float]] = field(default_factory=dict)
    packed: bool = True

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the LNS ONNX file, checked by onnx, atomically."""
        import onnx

        onnx.checker.check_model(onnx.load_model_from_string(self.artifact.data), full_check=True)
        self.artifact.save(path)

    def save_recipe(self, path: str | os.PathLike[str]) -> None:
        """Write the formats by layer as TOML, to be given to `recipe` or ``--recipe`` again.

        Raises:
            BadValueError: all layers are alike.
        """
        if self.recipe is None:
            raise BadValueError("all layers have the same formats: there is no recipe to write; give a budget for one")
        write_text(path, self.recipe.to_toml())

    def sizes(self) -> dict[str, Any]:
        """Bytes before and after."""
        layers = [node for node in self.artifact.graph.nodes if isinstance(node, (g.Conv, g.Gemm))]
        bits = sum(layer.words.size * layer.plan.weight.bits for layer in layers)
        stored = sum(stored_bytes(layer.words.size, layer.plan.weight.bits, self.packed) for layer in layers)
        count = sum(layer.words.size for layer in layers)
        return {
            "float_bytes": self.source.float_bytes,
            "parameters": self.source.parameters,
            "weights": count,
            "weight_bits": round(bits / count, 4) if count else None,
            "word_bytes": stored,
            "file_bytes": len(self.artifact.data),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        graph = self.artifact.graph
        fidelity = self.fidelity.to_dict()
        return {
            "source": self.source.name,
            "notes": list(self.source.notes),
            "input_shape": list(self.source.input_shape),
            "coverage": self.artifact.coverage,
            "float_ops": list(self.artifact.float_ops),
            "layers": sum(isinstance(n, (g.Conv, g.Gemm)) for n in graph.nodes),
            "macs": sum(self.artifact.macs.values()),
            "formats": self.artifact.formats,
            "datapath": {"name": graph.datapath.name, "fingerprint": graph.datapath.fingerprint},
            "calibration": {
                "source": self.calibration,
                "inputs": self.calibrated_on,
                "synthetic": self.synthetic,
            },
            "sqnr_db": fidelity["sqnr_db"],
            "agreement": fidelity["agreement"],
            "fidelity": fidelity,
            "sizes": self.sizes(),
            "recipe": None if self.recipe is None else self.recipe.to_dict(),
            "seconds": round(sum(self.seconds.values()), 3),
            "steps": {name: round(value, 3) for name, value in self.seconds.items()},
            "peak_bytes": self.peak_bytes,
            "bytes": len(self.artifact.data),
        }


def stored_bytes(count: int, bits: int, packed: bool = True) -> int:
    """Bytes of words in ONNX's types: two to a byte up to 4 bits if `packed`, else one or two bytes each."""
    return -(-count // 2) if bits <= 4 and packed else count if bits <= 8 else 2 * count


def export(
    source: Any,
    calibration: Any = None,
    *,
    options: ExportOptions | None = None,
    example_inputs: Any = None,
    evaluation: Any = None,
    data_dir: Path | None = None,
    preparation: Preparation | None = None,
    name: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **choices: Any,
) -> Result:
    """Turn any float net into an LNS ONNX model, and say how near it comes.

    Example::

        result = lnsdeploy.export(module, images, bits=8, gamma=8)
        print(result.fidelity.sqnr_db)
        result.save("net.lns.onnx")

    Args:
        source: a float ONNX file, an onnx.ModelProto, a torch module, or a torch.export.ExportedProgram.
        calibration: inputs to calibrate on: an array [n, …], an iterable of arrays or of (inputs, labels), a file, a
            folder of pictures, or the name of a data set; None for made-up ones, which the result says.
        options: choices; further keyword arguments are fields of :class:`ExportOptions`.
        example_inputs: of a torch module: a tensor [n, …]; by default the first inputs of `calibration`.
        evaluation: inputs for fidelity; by default held out of `calibration`.
        data_dir: where data sets lie that are files.
        preparation: of pictures.
        name: of the net, for messages.
        progress: called with the step, what is done of it, and how much there is.

    Raises:
        BadFileError, BadValueError, BadTypeError, UnsupportedError, UnknownNameError, MissingDependencyError: one line
            says what is wrong with the net, the inputs or the options.
    """
    chosen = replace(options or ExportOptions(), **_fields(choices))
    clock = _Clock()
    read = _read(source, calibration, chosen, example_inputs, name)
    clock.step("read")
    tell = progress or (lambda step, done, total: None)
    given = load_inputs(
        calibration,
        read.input_shape,
        data_dir=data_dir,
        preparation=preparation,
        seed=chosen.seed,
        limit=None if calibration is None else chosen.calibrate_on + chosen.evaluate_on,
        names=(read.model.graph.input[0].name,),
    )
    inputs, held_out = _split(given, calibration, evaluation, read, chosen, data_dir, preparation)
    net = FloatNet(read.model)
    batch = max(1, min(64, MEMORY // max(4 * net.floats_per_input(inputs.x), 1)))
    statistics = collect(net, inputs, batch=batch, progress=lambda done: tell("calibrate", done, len(inputs)))
    clock.step("calibrate")
    recipe, sensitivity = chosen.recipe, {}
    datapath = chosen.chosen_datapath()
    if chosen.budget is not None:
        from lnsdeploy.exporters.mixed import choose_widths

        found = choose_widths(net, inputs.x[:batch][:8], chosen, progress=tell)
        recipe, sensitivity = found.recipe, found.sensitivity
        clock.step("budget")
    lowered = _lower(read, inputs, batch, statistics, datapath, recipe, chosen, tell)
    made = _artifact(lowered, read, chosen.pack)
    clock.step("lower")
    fidelity = measure(
        made,
        net,
        held_out,
        get_executor(fastest()),
        batch=min(batch, 16),
        progress=lambda done: tell("fidelity", done, len(held_out)),
    )
    clock.step("fidelity")
    return Result(
        artifact=made,
        source=read,
        fidelity=fidelity,
        calibration=inputs.source,
        calibrated_on=len(inputs),
        synthetic=inputs.synthetic,
        recipe=recipe,
        seconds=clock.seconds,
        peak_bytes=peak_bytes(),
        sensitivity=sensitivity,
        packed=chosen.pack,
    )


class _Clock:
    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def step(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.last = now


def peak_bytes() -> int:
    """The most memory that this process has had; 0 where the system does not tell."""
    try:
        import resource
        import sys
    except ImportError:  # pragma: no cover
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _fields(choices: dict[str, Any]) -> dict[str, Any]:
    known = [entry.name for entry in fields(ExportOptions)]
    for key in choices:
        if key not in known:
            raise UnknownNameError("option of export", key, known)
    return choices


def _lower(
    read: Source,
    inputs: Inputs,
    batch: int,
    statistics: dict[str, Statistics],
    datapath: Datapath,
    recipe: Recipe | None,
    options: ExportOptions,
    tell: Callable[[str, int, int], None],
) -> Lowered:
    sample = max(1, min(options.sample, batch, len(inputs)))
    corrected = not inputs.synthetic if options.correct_bias is None else options.correct_bias
    layers = sum(node.op_type in ("Conv", "Gemm", "MatMul") for node in read.model.graph.node)
    seen: set[str] = set()

    def layer(name: str) -> None:
        seen.add(name)
        tell("lower", min(len(seen), layers), layers)

    metadata = {
        "source": Path(read.name).name,
        "calibration": inputs.source,
        "calibration_synthetic": "yes" if inputs.synthetic else "no",
        "calibration_inputs": str(len(inputs)),
        "calibration_method": options.method,
        "bias_correction": "yes" if corrected else "no",
    }
    if recipe is not None:
        metadata["recipe"] = recipe.to_toml()
    if inputs.data:
        # what `emulate` and `verify` run it on by default
        metadata["data"] = inputs.data
    return lower(
        read.model,
        inputs.x[:sample],
        LowerOptions(
            datapath,
            method=options.method,
            percentile=options.percentile,
            weight_method=options.weight_method,
            per_channel=options.per_channel,
            headroom=options.headroom,
            sample=sample,
            recipe=recipe,
            statistics=statistics,
            correct_bias=corrected,
        ),
        metadata=metadata,
        progress=layer,
    )


def _artifact(lowered: Lowered, read: Source, pack: bool) -> artifacts.Artifact:
    from lnsdeploy.exporters.export import node_macs

    return artifacts.build(
        lowered.graph,
        node_macs(lowered.graph),
        coverage=lowered.coverage,
        float_ops=lowered.float_ops,
        where=read.name,
        pack=pack,
    )


def _split(
    given: Inputs,
    calibration: Any,
    evaluation: Any,
    read: Source,
    options: ExportOptions,
    data_dir: Path | None,
    preparation: Preparation | None,
) -> tuple[Inputs, Inputs]:
    """Inputs to calibrate on, and others to measure on."""
    names = (read.model.graph.input[0].name,)
    common: dict[str, Any] = {"data_dir": data_dir, "preparation": preparation, "names": names}
    if evaluation is not None:
        other = load_inputs(
            evaluation, read.input_shape, split="test", seed=options.seed + 1, limit=options.evaluate_on, **common
        )
        return given.part(0, options.calibrate_on), other
    if calibration is None:
        other = synthetic(read.input_shape, seed=options.seed + 1, limit=min(16, options.evaluate_on))
        return given, other
    if isinstance(calibration, str) and given.name == calibration and not Path(calibration).exists():
        other = load_inputs(calibration, read.input_shape, split="test", limit=options.evaluate_on, **common)
        kept = given.part(0, options.calibrate_on)
        return replace(kept, source=f"{len(kept)} training images of {given.name}"), other
    if len(given) < 4:
        return given, replace(given, source=f"{given.source}, those of calibration")
    held = min(max(len(given) // 4, 1), options.evaluate_on)
    kept = given.part(0, min(len(given) - held, options.calibrate_on))
    return kept, replace(given.part(len(given) - held, None), source=f"{held} inputs held out of {given.source}")


# ---------------------------------------------------------------------------------------------------
# Sources


def _read(source: Any, calibration: Any, options: ExportOptions, example: Any, name: str | None) -> Source:
    read = ReadOptions(options.input_shape, options.output)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        _refuse_other_files(path)
        found = read_source(path, read)
        return found if name is None else replace(found, name=name)
    if type(source).__name__ == "ModelProto" and hasattr(source, "graph"):
        copy = type(source)()
        copy.CopyFrom(source)
        return normalise(copy, read, name or "the model")
    if type(source).__name__ == "ModelProto":
        raise BadTypeError("an onnx.ModelProto is needed, not that of another library")
    model = torch_onnx(source, _example(source, calibration, options, example))
    return normalise(model, read, name or type(source).__name__)


def _refuse_other_files(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix in (".pt2", ".pt", ".pth", ".ckpt", ".bin", ".pkl"):
        raise UnsupportedError(
            f"{path}: torch files hold Python objects, and opening one may run code that it holds (torch.export.load "
            "too: it evaluates expressions and falls back to pickle); load it yourself where you trust it and call "
            "lnsdeploy.export(program), or export it with torch.onnx.export first"
        )
    if suffix == ".safetensors":
        raise UnsupportedError(
            f"{path}: weights without a net; name the net as FILE.py:CALLABLE and the weights by --weights"
        )


def _example(source: Any, calibration: Any, options: ExportOptions, example: Any) -> npt.NDArray[np.float32] | None:
    if type(source).__name__ == "ExportedProgram":
        return None
    if example is not None:
        value = example[0] if isinstance(example, (tuple, list)) and len(example) == 1 else example
        if isinstance(value, (tuple, list)):
            raise UnsupportedError("a module that takes several inputs has no LNS form: wrap it in one that takes one")
        array = np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value, dtype=np.float32)
    elif isinstance(calibration, np.ndarray):
        array = np.asarray(calibration[:2], dtype=np.float32)
    elif hasattr(calibration, "detach"):
        array = np.asarray(calibration[:2].detach().cpu().numpy(), dtype=np.float32)
    elif options.input_shape is not None:
        array = np.zeros((2, *options.input_shape[1:]), dtype=np.float32)
    else:
        raise BadValueError("a torch module needs example_inputs, or input_shape, or calibration inputs as an array")
    if not array.ndim or not len(array):
        raise BadValueError("example_inputs are a batch of at least one input")
    return np.concatenate([array, array])[:2] if len(array) < 2 else array[:2]


def torch_onnx(module: Any, example: npt.NDArray[np.float32] | None) -> Any:
    """The float ONNX model of a torch module or exported program.

    Args:
        example: float32 [2, …]; None for a program.

    Raises:
        BadTypeError: it is neither. UnsupportedError: torch cannot export it. MissingDependencyError: torch is missing.
    """
    try:
        import onnxscript  # noqa: F401
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            f"exporting a torch model needs torch, onnx and onnxscript ({error}): pip install 'lnsdeploy[all]'"
        ) from error
    program = isinstance(module, torch.export.ExportedProgram)
    if not program and not isinstance(module, torch.nn.Module):
        raise BadTypeError(
            "export takes an ONNX file, an onnx.ModelProto, a torch module or an exported program, not "
            f"{type(module).__name__}"
        )
    if program:
        return _torch_export(module, None, None)
    was_training = module.training
    parameter = next(iter(module.parameters()), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    assert example is not None
    inputs = (torch.from_numpy(np.array(example, dtype=np.float32)).to(device),)
    module.eval()
    try:
        try:
            return _torch_export(module, inputs, ({0: torch.export.Dim("batch")},))
        except UnsupportedError:
            # some nets fix the batch while they are traced: for one input, and freed afterwards where that is possible
            return _torch_export(module, (inputs[0][:1],), None)
    finally:
        module.train(was_training)


def _torch_export(module: Any, inputs: Any, dynamic: Any) -> Any:
    import contextlib
    import io
    import logging
    import warnings

    import torch

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    named: dict[str, Any] = {} if inputs is None else {"input_names": ["input"], "output_names": ["output"]}
    if dynamic is not None:
        named["dynamic_shapes"] = dynamic
    quiet = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(quiet),
            contextlib.redirect_stderr(quiet),
            torch.no_grad(),
        ):
            warnings.simplefilter("ignore")
            made = torch.onnx.export(module, inputs or (), dynamo=True, opset_version=18, verbose=False, **named)
    except Exception as error:  # torch raises anything where it cannot export
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UnsupportedError(f"torch cannot export {type(module).__name__} to ONNX: {text[:200]}") from error
    if made is None:
        raise UnsupportedError(f"torch cannot export {type(module).__name__} to ONNX")
    return made.model_proto
