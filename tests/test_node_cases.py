"""ONNX's own test cases of operators: a slice of `python -m benchmarks.node_cases`, and the page that it writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.node_cases import cases_of, markdown, run
from lnsdeploy.exporters.lower import SUPPORTED

PAGE = Path(__file__).parent.parent / "docs" / "node-cases.md"
QUICK = ("Relu", "Gemm", "Flatten", "GlobalAveragePool")


def rows(text):
    return {line.split("|")[1].strip(): line for line in text.splitlines() if re.match(r"\| \w+ \| \d", line)}


# the cases run once, in one process
pytestmark = pytest.mark.xdist_group("node cases")


@pytest.fixture(scope="module")
def outcomes():
    return run(QUICK)


def test_no_case_is_wrong(outcomes):
    assert [outcome for outcome in outcomes if outcome.state == "wrong"] == []
    passed = {outcome.operator for outcome in outcomes if outcome.state == "passed"}
    assert passed == set(QUICK), "an operator that lowering claims passes at least one of its cases"


def test_the_page_is_what_the_command_prints(outcomes):
    written, made = rows(PAGE.read_text(encoding="utf-8")), rows(markdown(outcomes))
    assert made
    for operator, line in made.items():
        # the last bit of a ratio may differ between machines, as float nets do
        assert written[operator].split("|")[:5] == line.split("|")[:5], operator


def test_the_page_names_every_operator_that_has_cases():
    written = rows(PAGE.read_text(encoding="utf-8"))
    assert set(written) == {operator for operator in SUPPORTED if cases_of(operator)}
