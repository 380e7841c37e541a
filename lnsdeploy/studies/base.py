"""What all pages share: their frame, colours and marks, numbers in words, tables, pictures.

A page is one HTML file that opens anywhere: style, scripts and data are inside it, a content security policy admits
these scripts alone, and nothing is fetched. :func:`render` makes it of a template that fills the blocks of
``templates/base.html.j2``.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from lnsdeploy import __version__
from lnsdeploy.errors import BadValueError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable without full colour vision; every line also has a marker and a
# dash of its own. The order is also that of the page's script (report.js).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")
DASHES: tuple[Any, ...] = (
    "solid",
    (0, (6, 3)),
    (0, (1.5, 2)),
    (0, (6, 2, 1.5, 2)),
    (0, (10, 4)),
    (0, (3, 1.5)),
)
MINUS = "\N{MINUS SIGN}"
THIN = "\N{NARROW NO-BREAK SPACE}"


def bad(field: str, wanted: str, value: object) -> BadValueError:
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return BadValueError(f"results: {field} must be {wanted}, not {shown}")


def plain_data(value: object) -> Any:
    """Plain Python values that JSON can carry: numpy scalars, paths, tuples and odd keys converted."""
    if isinstance(value, Mapping):
        return {str(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        # File names may hold bytes that are not UTF-8; Python keeps them as lone surrogates.
        return value.encode("utf-8", "replace").decode("utf-8")
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain_data(value.item())
    return plain_data(str(value))


# ---------------------------------------------------------------------------------------------------------
# Numbers in words


def percent(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}{THIN}%"


def signed_points(value: float | None) -> str:
    """A signed difference in percentage points, e.g. ``−0.12``."""
    if value is None:
        return "–"
    text = f"{value:+.2f}".replace("-", MINUS)
    return "0.00" if text in ("+0.00", f"{MINUS}0.00") else text


def small_share(value: float | None) -> str:
    """A share as a percentage with as many digits as it needs; a true zero is ``0``."""
    if value is None:
        return "–"
    percent = 100 * value
    if percent == 0:
        return "0"
    if percent < 0.001:
        return f"<{THIN}0.001{THIN}%"
    return f"{percent:.2g}{THIN}%" if percent < 10 else f"{percent:.1f}{THIN}%"


def count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}".replace(",", THIN)


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f}{THIN}ms"
    if seconds < 120:
        return f"{seconds:.1f}{THIN}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{THIN}h {minutes}{THIN}min" if hours else f"{minutes}{THIN}min {rest}{THIN}s"


# ---------------------------------------------------------------------------------------------------------
# The page


def embedded(value: object) -> str:
    """JSON that is safe inside a script element: no character of it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def inline_script(text: str) -> tuple[str, str]:
    """A script as it may stand in the page, and its digest for the page's content security policy."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # In JavaScript strings and regular expressions, the only places where these occur, both are the same.
    text = text.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
    return text, f"'sha256-{digest}'"


def missing(package: str, error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(
        f"the report needs {package}, which cannot be imported ({error}); "
        "install it with: pip install 'lnsdeploy[report]'"
    )


def render(
    template: str,
    *,
    filters: Mapping[str, Callable[..., Any]] | None = None,
    styles: Sequence[str] = (),
    script: str | None = None,
    data: Mapping[str, Any] | None = None,
    **context: Any,
) -> str:
    """A page as HTML text. The same input gives the same text.

    Args:
        template: its name, in ``templates``.
        filters: beside ``count``, ``percent``, ``pp``, ``share`` and ``duration``.
        styles: style sheets beside ``report.css``.
        script: of a page with charts: it runs after Plotly and ``common.js``.
        data: what stands in the page as JSON, by the id of its element.
        context: what the template is given.

    Raises:
        MissingDependencyError: jinja2, or for charts plotly, is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise missing("jinja2", error) from error
    folder = resources.files("lnsdeploy.studies") / "templates"

    def read(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    early, digest = inline_script(read("theme.js"))
    digests, scripts = [digest], []
    if script is not None:
        try:
            from plotly.offline import get_plotlyjs
        except ImportError as error:
            raise missing("plotly", error) from error
        for text in (get_plotlyjs(), read("common.js") + read(script)):
            text, digest = inline_script(text)
            digests.append(digest)
            scripts.append(Markup(text))
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=count, percent=percent, pp=signed_points, share=small_share, duration=duration, **(filters or {})
    )
    style = "".join(read(name) for name in ("report.css", *styles))
    return environment.get_template(template).render(
        version=__version__,
        policy=(
            f"default-src 'none'; script-src {' '.join(digests)}; "
            "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
        ),
        style=Markup(style.replace("</", "<\\/")),
        early=Markup(early),
        scripts=scripts,
        embedded={name: Markup(embedded(value)) for name, value in (data or {}).items()},
        **context,
    )


# ---------------------------------------------------------------------------------------------------------
# Tables and pictures


def csv_text(columns: Sequence[str], records: Iterable[Mapping[str, Any]]) -> str:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for record in records:
        writer.writerow(["" if record[name] is None else record[name] for name in columns])
    return buffer.getvalue()


def plain(text: str, longest: int = 44) -> str:
    """Text for matplotlib, which reads dollar signs as mathematics, on one line of limited length."""
    text = " ".join(text.split())
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    return text.replace("$", "\\$")


def new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("matplotlib", error) from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # savefig would draw everything twice, the first time for nothing
    figure.canvas.print_png(buffer, metadata={"Software": None})  # type: ignore[attr-defined]
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    before = figure.canvas
    # Ids of a drawing are otherwise random, and its date that of its making.
    with matplotlib.rc_context({"svg.hashsalt": "lnsdeploy", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})  # type: ignore[no-untyped-call]
    figure.set_canvas(before)
    return buffer.getvalue()


def both_kinds(name: str, figure: Figure) -> dict[str, bytes]:
    """A picture as ``NAME.png`` and ``NAME.svg``."""
    # Laid out once for both files: measuring every text takes longer than drawing.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return {f"{name}.png": png(figure), f"{name}.svg": svg(figure)}


def nothing(text: str) -> Figure:
    """A picture that says why there is none."""
    figure = new_figure(6, 1.5)
    figure.text(0.5, 0.5, text, ha="center", va="center")
    return figure


def legend(figure: Figure) -> None:
    """One legend below all charts of a picture."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
