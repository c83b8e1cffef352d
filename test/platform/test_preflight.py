"""Preflight on synthetic `docker save` tarballs: each defect is caught, with the right message."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inference.checks import Check, passed
from release.preflight import check_file, check_name_and_size, main
from test.support.programs import make_stack

PASSWD = "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000::/home/user:/bin/bash\ntoor:x:0:0::/root:/bin/sh\n"
FILES: dict[str, bytes | None] = {  # None is a folder
    "etc": None,
    "etc/passwd": PASSWD.encode(),
    "usr/bin/bash": b"#!",
    "usr/bin/sh": b"#!",
    "usr/bin/rm": b"#!",
    "usr/bin/chmod": b"#!",
    "usr/bin/python": b"#!",
    "home/user": None,
    "opt/app/inference.py": b"pass",
}
CONFIG: dict[str, Any] = {
    "architecture": "amd64",
    "os": "linux",
    "config": {
        "User": "user",
        "Entrypoint": ["python", "-m", "inference"],
        "Env": ["PATH=/usr/local/bin:/usr/bin:/bin"],
        "WorkingDir": "/opt/app",
        "Labels": {"org.grand-challenge.api-method": "exec"},
    },
}


def tar_of(files: dict[str, bytes | None], links: dict[str, str] | None = None) -> bytes:
    """A tar archive of files (None: a folder) and symbolic links; below home/user everything belongs to number 1000."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.mode, info.uid = 0o755, 1000 if name.startswith("home/") else 0
            info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return buffer.getvalue()


def saved(layers: list[bytes], config: dict[str, Any], images: int = 1) -> dict[str, bytes | None]:
    """Members as Docker 25 writes them: blobs by hash, then index.json, manifest.json, oci-layout."""
    blobs = {f"blobs/sha256/{hashlib.sha256(data).hexdigest()}": data for data in layers}
    text = json.dumps(config).encode()
    name = f"blobs/sha256/{hashlib.sha256(text).hexdigest()}"
    entry = {"Config": name, "RepoTags": ["midog-lora:latest"], "Layers": list(blobs)}
    manifest = json.dumps([entry] * images).encode()
    return {**blobs, name: text, "index.json": b"{}", "manifest.json": manifest, "oci-layout": b"{}"}


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., list[Check]]:
    def run(
        settings: dict[str, Any] | None = None,
        files: dict[str, bytes | None] | None = None,
        edit: Callable[[dict[str, bytes | None]], dict[str, bytes | None]] | None = None,
        second: dict[str, bytes | None] | None = None,
        images: int = 1,
        **config: Any,
    ) -> list[Check]:
        whole = {**CONFIG, **config, "config": {**CONFIG["config"], **(settings or {})}}
        layers = [tar_of(FILES | (files or {}), {"bin": "usr/bin"})] + ([tar_of(second)] if second else [])
        members = saved(layers, whole, images)
        path = tmp_path / "image.tar.gz"
        path.write_bytes(gzip.compress(tar_of(edit(members) if edit else members), 1))
        return check_file(path)

    return run


def failures(findings: list[Check], level: str = "FAIL") -> str:
    return "\n".join(finding.message for finding in findings if finding.level == level)


def test_a_good_image_passes_without_a_warning(check: Callable[..., list[Check]]) -> None:
    findings = check()
    assert passed(findings)
    assert failures(findings, "WARN") == ""
    assert "user user (number 1000, home /home/user)" in failures(findings, "PASS")


@pytest.mark.parametrize("user", ["", "root", "ROOT", "0", "0:0", "root:users"])
def test_root_is_refused(check: Callable[..., list[Check]], user: str) -> None:
    assert "runs as root" in failures(check({"User": user}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"User": "toor"}, "USER toor is number 0"),
        ({"User": "nobody2"}, "not in the image's /etc/passwd"),
        ({"User": "a b"}, "neither a name nor a number"),
        ({"Entrypoint": None, "Cmd": None}, "neither ENTRYPOINT nor CMD"),
        ({"Entrypoint": ["python9"]}, "python9, is not an executable file"),
        ({"Entrypoint": ["/opt/app/run.sh"]}, "run.sh, is not an executable file"),
        ({"Volumes": {"/input": {}}}, "VOLUME /input"),
        ({"Labels": {" Org.Grand-Challenge.API-method ": "'serve'"}}, "api-method is 'serve'"),
    ],
)
def test_settings_that_fail(check: Callable[..., list[Check]], settings: dict[str, Any], message: str) -> None:
    assert message in failures(check(settings))


@pytest.mark.parametrize(
    ("settings", "files", "message"),
    [
        ({"User": "1234"}, {}, "no line in /etc/passwd"),
        ({"Env": ["PATH=/usr/bin", "Grand_Challenge_X=1"]}, {}, "never reaches the program"),
        ({}, {"tmp/weights.bin": b"w" * 9}, "under /tmp (0.0 MB, e.g. /tmp/weights.bin)"),
        ({}, {"opt/ml/model/ensemble.json": b"{}"}, "under /opt/ml"),
        ({}, {"input/inputs.json": b"[]"}, "files under /input"),
    ],
)
def test_settings_and_files_that_warn(
    check: Callable[..., list[Check]], settings: dict[str, Any], files: dict[str, bytes | None], message: str
) -> None:
    findings = check(settings, files)
    assert passed(findings)
    assert message in failures(findings, "WARN")


def test_a_number_with_a_line_in_passwd_is_fine(check: Callable[..., list[Check]]) -> None:
    assert failures(check({"User": "1000:1000"}), "WARN") == ""


def test_later_layers_remove_files(check: Callable[..., list[Check]]) -> None:
    files: dict[str, bytes | None] = {"tmp": None, "tmp/cache": b"c"}
    assert "under /tmp" not in failures(check(files=files, second={"tmp/.wh.cache": b"", "x": b""}), "WARN")
    assert "under /tmp" not in failures(check(files=files, second={"tmp/.wh..wh..opq": b"", "x": b""}), "WARN")
    assert "no /bin/bash" in failures(check(second={"usr/bin/.wh.bash": b"", "x": b""}), "WARN")


def test_architecture(check: Callable[..., list[Check]]) -> None:
    assert "arm64 is not supported" in failures(check(architecture="arm64"))


def test_two_images(check: Callable[..., list[Check]]) -> None:
    assert "only have 1 image, it has 2" in failures(check(images=2))


def test_manifest_is_missing_or_under_another_name(check: Callable[..., list[Check]]) -> None:
    def dotted(members: dict[str, bytes | None]) -> dict[str, bytes | None]:
        return {f"./{name}": data for name, data in members.items()}

    def without(members: dict[str, bytes | None]) -> dict[str, bytes | None]:
        return {name: data for name, data in members.items() if name != "manifest.json"}

    assert "could not find manifest.json (there is ./manifest.json)" in failures(check(edit=dotted))
    assert "could not find manifest.json (there is oci-layout)" in failures(check(edit=without))


def test_config_is_missing_or_badly_named(check: Callable[..., list[Check]]) -> None:
    def rename(members: dict[str, bytes | None], new: str, keep: bool) -> dict[str, bytes | None]:
        old = json.loads(members["manifest.json"] or b"")[0]["Config"]
        manifest = (members["manifest.json"] or b"").replace(old.encode(), new.encode())
        return members | {"manifest.json": manifest} | ({new: members[old]} if keep else {})

    assert "could not find the config file" in failures(check(edit=lambda m: rename(m, f"{'a' * 64}.json", False)))
    assert "valid sha256 hash" in failures(check(edit=lambda m: rename(m, "config.json", True)))
    assert passed(check(edit=lambda m: rename(m, f"{'a' * 64}.json", True)))  # Docker before 25
    assert passed(check(edit=lambda m: rename(m, f"sha256:{'a' * 64}", True)))  # crane


def test_damaged_and_unreadable_files(check: Callable[..., list[Check]], tmp_path: Path) -> None:
    check()
    good = (tmp_path / "image.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(good[: len(good) // 2])
    assert "could not decompress" in failures(check_file(tmp_path / "cut.tar.gz"))
    (tmp_path / "image.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + good)
    found = check_file(tmp_path / "image.tar.zst")
    assert "refuses the name" in failures(found)
    assert "not zstd" in found[-1].fix


def test_size_limits(tmp_path: Path) -> None:
    for size, message in ((8.5, "close to the usual limit"), (10.5, "challenges allow 10 GB")):
        path = tmp_path / f"{size}.tar.gz"
        with path.open("wb") as stream:
            stream.truncate(int(size * 1e9))  # sparse
        findings = check_name_and_size(path)
        assert message in failures(findings, "WARN") + failures(findings)


def test_model_tarballs(tmp_path: Path) -> None:
    """The form; what is in it is judged as a job judges it (test_both_judges)."""

    def write(name: str, files: dict[str, bytes | None], links: dict[str, str] | None = None) -> Path:
        data = tar_of(files, links)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        return tmp_path / name

    weights: dict[str, bytes | None] = {"ensemble.json": b"{}", "fold0/adapter_model.safetensors": b"w" * 2000}
    assert "every job would fail: /opt/ml/model/ensemble.json" in failures(check_file(write("model.tar.gz", weights)))
    assert "gzip file" in failures(check_file(write("model.tar", weights)))
    nested = {f"default/{name}": data for name, data in weights.items()}
    assert "expected at the top" in failures(check_file(write("nested.tar.gz", nested)))
    assert "could not be extracted" in failures(check_file(write("link.tar.gz", weights, {"base": "/etc/passwd"})))


@pytest.mark.parametrize("name", ["sh", "rm", "chmod"])
def test_what_the_platform_runs_between_tasks_has_to_be_there(check: Callable[..., list[Check]], name: str) -> None:
    assert f"no /bin/{name}" in failures(check(second={f"usr/bin/.wh.{name}": b""}))


def test_stacks_are_judged_as_a_job_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stack = make_stack(tmp_path / "stack.tiff")
    assert main([str(stack)]) == 0 and "3 pages, the first 8 x 8" in capsys.readouterr().out
    stack.write_bytes(stack.read_bytes()[:200])
    assert main([str(stack)]) == 1 and "a job refuses this stack: " in capsys.readouterr().out


def test_command_line(check: Callable[..., list[Check]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check()
    assert main([str(tmp_path / "image.tar.gz")]) == 0
    assert "PASS  architecture amd64" in capsys.readouterr().out
    assert main([str(tmp_path / "none.tar.gz")]) == 1
    assert "Fix: run ./export.sh" in capsys.readouterr().out
