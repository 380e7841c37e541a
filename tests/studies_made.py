"""Results of a study as ``lnsdeploy study`` writes them, made up; the same every time."""

from __future__ import annotations

import math
import random

LAYERS = {
    "mlp": ["layers.0", "layers.2", "layers.4"],
    "cnn": ["features.0", "features.3", "features.6", "classifier"],
}
FLOAT = {"mlp": 0.978, "cnn": 0.987}


def _interval(share, count=360):
    """Wilson's, at 95 %."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def make_study(nets=("mlp", "cnn"), widths=range(3, 9), seed=3):
    """Two nets, LNS points over widths, accumulation and Δ methods, every baseline, a pruned and a failed point."""
    rng = random.Random(seed)
    points = []

    def add(**fields):
        points.append({"id": len(points), "state": "complete", "reason": None, "pareto": False, **fields})
        return points[-1]

    for net in nets:
        top = FLOAT[net]
        for label, kind, transistors, loss in (
            ("float32", "float32", 38_000, 0.0),
            ("int8", "int", 3_240, 0.1),
            ("int4", "int", 1_130, 9.0),
            ("fp8 e4m3", "fp8", 3_900, 0.2),
            ("fp8 e5m2", "fp8", 3_350, 0.7),
        ):
            share = round((top - loss / 100) * 360) / 360
            add(
                kind=kind,
                label=label,
                net=net,
                parameters={},
                format=label,
                datapath="",
                description="",
                datapath_toml="",
                fingerprint=f"{kind}-{net}",
                values={
                    "accuracy": share,
                    "sqnr_db": None if kind == "float32" else 35.0 - 3 * loss,
                    "transistors": transistors,
                    "depth": 40 + transistors // 200,
                    "table_bits": 0,
                    "energy": transistors / 900,
                    "size_bytes": 40_000,
                },
                ranges={"accuracy": _interval(share)},
                breakdown={
                    "multiplier": 0.7 * transistors,
                    "tables": 0,
                    "accumulator": 0.25 * transistors,
                    "converters": 0.05 * transistors,
                },
                layers=[]
                if kind == "float32"
                else [{"name": n, "sqnr_db": 33 - 3 * loss - 2 * i} for i, n in enumerate(LAYERS[net])],
                command=f"lnsdeploy study study.toml --only {label.replace(' ', '-')} --net {net}",
            )
        for bits in widths:
            gamma = 2 ** max(bits - 5, 0)
            for accumulate, method in (
                ("linear", "none"),
                ("log", "exact"),
                ("log", "table"),
                ("log", "mitchell"),
                ("log", "max-plus"),
            ):
                for width in (16, 24) if accumulate == "linear" else (0, 2):
                    loss = 45 * 2.2 ** (3 - bits) * 0.3 + {"none": 0, "exact": 0.3, "table": 0.6}.get(method, 2.5)
                    loss += 20 if method == "max-plus" else 0
                    loss += 0.4 if width in (16, 0) else 0
                    share = round(max(0.1, top - loss / 100 + rng.gauss(0, 0.002)) * 360) / 360
                    parts = {
                        "multiplier": 30 * bits,
                        "tables": {"none": 14 * gamma, "exact": 60 * gamma, "table": 30 * gamma}.get(method, 0),
                        "accumulator": 30 * width if accumulate == "linear" else 46 * (bits + width),
                        "converters": 90 * bits if accumulate == "linear" else 0,
                    }
                    name = f"{accumulate}-{method}-{bits}-{width}"
                    point = add(
                        kind="lns",
                        label=f"{bits}:{gamma} {accumulate} {method} {width}",
                        net=net,
                        parameters={
                            "bits": bits,
                            "gamma": gamma,
                            "accumulate": accumulate,
                            "delta": method,
                            "accumulator_bits": width,
                            "lanes": 1,
                        },
                        format=f"{bits}:{gamma}",
                        datapath=name,
                        description=f"{accumulate}, {method}",
                        datapath_toml=f'name = "{name}"\nweight = "{bits}:{gamma}"\n\n[accumulate]\n'
                        f'kind = "{accumulate}"\n',
                        fingerprint=f"{random.Random(name).getrandbits(64):016x}",
                        values={
                            "accuracy": share,
                            "sqnr_db": 5.5 * math.log2(gamma * 4) - loss / 4,
                            "transistors": sum(parts.values()),
                            "depth": 12 + bits + 6 * (accumulate == "log"),
                            "table_bits": gamma * 8,
                            "energy": sum(parts.values()) / 1000,
                            "size_bytes": 5_000 * bits,
                        },
                        ranges={
                            "accuracy": _interval(share),
                            "transistors": [0.93 * sum(parts.values()), 1.08 * sum(parts.values())],
                        },
                        breakdown=parts,
                        layers=[
                            {"name": n, "sqnr_db": 6 * math.log2(gamma * 4) - 2 * i - loss / 3}
                            for i, n in enumerate(LAYERS[net])
                        ],
                        command=f"lnsdeploy emulate runs/{net}-{bits} --datapath points/{name}.toml",
                    )
                    if share < 0.75:
                        point.update(state="infeasible", reason="accuracy below 75 %")
        lns = [p for p in points if p["net"] == net and p["kind"] == "lns" and p["state"] == "complete"]
        for p in lns:
            value = p["values"]
            p["pareto"] = not any(
                q["values"]["accuracy"] >= value["accuracy"]
                and q["values"]["transistors"] <= value["transistors"]
                and q["values"] != value
                and (q["values"]["accuracy"], q["values"]["transistors"]) != (value["accuracy"], value["transistors"])
                for q in lns
            )
        for state, reason in (
            ("pruned", "accuracy of 64 images is 31.25 %, below the 60 % asked for"),
            ("failed", "BadValueError: a table of 2^9 entries is larger than its format allows"),
        ):
            add(
                kind="lns",
                label=f"2:1 linear, {state}",
                net=net,
                state=state,
                reason=reason,
                parameters={"bits": 2, "gamma": 1, "accumulate": "linear", "delta": "none"},
                format="2:1",
                datapath="",
                description="",
                datapath_toml="",
                fingerprint="",
                values={"accuracy": 0.3125} if state == "pruned" else {},
                ranges={},
                breakdown={},
                layers=[],
                command="",
            )

    tables = []
    gamma = 8
    d = list(range(41))
    exact = [gamma * math.log2(1 + 2 ** (-i / gamma)) for i in d]
    for label, made in (
        ("exact, rounded", [round(v) for v in exact]),
        ("Mitchell", [max(0, round(gamma * 2 ** (-(i // gamma)) * (1 - (i % gamma) / gamma / 2))) for i in d]),
        ("max-plus", [0] * len(d)),
    ):
        ulp = [a - b for a, b in zip(made, exact, strict=True)]
        tables.append({"label": label, "gamma": gamma, "d": d, "approximation": made, "exact": exact, "ulp": ulp})
    histograms = []
    for layer in LAYERS[nets[-1]]:
        for kind, centre in (("weights", 70), ("activations", 95)):
            codes = list(range(128))
            counts = [int(5000 * math.exp(-(((c - centre) / 18) ** 2)) * rng.uniform(0.8, 1.2)) for c in codes]
            histograms.append({"layer": layer, "kind": kind, "codes": codes, "counts": counts})
    return {
        "study": {
            "name": "Digits: which adder, how many bits",
            "fingerprint": "5d1f0a77c2e94b10",
            "command": "lnsdeploy study digits.toml --workers 2 --out study",
            "toml": 'name = "digits"\nnets = ["mlp", "cnn"]\n\n[space]\nbits = [3, 4, 5, 6, 7, 8]\n',
            "versions": {"lnsdeploy": "0.1.0", "numpy": "2.2.0", "torch": "2.9.0"},
            "nets": list(nets),
            "finished": True,
        },
        "objectives": [
            {"name": "accuracy", "direction": "maximize", "unit": "share"},
            {"name": "transistors", "direction": "minimize", "unit": "transistors"},
        ],
        "constraints": ["accuracy >= 0.75"],
        "points": points,
        "delta_tables": tables,
        "histograms": histograms,
    }
