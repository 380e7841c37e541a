"""The page of a study: what it refuses, claims and writes, and that a browser shows it and obeys its controls."""

from __future__ import annotations

import base64
import copy
import csv
import hashlib
import json
import re

import pytest

pytest.importorskip("jinja2", reason="the report extra is not installed")
pytest.importorskip("plotly", reason="the report extra is not installed")
pytest.importorskip("matplotlib", reason="the report extra is not installed")

from lnsdeploy.errors import BadFileError, BadValueError
from lnsdeploy.studies import study_page
from tests.browser import browse, needs_chromium
from tests.studies_made import make_study

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&amp; "q" \'s\' $x_1^$ %{y} \u2028'
CHARTS = ("front", "bits", "breakdown", "layers", "delta", "histograms")


def hostile_study():
    """A study in which every text tries to break out of its place."""
    results = make_study(nets=("mlp",), widths=(8,))
    results["study"].update(name=HOSTILE, command=HOSTILE, toml=HOSTILE, nets=[HOSTILE], fingerprint=HOSTILE)
    results["study"]["versions"] = {HOSTILE: HOSTILE}
    results["study"][HOSTILE] = HOSTILE
    results["constraints"] = [HOSTILE, {HOSTILE: HOSTILE}]
    for point in results["points"]:
        for name in ("label", "net", "datapath", "datapath_toml", "fingerprint", "command", "reason"):
            point[name] = HOSTILE
        point["parameters"][HOSTILE] = f"{HOSTILE}{point['id'] % 3}"
        point["values"][HOSTILE] = float(point["id"] + 1)
        for layer in point["layers"]:
            layer["name"] = HOSTILE
    results["delta_tables"][0]["label"] = results["histograms"][0]["layer"] = HOSTILE
    return results


# its pictures are drawn once, in one process
pytestmark = pytest.mark.xdist_group("study page")


@pytest.fixture(scope="module")
def results():
    return make_study()


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    return study_page.write_page(results, tmp_path_factory.mktemp("study") / "page")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return study_page.write_page(hostile_study(), tmp_path_factory.mktemp("hostile"))


# -------------------------------------------------------------------------------------------------- files


def test_every_file_is_written_and_nothing_else(written):
    tables = ["points.csv", "layers.csv", "delta_tables.csv", "histograms.csv"]
    pictures = [f"{name}.{kind}" for name in CHARTS for kind in ("png", "svg")]
    assert list(written) == ["study.html", "study.json", *tables, *pictures]
    folder = written["study.html"].parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(written)
    for name in CHARTS:
        assert written[f"{name}.png"].read_bytes().startswith(b"\x89PNG")
        assert b"</svg>" in written[f"{name}.svg"].read_bytes()[-20:]


def test_json_is_the_input(written, results):
    assert json.loads(written["study.json"].read_text(encoding="utf-8")) == results


def test_csv_is_the_data(written, results):
    def rows(name):
        with written[name].open(newline="", encoding="utf-8") as handle:
            return list(csv.DictReader(handle))

    points = rows("points.csv")
    assert len(points) == len(results["points"])
    for row, point in zip(points, results["points"], strict=True):
        assert row["id"] == str(point["id"])
        accuracy = point["values"].get("accuracy")
        assert row["accuracy"] == ("" if accuracy is None else str(accuracy))
        assert row["parameter bits"] == str(point["parameters"].get("bits", ""))
        low = point["ranges"].get("accuracy", [None])[0]
        assert row["accuracy least"] == ("" if low is None else str(low))
        assert row["transistors of tables"] == str(point["breakdown"].get("tables", ""))
    assert len(rows("layers.csv")) == sum(len(point["layers"]) for point in results["points"])
    assert len(rows("delta_tables.csv")) == sum(len(table["d"]) for table in results["delta_tables"])
    assert sum(int(row["count"]) for row in rows("histograms.csv")) == sum(
        sum(record["counts"]) for record in results["histograms"]
    )


def test_same_input_gives_same_bytes(tmp_path):
    small = make_study(nets=("mlp",), widths=(8,))
    first, second = (study_page.write_page(small, tmp_path / name) for name in ("a", "b"))
    for name in first:
        assert first[name].read_bytes() == second[name].read_bytes(), name


def test_a_study_without_results_is_a_page(tmp_path):
    """The first trial of a new study may be asked for its page; so may one in which all failed."""
    empty = {"study": {"name": "new", "finished": False}}
    html = study_page.write_page(empty, tmp_path / "empty")["study.html"].read_text(encoding="utf-8")
    assert "not finished" in html
    failed = {"study": {"name": "x"}, "points": [{"id": 0, "kind": "lns", "state": "failed", "reason": "why"}]}
    html = study_page.write_page(failed, tmp_path / "failed")["study.html"].read_text(encoding="utf-8")
    assert "<small>why</small>" in html


def test_not_a_number_becomes_none():
    results = make_study(nets=("mlp",))
    results["points"][7]["values"]["sqnr_db"] = float("inf")
    results["study"]["spread"] = float("nan")
    data = study_page.normalise(results)
    assert data["points"][7]["values"]["sqnr_db"] is None
    assert data["study"]["spread"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["study"].update(name=" "), "study.name must be text that is not empty"),
        (lambda r: r["points"][1].update(id=0), "id 0 is there twice"),
        (lambda r: r["points"][2].update(kind="int8"), r"points\[2\].kind must be one of lns, float32, int, fp8"),
        (lambda r: r["points"][2].update(state="done"), r"points\[2\].state must be one of"),
        (lambda r: r["points"][3]["values"].update(accuracy=97.5), "accuracy must be a share from 0 to 1, not 97.5"),
        (lambda r: r["points"][3]["ranges"].update(accuracy=[0.9, 0.8]), "a least and a largest value"),
        (lambda r: r["points"][3]["values"].update(depth="9"), "depth must be a number, or None"),
        (lambda r: r["delta_tables"][0]["ulp"].pop(), r"delta_tables\[0\]: d, .* same length"),
        (lambda r: r["histograms"][0].update(kind="w"), "one of weights, activations"),
        (lambda r: r["objectives"][0].update(direction="up"), "one of maximize, minimize"),
        (lambda r: r.update(points=3), "points must be a list"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_written(results, tmp_path, change, message):
    broken = copy.deepcopy(results)
    change(broken)
    with pytest.raises(BadValueError, match=message):
        study_page.write_page(broken, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("here")
    with pytest.raises(BadFileError, match="taken"):
        study_page.write_page({"study": {"name": "x"}}, tmp_path / "taken")


# ------------------------------------------------------------------------------------------------- claims


def point(number, kind, accuracy, transistors, **fields):
    values = {"accuracy": accuracy, "transistors": transistors}
    return {
        "id": number,
        "kind": kind,
        "label": f"p{number}",
        "state": "complete",
        "net": "n",
        "values": values,
    } | fields


def against(*points):
    view = study_page.summarise(study_page.normalise({"study": {"name": "x"}, "points": list(points)}))
    return view["nets"][0]


def test_front_is_what_nothing_beats(results):
    """Against the definition, over every pair of points."""
    points = [p for p in study_page.normalise(results)["points"] if p["net"] == "cnn" and p["state"] == "complete"]
    directions = {"accuracy": "maximize", "transistors": "minimize", "depth": "minimize"}
    for x, y in (("transistors", "accuracy"), ("accuracy", "transistors"), ("depth", "transistors")):
        sign = {name: -1 if directions[name] == "maximize" else 1 for name in (x, y)}

        def pair(p, sign=sign):
            return tuple(p["values"][name] * way for name, way in sign.items())

        costs = {pair(p) for p in points}
        expected = {c for c in costs if not any(d != c and d[0] <= c[0] and d[1] <= c[1] for d in costs)}
        ids = study_page.front(points, x, y, directions)
        by_id = {p["id"]: p for p in points}
        assert {pair(by_id[i]) for i in ids} == expected
        assert len(ids) == len(expected)
        assert [by_id[i]["values"][x] for i in ids] == sorted(by_id[i]["values"][x] for i in ids)


@pytest.mark.parametrize(
    ("lns", "verdict", "cheapest", "best"),
    [
        ([(0.95, 100)], "wins", 1, 1),
        ([(0.95, 100), (0.97, 150)], "wins", 1, 2),
        ([(0.95, 800)], "loses", 1, None),
        ([(0.80, 100)], "loses", None, 1),
        ([(0.95, 400)], "equal", 1, 1),
        ([(0.945, 100)], "unclear", None, 1),
    ],
)
def test_who_wins_is_said_plainly(lns, verdict, cheapest, best):
    net = against(
        point(0, "int", 0.95, 400, ranges={"accuracy": [0.94, 0.96]}),
        *(point(i, "lns", *values) for i, values in enumerate(lns, 1)),
    )
    (row,) = net["against"]
    assert (row["verdict"], row["cheapest"], row["best"]) == (verdict, cheapest, best)


def test_infeasible_and_failed_points_win_nothing():
    net = against(
        point(0, "float32", 0.95, 4000),
        point(1, "int", 0.95, 400),
        point(2, "lns", 0.99, 10, state="infeasible"),
        point(3, "lns", 0.99, 10, state="pruned"),
    )
    assert net["holds"] is None
    assert net["against"][0]["verdict"] == "loses"


def test_the_cheapest_within_half_a_point_of_float32_holds():
    net = against(
        point(0, "float32", 0.95, 4000),
        point(1, "lns", 0.945, 100),
        point(2, "lns", 0.95, 200),
        point(3, "lns", 0.9449, 50),
    )
    assert net["holds"] == 1


@pytest.mark.parametrize(
    ("format_", "label", "parameters", "bits"),
    [
        ("8:8", "x", {}, 8),
        ("12:64", "x", {}, 12),
        ("", "int4", {}, 4),
        ("fp8 e4m3", "x", {}, 8),
        ("float32", "x", {}, 32),
        ("mixed", "mixed", {"bits": 5}, 5),
        ("mixed", "mixed", {}, None),
    ],
)
def test_word_width_of_a_point(format_, label, parameters, bits):
    assert study_page.bits_of({"format": format_, "label": label, "parameters": parameters}) == bits


# ------------------------------------------------------------------------------------------------- browser


def _data(html, name):
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', html, flags=re.S)[1])


def test_hostile_text_stays_text(hostile):
    html = hostile["study.html"].read_text(encoding="utf-8")
    assert "<script>alert" not in html
    before = html.split('<script type="application/json"')[0]
    assert "<img" not in before
    assert _data(html, "results")["points"][0]["command"] == HOSTILE
    for name in ("results", "view"):
        assert "<" not in re.search(rf'id="{name}">(.*?)</script>', html, flags=re.S)[1]


@needs_chromium
def test_browser_shows_hostile_text_as_text(hostile, tmp_path):
    document, console = browse(hostile["study.html"], tmp_path)
    assert console == []
    assert document.count('class="main-svg"') >= 5
    assert "<img" not in document.split('<script type="application/json"')[0]


EXERCISE = """
const got = {};
const byId = (id) => document.getElementById(id);
const all = (selector) => Array.from(document.querySelectorAll(selector));
const choose = (element, value) => { element.value = value; element.dispatchEvent(new Event("change")); };
const withIds = (id) => byId(id).data.filter((t) => t.customdata);
const marks = (id) => withIds(id).flatMap((t) => t.customdata.map((c, i) => [c, t.x[i], t.y[i]]));
const body = byId("points-table").tBodies[0];
const visible = () => Array.from(body.rows).filter((row) => !row.hidden);
got.marks = [marks("front-0"), marks("front-1")];
got.charts = all(".chart").map((chart) => [chart.id, chart.querySelectorAll("svg.main-svg").length]);
choose(byId("front-x"), "depth");
got.depth = marks("front-1");
choose(byId("front-x"), "transistors");
got.legend = all("#front-legend button").map((b) => b.textContent);
all("#front-legend button")[0].click();
got.hiddenMarks = marks("front-0").length;
got.pressed = all("#front-legend button")[0].getAttribute("aria-pressed");
all("#front-legend button")[0].click();
// sorting
const sorter = all(".sort").find((b) => b.textContent === "Accuracy");
sorter.click();
got.lowest = Number(body.rows[0].dataset.id);
sorter.click();
got.highest = Number(body.rows[0].dataset.id);
got.sorted = sorter.parentElement.getAttribute("aria-sort");
got.last = body.rows[body.rows.length - 1].dataset.state;
// selection: by the box, by the chart, by the button
const box = body.querySelector("tr[data-id='9'] input");
box.focus();
got.focused = document.activeElement === box;
box.click();
got.one = [byId("selection-count").textContent, all(".card").length, all(".card code").map((c) => c.textContent)];
got.costRows = byId("cost-0").layout.yaxis.ticktext;
byId("front-0").emit("plotly_click", { points: [{ customdata: 11 }] });
got.two = all("tr[data-selected]").map((row) => Number(row.dataset.id)).sort((a, b) => a - b);
byId("only-selected").click();
got.onlySelected = visible().length;
got.count = byId("filter-count").textContent;
byId("filter-clear").click();
got.cleared = visible().length;
all(".card .drop")[0].click();
got.dropped = all("tr[data-selected]").length;
byId("select-front").click();
got.front = all("tr[data-selected]").map((row) => Number(row.dataset.id)).sort((a, b) => a - b);
all(".select-none")[0].click();
got.none = [all("tr[data-selected]").length, all(".card").length, byId("selected-none").hidden];
choose(document.querySelector("[data-filter=state]"), "failed");
got.failed = visible().map((row) => row.textContent.includes("2^9 entries"));
byId("filter-clear").click();
// every control is reached by Tab: nothing interactive is taken out of the order
got.unreachable = all("button, select, input, summary, a[href], .copy").filter((e) => e.tabIndex < 0).length;
const named = (e) => e.textContent.trim() || e.getAttribute("aria-label") || e.closest("label");
got.unnamed = all("button, select, input").filter((e) => !named(e)).length;
choose(byId("delta-table"), "1");
got.delta = byId("delta-errors").data.map((t) => Array.from(t.y));
choose(byId("codes-layer"), "2");
got.codes = Array.from(byId("codes-chart").data[0].y);
got.heat = byId("layers-1").data[0].z.length;
got.bits = byId("bits-0").data.filter((t) => t.mode === "lines+markers").map((t) => Array.from(t.y));
byId("theme").click(); byId("theme").click();
got.theme = document.documentElement.dataset.theme;
got.resources = performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !n.startsWith("data:"));
const outcome = document.createElement("pre");
outcome.id = "outcome";
outcome.textContent = JSON.stringify(got);
document.body.append(outcome);
"""


@needs_chromium
def test_browser_draws_the_points_and_obeys_the_controls(written, results, tmp_path):
    html = written["study.html"].read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(EXERCISE.encode()).digest()).decode()
    assert html.count("script-src ") == 1
    text = html.replace("script-src ", f"script-src 'sha256-{digest}' ")
    path = tmp_path / "exercise.html"
    path.write_text(text.replace("</body>", f"<script>{EXERCISE}</script></body>"), encoding="utf-8")
    document, console = browse(path, tmp_path)
    assert console == []
    found = re.search(r'<pre id="outcome">(.*?)</pre>', document, flags=re.S)[1]
    got = json.loads(found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    points = {p["id"]: p for p in results["points"]}
    shown = [p for p in results["points"] if p["state"] in ("complete", "infeasible")]

    for net, marks in zip(("mlp", "cnn"), got["marks"], strict=True):
        expected = [
            [p["id"], p["values"]["transistors"], pytest.approx(100 * p["values"]["accuracy"])]
            for p in shown
            if p["net"] == net
        ]
        assert sorted(marks) == expected
    assert [[i, x] for i, x, _ in sorted(got["depth"])] == [
        [p["id"], p["values"]["depth"]] for p in shown if p["net"] == "cnn"
    ]
    assert all(drawn >= 1 for _, drawn in got["charts"]), got["charts"]
    assert got["legend"] == ["accumulate = linear", "accumulate = log"]
    linear = [p for p in shown if p["net"] == "mlp" and p["parameters"].get("accumulate") == "linear"]
    assert got["hiddenMarks"] == len(got["marks"][0]) - len(linear)
    assert got["pressed"] == "false"

    accuracies = [p["values"]["accuracy"] for p in results["points"] if "accuracy" in p["values"]]
    assert points[got["lowest"]]["values"]["accuracy"] == min(accuracies)
    assert points[got["highest"]]["values"]["accuracy"] == max(accuracies)
    assert got["sorted"] == "descending"
    assert got["last"] == "failed"  # without an accuracy: at the end, whichever the direction

    assert got["focused"]
    assert got["one"] == ["1 selected", 1, [points[9]["command"], points[9]["datapath_toml"]]]
    assert len(got["costRows"]) == 1
    assert got["two"] == [9, 11]
    assert got["onlySelected"] == 2
    assert got["count"] == f"2 of {len(points)}"
    assert got["cleared"] == len(points)
    assert got["dropped"] == 1
    assert got["front"] == [p["id"] for p in results["points"] if p["pareto"]]
    assert got["none"] == [0, 0, False]
    assert got["failed"] == [True, True]
    assert got["unreachable"] == 0
    assert got["unnamed"] == 0

    assert got["delta"] == [pytest.approx(results["delta_tables"][1]["ulp"])]
    assert got["codes"] == results["histograms"][2]["counts"]
    assert got["heat"] > 5
    best = max(p["values"]["accuracy"] for p in linear if p["parameters"]["bits"] == 8)
    assert got["bits"][0][-1] == pytest.approx(100 * best)
    assert got["theme"] == "dark"
    assert got["resources"] == []
