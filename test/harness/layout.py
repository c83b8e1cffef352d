"""A job's input as the platform lays it out: inputs.json in each of its forms, and the stack under a random name."""

from __future__ import annotations

import json
import shutil
import struct
import uuid
from pathlib import Path
from random import Random

from inference.phase import PHASE

SLUG, ANSWER, SUFFIXES = PHASE.slug, PHASE.output, PHASE.suffixes
VARIANTS = ("2026", "2025", "template", "stub", "extra", "missing")


def find_stacks(path: Path) -> list[Path]:
    """Lists the stacks to run: the file itself, or a folder's TIFF and MHA files in natural order (stack_2, stack_10).

    Raises: FileNotFoundError when there is none.
    """
    if path.is_file():
        return [path]
    found = [
        file
        for file in (path.iterdir() if path.is_dir() else [])
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    ]
    if not found:
        raise FileNotFoundError(f"{path}: no stack here; expected a {', '.join(SUFFIXES)} file or a folder of them")
    return sorted(found, key=lambda file: (len(file.stem.rstrip("0123456789")), len(file.name), file.name))


def count_pages(path: Path) -> int:
    """Number of crops in a stack: a TIFF's page directories, or the last of an MHA file's three dimensions.

    Raises: ValueError when the file is neither, or is damaged.
    """
    with path.open("rb") as stream:
        head = stream.read(16)
        if head[:2] not in (b"II", b"MM"):
            header = (head + stream.read(4096)).decode("latin-1")
            for line in header.splitlines():
                if line.startswith("DimSize"):
                    sizes = line.split("=")[1].split()
                    return int(sizes[2]) if len(sizes) > 2 else 1
            raise ValueError(f"{path.name} is neither a TIFF nor an MHA file")
        order = "<" if head[:2] == b"II" else ">"
        big = struct.unpack(order + "H", head[2:4])[0] == 43  # BigTIFF: 8-byte offsets
        count_format, entry, offset_format = ("Q", 20, "Q") if big else ("H", 12, "I")
        (offset,) = struct.unpack(order + offset_format, head[8:16] if big else head[4:8])
        pages, seen = 0, set[int]()
        try:
            while offset and offset not in seen:
                seen.add(offset)
                stream.seek(offset)
                (entries,) = struct.unpack(order + count_format, stream.read(struct.calcsize(order + count_format)))
                stream.seek(entries * entry, 1)
                (offset,) = struct.unpack(order + offset_format, stream.read(struct.calcsize(order + offset_format)))
                pages += 1
        except struct.error as error:
            raise ValueError(f"{path.name} is truncated after page {pages}") from error
        return pages


def socket_values(image_name: str, variant: str, rng: Random) -> list[dict[str, object]]:
    """Content of inputs.json. `variant`: the platform before and since December 2025 ("2025", "2026"), the challenge's
    template ("template"), the newer template with `socket` only ("stub"), the platform with keys added ("extra")."""
    short = {"slug": SLUG, "kind": "Image", "super_kind": "Image", "relative_path": f"images/{SLUG}"}
    full: dict[str, object] = short | {
        "title": "Stacked histopathology ROI cropouts",
        "description": "",
        "pk": 1181,
        "default_value": None,
        "overlay_segments": [],
        "look_up_table": None,
    }
    image = {"pk": str(uuid.UUID(int=rng.getrandbits(128))), "name": image_name}
    rest: dict[str, object] = {"value": None, "file": None, "image": image, "pk": rng.randrange(10**6, 10**7)}
    if variant == "2025":
        return [{"interface": full} | rest]
    if variant == "template":
        interface = short | {"example_value": None}
        return [{"image": {"name": image_name}, "file": None, "value": None, "interface": interface}]
    if variant == "stub":
        socket = {"slug": SLUG, "relative_path": f"images/{SLUG}", "is_image_kind": True, "is_json_kind": False}
        return [{"socket": socket, "image": {"name": image_name}, "file": None, "value": None}]
    extra: dict[str, object] = {"revision": 3, "origin": {"system": "x"}} if variant == "extra" else {}
    return [{"socket": full | extra, "interface": full} | rest | extra]


def write_input(stack: Path, folder: Path, variant: str, rng: Random) -> str:
    """Writes inputs.json and images/<slug>/<uuid><suffix> below `folder`; returns the job's random primary key.

    Args:
        stack: the file, copied byte for byte; the job learns its name only from inputs.json.
        variant: one of `VARIANTS`; "missing" leaves inputs.json out.
    """
    images = folder / "images" / SLUG
    images.mkdir(parents=True)
    shutil.copyfile(stack, images / f"{uuid.UUID(int=rng.getrandbits(128))}{stack.suffix}")
    if variant != "missing":
        (folder / "inputs.json").write_text(json.dumps(socket_values(stack.name, variant, rng), indent=4))
    return str(uuid.UUID(int=rng.getrandbits(128)))
