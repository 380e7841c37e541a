"""Every command that a page prints can be typed today, and every measured table and figure has one beside it.

Nothing is trained here: commands are read by the parsers that they would reach. What they print is compared
with the pages where that is cheap (tables of bounds, operators, node cases, tutorials), by tests of their own.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from lnsdeploy.cli import cli
from lnsdeploy.datapath import named_datapaths
from lnsdeploy.errors import LNSError
from lnsdeploy.evaluation import shards
from lnsdeploy.training import trainer

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")],
)
PROGRAMS = ("lnsdeploy", "python", "torchrun", "taskset", "make", "pip", "pytest")
# What a reader fills in: DIR, MODEL.onnx|RUN.
PLACEHOLDER = re.compile(r"[A-Z]+(\.\w+)?(\|[A-Z]+(\.\w+)?)*")


@dataclass(frozen=True)
class Command:
    """A command of a page, by the heading it stands under; `whole` if it stands in a block of its own."""

    page: str
    line: int
    section: str
    text: str
    whole: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def commands(page: Path) -> Iterator[Command]:
    """Commands of a page: lines of its blocks, and spans of code in its text, that begin with a program."""
    name = str(page.relative_to(ROOT))
    block: str | None = None
    section = ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            block = None if block is not None else line[3:].strip()
            continue
        if block is None and line.startswith("#"):
            section = line.lstrip("# ")
        if block is not None:
            # blocks of a language are programs and files, not what is typed
            found = [line] if block.split(" ")[0] in ("", "sh", "shell", "console", "fail") else []
        else:
            found = re.findall(r"`([^`]+)`", line)
        for text in found:
            for part in text.split("&&"):
                # settings of the environment stand before a program
                typed = re.sub(r"^([A-Z_]+=\S+ )+", "", part.strip())
                if typed.split(" ")[0] in PROGRAMS and " " in typed:
                    yield Command(name, number, section, typed, block is not None)


ALL = [command for page in PAGES for command in commands(page)]


# How a command can fail to be read.
WRONG = (LNSError, AssertionError, ImportError, click.ClickException, SystemExit, ValueError)


class _Read(Exception):
    """A command was read, and need not be run."""


# what click's parser has for an option that was not given; None before it had a name
_UNSET = getattr(click.core, "UNSET", None)
_parse_args = argparse.ArgumentParser.parse_args


def check_click(command: click.Command, words: list[str], whole: bool) -> None:
    """Options are the command's, values are of their types; in a block nothing required is missing."""
    ctx = click.Context(command, info_name=command.name)
    values, rest, _ = command.make_parser(ctx).parse_args(list(words))
    assert not rest, f"arguments left over: {rest}"
    for parameter in command.params:
        value = values.get(parameter.name or "")
        missing = value is None or value == () or value is _UNSET
        assert not (whole and parameter.required and missing), f"{parameter.name} is missing"
        if missing or isinstance(parameter.type, click.Path):
            continue
        several = isinstance(value, tuple | list)
        given = [v for v in (value if several else [value]) if not PLACEHOLDER.fullmatch(str(v)) and v != "…"]
        for one in given:
            parameter.type.convert(one, parameter, ctx)
            if parameter.name == "datapath" and not str(one).endswith(".toml"):
                assert one in named_datapaths(), f"no datapath is named {one}"


def check_module(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in Python: it is there, and its parser takes the words."""
    loaded = importlib.import_module(module)
    verbs = [value for value in vars(loaded).values() if isinstance(value, click.Command)]
    if module == "lnsdeploy":
        check_lnsdeploy(words, True, monkeypatch)
    elif verbs:
        check_click(verbs[0], words, True)
    elif "argparse" in Path(loaded.__file__ or "").read_text(encoding="utf-8") or hasattr(loaded, "parser_of"):

        def parse(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
            _parse_args(self, words, namespace)
            raise _Read

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(_Read):
            loaded.main()
    else:
        # a program that counts its arguments itself tells them in its first lines
        assert hasattr(loaded, "main")
        assert not any(word.startswith("-") for word in words)


def check_lnsdeploy(words: list[str], whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb of the command line, with its options; a training's become a whole config."""
    if words[0] in ("--help", "-h", "--version"):
        return
    assert words[0] in cli.commands, f"there is no verb {words[0]}"
    check_click(cli.commands[words[0]], words[1:], whole)
    if words[0] != "train" or not whole:
        return

    def read(*_: Any, **__: Any) -> None:
        raise _Read

    monkeypatch.setattr(trainer, "train", read)
    monkeypatch.setattr(shards, "device_of", lambda device, _: device)
    if "--init-from" in words:
        # a run that is not there
        where = words.index("--init-from")
        words = words[:where] + words[where + 2 :]
    with pytest.raises(_Read):
        cli.main(words, standalone_mode=False)


def check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise where the command could not be typed."""
    words = shlex.split(command.text, comments=True)
    if words[0] == "taskset":
        words = words[words.index("python") if "python" in words else len(words) :]
    if words and words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    # what is left out at the end is told elsewhere
    whole = command.whole and "…" not in words
    words = [word for word in words if word != "…"]
    if not words:
        return
    if words[0] == "lnsdeploy":
        check_lnsdeploy(words[1:], whole, monkeypatch)
    elif words[0] == "python":
        if words[1] == "-m":
            check_module(words[2], words[3:], monkeypatch)
        elif (ROOT / words[1]).exists():
            check_module(words[1].removesuffix(".py").replace("/", "."), words[2:], monkeypatch)
        else:
            # a file that the page itself gives
            assert f"```python {words[1]}" in (ROOT / command.page).read_text(encoding="utf-8"), "there is no such file"
    elif words[0] == "make":
        ours, exported = (
            set(re.findall(r"^([a-z]+):", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))
            for file in ("Makefile", "lnsdeploy/exporters/rtl.py")
        )
        if words[1] == "-C":
            # check and lint are made for single units too
            target, _, unit = words[3].partition("-")
            assert target in (("check", "lint") if unit else exported), f"exported hardware has no target {words[3]}"
        else:
            # in a text that speaks of exported hardware its targets are meant
            assert words[1] in (ours if command.whole else ours | exported), f"the Makefile has no target {words[1]}"
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        for names in re.findall(r"(?:lnsdeploy|\.)\[([\w,]+)\]", command.text):
            assert set(names.split(",")) <= set(extras), f"there are no extras {names}"
    elif words[0] == "pytest":
        assert (ROOT / words[1]).exists(), f"there is no {words[1]}"


def test_commands_are_found() -> None:
    """Or the test below would hold of nothing."""
    found = [command for page in PAGES for command in commands(page)]
    assert len(found) > 120
    assert {c.text.split(" ")[0] for c in found} == set(PROGRAMS)
    assert sum(c.whole for c in found) > 50


@pytest.mark.parametrize(
    "text",
    [
        "lnsdeploy trian --out run",
        "lnsdeploy train --dataset digits --out run",
        "lnsdeploy train --augment shift --out run",
        "lnsdeploy train --bits 8 --weights 8-8 --out run",
        "lnsdeploy train --optimizer lion --out run",
        "lnsdeploy train --data digits",
        "lnsdeploy emulate m.onnx --datapath gauss-9",
        "lnsdeploy emulate m.onnx --limit 0",
        "python -m benchmarks.gem",
        "python -m benchmarks.gemm --line log-8",
        "python -m examples.paper.gan --seeds three --out gan",
        "python -m lnsdeploy.studies.bounds --updat docs/accuracy.md",
        "python examples/torch_to_ln.py",
        "torchrun --nproc_per_node 2 -m lnsdeploy train --epoch 1 --out run",
        "make instal",
        "pip install 'lnsdeploy[everything]'",
    ],
)
def test_what_cannot_be_typed_is_noticed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WRONG):
        check(Command("README.md", 1, "", text, True), monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_printed_commands_can_be_typed(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = []
    for command in commands(page):
        try:
            check(command, monkeypatch)
        except WRONG as error:
            wrong.append(f"{command}: {error}")
    assert not wrong, "\n".join(wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Figures and tables

# Pages that one command writes as a whole, or between markers; it stands at their beginning.
WRITTEN = ("docs/accuracy.md",)
NUMBER = re.compile(r"[~<≤+−-]?[\d.,]+(·10\S+)?( ?(±|–|,|of|…) ?[\d.,]+)*( ?(%|dB|ms|s|GB|MB|points))?")


def sections(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Headings of a page, each with the lines down to the next."""
    heading, lines, fenced = "", [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("#") and not fenced:
            yield heading, lines
            heading, lines = line.lstrip("# "), []
        lines.append(line)
    yield heading, lines


def measured(lines: list[str]) -> bool:
    """Whether there is a table of which a third and more is numbers: settings and names are not so many."""
    rows = [[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    cells = [cell for row in rows for cell in row[1:] if cell and not set(cell) <= set("-: ")]
    return len(cells) > 3 and sum(bool(NUMBER.fullmatch(cell)) for cell in cells) > len(cells) / 3


def test_tables_of_numbers_stand_beside_the_command_that_printed_them() -> None:
    seen = 0
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        printers = [c for c in commands(page) if c.text.startswith(("lnsdeploy", "python", "make", "taskset"))]
        for heading, lines in sections(page):
            if measured(lines):
                seen += 1
                assert any(c.section == heading or name in WRITTEN for c in printers), (
                    f"{name}: no command under “{heading}”, where there is a table of figures"
                )
    assert seen > 15


def test_every_picture_is_made_by_the_command_above_it() -> None:
    """A page shows it, and the experiment that stands above writes a picture of this name."""
    pictures = {path.name for path in (ROOT / "docs" / "figures").iterdir()}
    shown = set()
    for page in PAGES:
        for heading, lines in sections(page):
            for line in lines:
                for path in re.findall(r"!\[[^\]]+\]\((?:\S*/)?figures/(\S+)\)", line):
                    shown.add(path)
                    modules = [
                        shlex.split(c.text)[2] for c in commands(page) if c.section == heading and " -m " in c.text
                    ]
                    sources = [(ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8") for module in modules]
                    assert any(re.search(rf'\bwrite\(\s*options\.out,\s*"{Path(path).stem}"', s) for s in sources), path
    assert shown == pictures
    assert pictures
