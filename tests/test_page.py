"""The report page: what it refuses, what it writes, and that a browser shows it."""

from __future__ import annotations

import base64
import copy
import csv
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jinja2", reason="the report extra is not installed")
pytest.importorskip("plotly", reason="the report extra is not installed")
pytest.importorskip("matplotlib", reason="the report extra is not installed")

from lnsdeploy.errors import BadFileError, BadValueError, LNSError
from lnsdeploy.studies import page
from tests.browser import browse, needs_chromium

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&amp; "q" \'s\' $x_1^$ %{y} \u2028'

LAYERS = {
    "mlp": [("layers.0", "Gemm", 50176), ("layers.2", "Gemm", 16384), ("layers.4", "Gemm", 1280)],
    "cnn": [
        ("features.0", "Conv", 73728),
        ("features.3", "Conv", 147456),
        ("features.4", "MaxPool", 0),
        ("features.6", "Conv", 73728),
        ("pool", "GlobalAveragePool", 0),
        ("classifier", "Gemm", 640),
    ],
}
# datapath, bits, γ, accumulate, description, points of accuracy lost
CONFIGS = [
    ("default-8:8", 8, 8, "linear", "linear, 8-entry table, bins, 24-bit saturating", 0.05),
    ("default-7:8", 7, 8, "linear", "linear, 8-entry table, bins, 24-bit saturating", 0.1),
    ("default-6:4", 6, 4, "linear", "linear, 4-entry table, bins, 24-bit saturating", 0.1),
    ("default-5:2", 5, 2, "linear", "linear, 2-entry table, bins, 24-bit saturating", 0.35),
    ("default-4:2", 4, 2, "linear", "linear, 2-entry table, bins, 24-bit saturating", 0.9),
    ("default-3:1", 3, 1, "linear", "linear, powers of two, 24-bit saturating", 6.0),
    ("lns-madam-8-lut1", 8, 8, "linear", "linear, pure Mitchell, bins, 24-bit saturating", 0.6),
    ("gauss-8", 8, 8, "log", "log, exact Δ, 2 guard bits", 0.2),
    ("mitchell-8", 8, 8, "log", "log, Mitchell's Δ, 2 guard bits", 2.1),
    ("max-plus-8", 8, 8, "log", "log, Δ = 0", 41.0),
    ("lognet-5", 5, 2, "linear", "linear, 2-entry table, products, 16-bit wrapping", 0.5),
    ("lognet-4", 4, 1, "linear", "linear, powers of two, 16-bit wrapping", 2.4),
]


def make_results(models=("mlp", "cnn"), seeds=5, configs=CONFIGS, layers=True):
    """Results as a sweep over both models would give them; the same every time."""
    rng = random.Random(7)
    test = 360

    def accuracy(mean):
        return round(min(max(rng.gauss(mean, 0.003), 0.0), 1.0) * test) / test

    results = {
        "title": "Digits: 3- to 8-bit log-domain nets",
        "lnsdeploy": "0.1.0",
        "created": "2026-03-14T15:09:26+00:00",
        "machine": {
            "cpu": "Intel(R) Xeon(R) Processor @ 2.10GHz",
            "cores": 2,
            "python": "3.11.2",
            "torch": "2.13.0",
            "onnxruntime": "1.32.0",
        },
        "command": "lnsdeploy report --data digits --models mlp,cnn --bits 3-8 --seeds 5 --out report",
        "seconds": 1834.2,
        "data": {
            "name": "digits",
            "train": 1437,
            "test": test,
            "source": "scikit-learn load_digits, stratified 80/20 split",
        },
        "recipe": {
            "optimizer": "madam",
            "lr": 0.03,
            "schedule": "cosine",
            "epochs": 40,
            "batch_size": 64,
            "p_scale": 3.0,
            "g_bound": 10.0,
            "beta": 0.999,
            "rounding": "nearest",
            "per_channel": False,
            "augment": None,
        },
        "baseline": [],
        "points": [],
        "layers": [],
        "equality": [],
    }
    for model in models:
        top = {"mlp": 0.978, "cnn": 0.986}[model]
        for seed in range(seeds):
            results["baseline"].append(
                {
                    "model": model,
                    "seed": seed,
                    "accuracy": accuracy(top),
                    "command": f"lnsdeploy train --data digits --model {model} --float --seed {seed} "
                    f"--out runs/{model}-float-{seed}",
                }
            )
        words = test * sum(macs // 64 for _, _, macs in LAYERS[model])
        for datapath, bits, gamma, accumulate, description, loss in configs:
            for seed in range(seeds):
                trained = accuracy(top - loss / 150)
                name = f"p{len(results['points']) + 1:04d}"
                saturated, flushed = (int(words * 10 ** rng.uniform(-5, -1.5)) for _ in range(2))
                results["points"].append(
                    {
                        "id": name,
                        "model": model,
                        "bits": bits,
                        "gamma": gamma,
                        "seed": seed,
                        "datapath": datapath,
                        "fingerprint": f"{random.Random(datapath).getrandbits(64):016x}",
                        "accumulate": accumulate,
                        "description": description,
                        "trained_accuracy": trained,
                        "accuracy": accuracy(trained - loss / 200),
                        "executor": "reference",
                        "macs": sum(macs for _, _, macs in LAYERS[model]),
                        "seconds": round(rng.uniform(0.4, 9.0), 3),
                        "words": words,
                        "saturated": saturated,
                        "flushed": flushed,
                        "command": f"lnsdeploy emulate runs/{model}-{bits}-{gamma}-{seed} "
                        f"--datapath {datapath} --executor reference",
                    }
                )
                for depth, (layer, op, macs) in enumerate(LAYERS[model] if layers else []):
                    count = test * max(macs // 64, 64)
                    exact = op == "MaxPool"
                    results["layers"].append(
                        {
                            "point": name,
                            "layer": layer,
                            "op": op,
                            "macs": macs,
                            "words": count,
                            "saturated": 0 if exact else int(count * 10 ** rng.uniform(-6, -2)),
                            "flushed": 0 if exact else int(count * 10 ** rng.uniform(-4, -0.5)),
                            "sqnr_db": None
                            if exact
                            else 6.02 * math.log2(gamma) + 14 - 2.2 * depth + rng.gauss(0, 0.7) - loss,
                            "max_error": 0.0 if exact else 2.0 ** (1 - math.log2(gamma)) * rng.uniform(0.5, 1),
                        }
                    )
        results["equality"].append(
            {
                "model": model,
                "executors": ["reference", "ort"],
                "words_compared": words * len(configs),
                "equal": True,
            }
        )
    return results


def hostile_results():
    """A small study in which every text tries to break out of its place."""
    results = make_results(models=("mlp",), seeds=2, configs=CONFIGS[:3])
    results["title"] = results["command"] = HOSTILE
    results["machine"]["cpu"] = HOSTILE
    results["data"]["name"] = results["data"]["source"] = HOSTILE
    results["recipe"][HOSTILE] = HOSTILE
    for record in results["baseline"] + results["points"] + results["equality"]:
        record["model"] = HOSTILE
    for record in results["baseline"] + results["points"]:
        record["command"] = HOSTILE
    for point in results["points"]:
        point["id"] += HOSTILE
        point["datapath"] += HOSTILE
        point["executor"] = point["description"] = HOSTILE
    for layer in results["layers"]:
        layer["point"] += HOSTILE
        layer["layer"] += HOSTILE
        layer["op"] = HOSTILE
    results["equality"][0]["executors"] = [HOSTILE, "ort"]
    return results


class Elements(HTMLParser):
    """Every element's name and attributes, and the text of the script elements by their id."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.scripts = {}
        self.script = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.script = dict(attrs).get("id", f"#{len(self.elements)}") if tag == "script" else None

    def handle_endtag(self, tag):
        self.script = None

    def handle_data(self, data):
        if self.script is not None:
            self.scripts[self.script] = self.scripts.get(self.script, "") + data


# its pictures are drawn once, in one process
pytestmark = pytest.mark.xdist_group("page")


@pytest.fixture(scope="module")
def results():
    return make_results()


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    return page.write_page(results, tmp_path_factory.mktemp("study") / "report")


@pytest.fixture(scope="module")
def html(written):
    return written["report.html"].read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return page.write_page(hostile_results(), tmp_path_factory.mktemp("hostile"))


# -------------------------------------------------------------------------------------------------- files


@pytest.mark.smoke
def test_all_files_are_written_and_nothing_else(written):
    pictures = [f"{name}.{kind}" for name in ("accuracy", "layers") for kind in ("png", "svg")]
    names = ["report.html", "results.json", "points.csv", "layers.csv", *pictures]
    assert list(written) == names
    folder = written["report.html"].parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert all(written[name] == folder / name for name in names)


def test_json_is_the_input(written, results):
    assert json.loads(written["results.json"].read_text(encoding="utf-8")) == results


@pytest.mark.parametrize("name", ["points", "layers"])
def test_csv_is_the_data(written, results, name):
    with written[f"{name}.csv"].open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == len(results[name]) > 0
    for row, record in zip(rows, results[name], strict=True):
        assert set(row) == set(record)
        for field, value in record.items():
            assert row[field] == ("" if value is None else str(value))
            if isinstance(value, float):
                assert float(row[field]) == value


def test_csv_survives_hostile_text(hostile):
    with hostile["points.csv"].open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["command"] for row in rows] == [HOSTILE] * 6


@pytest.mark.parametrize("name", ["accuracy.png", "layers.png"])
def test_pictures_show_something(written, hostile, name):
    from matplotlib.image import imread

    for paths in (written, hostile):
        picture = imread(paths[name])
        assert picture.shape[0] > 300
        assert picture.shape[1] > 600
        assert len(np.unique(picture[..., 0])) > 50


def test_same_input_gives_same_bytes(written, tmp_path):
    """Also in another process, where Python orders its sets of strings differently."""
    script = (
        "import json, sys; from pathlib import Path; from lnsdeploy.studies.page import write_page;"
        "write_page(json.loads(Path(sys.argv[1]).read_text(encoding='utf-8')), Path(sys.argv[2]))"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    root = Path(page.__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", script, str(written["results.json"]), str(tmp_path)]
    subprocess.run(command, check=True, env=environment)
    for name, path in written.items():
        assert (tmp_path / name).read_bytes() == path.read_bytes(), name


def test_refused_results_leave_no_files(results, tmp_path):
    broken = copy.deepcopy(results)
    broken["points"][0]["accuracy"] = 2.0
    with pytest.raises(BadValueError):
        page.write_page(broken, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("here")
    with pytest.raises(BadFileError, match="taken"):
        page.write_page(make_results(("mlp",), 1, CONFIGS[:1]), tmp_path / "taken")


# --------------------------------------------------------------------------------------------------- page


def test_every_point_is_in_the_page(html, results):
    scripts = Elements(html).scripts
    assert json.loads(scripts["results"]) == results
    view = json.loads(scripts["view"])
    drawn = [name for model in view["models"] for config in model["configs"] for name in config["points"]]
    assert sorted(drawn) == sorted(point["id"] for point in results["points"])
    for point in results["points"]:
        assert f'<th scope="row">{point["id"]}</th>' in html
        assert point["fingerprint"] in html


def test_nothing_is_loaded(html):
    parsed = Elements(html)
    for tag, attributes in parsed.elements:
        assert tag not in ("iframe", "object", "embed", "base", "img", "audio", "video", "source"), tag
        assert "src" not in attributes, (tag, attributes)
        assert "srcset" not in attributes
        if tag == "link":
            assert attributes == {"rel": "icon", "href": "data:,"}
        if tag == "a":
            assert attributes["href"].startswith("#")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if tag != "meta":
                assert "javascript:" not in (value or "")
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert sum("plotly.js v" in text for text in parsed.scripts.values()) == 1
    policy = next(a["content"] for t, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_policy_admits_just_the_scripts_of_the_page(html):
    parsed = Elements(html)
    code = [text for name, text in parsed.scripts.items() if name.startswith("#")]
    digests = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code}
    assert len(digests) == 3
    policy = next(a["content"] for t, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == digests


def test_hostile_text_stays_text(hostile):
    html = hostile["report.html"].read_text(encoding="utf-8")
    parsed = Elements(html)
    assert [tag for tag, _ in parsed.elements].count("script") == 5
    assert all(tag != "img" for tag, _ in parsed.elements)
    assert "<script>alert" not in html
    data = json.loads(parsed.scripts["results"])
    assert data["title"] == HOSTILE
    assert data["points"][0]["command"] == HOSTILE
    for name in ("results", "view"):
        assert "<" not in parsed.scripts[name]
    titles = re.findall(r"<title>(.*?)</title>", html, flags=re.S)
    assert titles
    assert "&lt;/script&gt;" in titles[0]


def test_headline_says_what_the_numbers_say(html):
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html[html.index("<main>") : html.index('id="width"')]))
    view = page.summarise(make_results())
    for model in view["models"]:
        narrow = model["configs"][model["narrowest"][0]]
        assert f"{narrow['bits']}-bit words stay within 0.5 pp of float32" in text
        assert f"{100 * model['float']['mean']:.2f} ± {100 * model['float']['sd']:.2f} %" in text
    assert "5 seeds" in text
    assert "One test image is 0.28 pp" in text


def test_page_without_optional_parts():
    """No baselines, layers, comparisons or training accuracies, and one seed: said, not hidden."""
    results = make_results(("mlp",), 1, CONFIGS[:2], layers=False)
    results["baseline"] = []
    results["equality"] = []
    results["recipe"] = {}
    for point in results["points"]:
        point["trained_accuracy"] = None
        point["words"] = point["saturated"] = point["flushed"] = 0
    html = page.render(results)
    for sentence in (
        "No float32 baseline of this model was measured.",
        "No layer errors were measured.",
        "No words were counted by layer.",
        "No executors were compared.",
        "No float32 nets were trained.",
        "not recorded",
        "(1 seed)",
    ):
        assert sentence in html
    assert "±0." not in html[html.index('class="facts"') : html.index("</table>")]


def test_equality_is_summed_up():
    results = make_results(("mlp",), 1, CONFIGS[:1])
    results["equality"] = [
        {**results["equality"][0], "datapath": name, "words_compared": 600} for name in ("gauss-8", "elma-8")
    ]
    html = page.render(results)
    assert re.search(r"All 2 comparisons are equal, over 1\s200 words", html)
    assert "<td>elma-8</td><td>reference, ort</td>" in html


def test_difference_between_executors_is_shown():
    results = make_results(("mlp",), 1, CONFIGS[:1])
    results["equality"][0]["equal"] = False
    html = page.render(results)
    assert "✗ different" in html
    assert "Not all of them are equal" in html
    results["equality"][0].update(equal=True, words_compared=0)
    html = page.render(results)
    assert "nothing compared" in html
    assert "✓ equal" not in html
    assert "comparisons are equal" not in html


# --------------------------------------------------------------------------------------------- statistics


def _small(accuracies, floats=(0.98, 0.96), bits=(8, 4)):
    """One model, one datapath a width, with these accuracies by width and seed."""
    results = make_results(("mlp",), len(floats), [(f"default-{b}:2", b, 2, "linear", "", 0) for b in bits])
    for run, value in zip(results["baseline"], floats, strict=True):
        run["accuracy"] = value
    flat = [value for row in accuracies for value in row]
    for point, value in zip(results["points"], flat, strict=True):
        point["accuracy"] = value
    return results


def test_statistics_by_hand():
    results = _small([(0.99, 0.97), (0.95, 0.93)])
    first, second = results["points"][:2]
    first.update(words=100, saturated=3, flushed=0)
    second.update(words=300, saturated=1, flushed=8)
    model = page.summarise(results)["models"][0]
    assert model["float"] == {
        "n": 2,
        "mean": pytest.approx(0.97),
        "sd": pytest.approx(math.sqrt(2) / 100),
        "min": 0.96,
        "max": 0.98,
    }
    wide, narrow = model["configs"]
    assert (wide["bits"], narrow["bits"]) == (8, 4)
    assert wide["accuracy"]["mean"] == pytest.approx(0.98)
    assert wide["delta"] == pytest.approx(1.0)
    assert narrow["delta"] == pytest.approx(-3.0)
    assert (wide["saturated"], wide["flushed"]) == (pytest.approx(0.01), pytest.approx(0.02))
    assert model["best"] == 0
    assert model["narrowest"] == [0, 0]


@pytest.mark.parametrize(
    ("mean", "expected"),
    [(0.966, [1, 1]), (0.965, [1, 1]), (0.9649, [0, 1]), (0.955, [0, 1]), (0.9549, [0, 0])],
)
def test_narrowest_width_at_the_margins(mean, expected):
    """The margins, 0.5 and 1.5 points below 97 %, belong to the range."""
    results = _small([(0.97, 0.97), (mean + 0.003, mean - 0.003)])
    assert page.summarise(results)["models"][0]["narrowest"] == expected


def test_nothing_within_the_margins():
    results = _small([(0.5, 0.5), (0.4, 0.4)])
    assert page.summarise(results)["models"][0]["narrowest"] == [None, None]
    assert "No configuration tried stays within 1.5" in page.render(results)


def test_executors_do_not_count_as_seeds():
    results = _small([(0.99, 0.97), (0.95, 0.93)])
    for point in list(results["points"]):
        results["points"].append({**point, "id": point["id"] + "-ort", "executor": "ort"})
    spread = page.summarise(results)["models"][0]["configs"][0]["accuracy"]
    assert spread["n"] == 2
    assert spread["sd"] == pytest.approx(math.sqrt(2) / 100)


def test_lines_join_the_widths_of_one_datapath(results):
    assert page.summarise(results)["series"] == [
        "default, γ by width",
        "gauss, γ = 8",
        "lns-madam-lut1, γ = 8",
        "lognet, γ by width",
        "max-plus, γ = 8",
        "mitchell, γ = 8",
    ]


def test_lines_part_where_gamma_varies_at_one_width():
    configs = [(f"default-{b}:{g}", b, g, "linear", "", 0.1) for b, g in ((8, 8), (8, 4), (6, 4))]
    assert page.summarise(make_results(("mlp",), 1, configs))["series"] == ["default, γ = 8", "default, γ = 4"]


def test_same_name_with_other_bits_is_kept_apart():
    results = make_results(("mlp",), 1, [CONFIGS[0]])
    results["points"].append({**results["points"][0], "id": "other", "fingerprint": "0123456789abcdef"})
    view = page.summarise(results)
    assert len(view["series"]) == 2
    assert len(view["models"][0]["configs"]) == 2
    assert any("012345" in config["label"] for config in view["models"][0]["configs"])


def test_layers_are_averaged_over_seeds():
    results = make_results(("cnn",), 2, CONFIGS[:1])
    first, second = results["points"]
    layers = {(layer["point"], layer["layer"]): layer for layer in results["layers"]}
    layers[first["id"], "features.0"].update(sqnr_db=20.0, max_error=0.5, words=64, saturated=1, flushed=0)
    layers[second["id"], "features.0"].update(sqnr_db=30.0, max_error=0.25, words=64, saturated=0, flushed=64)
    layers[first["id"], "features.3"]["sqnr_db"] = float("nan")
    layers[second["id"], "features.3"].update(sqnr_db=None, max_error=None)
    model = page.summarise(results)["models"][0]
    cells = dict(zip((layer["name"] for layer in model["layers"]), model["cells"][0], strict=True))
    assert [layer["name"] for layer in model["layers"]] == [name for name, _, _ in LAYERS["cnn"]]
    assert cells["features.0"]["sqnr_db"] == 25.0
    assert cells["features.0"]["max_error"] == 0.5
    assert cells["features.0"]["saturated"] == 1 / 128
    assert cells["features.0"]["flushed"] == 0.5
    assert cells["features.3"]["sqnr_db"] is None
    assert not cells["features.3"]["exact"]
    assert cells["features.4"]["exact"]


def test_infinite_ratio_is_no_error():
    results = make_results(("mlp",), 1, CONFIGS[:1])
    results["layers"][0].update(sqnr_db=float("inf"), max_error=None)
    cell = page.summarise(results)["models"][0]["cells"][0][0]
    assert cell["exact"]
    assert cell["sqnr_db"] is None
    assert "Infinity" not in page.render(results).split("plotly.js v")[0]


# ---------------------------------------------------------------------------------------------- validation


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(results):
        for step in path:
            results = results[step]
        results[last] = value

    return change


def _drop(*path):
    def change(results):
        for step in path[:-1]:
            results = results[step]
        del results[path[-1]]

    return change


def _repeat(name):
    def change(results):
        results[name].append(copy.deepcopy(results[name][0]))

    return change


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_drop("title"), "title is missing"),
        (_set("title", ""), "title must be text"),
        (_set("seconds", float("nan")), "seconds must be"),
        (_set("seconds", -1.0), "seconds must be"),
        (_set("machine", "a computer"), "machine must be a mapping"),
        (_set("recipe", "lr", {"nested": 1}), "recipe['lr'] must be a single value"),
        (_drop("data", "test"), "data.test is missing"),
        (_set("data", "test", 0), "data.test must be"),
        (_set("points", []), "points is empty"),
        (_set("points", None), "points must be a list"),
        (_set("points", 1, 7), "points[1] must be a mapping"),
        (_drop("points", 0, "fingerprint"), "points[0].fingerprint is missing"),
        (_set("points", 0, "fingerprint", "xyz"), "points[0].fingerprint must be 16"),
        (_set("points", 1, "accuracy", 97.5), "points[1].accuracy must be a number from 0 to 1"),
        (_set("points", 1, "accuracy", float("nan")), "points[1].accuracy must be"),
        (_set("points", 1, "accuracy", None), "points[1].accuracy must be"),
        (_set("points", 1, "accuracy", True), "points[1].accuracy must be"),
        (_set("points", 0, "bits", 1), "points[0].bits must be an integer from 2 to 32"),
        (_set("points", 0, "bits", 8.0), "points[0].bits must be"),
        (_set("points", 0, "gamma", 0), "points[0].gamma must be"),
        (_set("points", 0, "seed", "0"), "points[0].seed must be"),
        (_set("points", 0, "accumulate", "float"), "points[0].accumulate must be 'linear' or 'log'"),
        (_set("points", 0, "saturated", 10**12), "points[0].saturated must be at most"),
        (_set("points", 0, "flushed", -1), "points[0].flushed must be"),
        (_set("points", 0, "command", None), "points[0].command must be text"),
        (_repeat("points"), "points[4] repeats points[0]"),
        (_repeat("baseline"), "baseline[2] repeats baseline[0]"),
        (_repeat("layers"), "repeats layers[0]"),
        (_set("baseline", 0, "accuracy", 1.5), "baseline[0].accuracy must be"),
        (_set("layers", 2, "point", "p9999"), "layers[2].point must be the id of one of the points"),
        (_set("layers", 0, "max_error", -1.0), "layers[0].max_error must be"),
        (_set("layers", 0, "sqnr_db", "loud"), "layers[0].sqnr_db must be"),
        (_drop("equality"), "equality is missing"),
        (_set("equality", 0, "equal", 1), "equality[0].equal must be True or False"),
        (_set("equality", 0, "executors", ["reference"]), "equality[0].executors must be a list of at least"),
        (_set("extra", [float("inf")]), "not JSON"),
    ],
)
def test_bad_field_is_named(change, field):
    results = make_results(("mlp",), 2, CONFIGS[:2])
    page.validate(results)
    change(results)
    with pytest.raises(BadValueError, match=re.escape(field)) as caught:
        page.validate(results)
    assert isinstance(caught.value, LNSError)
    assert len(str(caught.value)) < 400
    with pytest.raises(BadValueError):
        page.render(results)


@pytest.mark.parametrize("value", [None, 3, "text", [1]])
def test_results_that_are_no_mapping(value):
    with pytest.raises(BadValueError, match="mapping"):
        page.validate(value)


def test_numpy_values_paths_and_surrogates_are_taken(tmp_path):
    results = make_results(("mlp",), 1, CONFIGS[:1])
    results["points"][0]["accuracy"] = np.float64(0.5)
    results["points"][0]["words"] = np.int64(results["points"][0]["words"])
    results["points"][0]["command"] = "lnsdeploy emulate bad\udcffname"
    results["recipe"].update(out=tmp_path / "run", loss=float("nan"))
    paths = page.write_page(results, tmp_path / "out")
    data = json.loads(paths["results.json"].read_text(encoding="utf-8"))
    assert data["points"][0]["accuracy"] == 0.5
    assert data["points"][0]["command"] == "lnsdeploy emulate bad?name"
    assert data["recipe"]["loss"] is None
    assert data["recipe"]["out"] == str(tmp_path / "run")


# ------------------------------------------------------------------------------------------------- browser


@needs_chromium
def test_browser_shows_hostile_text_as_text(hostile, tmp_path):
    document, console = browse(hostile["report.html"], tmp_path)
    assert console == []
    assert document.count('class="main-svg"') >= 5
    assert "<img" not in document.split('<script type="application/json"')[0]


EXERCISE = """
const got = {};
got.charts = Array.from(document.querySelectorAll(".chart")).map((chart) => [
  chart.id, chart.querySelectorAll("svg.main-svg .point, svg.main-svg .textpoint").length,
]);
got.heads = document.querySelectorAll("th .sort").length;
got.legend = document.querySelectorAll("#width-legend [aria-pressed=true]").length;
const click = (element) => element.click();
const table = document.getElementById("points-table");
const visible = () => Array.from(table.tBodies[0].rows).filter((row) => !row.hidden);
const choose = (element, value) => { element.value = value; element.dispatchEvent(new Event("change")); };
const lines = () => document.getElementById("width-0").data.length;
const sorter = Array.from(document.querySelectorAll(".sort")).find((b) => b.textContent === "Emulated");
click(sorter);
got.lowest = table.tBodies[0].rows[0].cells[0].textContent;
click(sorter);
got.highest = table.tBodies[0].rows[0].cells[0].textContent;
got.sorted = sorter.parentElement.getAttribute("aria-sort");
choose(document.querySelector("[data-filter=bits]"), "4");
got.fourBits = visible().length;
document.getElementById("filter-text").value = "LOGNET";
document.getElementById("filter-text").dispatchEvent(new Event("input"));
got.lognet = visible().length;
got.count = document.getElementById("filter-count").textContent;
click(document.getElementById("filter-clear"));
got.cleared = visible().length;
got.linesBefore = lines();
const first = () => document.querySelector("#width-legend button");
click(first());
got.pressed = first().getAttribute("aria-pressed");
got.linesAfter = lines();
got.near = document.getElementById("width-0").layout.yaxis.range[0];
choose(document.getElementById("width-axis"), "all");
got.all = document.getElementById("width-0").layout.yaxis.range[0];
click(document.getElementById("theme"));
click(document.getElementById("theme"));
got.theme = document.documentElement.dataset.theme;
choose(document.getElementById("datapaths-bits"), "4");
got.rows = document.getElementById("datapaths-0").data[0].x.length;
const outcome = document.createElement("pre");
outcome.id = "outcome";
outcome.textContent = JSON.stringify(got);
document.body.append(outcome);
"""


@needs_chromium
def test_browser_draws_the_charts_and_obeys_the_controls(html, results, tmp_path):
    """No complaint under the page's own policy (with the test's script admitted), every chart drawn; sorting,
    filtering, hiding lines, the axis and the theme do what they say."""
    digest = base64.b64encode(hashlib.sha256(EXERCISE.encode()).digest()).decode()
    assert html.count("script-src ") == 1
    text = html.replace("script-src ", f"script-src 'sha256-{digest}' ")
    path = tmp_path / "exercise.html"
    path.write_text(text.replace("</body>", f"<script>{EXERCISE}</script></body>"), encoding="utf-8")
    document, console = browse(path, tmp_path)
    assert console == []
    got = json.loads(re.search(r'<pre id="outcome">(.*?)</pre>', document, flags=re.S)[1])
    kinds = ("width", "datapaths", "layers", "saturated", "flushed")
    assert [name for name, _ in got["charts"]] == [f"{kind}-{number}" for kind in kinds for number in range(2)]
    assert all(marks >= 12 for _, marks in got["charts"]), got["charts"]
    assert got["heads"] == 13
    assert got["legend"] == len(page.summarise(results)["series"])
    accuracy = {point["id"]: point["accuracy"] for point in results["points"]}
    assert accuracy[got["lowest"]] == min(accuracy.values())
    assert accuracy[got["highest"]] == max(accuracy.values())
    assert got["sorted"] == "descending"
    assert got["fourBits"] == 20
    assert got["lognet"] == 10
    assert got["count"] == "10 of 120"
    assert got["cleared"] == 120
    assert got["pressed"] == "false"
    assert got["linesAfter"] < got["linesBefore"]
    assert got["near"] > 90 > 60 > got["all"]
    assert got["theme"] == "dark"
    assert got["rows"] == 2
