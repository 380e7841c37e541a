"""A liberty file of few cells, whose delays are round numbers."""

from __future__ import annotations

SETUP, CLOCK_TO_Q = 0.25, 0.5
# name: function, area, delay of every arc
GATES = {
    "INV": ("!A", 2, 1.0),
    "BUF": ("A", 4, 2.0),
    "NAND2": ("!(A & B)", 4, 1.0),
    "NOR2": ("!(A | B)", 4, 3.0),
}


def _table(kind: str, value: float) -> str:
    row = f'"{value}, {value}"'
    return f"{kind} (grid) {{ values ({row}, {row}); }}"


def _arc(related: str, sense: str, delay: float, kind: str = "combinational") -> str:
    tables = [_table(name, delay) for name in ("cell_rise", "cell_fall")]
    tables += [_table(name, 0.1) for name in ("rise_transition", "fall_transition")]
    return (
        f'timing () {{ related_pin : "{related}"; timing_sense : {sense}; timing_type : {kind}; '
        + " ".join(tables)
        + "}"
    )


def _gate(name: str, function: str, area: int, delay: float) -> str:
    inputs = [pin for pin in "AB" if pin in function]
    sense = "negative_unate" if function.startswith("!") else "positive_unate"
    pins = "".join(f"pin ({pin}) {{ direction : input; capacitance : 0.01; }}\n" for pin in inputs)
    arcs = "\n".join(_arc(pin, sense, delay) for pin in inputs)
    output = f'pin (Y) {{ direction : output; function : "{function}"; max_capacitance : 100; {arcs} }}'
    return f"cell ({name}) {{ area : {area};\n{pins}{output} }}\n"


def _checks(edge: str) -> str:
    row = f'"{SETUP}, {SETUP}"'
    return f"{edge}_constraint (checks) {{ values ({row}, {row}); }}"


def _register() -> str:
    setup = f'timing () {{ related_pin : "CLK"; timing_type : setup_rising; {_checks("rise")} {_checks("fall")} }}'
    arc = _arc("CLK", "non_unate", CLOCK_TO_Q, "rising_edge")
    return f"""cell (DFF) {{ area : 16;
ff (IQ, IQN) {{ next_state : "D"; clocked_on : "CLK"; }}
pin (CLK) {{ direction : input; clock : true; capacitance : 0.01; }}
pin (D) {{ direction : input; capacitance : 0.01; {setup} }}
pin (Q) {{ direction : output; function : "IQ"; max_capacitance : 100; {arc} }}
}}
"""


def _template(name: str, first: str, second: str) -> str:
    axes = f'variable_1 : {first}; variable_2 : {second}; index_1 ("0, 10"); index_2 ("0, 100");'
    return f"lu_table_template ({name}) {{ {axes} }}\n"


def liberty(unit: str = "1ns") -> str:
    """Its text; times are in `unit`."""
    templates = _template("grid", "input_net_transition", "total_output_net_capacitance")
    templates += _template("checks", "constrained_pin_transition", "related_pin_transition")
    gates = "".join(_gate(name, *gate) for name, gate in GATES.items())
    return f"""library (round_numbers) {{
delay_model : table_lookup;
time_unit : "{unit}";
voltage_unit : "1V";
current_unit : "1mA";
capacitive_load_unit (1, pf);
{templates}{gates}{_register()}}}
"""
