"""What is fuzzed: each target takes any bytes and raises AssertionError, or worse, where a job would end wrongly.

A job around a stub ensemble must end with valid answers and a silent stderr, or with exit code 1, one line on stderr
and an empty output folder. Reading an adapter must give finite tensors or one UserError.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import random
import shutil
import socket
import struct
import tarfile
import tempfile
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from inference.adapters import read_adapter
from inference.errors import UserError
from inference.manifest import load_manifest
from test.support.detection_files import MAKERS
from test.support.image_files import bad_files, good_files, metaimage, stack, with_pillow
from test.support.stub import LISTING, captured, check_ended, make_input, run_job, stub_manifest

LARGEST = 60_000  # bytes of a seed
SLOWEST = 10  # seconds of processor time for one job
INTERESTING = (0, 1, 2, 3, 4, 7, 8, 16, 255, 256, 4096, 8192, 8193, 65535, 1 << 31, (1 << 32) - 1)
LAYERS = ["blocks.0.attn.qkv", "blocks.1.attn.qkv", "patch_embed.proj"]


@cache
def workplace() -> Path:
    """A folder of this process."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    stub_manifest(folder / "ensemble")
    (folder / "output").mkdir()
    return folder


def job(content: bytes, name: str) -> None:
    """A job on a stack of these bytes."""
    folder = workplace() / "stack"
    shutil.rmtree(folder, ignore_errors=True)
    end(make_input(folder, content, name))


def inputs(content: bytes) -> None:
    """A job whose inputs.json holds these bytes."""
    end(make_input(workplace() / "listing", small_stack(), listing=content))


def manifest(content: bytes) -> None:
    """A job whose ensemble.json holds these bytes."""
    folder = workplace() / "altered"  # of its own: the other targets need a whole one
    stub_manifest(folder)
    (folder / "ensemble.json").write_bytes(content)
    end(make_input(workplace() / "listing", small_stack()), folder)


def end(input_dir: Path, weights: Path | None = None) -> None:
    output = workplace() / "output"
    for file in output.iterdir():
        file.unlink()
    start = time.process_time()
    check_ended(run_job(input_dir, output, weights or workplace() / "ensemble"))
    assert time.process_time() - start < SLOWEST


@cache
def small_stack() -> bytes:
    from PIL import Image

    return with_pillow([Image.fromarray(page) for page in stack(pages=2)])


@cache
def adapter() -> Path:
    """A right adapter for LAYERS."""
    from safetensors.numpy import save_file

    folder = workplace() / "adapter"
    folder.mkdir()
    ones = {"lora_A.weight": np.ones((2, 4), np.float32), "lora_B.weight": np.ones((12, 2), np.float32)}
    state = {f"base_model.model.{layer}.{name}": value for layer in LAYERS[:2] for name, value in ones.items()}
    state["base_model.model.head.weight"] = np.ones((1, 4), np.float32)
    state["base_model.model.head.bias"] = np.ones(1, np.float32)
    save_file(state, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": "blocks\\.\\d+\\.attn\\.qkv",
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": ["head"],
        "use_rslora": False,
        "rank_pattern": {},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    read_adapter(folder, LAYERS)
    return folder


def adapter_file(content: bytes, name: str) -> None:
    """Reading an adapter one of whose files holds these bytes."""
    file = adapter() / name
    right = file.read_bytes()
    file.write_bytes(content)
    try:
        read = read_adapter(adapter(), LAYERS)
    except UserError as error:
        assert "\n" not in str(error) and "expect" in str(error) and str(error).count(";") >= 2, error
    else:
        assert read.lora.keys() <= set(LAYERS) and read.lora and np.isfinite(read.scale)
        assert all(tensor.isfinite().all() for pair in read.lora.values() for tensor in pair)
    finally:
        file.write_bytes(right)


def user_error(read: Callable[[], object]) -> None:
    """What `read` does ends well, or in one line for the user."""
    try:
        read()
    except UserError as error:
        assert "\n" not in str(error) and "expect" in str(error), error


def crop_table(content: bytes) -> None:
    """A CSV file with paths of crops."""
    from inference.imageio.listing import list_crops

    file = workplace() / "crops.csv"
    file.write_bytes(content)

    def read() -> None:
        for item in list_crops([file]):
            assert item.label in (0, 1, None) and (item.page is None or item.page >= 0)

    user_error(read)


def detections(content: bytes) -> None:
    """A detector's CSV file: whatever it says, no crop's path leads out of the output folder."""
    from inference.slides.detections import read_detections

    file = workplace() / "detections.csv"
    file.write_bytes(content)

    def read() -> None:
        for detection in read_detections(file)[0]:
            path = Path(detection.path)
            assert not path.is_absolute() and ".." not in path.parts and path.suffix == ".png"
            assert abs(detection.x) <= 1e9 and abs(detection.y) <= 1e9

    user_error(read)


def objects(content: bytes) -> None:
    """A file with objects of a slide, of whatever program: those with a centre go back to QuPath with an answer."""
    from inference.answers import Answer
    from inference.slides.qupath import collection, with_answer
    from inference.slides.targets import collect

    file = workplace() / "found.geojson"
    file.write_bytes(content)
    about = load_manifest(workplace() / "ensemble")
    with contextlib.suppress(UserError):
        found = collect([file], Path("slide.svs"), None, (), "region", lambda name, reason: None)
        targets = [target for some in found.slides.values() for target in some]
        assert all(abs(target.x) < 1e9 and abs(target.y) < 1e9 for target in targets)
        answered = [with_answer(target.feature, Answer("a", 0, 0.5, (0.5,)), about) for target in targets]
        assert len(json.loads("".join(collection(answered, about)))["features"]) == len(targets)


def crop_settings(content: bytes) -> None:
    """crops.json in the folder of an earlier run: what it says is kept as it is, or the folder is refused."""
    from inference.slides.command import SETTINGS, claimed, keep_settings

    folder, settings = workplace() / "crops", crops_like()
    folder.mkdir(exist_ok=True)
    (folder / SETTINGS).write_bytes(content)

    def read() -> None:
        with claimed(folder, settings) as files:
            keep_settings(folder, settings, files)
        with claimed(folder, settings) as again:
            assert again == files

    user_error(read)


def crops_like() -> dict[str, object]:
    """The settings of a run, as in crops.json."""
    return {"side": 128, "mpp": 0.25, "slide_mpp": 0.5, "slides": "/slides"}


def shard(content: bytes) -> None:
    """A tar of crops: its records are read, or it is refused as shards are."""
    from inference.cluster.records import read_tar
    from inference.cluster.shards import UNREADABLE, Shard

    file = workplace() / "shard.tar"
    file.write_bytes(content)
    with contextlib.suppress(*UNREADABLE):
        for records, metadata in read_tar(Shard("shard", "tar", str(workplace()), str(file), "shard.tar")):
            assert len(records) == len(metadata)
            for record in records:
                user_error(record.read)


@cache
def object_files() -> dict[str, bytes]:
    """A file of each format, with two objects."""
    files = {}
    for name, make in MAKERS.items():
        make(workplace() / name, [(700.0, 301.0), (20.5, 30.0)])
        files[name] = (workplace() / name).read_bytes()
    return files


@cache
def small_tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in (("a.png", good_files()["rgb.png"][0]), ("a.json", b"{}"), ("b.tiff", small_stack())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def request(content: bytes) -> None:
    """The bytes of an HTTP request to the server, whose tasks do nothing: an answer or none, and no traceback."""
    from inference.serve import Handler

    server = types.SimpleNamespace(turn=threading.Lock(), stopping=True, scorer=None, invoke=None)
    ours, theirs = socket.socketpair()
    with ours, theirs, captured(2, "stderr") as err:
        theirs.sendall(content[:LARGEST])
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            Handler(ours, ("127.0.0.1", 1), server)  # type: ignore[arg-type]
        ours.shutdown(socket.SHUT_WR)
    assert err.getvalue() == "", err.getvalue()


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
        lambda: {"right": json.dumps(stub_manifest(workplace() / "ensemble")).encode()},
        (*JSON, "..", "/etc/passwd", "base.safetensors", "fold0"),
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
