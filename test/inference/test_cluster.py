"""`score --ray` on a real local Ray: the answers of the local command, each once, whatever dies on the way."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs

from inference.errors import UserError
from test.harness import s3, sagemaker
from test.support import commands
from test.support.image_files import with_pillow
from test.support.miniature import make_ensemble, make_members
from test.support.processes import interruptible, until
from test.support.ray_cluster import cluster
from test.support.shard_files import CROPS, arguments, run, write_folder, write_parquet, write_tar

POISON = {3: b"", 17: b"\x89PNG\r\n\x1a\n" + bytes(40), 41: b"no image"}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray() -> Iterator[tuple[str, int]]:
    """Address and process id."""
    with cluster() as started:
        yield started


@pytest.fixture(scope="module")
def address(ray: tuple[str, int]) -> str:
    return ray[0]


def start(address: str, weights: Path, output: Path, *more: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "inference", "score", "--ray", address, *arguments(weights, output, *more)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, preexec_fn=interruptible)


def read(output: Path) -> pd.DataFrame:
    """All answers; formats differ in the columns that they bring."""
    tables = [pq.read_table(file) for file in output.glob("*.parquet")]
    found = pa.concat_tables(tables, promote_options="default").to_pandas()
    return found.sort_values(["path", "page"], ignore_index=True)


def errors(output: Path) -> pd.DataFrame:
    return pd.read_parquet(output / "_errors").sort_values("path", ignore_index=True)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    until(lambda: process.poll() is not None or condition(), "the command to come so far")
    assert process.poll() is None, process.communicate()


def finished(output: Path) -> dict[str, tuple[int, int]]:
    """Shards with answers, and what changes when one is written again."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in output.glob("*.parquet")}


def actors(ray: tuple[str, int]) -> set[int]:
    """Those of this cluster: others of the machine are not ours to count or to kill."""
    found = set()
    for process in psutil.Process(ray[1]).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "MapWorker" in process.name():
                found.add(process.pid)
    return found


@pytest.fixture(scope="module")
def answered(address, miniature, blobs, tmp_path_factory) -> tuple[Path, Path]:
    """The same crops in every format, and their answers from one run in shards of 20."""
    folder = tmp_path_factory.mktemp("answered")
    data = folder / "data"
    write_folder(data / "folder", blobs)
    write_tar(data / "a.tar", blobs)
    write_parquet(data / "a.parquet", blobs)
    write_folder(data / "tabled", blobs)
    rows = "".join(f"tabled/{n:03}.png,AMF {n}\n" for n in range(CROPS))
    (data / "table.csv").write_text("path,label\n" + rows)
    locations = [data / "folder", (data / "a.tar").as_uri(), data / "a.parquet", data / "table.csv"]
    assert run(address, miniature, folder / "out", *locations, "--shard", 20) == 0
    return data, folder / "out"


def test_every_format_gets_the_answers_of_the_local_command(answered, miniature, tmp_path) -> None:
    data, output = answered
    where = ["--weights", miniature, "--device", "cpu", "--precision", "fp32"]
    assert commands.inference("score", data / "folder", "--csv", tmp_path / "local.csv", *where) == 0
    with (tmp_path / "local.csv").open() as stream:
        wanted = list(csv.DictReader(stream))
    found = read(output)
    assert list(found)[: len(wanted[0])] == list(wanted[0])  # the same columns, then the input's
    assert len(found) == 4 * CROPS
    in_parquet = found[found.x.notna()].sort_values("x")
    formats = {
        "folder": found[found.path.str.contains("/folder/") & found.label.isna()],
        "table": found[found.label.notna()],
        "tar": found[found.key.notna()],
        "parquet": in_parquet,
    }
    for name, part in formats.items():
        assert len(part) == CROPS, name
        for column in ("p_atypical", "fold_0", "fold_1", "spread"):
            np.testing.assert_allclose(part[column], [float(row[column]) for row in wanted], atol=1e-6, err_msg=name)
        assert list(part["class"]) == [row["class"] for row in wanted]
        assert set(part.ensemble) == {wanted[0]["ensemble"]} and set(part.page) == {0}
    assert list(formats["folder"].path) == [row["path"] for row in wanted]
    assert [path.replace("/tabled/", "/folder/") for path in formats["table"].path] == list(formats["folder"].path)
    for column in ("pages", "content", "device", "precision"):
        assert list(formats["folder"][column].astype(str)) == [row[column] for row in wanted]
    assert list(formats["table"].label) == [f"AMF {n}" for n in range(CROPS)]
    assert list(formats["tar"].path) == [f"{data}/a.tar#s/{n:03}.png" for n in range(CROPS)]
    assert [json.loads(text)["x"] for text in formats["tar"].json] == list(range(CROPS))
    assert list(in_parquet.path) == [f"{data}/a.parquet#{n}" for n in range(CROPS)]
    assert list(in_parquet.slide) == [f"slide {n % 4}" for n in range(CROPS)]
    assert len(finished(output)) == 3 + 1 + 3 + 3  # the tar stays whole


def test_members_get_the_answers_and_the_columns_of_the_local_command(address, blobs, tmp_path) -> None:
    """Two members with bases, crops and views of their own."""
    weights = tmp_path / "two"
    weights.mkdir()
    members = {
        "lite": {"backbone": "efficientnet-lite0", "folds": 2, "tta": "rot4", "preprocess": {"crop": 32}},
        "dino": {"backbone": "dinov2-vits14", "folds": 1, "preprocess": {"crop": None, "size": 56}},
    }
    make_members(weights, members, weights=[0.25, 0.75], temperature=1.7, threshold=0.45)
    crops = write_folder(tmp_path / "crops", blobs[:10])
    where = ["--weights", weights, "--device", "cpu", "--precision", "fp32"]
    assert commands.inference("score", crops, "--csv", tmp_path / "local.csv", *where) == 0
    with (tmp_path / "local.csv").open() as stream:
        wanted = list(csv.DictReader(stream))
    assert run(address, weights, tmp_path / "out", crops, "--shard", 4) == 0
    found = read(tmp_path / "out")
    assert list(found) == list(wanted[0]) and len(found) == 10
    for column in ("p_atypical", "lite_p", "dino_p", "lite_fold_0", "lite_fold_1", "dino_fold_0", "spread"):
        np.testing.assert_allclose(found[column], [float(row[column]) for row in wanted], atol=1e-6, err_msg=column)
    assert list(found["class"]) == [row["class"] for row in wanted]


def test_a_rerun_computes_nothing_again(answered, miniature, tmp_path, capsys) -> None:
    data, output = answered
    before, lost = finished(output), sorted(output.glob("*.parquet"))[4]
    locations = [data / "folder", (data / "a.tar").as_uri(), data / "a.parquet", data / "table.csv"]
    assert run("nowhere:1", miniature, output, *locations, "--shard", 20) == 0  # it does not even connect
    assert "0 new crops (0 atypical) in 0 shards, 10 known already" in capsys.readouterr().out
    assert finished(output) == before
    assert lost.exists()


def test_a_killed_command_is_continued(ray, address, miniature, blobs, tmp_path, capsys) -> None:
    """kill -9 of the driver: no crop is lost, none is there twice, finished shards stay as they are."""
    file, output = write_parquet(tmp_path / "a.parquet", blobs * 10), tmp_path / "out"
    command = start(address, miniature, output, file, "--shard", 20, "--workers", 2)
    wait_for(lambda: len(finished(output)) >= 3, command)
    command.kill()
    command.communicate()
    until(lambda: not actors(ray), "the actors to end with the command")  # and they may finish a shard before they do
    kept = finished(output)
    assert 0 < len(kept) < 30
    assert run(address, miniature, output, file, "--shard", 20) == 0
    assert f"in {30 - len(kept)} shards, {len(kept)} known already" in capsys.readouterr().out
    assert sorted(pd.read_parquet(output).path) == sorted(f"{file}#{n}" for n in range(10 * CROPS))  # as anybody reads
    assert kept.items() <= finished(output).items()


def test_a_killed_actor_does_not_stop_the_run(ray, address, miniature, blobs, tmp_path) -> None:
    file, output = write_parquet(tmp_path / "a.parquet", blobs * 10), tmp_path / "out"
    command = start(address, miniature, output, file, "--shard", 40)
    wait_for(lambda: finished(output) and actors(ray), command)
    for victim in actors(ray):
        os.kill(victim, signal.SIGKILL)
    kept = finished(output)
    out, err = command.communicate()
    assert (command.returncode, err) == (0, "") and len(kept) < 15
    assert "600 new crops" in out and "in 15 shards" in out
    assert sorted(pd.read_parquet(output).path) == sorted(f"{file}#{n}" for n in range(10 * CROPS))


CRASHING = """
import os, sys
from inference.cluster import command as cluster
from test.support import commands

class Scorer(cluster.Scorer):  # workers get it by value, with this program's text
    def score(self, shard):
        if shard.shown.endswith("/crash"):
            with open(DEATHS, "a") as file:
                file.write("x")
            os.kill(os.getpid(), 11)
        return super().score(shard)

cluster.Scorer = Scorer
sys.exit(commands.inference("score", *sys.argv[1:]))
"""


def test_poison_is_named_and_stops_nothing(address, miniature, blobs, tmp_path, capsys) -> None:
    """Unreadable crops in every format, files that are not whole, a shard that crashes each worker that takes it."""
    data, output = tmp_path / "data", tmp_path / "out"
    bad = [POISON.get(n, blob) for n, blob in enumerate(blobs)]
    locations = [data / "all", write_folder(data / "crash", blobs[:5])]
    write_folder(data / "all/folder", bad)
    write_parquet(data / "all/a.parquet", bad)
    write_tar(data / "all/a.tar", bad)
    cut, damaged = write_tar(data / "all/cut.tar", blobs), data / "all/damaged.parquet"
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    damaged.write_bytes((data / "all/a.parquet").read_bytes()[:-100])
    program = CRASHING.replace("DEATHS", repr(str(tmp_path / "deaths")))
    command = [sys.executable, "-c", program, "--ray", address, *arguments(miniature, output, *locations)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "deaths").read_text() == "xxx"
    found = errors(output)
    poisoned = [
        f"{data}/all/{path}" for n in POISON for path in (f"a.parquet#{n}", f"a.tar#s/{n:03}.png", f"folder/{n:03}.png")
    ]
    assert sorted(found.path) == sorted([*poisoned, str(cut), str(damaged), f"{data}/crash"])
    lines = [f"not scored: {path}: {reason}" for path, reason in zip(found.path, found.reason, strict=True)]
    last = f"12 not scored, each in {output}/_errors, 3 of 6 shards have no answers"
    assert sorted(done.stderr.splitlines()) == sorted([*lines, last])
    reasons = found.set_index("path").reason
    assert "cannot be read to its end" in reasons[str(cut)]
    assert reasons[f"{data}/crash"] == "its worker died 3 times"
    answered = read(output)
    assert len(answered) == 3 * (CROPS - 3) and not set(answered.path) & set(poisoned)

    cut.write_bytes(whole)  # a rerun tries again what has no answers
    before = finished(output)
    assert run(address, miniature, output, *locations) == 3
    assert "in 2 shards, 3 known already" in capsys.readouterr().out
    assert sorted(errors(output).path) == sorted([*poisoned, str(damaged)])
    assert len(read(output)) == 3 * (CROPS - 3) + CROPS + 5
    assert before.items() <= finished(output).items()


def test_ctrl_c_ends_a_run_that_local_ray_continues(address, miniature, blobs, tmp_path) -> None:
    file, output = write_parquet(tmp_path / "a.parquet", blobs * 10), tmp_path / "out"
    command = start(address, miniature, output, file, "--shard", 40)
    wait_for(lambda: finished(output), command)
    command.send_signal(signal.SIGINT)
    out, err = command.communicate()
    assert (command.returncode, out) == (130, "")
    assert len(err.splitlines()) == 1 and "the same command resumes it" in err
    out, err = (command := start("local", miniature, output, file, "--shard", 40)).communicate()
    assert (command.returncode, err) == (0, "") and "known already" in out
    assert sorted(pd.read_parquet(output).path) == sorted(f"{file}#{n}" for n in range(10 * CROPS))


def test_an_output_belongs_to_one_ensemble_and_one_input(answered, miniature, blobs, tmp_path) -> None:
    data, output = answered
    before = finished(output)
    other = tmp_path / "other"
    other.mkdir()
    make_ensemble(other, folds=2, threshold=0.4)
    for folder, message in ((other, "holds answers with ensemble"), (miniature, "holds answers with shard 20")):
        with pytest.raises(UserError, match=message):
            run("nowhere:1", folder, output, data / "a.tar", *(["--shard", 20] if folder is other else []))
    for more, message in ((("--precision", "bf16"), "precision fp32"), (("--device", "cuda"), "device cpu")):
        with pytest.raises(UserError, match=f"holds answers with {message}"):
            run("nowhere:1", miniature, output, data / "a.tar", "--shard", 20, *more)
    with pytest.raises(UserError, match="whose input this command does not name"):
        run("nowhere:1", miniature, output, data / "a.tar", "--shard", 20)
    file = write_parquet(tmp_path / "a.parquet", blobs[:5])
    with pytest.raises(UserError, match="holds other Parquet files"):
        run("nowhere:1", miniature, tmp_path, data)
    with pytest.raises(UserError, match="which is read"):
        run("nowhere:1", miniature, data / "out", data)
    os.utime(data / "a.tar", ns=(0, 0))
    with pytest.raises(UserError, match=r"a\.tar has changed since"):
        run("nowhere:1", miniature, output, data / "a.tar", "--shard", 20)
    assert finished(output) == before and file.exists()


def test_any_history_ends_as_a_fresh_local_run_or_is_refused(address, miniature, blobs, tmp_path) -> None:
    """Answers lost, files changed before and after their answers were lost, inputs left out and added; in any order."""
    draw, output, fresh, other = random.Random(0), tmp_path / "out", tmp_path / "fresh.csv", tmp_path / "other"
    other.mkdir()
    make_ensemble(other, folds=2, threshold=0.4)
    write_folder(tmp_path / "a", blobs[:5])
    pages = [Image.open(io.BytesIO(blob)) for blob in blobs[5:8]]
    write_folder(tmp_path / "b", blobs[8:13]).joinpath("s.tiff").write_bytes(with_pillow(pages))
    inputs = [draw.choice([tmp_path / "a", tmp_path / "b"])]

    def score(where: str, *more: object) -> int:
        return run(where, miniature, output, *inputs, "--shard", 3, *more)

    def compare() -> None:
        assert score(address) == 0
        options = ["--weights", miniature, "--device", "cpu", "--precision", "fp32"]
        assert commands.inference("score", *inputs, "--csv", fresh, *options) == 0
        with fresh.open() as stream:
            wanted = sorted(csv.DictReader(stream), key=lambda row: (row["path"], int(row["page"])))
        fresh.unlink()
        found = read(output)
        for column in ("path", "page", "pages", "class", "content", "ensemble"):
            assert list(found[column].astype(str)) == [row[column] for row in wanted], column
        np.testing.assert_allclose(found.p_atypical, [float(row["p_atypical"]) for row in wanted], atol=1e-6)

    def refused(message: str, *more: object) -> None:
        with pytest.raises(UserError, match=message):
            score("nowhere:1", *more)

    compare()
    for step in draw.sample(["add", "leave out", "change", "lose", "lose and change"], 5):
        answered = draw.choice(sorted(output.glob("*.parquet")))
        crop = Path(draw.choice(pq.read_table(answered)["path"].to_pylist()))
        before, time = crop.read_bytes(), crop.stat().st_mtime_ns
        if step == "add":
            inputs = [tmp_path / "b", tmp_path / "a"]
        if "lose" in step:
            answered.unlink()
        if "change" in step:
            crop.write_bytes(draw.choice(blobs[13:]))
        if step == "leave out":
            inputs, whole = [tmp_path / "a" / "000.png"], inputs
            refused("does not name")
            inputs = whole
        elif step == "change":
            refused("has changed since")
            crop.write_bytes(before)
            os.utime(crop, ns=(time, time))
        compare()
        refused(
            *draw.choice([("holds answers with precision", "--precision", "bf16"), ("ensemble", "--weights", other)])
        )


def test_odd_shards(address, miniature, blobs, tmp_path, capsys) -> None:
    """A chunk without one good crop, an empty archive, long texts, a link back, a folder that gives nothing."""
    data = tmp_path / "data"
    write_folder(data / "linked", blobs[:3])
    (data / "linked" / "again").symlink_to(data)
    write_tar(data / "late.tar", [*(blobs * 3)[:128], b"no image"])
    write_tar(data / "empty.tar", [])
    table = pa.table({"path": pa.array(["a", "b"], pa.large_string()), "image": blobs[:2]})
    pq.write_table(table, data / "long.parquet")
    write_folder(tmp_path / "gone", [b"no image"] * 2)
    for _ in range(2):
        assert run(address, miniature, tmp_path / "out", data, tmp_path / "gone") == 3
        assert ", 1 of 5 shards have no answers" in capsys.readouterr().err
    found = read(tmp_path / "out")
    assert len(found) == 3 + 128 + 2 and {"a", "b"} <= set(found.path)
    reasons = errors(tmp_path / "out")
    assert len(reasons) == 3 and reasons.path.str.contains("late.tar#s/128.png").sum() == 1
    with pytest.raises(UserError, match="which is read"):
        run("nowhere:1", miniature, data, data)


@pytest.mark.shim
def test_a_store_is_read_and_written(address, miniature, blobs, answered, tmp_path) -> None:
    """S3, as moto serves it on loopback: shards from it, answers and errors to it, and a rerun that finds them."""
    sagemaker.install()
    with s3.s3_server() as bucket:
        poisoned = [POISON.get(n, blob) for n, blob in enumerate(blobs)]
        bucket.put("in/a.parquet", write_parquet(tmp_path / "a.parquet", poisoned).read_bytes())
        bucket.put("in/b.tar", write_tar(tmp_path / "b.tar", blobs).read_bytes())
        for n in range(5):
            bucket.put(f"in/images/{n:03}.png", blobs[n])
        store = f"s3://key:secret@{s3.BUCKET}"
        tail = f"?scheme=http&region=us-east-1&endpoint_override={bucket.url.partition('//')[2]}"
        for _ in range(2):
            assert run(address, miniature, f"{store}/out{tail}", f"{store}/in{tail}", "--shard", 20) == 3
        system, folder = fs.FileSystem.from_uri(f"{store}/out{tail}")
        files = [info.path for info in system.get_file_info(fs.FileSelector(folder)) if info.is_file]
        shards = [pq.read_table(file, filesystem=system) for file in files if file.endswith(".parquet")]
        notes = [info.path for info in system.get_file_info(fs.FileSelector(f"{folder}/_errors"))]
        noted = [path for note in notes for path in pq.read_table(note, filesystem=system)["path"].to_pylist()]
    found = pa.concat_tables(shards, promote_options="default").to_pandas().set_index("path").p_atypical
    local = read(answered[1]).set_index("path").p_atypical
    data = answered[0]
    wanted = {
        f"s3://{s3.BUCKET}/in/a.parquet#{n}": local[f"{data}/a.parquet#{n}"] for n in range(CROPS) if n not in POISON
    }
    wanted |= {f"s3://{s3.BUCKET}/in/b.tar#s/{n:03}.png": local[f"{data}/a.tar#s/{n:03}.png"] for n in range(CROPS)}
    assert set(found.index) >= set(wanted) and len(found) == len(wanted) + 5
    np.testing.assert_allclose(found[list(wanted)], list(wanted.values()), atol=1e-6)
    assert sorted(noted) == sorted(f"s3://{s3.BUCKET}/in/a.parquet#{n}" for n in POISON)
