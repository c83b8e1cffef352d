"""COCO's files (cocodataset.org/#format-data) and the two ways in which programs write their boxes.

COCO's bbox is [x, y, width, height]. Others keep its layout and write two corners, [left, top, right, bottom], among
them MIDOG.json, whose boxes are all 50 pixels wide and high (Zenodo 4643381 and 6362337).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from ...errors import UserError
from .geometry import LARGEST, box, number
from .objects import SlideObject, attempt, made

MIDOG, TOLERANCE = 50, 1  # pixels of a side
CORNERS, SIZES = "xyxy", "xywh"


def fits_coco(document: Any) -> bool:
    return isinstance(document, dict) and all(isinstance(document.get(k), list) for k in ("images", "annotations"))


def fits_results(document: Any) -> bool:
    """COCO's format of results: a list of detections, without images and categories."""
    return (
        isinstance(document, list)
        and bool(document)
        and all(isinstance(row, dict) and {"image_id", "bbox"} <= row.keys() for row in document[:10])
    )


def read_coco(document: dict[str, Any], boxes: str | None) -> Iterator[SlideObject]:
    images = by_id(document["images"], "file_name", "images")
    categories = by_id(document.get("categories") or [], "name", "categories")
    yield from read_rows(document["annotations"], images, categories, boxes)


def read_results(document: list[Any], boxes: str | None) -> Iterator[SlideObject]:
    images = {row.get("image_id") for row in document if isinstance(row, dict)}
    if len(images) > 1:
        raise UserError(
            f"its results are of {len(images):,} images, which it does not name; expected those of one slide; give the "
            "file with images and annotations"
        )
    yield from read_rows(document, dict.fromkeys(images, ""), {}, boxes)


def read_rows(
    rows: list[Any], images: dict[Any, str], categories: dict[Any, str], boxes: str | None
) -> Iterator[SlideObject]:
    kind = boxes or kind_of_boxes([row.get("bbox") for row in rows if isinstance(row, dict)])

    def read(where: str, row: Any) -> SlideObject:
        left, top, third, fourth = (number("bbox", value) for value in row["bbox"])
        right, bottom = (third, fourth) if kind == CORNERS else (left + third, top + fourth)
        if not (right >= left and bottom >= top):
            expected = "left, top, right, bottom" if kind == CORNERS else "x, y, width, height"
            raise UserError(f"its box is {row['bbox']!r:.60}; expected {expected}")
        if row["image_id"] not in images:
            raise UserError(f"its image_id is {row['image_id']!r:.40}; expected one of the file's images")
        category = row.get("category_id")
        name = categories.get(category, "" if category is None or categories else str(category))
        feature = made(box(left, top, right, bottom), row.get("id", where), name, score=row.get("score"))
        return SlideObject(where, feature, images[row["image_id"]])

    for n, row in enumerate(rows, 1):
        where = f"annotation {n:,}"
        yield attempt(where, partial(read, where, row))


def by_id(rows: Any, value: str, of: str) -> dict[Any, str]:
    """The names of images or categories by their id. UserError where an id has two names."""
    names: dict[Any, str] = {}
    for row in rows if isinstance(rows, list) else []:
        if not isinstance(row, dict) or not isinstance(row.get("id"), int | str):
            continue
        name = str(row.get(value, ""))
        if names.setdefault(row["id"], name) != name:
            raise UserError(
                f"its {of} give the id {row['id']!r:.40} to {names[row['id']]:.60} and to {name:.60}; expected each id "
                "once; number them"
            )
    return names


def kind_of_boxes(boxes: Sequence[Any]) -> str:
    """How the boxes of a file are written. UserError where both readings are possible, or each for some of them.

    A box tells where one of the readings has no inside, or is larger than any figure.
    """
    valid = [values for values in map(numbers, boxes) if values]
    corners = [is_figure(right - left, bottom - top) for left, top, right, bottom in valid]
    sizes = [is_figure(width, height) for _, _, width, height in valid]
    only_corners = sum(c and not s for c, s in zip(corners, sizes, strict=True))
    only_sizes = sum(s and not c for c, s in zip(corners, sizes, strict=True))
    midog = sum(map(is_midog, valid))
    if only_sizes and (only_corners or 2 * midog >= len(valid)):
        raise UserError(
            f"{max(only_corners, midog):,} of its {len(boxes):,} boxes look like two corners, and {only_sizes:,} can "
            f"only be x, y, width, height; expected one kind; say which with --boxes {CORNERS} or --boxes {SIZES}"
        )
    if only_sizes or not any(corners):
        return SIZES
    if only_corners or midog == len(valid) > 1:  # one box may be so by chance
        return CORNERS
    raise UserError(
        f"its {len(boxes):,} boxes can be x, y, width, height or two corners (the first: {boxes[0]!r:.60}); expected "
        f"to know which; give --boxes {SIZES} or --boxes {CORNERS}"
    )


def numbers(values: Any) -> list[float]:
    """The four numbers of a box, or none where it has others."""
    try:
        parsed = [number("bbox", value) for value in values]
    except (TypeError, UserError):
        return []
    return parsed if len(parsed) == 4 else []


def is_midog(corners: list[float]) -> bool:
    """Whether the corners are as far apart as in MIDOG's files."""
    left, top, right, bottom = corners
    return abs(right - left - MIDOG) <= TOLERANCE and abs(bottom - top - MIDOG) <= TOLERANCE


def is_figure(width: float, height: float) -> bool:
    return 0 < width <= LARGEST and 0 < height <= LARGEST
