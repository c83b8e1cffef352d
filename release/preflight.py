"""Checks what is uploaded, before it is uploaded: `python -m release.preflight FILE...` (images, models, stacks).

First come the platform's own checks, then those that it does not make, so that a job fails later. Each prints one line,
PASS, WARN or FAIL, with the fix; the exit code is 1 if any failed. The file is read once, to its end: minutes for 8 GB.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import tempfile
from pathlib import Path
from typing import Any

from inference.checks import Check, passed
from inference.checksums import check_ensemble
from inference.contract import SUFFIXES as STACKS
from inference.errors import UserError
from inference.manifest import load_manifest
from inference.progress import speaking

from .savedimage import UNREADABLE, Layer, SavedImage, executable, find_file, read_image
from .unpack import SetupError, unpack

SUFFIXES = (".tar", ".tar.gz", ".tar.xz")
USER = re.compile(r"([A-Za-z][A-Za-z0-9._-]*|[0-9]+)(:([A-Za-z][A-Za-z0-9._-]*|[0-9]+))?")
SAVE = "write it with `docker save IMAGE | gzip` (./export.sh)"


def check_file(path: Path) -> list[Check]:
    """Checks one file: a stack by its name, else a model if it holds ensemble.json, otherwise an image."""
    if path.name.lower().endswith(STACKS):
        return [check_stack(path)]
    findings = check_name_and_size(path)
    try:
        image = read_image(path)
    except UNREADABLE as error:
        with path.open("rb") as stream:
            zstd = stream.read(4) == b"\x28\xb5\x2f\xfd"
        message = f"could not decompress the file or read it to its end ({error or type(error).__name__})"
        return [
            *findings,
            Check("FAIL", message, "compress with gzip, not zstd" if zstd else "export and copy it again"),
        ]
    findings.append(Check("PASS", f"Python's tarfile reads it to the end: {len(image.names)} members"))
    if any(Path(name).name == "ensemble.json" for name in image.names):
        return findings + check_model(path, image)
    return findings + check_image(image)


def check_stack(path: Path) -> Check:
    """Whether a job reads this stack; the finding is the job's own message where it does not."""
    from inference.imageio.stack import read_stack  # numpy, Pillow

    try:
        pages = read_stack(path)
    except UserError as error:
        return Check("FAIL", f"a job refuses this stack: {error}")
    return Check(
        "PASS", f"a job reads this stack: {len(pages)} pages, the first {pages[0].shape[1]} x {pages[0].shape[0]}"
    )


def check_name_and_size(path: Path) -> list[Check]:
    """Name and size, as the upload form and the challenges' rules require them."""
    findings = []
    if not path.name.endswith(SUFFIXES):
        fix = f"name it *{' or *'.join(SUFFIXES)}"
        findings.append(Check("FAIL", f"the upload form refuses the name {path.name}", fix))
    if len(path.name) > 128:
        findings.append(
            Check("FAIL", f"the name has {len(path.name)} characters, at most 128 are stored", "shorten it")
        )
    size = path.stat().st_size / 1e9
    if size > 10:
        findings.append(Check("FAIL", f"{size:.2f} GB; challenges allow 10 GB", "drop packages, caches and weights"))
    elif size > 8:
        findings.append(Check("WARN", f"{size:.2f} GB, close to the usual limit of 10 GB", "drop what you can"))
    else:
        findings.append(Check("PASS", f"{size:.2f} GB, below 10 GB"))
    return findings


def check_image(image: SavedImage) -> list[Check]:
    """The platform's validation of the manifest, in its order; like the platform, it stops at the first failure."""
    manifest = image.documents.get("manifest.json")
    if "manifest.json" not in image.names:
        index = next((name for name in ("./manifest.json", "oci-layout", "index.json") if name in image.names), None)
        message = "could not find manifest.json" + (f" (there is {index})" if index else "")
        return [Check("FAIL", message, f"{SAVE}; a model tarball holds ensemble.json")]
    if not isinstance(manifest, list) or len(manifest) != 1:
        number = len(manifest) if isinstance(manifest, list) else "no list of"
        return [Check("FAIL", f"the file should only have 1 image, it has {number}", "save one tag only")]
    name = str(manifest[0].get("Config", ""))
    config = image.documents.get(name)
    if not isinstance(config, dict):
        return [Check("FAIL", f"could not find the config file {name!r}", SAVE)]
    digest = name.removeprefix("blobs/sha256/").removesuffix(".json").removeprefix("sha256:")
    if len(digest) != 64:
        return [Check("FAIL", f"{name!r} does not have a valid sha256 hash", SAVE)]
    findings = [Check("PASS", f"one image, config {digest[:12]} (each upload needs a digest that is new)")]
    root = image.root(manifest[0].get("Layers", []))
    return findings + check_content(config.get("architecture"), config.get("config") or {}, root)


def check_content(architecture: object, settings: dict[str, Any], root: Layer) -> list[Check]:
    """The checks shared by a saved image and one that an engine holds: settings as in the Dockerfile, and files."""
    findings = [check_user(str(settings.get("User", "")), root)]
    if architecture != "amd64":
        message = f"architecture {architecture} is not supported"
        findings.append(Check("FAIL", message, "docker build --platform=linux/amd64"))
    else:
        findings.append(Check("PASS", "architecture amd64"))
    labels = {key.strip().lower(): value for key, value in (settings.get("Labels") or {}).items()}
    method = str(labels.get("org.grand-challenge.api-method", "exec")).lower().strip("\"'")
    if method not in ("exec", "invoke"):
        message = f"label org.grand-challenge.api-method is {method!r}"
        findings.append(Check("FAIL", message, "set it to exec or invoke"))
    return findings + check_forgotten(settings, root)


def check_user(user: str, root: Layer) -> Check:
    """USER is not root, by name, by number or by its line in the image's own passwd, and has a home of its own."""
    fix = "RUN useradd --create-home user, and USER user as the last line of the Dockerfile"
    lower = user.lower()
    if lower in ("", "root", "0") or lower.startswith(("0:", "root:")):
        return Check("FAIL", f"the container runs as root (USER is {user!r})", fix)
    if not USER.fullmatch(user):
        return Check("FAIL", f"USER {user!r} is neither a name nor a number, optionally with :group", fix)
    name, _, group = user.partition(":")
    groups = {line.split(":")[0] for line in root.texts.get("etc/group", "").splitlines()}
    if group and not group.isdigit() and group not in groups:
        return Check("FAIL", f"group {group} is not in the image's /etc/group: the job cannot start", fix)
    lines = [line.split(":") for line in root.texts.get("etc/passwd", "").splitlines() if line.count(":") == 6]
    line = next((line for line in lines if line[0] == name or (name.isdigit() and line[2] == name)), None)
    if line is None and name.isdigit():
        return Check("WARN", f"USER {name} has no line in /etc/passwd: HOME stays root's, caches fail", fix)
    if line is None:
        return Check("FAIL", f"USER {name} is not in the image's /etc/passwd: the job cannot start", fix)
    if line[2] == "0":
        return Check("FAIL", f"USER {name} is number 0: the upload accepts it, but it runs as root", fix)
    home = find_file(root.files, line[5])
    if home is None or not home.isdir() or home.uid != int(line[2]):
        return Check("WARN", f"USER {name} has no home of its own ({line[5]})", fix)
    return Check("PASS", f"user {line[0]} (number {line[2]}, home {line[5]})")


def check_forgotten(settings: dict[str, Any], root: Layer) -> list[Check]:
    """What the upload accepts but a run then fails on."""
    findings = []
    command = (settings.get("Entrypoint") or []) + (settings.get("Cmd") or [])
    if not command:
        findings.append(Check("FAIL", "neither ENTRYPOINT nor CMD: nothing can be started", "add an ENTRYPOINT"))
    else:
        folders = dict(str(line).split("=", 1) for line in settings.get("Env") or []).get("PATH", "/usr/bin:/bin")
        base = settings.get("WorkingDir") or "/"
        paths = [f"{folder}/{command[0]}" for folder in folders.split(":")]
        if "/" in command[0]:
            paths = [command[0] if command[0].startswith("/") else f"{base}/{command[0]}"]
        if any(executable(find_file(root.files, path)) for path in paths):
            findings.append(Check("PASS", f"entry point {' '.join(command)}"))
        else:
            message = f"the program of the entry point, {command[0]}, is not an executable file of the image"
            findings.append(Check("FAIL", message, "COPY it with execute permission, or correct PATH"))
    for volume in settings.get("Volumes") or {}:
        if volume.rstrip("/") in ("/input", "/output", "/tmp", "/opt/ml", "/opt/ml/model"):
            message = f"VOLUME {volume}: the platform cannot reset the folder"
            findings.append(Check("FAIL", message, "remove the VOLUME line"))
    hidden = [str(line).split("=")[0] for line in settings.get("Env") or []]
    for name in (name for name in hidden if name.lower().startswith("grand_challenge_")):
        findings.append(Check("WARN", f"ENV {name} never reaches the program", "choose another name"))
    for folder, reason in {"tmp": "/tmp is empty on the platform", "opt/ml": "/opt/ml belongs to the platform"}.items():
        baked = [path for path, entry in root.files.items() if path.startswith(f"{folder}/") and not entry.isdir()]
        if baked:
            size = sum(root.files[path].size for path in baked) / 1e6
            message = (
                f"{len(baked)} file(s) under /{folder} ({size:.1f} MB, e.g. /{baked[0]}) are gone in a job: {reason}"
            )
            findings.append(Check("WARN", message, "keep what the job needs under /opt/app"))
    for folder in ("input", "output"):
        baked = [path for path in root.files if path.startswith(f"{folder}/")]
        if baked:
            findings.append(Check("WARN", f"files under /{folder} are deleted, e.g. /{baked[0]}", "remove them"))
    for program in ("sh", "rm", "chmod"):
        paths = [f"/bin/{program}"] if program == "sh" else [f"/bin/{program}", f"/usr/bin/{program}"]
        if not any(executable(find_file(root.files, path)) for path in paths):
            message = f"no {paths[0]}: between two tasks the platform runs sh, rm and chmod in the container, as root"
            findings.append(Check("FAIL", message, "keep the base image's shell and core utilities"))
    if find_file(root.files, "/bin/bash") is None:
        findings.append(Check("WARN", "no /bin/bash: the organisers' own re-run needs it", "install bash"))
    return findings


def check_model(path: Path, image: SavedImage) -> list[Check]:
    """Rules of a model tarball: gzip, safe members, the ensemble at the top, and that a job can answer with it.

    Images may end in .tar or .tar.xz as well, models may not (AlgorithmModel of comic/grand-challenge.org).
    """
    with path.open("rb") as stream:
        if stream.read(2) != b"\x1f\x8b" or not path.name.endswith(".tar.gz"):
            fix = "tar -czf model.tar.gz -C ENSEMBLE ."
            return [Check("FAIL", "a model must be a gzip file with a name that ends in .tar.gz", fix)]
    with tempfile.TemporaryDirectory(prefix="preflight-") as name:
        try:
            unpack(str(path), name)
        except SetupError as error:
            return [Check("FAIL", str(error), "pack plain files with relative names, no outside links")]
        if not (Path(name) / "ensemble.json").is_file():
            nested = next(member for member in image.names if Path(member).name == "ensemble.json")
            message = f"ensemble.json lies at {nested}, expected at the top (it becomes /opt/ml/model/ensemble.json)"
            return [Check("FAIL", message, "tar -czf model.tar.gz -C ENSEMBLE .")]
        return [Check("PASS", "model tarball: gzip, safe members, ensemble.json at the top"), *check_job(Path(name))]


def check_job(folder: Path) -> list[Check]:
    """What a job would make of the unpacked model: its own check of the manifest and hashes, then one empty crop."""
    try:
        manifest = load_manifest(folder)
        check_ensemble(manifest)
        findings = [Check("PASS", f"ensemble {manifest.name}: manifest and hashes as a job checks them")]
        findings += [
            Check("WARN", f"{base.name} is not in the tarball", "upload it for an image that holds the same file")
            for base in manifest.bases
            if base.parent != folder
        ]
        if not all(map(importlib.util.find_spec, ("torch", "timm"))):
            fix = "./build.sh --engine native, then check again"
            return [*findings, Check("WARN", "the weights were not opened: PyTorch is not installed here", fix)]
        import numpy as np

        from inference.ensemble import Ensemble

        Ensemble(manifest, "cpu").predict([np.zeros((64, 64, 3), np.uint8)])
    except Exception as error:  # of any kind: it would end a job
        text = str(error).replace(str(folder), "/opt/ml/model")
        return [Check("FAIL", f"every job would fail: {text or type(error).__name__}", "export it again")]
    return [*findings, Check("PASS", "a job answers with it: one crop, on the CPU")]


def main(arguments: list[str] | None = None) -> int:
    """Prints the findings for each file; 0 when none failed."""
    parser = argparse.ArgumentParser(prog="python -m release.preflight", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    good = True
    for path in parser.parse_args(arguments).files:
        print(path)
        with speaking(f"checking {path.name}"):
            findings = check_file(path) if path.is_file() else [Check("FAIL", "no such file", "run ./export.sh")]
        print(*findings, sep="\n")
        good = good and passed(findings)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
