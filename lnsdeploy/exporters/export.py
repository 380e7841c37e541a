"""From a run directory (or an artifact and another datapath) to an artifact."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.datapath import Datapath, for_format, load_datapath
from lnsdeploy.emulator import artifact as artifacts
from lnsdeploy.emulator import graph as g
from lnsdeploy.emulator import reference
from lnsdeploy.emulator.executor import fastest, get_executor
from lnsdeploy.emulator.plan import Counts
from lnsdeploy.errors import BadValueError, MissingDependencyError, UnsupportedError
from lnsdeploy.exporters import placement
from lnsdeploy.exporters.lower import Lowered, LowerOptions, float_values, lower
from lnsdeploy.formats import Words, decode

if TYPE_CHECKING:
    from lnsdeploy.training.data import Dataset
    from lnsdeploy.training.run import Run

# Inputs on which accumulators are placed, and octaves kept free above what they reach there.
SAMPLE, HEADROOM = 64, 1.0


@dataclass(frozen=True, eq=False)
class Exported:
    """A lowered run.

    Args:
        lowered: the net on words and what was counted.
        seconds: time that lowering took.
    """

    lowered: Lowered
    seconds: float

    def artifact(self, where: str = "net", *, pack: bool = True) -> artifacts.Artifact:
        """The net with its ONNX form; `pack` as in :func:`lnsdeploy.emulator.artifact.build`."""
        return artifacts.build(
            self.lowered.graph,
            node_macs(self.lowered.graph),
            coverage=self.lowered.coverage,
            float_ops=self.lowered.float_ops,
            where=where,
            pack=pack,
        )

    def save(self, path: Path, *, pack: bool = True) -> dict[str, Any]:
        """Write the LNS ONNX file; returns what the command line prints."""
        made = self.artifact(str(path), pack=pack)
        _check(made)
        made.save(path)
        datapath = made.graph.datapath
        return {
            "path": str(path),
            "layers": sum(isinstance(n, (g.Conv, g.Gemm)) for n in made.graph.nodes),
            "macs": sum(made.macs.values()),
            "coverage": made.coverage,
            "float_ops": list(made.float_ops),
            "formats": made.formats,
            "datapath": {"name": datapath.name, "fingerprint": datapath.fingerprint},
            "bytes": len(made.data),
            "seconds": round(self.seconds, 3),
        }


def _check(artifact: artifacts.Artifact) -> None:
    import onnx

    onnx.checker.check_model(onnx.load_model_from_string(artifact.data), full_check=True)


def node_macs(graph: g.LNSGraph) -> dict[str, int]:
    """Multiply-accumulate operations per input, by node."""
    records: dict[str, g.LayerRecord] = {}
    zeros = np.zeros((1, *graph.input_shape[1:]), dtype=np.float32)
    get_executor(fastest()).run(artifacts.Artifact(graph, b"", "net", {}), zeros, records=records)
    return {name: record.macs for name, record in records.items() if record.macs}


def lower_run(
    run: str | Path,
    *,
    datapath: str | Path | Datapath | None = None,
    sample: int = SAMPLE,
    headroom: float = HEADROOM,
    data_dir: Path | None = None,
) -> Exported:
    """Lower a trained run.

    Args:
        run: the run directory.
        datapath: name, TOML file or object; by default the one it was trained through, if there is one, else
            :func:`lnsdeploy.datapath.for_format` of the run's formats. A run that was trained through this datapath
            has been lowered already, at the default `sample` and `headroom`: then its own net is the result.
        sample: training inputs on which accumulators are placed; offsets without a recorded value are calibrated
            on up to 512.
        headroom: octaves kept free above the largest partial sum of the sample.
        data_dir: where the run's data set lies, if not where it was.

    Raises:
        BadFileError: the run directory is damaged; UnsupportedError: the net has no LNS form.
    """
    from lnsdeploy.training.run import DEPLOYED, load_run

    start = time.perf_counter()
    loaded = load_run(run)
    chosen = None if datapath is None else load_datapath(datapath)
    if loaded.deployed is not None and (sample, headroom) == (SAMPLE, HEADROOM):
        wanted = None if chosen is None else chosen.with_formats(*loaded.formats()).fingerprint
        if wanted in (None, loaded.deployed.datapath):
            where = str(loaded.path / DEPLOYED)
            kept = artifacts.read_artifact(loaded.deployed_file(), where=where)
            kept.require_intact()
            lowered = Lowered(kept.graph, sum(kept.macs.values()), kept.coverage, kept.float_ops)
            return Exported(lowered, time.perf_counter() - start)
    datapaths = None if chosen is None else [chosen]
    found = lower_loaded(loaded, loaded.dataset(data_dir), datapaths, sample=sample, headroom=headroom)
    return found.exported[0]


@dataclass(frozen=True, eq=False)
class RunLowered:
    """A trained run lowered for several datapaths.

    Args:
        exported: one for each datapath.
        dataset: the run's data.
        float_values: every tensor of the float net for the first 64 test inputs, by name.
    """

    exported: list[Exported]
    dataset: Any
    float_values: dict[str, npt.NDArray[np.float32]]


def lower_datapaths(
    run: str | Path,
    datapaths: Sequence[Datapath] | None,
    *,
    sample: int = SAMPLE,
    headroom: float = HEADROOM,
    data_dir: Path | None = None,
) -> RunLowered:
    """Lower a trained run for several datapaths, each adapted to the run's formats; see :func:`lower_run`.

    Args:
        datapaths: None for the default one.
    """
    from lnsdeploy.training.run import load_run

    loaded = load_run(run)
    return lower_loaded(loaded, loaded.dataset(data_dir), datapaths, sample=sample, headroom=headroom)


def lower_loaded(
    loaded: Run,
    dataset: Dataset,
    datapaths: Sequence[Datapath] | None,
    *,
    sample: int = SAMPLE,
    headroom: float = HEADROOM,
) -> RunLowered:
    """As :func:`lower_datapaths`, for a run in memory.

    Args:
        loaded: the run; its model is on the CPU.
        dataset: its data.
        datapaths: None for the one it was trained through, else the default one.
    """
    from lnsdeploy.training.layers import deployable

    start = time.perf_counter()
    plain, specs = deployable(loaded.model)
    weight, activation = loaded.formats()
    if datapaths is None and loaded.config.datapath is not None:
        datapaths = [load_datapath(loaded.config.datapath)]
    if datapaths is None:
        chosen = [for_format(activation, weight=weight)]
    else:
        chosen = [datapath.with_formats(weight, activation) for datapath in datapaths]
    model = float_onnx(plain, dataset.train_x[:2])
    exported = []
    for datapath in chosen:
        lowered = lower(
            model,
            dataset.train_x[:512],
            LowerOptions(datapath, sample=sample, headroom=headroom),
            specs=specs,
            metadata=loaded.metadata(),
        )
        exported.append(Exported(lowered, time.perf_counter() - start))
        start = time.perf_counter()
    return RunLowered(exported, dataset, float_values(model, dataset.test_x[:64]))


def float_onnx(model: Any, example: npt.NDArray[Any]) -> Any:
    """The float ONNX model of a torch module, with a dynamic batch.

    Args:
        model: torch.nn.Module in eval mode.
        example: inputs [n, …], n ≥ 2.
    """
    import contextlib
    import logging
    import warnings

    try:
        import onnxscript  # noqa: F401
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            "exporting a torch model needs torch, onnx and onnxscript: pip install 'lnsdeploy[all]'"
        ) from error
    inputs = (torch.from_numpy(np.array(example, dtype=np.float32)),)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.eval(),
            inputs,
            dynamo=True,
            opset_version=18,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    if program is None:
        raise UnsupportedError("torch could not export the model to ONNX")
    return program.model_proto


def replan(
    artifact: artifacts.Artifact,
    datapath: str | Path | Datapath,
    inputs: npt.NDArray[Any],
    *,
    sample: int = 64,
    headroom: float = 1.0,
) -> artifacts.Artifact:
    """The same words through another datapath: accumulators are placed anew, formats and offsets stay.

    Args:
        inputs: real inputs [n, …] to place accumulators on.

    Raises:
        BadValueError: the datapath cannot take the net's formats.
    """
    from lnsdeploy.emulator.cpu import step_of

    base = load_datapath(datapath)
    graph = artifact.graph
    env: dict[str, Words] = dict(graph.constants) | {graph.encoded: graph.encode_input(inputs[:sample])}
    datapaths: dict[str, Datapath] = {}
    nodes: list[g.Node] = []
    for node in graph.nodes:
        changed = node
        if isinstance(node, (g.Gemm, g.Conv)):
            chosen = base.with_formats(node.plan.weight, node.plan.activation)
            chosen = datapaths.setdefault(chosen.fingerprint, chosen)
            changed = _replace_accumulator(node, chosen, env[node.inputs[0]], headroom)
        elif isinstance(node, g.MatMul):
            chosen = base.with_formats(node.plan.weight, node.plan.activation)
            chosen = datapaths.setdefault(chosen.fingerprint, chosen)
            plan = replace(node.plan, datapath=chosen, lsb=0, acc_offset=0)
            a, b = (env[name] for name in node.inputs)
            changed = replace(node, plan=placement.place_matmul(plan, a, b, headroom))
        elif isinstance(node, g.Add):
            x, y = (_values(graph, env, name) for name in node.inputs)
            add_plan = replace(node.plan, accumulator=base.with_formats(base.weight, node.plan.output).add)
            changed = replace(node, plan=placement.place_add(add_plan, x, y, headroom))
        elif isinstance(node, g.AveragePool):
            view = reference.windows(_values(graph, env, node.inputs[0]), node.window)
            flat = view.reshape(*view.shape[: 2 + len(node.window.kernel)], -1)
            pool_plan = replace(node.plan, accumulator=base.with_formats(base.weight, node.plan.output).add)
            changed = replace(node, plan=placement.place_pool(pool_plan, flat, headroom))
        nodes.append(changed)
        env[node.output] = step_of(changed)([env[n] for n in node.inputs], Counts())
    if not datapaths:
        raise BadValueError(f"{artifact.where} has no layer to run through another datapath")
    made = replace(graph, nodes=tuple(nodes), datapaths=datapaths)
    return artifacts.build(
        made, artifact.macs, coverage=artifact.coverage, float_ops=artifact.float_ops, where=artifact.where
    )


def _values(graph: g.LNSGraph, env: dict[str, Words], name: str) -> npt.NDArray[np.float64]:
    info = graph.tensors[name]
    return np.asarray(decode(env[name], info.format, info.offset, np.float64))


def _replace_accumulator(node: g.Gemm | g.Conv, datapath: Datapath, x: Words, headroom: float) -> g.Node:
    channels = node.words.shape[0]
    bias = None if node.bias is None else _real_bias(node, channels)
    plan = replace(node.plan, datapath=datapath, lsb=0, acc_offset=0)
    if isinstance(node, g.Gemm):
        plan, integers = placement.place_dot(plan, x.reshape(-1, x.shape[-1]), node.words, bias, headroom)
    else:
        plan, integers = placement.place_convolution(plan, x, node.words, bias, node.window, node.groups, headroom)
    return replace(node, plan=plan, bias=integers)


def _real_bias(node: g.Gemm | g.Conv, channels: int) -> npt.NDArray[np.float64]:
    """The value of an integer bias, to the precision it was kept in."""
    plan, bias = node.plan, node.bias
    assert bias is not None
    if plan.datapath.is_linear:
        return np.asarray(bias * np.exp2(plan.product_offset(channels) / plan.gamma + plan.lsb))
    accumulator = plan.datapath.log
    codes = bias & accumulator.max_code
    exponent = codes / (plan.gamma << accumulator.guard_bits) + plan.accumulator_offset(channels) / plan.gamma
    return np.where(codes == 0, 0.0, np.where(bias >> accumulator.bits, -1.0, 1.0) * np.exp2(exponent))
