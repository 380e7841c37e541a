"""Makes the golden vectors of this folder with the oracle: `python -m tests.vectors.make`."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lnsdeploy.datapath import LogAccumulator, accumulator_to_dict
from lnsdeploy.delta import Mitchell, Table
from lnsdeploy.emulator.plan import AddPlan, DotPlan, PoolPlan, Window
from lnsdeploy.formats import LNSFormat
from tests import oracle
from tests.cases import (
    DELTAS,
    DOTS,
    delta_name,
    oracle_add,
    oracle_convolution,
    oracle_pool,
    spread,
    to_format,
    to_method,
    to_shape,
)

FOLDER = Path(__file__).parent


def _float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def _bits(value: float, double: bool) -> int:
    return int.from_bytes(struct.pack("<d" if double else "<f", value), "little")


def _inputs() -> list[int]:
    """float32 bit patterns: special values, the middle of the range, and any others that are not NaN."""
    special = [0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x3F800000, 0xBF800000]
    special += [0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x3FB504F3, 0x3FB504F4, 0x3F3504F3, 0x3F3504F4]
    middle = [(v & 0x80FFFFFF) | 0x3F000000 for v in spread(1, 40, 11, 32)[0]]
    anywhere = [v for v in spread(1, 40, 12, 32)[0] if (v >> 23) & 0xFF != 0xFF]
    return special + middle + anywhere


def encode_vectors() -> list[dict[str, Any]]:
    found = []
    for text, offset in (("8:8", -64), ("u8:8", -200), ("4:1", -3), ("12:10", -1500), ("16:1024", -16000), ("2:3", 0)):
        fmt = to_format(LNSFormat.parse(text))
        inputs = [b for b in _inputs() if fmt.signed or b < 1 << 31]
        for rounding in ("nearest", "linear", "stochastic"):
            for underflow in ("zero", "min"):
                words = [
                    oracle.encode(
                        _float(bits),
                        fmt,
                        offset,
                        rounding=rounding,
                        underflow=underflow,
                        byte=oracle.random_byte(5, 77, i),
                    )
                    for i, bits in enumerate(inputs)
                ]
                case = {"format": text, "offset": offset, "rounding": rounding, "underflow": underflow}
                found.append({**case, "seed": 5, "stream": 77, "float32": inputs, "words": words})
    return found


def decode_vectors() -> list[dict[str, Any]]:
    found = []
    for text, offset in (("8:8", -64), ("u8:8", -1300), ("6:1", 110), ("8:10", -1480), ("7:3", -3215)):
        fmt = to_format(LNSFormat.parse(text))
        words = list(range(2**fmt.bits))
        case: dict[str, Any] = {"format": text, "offset": offset, "words": words}
        for double in (False, True):
            values = [oracle.decode(word, fmt, offset, double=double) for word in words]
            case["float64" if double else "float32"] = [_bits(v, double) for v in values]
        found.append(case)
    return found


def random_vectors() -> list[dict[str, Any]]:
    keys = ((0, 0, 0), (1, 2, 5), (2**64 - 1, 2**33, 100), (7, 0, 16 * 2**32 - 8))
    return [
        {"seed": s, "stream": t, "start": n, "bytes": [oracle.random_byte(s, t, n + i) for i in range(40)]}
        for s, t, n in keys
    ]


def table_vectors() -> dict[str, Any]:
    constants = [
        {"table_bits": t, "constant_bits": m, "entries": list(oracle.remainder_table(t, m))}
        for t, m in ((0, 0), (1, 8), (3, 8), (3, 5), (5, 16))
    ]
    logs = [
        {"gamma": g, "encoder_bits": n, "entries": list(oracle.log_table(g, n))}
        for g, n in ((1, 3), (8, 5), (8, 1), (1024, 6))
    ]
    return {"constants": constants, "encoder": logs}


def delta_vectors() -> list[dict[str, Any]]:
    found = []
    for how in DELTAS:
        for gamma in (8, 10):
            method = to_method(how)
            plus = [oracle.delta(d, gamma, 1, method) for d in range(400)]
            minus = [0] + [oracle.delta(d, gamma, -1, method) for d in range(1, 400)]
            last = max((d for d in range(400) if plus[d] or minus[d]), default=-1)
            data = accumulator_to_dict(LogAccumulator(delta=how))["delta"]
            case = {"name": delta_name(how), "delta": data, "gamma_acc": gamma}
            found.append({**case, "plus": plus[: last + 2], "minus": minus[1 : last + 2]})
    return found


def _plan_data(plan: DotPlan) -> dict[str, Any]:
    return {
        "datapath": plan.datapath.to_dict(),
        "activation": str(plan.activation),
        "weight": str(plan.weight),
        "output": str(plan.output),
        "input_offset": plan.input_offset,
        "weight_offset": np.asarray(plan.weight_offset).tolist(),
        "output_offset": plan.output_offset,
        "lsb": plan.lsb,
        "acc_offset": np.asarray(plan.acc_offset).tolist(),
    }


def dot_vectors() -> list[dict[str, Any]]:
    return [
        {"name": case.name, "plan": _plan_data(case.plan()), "a": case.a, "w": case.w, "bias": case.bias}
        | {"words": case.by_oracle()}
        for case in DOTS
    ]


CONVOLUTIONS = {
    "1d": ((1, 2, 7), (2, 2, 3), Window((3,), (2,), (1, 1)), 1),
    "2d": ((1, 2, 4, 5), (2, 2, 2, 3), Window((2, 3), (1, 2), (1, 0, 0, 1)), 1),
    "2d-groups-dilated": ((1, 4, 5, 5), (4, 2, 2, 2), Window((2, 2), (1, 1), (0, 1, 1, 0), (3, 2)), 2),
    "3d": ((1, 1, 3, 3, 3), (2, 1, 2, 2, 2), Window((2, 2, 2), (1, 1, 2), (0, 0, 1, 0, 1, 0)), 1),
}


def _window_data(window: Window) -> dict[str, Any]:
    fields = ("kernel", "strides", "pads", "dilations")
    return {name: list(getattr(window, name)) for name in fields}


def _middle(shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    """Words of 8:8 within two octaves, both signs, some zero."""
    words = [0 if v % 9 == 0 else (v & 0x80) | (56 + v % 16) for v in spread(1, int(np.prod(shape)), seed)[0]]
    return np.array(words, dtype=np.uint8).reshape(shape)


def convolution_vectors() -> list[dict[str, Any]]:
    cases = {case.name: case for case in DOTS}
    found = []
    for i, (name, (x_shape, w_shape, window, groups)) in enumerate(CONVOLUTIONS.items()):
        for kind in ("bins-lanes-2", "log-lanes-3"):
            plan = cases[kind].plan()
            bias = [20 * n for n in range(w_shape[0])]
            x, w = _middle(x_shape, 2 * i), _middle(w_shape, 2 * i + 1)
            words = oracle_convolution(x, w, bias, plan, window, groups)
            case = {"name": f"{name}-{kind}", "plan": _plan_data(plan), "window": _window_data(window)}
            data = {"groups": groups, "x": x.tolist(), "w": w.tolist(), "bias": bias, "words": words.tolist()}
            found.append({**case, **data})
    return found


def _pool_data(plan: PoolPlan) -> dict[str, Any]:
    return {
        "accumulator": accumulator_to_dict(plan.accumulator),
        "input": str(plan.input),
        "output": str(plan.output),
        "input_offset": plan.input_offset,
        "output_offset": plan.output_offset,
        "acc_offset": plan.acc_offset,
        "underflow": plan.underflow,
    }


def operation_vectors() -> list[dict[str, Any]]:
    fmt = LNSFormat(5, 2)
    form = to_format(fmt)
    words = list(range(32))
    x, y = [w for w in words for _ in words], words * 32
    found: list[dict[str, Any]] = []

    def unary(name: str, run: Any, inputs: list[int] = words, **options: Any) -> None:
        found.append({"name": name, "format": str(fmt), **options, "x": inputs, "words": [run(w) for w in inputs]})

    def binary(name: str, run: Any, **options: Any) -> None:
        results = [run(a, b) for a, b in zip(x, y, strict=True)]
        found.append({"name": name, "format": str(fmt), **options, "x": x, "y": y, "words": results})

    unary("relu", lambda w: oracle.relu(w, form))
    unary("negate", lambda w: oracle.negate(w, form))
    unary("clip", lambda w: oracle.clip(w, 16 | 4, 9, form), low=16 | 4, high=9)
    binary("maximum", lambda a, b: oracle.maximum(a, b, form))
    binary("minimum", lambda a, b: oracle.minimum(a, b, form))
    offsets, forms = (3, -5, -2), (form, form, form)
    for underflow in ("zero", "min"):
        options = {"a_offset": 3, "b_offset": -5, "offset": -2, "underflow": underflow}
        binary("multiply", lambda a, b, u=underflow: oracle.multiply(a, b, forms, offsets, u), **options)
        binary("divide", lambda a, b, u=underflow: oracle.divide(a, b, forms, offsets, u), **options)
        options = {"offset": -3, "output_offset": 2, "underflow": underflow}
        positive = [*range(16), 16]
        unary("square_root", lambda w, u=underflow: oracle.square_root(w, form, form, -3, 2, u), positive, **options)
        for text, offset, out in (("7:6", -3, 0), ("4:1", -3, -2), ("u5:2", 4, 9)):
            target = to_format(LNSFormat.parse(text))
            options = {"output": text, "offset": offset, "output_offset": out, "underflow": underflow}
            unary(
                "rescale",
                lambda w, t=target, o=offset, p=out, u=underflow: oracle.rescale(w, form, t, o, p, u),
                **options,
            )
    adders = (
        LogAccumulator(bits=6, guard_bits=1),
        LogAccumulator(bits=4, delta=Table(6, 1)),
        LogAccumulator(bits=5, delta=Mitchell()),
    )
    for part in adders:
        plan = AddPlan(part, fmt, fmt, LNSFormat(6, 2), 1, -1, -3, -2)
        data = {"accumulator": accumulator_to_dict(part), "b": str(fmt), "output": "6:2", "a_offset": 1, "b_offset": -1}
        data |= {"output_offset": -3, "acc_offset": -2, "underflow": "zero"}
        results = oracle_add(np.array(x), np.array(y), plan).tolist()
        found.append({"name": "add", "format": str(fmt), **data, "x": x, "y": y, "words": results})
    window = Window((2, 3), (1, 2), (1, 1, 0, 1))
    image = np.array(spread(8, 5, 21, 5), dtype=np.uint8).reshape(1, 2, 4, 5)
    largest = oracle.pool(image, to_shape(window), lambda taps: oracle.max_of_window(taps, form))
    data = {"window": _window_data(window), "x": image.tolist()}
    found.append({"name": "max_pool", "format": str(fmt), **data, "words": largest.tolist()})
    pool = PoolPlan(LogAccumulator(bits=7, guard_bits=2, lanes=4), fmt, fmt, 0, -2, -4)
    for underflow in ("zero", "min"):
        plan_u = replace(pool, underflow=underflow)
        data |= {"plan": _pool_data(plan_u)}
        found.append({"name": "sum_window", **data, "words": oracle_pool(image, plan_u, window, False).tolist()})
        for include in (False, True):
            averages = oracle_pool(image, plan_u, window, True, include).tolist()
            found.append({"name": "average_pool", "count_include_pad": include, **data, "words": averages})
    return found


def build() -> dict[str, Any]:
    """File name to content."""
    return {
        "encode.json": encode_vectors(),
        "decode.json": decode_vectors(),
        "random.json": random_vectors(),
        "tables.json": table_vectors(),
        "delta.json": delta_vectors(),
        "dot.json": dot_vectors(),
        "convolution.json": convolution_vectors(),
        "operations.json": operation_vectors(),
    }


def text_of(content: Any) -> str:
    """One case a line, so that a change is a readable difference."""
    if isinstance(content, dict):
        rows = [f"{json.dumps(key)}: {text_of(value).rstrip()}" for key, value in content.items()]
        return "{\n" + ",\n".join(rows) + "\n}\n"
    return "[\n" + ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in content) + "\n]\n"


if __name__ == "__main__":
    for name, content in build().items():
        (FOLDER / name).write_text(text_of(content), encoding="utf-8")
        print(f"{name}: {(FOLDER / name).stat().st_size} bytes")
