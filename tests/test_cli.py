"""The command line: what scripts rely on, and that every mistake ends in one line and exit status 2."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from lnsdeploy import __version__
from lnsdeploy.cli import _run
from lnsdeploy.datapath import named_datapaths
from lnsdeploy.training.trainer import config_from_options, train

COMMAND = [sys.executable, "-m", "lnsdeploy"]
QUICK = ["train", "--data", "digits", "--model", "mlp", "--epochs", "2"]


def run(*arguments, check=None, process=False, cwd=None):
    """A command as it is typed: in a process of its own, or in this one, which has imported torch already."""
    arguments = list(map(str, arguments))
    if process:
        done = subprocess.run(
            [*COMMAND, *arguments], capture_output=True, text=True, check=False, cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1", "LNSDEPLOY_THREADS": "1"},
        )  # fmt: skip
    else:
        done = inside(arguments, cwd or Path.cwd())
    assert "Traceback" not in done.stderr, done.stderr
    if check is not None:
        assert done.returncode == check, done.stderr
    return done


def inside(arguments, cwd):
    """The same in this process, with what Python would show of warnings on standard error."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    before = Path.cwd()
    os.chdir(cwd)
    try:
        with warnings.catch_warnings(record=True) as caught, redirect_stdout(out), redirect_stderr(err):
            warnings.resetwarnings()
            for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", kind)
            status = _run(arguments)
    finally:
        os.chdir(before)
    texts = []
    for stream in (out, err):
        stream.seek(0)
        texts.append(stream.read())
    shown = "".join(warnings.formatwarning(w.message, w.category, w.filename, w.lineno) for w in caught)
    return subprocess.CompletedProcess(arguments, status, texts[0], texts[1] + shown)


def one_line(done, *words):
    """Exit status 2, one line on standard error that has the words, nothing on standard output."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("lnsdeploy: ")
    for word in words:
        assert word in lines[0], lines[0]
    assert done.stdout == ""


# what the commands work on is made once, in one process
pytestmark = pytest.mark.xdist_group("command line")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A short run and its export."""
    path = tmp_path_factory.mktemp("cli")
    train(config_from_options(model="mlp", epochs=3), path / "run")
    done = run("export", path / "run", "-o", path / "m.onnx", "--json", check=0, process=True)
    (path / "export.json").write_text(done.stdout)
    return path


@pytest.mark.smoke
def test_version_and_help():
    assert __version__ in run("--version", check=0, process=True).stdout
    top = run("--help", check=0, process=True).stdout
    for verb in ("train", "export", "emulate", "verify", "report", "info"):
        assert verb in top
        text = run(verb, "--help", check=0).stdout
        assert "Example" in text
        assert f"lnsdeploy {verb}" in text


def test_help_and_core_import_without_heavy_packages():
    """`--help` and the core must not import what makes them slow."""
    heavy = ("torch", "onnx", "onnxruntime", "sklearn", "matplotlib", "plotly", "scipy", "pandas")
    for statement in (
        "from lnsdeploy.cli import cli",
        "import lnsdeploy.formats, lnsdeploy.datapath, lnsdeploy.emulator.reference, lnsdeploy.emulator.executor",
    ):
        code = f"import sys\n{statement}\nprint([m for m in {heavy!r} if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


@pytest.mark.smoke
def test_info():
    info = json.loads(run("info", "--json", check=0, process=True).stdout)
    assert info["version"] == __version__
    assert info["executors"]["reference"] == {"available": True, "why": ""}
    assert info["executors"]["ort"]["available"] is True
    assert sorted(info["datapaths"]) == named_datapaths()
    text = run("info", check=0).stdout
    for name in named_datapaths():
        assert name in text


def test_train_json_and_run_directory(tmp_path):
    done = run(*QUICK, "--seed", 1, "--out", tmp_path / "run", "--json", check=0, process=True)
    result = json.loads(done.stdout)
    assert 0.3 < result["accuracy"] <= 1
    assert Path(result["run"]) == tmp_path / "run"
    assert {"config.toml", "weights.safetensors", "metrics.csv", "curve.png"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    again = json.loads(run(*QUICK, "--seed", 1, "--out", tmp_path / "run", "--json", check=0).stdout)
    assert again["accuracy"] == result["accuracy"]


def test_export_json(folder):
    summary = json.loads((folder / "export.json").read_text())
    assert summary["coverage"] == 1.0
    assert summary["float_ops"] == []
    assert summary["macs"] == 64 * 128 + 128 * 64 + 64 * 10
    assert summary["datapath"]["name"] == "lns-madam-8"
    onnx.checker.check_model(str(folder / "m.onnx"), full_check=True)


@pytest.mark.parametrize("executor", ["reference", "ort"])
def test_emulate_json_and_outputs(folder, executor, tmp_path):
    outputs = tmp_path / "o.npz"
    done = run(
        "emulate", folder / "m.onnx", "--executor", executor, "--outputs", outputs, "--json",
        check=0, process=executor == "ort",
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["samples"] == 360
    assert result["executor"] == executor
    assert result["macs"] == 360 * 17024
    assert result["datapath"]["name"] == "lns-madam-8"
    assert len(result["datapath"]["fingerprint"]) == 16
    assert result["seconds"] > 0
    data = np.load(outputs)
    assert data["inputs"].shape == (360, 1, 8, 8)
    assert data["outputs"].shape == (360, 10)
    from lnsdeploy.training.data import load_data

    right = (data["outputs"].argmax(axis=1) == load_data("digits").test_y).mean()
    assert result["accuracy"] == pytest.approx(right)


def test_outputs_of_the_executors_are_the_same_bits(folder, tmp_path):
    for executor in ("reference", "ort"):
        run("emulate", folder / "m.onnx", "--executor", executor, "--outputs", tmp_path / f"{executor}.npz", check=0)
    a, b = (np.load(tmp_path / f"{name}.npz") for name in ("reference", "ort"))
    for key in ("inputs", "outputs", "words"):
        assert a[key].tobytes() == b[key].tobytes()


def test_emulate_a_run_directory_through_another_datapath(folder):
    done = run("emulate", folder / "run", "--datapath", "mitchell-8", "--limit", 40, "--json", check=0)
    result = json.loads(done.stdout)
    assert result["samples"] == 40
    assert result["datapath"]["name"] == "mitchell-8"
    other = json.loads(
        run("emulate", folder / "m.onnx", "--datapath", "mitchell-8", "--limit", 40, "--json", check=0).stdout
    )
    assert other["datapath"] == result["datapath"]


def test_verify_equal_and_different(folder, tmp_path):
    done = run("verify", folder / "m.onnx", "--executors", "reference,ort", "--limit", 32, "--json", check=0)
    result = json.loads(done.stdout)
    assert result["equal"] is True
    assert result["executors"] == ["reference", "ort"]
    assert result["words_compared"] > 32 * (64 + 128 + 64 + 10)
    assert result["first_difference"] is None

    model = onnx.load(folder / "m.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "hidden1.terms":
            array = numpy_helper.to_array(tensor).copy()
            array[np.unravel_index(np.argmax(array), array.shape)] += 1
            column = int(np.flatnonzero(array.any(axis=0))[len(array[0]) // 2])
            array[:, column] += array[:, column] > 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "changed.onnx")
    done = run("verify", tmp_path / "changed.onnx", "--executors", "reference,ort", "--limit", 32, "--json", check=1)
    result = json.loads(done.stdout)
    assert result["equal"] is False
    assert result["first_difference"]["node"] == "hidden1"
    assert result["table_differences"][0]["table"] == "hidden1.terms"
    text = run("verify", tmp_path / "changed.onnx", "--limit", 32, check=1, process=True)
    assert "hidden1" in text.stdout
    one_line(run("emulate", tmp_path / "changed.onnx"), "hidden1.terms", "the file was changed")


@lru_cache(maxsize=1)
def mistakes():
    return [
        (["trian"], ["unknown command 'trian'", "did you mean 'train'"]),
        (["train", "--out", "OUT", "--model", "mpl"], ["'mpl'", "did you mean 'mlp'"]),
        (["train", "--out", "OUT", "--data", "digit"], ["'digit'", "did you mean 'digits'"]),
        (["train", "--out", "OUT", "--optimizer", "madan"], ["'madan'", "did you mean 'madam'"]),
        (["train", "--out", "OUT", "--bits", "77"], ["--bits", "77"]),
        (["train", "--out", "OUT", "--weights", "eight"], ["eight"]),
        (["train", "--out", "OUT", "--data", "mnist"], ["--data-dir"]),
        (["train", "--out", "OUT", "--data", "mnist", "--data-dir", "NOWHERE"], ["NOWHERE"]),
        (["train", "--out", "OUT", "--lr", "nan"], ["lr"]),
        (["train", "--out", "OUT", "--recipe", "NOWHERE.toml"], ["NOWHERE.toml"]),
        (["train"], ["--out"]),
        (["emulate", "NOWHERE.onnx"], ["NOWHERE.onnx", "No such file"]),
        (["emulate", "M", "--executor", "refrence"], ["'refrence'", "did you mean 'reference'"]),
        (["emulate", "M", "--datapath", "gaus-8"], ["'gaus-8'", "did you mean 'gauss-8'"]),
        (["emulate", "M", "--limit", "0"], ["--limit"]),
        (["emulate", "M", "--outputs", "NOWHERE/o.npz", "--limit", "2"], ["NOWHERE/o.npz"]),
        (["verify", "M", "--executors", "reference"], ["two different executors"]),
        (["verify", "M", "--executors", "reference,orz"], ["'orz'", "did you mean 'ort'"]),
        (["export", "NOWHERE", "-o", "x.onnx"], ["NOWHERE"]),
        (["report", "--out", "OUT", "--bits", "8-3"], ["--bits"]),
        (["report", "--out", "OUT", "--gamma", "8:"], ["8:"]),
        (["report", "--out", "OUT", "--datapath", "gauss-9"], ["did you mean 'gauss-8'"]),
    ]


@pytest.mark.parametrize("index", range(len(mistakes())))
def test_mistakes_end_in_one_line(folder, tmp_path, index):
    arguments, words = mistakes()[index]
    given = [str(folder / "m.onnx") if a == "M" else str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    # a few in processes of their own, where nothing has been imported yet
    process = index in (0, 1, 12)
    one_line(run(*given, cwd=tmp_path, process=process), *words)
    assert not (tmp_path / "x.onnx").exists()


def damaged_runs(path):
    """Name → how to damage a run directory."""

    def cut(name):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: len(data) // 2])

    def text(name, old, new):
        file = path / name
        content = file.read_text()
        assert old in content
        file.write_text(content.replace(old, new))

    def pickled():
        import pickle

        (path / "weights.safetensors").write_bytes(pickle.dumps([1, 2]))

    return {
        "truncated weights": lambda: cut("weights.safetensors"),
        "no weights": lambda: (path / "weights.safetensors").unlink(),
        "no config": lambda: (path / "config.toml").unlink(),
        "config that is no TOML": lambda: (path / "config.toml").write_text("= = ="),
        "unknown model": lambda: text("config.toml", '"mlp"', '"mpl"'),
        "pickle for weights": pickled,
    }


@pytest.mark.parametrize("name", sorted(damaged_runs(Path())))
def test_damaged_runs_are_refused(folder, tmp_path, name):
    import shutil

    shutil.copytree(folder / "run", tmp_path / "run")
    damaged_runs(tmp_path / "run")[name]()
    one_line(run("export", tmp_path / "run", "-o", tmp_path / "x.onnx", process=name == "pickle for weights"), "run")
    assert not (tmp_path / "x.onnx").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(folder, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    # a file-size limit makes every larger write fail, as a full disk does
    script = f"ulimit -f 8; exec {' '.join(COMMAND)} export {folder / 'run'} -o {tmp_path / 'x.onnx'}"
    done = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; {script}"], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_interruption_keeps_the_run_and_says_so(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [*COMMAND, "train", "--epochs", "400", "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        # what the background of a shell runs ignores interrupts, and its children would too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for _ in range(600):
        if (out / "checkpoint.safetensors").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert (out / "checkpoint.safetensors").exists()
    assert not [p for p in out.iterdir() if ".tmp" in p.name]


# ---------------------------------------------------------------------------------------------------
# Torch models by name

MODELS = Path(__file__).parent / "small_models.py"


def test_emulate_a_torch_model():
    result = json.loads(
        run("emulate", f"{MODELS}:digits_mlp", "--data", "digits", "--limit", 9, "--json", check=0).stdout
    )
    # names that scripts rely on
    assert result["macs"] == 9 * (64 * 32 + 32 * 10)
    assert result["seconds"] > 0
    assert result["not_emulated"] == {}
    assert result["samples"] == 9
    assert result["executor"] in ("cpu", "reference")
    assert (result["weights"], result["data"]) == ("own", "digits")
    assert [layer["name"] for layer in result["layers"]] == ["1", "3"]


def test_emulate_a_torch_model_by_the_reference():
    """The executor is another, the words are the same, and so is every figure."""
    found = [
        json.loads(run("emulate", f"{MODELS}:cnn", "--data", "digits", "--limit", 2, *more, "--json", check=0).stdout)
        for more in ((), ("--executor", "reference"))
    ]
    if found[0]["executor"] == "reference":
        pytest.skip("there is no native library here: both runs were the reference's")
    assert found[1]["executor"] == "reference"
    for key in ("agreement", "logits_sqnr_db", "accuracy", "loss", "macs"):
        assert found[0][key] == found[1][key]
    for one, other in zip(found[0]["layers"], found[1]["layers"], strict=True):
        for key in ("name", "outputs", "inputs", "weights", "saturated", "flushed", "sqnr_db"):
            assert one[key] == other[key]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["emulate"], ("name one model: SOURCE, or --model NAME",)),
        (["emulate", "a:b", "--model", "c:d"], ("name one model",)),
        (["emulate", "resnet50"], ("cannot read resnet50", "timm:resnet50")),
        (["emulate", "tim:resnet50"], ("did you mean 'timm'",)),
        (["emulate", f"{MODELS}:cn"], ("did you mean 'cnn'",)),
        (["emulate", "m.onnx", "--weights", "random"], ("--weights means nothing for an exported model", "'m.onnx'")),
        (["emulate", f"{MODELS}:cnn", "--outputs", "o.npz"], ("--outputs means nothing for a torch model",)),
        (["emulate", f"{MODELS}:cnn", "--weights", "mine"], ("weights must be 'pretrained', 'random', or a file",)),
        (["emulate", f"{MODELS}:cnn", "--set", "x"], ("a setting is KEY=VALUE",)),
        (["emulate", f"{MODELS}:cnn", "--data", "digit"], ("did you mean 'digits'",)),
        (["emulate", f"{MODELS}:raising"], ("raised ValueError: no such thing as a free model",)),
        (["emulate", f"{MODELS}:module", "--executor", "gpu"], ("unknown executor 'gpu'",)),
    ],
)
def test_mistakes_with_torch_models(arguments, words):
    one_line(run(*arguments), *words)


def test_what_a_torch_model_prints():
    arguments = ("emulate", "--model", f"{MODELS}:decoder", "--limit", 2, "--layers", "--set", "length=5")
    out = run(*arguments, check=0).stdout
    for part in ("perplexity", "synthetic: random tokens of seed 0", "2 samples", "head", "datapath lns-madam-8"):
        assert part in out


def test_page_of_a_torch_model(tmp_path):
    arguments = ("emulate", f"{MODELS}:decoder", "--limit", 2, "--weights", "random", "--report", tmp_path / "page")
    assert f"page: {tmp_path / 'page' / 'emulation.html'}" in run(*arguments, check=0).stdout
    text = (tmp_path / "page" / "emulation.html").read_text()
    for part in ("RANDOM: random (seed 0)", "synthetic", "head", "lns-madam-8", "Perplexity", "of random weights"):
        assert part in text
    stored = json.loads((tmp_path / "page" / "emulation.json").read_text())
    assert (stored["weights"], stored["data"]) == ("random", "synthetic")
    assert stored["macs"] > 0


def test_other_processes_of_torchrun_leave_the_word_to_the_first(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    done = run("emulate", check=2)
    assert (done.stdout, done.stderr) == ("", "")
