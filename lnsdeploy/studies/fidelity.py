"""The page of an export: how near the LNS net comes to its float net, as one HTML file, with CSV and JSON beside it.

The page fetches nothing, and needs no script but the one that keeps its theme.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lnsdeploy import __version__
from lnsdeploy.errors import BadValueError
from lnsdeploy.files import make_folder, write_json, write_text
from lnsdeploy.studies.base import missing
from lnsdeploy.studies.base import render as render_page
from lnsdeploy.studies.emulation import _bar

if TYPE_CHECKING:
    from lnsdeploy.exporters.convert import Result

COLUMNS = ("name", "op", "tensor", "formats", "macs", "parameters", "sqnr_db", "cosine", "saturated", "flushed")
EXACT_DB = 999.0


def write_fidelity_page(
    result: Result,
    out_dir: str | Path,
    *,
    title: str = "Export",
    command: str = "",
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Write the page and the files beside it.

    Args:
        result: of :func:`lnsdeploy.exporters.convert.export`.
        out_dir: the folder, made if it is missing.
        title: of the page.
        command: that made it.
        facts: what else is to be told, by name.
    Returns: the path of each file by its name: ``fidelity.html``, ``fidelity.json``, ``fidelity.csv``.

    Raises:
        BadFileError: a file cannot be written. MissingDependencyError: jinja2 is not installed.
    """
    data = result.to_dict() | {
        "sensitivity": {
            name: {str(bits): round(value, 3) for bits, value in by_width.items()}
            for name, by_width in result.sensitivity.items()
        },
        "command": command,
        "version": __version__,
    }
    page = render_fidelity(data, title=title, facts=facts)
    folder = make_folder(Path(out_dir))
    paths = {name: folder / name for name in ("fidelity.html", "fidelity.json", "fidelity.csv")}
    write_json(paths["fidelity.json"], {"title": title, "facts": {**(facts or {})}, **data})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_row(layer) for layer in data["fidelity"]["layers"])
    write_text(paths["fidelity.csv"], text.getvalue())
    # last, so that a page that exists has its files beside it
    write_text(paths["fidelity.html"], page)
    return paths


def render_fidelity(data: Mapping[str, Any], *, title: str = "Export", facts: Mapping[str, Any] | None = None) -> str:
    """The page as HTML text; see :func:`write_fidelity_page`. The same input gives the same text.

    Args:
        data: from ``to_dict()`` of a result; ``sensitivity``, ``command`` may be added.

    Raises:
        BadValueError: `data` are not those of an export. MissingDependencyError: jinja2 is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise missing("jinja2", error) from error

    try:
        layers = data["fidelity"]["layers"]
        measured = [
            layer["sqnr_db"] for layer in layers if layer["sqnr_db"] is not None and layer["sqnr_db"] < EXACT_DB
        ]
        top = max([10.0, *measured])
        rows = [{"layer": layer, "bar": Markup(_bar(layer["sqnr_db"], top))} for layer in layers]
        worst = sorted((x for x in layers if x["sqnr_db"] is not None and x["macs"]), key=lambda x: x["sqnr_db"])[:5]
        sensitivity = data.get("sensitivity") or {}
        widths = sorted({int(bits) for by_width in sensitivity.values() for bits in by_width})
        weights = {layer["name"]: layer["formats"][1] for layer in layers if len(layer["formats"]) == 3}
        return render_page(
            "fidelity.html.j2",
            filters={"decibels": _decibels, "size": _size},
            title=title,
            export=data,
            fidelity=data["fidelity"],
            sizes=data["sizes"],
            facts={str(k): str(v) for k, v in (facts or {}).items()},
            rows=rows,
            worst=worst,
            chart=Markup(_chart([(x["name"], x["sqnr_db"]) for x in layers], top)),
            widths=widths,
            sensitivity=sensitivity,
            weights=weights,
            command=str(data.get("command") or ""),
        )
    except (AttributeError, KeyError, TypeError, ValueError, jinja2.UndefinedError) as error:
        raise BadValueError(f"not the figures of an export: {error!r}") from error


def _decibels(value: float | None) -> str:
    return "–" if value is None else "exact" if value >= EXACT_DB else f"{value:.1f}\N{NARROW NO-BREAK SPACE}dB"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            digits = 0 if unit == "B" else 1
            return f"{count:.{digits}f}\N{NARROW NO-BREAK SPACE}{unit}"
        count /= 1000
    return f"{count:.2f}\N{NARROW NO-BREAK SPACE}GB"


def _row(layer: Mapping[str, Any]) -> Sequence[Any]:
    values = {**layer, "formats": " ".join(layer["formats"])}
    return ["" if values[name] is None else values[name] for name in COLUMNS]


def _chart(points: Sequence[tuple[str, float | None]], top: float) -> str:
    """The ratio along the net: a point for each operation, joined by a line; numbers only, no names."""
    known = [(i, min(max(value, 0.0), top)) for i, (_, value) in enumerate(points) if value is not None]
    if len(known) < 2:
        return ""
    width, height, left, bottom = 900.0, 220.0, 44.0, 24.0
    across, up = (width - left - 8) / max(len(points) - 1, 1), (height - bottom - 10) / top
    places = [(left + i * across, height - bottom - value * up) for i, value in known]
    step = next(s for s in (2, 5, 10, 20, 50, 100, 1000) if top / s <= 6)
    parts = [
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="100%" role="img" '
        'aria-label="Signal to noise of every operation, in the order of the net">'
    ]
    for level in range(0, int(top) + 1, step):
        y = height - bottom - level * up
        parts.append(f'<path d="M{left:.0f} {y:.1f}H{width - 8:.0f}" stroke="var(--grid)"/>')
        parts.append(
            f'<text x="{left - 8:.0f}" y="{y + 4:.1f}" text-anchor="end" font-size="12" fill="var(--soft)">'
            f"{level}</text>"
        )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#0072B2" stroke-width="1.5"/>')
    radius = 3 if len(places) < 120 else 1.5
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="#0072B2"/>' for x, y in places]
    parts.append(
        f'<text x="{(left + width) / 2:.0f}" y="{height - 4:.0f}" text-anchor="middle" font-size="12" '
        'fill="var(--soft)">'
        "operations, from the input to the output</text></svg>"
    )
    return "".join(parts)
