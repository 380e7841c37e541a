"""How much the learning rate matters: Madam, Adam and SGD over four decades of it, on three tasks.

``python -m examples.paper.tuning --text FILE --out tuning``

A CNN on images, a character transformer, and a class-conditional GAN; same nets, initial weights, batches and steps for
all optimizers. Only the learning rate changes, and nothing else is tuned for any of them.
"""

from __future__ import annotations

import math
from pathlib import Path

from examples.paper.common import STYLES, Job, figure, images, parser_of, run_all, table, write
from examples.paper.gan import train_gan

OPTIMIZERS = ("madam", "adam", "sgd")
# Four decades, two points each.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
# Task: number, whether less is better, what counts as near the best, and its axis.
TASKS = {
    "images": ("accuracy", False, 0.01, "test accuracy, %"),
    "text": ("loss", True, 0.1, "validation loss, nats"),
    "gan": ("hits", False, 0.05, "class as asked for, %"),
}


def main(argv: list[str] | None = None) -> int:
    """Train, and write table and figure."""
    parser = parser_of(__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--stretches", type=int, default=3000, help="of 64 characters, that the transformer trains on")
    options = parser.parse_args(argv)
    words = {
        "data": f"text:{options.text.absolute()}",
        "model": "transformer",
        "model_settings": {"depth": 1, "width": 64, "heads": 4},
        "limit": options.stretches,
        "batch_size": 16,
        "epochs": 2,
        "as_float": True,
    }
    jobs = []
    for seed in range(options.seeds):
        for optimizer in OPTIMIZERS:
            for rate in RATES:
                common = {"optimizer": optimizer, "lr": rate, "seed": seed}
                name = f"{optimizer} {rate:g} {seed}"
                row = f"{optimizer} {rate:g}"
                jobs += [
                    Job(f"images {row}", f"images {name}", images(options) | {"as_float": True} | common),
                    Job(f"text {row}", f"text {name}", words | common),
                    Job(f"gan {row}", f"gan {name}", common | {"epochs": 60}, train_gan),
                ]
    results = run_all(jobs, options.out, options.workers)
    made, axes = figure(11.0, 3.4, len(TASKS))
    rows = []
    for axis, (task, (key, less, near, label)) in zip(axes, TASKS.items(), strict=True):
        scale = 1 if less else 100
        for optimizer, (colour, marker) in zip(OPTIMIZERS, STYLES, strict=False):
            means = [results.mean(f"{task} {optimizer} {rate:g}", key) for rate in RATES]
            # one run of a rate that diverges is a rate that cannot be used
            for index, rate in enumerate(RATES):
                if len(results.values(f"{task} {optimizer} {rate:g}", key)) < options.seeds:
                    means[index] = math.nan
            axis.plot(RATES, [scale * m for m in means], color=colour, marker=marker, label=optimizer)
            known = [m for m in means if not math.isnan(m)]
            best = (min if less else max)(known)
            good = [r for r, m in zip(RATES, means, strict=True) if abs(m - best) <= near]
            at = RATES[means.index(best)]
            text = f"{best:.3f}" if less else f"{100 * best:.2f}"
            rows.append([task, optimizer, text, f"{at:g}", f"{min(good):g} … {max(good):g}", str(len(good))])
        axis.set_xscale("log")
        axis.set_xlabel("learning rate")
        axis.set_ylabel(label)
    axes[0].legend(frameon=False)
    head = ["task", "optimizer", "best", "at", "near the best", "of nine rates"]
    note = "Near: within 1 point (images), 0.1 nats (text), 5 points (gan) of the optimizer's own best."
    write(options.out, "tuning", table(head, rows) + f"\n\n{note}", results, made)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
