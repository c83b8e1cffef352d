"""What `python -m inference slides` writes: GeoJSON for QuPath, a table of objects, and a table of slides."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..answers import Answer, fold_columns, member_columns
from ..checksums import ensemble_id
from ..errors import UserError
from ..files import replacing, write_whole
from ..labels import class_of as called
from ..manifest import Manifest
from . import statistics
from .found import Feature, class_of
from .geometry import outline
from .qupath import collection, moved, with_answer
from .statistics import Summary, hot_spot
from .targets import Complain, Region, Target
from .work import Scored, scale

GEOJSON = (".geojson", ".json")
ABOUT = ["slide", "x", "y", "id", "detected_as", "detections"]  # of an object, before its answer's columns
REPORT = b"atypical mitotic figures</title>"


def check_writable(file: Path, begins: bytes, inputs: Iterable[Path]) -> None:
    """UserError where `file` is an input or not ours: it has to be new, or to begin as our files do."""
    if any(file.exists() and one.exists() and file.samefile(one) for one in inputs):
        raise UserError(f"{file} is an input; expected another file for the results; name another")
    try:
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise UserError(f"{file} cannot be written; expected a file in a folder that exists; name another")
        if file.exists():
            with file.open("rb") as stream:
                start = stream.read(max(1024, len(begins)))
            if start and (begins not in start if begins is REPORT else not start.startswith(begins)):
                raise UserError(
                    f"{file} holds something else; expected a new file, or one of this command; name another"
                )
    except OSError as error:
        raise UserError(
            f"{file} cannot be written ({error.strerror}); expected a writable file; name another"
        ) from None


def header(manifest: Manifest) -> list[str]:
    answer = ["p_atypical", "class", *fold_columns(manifest), *member_columns(manifest), "spread", "ensemble"]
    return ABOUT + answer


def geojson_file(output: Path, slide: Path) -> Path:
    """`output` itself, or the slide's file in it where it is a folder."""
    return output if output.suffix.lower() in GEOJSON else output / f"{slide.name}.geojson"


def for_qupath(target: Target, answer: Answer, scored: Scored, origin: str | None, manifest: Manifest) -> Feature:
    """The object with its answer; a geometry made here gets coordinates from the scanned area, as in QuPath."""
    feature = target.feature
    if not target.theirs:
        factor = scale(target.magnification, scored.slide)
        offset = (0.0, 0.0) if origin == "scan" else scored.slide.scanned_from()
        if factor != 1 or offset != (0, 0):
            move = lambda x, y: (x * factor - offset[0], y * factor - offset[1])  # noqa: E731
            feature = feature | {"geometry": moved(feature["geometry"], move)}
    return with_answer(feature, answer, manifest)


def write_geojson(output: Path, scored: Scored, origin: str | None, manifest: Manifest) -> Path:
    """One slide's objects; returns the file. OSError where it cannot be written."""
    file = geojson_file(output, scored.file)
    file.parent.mkdir(parents=True, exist_ok=True)
    features = (
        for_qupath(target, answer, scored, origin, manifest)
        for target, answer in zip(scored.targets, scored.answers, strict=True)
    )
    with replacing(file) as partial_file, partial_file.open("w", encoding="utf-8", errors="replace") as stream:
        stream.writelines(collection(features, manifest))
    return file


def object_row(
    target: Target, place: tuple[float, float], answer: Answer, slide: str, manifest: Manifest
) -> list[object]:
    """An object's cells, in the order of `header`."""
    about = [slide, f"{place[0]:.12g}", f"{place[1]:.12g}", target.id, class_of(target.feature), target.file.name]
    p = answer.p_atypical
    numbers = [*answer.fold_p, *answer.member_p, answer.spread]
    return [*map(plain, about), repr(p), called(p, manifest.threshold), *map(repr, numbers), ensemble_id(manifest)]


def plain(text: str) -> str:
    """The text on one line, and such that a spreadsheet does not read it as a formula."""
    text = " ".join(text.split()) if "\n" in text or "\r" in text else text
    return f"'{text}" if text[:1] in ("=", "+", "@") else text


def write_csv(file: Path, results: Sequence[Scored], manifest: Manifest) -> None:
    """All slides' objects. OSError where it cannot be written."""
    with replacing(file) as hidden, hidden.open("w", newline="", encoding="utf-8", errors="replace") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header(manifest))
        for one in results:
            for target, place, answer in zip(one.targets, one.places, one.answers, strict=True):
                writer.writerow(object_row(target, place, answer, one.title, manifest))


def summarise(
    scored: Scored, failed: int, regions: Sequence[Region], origin: str | None, manifest: Manifest, complain: Complain
) -> Summary:
    """One slide's counts. regions: outlines whose area counts, with the same origin as the objects."""
    import shapely
    from shapely.affinity import affine_transform

    x, y = np.array(scored.places).reshape(-1, 2).T
    atypical = np.array([one.p_atypical >= manifest.threshold for one in scored.answers], bool)
    mpp = scored.slide.level.mpp
    offset = scored.slide.scanned_from() if origin == "scan" else (0.0, 0.0)
    outlines = []
    for one in regions:
        try:
            factor = scale(one.magnification, scored.slide)
            matrix = [factor, 0, 0, factor, *offset]
            outlines.append(affine_transform(outline(one.geometry, figure=False), matrix))
        except UserError as error:
            complain(f"{scored.title}, region {one.where}", str(error), False)
    region = shapely.union_all(outlines)  # what lies in several outlines counts once
    square_mm, counts = region.area * mpp[0] * mpp[1] / 1e6, shapely.intersects_xy(region, x, y)
    return Summary(
        slide=scored.title,
        figures=len(x),
        atypical=int(atypical.sum()),
        failed=failed,
        area=square_mm or None,
        inside=(int(counts.sum()), int((counts & atypical).sum())) if square_mm else None,
        hottest=hot_spot(x, y, mpp),
        hottest_atypical=hot_spot(x[atypical], y[atypical], mpp),
    )


def write_summary(file: Path, summaries: Sequence[Summary]) -> None:
    """One row a slide. OSError where it cannot be written."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, statistics.COLUMNS, lineterminator="\n")
    writer.writeheader()
    for one in summaries:
        row = one.row()
        writer.writerow(row | {"slide": plain(str(row["slide"]))})
    write_whole(file, text.getvalue())
