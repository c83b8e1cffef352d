"""Which bases an ensemble needs: `python -m release.bases FOLDER...` prints the backbone of each that is missing.

Standard library only.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from inference.errors import UserError
from inference.manifest import BASES, load_manifest


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m release.bases", description="List an ensemble's missing bases.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--copy-to", type=Path, metavar="DIR", help="copy those there that are not in their own folder")
    options = parser.parse_args(arguments)
    try:
        for folder in options.folders:
            members = load_manifest(folder, with_bases=False).members
            for file, backbone in {member.base.name: member.backbone for member in members}.items():
                if (folder / file).is_file():
                    continue
                if not (BASES / file).is_file():
                    print(backbone)
                elif options.copy_to:
                    options.copy_to.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(BASES / file, options.copy_to / file)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
