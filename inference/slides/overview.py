"""The report's section about slides: one row each, and a thumbnail with the figures on it, linked to their crops."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from ..manifest import Manifest
from ..report.page import escape
from .statistics import HotSpot, Summary, wilson, window
from .work import Scored

SIDE = 720  # pixels of a thumbnail's longer side
READ = 1 << 26  # most pixels of the level to read: 256 MB; a slide without so small a level gets an outline
DRAWN = 20_000  # most figures on a thumbnail
NOTE = (
    "P(atypical) presumes that each object is a mitotic figure: of what the detector wrongly took for one, it says "
    "nothing, and it counts here as a figure. Share: 95% Wilson interval. Hot spot: the 2 mm² (ten high-power fields) "
    "with the most figures (solid) and the most atypical ones (dashed)."
)


def overview(results: Sequence[Scored], summaries: Sequence[Summary], manifest: Manifest) -> str:
    """HTML of the section; crops are numbered consecutively over all slides, in their order."""
    rows = "\n".join(map(row, summaries))
    heads = ("Slide", "Figures", "Atypical", "Share", "Per mm²", "Hot spot", "Atypical hot spot", "Not scored")
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
    parts, first = [], 0
    for one, summary in zip(results, summaries, strict=True):
        parts.append(figure(one, summary, first, manifest.threshold))
        first += len(one.answers)
    return (
        f'<section class="panel" aria-labelledby="h-slides"><h2 id="h-slides">Slides</h2><p class="muted">{NOTE}</p>'
        f'<div class="scroll"><table class="slides"><thead><tr>{columns}</tr></thead><tbody>\n{rows}\n</tbody></table>'
        f'</div><div class="thumbnails">\n{"".join(parts)}</div></section>\n'
    )


def row(one: Summary) -> str:
    low, high = wilson(one.atypical, one.figures)
    share = "-" if one.share is None else f"{one.share:.1%} [{low:.1%}, {high:.1%}]"
    density = "-" if not one.area else f"{one.density(0):.3g} in {one.area:.3g} mm²"
    spots = [f"{spot.count:,}" if spot else "-" for spot in (one.hottest, one.hottest_atypical)]
    cells = [f"{one.figures:,}", f"{one.atypical:,}", share, density, *spots, f"{one.failed:,}"]
    return f'<tr><th scope="row">{escape(one.slide)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def figure(one: Scored, summary: Summary, first: int, threshold: float) -> str:
    """A thumbnail as SVG in slide coordinates: the picture below, the figures on it."""
    width, height = one.slide.size
    unit = max(width, height) / SIDE  # level-0 pixels per screen pixel
    marks = []
    for n, ((x, y), answer) in enumerate(zip(one.places[:DRAWN], one.answers[:DRAWN], strict=True)):
        kind = "atypical" if answer.p_atypical >= threshold else "normal"
        text = f"{kind}, P(atypical) {answer.p_atypical:.3f}"
        marks.append(
            f'<a href="#crops" data-crop="{first + n}" aria-label="{text}"><circle class="{kind}" cx="{x:.0f}" '
            f'cy="{y:.0f}" r="{5 * unit:.0f}"><title>{text}</title></circle></a>'
        )
    size = window(one.slide.level.mpp)
    boxes = rectangle(summary.hottest, size, "") + rectangle(summary.hottest_atypical, size, ' stroke-dasharray="6 4"')
    hidden = len(one.places) - len(marks)
    more = f", {hidden:,} more figures are not drawn" if hidden else ""
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="group" aria-label="{escape(one.title)}">'
        f'<rect class="glass" width="{width}" height="{height}"/>{picture(one, width, height)}{boxes}{"".join(marks)}'
        f"</svg><figcaption>{escape(one.title)}{more}</figcaption></figure>\n"
    )


def rectangle(spot: HotSpot | None, size: tuple[float, float], dash: str) -> str:
    if spot is None:
        return ""
    left, top = spot.x - size[0] / 2, spot.y - size[1] / 2
    place = f'x="{left:.0f}" y="{top:.0f}" width="{size[0]:.0f}" height="{size[1]:.0f}"'
    return f'<rect class="spot" vector-effect="non-scaling-stroke" {place}{dash}/>'


def picture(one: Scored, width: int, height: int) -> str:
    from openslide import OpenSlideError

    slide = one.slide.slide
    level = slide.get_best_level_for_downsample(max(width, height) / SIDE)
    columns, rows = slide.level_dimensions[level]
    if columns * rows > READ:
        return ""
    stream = io.BytesIO()
    try:
        slide.get_thumbnail((SIDE, SIDE)).convert("RGB").save(stream, "WEBP", quality=70)
    except OpenSlideError:  # a damaged tile; its crops were reported already
        return ""
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<image href="data:image/webp;base64,{data}" width="{width}" height="{height}"/>'
