"""Answers as QuPath opens them: the objects as they were, with a class, its colour and the probabilities.

Source: PathObjectTypeAdapters and ROITypeAdapters of QuPath 0.4 and later: `id` (a UUID), `geometry`, and `properties`
with `classification` (name, color), `measurements` (numbers by name; a list of name and value before 0.4) and
`metadata` (texts by name). Members of the collection other than `features` are ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..answers import Answer, fold_columns, member_columns
from ..checksums import ensemble_id
from ..manifest import Manifest
from .detections.objects import Feature, class_name

CLASSES = ("Normal mitosis", [0, 158, 115]), ("Atypical mitosis", [213, 94, 0])  # the report's green and vermilion
BEFORE = "Detected as"  # the metadata with the class that an object had
MARK = '{"type": "FeatureCollection", "atypical_mitosis": '  # how a file of ours begins


def measurements(answer: Answer, manifest: Manifest) -> dict[str, float]:
    """P(atypical), also of each member and fold, and the spread, by the names that QuPath shows."""
    members = zip(member_columns(manifest), answer.member_p, strict=True)
    folds = zip(fold_columns(manifest), answer.fold_p, strict=True)
    parts = {f"P(atypical) {name.replace('_', ' ')}": p for name, p in (*members, *folds)}
    return {"P(atypical)": answer.p_atypical, **parts, "P(atypical) spread": answer.spread}


def with_answer(feature: Feature, answer: Answer, manifest: Manifest) -> Feature:
    """A copy of the feature with its answer; everything else in it stays."""
    given = feature.get("properties")
    properties: Feature = dict(given) if isinstance(given, dict) else {}
    name, color = CLASSES[answer.p_atypical >= manifest.threshold]
    before, metadata = class_name(feature), properties.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    if before and before not in (CLASSES[0][0], CLASSES[1][0]):
        metadata[BEFORE] = before
    if metadata:
        properties["metadata"] = metadata
    properties["classification"] = {"name": name, "color": color}
    new, old = measurements(answer, manifest), properties.get("measurements")
    if isinstance(old, list):
        others = [
            measurement for measurement in old if not (isinstance(measurement, dict) and measurement.get("name") in new)
        ]
        properties["measurements"] = [*others, *({"name": key, "value": value} for key, value in new.items())]
    else:
        properties["measurements"] = (old if isinstance(old, dict) else {}) | new
    return feature | {"properties": properties}


def collection(features: Iterable[Feature], manifest: Manifest) -> Iterator[str]:
    """The text of a FeatureCollection, piece by piece."""
    ensemble = {"ensemble": manifest.name, "id": ensemble_id(manifest), "threshold": manifest.threshold}
    yield f'{MARK}{json.dumps(ensemble)}, "features": ['
    for n, feature in enumerate(features):
        yield (",\n" if n else "\n") + strict_json(feature)
    yield "\n]}\n"


def strict_json(feature: Feature) -> str:
    """JSON. QuPath writes numbers that are not finite as texts since 0.5 (its PR 1296): JSON has no NaN."""
    try:
        return json.dumps(feature, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(finite(feature), ensure_ascii=False, allow_nan=False)


def finite(value: Any) -> Any:
    """The value with texts in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def moved(geometry: Feature, move: Callable[[float, float], tuple[float, float]]) -> Feature:
    """The geometry with each position moved."""

    def one(part: Any) -> Any:
        if part and isinstance(part[0], list):
            return [one(inner) for inner in part]
        return list(move(float(part[0]), float(part[1])))

    return geometry | {"coordinates": one(geometry["coordinates"])}
