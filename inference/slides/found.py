"""An object of a file with detections, as a GeoJSON feature that keeps all that the file says about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import UserError

Feature = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """One object. where: its place in the file, for messages; slide: as named in the file, or "".

    feature: GeoJSON, or a UserError that says why there is none; centre: x, y if the file states one, else None;
    magnification: the objective whose pixels the coordinates count, or None where they are level 0's.
    """

    where: str
    feature: Feature | UserError
    slide: str = ""
    centre: tuple[float, float] | None = None
    magnification: float | None = None


def made(geometry: Feature, identity: Any, kind: str, **metadata: Any) -> Feature:
    """A feature for an object in a format other than GeoJSON. metadata: texts that QuPath shows with it."""
    properties: Feature = {"objectType": "detection"}
    if kind:
        properties["classification"] = {"name": kind}
    kept = {key: str(value) for key, value in metadata.items() if value not in (None, "")}
    if kept:
        properties["metadata"] = kept
    return {"type": "Feature", "id": str(identity), "geometry": geometry, "properties": properties}


def attempt(where: str, make: Callable[[], Found]) -> Found:
    """The result of `make`, or the object with the reason why it could not be read."""
    try:
        return make()
    except UserError as error:
        return Found(where, error)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        return Found(
            where, UserError(f"it is incomplete ({type(error).__name__}: {error}); expected all of its fields")
        )


def class_of(feature: Feature) -> str:
    """The object's class as QuPath shows it ("Tumor: Positive"), or "" where it has none."""
    properties = feature.get("properties")
    kind = properties.get("classification") if isinstance(properties, dict) else None
    if isinstance(kind, dict):
        names = kind.get("names")
        if isinstance(names, list):
            return ": ".join(map(str, names))
        kind = kind.get("name")  # TIAToolbox writes numbers, 0 among them
    return "" if kind is None else str(kind)
