"""An object on a slide: a GeoJSON feature that keeps all that its file says, and how that file counts coordinates."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from ...errors import UserError

Feature = dict[str, Any]
Origin = Literal["slide", "scan", "doubt", "glass"]
SCAN: Origin = "scan"
DOUBT: Origin = "doubt"
GLASS: Origin = "glass"


class Frame(NamedTuple):
    """How a file counts coordinates.

    magnification: the objective whose pixels they count; None: they count level 0's
    microns: µm of one unit, where they are lengths; None: they are pixels
    deepzoom: the level of the slide's DeepZoom pyramid (0: one pixel) whose pixels they count; None: as above
    origin: "slide" (the corner of level 0), "scan" (the corner of the scanned area, as QuPath counts), or "doubt":
        programs write this format both ways, so where the two differ the user has to say which; "glass" (the middle of
        the glass slide, which NDPI files know)
    """

    magnification: float | None = None
    microns: float | None = None
    deepzoom: int | None = None
    origin: Origin = "slide"


LEVEL_0 = Frame()


class SlideObject(NamedTuple):
    """One object of a file. where: its position in the file, for messages; slide: as named in the file, or "".

    feature: GeoJSON, or a UserError that says why there is none; centre: x, y if the file states one, else None
    kind: its class, where there is no feature that says it
    """

    where: str
    feature: Feature | UserError
    slide: str = ""
    centre: tuple[float, float] | None = None
    frame: Frame = LEVEL_0
    kind: str = ""


def made(geometry: Feature, identity: Any, kind: str, **metadata: Any) -> Feature:
    """A feature for an object in a format other than GeoJSON. metadata: texts that QuPath shows with it."""
    properties: Feature = {"objectType": "detection"}
    if kind:
        properties["classification"] = {"name": kind}
    kept = {key: str(value) for key, value in metadata.items() if value not in (None, "")}
    if kept:
        properties["metadata"] = kept
    return {"type": "Feature", "id": str(identity), "geometry": geometry, "properties": properties}


def attempt(where: str, make: Callable[[], SlideObject], kind: str = "") -> SlideObject:
    """The result of `make`, or the object, of the class `kind`, with the reason why it could not be read."""
    try:
        return make()
    except UserError as error:
        reason = error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = UserError(f"it is incomplete ({type(error).__name__}: {error}); expected all of its fields")
    return SlideObject(where, reason, kind=kind)


def class_name(feature: Feature) -> str:
    """The object's class as QuPath shows it ("Tumor: Positive"), or "" where it has none.

    GeoPandas writes `classification` as JSON text; TIAToolbox's annotation stores write the class as `type`.
    """
    properties = feature.get("properties")
    if not isinstance(properties, dict):
        return ""
    kind = properties.get("classification", properties.get("type"))
    if isinstance(kind, str) and kind.lstrip()[:1] == "{":
        try:
            kind = json.loads(kind)
        except ValueError:
            return kind
    if isinstance(kind, dict):
        names = kind.get("names")
        if isinstance(names, list):
            return ": ".join(map(str, names))
        kind = kind.get("name")  # TIAToolbox writes numbers, 0 among them
    return "" if kind is None else str(kind)
