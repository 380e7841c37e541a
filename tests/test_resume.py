"""Trainings that are killed, interrupted, or shared by processes: what they end with."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lnsdeploy.errors import BadFileError, BadValueError
from lnsdeploy.files import read_safetensors
from lnsdeploy.training import run as runs
from lnsdeploy.training import trainer
from lnsdeploy.training.layers import lns_layers
from lnsdeploy.training.run import load_run
from lnsdeploy.training.trainer import config_from_options, evaluate, train

torch.set_num_threads(1)
HERE = Path(__file__).parent
TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.\n" * 12

# Each has something of its own that a step changes: averages, codes, offsets, draws.
CONFIGS: dict[str, dict[str, Any]] = {
    "madam, lsq": {"calibration": "lsq", "granularity": "tensor", "bits": 4, "gamma": 2},
    "integer-madam, cnn": {"optimizer": "integer-madam", "model": "cnn", "calibration": "percentile"},
    "lns-madam, cnn": {"optimizer": "lns-madam", "model": "cnn"},
    "lns-madam, lsq": {"optimizer": "lns-madam", "calibration": "lsq", "granularity": "tensor"},
    "adam, augmented": {
        "optimizer": "adam",
        "model": "cnn",
        "augment": "crop+flip",
        "weight_decay": 0.1,
        "label_smoothing": 0.1,
        "grad_clip": 1.0,
        "errors": "8:8",
        "gradients": "8:8",
    },
    "sgd, warm": {"optimizer": "sgd", "schedule": "step", "warmup": 2, "as_float": True},
    "emulated": {"emulate": "both", "datapath": "mitchell-8", "limit": 12, "batch_size": 4},
}


def options_of(name: str, folder: Path) -> dict[str, Any]:
    if name == "transformer, dropout":
        (folder / "text").write_text(TEXT)
        settings = {"depth": 1, "width": 16, "heads": 2, "dropout": 0.2}
        found: dict[str, Any] = {"data": f"text:{folder / 'text'}", "model": "transformer", "context": 16}
        found |= {"model_settings": settings, "optimizer": "lns-madam"}
    else:
        found = CONFIGS[name]
    return {"epochs": 2, "limit": 36, "batch_size": 12} | found


def contents(folder: Path) -> tuple[bytes, str]:
    return (folder / runs.WEIGHTS).read_bytes(), (folder / runs.STEPS).read_text()


@pytest.mark.parametrize("name", [*CONFIGS, "transformer, dropout"])
def test_a_training_that_ends_anywhere_goes_on_to_the_same_bits(tmp_path: Path, name: str) -> None:
    """Ended in the first step, at the end of an epoch and within one, having saved every second step."""
    config = config_from_options(**options_of(name, tmp_path))
    train(config, tmp_path / "whole")
    assert len((tmp_path / "whole" / runs.STEPS).read_text().splitlines()) == 7

    class Killed(Exception):
        pass

    for last in (1, 3, 4, 6):

        def kill(done: int, steps: int, loss: float, last: int = last) -> None:
            assert steps == 6
            if done == last:
                raise Killed

        with pytest.raises(Killed):
            train(config, tmp_path / "parts", on_step=kill, checkpoint_every=2)
    # torch's own random state must not count
    torch.manual_seed(torch.seed())
    train(config, tmp_path / "parts", resume=True)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


_CHILD = """
import json, sys, torch
from lnsdeploy.training.trainer import config_from_options, train
torch.set_num_threads(1)
train(config_from_options(**json.loads(sys.argv[1])), sys.argv[2], checkpoint_every=1,
      on_step=lambda done, steps, loss: print(done, flush=True))
"""


def child(options: dict[str, Any], out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, json.dumps(options), str(out)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(trainer.__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        # what the background of a shell runs ignores interrupts, and its children would too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_killed_at_random_steps(tmp_path: Path) -> None:
    """SIGKILL, wherever it falls: in a step, in the writing of a checkpoint, between."""
    options = {"optimizer": "lns-madam", "model": "cnn", "epochs": 2, "limit": 120, "batch_size": 8}
    train(config_from_options(**options), tmp_path / "whole")
    for attempt in range(1):
        process = child(options, tmp_path / "killed")
        assert process.stdout is not None
        for _ in range(random.randint(3, 10)):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, attempt
        assert not (tmp_path / "killed" / runs.WEIGHTS).exists()
    train(config_from_options(**options), tmp_path / "killed", resume=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_the_step_it_came_in(tmp_path: Path, number: int) -> None:
    options = {"epochs": 1, "batch_size": 2}
    config = config_from_options(**options)
    done: list[int] = []

    def interrupt(step: int, steps: int, loss: float) -> None:
        done.append(step)
        if step == 5:
            signal.raise_signal(number)

    # a shell that starts this in its background has interrupts ignored, and what is ignored stays so
    before = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path, on_step=interrupt)
    finally:
        signal.signal(number, before)
    assert done[-1] <= 6
    _, notes = runs.read_state(tmp_path / runs.CHECKPOINT)
    assert notes["batch"] == done[-1]
    # handlers are what they were
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def again(step: int, steps: int, loss: float) -> None:
        assert step > done[-1]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        train(config, tmp_path, on_step=again)


def test_resume_means_that_there_is_something(tmp_path: Path) -> None:
    config = config_from_options(epochs=1, limit=24)
    with pytest.raises(BadFileError, match="no run to resume"):
        train(config, tmp_path / "run", resume=True)
    with pytest.raises(BadValueError, match="exclude each other"):
        train(config, tmp_path / "run", resume=True, restart=True)
    first = train(config, tmp_path / "run")
    assert train(config, tmp_path / "run", resume=True) == first


def test_a_diverged_training_says_what_is_kept(tmp_path: Path) -> None:
    config = config_from_options(optimizer="sgd", lr=1e30, as_float=True, limit=40, batch_size=10, epochs=1)
    with pytest.raises(BadValueError, match=r"step [234]: the training has diverged.*last checkpoint is kept in"):
        train(config, tmp_path, checkpoint_every=1)
    assert (tmp_path / runs.CHECKPOINT).exists()


@pytest.mark.parametrize("calibration", ["absmax", "percentile"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_what_lns_madam_trained_is_what_is_read(tmp_path: Path, model: str, calibration: str) -> None:
    """Accuracy, words and offsets of layers without a norm are those of the codes' upper bits."""
    config = config_from_options(
        optimizer="lns-madam", model=model, calibration=calibration, epochs=2, limit=240, bits=5, gamma=2
    )
    result = train(config, tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    assert evaluate(loaded.model, loaded.dataset()) == result.accuracy
    stored, _ = read_safetensors(tmp_path / "run" / runs.WEIGHTS)
    layers = [(name, layer) for name, layer in lns_layers(loaded.model) if layer.norm is None]
    assert layers
    for name, layer in layers:
        tensor = layer.weight_words()
        assert np.array_equal(tensor.decode(), stored[f"{name}.weight"]), name


def test_weights_to_begin_from(tmp_path: Path) -> None:
    base = {"model": "cnn", "limit": 240, "epochs": 3, "optimizer": "madam"}
    first = train(config_from_options(**base, as_float=True), tmp_path / "float")
    tuned = {"init_from": str(tmp_path / "float"), "epochs": 1, "limit": 240, "model": "cnn", "lr": 1e-6}
    second = train(config_from_options(**tuned, bits=12, gamma=64), tmp_path / "tuned")
    # nothing but rounding has changed
    assert abs(second.accuracy - first.accuracy) < 0.05
    with pytest.raises(BadFileError, match="another net"):
        train(config_from_options(init_from=str(tmp_path / "float"), epochs=1), tmp_path / "other")
    # the same place with other weights is another training
    train(config_from_options(**base | {"seed": 1}, as_float=True), tmp_path / "float", restart=True)
    with pytest.raises(BadValueError, match=r"start\.digest"):
        train(config_from_options(**tuned, bits=12, gamma=64), tmp_path / "tuned")


# ---------------------------------------------------------------------------------------------------
# Several processes


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """The same loss curve to float tolerance; one signal stops both, and one process goes on where two were."""
    (tmp_path / "text").write_text(TEXT)
    common: dict[str, Any] = {"limit": 51, "batch_size": 10, "epochs": 2}
    configs: dict[str, dict[str, Any]] = {
        "lns": common | {"optimizer": "lns-madam", "bits": 12, "gamma": 64, "granularity": "tensor"},
        "augmented": common | {"as_float": True, "augment": "crop", "optimizer": "sgd", "lr": 0.01},
        "stopped": common | {"as_float": True, "optimizer": "adam", "stop": 3},
        # of a whole batch, not of each process's part
        "norms": common
        | {"as_float": True, "optimizer": "sgd", "lr": 0.01, "model": "cnn-large", "model_settings": {"width": 4}},
        "folded norms": common | {"bits": 12, "gamma": 64, "model": "cnn-large", "model_settings": {"width": 4}},
        "too-small": common | {"batch_size": 1},
    }
    file, out = tmp_path / "configs.json", tmp_path / "two"
    out.mkdir()
    file.write_text(json.dumps(configs))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(HERE / "train_worker.py"), str(file), str(out)],
        capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (out / "too-small.0.error").exists(), done.stderr[-3000:]
    assert not (out / "too-small.1.error").exists()
    configs["stopped"].pop("stop")
    assert {p.name for p in out.glob("*.stopped")} == {"stopped.0.stopped", "stopped.1.stopped"}
    assert "cannot be split over 2" in (out / "too-small.0.error").read_text()
    _, notes = runs.read_state(out / "stopped" / runs.CHECKPOINT)
    # asked after step 3, they agree in step 4
    assert notes["batch"] == 4
    for name in ("lns", "augmented", "stopped", "norms", "folded norms"):
        config = config_from_options(**configs[name])
        train(config, tmp_path / "one" / name)
        if name == "stopped":
            train(config, out / name, resume=True)
        ours, theirs = (
            np.loadtxt(folder / name / runs.STEPS, delimiter=",", skiprows=1) for folder in (tmp_path / "one", out)
        )
        assert ours.shape == theirs.shape == (12, 3)
        # words make a difference of one rounding to another one now and then
        words = name in ("lns", "folded norms")
        assert np.allclose(ours, theirs, rtol=5e-3 if words else 1e-4), name
        first, second = (runs.read_metrics(folder / name) for folder in (tmp_path / "one", out))
        assert first[-1]["test_loss"] == pytest.approx(second[-1]["test_loss"], rel=1e-2 if words else 1e-4)


# ---------------------------------------------------------------------------------------------------
# What else a training leaves


def test_tensorboard_has_every_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_from_options(limit=60, batch_size=20, epochs=2)
    result = train(config, tmp_path / "run", tensorboard=tmp_path / "events")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    losses = events.Scalars("train/loss")
    steps = np.loadtxt(tmp_path / "run" / runs.STEPS, delimiter=",", skiprows=1)
    assert [e.step for e in losses] == steps[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert np.allclose([e.value for e in losses], steps[:, 2])
    assert events.Scalars("test/accuracy")[-1].value == pytest.approx(result.accuracy)


def test_looking_at_the_test_set_now_and_then_changes_no_weight(tmp_path: Path) -> None:
    config = config_from_options(limit=40, batch_size=20, epochs=5)
    always = train(config, tmp_path / "always")

    class Killed(Exception):
        pass

    def kill(done: int, row: runs.Row) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "seldom", eval_every=2, progress=kill)
    # gone on from a checkpoint whose epochs were not all looked at
    seldom = train(config, tmp_path / "seldom", eval_every=2)
    weights = [(tmp_path / name / runs.WEIGHTS).read_bytes() for name in ("always", "seldom")]
    assert weights[0] == weights[1]
    assert (seldom.accuracy, seldom.loss) == (always.accuracy, always.loss)
    rows = [runs.read_metrics(tmp_path / name) for name in ("always", "seldom")]
    for number, (ours, theirs) in enumerate(zip(*rows, strict=True), start=1):
        assert ours["train_loss"] == theirs["train_loss"]
        looked = number in (2, 4, 5)
        assert np.isnan(theirs["test_accuracy"]) != looked
        assert np.isnan(theirs["test_loss"]) != looked
        assert not looked or ours["test_loss"] == theirs["test_loss"]
    assert seldom.best == max(rows[1][i]["test_accuracy"] for i in (1, 3, 4))
    assert train(config, tmp_path / "seldom") == seldom
    with pytest.raises(BadValueError, match="eval_every"):
        train(config, tmp_path / "seldom", eval_every=0)


def test_short_flags_are_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lnsdeploy.cli import _run

    (tmp_path / "text").write_text(TEXT)
    net = f"train --data text:{tmp_path / 'text'} --model transformer --set depth=1 --set width=16 --set heads=2"
    rest = "--context 16 --epochs 1 --limit 8 --batch-size 8 --optimizer integer-madam"
    more = f"--dropout 0.25 --rounding nearest --fast --eval-every 3 --out {tmp_path / 'run'}"
    assert _run(f"{net} {rest} {more}".split()) == 0
    config = load_run(tmp_path / "run").config
    assert config.model_settings == {"depth": 1, "width": 16, "heads": 2, "dropout": 0.25}
    assert config.optimizer_settings == {"rounding": "nearest"}
    assert not config.deterministic
    assert config_from_options().deterministic
    # said twice: once is enough, and two different words are an error
    assert _run(f"{net} {rest} {more} --set dropout=0.25".split()) == 0
    capsys.readouterr()
    assert _run(f"{net} {rest} {more} --set dropout=0.5".split()) == 2
    assert "--dropout 0.25 contradicts dropout=0.5" in capsys.readouterr().err
    # --deterministic is what there is without a word
    assert _run(f"{net} {rest} {more} --deterministic".split()) == 2
    assert "deterministic" in capsys.readouterr().err


def test_flags_reach_the_config(tmp_path: Path) -> None:
    from lnsdeploy.cli import _run

    (tmp_path / "text").write_text(TEXT)
    arguments = f"""train --data text:{tmp_path / "text"} --model transformer --set depth=1 --set width=16 --set heads=2
        --context 16 --optimizer lns-madam --update-bits 12 --opt rounding=nearest --bits 6 --gamma 4 --weights 5:2
        --activations float --errors 8:8 --gradients float --lr 0.01 --schedule linear --warmup 3 --epochs 1 --limit 8
        --batch-size 4 --label-smoothing 0.1 --grad-clip 2 --seed 5 --checkpoint-every 1 --out {tmp_path / "run"}"""
    assert _run(arguments.split()) == 0
    config = load_run(tmp_path / "run").config
    assert (config.model_settings, config.context) == ({"depth": 1, "width": 16, "heads": 2}, 16)
    assert (config.update_bits, config.optimizer_settings) == (12, {"rounding": "nearest"})
    layer = config.layer_recipe()
    assert [str(f) for f in (layer.weight, layer.activation, layer.error)] == ["5:2", "None", "8:8"]
    assert (config.schedule, config.warmup, config.limit, config.grad_clip) == ("linear", 3, 8, 2.0)
    assert (config.label_smoothing, config.seed, config.lr, config.batch_size) == (0.1, 5, 0.01, 4)
    assert _run([*arguments.split(), "--resume"]) == 0
    assert _run(arguments.replace("--seed 5", "--seed 6").split()) == 2
