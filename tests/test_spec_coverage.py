"""Every numbered paragraph of docs/datapath.md is cited where it is done and where it is tested, as `spec 4.3`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPECIFICATION = ROOT / "docs" / "datapath.md"

# "spec 5.2", "(spec 2.1, 2.2)", "spec 4.1 to 4.3", "spec 2.1 and 2.4"
_NUMBER = r"\d+(?:\.\d+)+"
_CITATION = re.compile(rf"\b[Ss]pec ({_NUMBER}(?:(?:, | and | to |, and ){_NUMBER})*)")


def paragraphs() -> list[str]:
    """The numbers of the specification's paragraphs, in order: bold at the head of their text."""
    return re.findall(rf"\*\*({_NUMBER})\b", SPECIFICATION.read_text(encoding="utf-8"))


def cited(files: Iterable[Path]) -> set[str]:
    """The numbers that some comment or docstring cites; a range cites what lies within it too."""
    order = paragraphs()
    found: set[str] = set()
    for file in files:
        for match in _CITATION.finditer(re.sub(r"\s+(?:# ?)?", " ", file.read_text(encoding="utf-8"))):
            numbers = re.findall(_NUMBER, match[1])
            found.update(numbers)
            for first, last in re.findall(rf"({_NUMBER}) to ({_NUMBER})", match[1]):
                if first in order and last in order:
                    found.update(order[order.index(first) : order.index(last) + 1])
    return found


def test_the_specification_is_numbered() -> None:
    found = paragraphs()
    assert len(found) == len(set(found)) > 45
    assert {"1.1", "4.3", "5.7.10", "7.3", "9.1"} <= set(found)


def _tests() -> list[Path]:
    every = sorted((ROOT / "tests").rglob("*.py"))
    return [path for path in every if path.name.startswith("test_") and path != Path(__file__).resolve()]


def test_citations_name_paragraphs_that_exist() -> None:
    """A renumbered paragraph takes its citations with it."""
    files = [*sorted((ROOT / "lnsdeploy").rglob("*.py")), *_tests(), ROOT / "tests" / "oracle.py"]
    known = set(paragraphs())
    stale = {str(file.relative_to(ROOT)): sorted(cited([file]) - known) for file in files}
    assert not {name: numbers for name, numbers in stale.items() if numbers}


@pytest.mark.parametrize("where", ["lnsdeploy", "tests", "oracle"])
def test_every_paragraph_is_cited(where: str) -> None:
    """By code, a test and the oracle; 6.6, 6.7, 7.2, 7.3 and 8 are no arithmetic of one word, so not by this."""
    if where == "lnsdeploy":
        files: list[Path] = sorted((ROOT / "lnsdeploy").rglob("*.py"))
    elif where == "tests":
        files = _tests()
    else:
        files = [ROOT / "tests" / "oracle.py"]
    found = cited(files)
    missing = [number for number in paragraphs() if number not in found]
    if where == "oracle":
        missing = [number for number in missing if number not in ("6.6", "6.7", "7.2", "7.3", "8.1", "8.2", "9.1")]
    assert not missing, f"paragraphs that nothing in {where} cites as 'spec N.N': {', '.join(missing)}"


def test_the_oracle_is_independent() -> None:
    """spec 9.1 and all others are read twice: the oracle imports nothing of lnsdeploy."""
    text = (ROOT / "tests" / "oracle.py").read_text(encoding="utf-8")
    imports = re.findall(r"^(?:from|import) (\S+)", text, flags=re.MULTILINE)
    assert imports
    assert not [name for name in imports if name.startswith(("lnsdeploy", "tests"))]
