"""The real image, built by build.sh on the Docker engine that answers; test/engine.sh starts one on bare Debian."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .harness.engines import docker

pytestmark = pytest.mark.docker
ROOT = Path(__file__).resolve().parents[1]
IMAGE = "midog-lora-test"


@pytest.fixture(scope="module")
def image() -> str:
    if not docker():
        assert not os.environ.get("REQUIRE_DOCKER"), "REQUIRE_DOCKER is set, and no Docker engine answers"
        pytest.skip("no Docker engine answers; on bare Debian: test/engine.sh start")
    if not (ROOT / "weights" / "default" / "ensemble.json").exists():
        pytest.skip("weights/default is not there")
    built = subprocess.run(
        [ROOT / "build.sh", "--engine", "docker"], env=os.environ | {"IMAGE": IMAGE}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    print(built.stdout[built.stdout.rfind("layers of") :])
    return IMAGE


@pytest.fixture(scope="module")
def inspected(image: str) -> dict[str, Any]:
    return json.loads(subprocess.check_output([str(docker()), "image", "inspect", image]))[0]


def inside(image: str, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs a command in the image as its own user, with nothing that a job must not rely on."""
    strict = (
        "--network",
        "none",
        "--read-only",
        "--cap-drop",
        "ALL",
        "--security-opt",
        "no-new-privileges",
        "--memory",
        "16g",
    )
    whole = [str(docker()), "run", "--rm", *strict, "--entrypoint", command[0], *options, image, *command[1:]]
    return subprocess.run(whole, capture_output=True, text=True)


def test_config_is_what_the_platform_demands(inspected: dict[str, Any]) -> None:
    config = inspected["Config"]
    assert (inspected["Architecture"], inspected["Os"]) == ("amd64", "linux")
    assert config["User"] == "user"
    assert config["Entrypoint"] == ["python", "-m", "inference"]  # exec form: no shell between the platform and the job
    assert config["Labels"]["org.grand-challenge.api-method"] == "exec"
    assert not config.get("Volumes")  # the platform replaces /input, and a mount point there would stop it
    environment = dict(entry.split("=", 1) for entry in config["Env"])
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert not any(name.upper().startswith("GRAND_CHALLENGE_") for name in environment)


def test_a_new_ensemble_uploads_as_one_small_layer(image: str) -> None:
    answer = subprocess.check_output(
        [str(docker()), "history", "--human=false", "--format", "{{.Size}}", image], text=True
    )
    sizes = [size for size in map(int, answer.split()) if size]
    assert sizes[0] < 50e6, "code and adapters"
    assert sizes[1] < 50e6, "the default ensemble's base"
    assert sum(sizes) < 7.5e9


def test_user_has_a_home_and_cannot_change_the_code(image: str) -> None:
    script = "id -un; cd; pwd; find /opt/app ! -readable; find /opt/app /opt/venv -writable ! -type l"
    done = inside(image, "bash", "-c", script)
    assert done.stdout.split() == ["user", "/home/user"]
    assert done.stderr == ""


def test_nothing_lies_where_the_platform_mounts(image: str) -> None:
    assert inside(image, "bash", "-c", "ls -A /tmp /input /output /opt/ml 2>/dev/null").stdout.split() == ["/tmp:"]


def test_code_is_compiled_and_used_as_compiled(image: str) -> None:
    done = inside(image, "python", "-v", "-c", "import inference.manifest")
    assert "code object from '/opt/app/inference/__pycache__/manifest.cpython-311.pyc'" in done.stderr


def test_pruned_environment_computes_and_finds_its_cuda_libraries(image: str) -> None:
    program = """
import ctypes, glob, subprocess, torch, torchvision, timm
timm.create_model("vit_tiny_patch16_224")(torch.randn(1, 3, 224, 224))
timm.create_model("tf_efficientnet_lite0")(torch.randn(2, 3, 64, 64))
torch.linalg.eigh(torch.eye(3))
site = torch.__path__[0] + "/.."
for name in glob.glob(site + "/torch/lib/*.so") + glob.glob(site + "/nvidia/*/lib/*.so*"):
    for line in subprocess.run(["ldd", name], capture_output=True, text=True).stdout.splitlines():
        if "not found" in line:
            print(line.split()[0])
for name in glob.glob(site + "/nvidia/cudnn/lib/*.so*") + glob.glob(site + "/nvidia/cusolver/lib/*.so*"):
    ctypes.CDLL(name)
"""
    done = inside(image, "python", "-c", program, options=("--tmpfs", "/tmp"))
    assert done.returncode == 0, done.stderr
    # the driver comes from the host; the others belong to fabrics between nodes
    driver, fabric = {"libcuda.so.1"}, {"libmlx5.so.1", "librdmacm.so.1", "libibverbs.so.1", "libfabric.so.1"}
    fabric |= {"libucs.so.0", "libucp.so.0", "libpmix.so.2", "liboshmem.so.40", "libmpi.so.40"}
    assert set(done.stdout.split()) <= driver | fabric


def test_bad_input_fails_with_one_line(image: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    done = inside(image, "python", "-m", "inference", options=("-v", f"{tmp_path}:/input:ro", "--tmpfs", "/output"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
