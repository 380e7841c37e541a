"""B-bit Madam: weights that live as integers of 12, 10, 8 and 6 bits (as Bernstein et al. 2020, in small).

``python -m examples.paper.updates --data mnist --data-dir DIR --model cnn-large --epochs 6 --out updates``
"""

from __future__ import annotations

from examples.paper.common import STYLES, Job, figure, images, parser_of, percent, run_all, table, write

BITS = (12, 10, 8, 6)
# Octaves that the codes span: what the paper's integer runs have, 3.7 to 7.4, and what whole nets in LNS have.
OCTAVES = (8, 16)


def gamma_of(bits: int, octaves: int) -> int:
    """Codes per octave, a power of two."""
    return max(1, (1 << (bits - 1)) // octaves)


def main(argv: list[str] | None = None) -> int:
    """Train, and write table and figure."""
    parser = parser_of(__doc__)
    parser.add_argument("--lr", type=float, default=0.03)
    options = parser.parse_args(argv)
    common = images(options) | {"as_float": True, "lr": options.lr}
    jobs = []
    kinds = {
        "stochastic": {"rounding": "stochastic"},
        "nearest": {"rounding": "nearest"},
        "random start": {"rounding": "stochastic", "init": "random"},
    }
    for seed in range(options.seeds):
        jobs.append(Job("float", f"float {seed}", common | {"seed": seed}))
        for bits in BITS:
            for octaves in OCTAVES:
                for kind, settings in kinds.items():
                    if kind != "stochastic" and octaves != OCTAVES[0]:
                        continue
                    row = f"{bits} bits, {octaves} octaves, {kind}"
                    form = {"update_bits": bits, "update_gamma": gamma_of(bits, octaves)}
                    more = {"optimizer": "integer-madam", "optimizer_settings": settings, "seed": seed}
                    jobs.append(Job(row, f"{bits}-{octaves}-{kind.replace(' ', '-')} {seed}", common | form | more))
    results = run_all(jobs, options.out, options.workers)
    columns = [
        (f"{OCTAVES[0]} octaves, {kind}" if kind != "wide" else f"{OCTAVES[1]} octaves, stochastic")
        for kind in (*kinds, "wide")
    ]
    rows = [[str(bits), *(percent(results, f"{bits} bits, {column}") for column in columns)] for bits in BITS]
    made, (axes,) = figure(6.0)
    for column, (colour, marker) in zip(columns, STYLES, strict=False):
        points = [(b, 100 * results.mean(f"{b} bits, {column}", "accuracy")) for b in BITS]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=column)
    axes.axhline(100 * results.mean("float", "accuracy"), color="#666666", linestyle="--", label="float Madam")
    axes.set_xlabel("bits of a weight")
    axes.set_ylabel("test accuracy, %")
    axes.legend(frameon=False)
    write(
        options.out,
        "updates",
        f"float Madam {percent(results, 'float')}\n\n" + table(["bits", *columns], rows),
        results,
        made,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
