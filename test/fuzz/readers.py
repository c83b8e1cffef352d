"""What is fuzzed of the other commands: tables, detections, objects, settings, shards and requests, each of any bytes.

Reading them must end well, or with the one-line error that the command reports.
What is fuzzed is imported here, not where it is used: the fuzzer sees only what was imported while it instruments.
"""

from __future__ import annotations

import contextlib
import io
import json
import socket
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from inference.answers import Answer
from inference.cluster.records import read_tar
from inference.cluster.shards import UNREADABLE, Shard
from inference.errors import UserError
from inference.imageio.listing import list_crops
from inference.manifest import load_manifest
from inference.server import Handler, ScoreEndpoint, Server
from inference.slides.crops import SETTINGS, claimed, keep_settings
from inference.slides.detections.geometry import outline
from inference.slides.detections.table import read_detections
from inference.slides.detections.targets import Selection, collect
from inference.slides.qupath import collection, with_answer
from test.fuzz.jobs import small_stack, workplace
from test.support.detection_files import MAKERS
from test.support.image_files import good_files
from test.support.stub import captured

LARGEST = 60_000  # bytes of a request


def user_error(read: Callable[[], object]) -> None:
    """What `read` does ends well, or in one line for the user."""
    try:
        read()
    except UserError as error:
        assert "\n" not in str(error) and "expect" in str(error), error


def crop_table(content: bytes) -> None:
    """A CSV file with paths of crops."""
    file = workplace() / "crops.csv"
    file.write_bytes(content)

    def read() -> None:
        for item in list_crops([file]):
            assert item.label in (0, 1, None) and (item.page is None or item.page >= 0)

    user_error(read)


def detections(content: bytes) -> None:
    """A detector's CSV file: whatever it says, no crop's path leads out of the output folder."""
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
    file = workplace() / "found.geojson"
    file.write_bytes(content)
    about = load_manifest(workplace() / "ensemble")

    def read() -> None:
        found = collect([file], Selection(Path("slide.svs")), lambda names, reason, scored=True: None)
        targets = [target for some in found.slides.values() for target in some]
        assert all(abs(target.x) < 1e9 and abs(target.y) < 1e9 for target in targets)
        answered = [with_answer(target.feature, Answer("a", 0, 0.5, (0.5,)), about) for target in targets]
        assert len(json.loads("".join(collection(answered, about)))["features"]) == len(targets)
        for target in targets:
            try:
                assert outline(target.feature["geometry"], figure=False).area >= 0
            except UserError:
                continue

    user_error(read)


def crop_settings(content: bytes) -> None:
    """crops.json in the folder of an earlier run: what it says is kept as it is, or the folder is refused."""
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
    return {"side": 128, "mpp": 0.25, "slide_mpp": 0.5, "origin": "scan", "slides": "/slides"}


def shard(content: bytes) -> None:
    """A tar of crops: its records are read, or it is refused as shards are."""
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
    ours, theirs = socket.socketpair()
    with ours, theirs, captured(2, "stderr") as err:
        theirs.sendall(content[:LARGEST])
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            Handler(ours, ("127.0.0.1", 1), stopping_server())
        ours.shutdown(socket.SHUT_WR)
    assert err.getvalue() == "", err.getvalue()


@cache
def stopping_server() -> Server:
    """A server on a free port of loopback that reads requests whole and then says that it is stopping."""
    server = Server(("127.0.0.1", 0), ThreadPoolExecutor(1), dict, ScoreEndpoint({}, lambda request: {}))
    server.stopping = True
    return server
