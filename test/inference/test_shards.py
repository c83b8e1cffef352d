"""What a cluster is given to work on: shards by name and content, and options that are refused. No Ray is started."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.cluster.records import read_shard
from inference.cluster.shards import UNREADABLE, plan, resolve, source_of
from inference.errors import UserError
from inference.imageio.listing import list_crops
from inference.imageio.stack import read_stack
from test.support.shard_files import CROPS, arguments, run, write_folder, write_parquet, write_tar

NAMES = ["a.png", "_c.png", ".d.png", "_x/e.png", ".y/f.png", "z/g.PNG", "_meta.parquet", "_x/h.tar"]


@settings(max_examples=30, deadline=None)
@given(names=st.sets(st.sampled_from(NAMES), min_size=1))
def test_a_cluster_scores_the_same_crops_of_a_folder(names, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("crops")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    paths = {}
    for kind, listed in (
        ("local", lambda: [item.path for item in list_crops([folder])]),
        ("cluster", lambda: [item[0] for shard in plan([str(folder)], 10, None)[0] for item in shard.items or ()]),
    ):
        try:
            paths[kind] = sorted(listed())
        except UserError as error:
            assert str(error).startswith(f"no crops in {folder}")
            paths[kind] = []
    assert paths["local"] == paths["cluster"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.png").touch()
    scandir = os.scandir

    def refuse(path: str) -> object:  # the tests may run as root, who may read every folder
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    locked = str(tmp_path / "locked")
    assert [item.path for item in list_crops([tmp_path])] == [str(tmp_path / "a.png"), locked]
    with pytest.raises(UserError, match=r"locked cannot be read \(Permission denied\)"):
        read_stack(Path(locked))
    shards, failed = plan([str(tmp_path)], 10, None)
    assert len(shards) == 1 and (locked, "it cannot be listed (Permission denied)") in failed.values()


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


def names_in(file: Path) -> list[str]:
    shard = plan([str(file)], 10, None)[0][0]
    return [record.path.partition("#")[2] for records, _ in read_shard(shard) for record in records]


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_archives_that_were_joined_are_read_to_their_end(blobs, tmp_path, suffix) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_tar(first, blobs[:3])
    write_tar(second, blobs[3:5], first=3)
    pack = gzip.compress if suffix == "tar.gz" else bytes
    joined = tmp_path / f"joined.{suffix}"
    joined.write_bytes(pack(first.read_bytes()) + pack(second.read_bytes()))
    assert names_in(joined) == [f"s/{n:03}.png" for n in range(5)]
    joined.write_bytes(joined.read_bytes() + b"something else" * 100)
    with pytest.raises(UNREADABLE):
        names_in(joined)
    joined.write_bytes(pack(first.read_bytes()) + pack(second.read_bytes())[:-12000])
    with pytest.raises(UNREADABLE):
        names_in(joined)
    joined.write_bytes(pack(first.read_bytes()) * 2)
    with pytest.raises(UserError, match=r"s/000\.png twice"):
        names_in(joined)


def test_members_with_odd_names(blobs, tmp_path) -> None:
    """A text called `key` stands beside the sample's key; what macOS keeps beside a file is no crop."""
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as archive:
        for name, content in (("a.png", blobs[0]), ("a.key", b"mine"), ("._a.png", b"\0\5\x16\7"), ("._a.key", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    [(records, metadata)] = list(read_shard(plan([str(file)], 10, None)[0][0]))
    assert [record.path for record in records] == [f"{file}#a.png"]
    assert metadata.to_pylist() == [{"key": "a", "input_key": "mine"}]


def crops_of(*locations: object) -> list[tuple[str, int | None]]:
    shards = plan([str(location) for location in locations], 4, None)[0]
    return [(path, page) for shard in shards for path, page, _ in shard.items]


def test_each_crop_is_in_one_shard(blobs, tmp_path) -> None:
    """By whatever paths it is named: the first one counts."""
    folder, table = tmp_path / "crops", tmp_path / "table.csv"
    write_folder(folder, blobs[:5])
    write_folder(folder / "sub", blobs[:5])
    write_tar(folder / "a.tar", blobs[:2])
    (tmp_path / "link").symlink_to(folder / "sub")
    wanted = crops_of(folder)
    assert len(set(wanted)) == len(wanted) == 10
    assert crops_of(folder, folder / "sub", folder / "000.png", folder.as_uri(), tmp_path / "link") == wanted
    assert sorted(crops_of(folder / "sub", folder)) == sorted(wanted)
    assert [shard.kind for shard in plan([str(folder / "a.tar"), str(folder)], 99, None)[0]].count("tar") == 1
    table.write_text("path,page,x\ncrops/000.png,,1\ncrops/000.png,,1\ncrops/sub/000.png,,2\n")
    assert crops_of(table, table) == [(f"{folder}/000.png", None), (f"{folder}/sub/000.png", None)]
    assert sorted(crops_of(table, folder)) == sorted(wanted)  # the table keeps its columns
    with pytest.raises(UserError, match="named in another way"):
        crops_of(folder, table)
    for row, message in (("crops/000.png,,9", "two different rows"), ("crops/000.png,0,1", "named in another way")):
        table.write_text(f"path,page,x\ncrops/000.png,,1\n{row}\n")
        with pytest.raises(UserError, match=message):
            crops_of(table)
    table.write_text("path,page,x\ncrops/000.png,0,1\n")
    with pytest.raises(UserError, match="by page"):
        crops_of(table, folder)


def test_a_table_whose_crops_were_changed_is_another(blobs, tmp_path) -> None:
    write_folder(tmp_path / "crops", blobs[:2])
    table = tmp_path / "table.csv"
    table.write_text("path\ncrops/000.png\ncrops/001.png\n")
    before = plan([str(table)], 1, None)[0]
    os.utime(table, ns=(0, 0))  # the same table
    os.utime(tmp_path / "crops/001.png", ns=(0, 0))
    after = plan([str(table)], 1, None)[0]
    assert [one.name == other.name for one, other in zip(before, after, strict=True)] == [True, False]


def test_shards_keep_their_names_and_miss_no_row(blobs, tmp_path) -> None:
    """Over uneven row groups; the same names from another start, other names when the file was changed."""
    file = tmp_path / "a.parquet"
    table = pa.table(
        {
            "image": [{"bytes": blob, "path": f"{n}.png"} for n, blob in enumerate(blobs)],
            "path": [f"crop {n}" for n in range(CROPS)],
        }
    )
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
        (["--image", "other"], "columns with bytes: image; expected other"),
        (["missing"], "missing does not exist"),
        (["ftp://somewhere/x"], "expected a path or a URI"),
    ],
)
def test_what_makes_no_sense_is_refused_before_ray_starts(miniature, blobs, tmp_path, more, message) -> None:
    file = write_parquet(tmp_path / "a.parquet", blobs[:3])
    with pytest.raises(UserError, match=message):
        run("nowhere:1", miniature, tmp_path / "out", file, *more)


def test_a_count_is_1_or_more(miniature, tmp_path, capsys) -> None:
    for more in (["--workers", "0"], ["--shard", "-1"], ["--shard", "many"]):
        with pytest.raises(SystemExit):
            run("nowhere:1", miniature, tmp_path / "out", tmp_path, *more)
        assert f"{more[0]}: {more[1]}; expected a whole number, 1 or more" in capsys.readouterr().err


def test_without_ray_one_line_says_what_to_install(miniature, tmp_path) -> None:
    program = (
        "import sys; sys.modules['ray'] = None; from inference import __main__ as m; sys.exit(m.main(sys.argv[1:]))"
    )
    command = ["cluster", *arguments(miniature, tmp_path / "out", tmp_path)]
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "ray is not installed" in done.stderr and "requirements/ray.txt" in done.stderr


def test_an_error_shows_no_credentials() -> None:
    for uri in ("s3://AKIA:HIDDEN@bucket/x?nope=1", "s3://bucket/x?secret_key=HIDDEN&nope=1"):
        with pytest.raises(UserError) as raised:
            resolve(uri)
        assert "HIDDEN" not in str(raised.value) and "bucket/x" in str(raised.value)
