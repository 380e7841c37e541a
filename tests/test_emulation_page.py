"""The page of an emulation: complete, self-contained, and safe whatever names models have."""

from __future__ import annotations

import csv
import html
import json
import re
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("jinja2", reason="the report extra is not installed")

import lnsdeploy
from lnsdeploy.emulator.records import seen_from_dict
from lnsdeploy.errors import BadValueError
from lnsdeploy.studies.emulation import COLUMNS, render_emulation, write_emulation_page

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&amp;'


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    with torch.no_grad(), lnsdeploy.emulate("lns-madam-8", executor="reference") as seen:
        model(torch.randn(2, 3, 8, 8))
        torch.linalg.inv(torch.eye(2))
    return seen.to_dict()


def test_files(data: dict[str, Any], tmp_path: Any) -> None:
    paths = write_emulation_page(data, tmp_path / "out", title="A net", facts={"model": "mine", "command": "do it"})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(paths)
    with paths["emulation.csv"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["name"] for row in rows] == ["0", "3"]
    assert [int(row["macs"]) for row in rows] == [2 * 36 * 4 * 27, 2 * 144 * 5]
    assert rows[0]["activation"] == rows[0]["weight"] == "8:8"
    again = json.loads(paths["emulation.json"].read_text(encoding="utf-8"))
    assert again["facts"] == {"model": "mine", "command": "do it"}
    assert seen_from_dict(again).to_dict()["layers"] == data["layers"]
    text = paths["emulation.html"].read_text(encoding="utf-8")
    for part in ("A net", "mine", "do it", f"{data['macs']:,}".replace(",", "\N{NARROW NO-BREAK SPACE}"), "linalg_inv"):
        assert part in text, part
    assert text.count("<svg") >= 2 * 4
    assert text == render_emulation(data, title="A net", facts={"model": "mine", "command": "do it"})


def test_nothing_is_fetched(data: dict[str, Any]) -> None:
    text = render_emulation(data)
    assert not re.search(r"(src|href)=\"(https?:)?//", text)
    assert "default-src 'none'" in html.unescape(text)


def test_names_are_text(data: dict[str, Any]) -> None:
    hostile = json.loads(json.dumps(data))
    for layer in hostile["layers"]:
        for field in ("name", "op", "module", "datapath", "kernel"):
            layer[field] = HOSTILE + layer[field]
    hostile["not_emulated"] = {HOSTILE: 1}
    hostile["left_float"] = {HOSTILE: {"calls": 1, "macs": 3}}
    text = render_emulation(hostile, title=HOSTILE, facts={HOSTILE: HOSTILE})
    assert "<img" not in text
    assert text.count("<script>") == 1


def test_an_emulation_that_saw_nothing() -> None:
    with lnsdeploy.emulate("lns-madam-8") as seen:
        pass
    assert "0 products" in render_emulation(seen.to_dict())


@pytest.mark.parametrize("change", [{"layers": 3}, {"layers": [{}]}, {"not_emulated": None}])
def test_other_input_is_refused(data: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(BadValueError, match="not the counters of an emulation"):
        render_emulation(data | change)
