"""Formal equality: the netlist that synthesis makes, and the text that was simulated, for all inputs (docs/cost.md)."""

from __future__ import annotations

from lnsdeploy.cost.synthesis import GATES, run_script
from lnsdeploy.errors import CheckFailedError, LNSError
from lnsdeploy.rtl.designs import Design
from lnsdeploy.rtl.simulate import texts_of


def prove(design: Design, *, against: Design | None = None) -> None:
    """Prove that a combinational design's netlist computes what its text says (or what another's does), by SAT.

    Seconds for an adder of 6 bits, about a minute for one of 8.

    Raises:
        CheckFailedError: an input is found for which they differ.
        MissingDependencyError: no Yosys.
    """
    files: dict[str, str | bytes] = {}
    lines = []
    for name, one in (("gate", design), ("gold", against or design)):
        texts = texts_of(one)
        files |= {f"{name}_{file}": text for file, text in texts.items()}
        lines += [
            "design -reset",
            f"read_verilog -sv {' '.join(f'{name}_{file}' for file in texts)}",
            *(
                GATES
                if name == "gate"
                else [
                    "hierarchy -check -top lns_dut",
                    *("proc", "flatten", "memory", "opt_clean"),
                    "delete */t:$scopeinfo",
                ]
            ),
            "rename lns_dut " + name,
            f"design -stash {name}",
        ]
    lines += [
        "design -copy-from gold -as gold gold",
        "design -copy-from gate -as gate gate",
        "miter -equiv -flatten gold gate miter",
        "hierarchy -top miter",
        "sat -verify -prove trigger 0 -show-inputs miter",
    ]
    try:
        run_script("\n".join(lines) + "\n", files, [])
    except LNSError as error:
        if "proof did fail" in str(error) or "model found" in str(error):
            raise CheckFailedError(f"{design.name}: the netlist differs for some input") from error
        raise
