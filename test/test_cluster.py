"""`score --ray` on a real local Ray: the answers of the local command, each once, whatever dies on the way."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs

from inference import score
from inference.errors import UserError
from inference.records import read_shard
from inference.shards import UNREADABLE, plan, source_of
from test.harness import sagemaker
from test.miniature import make_ensemble
from test.ray_cluster import cluster

CROPS = 60
POISON = {3: b"", 17: b"\x89PNG\r\n\x1a\n" + bytes(40), 41: b"no image"}


def encode(rng: np.random.Generator) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(file: Path, blobs: list[bytes]) -> Path:
    with tarfile.open(file, "w") as archive:
        for n, blob in enumerate(blobs):
            for name, content in ((f"s/{n:03}.png", blob), (f"s/{n:03}.json", json.dumps({"x": n}).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file


def write_parquet(file: Path, blobs: list[bytes], rows: int = 10) -> Path:
    numbers = range(len(blobs))
    table = pa.table({"slide": [f"slide {n % 4}" for n in numbers], "image": blobs, "x": list(numbers)})
    pq.write_table(table, file, row_group_size=rows)
    return file


def write_folder(folder: Path, blobs: list[bytes]) -> Path:
    folder.mkdir(parents=True)
    for n, blob in enumerate(blobs):
        (folder / f"{n:03}.png").write_bytes(blob)
    return folder


@pytest.fixture(scope="module")
def blobs() -> list[bytes]:
    rng = np.random.default_rng(0)
    return [encode(rng) for _ in range(CROPS)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    make_ensemble(folder, folds=2)
    return folder


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with cluster() as (address, _):
        yield address


def arguments(weights: Path, output: object, *more: object) -> list[str]:
    return [
        *map(str, more),
        "--output",
        str(output),
        "--weights",
        str(weights),
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]


def run(address: str, weights: Path, output: object, *more: object) -> int:
    return score.main(["--ray", address, *arguments(weights, output, *more)])


def start(address: str, weights: Path, output: Path, *more: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "inference", "score", "--ray", address, *arguments(weights, output, *more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read(output: Path) -> pd.DataFrame:
    """All answers; formats differ in the columns that they bring."""
    tables = [pq.read_table(file) for file in output.glob("*.parquet")]
    found = pa.concat_tables(tables, promote_options="default").to_pandas()
    return found.sort_values(["path", "page"], ignore_index=True)


def errors(output: Path) -> pd.DataFrame:
    return pd.read_parquet(output / "_errors").sort_values("path", ignore_index=True)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)


def finished(output: Path) -> dict[str, tuple[int, int]]:
    """Shards with answers, and what changes when one is written again."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in output.glob("*.parquet")}


def actors() -> set[int]:
    return {process.pid for process in psutil.process_iter(["name"]) if "MapWorker" in process.info["name"]}


@pytest.fixture(scope="module")
def answered(address, weights, blobs, tmp_path_factory) -> tuple[Path, Path]:
    """The same crops in every format, and their answers from one run in shards of 20."""
    folder = tmp_path_factory.mktemp("answered")
    data = folder / "data"
    write_folder(data / "folder", blobs)
    write_tar(data / "a.tar", blobs)
    write_parquet(data / "a.parquet", blobs)
    rows = "".join(f"folder/{n:03}.png,AMF {n}\n" for n in range(CROPS))
    (data / "table.csv").write_text("path,label\n" + rows)
    locations = [data / "folder", (data / "a.tar").as_uri(), data / "a.parquet", data / "table.csv"]
    assert run(address, weights, folder / "out", *locations, "--shard", 20) == 0
    return data, folder / "out"


def test_every_format_gets_the_answers_of_the_local_command(answered, weights, tmp_path) -> None:
    data, output = answered
    assert score.main([str(data / "folder"), "--csv", str(tmp_path / "local.csv"), "--weights", str(weights),
                       "--device", "cpu", "--precision", "fp32"]) == 0  # fmt: skip
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
    assert list(formats["folder"].path) == list(formats["table"].path) == [row["path"] for row in wanted]
    assert list(formats["table"].label) == [f"AMF {n}" for n in range(CROPS)]
    assert list(formats["tar"].path) == [f"{data}/a.tar#s/{n:03}.png" for n in range(CROPS)]
    assert [json.loads(text)["x"] for text in formats["tar"].json] == list(range(CROPS))
    assert list(in_parquet.path) == [f"{data}/a.parquet#{n}" for n in range(CROPS)]
    assert list(in_parquet.slide) == [f"slide {n % 4}" for n in range(CROPS)]
    assert len(finished(output)) == 3 + 1 + 3 + 3  # the tar stays whole


def test_a_rerun_computes_nothing_again(answered, weights, tmp_path, capsys) -> None:
    data, output = answered
    before, lost = finished(output), sorted(output.glob("*.parquet"))[4]
    locations = [data / "folder", (data / "a.tar").as_uri(), data / "a.parquet", data / "table.csv"]
    assert run("nowhere:1", weights, output, *locations, "--shard", 20) == 0  # it does not even connect
    assert "0 new crops (0 atypical) in 0 shards, 10 known already" in capsys.readouterr().out
    assert finished(output) == before
    assert lost.exists()


def test_a_killed_command_is_continued(address, weights, blobs, tmp_path, capsys) -> None:
    """kill -9 of the driver: no crop is lost, none is there twice, finished shards stay as they are."""
    file, output = write_parquet(tmp_path / "a.parquet", blobs * 20), tmp_path / "out"
    command = start(address, weights, output, file, "--shard", 40, "--workers", 2)
    wait_for(lambda: len(finished(output)) >= 3, command)
    command.kill()
    command.communicate()
    kept = finished(output)
    assert 0 < len(kept) < 30
    while actors():  # they end with the command, and may finish a shard before they do
        time.sleep(0.01)
    kept = finished(output)
    assert run(address, weights, output, file, "--shard", 40) == 0
    assert f"in {30 - len(kept)} shards, {len(kept)} known already" in capsys.readouterr().out
    assert sorted(pd.read_parquet(output).path) == sorted(f"{file}#{n}" for n in range(20 * CROPS))  # as anybody reads
    assert kept.items() <= finished(output).items()


def test_a_killed_actor_does_not_stop_the_run(address, weights, blobs, tmp_path) -> None:
    file, output = write_parquet(tmp_path / "a.parquet", blobs * 10), tmp_path / "out"
    command = start(address, weights, output, file, "--shard", 40)
    wait_for(lambda: finished(output) and actors(), command)
    for victim in actors():
        os.kill(victim, signal.SIGKILL)
    kept = finished(output)
    out, err = command.communicate()
    assert (command.returncode, err) == (0, "") and len(kept) < 15
    assert "600 new crops" in out and "in 15 shards" in out
    assert sorted(pd.read_parquet(output).path) == sorted(f"{file}#{n}" for n in range(10 * CROPS))


CRASHING = """
import os, sys
from inference import cluster, score

class Scorer(cluster.Scorer):  # workers get it by value, with this program's text
    def score(self, shard):
        if shard.shown.endswith("/crash"):
            with open(DEATHS, "a") as file:
                file.write("x")
            os.kill(os.getpid(), 11)
        return super().score(shard)

cluster.Scorer = Scorer
sys.exit(score.main(sys.argv[1:]))
"""


def test_poison_is_named_and_stops_nothing(address, weights, blobs, tmp_path, capsys) -> None:
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
    command = [sys.executable, "-c", program, "--ray", address, *arguments(weights, output, *locations)]
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
    assert run(address, weights, output, *locations) == 3
    assert "in 2 shards, 3 known already" in capsys.readouterr().out
    assert sorted(errors(output).path) == sorted([*poisoned, str(damaged)])
    assert len(read(output)) == 3 * (CROPS - 3) + CROPS + 5
    assert before.items() <= finished(output).items()


def test_ctrl_c_ends_a_run_that_local_ray_continues(address, weights, blobs, tmp_path) -> None:
    file, output = write_parquet(tmp_path / "a.parquet", blobs * 10), tmp_path / "out"
    command = start(address, weights, output, file, "--shard", 40)
    wait_for(lambda: finished(output), command)
    command.send_signal(signal.SIGINT)
    out, err = command.communicate()
    assert (command.returncode, out) == (130, "")
    assert len(err.splitlines()) == 1 and "the same command goes on from there" in err
    out, err = (command := start("local", weights, output, file, "--shard", 40)).communicate()
    assert (command.returncode, err) == (0, "") and "known already" in out
    assert sorted(pd.read_parquet(output).path) == sorted(f"{file}#{n}" for n in range(10 * CROPS))


def test_a_tar_that_was_cut_is_never_taken_for_a_shorter_one(blobs, tmp_path) -> None:
    """Wherever it was cut; tarfile itself takes a cut between two members for the end."""
    file = write_tar(tmp_path / "a.tar", blobs[:3])
    whole = file.read_bytes()
    with tarfile.open(file) as archive:
        end = archive.getmembers()[-1].offset_data + 512
        cuts = [*(member.offset for member in archive.getmembers()), end]
    shard = plan([str(file)], 10, None)[0][0]
    assert sum(len(records) for records, _ in read_shard(shard)) == 3
    for cut in (*cuts, *range(0, end, 997)):
        file.write_bytes(whole[:cut])
        with pytest.raises(UNREADABLE):
            list(read_shard(shard))
    file.write_bytes(whole[: cuts[2]] + b"damaged!" + whole[cuts[2] + 8 :])
    with pytest.raises(UNREADABLE, match="cut off or damaged"):
        list(read_shard(shard))


def test_shards_keep_their_names_and_miss_no_row(blobs, tmp_path) -> None:
    """Over uneven row groups; the same names from another start, other names when the file was changed."""
    file = tmp_path / "a.parquet"
    table = pa.table({"image": [{"bytes": blob, "path": f"{n}.png"} for n, blob in enumerate(blobs)],
                      "path": [f"crop {n}" for n in range(CROPS)]})  # fmt: skip
    with pq.ParquetWriter(file, table.schema) as out:
        for begin, end in ((0, 1), (1, 25), (25, 25), (25, 32), (32, 33), (33, 60)):
            out.write_table(table[begin:end])
    shards, failed = plan([str(file), file.as_uri()], 10, None)
    names = [shard.name for shard in shards]
    assert not failed and names == [shard.name for shard in plan([str(file)], 10, None)[0]]
    chunks = [chunk for shard in shards for chunk in read_shard(shard)]
    assert [record.path for records, _ in chunks for record in records] == [f"crop {n}" for n in range(CROPS)]
    assert [name for _, metadata in chunks for name in metadata["image_path"].to_pylist()] == [
        f"{n}.png" for n in range(CROPS)
    ]
    sizes = [sum(len(records) for records, _ in read_shard(shard)) for shard in shards]
    assert sizes == [1, 24, 8, 27]
    os.utime(file, ns=(0, 0))
    changed = plan([str(file)], 10, None)[0]
    assert not {shard.name for shard in changed} & set(names)
    assert {source_of(shard.name) for shard in changed} == {source_of(name) for name in names}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--csv", "a.csv"], "--csv with --ray"),
        (["--report", "a.html"], "--report with --ray"),
        (["--attribution"], "--attribution with --ray"),
        (["--shard", "0"], "expected 1 or more"),
        (["--image", "other"], "columns with bytes: image; expected other"),
        (["missing"], "missing does not exist"),
        (["ftp://somewhere/x"], "expected a path or a URI"),
    ],
)
def test_what_makes_no_sense_is_refused_before_ray_starts(weights, blobs, tmp_path, more, message) -> None:
    file = write_parquet(tmp_path / "a.parquet", blobs[:3])
    with pytest.raises(UserError, match=message):
        run("nowhere:1", weights, tmp_path / "out", file, *more)


def test_options_of_a_cluster_need_one(weights, tmp_path) -> None:
    for more in (["--output", "x"], ["--workers", "2"], ["--shard", "5"], ["--image", "x"]):
        with pytest.raises(UserError, match=f"{more[0]} without --ray"):
            score.main([str(tmp_path), "--weights", str(weights), *more])
    with pytest.raises(UserError, match="--ray without --output"):
        score.main([str(tmp_path), "--weights", str(weights), "--ray", "local"])


def test_an_output_belongs_to_one_ensemble_and_one_input(answered, weights, blobs, tmp_path) -> None:
    data, output = answered
    before = finished(output)
    other = tmp_path / "other"
    other.mkdir()
    make_ensemble(other, folds=2, threshold=0.4)
    for folder, message in ((other, "holds answers with ensemble"), (weights, "holds answers with shard 20")):
        with pytest.raises(UserError, match=message):
            run("nowhere:1", folder, output, data / "a.tar", *(["--shard", 20] if folder is other else []))
    file = write_parquet(tmp_path / "a.parquet", blobs[:5])
    with pytest.raises(UserError, match="holds other Parquet files"):
        run("nowhere:1", weights, tmp_path, data)
    with pytest.raises(UserError, match="which is read"):
        run("nowhere:1", weights, data / "out", data)
    os.utime(data / "a.tar", ns=(0, 0))
    with pytest.raises(UserError, match=r"a\.tar has changed since"):
        run("nowhere:1", weights, output, data / "a.tar", "--shard", 20)
    assert finished(output) == before and file.exists()


def test_without_ray_one_line_says_what_to_install(weights, tmp_path) -> None:
    program = (
        "import sys; sys.modules['ray'] = None; from inference import __main__ as m; sys.exit(m.main(sys.argv[1:]))"
    )
    command = ["score", "--ray", "local", *arguments(weights, tmp_path / "out", tmp_path)]
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "ray is not installed" in done.stderr and "requirements-ray.txt" in done.stderr


def test_odd_shards(address, weights, blobs, tmp_path, capsys) -> None:
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
        assert run(address, weights, tmp_path / "out", data, tmp_path / "gone") == 3
        assert ", 1 of 5 shards have no answers" in capsys.readouterr().err
    found = read(tmp_path / "out")
    assert len(found) == 3 + 128 + 2 and {"a", "b"} <= set(found.path)
    reasons = errors(tmp_path / "out")
    assert len(reasons) == 3 and reasons.path.str.contains("late.tar#s/128.png").sum() == 1
    with pytest.raises(UserError, match="which is read"):
        run("nowhere:1", weights, data, data)


@pytest.mark.shim
def test_a_store_is_read_and_written(address, weights, blobs, answered, tmp_path) -> None:
    """S3, as moto serves it on loopback: shards from it, answers and errors to it, and a rerun that finds them."""
    sagemaker.install()
    with sagemaker.s3_server() as bucket:
        poisoned = [POISON.get(n, blob) for n, blob in enumerate(blobs)]
        bucket.put("in/a.parquet", write_parquet(tmp_path / "a.parquet", poisoned).read_bytes())
        bucket.put("in/b.tar", write_tar(tmp_path / "b.tar", blobs).read_bytes())
        for n in range(5):
            bucket.put(f"in/images/{n:03}.png", blobs[n])
        store = f"s3://key:secret@{sagemaker.BUCKET}"
        tail = f"?scheme=http&region=us-east-1&endpoint_override={bucket.url.partition('//')[2]}"
        for _ in range(2):
            assert run(address, weights, f"{store}/out{tail}", f"{store}/in{tail}", "--shard", 20) == 3
        system, folder = fs.FileSystem.from_uri(f"{store}/out{tail}")
        files = [info.path for info in system.get_file_info(fs.FileSelector(folder)) if info.is_file]
        shards = [pq.read_table(file, filesystem=system) for file in files if file.endswith(".parquet")]
        notes = [info.path for info in system.get_file_info(fs.FileSelector(f"{folder}/_errors"))]
        noted = [path for note in notes for path in pq.read_table(note, filesystem=system)["path"].to_pylist()]
    found = pa.concat_tables(shards, promote_options="default").to_pandas().set_index("path").p_atypical
    local = read(answered[1]).set_index("path").p_atypical
    data = answered[0]
    wanted = {
        f"s3://{sagemaker.BUCKET}/in/a.parquet#{n}": local[f"{data}/a.parquet#{n}"]
        for n in range(CROPS)
        if n not in POISON
    }
    wanted |= {
        f"s3://{sagemaker.BUCKET}/in/b.tar#s/{n:03}.png": local[f"{data}/a.tar#s/{n:03}.png"] for n in range(CROPS)
    }
    assert set(found.index) >= set(wanted) and len(found) == len(wanted) + 5
    np.testing.assert_allclose(found[list(wanted)], list(wanted.values()), atol=1e-6)
    assert sorted(noted) == sorted(f"s3://{sagemaker.BUCKET}/in/a.parquet#{n}" for n in POISON)
