"""Fine-tuning with the hardware in the loop: what small tables cost, and how much of it a net learns to live with.

``python -m examples.paper.hardware --data mnist --data-dir DIR --model cnn --epochs 8 --out hardware``

A net is trained at 8:8 with float sums, then looked at through a datapath bit for bit; then fine-tuned with every
product of the forward pass through that datapath, and looked at again, also as it is exported, on words throughout.
Beside it, the same fine-tuning with float sums, so that what more training alone does is not counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.paper.common import Job, Results, figure, images, parser_of, percent, run_all, table, write

# Datapaths with little hardware: a converter of one entry into a linear accumulator, Mitchell's approximation in both
# directions, and a log adder with the table of Sanyal et al. 2020.
DATAPATHS = ("lns-madam-8-lut1", "mitchell-8", str(Path(__file__).parent / "sanyal-20.toml"))


def look(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of a finished run through a datapath, bit for bit."""
    import torch

    import lnsdeploy
    from lnsdeploy.training.run import load_run

    run = load_run(options["init_from"])
    data = run.dataset()
    x, y = torch.tensor(data.test_x), torch.tensor(data.test_y)
    right = 0
    with torch.no_grad(), lnsdeploy.emulate(options["datapath"], model=run.model):
        for start in range(0, len(x), 500):
            right += int((run.model(x[start : start + 500]).argmax(1) == y[start : start + 500]).sum())
    return {"accuracy": right / len(x)}


def lacking(results: Results, row: str) -> str:
    """What each seed's net lacks in points, against the same net trained on and evaluated with float sums."""
    pairs = zip(results.rows["more training"], results.rows[row], strict=True)
    return ", ".join(
        "–" if None in (a["accuracy"], b["accuracy"]) else f"{100 * (a['accuracy'] - b['accuracy']):.1f}"
        for a, b in pairs
    )


def main(argv: list[str] | None = None) -> int:
    """Train, look, fine-tune, and write table and figure."""
    parser = parser_of(__doc__)
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--tune-epochs", type=int, default=2)
    parser.add_argument("--tune-lr", type=float, default=0.01)
    parser.add_argument("--datapath", action="append", help="may be repeated; a name or a TOML file")
    options = parser.parse_args(argv)
    datapaths = options.datapath or list(DATAPATHS)
    common = images(options)
    jobs = []
    for seed in range(options.seeds):
        base = f"base {seed}"
        again = common | {"seed": 100 + seed, "epochs": options.tune_epochs, "lr": options.tune_lr}
        jobs += [
            Job("trained", base, common | {"seed": seed, "lr": options.lr}),
            Job("more training", f"more {seed}", again, after=base),
        ]
        for path in datapaths:
            short = Path(path).stem
            jobs += [
                Job(f"{short} before", f"{short} before {seed}", {"datapath": path}, look, base),
                Job(f"{short} more", f"{short} more {seed}", {"datapath": path}, look, f"more {seed}"),
                Job(
                    f"{short} after",
                    f"{short} after {seed}",
                    again | {"emulate": "forward", "datapath": path},
                    after=base,
                ),
            ]
    results = run_all(jobs, options.out, options.workers)
    float_sums = results.mean("more training", "accuracy")
    rows, bars, seeds = [], [], []
    for path in datapaths:
        short = Path(path).stem
        before, more, after = (results.mean(f"{short} {k}", "accuracy") for k in ("before", "more", "after"))
        gap = float_sums - more
        closed = f"{100 * (after - more) / gap:.0f} %" if gap > 0.0005 else "no gap"
        columns = [percent(results, f"{short} {k}") for k in ("before", "more", "after")]
        exported = (
            percent(results, f"{short} after", "deployed") if results.values(f"{short} after", "deployed") else "–"
        )
        rows.append([f"`{short}`", *columns, closed, exported])
        seeds.append([f"`{short}`", *(lacking(results, f"{short} {k}") for k in ("more", "after"))])
        bars.append((short, 100 * before, 100 * more, 100 * after))
    made, (axes,) = figure(7.0)
    for index, (label, colour, hatch) in enumerate(
        (("as trained", "#E69F00", "//"), ("trained on", "#56B4E9", ".."), ("fine-tuned in the loop", "#0072B2", ""))
    ):
        places = [i + 0.27 * (index - 1) for i in range(len(bars))]
        axes.bar(places, [b[index + 1] for b in bars], 0.25, color=colour, hatch=hatch, edgecolor="white", label=label)
    axes.axhline(100 * float_sums, color="#666666", linestyle="--", label="float sums")
    axes.set_xticks(range(len(bars)), [b[0] for b in bars])
    axes.set_ylim(bottom=max(0.0, min(min(b[1:]) for b in bars) - 3), top=100)
    axes.set_ylabel("test accuracy, %")
    axes.legend(frameon=False, ncols=4, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    trained_on, tuned = "trained on with float sums", "fine-tuned through it"
    text = f"float sums {percent(results, 'trained')}, trained on {percent(results, 'more training')}\n\n"
    text += table(["datapath", "as trained", trained_on, tuned, "of the gap closed", "exported"], rows)
    text += "\n\n" + table(["points lacking, seed by seed", trained_on, tuned], seeds)
    write(options.out, "hardware", text, results, made)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
