"""Packs an ensemble as the model tarball that Grand Challenge unpacks to /opt/ml/model before each job.

Standard library only, so that it runs where the image is built.
`python -m release.tarball ENSEMBLE OUTPUT [--without-base]` prints the tarball's path.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import tarfile
from pathlib import Path

from inference.checksums import check_ensemble
from inference.errors import UserError
from inference.manifest import FILE, load_manifest
from inference.progress import speaking


def write_model_tarball(ensemble: Path, output: Path, with_base: bool = True) -> Path:
    """Write `output`/NAME-model.tar.gz and return its path. The same ensemble always gives the same bytes.

    Packed are the manifest, the card and what the manifest names; a fold of an earlier export that still lies in the
    folder is not packed. The files lie at the root of the archive, because the platform unpacks it directly
    into /opt/ml/model. Bases are packed too, even one shared by several ensembles: the image may hold another one.

    with_base: False saves the upload of large bases that the image already holds
    Raises UserError where the folder is not a valid ensemble or a file differs from its manifest.
    """
    manifest = load_manifest(ensemble)
    check_ensemble(manifest)
    paths = [ensemble / FILE, ensemble / "README.md", ensemble / "LICENSE.md", *manifest.files]
    members = {path.relative_to(ensemble).as_posix(): path for path in paths if path.is_file()}
    if with_base:
        members |= {base.name: base for base in manifest.bases}
    output.mkdir(parents=True, exist_ok=True)
    target = output / f"{manifest.name}-model.tar.gz"
    partial = target.with_suffix(".partial")
    # weights hardly compress: the fastest level, no file name and no time in the header
    with (
        speaking(f"packing {ensemble}"),
        partial.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive,
    ):
        for name, path in sorted(members.items()):
            entry = tarfile.TarInfo(name)  # owner root, time 0
            entry.size, entry.mode = path.stat().st_size, 0o644
            with path.open("rb") as content:
                archive.addfile(entry, content)
    partial.replace(target)
    return target


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m release.tarball", description="Pack an ensemble as a model tarball."
    )
    parser.add_argument("ensemble", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--without-base", action="store_true", help="the image that it is for holds the base already")
    options = parser.parse_args(arguments)
    try:
        print(write_model_tarball(options.ensemble, options.output, with_base=not options.without_base))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
