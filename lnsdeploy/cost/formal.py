"""Formal equality by decision diagrams and SAT, for all inputs (docs/cost.md).

Of the netlist that synthesis makes with the reference's table, or with the text that was simulated.

``python -m lnsdeploy.cost.formal`` proves the multiplier and the adder of every Δ method, of 6 bits or ``--bits 8``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import click

from lnsdeploy.cost.synthesis import GATES, run_script
from lnsdeploy.errors import BadValueError, CheckFailedError, LNSError
from lnsdeploy.rtl import check
from lnsdeploy.rtl.designs import Design, combinational_head
from lnsdeploy.rtl.simulate import texts_of
from lnsdeploy.rtl.vectors import Vectors

# What makes a circuit of a text without optimising it.
_PLAIN = ("hierarchy -check -top lns_dut", "proc", "flatten", "memory", "opt_clean", "delete */t:$scopeinfo")

# A decision diagram of each difference, of which there is but one: a constant where there is none.
_COLLAPSE = ("techmap", "opt -fast", "abc -g AND -script +strash;collapse;strash;map", "opt_clean")

_TABLE = """\
  logic [{out_bits}-1:0] words[0:{last}];
  initial $readmemh("words.txt", words);
  assign out_o = words[in_i];
endmodule
"""


def _records(data: bytes, bits: int, count: int) -> list[int]:
    size = -(-bits // 8)
    return [int.from_bytes(data[i * size : (i + 1) * size], "big") for i in range(count)]


def _table_files(design: Design, made: Vectors) -> dict[str, str | bytes]:
    """A design that looks up what the reference gave."""
    bits = sum(width for _, width in design.inputs)
    inputs = _records(made.inputs, bits, made.count)
    outputs = dict(zip(inputs, _records(made.expected, design.output_bits, made.count), strict=True))
    if len(outputs) != 1 << bits:
        raise BadValueError(f"{design.name}: a proof needs all {1 << bits} inputs, and {len(outputs)} are given")
    words = "".join(f"{outputs[key]:x}\n" for key in range(1 << bits))
    text = combinational_head("the reference's outputs", bits, design.output_bits)
    text += _TABLE.format(out_bits=design.output_bits, last=(1 << bits) - 1)
    return {"table.sv": text, "words.txt": words}


def _prove(name: str, sides: Mapping[str, tuple[Mapping[str, str | bytes], Sequence[str]]]) -> None:
    files: dict[str, str | bytes] = {}
    lines = []
    for side, (texts, steps) in sides.items():
        # words are read by the name that the text says
        named = {(file if file == "words.txt" else f"{side}_{file}"): text for file, text in texts.items()}
        files |= named
        sources = " ".join(file for file in named if file != "words.txt")
        lines += ["design -reset", f"read_verilog -sv {sources}", *steps, f"rename lns_dut {side}"]
        lines.append(f"design -stash {side}")
    lines += [
        "design -copy-from gold -as gold gold",
        "design -copy-from gate -as gate gate",
        "miter -equiv -flatten gold gate miter",
        "hierarchy -top miter",
        *_COLLAPSE,
        "sat -verify -prove trigger 0 -show-inputs miter",
    ]
    try:
        run_script("\n".join(lines) + "\n", files, [])
    except LNSError as error:
        if "proof did fail" in str(error) or "model found" in str(error):
            raise CheckFailedError(f"{name}: the netlist differs for some input") from error
        raise


def prove(design: Design, *, against: Design | Vectors | None = None) -> None:
    """Prove what the netlist of a combinational design computes, the one that its cost is counted of.

    Two seconds for an adder of 6 bits, twenty for one of 8.

    Args:
        design: it.
        against: the reference's outputs of every input, another design, or None for the design's own text.

    Raises:
        CheckFailedError: an input is found for which they differ.
        BadValueError: an input's output is not given.
        MissingDependencyError: no Yosys.
    """
    if isinstance(against, Vectors):
        gold = _table_files(design, against)
    else:
        gold = dict(texts_of(against or design))
    _prove(design.name, {"gate": (texts_of(design), GATES), "gold": (gold, _PLAIN)})


@click.command()
@click.option("--bits", type=click.Choice(("6", "8")), default="6", show_default=True, help="Of a word.")
def main(bits: str) -> None:
    """Prove that netlists of the multiplier and of the adder of every Δ method are the reference's tables."""
    start = time.perf_counter()
    for comparison in check.exhaustive_units(int(bits)):
        prove(comparison.design, against=comparison.vectors())
        click.echo(f"{time.perf_counter() - start:8.1f} s  {comparison.design.name:<36} proved")


if __name__ == "__main__":
    main()
