"""`POST /score` and `GET /` of the server: other programs send crops and get the CSV's fields back.

A request is multipart/form-data with one or more images and a field `mpp`, or JSON: {"mpp": 0.25, "images": [base64,
...]}. `mpp` is the crops' um/px: any resolution but the ensembles' own is refused unless `resample` is true. Images are
read as in a job and have one page each; the answer for one that cannot be read is the reason.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from email.message import Message
from typing import TYPE_CHECKING, Any

from .answers import fold_columns, member_columns
from .checksums import ensemble_id
from .errors import UserError
from .labels import class_of

if TYPE_CHECKING:
    import numpy as np

    from .ensemble import Ensemble

MPP, NEAR = 0.25, 0.1  # um/px of the training crops (0.23 to 0.25), and the relative difference that is allowed
RESAMPLED = 0.05, 5.0  # um/px that can be resampled to MPP
FIELDS = {"mpp", "resample", "images"}
BYTES, IMAGES, SIDE = 64 << 20, 4096, 2048  # of a request, and of an image's longer side


@dataclass(frozen=True)
class Request:
    """images: the bytes of each; mpp: their um/px; resample: whether to resample other resolutions to MPP."""

    images: list[bytes]
    mpp: float
    resample: bool


def parse(content_type: str, body: bytes) -> Request:
    """UserError if the body has neither form, or no images, or no um/px."""
    kind = content_type.split(";")[0].strip().lower()
    if kind == "application/json":
        images, fields = from_json(body)
    elif kind == "multipart/form-data":
        images, fields = from_multipart(content_type, body)
    else:
        raise UserError(f"Content-Type is {kind!r:.60}; expected application/json or multipart/form-data")
    if not 1 <= len(images) <= IMAGES:
        raise UserError(f"the request has {len(images):,} images; expected 1 to {IMAGES:,}; split it")
    unknown = sorted(fields.keys() - FIELDS)
    if unknown:
        raise UserError(f"the request has {unknown[0]!r:.40}; expected mpp, resample and images; correct the name")
    if "mpp" not in fields:
        raise UserError("the request has no mpp; expected the crops' um/px, such as 0.25; add it")
    try:
        mpp = float("nan") if isinstance(fields["mpp"], bool) else float(fields["mpp"])
    except (TypeError, ValueError, OverflowError):
        mpp = float("nan")
    asked = str(fields.get("resample", "false")).lower()
    if asked not in ("true", "false"):
        raise UserError(f"resample is {fields['resample']!r:.40}; expected true or false")
    resample = asked == "true"
    if not RESAMPLED[0] <= mpp <= RESAMPLED[1]:
        raise UserError(f"mpp is {fields['mpp']!r:.40}; expected {RESAMPLED[0]} to {RESAMPLED[1]} um/px")
    if abs(mpp / MPP - 1) > NEAR and not resample:
        raise UserError(f"mpp is {mpp:g}; expected {MPP} within {NEAR:.0%}; cut other crops, or set resample")
    return Request(images, mpp, resample)


def from_json(body: bytes) -> tuple[list[bytes], dict[str, Any]]:
    try:
        content = json.loads(body.decode())
        images = content["images"]
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise TypeError("images is no list of texts")
        return [base64.b64decode(image, validate=True) for image in images], content
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise UserError(f"the JSON cannot be read ({error!r:.120}); expected mpp, and images in base64") from None


def from_multipart(content_type: str, body: bytes) -> tuple[list[bytes], dict[str, Any]]:
    """Parts called image are images, with a file name or without; the others are fields (RFC 7578)."""
    boundary = header("Content-Type", content_type).get_param("boundary")
    parts = (b"\r\n" + body).split(b"\r\n--" + str(boundary).encode("latin-1", "replace"))
    if not boundary or len(parts) < 3 or not parts[-1].startswith(b"--"):
        raise UserError("the multipart body cannot be read; expected parts separated by the boundary in its header")
    images: list[bytes] = []
    fields: dict[str, Any] = {}
    for part in parts[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        lines = head.decode("utf-8", "replace").splitlines()
        text = next((line.partition(":")[2] for line in lines if line.lower().startswith("content-disposition:")), "")
        disposition = header("Content-Disposition", text)
        name = str(disposition.get_param("name", "", "content-disposition"))
        if name == "image":
            images.append(content)
        elif name in fields or disposition.get_filename() is not None:
            raise UserError(f"the request has {name!r:.40} twice or as a file; expected files called image; correct it")
        else:
            fields[name] = content[:100].decode("utf-8", "replace").strip()
    return images, fields


def header(name: str, value: str) -> Message:
    """One header, for its parameters."""
    message = Message()
    message[name] = " ".join(value.split())
    return message


def read_crop(number: int, content: bytes, request: Request) -> np.ndarray:
    """uint8 (H, W, 3) at MPP. UserError if the image cannot be read."""
    import numpy as np
    from PIL import Image

    from .imageio.source import Blob
    from .imageio.stack import read_stack

    pages = read_stack(Blob(f"image {number}", content))
    if len(pages) != 1:
        raise UserError(f"it has {len(pages)} pages; expected one; send each page as an image of its own")
    crop, factor = pages[0], request.mpp / MPP
    if max(crop.shape) > SIDE:
        raise UserError(f"it has {crop.shape[1]} x {crop.shape[0]} pixels; expected up to {SIDE}; cut it smaller")
    if abs(factor - 1) <= NEAR:
        return crop
    size = [max(1, round(side * factor)) for side in crop.shape[1::-1]]
    if max(size) > SIDE:
        raise UserError(f"it has {size[0]} x {size[1]} pixels at {MPP} um/px; expected up to {SIDE}; cut it smaller")
    return np.asarray(Image.fromarray(crop).resize((size[0], size[1]), Image.Resampling.BICUBIC))


def score(ensemble: Ensemble, request: Request) -> dict[str, Any]:
    """The response: `answers`, one per image in order, each with the CSV's fields or `error`."""
    manifest = ensemble.manifest
    answers: list[dict[str, Any]] = []
    crops = {}
    for number, content in enumerate(request.images):
        try:
            crops[number] = read_crop(number, content, request)
            answers.append({})
        except UserError as error:
            answers.append({"error": str(error)})
    if crops:
        prediction = ensemble.predict(list(crops.values()))
        names, members = fold_columns(manifest), member_columns(manifest)
        for k, number in enumerate(crops):
            p = float(prediction.p_atypical[k])
            folds = dict(zip(names, prediction.fold_p[:, k].tolist(), strict=True))
            several = dict(zip(members, prediction.member_p[:, k].tolist(), strict=True)) if members else {}
            parts = {**folds, **several, "spread": float(prediction.spread[k]), "ensemble": ensemble_id(manifest)}
            answers[number] = {"p_atypical": p, "class": class_of(p, manifest.threshold), **parts}
    return {"answers": answers, "failed": len(answers) - len(crops)}


def about(ensemble: Ensemble) -> dict[str, Any]:
    """The response to `GET /`: which ensemble answers requests, and what it expects."""
    manifest = ensemble.manifest
    return {
        "ensemble": manifest.name,
        "id": ensemble_id(manifest),
        "members": [
            {
                "name": member.name,
                "backbone": member.backbone,
                "folds": len(member.folds),
                "base_sha256": member.base_sha256,
                "licence": member.licence,
            }
            for member in manifest.members
        ],
        "threshold": manifest.threshold,
        "expected_mpp": MPP,
        "precision": ensemble.precision,
        "device": ensemble.device_name,
        "note": "P(atypical) presumes a mitotic figure. For research use; not a medical device.",
    }
