"""What `python -m inference slides` writes: GeoJSON for QuPath, a table of objects, and a table of slides."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..answers import Answer, value_columns
from ..checksums import ensemble_id
from ..errors import UserError
from ..files import replacing, write_whole
from ..imageio.listing import is_formula
from ..manifest import Manifest
from . import statistics
from .detections.geometry import outline
from .detections.objects import Feature, class_name
from .detections.packed import Target
from .detections.targets import Complain, Region
from .frames import placement
from .qupath import collection, moved, with_answer
from .slide_work import Scored
from .statistics import Summary, hot_spot, window_fits

if TYPE_CHECKING:
    import shapely

GEOJSON = (".geojson", ".json")
ABOUT = ["slide", "x", "y", "id", "detected_as", "detections"]  # of an object, before its answer's columns


def check_writable(file: Path, is_ours: Callable[[Path], bool], inputs: Iterable[Path]) -> None:
    """UserError where `file` is an input or somebody else's: it has to be new, empty, or ours."""
    if any(file.exists() and item.exists() and file.samefile(item) for item in inputs):
        raise UserError(f"{file} is an input; expected another file for the results; name another")
    try:
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise UserError(f"{file} cannot be written; expected a file in a folder that exists; name another")
        if file.exists() and file.stat().st_size and not is_ours(file):
            raise UserError(f"{file} holds something else; expected a new file, or one of this command; name another")
    except OSError as error:
        raise UserError(
            f"{file} cannot be written ({error.strerror}); expected a writable file; name another"
        ) from None


def header(manifest: Manifest) -> list[str]:
    return [*ABOUT, *value_columns(manifest), "ensemble"]


def geojson_file(output: Path, slide: Path) -> Path:
    """`output` itself, or the slide's file in it where it is a folder."""
    return output if output.suffix.lower() in GEOJSON else output / f"{slide.name}.geojson"


def for_qupath(target: Target, answer: Answer, scored: Scored, origin: str | None, manifest: Manifest) -> Feature:
    """The object with its answer; a geometry made here gets coordinates from the scanned area, as in QuPath."""
    feature = target.feature
    if not target.source.own_geometry:
        where, (left, top) = placement(target.frame, scored.slide, origin), scored.slide.scanned_from
        if where.scale != (1, 1) or where.offset != (left, top):

            def move(x: float, y: float) -> tuple[float, float]:
                x, y = where.on_slide(x, y)
                return x - left, y - top

            feature = feature | {"geometry": moved(feature["geometry"], move)}
    return with_answer(feature, answer, manifest)


def write_geojson(output: Path, scored: Scored, origin: str | None, manifest: Manifest) -> Path:
    """One slide's objects; returns the file. OSError where it cannot be written."""
    file = geojson_file(output, scored.slide.file)
    file.parent.mkdir(parents=True, exist_ok=True)
    features = (
        for_qupath(target, answer, scored, origin, manifest)
        for target, answer in zip(scored.targets, scored.answers, strict=True)
    )
    with replacing(file) as partial_file, partial_file.open("w", encoding="utf-8", errors="replace") as stream:
        stream.writelines(collection(features, manifest))
    return file


def object_row(
    target: Target, centre: tuple[float, float], answer: Answer, slide: str, manifest: Manifest
) -> list[object]:
    """An object's cells, in the order of `header`."""
    named = [slide, f"{centre[0]:.12g}", f"{centre[1]:.12g}", target.id, class_name(target.feature), target.file.name]
    return [*map(plain, named), *answer.values(manifest.threshold), ensemble_id(manifest)]


def plain(text: str) -> str:
    """The text on one line, and such that a spreadsheet does not read it as a formula; numbers stay as they are."""
    text = " ".join(text.split()) if "\n" in text or "\r" in text else text
    return f"'{text}" if is_formula(text) else text


def write_csv(file: Path, results: Sequence[Scored], manifest: Manifest) -> None:
    """All slides' objects. OSError where it cannot be written."""
    with replacing(file) as hidden, hidden.open("w", newline="", encoding="utf-8", errors="replace") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header(manifest))
        for scored in results:
            for target, centre, answer in zip(scored.targets, scored.places, scored.answers, strict=True):
                writer.writerow(object_row(target, centre, answer, scored.title, manifest))


def region_of(
    scored: Scored, regions: Sequence[Region], origin: str | None, complain: Complain
) -> shapely.Geometry | None:
    """The part of the slide that the outlines go around, in level-0 pixels; None where there is no such part.

    Each outline that cannot be used, or lies outside the slide, is passed to `complain`.
    """
    import shapely
    from shapely.affinity import affine_transform

    whole = shapely.box(0, 0, *scored.slide.size)
    parts = []
    for region in regions:
        try:
            (fx, fy), (left, top) = placement(region.frame, scored.slide, origin)
            shape = affine_transform(outline(region.geometry, figure=False), [fx, 0, 0, fy, left, top])
            part = shape.intersection(whole)
            if not part.area:
                width, height = scored.slide.size
                raise UserError(
                    f"it lies outside the slide's {width:,} x {height:,} pixels; expected an outline on it, in level-0 "
                    "pixels"
                )
            parts.append(part)
        except UserError as error:
            complain([f"{scored.title}, region {region.where}"], str(error), False)
    return shapely.union_all(parts) if parts else None  # what lies in several outlines counts once


def summarise(scored: Scored, failed: int, region: shapely.Geometry | None, threshold: float) -> Summary:
    """One slide's counts. region: as `region_of` returns it; the hot spots count the figures in it alone."""
    import shapely

    slide = scored.slide
    x, y = np.array(scored.places).reshape(-1, 2).T
    atypical = np.array([answer.p_atypical >= threshold for answer in scored.answers], bool)
    inside = np.ones(len(x), bool) if region is None else shapely.intersects_xy(region, x, y)
    hottest = [hot_spot(x[chosen], y[chosen], slide.size, slide.level.mpp) for chosen in (inside, inside & atypical)]
    return Summary(
        slide=scored.title,
        figures=len(x),
        atypical=int(atypical.sum()),
        failed=failed,
        area=None if region is None else region.area * slide.level.mpp[0] * slide.level.mpp[1] / 1e6,
        inside=None if region is None else (int(inside.sum()), int((inside & atypical).sum())),
        too_small=not window_fits(slide.size, slide.level.mpp),
        hottest=hottest[0],
        hottest_atypical=hottest[1],
    )


def write_summary(file: Path, summaries: Sequence[Summary]) -> None:
    """One row a slide. OSError where it cannot be written."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, statistics.COLUMNS, lineterminator="\n")
    writer.writeheader()
    for summary in summaries:
        row = summary.row()
        writer.writerow(row | {"slide": plain(str(row["slide"]))})
    write_whole(file, text.getvalue())
