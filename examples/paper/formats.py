"""Accuracy against bits and γ of weights, activations, errors and gradients (as Zhao et al. 2022, in small).

``python -m examples.paper.formats --data mnist --data-dir DIR --model cnn-large --epochs 6 --out formats``
"""

from __future__ import annotations

from examples.paper.common import STYLES, Job, figure, images, parser_of, percent, run_all, table, write

# Bits: the γ that are tried, for all four tensors.
GRID = {8: (16, 8, 4), 6: (4, 2), 5: (4, 2), 4: (2, 1)}


def main(argv: list[str] | None = None) -> int:
    """Train, and write table and figure."""
    parser = parser_of(__doc__)
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--grid", default=None, help='formats instead of the usual, as "8:8,4:2"')
    options = parser.parse_args(argv)
    common = images(options) | {"lr": options.lr}
    grid = {bits: list(gammas) for bits, gammas in GRID.items()}
    if options.grid:
        grid = {}
        for word in options.grid.split(","):
            bits, _, gamma = word.partition(":")
            grid.setdefault(int(bits), []).append(int(gamma))
    jobs = []
    for seed in range(options.seeds):

        def add(row: str, seed: int = seed, **more: object) -> None:
            jobs.append(Job(row, f"{row} {seed}".replace(":", "-").replace("/", ""), common | {"seed": seed} | more))

        add("float32", as_float=True)
        for bits, gammas in grid.items():
            for gamma in gammas:
                words = f"{bits}:{gamma}"
                form = {"bits": bits, "gamma": gamma}
                add(f"{words} W/A", **form)
                add(f"{words} W/A/E/G", **form, errors=words, gradients=words)
                if gamma == gammas[len(gammas) // 2]:
                    add(f"{words} lns-madam", **form, optimizer="lns-madam")
    results = run_all(jobs, options.out, options.workers)
    rows, series = [], {"W/A": [], "W/A/E/G": []}
    for bits, gammas in grid.items():
        for gamma in gammas:
            words = f"{bits}:{gamma}"
            cells = [percent(results, f"{words} {kind}") for kind in ("W/A", "W/A/E/G")]
            native = f"{words} lns-madam"
            rows.append([words, *cells, percent(results, native) if native in results.rows else ""])
        for kind, points in series.items():
            best = max(100 * results.mean(f"{bits}:{g} {kind}", "accuracy") for g in gammas)
            points.append((bits, best))
    made, (axes,) = figure(6.0)
    for (kind, points), (colour, marker) in zip(series.items(), STYLES, strict=False):
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=f"{kind}, best γ")
    axes.axhline(100 * results.mean("float32", "accuracy"), color="#666666", linestyle="--", label="float32")
    axes.set_xlabel("bits")
    axes.set_ylabel("test accuracy, %")
    axes.legend(frameon=False)
    text = f"float32 {percent(results, 'float32')}\n\n" + table(
        ["format", "weights and activations", "and errors and gradients", "and weights as codes (lns-madam)"], rows
    )
    write(options.out, "formats", text, results, made)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
