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

from inference import score
from inference.errors import UserError
from inference.records import read_shard
from inference.shards import UNREADABLE, plan, source_of
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
    limit = time.monotonic() + 120
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


def test_poison_goes_to_the_error_table(address, weights, blobs, tmp_path, capsys) -> None:
    """In every format; a shard that is not whole gives no answers at all, and is tried again when it was mended."""
    data, output = tmp_path / "data", tmp_path / "out"
    bad = [POISON.get(n, blob) for n, blob in enumerate(blobs)]
    write_folder(data / "folder", bad)
    write_parquet(data / "a.parquet", bad)
    write_tar(data / "a.tar", bad)
    whole = write_tar(data / "cut.tar", blobs).read_bytes()
    (data / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (data / "damaged.parquet").write_bytes((data / "a.parquet").read_bytes()[:-100])
    assert run(address, weights, output, data, "--shard", 1000) == 3
    captured = capsys.readouterr()
    found = errors(output)
    poisoned = [*(f"{data}/a.parquet#{n}" for n in POISON), *(f"{data}/a.tar#s/{n:03}.png" for n in POISON),
                *(f"{data}/folder/{n:03}.png" for n in POISON)]  # fmt: skip
    assert sorted(found.path) == sorted([*poisoned, f"{data}/cut.tar", f"{data}/damaged.parquet"])
    assert all(
        f"not scored: {path}: {reason}" in captured.err for path, reason in zip(found.path, found.reason, strict=True)
    )
    assert "11 not scored" in captured.err and "2 of 5 shards have no answers" in captured.err
    assert "cannot be read to its end" in found.set_index("path").reason[f"{data}/cut.tar"]
    answered = read(output)
    assert len(answered) == 3 * (CROPS - 3) and not set(answered.path) & set(poisoned)
    assert not answered.path.str.contains("cut").any()
    (data / "cut.tar").write_bytes(whole)
    assert run(address, weights, output, data, "--shard", 1000) == 3
    assert len(read(output)) == 3 * (CROPS - 3) + CROPS
    assert f"{data}/cut.tar" not in set(errors(output).path)


def test_a_shard_that_kills_its_workers_is_given_up(address, weights, blobs, tmp_path) -> None:
    data, output = tmp_path / "data", tmp_path / "out"
    for name in "abc":
        write_folder(data / name, blobs[:5])
    program = (
        "import os, sys; from inference import cluster, score\n"
        "class Scorer(cluster.Scorer):\n"
        "    def score(self, shard):\n"
        "        if shard.shown.endswith('/b'):\n"
        "            open(sys.argv[1], 'a').write('x'); os.kill(os.getpid(), 11)\n"
        "        return super().score(shard)\n"
        "cluster.Scorer = Scorer\n"
        "sys.exit(score.main(sys.argv[2:]))\n"
    )
    # the workers unpickle the class with its own argv: the file's name must travel in the program
    program = program.replace("sys.argv[1]", repr(str(tmp_path / "deaths"))).replace("sys.argv[2:]", "sys.argv[1:]")
    command = [sys.executable, "-c", program, "--ray", address, *arguments(weights, output, *(data / n for n in "abc"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 3
    assert (tmp_path / "deaths").read_text() == "xxx"
    assert done.stderr.splitlines()[0] == f"not scored: {data}/b: its worker died 3 times"
    assert len(read(output)) == 10
    assert run(address, weights, output, *(data / n for n in "abc")) == 0  # a rerun tries it again
    assert len(read(output)) == 15 and not list((output / "_errors").iterdir())


def test_a_cluster_of_its_own_ends_with_ctrl_c(weights, blobs, tmp_path) -> None:
    file, output = write_parquet(tmp_path / "a.parquet", blobs * 20), tmp_path / "out"
    command = start("local", weights, output, file, "--shard", 40)
    wait_for(lambda: finished(output), command)
    command.send_signal(signal.SIGINT)
    out, err = command.communicate()
    assert command.returncode == 130 and out == ""
    assert len(err.splitlines()) == 1 and "the same command goes on from there" in err


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
