"""An estimate of a datapath's hardware in milliseconds, without any tool: for sweeps of thousands (docs/cost.md).

Every unit of the library is counted in primitives: bits of adders, of shifters' multiplexers, of registers, cells of
multipliers, nodes of its tables. What each costs is fitted to synthesised points (:mod:`lnsdeploy.cost.fit`), all units
together; the errors on points that were held out are in `model.json` and in docs/cost.md. What is counted follows the
SystemVerilog text, so the comments name modules.

A table is counted by its decision diagram: the multiplexers that select its entry, address bit after address bit, equal
halves and complements shared. That is what a synthesiser starts from, and it sees what makes Δ cheap: that it is
constant over long stretches, and monotone.
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

from lnsdeploy.cost import units
from lnsdeploy.datapath import Datapath
from lnsdeploy.errors import BadFileError, BadValueError
from lnsdeploy.files import read_bytes
from lnsdeploy.rtl.parameters import PEParameters
from lnsdeploy.rtl.roms import ROM_CONSTANTS, ROM_ENCODER, Adder, Rom
from lnsdeploy.rtl.vectors import example_plan

MODEL = Path(__file__).parent / "model.json"
PARTS = ("multiplier", "alignment", "adder", "tables", "accumulator", "converter")

# Primitives, and what a cell of each would cost by the book (transistors); the fit starts from these and leaves them
# as far as the points ask for it.
PRIMITIVES: Mapping[str, float] = {
    "add": 44,  # a bit of an adder or subtractor
    "addsub": 50,  # a bit of one that does either
    "increment": 20,  # a bit of an adder whose other operand is constant, of a negation
    "compare": 16,  # a bit of a comparison
    "limit": 16,  # a bit that is limited to a range
    "mux": 10,  # a bit of a choice
    "shift": 10,  # a bit of a stage of a shifter
    "gate": 6,  # a bit of an and, or, or a test for zero
    "cell": 36,  # a partial product's bit and its adder
    "constant": 24,  # the same where one factor is constant, a bit of it that is one
    "choose": 9,  # a node of a table's diagram whose halves both vary
    "join": 5,  # a node of which one half is constant
    "register": 38,  # a bit with enable and reset
    "hold": 30,  # a bit with enable
    "unit": 10,  # once a unit
}
# Along the longest path, in gates.
STEPS: Mapping[str, float] = {
    "carry": 3.0,  # log2 of an adder's bits
    "level": 2.0,  # a stage of a shifter, a level of multiplexers or of a test
    "look-up": 1.5,  # an address bit of a table
    "rows": 3.0,  # log2 of a multiplier's partial products
    "clamp": 3.0,  # a limit
    "path": 1.0,  # once a unit
}

Counts = Counter[str]


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


class _Sketch:
    """A unit's primitives by part, and the steps of its longest path."""

    def __init__(self) -> None:
        self.parts: dict[str, Counts] = {part: Counter() for part in PARTS}
        self.path: Counts = Counter()

    def add(self, part: str, *, times: float = 1, **counts: float) -> None:
        """Count primitives."""
        for name, count in counts.items():
            self.parts[part][name] += times * max(count, 0)  # type: ignore[assignment]

    def step(self, **steps: float) -> None:
        """Lengthen the path."""
        for name, count in steps.items():
            self.path[name.replace("_", "-")] += max(count, 0)  # type: ignore[assignment]

    def table(self, part: str, choose: int, join: int, address: int, times: float = 1, on_path: bool = True) -> None:
        """A table's diagram."""
        self.add(part, times=times, choose=choose, join=join)
        if on_path:
            self.step(look_up=address)

    def total(self) -> Counts:
        """Primitives of the unit."""
        found: Counts = Counter({"unit": 1})
        for counts in self.parts.values():
            found.update(counts)
        return found


def _lg(value: float) -> float:
    return math.log2(max(value, 1))


@lru_cache(maxsize=512)
def diagram(entries: tuple[int, ...], address_bits: int, data_bits: int) -> tuple[int, int]:
    """Nodes of a table's shared decision diagram with complemented edges, of the better of two orders of its address.

    Returns: nodes that choose between two halves that both vary, and nodes of which one is constant.
    """
    size = 1 << address_bits
    values = np.zeros(size, dtype=object if data_bits > 62 else np.int64)
    values[: min(len(entries), size)] = entries[:size]
    reverse = np.zeros(size, dtype=np.int64)
    for bit in range(address_bits):
        reverse |= ((np.arange(size) >> bit) & 1) << (address_bits - 1 - bit)
    columns = np.stack([((values >> bit) & 1).astype(np.int64) for bit in range(data_bits)])
    columns = np.unique(columns, axis=0)
    found = [_nodes(columns), _nodes(columns[:, reverse])]
    return min(found, key=lambda pair: PRIMITIVES["choose"] * pair[0] + PRIMITIVES["join"] * pair[1])


def _nodes(columns: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[int, int]:
    edges, fresh, choose, join = columns, 1, 0, 0
    # an edge is 2 · node + complement; node 0 is constant
    while edges.shape[1] > 1:
        low, high = edges[:, 0::2], edges[:, 1::2]
        flip = high & 1
        keys = ((low ^ flip) << 32) | (high ^ flip)
        distinct, where = np.unique(keys[low != high], return_inverse=True)
        a, b = distinct >> 32, distinct & 0xFFFFFFFF
        constant = (a < 2) | (b < 2)
        # a node that passes its own variable on costs nothing
        wire = (a < 2) & (b < 2)
        join += int((constant & ~wire).sum())
        choose += int((~constant).sum())
        edges = low.copy()
        edges[low != high] = 2 * (fresh + where) + flip[low != high]
        fresh += len(distinct)
    return choose, join


def _joined(roms: Sequence[Rom]) -> tuple[int, int, int]:
    """Two tables of one address as one, with a further address bit in front."""
    bits = max(rom.address_bits for rom in roms)
    entries: list[int] = []
    for rom in roms:
        entries += [*rom.entries, *([0] * ((1 << bits) - len(rom.entries)))]
    address = bits + (len(roms) - 1).bit_length()
    return *diagram(tuple(entries), address, max(rom.data_bits for rom in roms)), address


def _multiplier(s: _Sketch, v: Mapping[str, int], lanes: int = 1) -> None:
    """lns_mul."""
    a, w = v["A_BITS"] - v["A_SIGNED"], v["W_BITS"] - v["W_SIGNED"]
    s.add("multiplier", times=lanes, add=min(a, w), increment=abs(a - w), gate=a + w + 2)
    s.step(carry=_lg(v["P_BITS"]), level=1)


def _normalize(s: _Sketch, part: str, bits: int, needed: int, times: float = 1) -> None:
    """lns_normalize, of which only the top `needed` bits are used."""
    steps = max((bits - 1).bit_length(), 1)
    for i in range(steps):
        shift = 1 << (steps - 1 - i)
        s.add(part, times=times, shift=min(bits, needed + shift - 1), gate=shift)
        s.step(level=1 + _lg(shift) / 2)


def _delta(s: _Sketch, made: Adder, bits: int, times: int, tables: Mapping[str, Any]) -> None:
    """lns_delta_*."""
    p = {name: int(value) for name, value in made.parameters.items() if isinstance(value, int)}
    value = made.value_bits
    if made.module == "none":
        return
    if made.module == "rom":
        choose, join, address = _joined(made.roms)
        s.table("tables", choose, join, address, times)
        s.add("tables", times=times, gate=max(bits - p["STEP_LOG2"] - p["INDEX_BITS"], 0) + value)
        return
    if made.module in ("mitchell", "shift"):
        gamma = p["GAMMA"]
        f = max((gamma - 1).bit_length(), 1)
        if made.module == "shift" or gamma & (gamma - 1):
            # a function of d alone, of its quotient where that is wires
            wires = 0 if gamma & (gamma - 1) else gamma.bit_length() - 1
            entries = tuple(int(x) for x in tables["delta_plus"][:: 1 << wires])
            address = max((len(entries) - 1).bit_length(), 1)
            choose, join = diagram(entries, address, value)
            s.table("tables", choose, join, address, times)
            s.add("tables", times=times, gate=max(bits - wires - address, 0))
        else:
            stages = max(min(bits - f, (f + 1).bit_length()), 0)
            s.add("tables", times=times, increment=f, shift=stages * value, gate=max(bits - f - stages, 0))
            s.step(carry=_lg(f), level=stages)
        return
    past = 2 * bits
    if made.module == "cotransform":
        wide = max(bits, p["SPLIT"], value)
        for index, rom in enumerate(made.roms):
            choose, join = diagram(rom.entries, rom.address_bits, rom.data_bits)
            s.table("tables", choose, join, rom.address_bits, times, on_path=index != 2)
        s.add("tables", times=times, add=wide + value, addsub=wide, compare=value + past / 2, mux=wide + 3 * value)
        s.step(carry=3 * _lg(wide), level=5)
        return
    if made.module == "cordic":
        width, rounds = p["WIDTH"], p["ITERATIONS"]
        wide, wires = width + 8, max((p["GAMMA"] - 1).bit_length(), 1)
        scale = int(str(made.parameters["SCALE"]).split("d")[1])
        ln2 = int(str(made.parameters["LN2"]).split("d")[1])
        s.add("tables", times=times * 2 * rounds, addsub=2.5 * wide)
        s.add("tables", times=times, constant=wires * ln2.bit_count() + (width + 4) * scale.bit_count())
        s.add("tables", times=times, constant=5 * ln2.bit_count(), add=2 * wide, addsub=wide, shift=4 * wide)
        _normalize(s, "tables", width + 2, width + 2, times)
        s.add("tables", times=times, compare=past)
        s.step(carry=2 * rounds * _lg(wide) + 3 * _lg(2 * wide), level=6, rows=_lg(width) * 2)
        return
    # interpolated and polynomial: which segment, its entry, and arithmetic inside it
    choose, join, address = _joined(made.roms)
    s.table("tables", choose, join, address, times)
    s.add("tables", times=times, compare=past)
    if p["OCTAVE"]:
        stages = max((bits - p["SEGMENTS_LOG2"]).bit_length(), 1)
        _normalize(s, "tables", bits, 1, times)
        s.add("tables", times=times, shift=2 * stages * bits, add=p["INDEX_BITS"] + stages, gate=2 * bits)
        s.step(level=stages, carry=_lg(p["INDEX_BITS"]))
        inside = max(bits - 1 - p["SEGMENTS_LOG2"], 1)
    else:
        inside = max(p["PLUS_WIDTH_LOG2"], p["MINUS_WIDTH_LOG2"])
        stages = 0
        s.add("tables", times=times, mux=inside + p["INDEX_BITS"])
    if made.module == "interpolated":
        s.add("tables", times=times, cell=p["SLOPE_BITS"] * inside, add=value, compare=value, gate=value)
        s.step(rows=_lg(min(p["SLOPE_BITS"], inside)), carry=2 * _lg(p["SLOPE_BITS"] + inside), level=2)
        return
    horner = p["HORNER_BITS"]
    rounds = p["DEGREE"]
    s.add("tables", times=times * rounds, cell=horner * inside, add=horner)
    s.add("tables", times=times * rounds, shift=stages * horner)
    s.add("tables", times=times, increment=horner, gate=value)
    s.step(rows=rounds * _lg(inside), carry=rounds * (_lg(horner + inside) + _lg(horner)), level=rounds * stages)


def _adder(s: _Sketch, made: Adder, bits: int, times: int, tables: Mapping[str, Any], levels: int = 1) -> None:
    """lns_add, `times` of them, `levels` of them one after another."""
    wide = max(bits, made.value_bits)
    s.add("adder", times=times, compare=bits, mux=2 * bits, add=bits, gate=2 * bits + 4, limit=bits)
    change = "addsub" if made.module != "none" else "gate"
    s.add("adder", times=times, **{change: wide})
    inner = _Sketch()
    inner.step(carry=3 * _lg(bits), level=3, clamp=1)
    _delta(inner, made, bits, times, tables)
    for part, counts in inner.parts.items():
        s.parts[part].update(counts)
    for name, count in inner.path.items():
        s.path[name] += levels * count  # type: ignore[assignment]


def _enter(s: _Sketch, v: Mapping[str, int], lanes: int, tied: bool = True) -> None:
    """lns_enter."""
    kind = {"increment": v["P_BITS"] + 2} if tied else {"add": max(v["P_BITS"], v["SCALE_BITS"])}
    s.add("alignment", times=lanes, limit=v["ACC_BITS"], gate=v["P_BITS"], **kind)
    s.step(carry=_lg(v["P_BITS"]), clamp=1)


def _term(s: _Sketch, v: Mapping[str, int], roms: Sequence[Rom], align: int, lanes: int = 1) -> None:
    """lns_term with its alignment tied."""
    low = v["F"] - v["TABLE_BITS"]
    mantissa = v["F"] + 1 if low > 0 else 1
    if not v["CONVERSION"]:
        rom = next(rom for rom in roms if rom.id == ROM_CONSTANTS)
        choose, join = diagram(rom.entries, rom.address_bits, rom.data_bits)
        s.table("tables", choose, join, v["TABLE_BITS"], lanes)
        if low > 0:
            # the leading one is known; of the others only the low bits vary
            cells = (v["CONST_BITS"] + 1) * low
            kind = {"cell": cells} if v["TABLE_BITS"] else {"cell": cells / 2}
            s.add("alignment", times=lanes, **kind)
            s.step(rows=_lg(low), carry=_lg(v["CONST_BITS"] + low))
        mantissa += v["CONST_BITS"]
    stages = max(v["P_BITS"] - v["F"], 1)
    term = v["TERM_BITS"]
    # the shifter's stages, from the smallest shift: what lies below the accumulator's last bit falls away
    for stage in range(stages):
        width = min(mantissa + (2 << stage) - 1, term + max(align, 0))
        later = (1 << stages) - (2 << stage)
        s.add("alignment", times=lanes, shift=max(min(width, width - max(align - later, 0)), 0))
    if v["SHIFT"] and align > 0:
        s.add("alignment", times=lanes, increment=term)
        s.step(carry=_lg(term))
    s.add("alignment", times=lanes, gate=term)
    s.step(level=stages + 1)


def _step(s: _Sketch, v: Mapping[str, int], bins: int, lanes: int) -> None:
    """lns_lin_step: the accumulator's registers are counted by who holds them."""
    term, acc, psum = v["TERM_BITS"], v["ACC_BITS"], v["PSUM_BITS"]
    sums = term + 1 + max((lanes - 1).bit_length(), 0)
    s.add("accumulator", times=lanes, increment=term)
    if bins > 1:
        s.add("accumulator", times=lanes * bins, gate=term + 1)
    s.add("accumulator", times=bins * (lanes - 1), add=sums)
    if v["OVERFLOW"]:
        if sums > psum - 1:
            s.add("accumulator", times=bins, limit=psum, compare=2 * max(sums - psum, 0))
            s.step(clamp=1)
        s.add("accumulator", times=bins, limit=acc)
        s.step(clamp=1)
    s.add("accumulator", times=bins, add=min(acc, psum, sums), increment=max(acc - min(psum, sums), 0))
    s.step(carry=_lg(acc) + _lg(term) + _lg(lanes) * 2, level=_lg(lanes) + 1)


def _finish(s: _Sketch, v: Mapping[str, int], roms: Sequence[Rom], bins: int) -> None:
    """lns_lin_finish."""
    part, total = "converter", v["TOTAL_BITS"]
    if v["CONVERSION"]:
        constants = next(rom for rom in roms if rom.id == ROM_CONSTANTS)
        ones = sum(entry.bit_count() for entry in constants.entries[:bins])
        wide = v["ACC_BITS"] + v["CONST_BITS"]
        s.add(part, constant=(ones - bins) * wide, add=(bins - 1) * total)
        s.step(rows=_lg(v["CONST_BITS"]), carry=_lg(total) * (1 + _lg(bins)) if bins > 1 else 0)
    exact = v["ENCODER"] == 0
    f = v["F"]
    needed = total if exact else (v["ENCODER_BITS"] if v["ENCODER"] == 1 else f) + 1
    s.add(part, increment=total, mux=total)
    s.step(carry=_lg(total), level=1)
    _normalize(s, part, total, needed)
    if v["ENCODER"] != 2:
        rom = next(rom for rom in roms if rom.id == ROM_ENCODER)
        choose, join = diagram(rom.entries, rom.address_bits, rom.data_bits)
        s.table(part, choose, join, rom.address_bits)
        if exact:
            low = max(rom.data_bits - f - 2, 0)
            s.add(part, compare=low, increment=f + 1)
            s.step(carry=_lg(low))
    position = total.bit_length()
    s.add(part, increment=position, add=position + f + 1)
    s.step(carry=2 * _lg(position + f))
    _output(s, v)


def _output(s: _Sketch, v: Mapping[str, int]) -> None:
    """lns_output."""
    s.add("converter", limit=v["OUT_BITS"], gate=v["OUT_BITS"] + 4)
    s.step(clamp=1)


def _log_finish(s: _Sketch, v: Mapping[str, int]) -> None:
    """lns_log_finish."""
    rounding = v["ACC_BITS"] if v["GUARD"] else 0
    s.add("converter", increment=rounding, add=max(v["ACC_BITS"], v["OFFSET_BITS"]))
    _output(s, v)


def sketches(datapath: Datapath, lanes: int = 1) -> tuple[dict[str, _Sketch], PEParameters]:
    """Every unit's primitives by its name, ``pe`` without its lanes, and the element's parameters."""
    pe = units.parameters(units.with_lanes(datapath, lanes))
    v = pe.values
    found = {"multiplier": _Sketch()}
    _multiplier(found["multiplier"], v)
    mac = found["mac"] = _Sketch()
    _multiplier(mac, v)
    if datapath.is_linear:
        align = int(pe.scales(example_plan(datapath), 1)[0])
        bins = datapath.linear.bins
        finish = found["linear-to-log converter"] = _Sketch()
        _finish(finish, v, pe.roms, bins)
        _term(mac, v, pe.roms, align)
        _step(mac, v, bins, 1)
        mac.add("accumulator", register=bins * v["ACC_BITS"])
    else:
        tables = datapath.tables()
        adder = found["adder"] = _Sketch()
        _adder(adder, pe.adders[0], v["ACC_BITS"], 1, tables)
        _enter(mac, v, 1)
        _adder(mac, pe.adders[0], v["ACC_BITS"], 1, tables)
        mac.add("accumulator", register=v["ACC_BITS"] + 1)
    if lanes > 1:
        one = found["pe"] = _Sketch()
        _multiplier(one, v, lanes)
        held = v["ACC_BITS"] + 1 + 2 * v["OFFSET_BITS"] + v["OUT_BITS"] + 4
        if datapath.is_linear:
            _term(one, v, pe.roms, align, lanes)
            one.path.clear()  # registers lie between products and sum
            _step(one, v, bins, lanes)
            state = bins * v["ACC_BITS"]
            held += lanes * (v["TERM_BITS"] + 1 + (v["TABLE_BITS"] if bins > 1 else 0))
            summed = Counter(one.path)
            one.path.clear()
            _finish(one, v, pe.roms, bins)
        else:
            _enter(one, v, lanes)
            one.path.clear()
            _adder(one, pe.adders[0], v["ACC_BITS"], lanes, tables, 1 + (lanes - 1).bit_length())
            state = v["ACC_BITS"] + 1
            held += lanes * (v["ACC_BITS"] + 1)
            summed = Counter(one.path)
            one.path.clear()
            _log_finish(one, v)
        # the longer of the two halves
        one.path = max((summed, one.path), key=lambda path: sum(STEPS[name] * count for name, count in path.items()))
        one.add("accumulator", mux=state, hold=held + state)
    for sketch in found.values():
        sketch.step(path=1)
    return found, pe


# ---------------------------------------------------------------------------------------------------
# Coefficients


@lru_cache(maxsize=1)
def coefficients() -> dict[str, Any]:
    """`model.json`: transistors a primitive, gates a step, the baselines, and the errors of the fit.

    Raises:
        BadFileError: the file is damaged.
    """
    data = json.loads(read_bytes(MODEL))
    for name, known in (("transistors", PRIMITIVES), ("depth", STEPS)):
        if not isinstance(data.get(name), dict) or set(data[name]) != set(known):
            raise BadFileError(f"{MODEL}: {name} must have the coefficients {', '.join(sorted(known))}")
    return dict(data)


def _unit(sketch: _Sketch, fitted: Mapping[str, Any]) -> UnitEstimate:
    each = fitted["transistors"]
    parts = {part: sum(each[name] * count for name, count in counts.items()) for part, counts in sketch.parts.items()}
    parts = {part: value for part, value in parts.items() if value}
    once = each["unit"]
    largest = max(parts, key=lambda part: parts[part])
    parts[largest] += once
    depth = sum(fitted["depth"][name] * count for name, count in sketch.path.items())
    return UnitEstimate(sum(parts.values()), depth, parts)


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
    found = {(f"pe-{lanes}" if name == "pe" else name): _unit(sketch, fitted) for name, sketch in drawn.items()}
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
        f"{found.datapath} ({found.fingerprint}), analytical model fitted to {tool}; on configurations that were held out "
        f"the median error is {held['transistors']['median']:.0%}, the largest {held['transistors']['largest']:.0%}",
        "",
        f"{'unit':<32} {'transistors':>11} {'depth':>6}  parts",
    ]
    for rows in (found.units, beside):
        for name, row in rows.items():
            parts = ", ".join(f"{part} {value:.0f}" for part, value in row.parts.items())
            lines.append(f"{name:<32} {row.transistors:>11.0f} {row.depth:>6.0f}  {parts}".rstrip())
        lines.append("")
    lines.append(f"table bits of {found.unit}: {found.table_bits}")
    return "\n".join(lines)
