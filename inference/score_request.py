"""`POST /score` and `GET /` of the server: other programs send crops and get the CSV's fields back.

A request is multipart/form-data with one or more images and a field `mpp`, or JSON: {"mpp": 0.25, "images": [base64,
...]}. `mpp` is the crops' um/px: any resolution but the ensembles' own is refused unless `resample` is true. Images are
read as in a job and have one page each; the answer for one that cannot be read is the reason.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from typing import TYPE_CHECKING, Any

from .answers import Answer, value_columns
from .checksums import ensemble_id
from .errors import UserError
from .resolution import MPP, NEAR, PLAUSIBLE, is_near, is_plausible

if TYPE_CHECKING:
    import numpy as np

    from .ensemble import Ensemble

FIELDS = {"mpp", "resample", "images"}
BYTES, IMAGES, SIDE = 64 << 20, 4096, 2048  # of a request, and of an image's longer side
PIXELS = 1 << 28  # of all images of a request: 4,096 of 256 x 256
BATCH = 64  # crops that are decoded and scored together


@dataclass(frozen=True)
class Request:
    """images: the bytes of each; mpp: their um/px; resample: whether to resample other resolutions to MPP."""

    images: list[bytes]
    mpp: float
    resample: bool


def parse(content_type: str, body: bytes) -> Request:
    """UserError if the body has neither form, or no images or too many pixels, or no um/px."""
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
    if not is_plausible(mpp):
        raise UserError(f"mpp is {fields['mpp']!r:.40}; expected {PLAUSIBLE[0]} to {PLAUSIBLE[1]} um/px")
    if not is_near(mpp) and not resample:
        raise UserError(f"mpp is {mpp:g}; expected {MPP} within {NEAR:.0%}; cut other crops, or set resample")
    request = Request(images, mpp, resample)
    check_pixels(request)
    return request


def from_json(body: bytes) -> tuple[list[bytes], dict[str, Any]]:
    marks = sum(map(body.count, (b"{", b"[", b",", b":")))
    if marks > IMAGES + 100:  # base64 has none of them, and each may become an object of many bytes
        raise UserError(f"the JSON has {marks:,} values; expected mpp, and up to {IMAGES:,} images in base64; split it")
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
    if is_near(request.mpp):
        return crop
    size = [max(1, round(side * factor)) for side in crop.shape[1::-1]]
    if max(size) > SIDE:
        raise UserError(f"it has {size[0]} x {size[1]} pixels at {MPP} um/px; expected up to {SIDE}; cut it smaller")
    return np.asarray(Image.fromarray(crop).resize((size[0], size[1]), Image.Resampling.BICUBIC))


def check_pixels(request: Request) -> None:
    """UserError where the images would have too many pixels together, by their headers: nothing is decoded."""
    from .imageio.source import Blob
    from .imageio.stack import count_pixels

    total = 0
    for number, content in enumerate(request.images):
        with suppress(UserError):  # reading it says why
            total += count_pixels(Blob(f"image {number}", content))
    enlarged = total * (max(1.0, request.mpp / MPP) ** 2 if request.resample else 1)
    if enlarged > PIXELS:
        raise UserError(
            f"the images have {enlarged:,.0f} pixels together; expected at most {PIXELS:,}; split the request"
        )


def score(ensemble: Ensemble, request: Request) -> dict[str, Any]:
    """The response: `answers`, one per image in order, each with the CSV's fields or `error`."""
    answers: list[dict[str, Any]] = []
    for start in range(0, len(request.images), BATCH):
        crops: list[np.ndarray] = []
        batch: list[dict[str, Any]] = []
        for number, content in enumerate(request.images[start : start + BATCH], start):
            try:
                crops.append(read_crop(number, content, request))
                batch.append({})
            except UserError as error:
                batch.append({"error": str(error)})
        scored = iter(score_batch(ensemble, crops))
        answers += [answer or next(scored) for answer in batch]
    return {"answers": answers, "failed": sum("error" in answer for answer in answers)}


def score_batch(ensemble: Ensemble, crops: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """The CSV's fields of each crop."""
    if not crops:
        return []
    manifest = ensemble.manifest
    names, computed_by = value_columns(manifest), {"ensemble": ensemble_id(manifest)}
    return [
        dict(zip(names, answer.values(manifest.threshold), strict=True)) | computed_by
        for answer in Answer.of(ensemble.predict(crops))
    ]


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
