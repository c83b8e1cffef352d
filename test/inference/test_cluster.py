"""`cluster` on a real local Ray: the answers of the local command, each once, whatever dies on the way."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from inference.errors import UserError
from test.harness import s3, sagemaker
from test.support import commands
from test.support.miniature import make_ensemble, make_members
from test.support.ray_cluster import cluster
from test.support.shard_files import (
    CROPS,
    POISON,
    errors,
    finished,
    read,
    run,
    write_folder,
    write_parquet,
    write_tar,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with cluster() as (found, _):
        yield found


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
