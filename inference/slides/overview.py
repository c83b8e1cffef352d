"""The report's two sections about slides: a table, and a picture of each with its figures, linked to their crops."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from ..errors import UserError
from .slide_work import Scored
from .statistics import HotSpot, Summary, wilson, window

SIDE = 720  # pixels on the screen of a picture's longer side
DETAIL = 2  # pixels of the picture for each on the screen: it can be enlarged
READ = 1 << 26  # most pixels of the level to read: 256 MB; a slide without so small a level gets an outline
DRAWN = 20_000  # most figures on a picture
NOTE = (
    "Every object is taken for a mitotic figure: those that the detector took for one by mistake are counted here too, "
    "and P(atypical) means nothing for them. The more of them there are, the less counts, densities and hot spots can "
    "be trusted. Share: 95% Wilson interval. Hot spot: the 2 mm² (ten high-power fields) with the most figures "
    "(solid) and the most atypical ones (dashed); of a slide with an outlined region, only figures in it are counted."
)
HELP = (
    "A click on a figure opens its crop. To enlarge a place: its buttons, a double click, or the wheel with Ctrl; to "
    "move: drag. Frames: the hot spot, and dashed that of atypical figures."
)


def table(summaries: Sequence[Summary], threshold: float) -> str:
    """HTML of the first section: a row for each slide."""
    heads = ("Slide", "Figures", "Atypical", "Share", "Per mm²", "Hot spot", "Atypical hot spot", "Not scored")
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
    rows = "\n".join(map(row, summaries))
    return (
        '<section class="panel slides answers" aria-labelledby="h-slides"><h2 id="h-slides">Slides</h2>'
        f'<div class="scroll"><table class="slides"><thead><tr>{columns}</tr></thead><tbody>\n{rows}\n'
        "</tbody></table></div>"
        f'<p class="muted small">{NOTE} Atypical: P(atypical) ≥ {threshold:g}, the ensemble’s threshold.</p>'
        "</section>\n"
    )


def pictures(results: Sequence[Scored], summaries: Sequence[Summary], threshold: float) -> str:
    """HTML of the second section; crops are numbered consecutively over all slides, in their order."""
    parts, first = [], 0
    for scored, summary in zip(results, summaries, strict=True):
        parts.append(figure(scored, summary, first, threshold))
        first += len(scored.answers)
    return (
        '<section class="panel slides" aria-labelledby="h-pictures"><h2 id="h-pictures">Where the figures lie</h2>'
        f'<p class="muted small">{HELP}</p><div class="thumbnails">\n{"".join(parts)}</div></section>\n'
    )


def row(summary: Summary) -> str:
    low, high = wilson(summary.atypical, summary.figures)
    share = "-" if summary.share is None else f"{summary.share:.1%} [{low:.1%}, {high:.1%}]"
    density = "-" if not summary.area else f"{summary.density(0):.3g} in {summary.area:.3g} mm²"
    where = " in the region" if summary.area else ""
    spots = [
        f"{spot.count:,}{where}" if spot else "slide too small" if summary.too_small else "-"
        for spot in (summary.hottest, summary.hottest_atypical)
    ]
    cells = [f"{summary.figures:,}", f"{summary.atypical:,}", share, density, *spots, f"{summary.failed:,}"]
    return f'<tr><th scope="row">{escape(summary.slide)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def figure(scored: Scored, summary: Summary, first: int, threshold: float) -> str:
    """A slide as SVG in its coordinates: the picture below, the figures on it; slides.js adds a scale bar and zoom."""
    width, height = scored.slide.size
    unit = max(width, height) / SIDE  # level-0 pixels per screen pixel
    marks = []
    for n, ((x, y), answer) in enumerate(zip(scored.places[:DRAWN], scored.answers[:DRAWN], strict=True)):
        kind = "atypical" if answer.p_atypical >= threshold else "normal"
        text = f"{kind}, P(atypical) {answer.p_atypical:.3f}"
        marks.append(
            f'<a href="#crops" data-crop="{first + n}" aria-label="{text}"><circle class="{kind}" cx="{x:.0f}" '
            f'cy="{y:.0f}" r="{5 * unit:.0f}"><title>{text}</title></circle></a>'
        )
    size = window(scored.slide.level.mpp)
    boxes = rectangle(summary.hottest, size, "") + rectangle(summary.hottest_atypical, size, ' stroke-dasharray="6 4"')
    hidden = len(scored.places) - len(marks)
    more = f", {hidden:,} more figures are not drawn" if hidden else ""
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" data-mpp="{scored.slide.level.mpp[0]:.6g}" role="group" '
        f'aria-label="{escape(scored.title)}">'
        f'<rect class="glass" width="{width}" height="{height}"/>{picture(scored, width, height)}'
        f"{boxes}{''.join(marks)}"
        f"</svg><figcaption><span>{escape(scored.title)}{more}</span></figcaption></figure>\n"
    )


def rectangle(spot: HotSpot | None, size: tuple[float, float], dash: str) -> str:
    if spot is None:
        return ""
    left, top = spot.x - size[0] / 2, spot.y - size[1] / 2
    frame = f'x="{left:.0f}" y="{top:.0f}" width="{size[0]:.0f}" height="{size[1]:.0f}"'
    return f'<rect class="spot" vector-effect="non-scaling-stroke" {frame}{dash}/>'


def picture(scored: Scored, width: int, height: int) -> str:
    from openslide import OpenSlideError

    try:
        slide = scored.slide.open()
    except UserError:  # gone since it was scored
        return ""
    side = DETAIL * SIDE
    level = slide.get_best_level_for_downsample(max(width, height) / side)
    columns, rows = slide.level_dimensions[level]
    if columns * rows > READ:
        scored.slide.release()
        return ""
    stream = io.BytesIO()
    try:
        slide.get_thumbnail((side, side)).convert("RGB").save(stream, "WEBP", quality=70)
    except OpenSlideError:  # a damaged tile; its crops were reported already
        return ""
    finally:
        scored.slide.release()
    if scored.slide.changed(scored.slide.identity):  # another slide's picture would be below this one's figures
        return ""
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<image href="data:image/webp;base64,{data}" width="{width}" height="{height}"/>'
