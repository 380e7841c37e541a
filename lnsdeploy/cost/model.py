"""An estimate of a datapath's hardware in milliseconds, without any tool: for sweeps of thousands (docs/cost.md).

Every unit is built as a graph of gates (:mod:`lnsdeploy.cost.gates`), constants folded and equal gates shared, and the
gates are counted by kind and by part of the unit. What a gate of each kind costs, and by what each part comes out
larger or smaller than that, is fitted to synthesised points (:mod:`lnsdeploy.cost.fit`); the errors on points that
were held out are in `model.json` and in docs/cost.md. A flip-flop is no estimate: it has the transistors it has.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lnsdeploy.cost import gates, synthesis, units
from lnsdeploy.cost.graph import Bits, Graph, constant
from lnsdeploy.datapath import Datapath
from lnsdeploy.errors import BadFileError, BadValueError
from lnsdeploy.files import read_bytes
from lnsdeploy.rtl.parameters import PEParameters
from lnsdeploy.rtl.roms import ROM_CONSTANTS
from lnsdeploy.rtl.vectors import example_plan

MODEL = Path(__file__).parent / "model.json"
PARTS = ("multiplier", "alignment", "adder", "tables", "accumulator", "converter")

# Gates, and what one of each costs in transistors by the book: a nand with its share of inverters, an xor, a
# multiplexer; those of tables apart, of whose diagrams a synthesiser finds better ones. The fit starts from these.
KINDS: Mapping[str, float] = {
    "and": 4,
    "xor": 12,
    "mux": 10,
    "table-and": 4,
    "table-xor": 10,
    "table-mux": 10,
}
# Gates on the longest path, a level of the graph.
GATES_A_LEVEL = 0.65
# Lanes past which an element's sums grow as between the two.
LANES = (16, 32)


@dataclass(frozen=True)
class UnitEstimate:
    """Of one unit.

    Args:
        transistors: as synthesis would count them.
        depth: gates on its longest path.
        parts: its transistors by part, of :data:`PARTS`; they add up to `transistors`.
    """

    transistors: float
    depth: float
    parts: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "transistors": round(self.transistors),
            "depth": round(self.depth, 1),
            "parts": {part: round(value) for part, value in self.parts.items()},
        }


@dataclass(frozen=True)
class Estimate:
    """Of a datapath.

    Args:
        datapath, fingerprint: its name and fingerprint.
        lanes: of the element.
        unit: which of `units` the figures are of: ``mac``, or with lanes ``pe-N``, which holds the converter too.
        transistors, depth, parts: its own.
        table_bits: bits of the tables that the unit reads, each counted once.
        units: every unit by the name that `lnsdeploy cost` gives it.
    """

    datapath: str
    fingerprint: str
    lanes: int
    unit: str
    transistors: float
    depth: float
    table_bits: int
    parts: Mapping[str, float]
    units: Mapping[str, UnitEstimate]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "datapath": {"name": self.datapath, "fingerprint": self.fingerprint},
            "unit": self.unit,
            "lanes": self.lanes,
            **self.units[self.unit].to_dict(),
            "table_bits": self.table_bits,
            "units": {name: unit.to_dict() for name, unit in self.units.items()},
        }


# ---------------------------------------------------------------------------------------------------
# Counting


@dataclass(frozen=True)
class Sketch:
    """A unit as it is counted.

    Args:
        gates: by part and kind, of :data:`KINDS`.
        registers: bits of flip-flops, by part.
        paths: levels of what may be its longest path, by part.
    """

    gates: Counter[tuple[str, str]]
    registers: Counter[str]
    paths: list[Counter[str]]


def _ports(g: Graph, v: Mapping[str, int]) -> tuple[Bits, Bits]:
    return g.word(v["A_BITS"]), g.word(v["W_BITS"])


def _held(g: Graph, after: Sequence[int], before: Sequence[int], on: int) -> Bits:
    """What a register with an enable takes."""
    return g.choose(on, after, before)


def _linear_lane(g: Graph, pe: PEParameters, align: int) -> tuple[Bits, int, Bits]:
    """lns_mul and lns_term: magnitude, sign, bin."""
    v = pe.values
    with g.part("multiplier"):
        sign, zero, code = gates.multiplier(g, v, *_ports(g, v))
    with g.part("alignment"):
        magnitude, index = gates.term(g, v, pe.roms, code, zero, align)
    return magnitude, sign, index


def _log_lane(g: Graph, pe: PEParameters, scale: int) -> tuple[int, Bits]:
    """lns_mul and lns_enter: sign, code."""
    v = pe.values
    with g.part("multiplier"):
        sign, zero, code = gates.multiplier(g, v, *_ports(g, v))
    with g.part("alignment"):
        entered = gates.enter(g, v, code, zero, constant(scale, v["SCALE_BITS"]))
        return g.and_(sign, g.any_(entered)), entered


def _bins(g: Graph, pe: PEParameters, lanes: Sequence[tuple[Bits, int, Bits]], before: Sequence[Bits]) -> list[Bits]:
    """lns_lin_step: the bins' accumulators after a step."""
    terms = [(magnitude, sign) for magnitude, sign, _ in lanes]
    with g.part("accumulator"):
        if len(before) == 1:
            return [gates.step_bin(g, pe.values, terms, [1] * len(lanes), before[0])]
        return [
            gates.step_bin(g, pe.values, terms, [gates.equals(g, at, number) for _, _, at in lanes], word)
            for number, word in enumerate(before)
        ]


def _add(g: Graph, pe: PEParameters, plus: Sequence[int], x: tuple[int, Bits], y: tuple[int, Bits]) -> Bits:
    """lns_add: code and sign."""
    with g.part("adder"):
        sign, code = gates.adder(g, pe.adders[0], x, y, plus)
        return [*code, sign]


def _log_tree(g: Graph, pe: PEParameters, plus: Sequence[int], words: Sequence[tuple[int, Bits]]) -> Bits:
    """lns_log_tree: code and sign."""
    if len(words) == 1:
        return [*words[0][1], words[0][0]]
    left = 1 << ((len(words) - 1).bit_length() - 1)
    (*x, x_sign), (*y, y_sign) = (_log_tree(g, pe, plus, part) for part in (words[:left], words[left:]))
    return _add(g, pe, plus, (x_sign, x), (y_sign, y))


def _sketch(g: Graph, outputs: Sequence[int], registers: Counter[str] | None = None) -> Sketch:
    return Sketch(g.count(outputs), registers or Counter(), [g.path(outputs)])


def _multiplier(pe: PEParameters) -> Sketch:
    g = Graph(merge=True)
    with g.part("multiplier"):
        sign, zero, code = gates.multiplier(g, pe.values, *_ports(g, pe.values))
    return _sketch(g, [sign, zero, *code])


def _adder(pe: PEParameters, plus: Sequence[int]) -> Sketch:
    g, bits = Graph(merge=True), pe.values["ACC_BITS"]
    return _sketch(g, _add(g, pe, plus, *((g.word(1)[0], g.word(bits)) for _ in range(2))))


def _finish(pe: PEParameters) -> Sketch:
    """lns_lin_finish or lns_log_finish."""
    g, v = Graph(merge=True), pe.values
    with g.part("converter"):
        offset = g.word(v["OFFSET_BITS"])
        if v["LOG"]:
            return _sketch(g, gates.log_finish(g, v, g.word(1)[0], g.word(v["ACC_BITS"]), offset))
        bins = [g.word(v["ACC_BITS"]) for _ in range(pe.datapath.linear.bins)]
        return _sketch(g, gates.linear_finish(g, v, pe.roms, bins, offset))


def _mac(pe: PEParameters, scale: int, plus: Sequence[int]) -> Sketch:
    """lns_mac, its alignment tied."""
    g, v = Graph(merge=True), pe.values
    valid, reset = g.word(1)[0], g.word(1)[0]
    if v["LOG"]:
        before = g.word(v["ACC_BITS"] + 1)
        after = _add(g, pe, plus, (before[-1], before[:-1]), _log_lane(g, pe, scale))
    else:
        words = [g.word(v["ACC_BITS"]) for _ in range(pe.datapath.linear.bins)]
        before = [bit for word in words for bit in word]
        after = [bit for word in _bins(g, pe, [_linear_lane(g, pe, scale)], words) for bit in word]
    with g.part("accumulator"):
        after = g.masked(_held(g, after, before, valid), reset)
    return _sketch(g, after, Counter(accumulator=len(after)))


def _element(pe: PEParameters, scale: int, plus: Sequence[int]) -> Sketch:
    """lns_pe, its alignment tied: products, a register, their sum, a register, the output."""
    v, lanes = pe.values, pe.values["LANES"]
    total: Counter[tuple[str, str]] = Counter()
    paths: list[Counter[str]] = []

    def count(sketch: Sketch, times: int = 1, on_path: int = 1) -> None:
        for key, number in sketch.gates.items():
            total[key] += times * number
        paths.extend(Counter({part: on_path * levels for part, levels in path.items()}) for path in sketch.paths)

    lane = Graph(merge=True)
    if v["LOG"]:
        sign, code = _log_lane(lane, pe, scale)
        term = [*code, sign]
    else:
        magnitude, sign, index = _linear_lane(lane, pe, scale)
        # without bins there is one, and nothing says which
        term = [*magnitude, sign, *(index if v["CONVERSION"] else [])]
    count(_sketch(lane, term), lanes)
    step, finish = Graph(merge=True), _finish(pe)
    if v["LOG"]:
        last = _adder(pe, plus)
        if all(bit > 1 for bit in code):
            # lns_log_tree and the accumulator: as many adders as lanes, all alike
            count(last, lanes, 1 + (lanes - 1).bit_length())
        else:
            # bits of terms that are always zero make the tree's adders smaller
            entered = [(step.word(1)[0], [bit and step.word(1)[0] for bit in code]) for _ in range(lanes)]
            tree = _sketch(step, _log_tree(step, pe, plus, entered))
            count(Sketch(tree.gates + last.gates, Counter(), [tree.paths[0] + last.paths[0]]))
        state = v["ACC_BITS"] + 1
    else:
        words = [step.word(v["ACC_BITS"]) for _ in range(pe.datapath.linear.bins)]
        terms = [
            (step.word(len(magnitude)), step.word(1)[0], step.word(len(index)) if v["CONVERSION"] else [])
            for _ in range(lanes)
        ]
        count(_sketch(step, [bit for word in _bins(step, pe, terms, words) for bit in word]))
        state = sum(map(len, words))
    count(finish)
    # what is taken before a step, and by every register with an enable
    held = Counter(
        alignment=lanes * len({bit >> 1 for bit in term if bit > 1}),
        accumulator=2 + state + (v["ACC_BITS"] + (1 if v["LOG"] else 0)) + 2 * v["OFFSET_BITS"],
        converter=v["OUT_BITS"],
    )
    gated: Counter[tuple[str, str]] = Counter({(part, "mux"): bits for part, bits in held.items()})
    starts = v["ACC_BITS"] + 1 if v["LOG"] else v["ACC_BITS"]
    gated["accumulator", "mux"] += starts + 3
    gated["accumulator", "and"] += state - starts + 6
    total.update(gated)
    held["accumulator"] += 3  # valid, done, out_valid
    return Sketch(total, held, paths)


def sketches(datapath: Datapath, lanes: int = 1) -> tuple[dict[str, Sketch], PEParameters]:
    """Every unit by its name, ``pe`` without its lanes, and the element's parameters."""
    scalar = units.parameters(units.with_lanes(datapath, 1))
    pe = units.parameters(units.with_lanes(datapath, lanes)) if lanes > 1 else scalar
    scale = int(pe.scales(example_plan(datapath), 1)[0])
    plus: Sequence[int] = () if datapath.is_linear else datapath.tables()["delta_plus"].tolist()
    found = {"multiplier": _multiplier(scalar)}
    if datapath.is_linear:
        found["linear-to-log converter"] = _finish(scalar)
    else:
        found["adder"] = _adder(scalar, plus)
    found["mac"] = _mac(scalar, scale, plus)
    if 1 < lanes <= LANES[1]:
        found["pe"] = _element(pe, scale, plus)
    elif lanes > 1:
        few, more = (_element(units.parameters(units.with_lanes(datapath, n)), scale, plus) for n in LANES)
        found["pe"] = _longer(few, more, lanes)
    return found, pe


def _longer(few: Sketch, more: Sketch, lanes: int) -> Sketch:
    """An element of more lanes than two others: gates on a line through theirs, levels on one by logarithm."""
    ratio = (lanes - LANES[0]) / (LANES[1] - LANES[0])
    steps = _lg(lanes / LANES[0]) / _lg(LANES[1] / LANES[0])

    def line(a: Counter[Any], b: Counter[Any], at: float) -> Counter[Any]:
        return Counter({key: round(max(a[key] + (b[key] - a[key]) * at, 0)) for key in a | b})

    paths = [line(a, b, steps) for a, b in zip(few.paths, more.paths, strict=True)]
    return Sketch(line(few.gates, more.gates, ratio), line(few.registers, more.registers, ratio), paths)


def _lg(value: float) -> float:
    return math.log2(max(value, 1))


# ---------------------------------------------------------------------------------------------------
# Coefficients


@lru_cache(maxsize=1)
def coefficients() -> dict[str, Any]:
    """`model.json`: transistors a gate of each kind, factors and gates a level of each part, baselines, errors.

    Raises:
        BadFileError: the file is damaged.
    """
    data = json.loads(read_bytes(MODEL))
    for name, known in (("kinds", KINDS), ("parts", PARTS), ("levels", PARTS)):
        if not isinstance(data.get(name), dict) or set(data[name]) != set(known):
            raise BadFileError(f"{MODEL}: {name} must have the coefficients {', '.join(sorted(known))}")
    return dict(data)


def price(sketch: Sketch, fitted: Mapping[str, Any]) -> UnitEstimate:
    """What a unit costs with the coefficients of `model.json`."""
    parts = {part: float(synthesis.FLIP_FLOP * bits) for part, bits in sketch.registers.items()}
    for (part, kind), count in sketch.gates.items():
        parts[part] = parts.get(part, 0.0) + fitted["parts"][part] * fitted["kinds"][kind] * count
    levels = fitted["levels"]
    depth = max(sum(levels[part] * count for part, count in path.items()) for path in sketch.paths)
    ordered = {part: parts[part] for part in PARTS if parts.get(part)}
    return UnitEstimate(sum(ordered.values()), max(depth, 1.0), ordered)


def estimate(datapath: Datapath, lanes: int = 1) -> Estimate:
    """Estimate a datapath's hardware.

    Args:
        lanes: of the element; with 1 the figures are the scalar MAC's, as with `lnsdeploy cost`.

    Raises:
        UnsupportedError: the datapath is no hardware; the message says why.
        BadValueError: lanes is out of range.
    """
    if not 1 <= lanes <= 1024:
        raise BadValueError(f"lanes must be from 1 to 1024, not {lanes}")
    fitted = coefficients()
    drawn, pe = sketches(datapath, lanes)
    found = {(f"pe-{lanes}" if name == "pe" else name): price(sketch, fitted) for name, sketch in drawn.items()}
    unit = f"pe-{lanes}" if lanes > 1 else "mac"
    bits = sum(rom.bits for rom in pe.all_roms)
    if lanes == 1 and datapath.is_linear:
        # as lnsdeploy.cost.units.mac: no encoder, and bins take their constants afterwards
        kept = datapath.linear.conversion == "product"
        bits = sum(rom.bits for rom in pe.roms if rom.id == ROM_CONSTANTS and kept)
    main = found[unit]
    return Estimate(
        datapath.name, datapath.fingerprint, lanes, unit, main.transistors, main.depth, bits, main.parts, found
    )


def baselines(lanes: int = 1) -> dict[str, UnitEstimate]:
    """What int8, int4, fp8 and bf16 units cost, from synthesis; elements of other lanes by a line through those."""
    data = coefficients()["baselines"]
    found = {name: UnitEstimate(row["transistors"], row["depth"], {}) for name, row in data["units"].items()}
    if lanes > 1:
        for name, rows in data["elements"].items():
            at = [float(row["lanes"]) for row in rows]
            t = _line(at, [row["transistors"] for row in rows], lanes)
            depth = _line([_lg(x) for x in at], [row["depth"] for row in rows], _lg(lanes))
            found[name.replace("pe-N", f"pe-{lanes}")] = UnitEstimate(t, depth, {})
    return found


def _line(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """Between points linear, past the last on as between the last two."""
    if at <= x[-1]:
        return float(np.interp(at, x, y))
    return y[-1] + (y[-1] - y[-2]) / (x[-1] - x[-2]) * (at - x[-1])


def text(found: Estimate, beside: Mapping[str, UnitEstimate]) -> str:
    """An estimate and the baselines for people."""
    held = coefficients()["errors"]["held_out"]
    tool = coefficients()["tool"]
    lines = [
        f"{found.datapath} ({found.fingerprint}), analytical model fitted to {tool}; on configurations held out "
        f"the median error is {held['transistors']['median']:.0%}, the largest {held['transistors']['largest']:.0%}",
        "",
        f"{'unit':<32} {'transistors':>11} {'depth':>6}  parts",
    ]
    for rows in (found.units, beside):
        for name, row in rows.items():
            parts = ", ".join(f"{part} {value:.0f}" for part, value in row.parts.items())
            lines.append(f"{name:<32} {row.transistors:>11.0f} {row.depth:>6.0f}  {parts}".rstrip())
        lines.append("")
    lines = [*(lines if beside else lines[:-1]), f"table bits of {found.unit}: {found.table_bits}"]
    return "\n".join(lines)
