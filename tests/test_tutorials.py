"""The tutorials run as they are written.

Of each page, in order: a block ```` ```toml NAME ```` or ```` ```python NAME ```` is written to the file NAME, a
block ```` ```sh ```` is run by a shell that stops at the first failure, in a folder of the page's own. Blocks
```` ```sh gpu ```` and ```` ```text ```` are not run.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "tutorials"
# What a page needs beyond the tests' own: modules, programs.
NEEDS: dict[str, tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]] = {
    "first-steps.md": (("torch", "onnxruntime"), ()),
    "float-onnx-to-rtl.md": (("torch", "onnxruntime"), (("make",), ("iverilog", "verilator"))),
    "own-adder.md": (("torch", "onnxruntime"), (("make",), ("iverilog", "verilator"))),
    "co-design-study.md": (
        ("torch", "onnxruntime", "optuna", "plotly", "ml_dtypes"),
        (("make",), ("iverilog", "verilator")),
    ),
    "full-size-gpu.md": (("torch",), ()),
}
BLOCK = re.compile(r"^```(\w+)(?: ([\w.-]+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.skipif(not FOLDER.is_dir(), reason="only in the source tree")
def test_every_tutorial_is_run():
    assert {page.name for page in FOLDER.glob("*.md")} == set(NEEDS)
    for name in NEEDS:
        found = blocks(FOLDER / name)
        assert any(kind == "sh" and not mark for kind, mark, _ in found), name
        for kind, mark, _ in found:
            assert kind in ("sh", "python", "toml", "text"), f"{name}: a block of {kind} would not be run"
            assert mark in ("", "gpu") if kind == "sh" else bool(mark) == (kind != "text"), (name, kind, mark)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_tutorial_runs_as_written(name, tmp_path):
    modules, programs = NEEDS[name]
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    for choice in programs:
        if not any(shutil.which(program, path=here) for program in choice):
            pytest.skip(f"none of {', '.join(choice)} is installed")
    environment = {**os.environ, "PATH": here, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if shutil.which("iverilog"):
        environment["SIM"] = "icarus"  # builds in an instant, where Verilator compiles C++ for half a minute
    for kind, mark, text in blocks(FOLDER / name):
        if kind == "sh" and not mark:
            done = subprocess.run(
                ["bash", "-ec", text], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        elif kind in ("toml", "python"):
            (tmp_path / mark).write_text(text, encoding="utf-8")
