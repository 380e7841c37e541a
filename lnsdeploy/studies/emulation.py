"""The page of an emulation: what each product of a model did, as one HTML file, with CSV and JSON beside it.

The input is what :meth:`lnsdeploy.emulator.mode.Emulation.to_dict` gives, with whatever facts about the run are to be
shown. Charts are drawn here, as SVG; the page fetches nothing, and needs no script but the one that keeps its theme.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lnsdeploy.emulator.records import ProductRecord, Seen, seen_from_dict
from lnsdeploy.errors import BadValueError
from lnsdeploy.files import make_folder, write_json, write_text
from lnsdeploy.studies.base import missing
from lnsdeploy.studies.base import render as render_page

COLUMNS = (
    "name",
    "op",
    "module",
    "datapath",
    "activation",
    "weight",
    "output",
    "kernel",
    "calls",
    "macs",
    "sqnr_db",
    "words",
    "saturated",
    "flushed",
    "seconds",
)
# Bars of a histogram's picture, and its size.
_BARS, _WIDTH, _HEIGHT = 48, 120, 26


def write_emulation_page(
    data: Mapping[str, Any], out_dir: str | Path, *, title: str = "Emulation", facts: Mapping[str, Any] | None = None
) -> dict[str, Path]:
    """Write the page and the files beside it.

    Args:
        data: from ``to_dict()`` of an emulation; further entries are kept in the JSON file.
        out_dir: the folder, made if it is missing.
        title: of the page.
        facts: what else is to be told, by name, in this order: model, data, accuracy, command, machine, ….
    Returns: the path of each file by its name: ``emulation.html``, ``emulation.json``, ``emulation.csv``.

    Raises:
        BadValueError: `data` is not that of an emulation.
        BadFileError: a file cannot be written.
        MissingDependencyError: jinja2 is not installed.
    """
    page = render_emulation(data, title=title, facts=facts)
    seen = _seen(data)
    folder = make_folder(Path(out_dir))
    paths = {name: folder / name for name in ("emulation.html", "emulation.json", "emulation.csv")}
    write_json(paths["emulation.json"], {"title": title, "facts": {**(facts or {})}, **data})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_row(record) for record in seen.records.values())
    write_text(paths["emulation.csv"], text.getvalue())
    # last, so that a page that exists has its files beside it
    write_text(paths["emulation.html"], page)
    return paths


def render_emulation(
    data: Mapping[str, Any], *, title: str = "Emulation", facts: Mapping[str, Any] | None = None
) -> str:
    """The page as HTML text; see :func:`write_emulation_page`. The same input gives the same text."""
    try:
        from markupsafe import Markup
    except ImportError as error:
        raise missing("jinja2", error) from error

    seen = _seen(data)
    records = list(seen.records.values())
    measured = [r.sqnr_db for r in records if r.sqnr_db is not None and math.isfinite(r.sqnr_db)]
    top = max([10.0, *measured])
    rows = [
        {
            "record": record,
            "sqnr": record.sqnr_db,
            "exact": record.sqnr_db is not None and math.isinf(record.sqnr_db),
            "bar": Markup(_bar(record.sqnr_db, top)),
            "saturated": record.saturated / record.words if record.words else None,
            "flushed": record.flushed / record.words if record.words else None,
            "histograms": [
                Markup(_histogram(h.zeros, [int(v) for v in h.bars])) if h is not None and h.total else None
                for h in (record.inputs, record.weights, record.outputs)
            ],
        }
        for record in records
    ]
    worst = sorted((r for r in records if r.sqnr_db is not None), key=lambda r: r.sqnr_db or 0.0)[:5]
    seconds = sum(r.seconds for r in records)
    return render_page(
        "emulation.html.j2",
        title=title,
        facts={str(k): str(v) for k, v in (facts or {}).items()},
        seen=seen,
        rows=rows,
        worst=worst,
        words=sum(r.words for r in records),
        saturated=sum(r.saturated for r in records),
        flushed=sum(r.flushed for r in records),
        seconds=seconds,
        rate=seen.macs / seconds if seconds else None,
        median=sorted(measured)[len(measured) // 2] if measured else None,
        datapath=str(data.get("datapath") or ""),
    )


def _seen(data: Mapping[str, Any]) -> Seen:
    try:
        return seen_from_dict(data)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise BadValueError(f"not the counters of an emulation: {error!r}") from error


def _row(record: ProductRecord) -> Sequence[Any]:
    formats = dict(zip(("activation", "weight", "output"), record.formats, strict=True))
    sqnr = record.sqnr_db
    values = {name: formats.get(name, record[name] if name not in formats else "") for name in COLUMNS}
    values["sqnr_db"] = "" if sqnr is None else "inf" if math.isinf(sqnr) else f"{sqnr:.3f}"
    values["seconds"] = f"{record.seconds:.6f}"
    return [values[name] for name in COLUMNS]


def _bar(value: float | None, top: float) -> str:
    """A ratio as a horizontal bar of numbers only."""
    if value is None:
        return ""
    length = 100 * min(max(value, 0.0), top) / top
    return (
        '<svg width="104" height="10" viewBox="0 0 104 10" aria-hidden="true">'
        '<rect x="0" y="1" width="100" height="8" fill="var(--grid)"/>'
        f'<rect x="0" y="1" width="{length:.1f}" height="8" fill="#0072B2"/></svg>'
    )


def _histogram(zeros: int, bars: Sequence[int]) -> str:
    """Codes from the smallest to the largest, zero apart on the left; heights are shares of the highest bar."""
    step = -(-len(bars) // _BARS)
    sums = [sum(bars[i : i + step]) for i in range(0, len(bars), step)]
    highest = max([zeros, *sums, 1])
    width = (_WIDTH - 6) / max(len(sums), 1)
    parts = [f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-hidden="true">']
    if zeros:
        height = max(1.0, (_HEIGHT - 1) * zeros / highest)
        parts.append(f'<rect x="0" y="{_HEIGHT - height:.1f}" width="4" height="{height:.1f}" fill="#D55E00"/>')
    for i, value in enumerate(sums):
        if value:
            height = max(0.6, (_HEIGHT - 1) * value / highest)
            parts.append(
                f'<rect x="{6 + i * width:.1f}" y="{_HEIGHT - height:.1f}" width="{max(width - 0.3, 0.5):.1f}" '
                f'height="{height:.1f}" fill="#0072B2"/>'
            )
    parts.append(f'<path d="M0 {_HEIGHT - 0.5}H{_WIDTH}" stroke="var(--rule)"/></svg>')
    return "".join(parts)
