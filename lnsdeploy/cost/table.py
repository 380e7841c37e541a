"""One table: a datapath's units and the baselines (docs/cost.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lnsdeploy.cost import synthesis, units
from lnsdeploy.cost.synthesis import Cells, Cost
from lnsdeploy.datapath import load_datapath


@dataclass(frozen=True)
class Row:
    """A unit's cost and the bits of its tables."""

    cost: Cost
    table_bits: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return self.cost.to_dict() | {"table_bits": self.table_bits}


@dataclass(frozen=True)
class CostTable:
    """Of a datapath.

    Args:
        datapath, fingerprint: its name and fingerprint.
        tool: what synthesised.
        cells: of areas and delays; None without a liberty file.
        lanes: of the PE.
        units: by name; the last is what the datapath's own figures are of: the MAC, or with lanes the PE.
        baselines: by name.
    """

    datapath: str
    fingerprint: str
    tool: str
    cells: Cells | None
    lanes: int
    units: dict[str, Row]
    baselines: dict[str, Row]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        name, main = list(self.units.items())[-1]
        return {
            "datapath": {"name": self.datapath, "fingerprint": self.fingerprint},
            "unit": name,
            "lanes": self.lanes,
            **main.to_dict(),
            "tool": self.tool,
            "cells": self.cells.to_dict() if self.cells is not None else None,
            "units": {unit: row.to_dict() for unit, row in self.units.items()},
            "baselines": {unit: row.to_dict() for unit, row in self.baselines.items()},
        }

    def text(self) -> str:
        """For people."""
        lines = [f"{self.datapath} ({self.fingerprint}), {self.tool}"]
        lines += [str(self.cells)] if self.cells is not None else []
        lines += ["", head(self.cells)]
        for part in (self.units, self.baselines):
            lines += [line(name, row) for name, row in part.items()]
            lines.append("")
        return "\n".join(lines).rstrip()


def head(cells: Cells | None) -> str:
    """The first line above :func:`line`'s.

    Args:
        cells: of the areas and delays; None without.
    """
    found = f"{'unit':<40} {'transistors':>11} {'(range)':>17} {'depth':>6} {'flip-flops':>10} {'table bits':>10}"
    if cells is not None:
        found += f" {'area':>9}"
        found += f" {cells.time_unit:>7}" if cells.timing is not None else ""
    return found


def line(name: str, row: Row) -> str:
    """A unit, for people."""
    t, d = row.cost.transistors, row.cost.depth
    found = f"{name:<40} {t.median:>11.0f} {f'({t.min:.0f}–{t.max:.0f})':>17} {d.median:>6.0f} "
    found += f"{row.cost.flip_flops:>10} {row.table_bits:>10}"
    found += f" {row.cost.area.median:>9.0f}" if row.cost.area else ""
    return found + (f" {row.cost.delay.median:>7.2f}" if row.cost.delay else "")


def all_rows(*, lanes: int = 16, liberty: Path | None = None, runs: int = 3) -> Iterator[tuple[str, Row]]:
    """Every unit of the library and every baseline, one after another as they are synthesised.

    What was synthesised before comes from the cache: stopped by whatever, it goes on where it was.

    Args:
        lanes: of the elements.
        liberty: cells, for area and delay.
        runs: perturbed runs of each.

    Raises:
        BadFileError: the liberty file cannot be read.
        MissingDependencyError: no Yosys.
    """
    for name, design in units.library(lanes):
        yield name, Row(synthesis.synthesise(design, runs=runs, liberty=liberty), units.table_bits(design))


def make_table(
    datapath: str | Path,
    *,
    lanes: int = 1,
    liberty: Path | None = None,
    runs: int = 3,
    with_baselines: bool = True,
    progress: Callable[[int], None] | None = None,
) -> CostTable:
    """Synthesise a datapath's units and the baselines.

    Args:
        datapath: name or TOML file.
        lanes: of the PE; with 1 there is none.
        liberty: cells, for area and delay.
        runs: perturbed runs of each.
        progress: called when all is done; units take seconds to minutes.

    Raises:
        UnknownNameError, BadFileError: no such datapath, or liberty file.
        MissingDependencyError: no Yosys.
        UnsupportedError: the datapath is no hardware; the message says why.
    """
    chosen = load_datapath(datapath)
    made = units.units_of(chosen, lanes)
    beside = units.baselines(lanes) if with_baselines else {}
    found = {
        name: Row(synthesis.synthesise(design, runs=runs, liberty=liberty), units.table_bits(design))
        for name, design in (made | beside).items()
    }
    if progress:
        progress(1)
    return CostTable(
        chosen.name,
        chosen.fingerprint,
        synthesis.best().version,
        synthesis.cells_of(liberty) if liberty is not None else None,
        lanes,
        {name: found[name] for name in made},
        {name: found[name] for name in beside},
    )
