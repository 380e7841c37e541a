"""Studies: what is searched, how points are measured, and that whatever ends a process loses and doubles nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from lnsdeploy.cli import cli
from lnsdeploy.datapath import Datapath
from lnsdeploy.errors import BadFileError, BadValueError, MissingDependencyError
from lnsdeploy.studies import points as measured
from lnsdeploy.studies import pricing
from lnsdeploy.studies import search as searched
from lnsdeploy.studies.compare import compare
from lnsdeploy.studies.points import Outcome, round_weights, rounded_model, wilson
from lnsdeploy.studies.recommend import recommend
from lnsdeploy.studies.search import Job, Queue, default_storage, generation, search
from lnsdeploy.studies.space import Net, Study, build_datapath, parse_delta, parse_study
from lnsdeploy.studies.study import StudyResult, assemble, mark_front, read_results, run_study

pytest.importorskip("optuna")
pytest.importorskip("torch")

NET = '[[net]]\nname = "m"\ndata = "digits"\nmodel = "mlp"\nepochs = 6\n'
TOML = f"""
name = "small"
{NET}
[objectives]
accuracy = "maximize"
size_bytes = "minimize"

[space]
format = ["4:2", "8:8"]
accumulate = ["linear", "log"]
table_bits = ["full"]
delta = ["exact", "max"]
"""


def changed(*pairs: tuple[str, str], text: str = TOML) -> str:
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


# the study below is made once, in one process
pytestmark = pytest.mark.xdist_group("study")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the float net, trained once, and a finished study."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "s.toml").write_text(TOML)
    run_study(folder / "s.toml", folder / "out", command="test", page=False)
    return folder


def furnished(home: Path, out: Path) -> Path:
    """A folder with the net of the fixture, so that nothing is trained."""
    out.mkdir(parents=True, exist_ok=True)
    for part in ("nets", "runs"):
        if not (out / part).exists():
            (out / part).symlink_to(home / "out" / part)
    return out


def plain(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: p[k] for k in ("id", "fingerprint", "state", "reason", "values", "pareto")} for p in results["points"]]


# ---------------------------------------------------------------------------------------------------
# The space


def test_choices_that_mean_nothing_are_dropped() -> None:
    study = parse_study(TOML)
    found = list(study.grid())
    # per format: one linear point, and two log ones
    assert study.combinations == 8
    assert len(found) == 6 == len({point.fingerprint for point in found})
    for point in found:
        assert point.datapath is not None
        assert ("delta" in point.parameters) != point.datapath.is_linear
        again = study.from_dict(json.loads(json.dumps(point.to_dict())))
        assert (again.fingerprint, again.datapath) == (point.fingerprint, point.datapath)


def test_random_points_are_those_of_the_grid() -> None:
    study = parse_study(TOML + '\n[search]\nmethod = "random"\ntrials = 100\nseed = 3\n')
    assert {p.fingerprint for p in study.drawn()} == {p.fingerprint for p in study.grid()}
    assert [p.fingerprint for p in study.drawn()] == [p.fingerprint for p in study.drawn()]


def test_choices_reach_the_datapath() -> None:
    made = build_datapath(
        {"format": "8:8", "accumulate": "linear", "accumulator_bits": 20, "psum_bits": 18, "lanes": 4}
        | {"conversion": "product", "table_bits": "full", "constant_bits": 6, "encoder": "table:5", "shift": "round"}
    )
    a = made.linear
    assert (a.bits, a.psum_bits, a.lanes, a.conversion, a.table_bits) == (20, 18, 4, "product", 3)
    assert (a.constant_bits, a.encoder, a.encoder_bits, a.shift) == (6, "table", 5, "round")
    made = build_datapath({"datapath": "gauss-8", "delta": "table(entries=32, step=2)", "guard_bits": 1})
    assert (made.log.guard_bits, made.log.delta.kind, made.log.delta.entries) == (1, "table", 32)
    assert Datapath.from_toml(made.to_toml()).fingerprint == made.fingerprint
    assert build_datapath({"format": "8:8", "weight": "4:4"}).weight.bits == 4
    assert (
        build_datapath({"datapath": "mitchell-8"}).fingerprint
        == build_datapath({"datapath": "mitchell-8", "accumulate": "linear", "lanes": 1}).fingerprint
    )
    assert parse_delta("table(entries=4, sample=middle)") == {"method": "table", "entries": 4, "sample": "middle"}


def test_a_combination_that_is_no_datapath_is_kept_once_with_its_reason() -> None:
    # 6:3 has a gamma that linear accumulation cannot have
    study = parse_study(changed(('"4:2", "8:8"', '"6:3", "8:8"')))
    wrong = [point for point in study.grid() if point.problem]
    assert len(wrong) == 1
    assert "power of two" in (wrong[0].problem or "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (changed(('name = "small"', "")), "name must be"),
        (changed((NET, "")), "at least one"),
        (changed(('"8:8"', '"8:x"')), "8:x"),
        (changed(('"max"', '"maks"')), "'maks'"),
        (changed(("size_bytes =", "size =")), "unknown objective 'size'"),
        (changed(("accumulate =", "acumulate =")), "did you mean 'accumulate'"),
        (TOML + '\n[search]\nmethod = "random"\n', "search.trials"),
        (TOML + '\n[search]\nmethod = "annealing"\n', "annealing"),
        (TOML + '\n[[constraint]]\nvalue = "drop"\n', "needs a number"),
        (TOML + '\n[evaluate]\nbaselines = ["int3"]\n', "int3"),
        (TOML + '\n[evaluate]\nsamples = "all"\n', "evaluate.samples"),
        (changed(('data = "digits"', 'file = "a.onnx"')) + '\n[evaluate]\naccuracy = "trained"\n', "post-training"),
        ("name = 3 4", "TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(text: str, said: str) -> None:
    with pytest.raises(BadFileError, match="(?s)" + said.replace("(", r"\(")):
        parse_study(text, where="s.toml")


def test_groups_of_layers_have_formats_of_their_own(home: Path, tmp_path: Path) -> None:
    text = changed(('delta = ["exact", "max"]', 'delta = ["exact"]'), ('"4:2", "8:8"', '"8:8"'), ('"log"', '"linear"'))
    text += '[[space.group]]\nname = "first"\nposition = "first"\nformat = ["same", "4:2"]\n'
    study = parse_study(text)
    same, narrow = study.grid()
    assert study.recipe(same) is None
    out = furnished(home, tmp_path / "out")
    ready = measured.prepare(study, study.nets[0], out)
    graph = measured._lowered(study, narrow, ready, out).graph
    layers = [node.plan.weight.bits for node in graph.nodes if hasattr(node, "words")]
    assert layers[0] == 4
    assert set(layers[1:]) == {8}


# ---------------------------------------------------------------------------------------------------
# Points


@pytest.mark.parametrize("name", ["fp8-e4m3", "fp8-e5m2", "int8", "int4"])
def test_baselines_round_as_their_formats_do(name: str) -> None:
    """The net with rounding inside gives what rounding by NumPy and ml_dtypes gives."""
    from onnx import TensorProto, helper, numpy_helper

    from lnsdeploy.exporters.calibration import FloatNet, Statistics

    generator = np.random.default_rng(0)
    weight = generator.normal(size=(5, 7)).astype(np.float32)
    x = generator.normal(size=(40, 7)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 7])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    seen = Statistics()
    seen.add(x)
    got = FloatNet(rounded_model(model, name, {"x": seen})).run(x)
    top = {"int8": 127, "int4": 7, "fp8-e4m3": 448, "fp8-e5m2": 57344}[name]
    scale = np.float32(np.abs(x).max() / top)
    if name.startswith("int"):
        rounded = np.clip(np.rint(x / scale), -top, top) * scale
        assert len(np.unique(np.rint(round_weights(weight, name)[0] / np.abs(weight[0]).max() * top))) <= 2 * top + 1
    else:
        import ml_dtypes

        kind = ml_dtypes.float8_e4m3fn if name == "fp8-e4m3" else ml_dtypes.float8_e5m2
        rounded = (x / scale).astype(kind).astype(np.float32) * scale
    np.testing.assert_allclose(got, rounded @ round_weights(weight, name).T, rtol=1e-5, atol=1e-5)
    largest = np.abs(weight).max(axis=1)
    np.testing.assert_allclose(np.abs(round_weights(weight, name)).max(axis=1), largest, rtol=1e-6)


def test_wilson_bounds() -> None:
    low, high = wilson(95, 100)
    # the textbook example of the score interval
    assert (round(low, 4), round(high, 4)) == (0.8882, 0.9785)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == pytest.approx(1)


def test_known_answers(home: Path) -> None:
    found = read_results(home / "out")["points"]
    lns = {(p["format"], p["parameters"].get("delta", "linear")): p["values"] for p in found if p["kind"] == "lns"}
    # 8 bits cost the digits nothing, a sum that is its largest term costs everything
    assert lns["8:8", "linear"]["drop"] <= 0.01
    assert lns["8:8", "exact"]["drop"] <= 0.015
    assert lns["8:8", "max"]["drop"] > 0.3
    assert lns["8:8", "linear"]["sqnr_db"] > lns["4:2", "linear"]["sqnr_db"] + 6
    base = {p["label"]: p["values"] for p in found if p["kind"] != "lns"}
    assert base["float32"]["drop"] == 0
    assert base["int8"]["drop"] <= 0.01
    assert base["float32"]["size_bytes"] == 4 * base["int8"]["size_bytes"] == 8 * base["int4"]["size_bytes"]
    assert base["int4"]["sqnr_db"] < base["int8"]["sqnr_db"]
    assert all(p["state"] == "complete" for p in found)


def test_known_answers_of_cost(home: Path, tmp_path: Path) -> None:
    """An 8-bit multiplier is a small part of int8's; what γ buys in precision, tables pay for."""
    text = changed(('"4:2", "8:8"', '"8:4", "8:8", "8:16"'), ('"exact", "max"', '"exact"'))
    study = parse_study(text.replace('table_bits = ["full"]', 'table_bits = ["full"]\nconversion = ["product"]'))
    out = furnished(home, tmp_path / "out")
    points = [study.baseline("m", "int8"), *study.grid()]
    entries = assemble(study, [(i, p, measured.evaluate(study, p, out), None) for i, p in enumerate(points)])["points"]
    int8, *lns = entries
    assert sum(int8["breakdown"].values()) == int8["values"]["transistors"]
    # a linear unit's table of remainders is a part of what aligns its products
    for kind, part, growth in (("linear", "alignment", 1.03), ("log", "tables", 1.5)):
        own = [p for p in lns if p["parameters"]["accumulate"] == kind]
        assert [p["format"] for p in own] == ["8:4", "8:8", "8:16"]
        for p in own:
            assert int8["breakdown"]["multiplier"] > 5 * p["breakdown"]["multiplier"]
            assert p["values"]["transistors"] < int8["values"]["transistors"]
        for name in ("table_bits", "sqnr_db"):
            least, middle, most = (p["values"][name] for p in own)
            assert least < middle < most, (kind, name)
        for low, high in itertools.pairwise(own):
            assert high["breakdown"][part] > growth * low["breakdown"][part], kind


def test_integer_multipliers_are_what_yosys_makes_of_them() -> None:
    from lnsdeploy.cost import synthesis

    if synthesis.find() is None:
        pytest.skip(synthesis.HOW_TO_GET_ONE)
    steps = "\n".join(synthesis.GATES)
    for name, known in pricing.INTEGER_MULTIPLIERS.items():
        bits = int(name[3:])
        top = f"input signed [{bits - 1}:0] a, input signed [{bits - 1}:0] w, output signed [{2 * bits - 1}:0] p"
        text = f"module lns_dut({top}); assign p = a * w; endmodule\n"
        script = f"read_verilog -sv m.v\n{steps}\ntee -q -o s.txt stat -tech cmos\n"
        found = synthesis.run_script(script, {"m.v": text}, ["s.txt"])["s.txt"]
        counted = int(found.split("number of transistors:")[1].split()[0])
        assert counted == pytest.approx(known, rel=0.05)


def test_energy_is_measured_where_it_is_asked_for(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole studies need a synthesiser; here one stands in for it, so that what becomes of its figures is tested."""
    from types import SimpleNamespace

    from lnsdeploy.cost import synthesis

    text = changed(("size_bytes = ", "energy = "), ('"4:2", "8:8"', '"8:8"'), ('"linear", "log"', '"linear"'))
    study = parse_study(text)
    monkeypatch.setattr(synthesis, "find", lambda: None)
    with pytest.raises(MissingDependencyError, match="Yosys"):
        run_study(study, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    seen: list[Any] = []

    def switching(artifact: Any, ready: Any) -> Any:
        seen.append(artifact)
        return SimpleNamespace(per_product=17.0, baselines={"int8 mac, 24-bit": 40.0, "int4 mac, 24-bit": 9.0})

    monkeypatch.setattr(measured, "_energy", switching)
    out = furnished(home, tmp_path / "out")
    (point,) = study.grid()
    assert measured.evaluate(study, point, out).values["energy"] == 17
    assert measured.evaluate(study, study.baseline("m", "int8"), out).values["energy"] == 40
    assert measured.evaluate(study, study.baseline("m", "fp8-e5m2"), out).values["energy"] is None
    assert [artifact.graph.datapath.activation.bits for artifact in seen] == [8, 8]
    # a study that did not ask for it measures nothing
    plain_study = parse_study(TOML)
    assert measured.evaluate(plain_study, plain_study.baseline("m", "int8"), out).values["energy"] is None
    assert len(seen) == 2


def test_streams_need_not_meet_every_channel() -> None:
    """Operands are drawn at random: a layer of many channels has some that no stream is of."""
    from lnsdeploy.cost.energy import lns_inputs, made_up_stream
    from lnsdeploy.rtl.parameters import pe_parameters

    stream = made_up_stream(build_datapath({"datapath": "gauss-8"}), steps=3, streams=4)
    plan = dataclasses.replace(stream.plan, weight_offset=np.array([-3, -2, -1]))
    one, two = (dataclasses.replace(stream, plan=plan, channels=np.full(4, c)) for c in (0, 1))
    assert np.allclose(two.values()[1], one.values()[1] * 2 ** (1 / 8))
    assert len(lns_inputs(two, pe_parameters([(plan, 3)]))) == 3


def test_a_point_is_what_export_and_emulate_give(home: Path) -> None:
    """The datapath of the table, through the public functions, has the accuracy of the table."""
    from lnsdeploy.emulator.executor import get_executor
    from lnsdeploy.emulator.session import emulate
    from lnsdeploy.training.data import load_data

    study = parse_study(TOML)
    entry = next(p for p in read_results(home / "out")["points"] if p["label"] == "lns-madam-8")
    data = load_data("digits")
    datapath = Datapath.from_toml(entry["datapath_toml"])
    point = next(p for p in study.grid() if p.datapath is not None and p.datapath.fingerprint == datapath.fingerprint)
    ready = measured.prepare(study, study.nets[0], home / "out")
    artifact = measured._lowered(study, point, ready, home / "out")
    found = emulate(artifact, get_executor("reference"), data.test_x[:60], data.test_y[:60])
    other = emulate(artifact, get_executor("cpu"), data.test_x, data.test_y)
    assert other.accuracy == pytest.approx(entry["values"]["accuracy"], abs=1e-6)
    assert (found.words == other.words[:60]).all()


def test_constraints_make_points_infeasible_or_prune_them(home: Path, tmp_path: Path) -> None:
    text = TOML + '\n[[constraint]]\nvalue = "drop"\nmax = 0.02\n\n[[constraint]]\nvalue = "size_bytes"\nmax = 9000\n'
    out = furnished(home, tmp_path / "out")
    study = parse_study(text)
    by_format: dict[tuple[str, str], Outcome] = {}
    for point in study.grid():
        assert point.datapath is not None
        key = (str(point.datapath.activation), str(point.parameters.get("delta", "linear")))
        by_format[key] = measured.evaluate(study, point, out)
    wide = by_format["8:8", "linear"]
    assert wide.state == "infeasible"
    assert "size_bytes" in (wide.reason or "")
    assert "accuracy" not in wide.values
    hopeless = by_format["4:2", "max"]
    assert hopeless.state == "pruned"
    assert "of the first 100 inputs" in (hopeless.reason or "")


# ---------------------------------------------------------------------------------------------------
# The queue


def quick(study: Study, point: Any, out: Path) -> Outcome:
    """An evaluation that takes no time: of the fingerprint alone."""
    number = int(point.fingerprint, 16)
    values: dict[str, float | None] = {"accuracy": number % 97 / 97, "size_bytes": float(number % 89)}
    return Outcome("complete", None, values, {}, {}, [])


def job_of(text: str, folder: Path) -> tuple[Study, Job]:
    folder.mkdir(parents=True, exist_ok=True)
    return parse_study(text), Job(text, str(folder), str(folder), default_storage(folder))


def test_what_a_killed_process_held_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searched, "evaluate", quick)
    study, job = job_of(TOML, tmp_path)
    queue = Queue(study, job.storage)
    everything = list(enumerate([*study.baselines(), *study.grid()]))
    queue.put(everything)
    held = queue.claim()
    queue.say(held, "claim", queue.owner | {"started": "0", "beat": time.time()})
    alive = queue.claim()
    assert queue.recover() == 1
    assert alive.user_attrs["fingerprint"] in queue.table()
    # the dead one's result comes too late, and counts for nothing
    queue.finish(held, quick(study, everything[held.user_attrs["place"]][1], tmp_path))
    queue.void(alive, "its process ended")
    found = search(study, job)
    assert [place for place, *_ in found] == [place for place, _ in everything]
    assert len({point.fingerprint for _, point, *_ in found}) == len(everything)


def test_a_silent_machine_is_taken_for_dead_and_a_talking_one_is_not(tmp_path: Path) -> None:
    study, job = job_of(TOML, tmp_path)
    queue = Queue(study, job.storage)
    queue.put(list(enumerate(study.grid())))
    trial = queue.claim()
    elsewhere = {"host": "another", "pid": 1, "started": "5"}
    for silence, dead in ((1.0, False), (searched.SILENCE + 1, True)):
        queue.say(trial, "claim", elsewhere | {"beat": time.time() - silence})
        assert queue.recover() == int(dead)


def test_of_two_trials_of_one_point_the_first_runs(tmp_path: Path) -> None:
    study, job = job_of(TOML, tmp_path)
    queue = Queue(study, job.storage)
    point = next(study.grid())
    queue.put([(0, point)])
    assert queue.put([(0, point)]) == 0
    # two coordinators that did not see each other
    twin = queue.trials()[0]
    queue.trials_of.add_trial(queue.optuna.trial.create_trial(state=twin.state, user_attrs=dict(twin.user_attrs)))
    assert queue.claim().number == 0
    assert queue.claim() is None
    assert len(queue.table()[point.fingerprint]) == 1


def test_failed_points_are_kept_with_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(study: Study, point: Any, out: Path) -> Outcome:
        if point.kind == "lns" and point.datapath.is_linear:
            raise ValueError("no\nsuch luck")
        return quick(study, point, out)

    monkeypatch.setattr(searched, "evaluate", failing)
    study, job = job_of(TOML, tmp_path)
    found = search(study, job)
    wrong = [outcome for _, _, outcome, _ in found if outcome.state == "failed"]
    assert [outcome.reason for outcome in wrong] == ["ValueError: no such luck"] * 2
    assert len(found) == 11
    # they are results, and are not run again
    monkeypatch.setattr(searched, "evaluate", lambda *_: pytest.fail("run again"))
    assert len(search(study, job)) == 11


def test_other_studies_of_the_storage_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searched, "evaluate", quick)
    study, job = job_of(TOML, tmp_path)
    first = search(study, job)
    monkeypatch.setattr(searched, "evaluate", lambda *_: pytest.fail("run again"))
    other = parse_study(changed(('"small"', '"smaller"'), ('["4:2", "8:8"]', '["8:8"]')))
    second = search(other, dataclasses.replace(job, toml=other.toml))
    known = {point.fingerprint: outcome for _, point, outcome, _ in first}
    assert len(second) == 8
    assert all(known[point.fingerprint].values == outcome.values for _, point, outcome, _ in second)


@pytest.mark.parametrize("method", ["tpe", "nsga2"])
def test_samplers_propose_the_same_whoever_runs_it(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = changed(('["4:2", "8:8"]', '["4:1", "4:2", "5:2", "6:4", "7:4", "8:8"]'))
    text += f'\n[search]\nmethod = "{method}"\ntrials = 16\ngeneration = 5\nseed = 1\n'
    monkeypatch.setattr(searched, "evaluate", quick)
    runs = []
    for name in "ab":
        study, job = job_of(text, tmp_path / name)
        runs.append([(place, point.fingerprint) for place, point, _, _ in search(study, job)])
    assert runs[0] == runs[1]
    assert len(runs[0]) == len({f for _, f in runs[0]}) == 16 + 5
    # a space with fewer points ends when all are known
    few = parse_study(TOML + f'\n[search]\nmethod = "{method}"\ntrials = 50\ngeneration = 4\n')
    earlier: list[Any] = []
    for number in itertools.count():
        proposed = generation(few, number, earlier)
        if not proposed:
            break
        earlier += [(len(earlier) + i, p, quick(few, p, tmp_path)) for i, p in enumerate(proposed)]
    assert len(earlier) == 5 + 6


def test_two_workers_give_the_points_of_one(home: Path, tmp_path: Path) -> None:
    out = furnished(home, tmp_path / "two")
    found = run_study(home / "s.toml", out, workers=2, page=False)
    assert plain(found.results) == plain(read_results(home / "out"))


@pytest.mark.slow
def test_two_ray_workers_give_the_points_of_one(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install 'lnsdeploy[ray]'")
    out = furnished(home, tmp_path / "ray")
    found = run_study(home / "s.toml", out, workers=2, ray="local", page=False)
    assert plain(found.results) == plain(read_results(home / "out"))


def test_a_killed_study_goes_on(home: Path, tmp_path: Path) -> None:
    out = furnished(home, tmp_path / "killed")
    line = [sys.executable, "-m", "lnsdeploy", "study", str(home / "s.toml"), "--out", str(out), "--workers", "2"]
    process = subprocess.Popen(line, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    queue = Queue(parse_study(TOML), default_storage(out))
    while process.poll() is None and not any("claim" in trial.user_attrs for trial in queue.trials()):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(queue.outcomes()) < 11
    found = run_study(home / "s.toml", out, page=False)
    assert plain(found.results) == plain(read_results(home / "out"))


# ---------------------------------------------------------------------------------------------------
# Results


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_front_is_what_nothing_beats(pairs: list[tuple[int, int]]) -> None:
    objectives = {"accuracy": "maximize", "depth": "minimize"}
    points = [{"state": "complete", "values": {"accuracy": a, "depth": d}, "pareto": False} for a, d in pairs]
    mark_front(points, objectives)
    for (a, d), point in zip(pairs, points, strict=True):
        beaten = any(x >= a and y <= d and (x, y) != (a, d) for x, y in pairs)
        assert point["pareto"] is not beaten


def test_json_of_the_command_line(home: Path, tmp_path: Path) -> None:
    out = furnished(home, tmp_path / "json")
    (out / "study.db").write_bytes((home / "out" / "study.db").read_bytes())
    done = CliRunner().invoke(cli, ["study", str(home / "s.toml"), "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["trials"] == 6
    assert Path(found["report"]).is_file()
    assert {"datapath", "accuracy", "transistors"} <= found["pareto"][0].keys()
    assert "lns-madam-8" in [point["datapath"] for point in found["pareto"]]
    rows = (out / "points.csv").read_text().splitlines()
    assert len(rows) == 1 + 11
    toml = {p["label"]: p["datapath_toml"] for p in read_results(out)["points"]}["lns-madam-8"]
    assert Datapath.from_toml(toml).name == "lns-madam-8"


def test_recommend_holds_its_promise_with_another_seed(home: Path, tmp_path: Path) -> None:
    """What is chosen for one training holds for another from scratch, on the half that nobody looked at."""
    (tmp_path / "space.toml").write_text(
        '[space]\nformat = ["3:1", "4:2", "6:4", "8:8"]\naccumulate = ["linear"]\ntable_bits = [0, "full"]\n'
    )
    given: dict[str, Any] = {"space": tmp_path / "space.toml", "by": "size_bytes"}
    found = recommend(home / "out" / "runs" / "m-float", 3.0, **given)
    assert found.chosen is not None
    assert found.worst(found.chosen) <= 3.0
    said = found.to_dict()
    assert said["datapath"] == said["recommended"]["datapath"]
    assert said["margin"] >= 0
    # of γ 1, the full table is none: seven datapaths, not eight
    assert sum(said["tried"].values()) == 7
    assert all(c.outcome.values["size_bytes"] >= found.chosen.outcome.values["size_bytes"] for c in found.runners_up)
    assert "recommended" in found.text()
    study = parse_study(changed(("epochs = 6", "epochs = 6\nseed = 1")) + '\n[evaluate]\npart = "odd"\n')
    again = measured.evaluate(study, dataclasses.replace(found.chosen.point, net="m"), tmp_path / "again")
    assert 100 * (again.values["drop"] or 0) <= 3.0


def test_recommend_says_that_nothing_holds(home: Path, tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text('format = ["2:1", "3:1"]\naccumulate = ["log"]\ndelta = ["max"]\n')
    line = ["recommend", "--net", str(home / "out" / "runs" / "m-float"), "--max-drop", "0.1", "--cost", "size_bytes"]
    done = CliRunner().invoke(cli, [*line, "--space", str(tmp_path / "space.toml"), "--json"])
    assert done.exit_code == 1 or done.exception is not None
    found = json.loads(done.stdout)
    assert found["recommended"] is None
    assert found["nearest"]["reason"]


def test_compare(home: Path, tmp_path: Path) -> None:
    run = home / "out" / "runs" / "m-float"
    same = compare(run, run)
    assert same.kind == "run"
    assert same.to_dict()["differences"] == []
    study = compare(home / "out", home / "out" / "study.json")
    assert study.rows["points"] == (6, 6)
    assert "m float32 accuracy" in study.rows
    assert "lns-madam-8" in study.text()
    with pytest.raises(BadValueError, match="two of a kind"):
        compare(run, home / "out")
    with pytest.raises(BadFileError, match="neither"):
        compare(tmp_path, run)


def test_compare_float_models_with_each_other_and_with_lns(home: Path, tmp_path: Path) -> None:
    import onnx

    (file,) = (home / "out" / "nets").glob("*.onnx")
    model = onnx.load(file)
    # as torch writes it: weights in a file beside
    beside = tmp_path / "m.onnx"
    onnx.save_model(model, beside, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    rows = compare(file, beside).rows
    assert {name for name, (a, b) in rows.items() if a != b} == set()
    assert rows["arithmetic"] == ("float32", "float32")
    assert rows["MACs an input"] == (64 * 128 + 128 * 64 + 64 * 10,) * 2
    assert rows["parameters"][0] == 64 * 128 + 128 * 64 + 64 * 10 + 128 + 64 + 10
    lns = tmp_path / "m.lns.onnx"
    line = ["export", str(beside), "-o", str(lns), "--calibration", "digits"]
    assert CliRunner().invoke(cli, line).exit_code == 0
    rows = compare(beside, lns).rows
    assert rows["arithmetic"] == ("float32", "LNS")
    assert rows["MACs an input"][0] == rows["MACs an input"][1]
    assert max(map(len, compare(beside, lns).text().splitlines())) < 160
    # another training of the same net; saving beside has taken the values out of the first model
    model = onnx.load(file)
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 2)
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 2, tensor.name))
    onnx.save_model(model, tmp_path / "other.onnx")
    assert compare(beside, tmp_path / "other.onnx").to_dict()["differences"] == ["layers' weights"]


def test_a_net_is_its_weights_wherever_they_lie(home: Path, tmp_path: Path) -> None:
    """A file of torch's has its weights in another one beside it: with other weights it is another net."""
    import onnx

    (file,) = (home / "out" / "nets").glob("*.onnx")
    beside = tmp_path / "m.onnx"
    onnx.save_model(onnx.load(file), beside, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    net = Net("m", file=str(beside))
    before = net.identity
    data = bytearray((tmp_path / "m.onnx.data").read_bytes())
    data[3] ^= 1
    (tmp_path / "m.onnx.data").write_bytes(data)
    assert net.identity != before


def test_recommend_takes_an_onnx_file(home: Path, tmp_path: Path) -> None:
    (file,) = (home / "out" / "nets").glob("*.onnx")
    (tmp_path / "space.toml").write_text('format = ["3:1", "8:8"]\naccumulate = "linear"\ntable_bits = "full"\n')
    line = ["recommend", "--net", str(file), "--max-drop", "3", "--space", str(tmp_path / "space.toml"), "--json"]
    done = CliRunner().invoke(cli, line)
    assert done.exit_code != 0
    assert "--data digits" in str(done.exception)
    done = CliRunner().invoke(cli, [*line, "--data", "digits"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["datapath"] == "lns-madam-8"
    assert found["accuracy"] > 0.9
    assert found["transistors"] > 0


def test_result_of_a_study_without_points_is_a_table(home: Path) -> None:
    study = parse_study(TOML)
    result = StudyResult(assemble(study, []), {"study.json": home})
    assert result.to_dict()["trials"] == 0
    assert "net" in result.text()
