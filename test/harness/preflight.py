"""Checks what is uploaded, before it is uploaded: `python -m test.harness.preflight FILE...` (image or model tarballs).

First the platform's own checks, then what it forgets and lets fail at run time. One pass, warn or fail line each, with
the fix; the exit code is 1 when one failed. The file is read once, to its end: some minutes for 8 GB.
"""

from __future__ import annotations

import argparse
import re
import tarfile
from pathlib import Path
from typing import Any

from test.harness.findings import Finding, passed
from test.harness.savedimage import UNREADABLE, Layer, SavedImage, executable, find_file, read_image
from test.harness.shim import unsafe

SUFFIXES = (".tar", ".tar.gz", ".tar.xz")
USER = re.compile(r"([A-Za-z][A-Za-z0-9._-]*|[0-9]+)(:([A-Za-z][A-Za-z0-9._-]*|[0-9]+))?")
SAVE = "write it with `docker save IMAGE | gzip` (./export.sh)"


def check_file(path: Path) -> list[Finding]:
    """Checks one tarball: an image, or a model where it holds ensemble.json and nothing of an image."""
    findings = check_name_and_size(path)
    try:
        image = read_image(path)
    except UNREADABLE as error:
        with path.open("rb") as stream:
            zstd = stream.read(4) == b"\x28\xb5\x2f\xfd"
        message = f"could not decompress the file or read it to its end ({error or type(error).__name__})"
        return [
            *findings,
            Finding("fail", message, "compress with gzip, not zstd" if zstd else "export and copy it again"),
        ]
    findings.append(Finding("pass", f"Python's tarfile reads it to the end: {len(image.names)} members"))
    if any(Path(name).name == "ensemble.json" for name in image.names):
        return findings + check_model(path, image)
    return findings + check_image(image)


def check_name_and_size(path: Path) -> list[Finding]:
    """Name and size as the upload form and the challenges' rules want them."""
    findings = []
    if not path.name.endswith(SUFFIXES):
        fix = f"name it *{' or *'.join(SUFFIXES)}"
        findings.append(Finding("fail", f"the upload form refuses the name {path.name}", fix))
    if len(path.name) > 128:
        findings.append(
            Finding("fail", f"the name has {len(path.name)} characters, at most 128 are stored", "shorten it")
        )
    size = path.stat().st_size / 1e9
    if size > 10:
        findings.append(Finding("fail", f"{size:.2f} GB; challenges allow 10 GB", "drop packages, caches and weights"))
    elif size > 8:
        findings.append(Finding("warn", f"{size:.2f} GB, close to the usual limit of 10 GB", "drop what you can"))
    else:
        findings.append(Finding("pass", f"{size:.2f} GB, below 10 GB"))
    return findings


def check_image(image: SavedImage) -> list[Finding]:
    """The platform's validation of the manifest, in its order; it stops at the first failure, and so does this."""
    manifest = image.documents.get("manifest.json")
    if "manifest.json" not in image.names:
        found = next((name for name in ("./manifest.json", "oci-layout", "index.json") if name in image.names), None)
        message = "could not find manifest.json" + (f" (there is {found})" if found else "")
        return [Finding("fail", message, f"{SAVE}; a model tarball holds ensemble.json")]
    if not isinstance(manifest, list) or len(manifest) != 1:
        number = len(manifest) if isinstance(manifest, list) else "no list of"
        return [Finding("fail", f"the file should only have 1 image, it has {number}", "save one tag only")]
    name = str(manifest[0].get("Config", ""))
    config = image.documents.get(name)
    if not isinstance(config, dict):
        return [Finding("fail", f"could not find the config file {name!r}", SAVE)]
    digest = name.removeprefix("blobs/sha256/").removesuffix(".json").removeprefix("sha256:")
    if len(digest) != 64:
        return [Finding("fail", f"{name!r} does not have a valid sha256 hash", SAVE)]
    findings = [Finding("pass", f"one image, config {digest[:12]} (each upload needs a digest that is new)")]
    settings = config.get("config") or {}
    root = image.root(manifest[0].get("Layers", []))
    findings.append(check_user(str(settings.get("User", "")), root))
    if config.get("architecture") != "amd64":
        message = f"architecture {config.get('architecture')} is not supported"
        findings.append(Finding("fail", message, "docker build --platform=linux/amd64"))
    else:
        findings.append(Finding("pass", "architecture amd64"))
    labels = {key.strip().lower(): value for key, value in (settings.get("Labels") or {}).items()}
    method = str(labels.get("org.grand-challenge.api-method", "exec")).lower().strip("\"'")
    if method not in ("exec", "invoke"):
        message = f"label org.grand-challenge.api-method is {method!r}"
        findings.append(Finding("fail", message, "set it to exec or invoke"))
    return findings + check_forgotten(settings, root)


def check_user(user: str, root: Layer) -> Finding:
    """USER is not root, by name, by number or by its line in the image's own passwd, and has a home of its own."""
    fix = "RUN useradd --create-home user, and USER user as the last line of the Dockerfile"
    lower = user.lower()
    if lower in ("", "root", "0") or lower.startswith(("0:", "root:")):
        return Finding("fail", f"the container runs as root (USER is {user!r})", fix)
    if not USER.fullmatch(user):
        return Finding("fail", f"USER {user!r} is neither a name nor a number, optionally with :group", fix)
    name = user.split(":")[0]
    lines = [line.split(":") for line in root.texts.get("etc/passwd", "").splitlines() if line.count(":") == 6]
    line = next((line for line in lines if line[0] == name or (name.isdigit() and line[2] == name)), None)
    if line is None and name.isdigit():
        return Finding("warn", f"USER {name} has no line in /etc/passwd: HOME stays root's, caches fail", fix)
    if line is None:
        return Finding("fail", f"USER {name} is not in the image's /etc/passwd: the job cannot start", fix)
    if line[2] == "0":
        return Finding("fail", f"USER {name} is number 0: the upload accepts it, but it runs as root", fix)
    home = find_file(root.files, line[5])
    if home is None or not home.isdir() or home.uid != int(line[2]):
        return Finding("warn", f"USER {name} has no home of its own ({line[5]})", fix)
    return Finding("pass", f"user {line[0]} (number {line[2]}, home {line[5]})")


def check_forgotten(settings: dict[str, Any], root: Layer) -> list[Finding]:
    """What the upload accepts and the run then trips over."""
    findings = []
    command = (settings.get("Entrypoint") or []) + (settings.get("Cmd") or [])
    if not command:
        findings.append(Finding("fail", "neither ENTRYPOINT nor CMD: nothing can be started", "add an ENTRYPOINT"))
    else:
        path = dict(str(line).split("=", 1) for line in settings.get("Env") or []).get("PATH", "/usr/bin:/bin")
        base = settings.get("WorkingDir") or "/"
        places = [f"{folder}/{command[0]}" for folder in path.split(":")]
        if "/" in command[0]:
            places = [command[0] if command[0].startswith("/") else f"{base}/{command[0]}"]
        if any(executable(find_file(root.files, place)) for place in places):
            findings.append(Finding("pass", f"entry point {' '.join(command)}"))
        else:
            message = f"the program of the entry point, {command[0]}, is not an executable file of the image"
            findings.append(Finding("fail", message, "COPY it with execute permission, or mend PATH"))
    for volume in settings.get("Volumes") or {}:
        if volume.rstrip("/") in ("/input", "/output", "/tmp", "/opt/ml", "/opt/ml/model"):
            message = f"VOLUME {volume}: the platform cannot reset the folder"
            findings.append(Finding("fail", message, "remove the VOLUME line"))
    hidden = [str(line).split("=")[0] for line in settings.get("Env") or []]
    for name in (name for name in hidden if name.lower().startswith("grand_challenge_")):
        findings.append(Finding("warn", f"ENV {name} never reaches the program", "choose another name"))
    for folder, reason in {"tmp": "/tmp is empty on the platform", "opt/ml": "/opt/ml belongs to the platform"}.items():
        baked = [path for path, entry in root.files.items() if path.startswith(f"{folder}/") and not entry.isdir()]
        if baked:
            size = sum(root.files[path].size for path in baked) / 1e6
            message = (
                f"{len(baked)} file(s) under /{folder} ({size:.1f} MB, e.g. /{baked[0]}) are gone in a job: {reason}"
            )
            findings.append(Finding("warn", message, "keep what the job needs under /opt/app"))
    for folder in ("input", "output"):
        baked = [path for path in root.files if path.startswith(f"{folder}/")]
        if baked:
            findings.append(Finding("warn", f"files under /{folder} are deleted, e.g. /{baked[0]}", "remove them"))
    if find_file(root.files, "/bin/bash") is None:
        findings.append(Finding("warn", "no /bin/bash: the organisers' own re-run needs it", "install bash"))
    return findings


def check_model(path: Path, image: SavedImage) -> list[Finding]:
    """Rules of a model tarball: gzip, safe members, the ensemble at the top, no pickles."""
    findings = []
    with path.open("rb") as stream:
        if stream.read(2) != b"\x1f\x8b" or not path.name.endswith(".tar.gz"):
            fix = "tar -czf model.tar.gz -C ENSEMBLE ."
            findings.append(Finding("fail", "a model must be a gzip file with a name that ends in .tar.gz", fix))
    with tarfile.open(path) as tar:
        for member in tar:
            reason = unsafe(member)
            if reason:
                message = f"Tarfile could not be extracted: {reason}"
                findings.append(Finding("fail", message, "pack plain files with relative names, no outside links"))
                break
    tops = [name for name in image.names if name.removeprefix("./") == "ensemble.json"]
    if not tops:
        nested = next(name for name in image.names if Path(name).name == "ensemble.json")
        message = f"ensemble.json lies at {nested}, expected at the top (it becomes /opt/ml/model/ensemble.json)"
        findings.append(Finding("fail", message, "tar -czf model.tar.gz -C ENSEMBLE ."))
    pickles = [name for name in image.names if name.endswith((".pt", ".pth", ".pkl", ".bin", ".ckpt"))]
    if pickles:
        findings.append(Finding("warn", f"{pickles[0]} is a pickle, which a job never opens", "store safetensors"))
    return findings or [Finding("pass", "model tarball: gzip, safe members, ensemble.json at the top")]


def main(arguments: list[str] | None = None) -> int:
    """Prints the findings for each file; 0 when none failed."""
    parser = argparse.ArgumentParser(prog="python -m test.harness.preflight", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    good = True
    for path in parser.parse_args(arguments).files:
        print(path)
        findings = check_file(path) if path.is_file() else [Finding("fail", "no such file", "run ./export.sh")]
        print(*findings, sep="\n")
        good = good and passed(findings)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
