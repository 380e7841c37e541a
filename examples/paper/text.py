"""A character transformer: float32 against eight bits for all four tensors, in the same steps.

``python -m examples.paper.text --text FILE --out text``
"""

from __future__ import annotations

import csv
from pathlib import Path

from examples.paper.common import STYLES, Job, figure, parser_of, run_all, table, write

KINDS = {
    "float32, Madam": {"as_float": True},
    "8:8 W/A/E/G, Madam": {"errors": "8:8", "gradients": "8:8"},
    "8:8 W/A/E/G, lns-madam": {"optimizer": "lns-madam"},
    "6:4 W/A/E/G, Madam": {"bits": 6, "gamma": 4, "errors": "6:4", "gradients": "6:4"},
}


def main(argv: list[str] | None = None) -> int:
    """Train, and write table and figure."""
    parser = parser_of(__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.03)
    options = parser.parse_args(argv)
    common = {
        "data": f"text:{options.text.absolute()}",
        "model": "transformer",
        "model_settings": {"depth": options.depth, "width": options.width, "heads": 4},
        "context": options.context,
        "batch_size": options.batch_size,
        "epochs": options.epochs or 1,
        "lr": options.lr,
        "warmup": 20,
    }
    jobs = [
        Job(kind, f"{kind} {seed}".replace(":", "-").replace("/", ""), common | {"seed": seed} | more)
        for seed in range(options.seeds)
        for kind, more in KINDS.items()
    ]
    results = run_all(jobs, options.out, options.workers)
    base = results.mean("float32, Madam", "loss")
    rows = []
    made, (axes,) = figure(6.0)
    for kind, (colour, _) in zip(KINDS, STYLES, strict=False):
        mean = results.mean(kind, "loss")
        rows.append([kind, f"{mean:.4f} ± {results.spread(kind, 'loss'):.4f}", f"{mean - base:+.4f}"])
        name = next(job.name for job in jobs if job.row == kind)
        with (options.out / "runs" / name / "steps.csv").open(newline="") as handle:
            curve = [float(row["train_loss"]) for row in csv.DictReader(handle)]
        width = max(1, len(curve) // 60)
        smooth = [sum(curve[i : i + width]) / width for i in range(0, len(curve) - width + 1, width)]
        axes.plot([width * (i + 1) for i in range(len(smooth))], smooth, color=colour, label=kind)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats a character")
    axes.legend(frameon=False)
    write(options.out, "text", table(["", "validation loss, nats", "to float32"], rows), results, made)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
