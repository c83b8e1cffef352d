"""The targets: each takes any bytes and raises AssertionError, or worse, where a program would end wrongly."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

from test.fuzz import foreign
from test.fuzz.jobs import adapter, adapter_file, inputs, job, manifest, manifest_with_head, workplace
from test.fuzz.readers import (
    crop_settings,
    crop_table,
    crops_like,
    detections,
    object_files,
    objects,
    request,
    shard,
    small_tar,
)
from test.support.image_files import bad_files, good_files, metaimage, stack
from test.support.stub import LISTING, stub_manifest

LARGEST = 60_000  # bytes of a seed
INTERESTING = (0, 1, 2, 3, 4, 7, 8, 16, 255, 256, 4096, 8192, 8193, 65535, 1 << 31, (1 << 32) - 1)


def mutate_tiff(data: bytes, largest: int, seed: int) -> bytes:
    """One change to a structure that matters: a field of a directory's entry, a link, or the order of two entries."""
    draw, content = random.Random(seed), bytearray(data[:largest])
    order = ">" if content[:2] == b"MM" else "<"
    places: list[int] = []
    try:
        offset = struct.unpack_from(order + "I", content, 4)[0]
        while offset and offset not in places and len(places) < 16:
            places.append(offset)
            count = struct.unpack_from(order + "H", content, offset)[0]
            offset = struct.unpack_from(order + "I", content, offset + 2 + 12 * count)[0]
        place = draw.choice(places)
        count = struct.unpack_from(order + "H", content, place)[0]
        entry = place + 2 + 12 * draw.randrange(max(count, 1))
        value = draw.choice((*INTERESTING, *places, draw.randrange(len(content)), draw.getrandbits(32)))
        what = draw.randrange(6)
        if what == 0:
            struct.pack_into(order + "I", content, place + 2 + 12 * count, value & 0xFFFFFFFF)
        elif what == 1:
            struct.pack_into(order + "H", content, entry + draw.choice((0, 2)), value & 0x1FF)
        elif what == 2:
            other = place + 2 + 12 * draw.randrange(max(count, 1))
            content[entry : entry + 12], content[other : other + 12] = (
                content[other : other + 12],
                content[entry : entry + 12],
            )
        else:
            struct.pack_into(order + "I", content, entry + draw.choice((4, 8)), value & 0xFFFFFFFF)
    except (struct.error, IndexError):
        pass
    return bytes(content)


def seeds(*endings: str) -> Callable[[], dict[str, bytes]]:
    def made() -> dict[str, bytes]:
        files = {name: file[0] for name, file in {**good_files(), **bad_files()}.items()}
        return {name: file for name, file in files.items() if name.lower().endswith(endings) and len(file) <= LARGEST}

    return made


@dataclass(frozen=True)
class Target:
    """run: called with the bytes; seeds: name to content; words: the fuzzer's dictionary; mutate: its own mutator."""

    run: Callable[[bytes], None]
    seeds: Callable[[], dict[str, bytes]]
    words: tuple[str, ...] = ()
    mutate: Callable[[bytes, int, int], bytes] | None = None


JSON = ("null", "true", "NaN", "-1", "1e999", '\\"', "[", "{", "}", "]", ":", ",", "\\\\u0000", "\\\\ud800")
OBJECTS = (
    "type",
    "FeatureCollection",
    "Feature",
    "features",
    "geometry",
    "coordinates",
    "Point",
    "MultiPoint",
    "Polygon",
    "MultiPolygon",
    "properties",
    "classification",
    "name",
    "names",
    "measurements",
    "metadata",
    "id",
    "region",
    "cells",
    "wsi_metadata",
    "centroid",
    "contour",
    "type_map",
    "nuc",
    "mag",
    "images",
    "annotations",
    "categories",
    "bbox",
    "image_id",
    "category_id",
    "types",
    "slide,x,y",
)
HEADER = tuple(line.split(" =")[0] for line in metaimage(stack(), 3).split(b"LOCAL")[0].decode().splitlines())
TARGETS = {
    "tiff": Target(lambda b: job(b, "stack.tiff"), seeds(".tif", ".tiff"), mutate=mutate_tiff),
    "mha": Target(
        lambda b: job(b, "stack.mha"), seeds(".mha"), (*HEADER, " = ", "LOCAL", "LIST", "True", "False", "0 1 ")
    ),
    "image": Target(
        lambda b: job(b, "stack.tif"), seeds(".png", ".jpg"), ("IHDR", "IDAT", "tRNS", "PLTE", "acTL", "fdAT")
    ),
    "inputs": Target(inputs, lambda: {"right": json.dumps(LISTING).encode()}, (*JSON, "socket", "interface", "slug")),
    "manifest": Target(
        manifest,
        lambda: {
            "right": json.dumps(stub_manifest(workplace() / "ensemble")).encode(),
            "head": json.dumps(manifest_with_head(workplace() / "ensemble")).encode(),
        },
        (*JSON, "..", "/etc/passwd", "base.safetensors", "fold0", "head", "kind", "layer_norm", "outputs", "eps"),
    ),
    "adapter-config": Target(
        lambda b: adapter_file(b, "adapter_config.json"),
        lambda: {"right": (adapter() / "adapter_config.json").read_bytes()},
        (*JSON, "target_modules", "lora_alpha", "rank_pattern", "use_dora", "\\\\d+", "(.*)+", "|", "(?:"),
    ),
    "adapter-tensors": Target(
        lambda b: adapter_file(b, "adapter_model.safetensors"),
        lambda: {"right": (adapter() / "adapter_model.safetensors").read_bytes()},
        (
            *JSON,
            "dtype",
            "shape",
            "data_offsets",
            "F16",
            "BF16",
            "I8",
            "F8_E4M3",
            "BOOL",
            "__metadata__",
            "lora_A.weight",
        ),
    ),
    "foreign-config": Target(
        lambda b: foreign.source(b, "adapter_config.json"),
        lambda: {"right": json.dumps(foreign.CONFIG).encode()},
        (*JSON, "exclude_modules", "layers_to_transform", "layers_pattern", "use_dora", "use_rslora", "(.*)+", "|"),
    ),
    "foreign-tensors": Target(
        lambda b: foreign.source(b, "adapter_model.safetensors"),
        lambda: {"right": foreign.save(foreign.tensors())},
        (*JSON, "dtype", "shape", "data_offsets", "lora_A", "lora_magnitude_vector", ".default", "modules_to_save"),
    ),
    "foreign-head": Target(
        lambda b: foreign.source(b, "adapter_model.safetensors", foreign.Said(("gelu",), 1e-5)),
        lambda: {"right": foreign.save(foreign.mlp())},
        (*JSON, "dtype", "shape", "data_offsets", "classifier.", ".weight", "running_mean", "running_var", "fc_norm"),
    ),
    "foreign-pickle": Target(lambda b: foreign.source(b, "last.pth"), lambda: {"right": foreign.pickled()}),
    "foreign-processor": Target(
        lambda b: foreign.said(b, "preprocessor_config.json"),
        lambda: {"right": json.dumps(foreign.PROCESSOR).encode()},
        (*JSON, "do_center_crop", "crop_size", "shortest_edge", "rescale_factor", "do_normalize"),
    ),
    "foreign-yaml": Target(
        lambda b: foreign.said(b, "config.yaml"),
        lambda: {"right": foreign.YAML},
        ("&d", "*d", "<<", ": ", "- ", "size", "mean", ".nan", ".inf", "!!python/object", "image_std"),
    ),
    "tables": Target(
        crop_table,
        lambda: {"right": b"path,page,label,domain\na.png,0,AMF,x\nb.tiff,,normal,\n"},
        ("path", "page", "label", '\\"', ",", "\\x0d", "\\xc2\\xb2"),
    ),
    "detections": Target(
        detections,
        lambda: {"right": b"slide,x,y,score\na.svs,1.5,2,0.9\n../b.svs,-3,4e3,\n"},
        ("slide", "..", "/", "nan", "1e999", '\\"', ","),
    ),
    "objects": Target(
        objects,
        lambda: {name: content for name, content in object_files().items() if len(content) <= LARGEST},
        (*JSON, *OBJECTS),
    ),
    "crops": Target(
        crop_settings,
        lambda: {
            "right": json.dumps(crops_like() | {"files": {"a.svs": "9-1-ff"}}).encode(),
            "unused": json.dumps(crops_like() | {"slide_mpp": None, "files": {}}).encode(),
        },
        (*JSON, *crops_like(), "files"),
    ),
    "shards": Target(shard, lambda: {"right": small_tar()}, ("ustar", "a.key", "._a.png", "\\x00")),
    "requests": Target(
        request,
        lambda: {
            "right": b"POST /invoke HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
            "get": b"GET /health HTTP/1.0\r\n\r\n",
        },
        ("POST", "GET", "/invoke", "/health", "Content-Length: ", "HTTP/1.1", "\\x0d\\x0a", "99999999999999999999"),
    ),
}
