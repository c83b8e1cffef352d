"""The bill of materials: valid CycloneDX, refused where lock and image differ, and true of the real image."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from inference.checks import docker
from inference.errors import UserError
from release.bom import PRUNED, locked, main, make_bom
from test.harness.engines import inspect

ROOT = Path(__file__).resolve().parents[2]
IMAGE = os.environ.get("IMAGE", "midog-lora")
DIGEST = "0" * 64


def inventory() -> dict[str, Any]:
    packages = [[name, version, "MIT"] for name, (version, _) in locked().items() if name not in PRUNED]
    weights = [["base.safetensors", DIGEST, "Apache-2.0", "pypi:x==1"], ["fold0/a.safetensors", DIGEST, "", ""]]
    return {"python": packages, "debian": [["libc6", "1:2+b", "amd64"]], "weights": weights, "ensemble": "x"}


def check_schema(text: str) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def test_it_is_valid_and_says_the_same_each_time() -> None:
    bom = make_bom("midog-lora", f"sha256:{DIGEST}", inventory())
    check_schema(json.dumps(bom))
    assert bom == make_bom("midog-lora", f"sha256:{DIGEST}", inventory())
    kinds = [component["type"] for component in bom["components"]]
    assert kinds.count("machine-learning-model") == 2
    assert kinds.count("library") == len(locked()) - len(PRUNED) + 1
    [numpy] = [component for component in bom["components"] if component["name"] == "numpy"]
    assert len(numpy["externalReferences"][0]["hashes"]) == len(locked()["numpy"][1]) > 1


@pytest.mark.parametrize(
    "edit", [lambda p: p.pop(), lambda p: p.append(["onnx", "1.0", ""]), lambda p: p[0].__setitem__(1, "0")]
)
def test_an_image_of_other_packages_is_refused(edit: Any) -> None:
    found = inventory()
    edit(found["python"])
    with pytest.raises(UserError, match=r"job\.txt pins"):
        make_bom("midog-lora", "x", found)


@pytest.mark.docker
@pytest.mark.skipif(docker() is None, reason="no Docker engine answers (release/engine.sh start)")
@pytest.mark.skipif(inspect(IMAGE) is None, reason=f"no image {IMAGE} (./build.sh)")
def test_of_the_real_image(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([IMAGE, "--docker", str(docker())]) == 0
    text = capsys.readouterr().out
    check_schema(text)
    components = json.loads(text)["components"]
    weights = {c["name"]: c["hashes"][0]["content"] for c in components if c["type"] == "machine-learning-model"}
    script = "sha256sum weights/bases/* weights/default/*/*.safetensors"
    command = [str(docker()), "run", "--rm", "--network", "none", "--entrypoint", "bash", IMAGE, "-c", script]
    found = [line.split() for line in subprocess.check_output(command, text=True).splitlines()]
    assert found
    assert {digest for digest, name in found if name.endswith(".safetensors")} == set(weights.values())
    assert "bash" in {c["name"] for c in components}
