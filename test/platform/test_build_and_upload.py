"""What is uploaded: the model tarball, and build.sh and export.sh with a mock Docker client that notes its calls."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import tarfile
import zlib
from pathlib import Path

import pytest

from inference.errors import UserError
from inference.manifest import load_manifest
from release.bom import PRUNED, locked
from release.compress import BLOCK, compress
from release.tarball import main, write_model_tarball
from test.platform.test_preflight import CONFIG as IMAGE_CONFIG
from test.platform.test_preflight import FILES, saved, tar_of

ROOT = Path(__file__).resolve().parents[2]
BASE, CONFIG, ADAPTER = "some-base.safetensors", "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def ensemble(tmp_path: Path) -> Path:
    """An ensemble folder that the manifest accepts; its weights are a few bytes, for packing never opens them."""
    folder = tmp_path / "mine"
    contents = {
        BASE: b"base",
        f"fold0/{CONFIG}": b"{}",
        f"fold0/{ADAPTER}": b"adapter",
        "README.md": b"card",
        ".junk": b"",
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    sha = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    manifest = {
        "format": 1,
        "name": "mine",
        "backbone": "virchow",
        "pool": "token",
        "base": {"file": BASE, "sha256": sha[BASE]},
        "preprocess": {"crop": None, "size": 224, "kernel": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3},
        "folds": [{"folder": "fold0", "sha256": {name: sha[f"fold0/{name}"] for name in (CONFIG, ADAPTER)}}],
        "tta": "none",
        "averaging": "logit",
        "temperature": 1.0,
        "threshold": 0.5,
        "precision": {"fp32": 0.0},
        "licence": {},
        "provenance": {},
    }
    (folder / "ensemble.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def docker(tmp_path: Path, miniature: Path) -> Path:
    """A Docker client that writes each call as a line to `calls` beside it, without a bridge network, with buildx.

    Its image holds the miniature ensemble.
    """
    (tmp_path / "saved.tar").write_bytes(tar_of(saved([tar_of(FILES, {"bin": "usr/bin"})], IMAGE_CONFIG)))
    packages = [[name, version, "MIT"] for name, (version, _) in locked().items() if name not in PRUNED]
    inventory = {"python": packages, "debian": [], "weights": [], "ensemble": "miniature"}
    (tmp_path / "inventory.json").write_text(json.dumps(inventory))
    client = tmp_path / "docker"
    client.write_text(
        f"""#!/bin/sh
echo "$*" >>{tmp_path}/calls
case "$*" in
    "network inspect bridge") exit 1 ;;
    "build --help") echo "      --provenance string" ;;
    "image inspect --format"*ensemble*) echo {miniature} ;;
    "image inspect --format"*) echo 6700000000 ;;
    run*sha256sum*) sha256sum {miniature}/ensemble.json ;;
    "build --platform"*) cat >{tmp_path}/context.tar ;;
    save*) cat {tmp_path}/saved.tar ;;
    "run --rm --network none --entrypoint python "*) cat {tmp_path}/inventory.json ;;
esac
"""
    )
    client.chmod(0o755)
    return client


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_tarball_opens_as_an_ensemble_where_the_platform_unpacks_it(ensemble: Path, tmp_path: Path) -> None:
    target = write_model_tarball(ensemble, tmp_path / "out")
    assert target == tmp_path / "out" / "mine-model.tar.gz"
    with tarfile.open(target) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "model", filter="data")  # as the platform does
    assert names == ["README.md", "ensemble.json", f"fold0/{CONFIG}", f"fold0/{ADAPTER}", BASE]
    assert list(load_manifest(tmp_path / "model").bases) == [tmp_path / "model" / BASE]


def test_tarball_depends_on_nothing_but_the_content(ensemble: Path, tmp_path: Path) -> None:
    first = write_model_tarball(ensemble, tmp_path / "first").read_bytes()
    for path in ensemble.rglob("*"):
        os.utime(path, (1e9, 1e9))
    (ensemble / "README.md").chmod(0o600)
    assert write_model_tarball(ensemble, tmp_path / "second").read_bytes() == first


def test_tarball_can_leave_the_base_to_the_image(ensemble: Path, tmp_path: Path) -> None:
    with tarfile.open(write_model_tarball(ensemble, tmp_path, with_base=False)) as archive:
        assert BASE not in archive.getnames()


def test_altered_ensemble_is_not_packed(ensemble: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (ensemble / "fold0" / ADAPTER).write_bytes(b"other")
    with pytest.raises(UserError, match="SHA-256"):
        write_model_tarball(ensemble, tmp_path / "out")
    assert main([str(ensemble), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_export_writes_the_image_and_the_ensemble_that_it_holds(docker: Path, tmp_path: Path) -> None:
    done = run("export.sh", "--image", "registry:5000/me/mine:2", "--output", str(tmp_path / "out"), DOCKER=str(docker))
    assert done.returncode == 0, done.stdout + done.stderr
    written = ["SHA256SUMS", "mine.cdx.json", "mine.tar.gz", "miniature-model.tar.gz"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == written
    unpacked = subprocess.check_output(["gzip", "-dc", tmp_path / "out" / "mine.tar.gz"])
    assert unpacked == (tmp_path / "saved.tar").read_bytes()
    assert "PASS  one image" in done.stdout
    assert "PASS  a job answers with it" in done.stdout
    assert "Upload, at grand-challenge.org" in done.stdout
    assert "save registry:5000/me/mine:2" in (tmp_path / "calls").read_text().splitlines()  # one tag, by name
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=tmp_path / "out", check=True)
    assert len((tmp_path / "out/SHA256SUMS").read_text().splitlines()) == 3


def test_export_refuses_an_image_and_a_model_that_disagree(
    ensemble: Path, docker: Path, miniature: Path, tmp_path: Path
) -> None:
    options = ("--image", "mine", "--output", str(tmp_path / "out"))
    done = run("export.sh", *options, "--ensemble", str(ensemble), DOCKER=str(docker))
    assert done.returncode == 1
    assert "mine holds another ensemble than" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    alone = run("export.sh", *options, "--only", "model", "--ensemble", str(miniature), DOCKER="/bin/false")
    assert alone.returncode == 0, alone.stdout + alone.stderr


def test_a_failed_save_leaves_nothing(docker: Path, tmp_path: Path) -> None:
    docker.write_text(docker.read_text().replace("save*) cat", "save*) exit 1; cat"))
    options = ("--only", "image", "--image", "mine", "--output", str(tmp_path / "out"))
    assert run("export.sh", *options, DOCKER=str(docker)).returncode == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_a_fold_of_an_earlier_export_is_not_packed(ensemble: Path, tmp_path: Path) -> None:
    (ensemble / "fold7").mkdir()
    (ensemble / "fold7" / ADAPTER).write_bytes(b"old")
    with tarfile.open(write_model_tarball(ensemble, tmp_path / "out")) as archive:
        assert not [name for name in archive.getnames() if "fold7" in name]


def test_an_image_that_would_be_refused_is_a_failed_export(ensemble: Path, docker: Path, tmp_path: Path) -> None:
    root = IMAGE_CONFIG | {"config": IMAGE_CONFIG["config"] | {"User": "root"}}
    (tmp_path / "saved.tar").write_bytes(tar_of(saved([tar_of(FILES)], root)))
    options = ("--only", "image", "--image", "mine", "--output", str(tmp_path / "out"))
    done = run("export.sh", *options, DOCKER=str(docker))
    assert done.returncode == 1
    assert "FAIL  the container runs as root" in done.stdout
    assert "would be refused, or fail on the platform" in done.stderr
    assert "Upload, at" not in done.stdout


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 17])
def test_parallel_gzip_is_one_ordinary_stream(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    data = (random.Random(0).randbytes(BLOCK // 2) + bytes(BLOCK))[:BLOCK] * 4
    data = data[:size]
    packed = [io.BytesIO(), io.BytesIO()]
    for target, threads in zip(packed, (1, 4), strict=True):
        assert compress(io.BytesIO(data), target, total=size, threads=threads) == size
    assert packed[0].getvalue() == packed[1].getvalue()  # whatever the machine
    unpacker = zlib.decompressobj(31)
    assert unpacker.decompress(packed[0].getvalue()) == data
    assert unpacker.eof
    assert unpacker.unused_data == b""
    assert ("of about" in capsys.readouterr().err) == (size > 0)


def test_export_without_an_engine_writes_the_model_and_says_so(miniature: Path, tmp_path: Path) -> None:
    options = ("--ensemble", str(miniature), "--output", str(tmp_path / "out"))
    done = run("export.sh", *options, DOCKER="/bin/false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["SHA256SUMS", "miniature-model.tar.gz"]
    assert "no Docker engine answers" in done.stdout
    assert run("export.sh", "--only", "image", *options, DOCKER="/bin/false").returncode == 1


def test_build_asks_docker_for_what_the_platform_accepts(docker: Path, tmp_path: Path) -> None:
    ensemble = ROOT / "weights" / "default"
    if not (ensemble / "ensemble.json").exists():
        pytest.skip("weights/default is not there")
    arguments = {"DOCKER": str(docker), "IMAGE": "mine:1", "DOCKER_BUILD_ARGS": "--pull --no-cache"}
    done = run("build.sh", "--api", "invoke", **arguments)
    assert done.returncode == 0, done.stderr
    (build,) = [line for line in (tmp_path / "calls").read_text().splitlines() if line.startswith("build --platform")]
    assert build.startswith("build --platform linux/amd64 ")
    for option in (
        "--network host",
        "--provenance=false",
        "--pull --no-cache",
        "--tag mine:1",
        "ENSEMBLE=weights/default",
        "API_METHOD=invoke",
        "--label midog-lora.built=20",
    ):
        assert option in build
    assert build.endswith(" -")  # the context comes as an archive
    with tarfile.open(tmp_path / "context.tar") as archive:
        members = archive.getmembers()
    names = [member.name for member in members]
    assert {"Dockerfile", "requirements/job.txt", "requirements/bases.txt", "inference/job.py"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or "/." in name or name.startswith(("test", "."))]
    assert {(member.mtime, member.uid, member.gid) for member in members} == {(1735689600, 0, 0)}
    assert not any(member.islnk() or member.issym() for member in members)  # the phase's file comes twice
    assert run("build.sh", "--no-stamp", **arguments).returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "midog-lora.built" not in [line for line in calls if line.startswith("build --platform")][-1]


def test_what_a_build_replaced_is_removed_and_its_cache_is_not(docker: Path, tmp_path: Path) -> None:
    said = "echo ' ---> aaaaaaaaaaaa'; echo 'Step 2/2 : FROM job'; echo ' ---> bbbbbbbbbbbb'"
    text = docker.read_text().replace('"build --platform"*)', f'"build --platform"*) {said};')
    docker.write_text(text.replace("save*)", '"image ls"*) echo aaaaaaaaaaaa; echo cccccccccccc ;;\n    save*)'))
    assert run("build.sh", DOCKER=str(docker)).returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [line for line in calls if line.startswith("image rm")] == ["image rm cccccccccccc"]


def test_a_base_image_that_cannot_be_had_is_named(docker: Path) -> None:
    text = docker.read_text().replace('"build --platform"*)', '"build --platform"*) exit 1 ;;\n    unused)')
    docker.write_text(text.replace("case", 'case "$*" in "image inspect debian:12") exit 1 ;; esac\ncase', 1))
    done = run("build.sh", DOCKER=str(docker), BASE_IMAGE="debian:12")
    assert done.returncode == 1
    assert "the base image debian:12 is not here" in done.stderr
    assert "BASE_IMAGE=, or use --engine native" in done.stderr


def test_a_base_that_was_copied_in_part_is_removed(ensemble: Path, docker: Path, tmp_path: Path) -> None:
    """In a checkout of its own, which has no bases yet."""
    checkout = tmp_path / "checkout"
    for folder in ("requirements", "inference", "training", "release", "weights/bases", "test"):
        (checkout / folder).mkdir(parents=True)
    copied = ("build.sh", "Dockerfile", "requirements/job.txt", "requirements/bases.txt", "release/engine.sh")
    for name in (*copied, "inference/phase.json"):
        shutil.copy(ROOT / name, checkout / name)
    shutil.copytree(ensemble, checkout / "weights/mine")
    (checkout / "weights/mine" / BASE).unlink()
    half = 'cp*) echo half >"$3/half.safetensors"; exit 1 ;;'
    docker.write_text(docker.read_text().replace("save*)", f"{half}\n    save*)", 1))
    options = ("--engine", "docker", "--ensemble", "weights/mine")
    done = run(str(checkout / "build.sh"), *options, DOCKER=str(docker), IMAGE="mine")
    assert done.returncode == 1 and "cannot copy the bases out of mine" in done.stderr
    assert list((checkout / "weights/bases").iterdir()) == []
    assert [line for line in (tmp_path / "calls").read_text().splitlines() if line.startswith("cp ")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", "docker", "--ensemble", "/elsewhere"), "outside"),
        (("--engine", "docker", "--ensemble", "test"), "no test/ensemble.json"),
        (("--engine", "podman"), "expected docker or native"),
        (("--engine", "docker", "--api", "both"), "expected exec or invoke"),
        (("--engines", "docker"), "unknown option"),
        (("--engine",), "--engine has no value"),
        (("--engine", "native", "--ensemble", "test"), "no test/ensemble.json"),
        (("--engine", "native", "--requirements", "none.txt"), "no none.txt"),
    ],
)
def test_build_refuses_in_one_line(docker: Path, arguments: tuple[str, ...], message: str) -> None:
    done = run("build.sh", *arguments, DOCKER=str(docker))
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_build_says_when_no_engine_answers() -> None:
    done = run("build.sh", "--engine", "docker", DOCKER="/bin/false")
    assert done.returncode == 1
    assert "no Docker engine answers" in done.stderr


def test_native_build_installs_again_when_an_earlier_lock_comes_back(tmp_path: Path) -> None:
    """The stamp names what .venv holds now, not what it has ever held; a failed installation leaves no stamp."""
    checkout = tmp_path / "checkout"
    for name in ("build.sh", "release/engine.sh"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    for name in ("weights/mine/ensemble.json", "requirements/job.txt", "requirements/dev.txt", "requirements/ray.txt"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("{}" if name.endswith("json") else name)
    (checkout / "requirements/slides.txt").write_text("slides")
    calls, python = tmp_path / "calls", checkout / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ncase "$*" in *install*) echo "$*" >>{calls}; ! [ -e {tmp_path}/broken ] ;; esac\n')
    python.chmod(0o755)

    def installed(lock: str, requirements: str = "requirements.txt") -> bool:
        calls.unlink(missing_ok=True)
        (checkout / "requirements.txt").write_text(lock)
        options = ("--engine", "native", "--ensemble", "weights/mine", "--requirements", requirements)
        done = run(str(checkout / "build.sh"), *options, PATH="/usr/bin:/bin", DOCKER="/bin/false")
        assert (done.returncode == 0) != (tmp_path / "broken").exists(), done.stderr
        return calls.exists()

    assert installed("torch==1") and not installed("torch==1")
    assert installed("torch==2")
    assert installed("torch==1"), "the lock before last came back"
    assert not installed("torch==1", "requirements/job.txt"), "every lock contains the job's"
    assert installed("torch==1", "requirements/dev.txt") and not installed("torch==1")
    assert installed("torch==2")
    (tmp_path / "broken").touch()
    assert installed("torch==1")
    (tmp_path / "broken").unlink()
    assert installed("torch==2"), "an installation that failed has changed what was there"
