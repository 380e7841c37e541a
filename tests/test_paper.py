"""The experiments of docs/paper.md: tables that say what was found, and work that is not done twice."""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.paper import common, gan, hardware, updates
from examples.paper.common import Job, Results


def note(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """A job that tells what it was given, and leaves a file for each time it runs."""
    folder.mkdir(parents=True, exist_ok=True)
    time.sleep(options.get("takes", 0))
    (folder / f"ran {len(list(folder.iterdir()))}").write_text("")
    return {"accuracy": options["value"], "from": options.get("init_from")}


def test_jobs_wait_for_each_other_and_are_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # in threads: processes of their own have the whole experiment below
    monkeypatch.setattr(common, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    monkeypatch.setenv("LNSDEPLOY_THREADS", "1")
    jobs = [
        Job("b", "b 0", {"value": 0.5}, note, after="a 0"),
        Job("a", "a 0", {"value": 0.25, "takes": 0.2}, note),
        Job("a", "a 1", {"value": 0.75}, note),
    ]
    first = common.run_all(jobs, tmp_path, 2)
    # in the order of the jobs, whichever is done first
    assert first.values("a", "accuracy") == [0.25, 0.75]
    assert first.rows["b"][0]["from"] == str(tmp_path / "runs" / "a 0")
    assert common.percent(first, "a") == "50.00 ± 35.36"
    again = common.run_all(jobs, tmp_path, 1)
    assert again.rows["b"] == first.rows["b"]
    assert len(list((tmp_path / "runs" / "a 0").glob("ran *"))) == 1


def test_what_diverged_is_told() -> None:
    results = Results({"x": [{"accuracy": None}, {"accuracy": 0.5}], "y": [{"accuracy": None}]})
    assert common.percent(results, "x") == "50.00 ± 0.00 (1 diverged)"
    assert common.percent(results, "y") == "diverged"
    assert math.isnan(results.mean("y", "accuracy"))
    assert common.table(["a", "b"], [["1", "2"]]).splitlines() == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]


def test_what_a_datapath_costs_is_told_seed_by_seed() -> None:
    nets = [{"accuracy": 0.75}, {"accuracy": 0.5}, {"accuracy": None}]
    results = Results({"more training": nets, "x": [{"accuracy": 0.625}, {"accuracy": 0.515}, {"accuracy": 0.5}]})
    assert hardware.lacking(results, "x") == "12.5, -1.5, –"


def test_a_training_that_diverges_is_a_result(tmp_path: Path) -> None:
    found = common.train_job(tmp_path, {"optimizer": "sgd", "lr": 1e30, "epochs": 1, "as_float": True})
    assert found["accuracy"] is None
    assert "diverged" in found["diverged"]


@pytest.mark.slow
def test_a_whole_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(updates, "BITS", (8,))
    arguments = ["--model", "mlp", "--epochs", "1", "--seeds", "1", "--workers", "1", "--out", str(tmp_path)]
    assert updates.main(arguments) == 0
    text = capsys.readouterr().out
    rows = json.loads((tmp_path / "updates.json").read_text())
    kinds = ("8 octaves, stochastic", "16 octaves, stochastic", "8 octaves, nearest", "8 octaves, random start")
    assert set(rows) == {"float", *(f"8 bits, {kind}" for kind in kinds)}
    assert f"float Madam {100 * rows['float'][0]['accuracy']:.2f}" in text
    assert (tmp_path / "updates.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "updates.md").read_text().strip() == text.strip()


def test_frechet_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=generator)
    assert gan.frechet(a, a) == pytest.approx(0, abs=1e-9)
    # of normal distributions: shifted by 2, and twice as wide in one direction
    b = a * torch.tensor([2.0, 1.0, 1.0]) + torch.tensor([0.0, 2.0, 0.0])
    assert gan.frechet(a, b) == pytest.approx(4 + 1, rel=0.08)
