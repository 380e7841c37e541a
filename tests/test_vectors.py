"""The golden vectors: made by the oracle, and met by the reference (spec 2 to 7)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from lnsdeploy import tables
from lnsdeploy.datapath import Datapath, accumulator_from_dict, log_accumulator_from_dict
from lnsdeploy.emulator import reference
from lnsdeploy.emulator.plan import AddPlan, DotPlan, PoolPlan, RescalePlan, Window
from lnsdeploy.formats import LNSFormat, decode, encode, random_bytes
from tests.vectors import make

Array = np.ndarray[Any, Any]


def _load(name: str) -> Any:
    return json.loads((make.FOLDER / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    return make.build()


FILES = sorted(path.name for path in make.FOLDER.glob("*.json"))


def test_no_file_is_forgotten(built: dict[str, Any]) -> None:
    assert sorted(built) == FILES


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_what_the_oracle_makes(name: str, built: dict[str, Any]) -> None:
    """Run `python -m tests.vectors.make` where this fails on purpose."""
    assert (make.FOLDER / name).read_text(encoding="utf-8") == make.text_of(built[name])


def test_encode() -> None:
    """spec 2.1 to 2.4."""
    for case in _load("encode.json"):
        x = np.array(case["float32"], dtype=np.uint32).view(np.float32)
        options = {key: case[key] for key in ("rounding", "underflow", "seed", "stream")}
        assert encode(x, LNSFormat.parse(case["format"]), case["offset"], **options).tolist() == case["words"]


def test_decode() -> None:
    """spec 2.5."""
    for case in _load("decode.json"):
        fmt = LNSFormat.parse(case["format"])
        words = np.array(case["words"], dtype=fmt.dtype)
        for name, bits in (("float32", np.uint32), ("float64", np.uint64)):
            assert decode(words, fmt, case["offset"], name).view(bits).tolist() == case[name]


def test_random_bytes() -> None:
    """spec 2.3."""
    for case in _load("random.json"):
        got = random_bytes(case["seed"], case["stream"], len(case["bytes"]), case["start"])
        assert got.tolist() == case["bytes"]


def test_tables() -> None:
    """spec 4.1, 4.6."""
    content = _load("tables.json")
    for case in content["constants"]:
        assert tables.remainder_constants(case["table_bits"], case["constant_bits"]).tolist() == case["entries"]
    for case in content["encoder"]:
        assert tables.log_table(case["gamma"], case["encoder_bits"]).tolist() == case["entries"]


def test_delta() -> None:
    """spec 5.7."""
    for case in _load("delta.json"):
        part = accumulator_from_dict("case", {"kind": "log", "delta": case["delta"]})
        made = part.delta.tables(case["gamma_acc"])  # type: ignore[union-attr]
        plus, minus = case["plus"], [0, *case["minus"]]
        assert [*made.plus.tolist(), *[0] * (len(plus) - len(made.plus))] == plus, case["name"]
        assert [0, *made.minus.tolist()[1:], *[0] * (len(minus) - max(len(made.minus), 1))] == minus, case["name"]


def _plan(data: dict[str, Any]) -> DotPlan:
    values: dict[str, Any] = dict(data)
    values["datapath"] = Datapath.from_dict(values["datapath"])
    for name in ("activation", "weight", "output"):
        values[name] = LNSFormat.parse(values[name])
    for name in ("weight_offset", "acc_offset"):
        if isinstance(values[name], list):
            values[name] = np.array(values[name], dtype=np.int64)
    return DotPlan(**values)


def _bias(case: dict[str, Any]) -> Array | None:
    return None if case["bias"] is None else np.array(case["bias"], dtype=np.int64)


@pytest.mark.smoke
def test_dot() -> None:
    """spec 3, 4, 5."""
    for case in _load("dot.json"):
        plan = _plan(case["plan"])
        depth = len((case["a"] or case["w"])[0])
        a = np.array(case["a"], dtype=plan.activation.dtype).reshape(-1, depth) if depth else None
        w = np.array(case["w"], dtype=plan.weight.dtype).reshape(-1, depth) if depth else None
        if a is None or w is None:
            a = np.zeros((len(case["a"]), 0), dtype=plan.activation.dtype)
            w = np.zeros((len(case["w"]), 0), dtype=plan.weight.dtype)
        assert reference.dot(a, w, _bias(case), plan).tolist() == case["words"], case["name"]


def test_convolution() -> None:
    """spec 7.1."""
    for case in _load("convolution.json"):
        plan = _plan(case["plan"])
        x, w = np.array(case["x"], dtype=plan.activation.dtype), np.array(case["w"], dtype=plan.weight.dtype)
        window = Window(**{name: tuple(value) for name, value in case["window"].items()})
        got = reference.convolution(x, w, _bias(case), plan, window, case["groups"])
        assert got.tolist() == case["words"], case["name"]


def _run(case: dict[str, Any]) -> Array:
    """One operation of spec 6 by its name."""
    name = case["name"]
    if name in ("max_pool", "sum_window", "average_pool"):
        window = Window(**{key: tuple(value) for key, value in case["window"].items()})
        x = np.array(case["x"], dtype=np.uint8)
        if name == "max_pool":
            return reference.max_pool(x, LNSFormat.parse(case["format"]), window)
        data = dict(case["plan"])
        data["accumulator"] = log_accumulator_from_dict("case", data["accumulator"])
        plan = PoolPlan(**{k: LNSFormat.parse(v) if k in ("input", "output") else v for k, v in data.items()})
        if name == "sum_window":
            return reference.sum_window(x, plan, window)
        return reference.average_pool(x, plan, window, case["count_include_pad"])
    fmt = LNSFormat.parse(case["format"])
    x = np.array(case["x"], dtype=fmt.dtype)
    if name in ("relu", "negate"):
        return getattr(reference, name)(x, fmt)  # type: ignore[no-any-return]
    if name == "clip":
        return reference.clip(x, fmt, case["low"], case["high"])
    if name == "square_root":
        return reference.square_root(x, fmt, case["offset"], case["output_offset"], case["underflow"])
    if name == "rescale":
        target = LNSFormat.parse(case["output"])
        return reference.rescale(x, RescalePlan(fmt, target, case["offset"], case["output_offset"], case["underflow"]))
    y = np.array(case["y"], dtype=fmt.dtype)
    if name in ("maximum", "minimum"):
        return getattr(reference, name)(x, y, fmt)  # type: ignore[no-any-return]
    if name in ("multiply", "divide"):
        offsets = case["a_offset"], case["b_offset"], case["offset"]
        return getattr(reference, name)(x, y, fmt, *offsets, underflow=case["underflow"])  # type: ignore[no-any-return]
    assert name == "add"
    part = log_accumulator_from_dict("case", case["accumulator"])
    formats = fmt, LNSFormat.parse(case["b"]), LNSFormat.parse(case["output"])
    integers = case["a_offset"], case["b_offset"], case["output_offset"], case["acc_offset"]
    return reference.add(x, y, AddPlan(part, *formats, *integers, case["underflow"]))


@pytest.mark.smoke
def test_operations() -> None:
    """spec 6.1 to 6.5."""
    seen = set()
    for case in _load("operations.json"):
        assert _run(case).tolist() == case["words"], case["name"]
        seen.add(case["name"])
    assert len(seen) == 13
