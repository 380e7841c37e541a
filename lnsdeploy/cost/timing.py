"""Delay in a library's cells, by OpenSTA, where it is on the PATH (docs/cost.md).

Ideal clock, inputs that switch at once at its edge, outputs without load, no wires: a lower bound that compares units
mapped to the same cells.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lnsdeploy.errors import LNSError

HOW_TO_GET_ONE = "no delay: OpenSTA (sta) is not on the PATH; Debian has it as opensta"

# Any: what is told is the period less the slack.
_PERIOD = 1
_SCRIPT = f"""\
read_liberty cells.lib
read_verilog netlist.v
link_design lns_dut
create_clock -name clk -period {_PERIOD} [get_ports clk_i]
set_input_delay 0 -clock clk [get_ports {{rst_ni in_valid_i in_i out_ready_i}}]
set_output_delay 0 -clock clk [get_ports {{in_ready_o out_valid_o out_o}}]
report_checks -path_delay max -digits 5
"""


@dataclass(frozen=True)
class OpenSTA:
    """The tool: where it is, and its version."""

    command: str
    version: str


@lru_cache(maxsize=1)
def find() -> OpenSTA | None:
    """OpenSTA of the PATH; None where there is none, or another program of that name."""
    command = shutil.which("sta")
    if command is None:
        return None
    done = subprocess.run([command, "-version"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    version = done.stdout.split()
    if done.returncode or not version or not re.fullmatch(r"\d+\.\d+(\.\d+)?", version[0]):
        return None
    return OpenSTA(command, f"OpenSTA {version[0]}")


def unit_of(liberty: str) -> str:
    """The unit that a liberty file's times are in.

    Args:
        liberty: its text.
    """
    found = re.search(r'time_unit\s*:\s*"?\s*([\d.]+\s*[munpf]?s)\s*"?', liberty)
    return found.group(1).removeprefix("1").strip() if found else "ns"


def shortest_period(netlist: str, liberty: bytes) -> float:
    """The shortest clock period that a mapped netlist allows, in the liberty file's unit of time.

    Args:
        netlist: structural Verilog of `lns_dut`.
        liberty: its cells.
    Returns: the longest way from a register or an input to a register or an output, with what registers take; 0 where
        no output depends on an input.

    Raises:
        LNSError: there is no OpenSTA, or it fails; the message has its last words.
    """
    tool = find()
    if tool is None:
        raise LNSError(HOW_TO_GET_ONE)
    with tempfile.TemporaryDirectory(prefix="lnsdeploy-") as scratch:
        folder = Path(scratch)
        (folder / "cells.lib").write_bytes(liberty)
        (folder / "netlist.v").write_text(netlist)
        (folder / "timing.tcl").write_text(_SCRIPT)
        done = subprocess.run(
            [tool.command, "-no_init", "-no_splash", "-exit", "timing.tcl"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            check=False,
        )
    slack = re.search(r"(-?\d+\.\d+)\s+slack \(", done.stdout)
    if slack is not None:
        return _PERIOD - float(slack.group(1))
    # it exits with 0 whatever went wrong
    if done.returncode == 0 and "No paths found" in done.stdout:
        return 0.0
    raise LNSError(f"{tool.version} failed: {' '.join(done.stdout.split())[-400:] or 'it said nothing'}")
