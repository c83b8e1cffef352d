"""Which bases an ensemble needs: `python -m training.bases FOLDER...` prints the backbone of each that is missing.

Standard library only. The manifest is read here as plain JSON and not validated: the job does that, and it needs
the bases that are still to be made.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from inference.errors import UserError
from inference.manifest import BASES, FILE


def named_bases(folder: Path) -> dict[str, str]:
    """File name to backbone of every base that `folder`/ensemble.json names.

    Raises UserError where there is no such file, or where it names no base.
    """
    file = folder / FILE
    try:
        content = json.loads(file.read_bytes())
        return {str(member["base"]["file"]): str(member["backbone"]) for member in content.get("members", [content])}
    except FileNotFoundError:
        raise UserError(f"no {FILE} in {folder}; expected an ensemble folder; see weights/default") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} names no base ({error!r}); expected a manifest; export the ensemble again") from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.bases", description="List an ensemble's missing bases.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--copy-to", type=Path, metavar="DIR", help="copy those there that are not in their own folder")
    options = parser.parse_args(arguments)
    try:
        for folder in options.folders:
            for file, backbone in named_bases(folder).items():
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
