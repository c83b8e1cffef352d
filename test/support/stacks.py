"""Makes stacks (multi-page TIFF) as the platform accepts and delivers them, with a matching ground truth.

    python -m test.support.stacks sample [--output test/sample] [--seed 7]
    python -m test.support.stacks labelled DATA --output DIR [--csv FILE] [--pages 16] [--limit N] [--seed 0]

`labelled` reads AMi-Br (folders Atypical/ and Normal/; `<dataset>_<uid>.png`, its csv gives the scanner) and MIDOG25
(a folder of `<n>.png` and a csv with image_id, majority, Tumor, Scanner). It writes DIR/stack_0.tiff, ... and
DIR/ground_truth.json: [{"image": "stack_0.tiff", "labels": ["normal", ...], "tumordomains": [0, ...]}, ...].
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from inference.example.figures import FIGURES, draw

MICRONS_PER_PIXEL = 0.25
LABELS = {"normal": "normal", "nmf": "normal", "atypical": "atypical", "amf": "atypical"}


@dataclass(frozen=True)
class Crop:
    """One labelled image: its file, "normal" or "atypical", and the name of its domain (tumour x scanner)."""

    path: Path
    label: str
    domain: str


def write_stack(path: Path, pages: list[Image.Image]) -> None:
    """Writes pages (RGB, equal sizes) as a deflate-compressed TIFF with the resolution tags that an upload needs.

    The platform refuses a TIFF without XResolution, YResolution and a unit (INCH or CENTIMETER).
    """
    dpi = 25400 / MICRONS_PER_PIXEL
    pages[0].save(
        path,
        save_all=True,
        append_images=pages[1:],
        compression="tiff_adobe_deflate",
        dpi=(dpi, dpi),
        tiffinfo={317: 2},  # horizontal predictor: a fifth smaller
    )


def write_stacks(crops: list[Crop], output: Path, pages: int, seed: int) -> list[Path]:
    """Shuffles the crops and writes them as stacks of `pages` (the last may be shorter) with ground_truth.json."""
    crops = sorted(crops, key=lambda crop: crop.path.name)
    random.Random(seed).shuffle(crops)
    domains = {name: index for index, name in enumerate(sorted({crop.domain for crop in crops}))}
    output.mkdir(parents=True, exist_ok=True)
    truth: list[dict[str, object]] = []
    files: list[Path] = []
    for start in range(0, len(crops), pages):
        part = crops[start : start + pages]
        files.append(output / f"stack_{len(files)}.tiff")
        write_stack(files[-1], [Image.open(crop.path).convert("RGB") for crop in part])
        truth.append(
            {
                "image": files[-1].name,
                "labels": [crop.label for crop in part],
                "tumordomains": [domains[crop.domain] for crop in part],
                "crops": [crop.path.name for crop in part],
            }
        )
    write_truth(output, truth)
    names = {str(index): name for name, index in domains.items()}
    (output / "domains.json").write_text(json.dumps(names, indent=1) + "\n")
    return files


def write_truth(output: Path, truth: list[dict[str, object]]) -> None:
    """Writes ground_truth.json, one stack a line; the evaluator reads image, labels, tumordomains and no other key."""
    lines = ",\n".join(json.dumps(entry) for entry in truth)
    (output / "ground_truth.json").write_text(f"[\n{lines}\n]\n")


def read_labelled(folder: Path, table: Path | None = None) -> list[Crop]:
    """Lists the crops of a labelled folder.

    Args:
        folder: with sub-folders Atypical/ and Normal/ (any case), or with PNG files that the table names.
        table: the csv; the only `*.csv` in `folder` or beside it when None; without one there is a single domain.
    Raises: ValueError when no labelled crop is found, or a row's image is missing.
    """
    if table is None:
        tables = sorted(folder.glob("*.csv")) or sorted(folder.parent.glob("*Atypical*.csv"))
        table = tables[0] if len(tables) == 1 else None
    rows: dict[str, dict[str, str]] = {}
    if table is not None:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            rows = {row.get("dataset_uid") or row.get("image_id") or "": row for row in csv.DictReader(stream)}
    crops = [
        Crop(file, LABELS[child.name.lower()], domain_of(rows.get(file.name, {})))
        for child in sorted(folder.iterdir())
        if child.is_dir() and child.name.lower() in LABELS
        for file in sorted(child.iterdir())
        if file.suffix.lower() in (".png", ".tif", ".tiff", ".jpg")
    ]
    if not crops and rows and "majority" in next(iter(rows.values())):
        crops = [Crop(folder / name, LABELS[row["majority"].lower()], domain_of(row)) for name, row in rows.items()]
        missing = [crop.path.name for crop in crops if not crop.path.is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {len(missing)} images that {table} names, e.g. {missing[0]}")
    if not crops:
        raise ValueError(
            f"{folder} holds no labelled crops; expected sub-folders Atypical/ and Normal/, or PNG files and a "
            "csv with image_id and majority (name it with --csv)"
        )
    return crops


def domain_of(row: dict[str, str]) -> str:
    """Name of a crop's domain: tumour and scanner (MIDOG25), or the scanner that a slide's number gives (AMi-Br)."""
    if row.get("Tumor"):
        return f"{row['Tumor']}, {row.get('Scanner', '').replace('Hamammatsu', 'Hamamatsu')}"
    digits = "".join(c for c in row.get("slide", "").split(".")[0] if c.isdigit())
    if not digits:
        return "all"
    slide = int(digits)
    if row.get("dataset") == "TUPAC16":
        return "TUPAC16, Aperio ScanScope XT" if slide <= 23 else "TUPAC16, Leica SCN400"
    return "MIDOG21, " + ("Hamamatsu XR" if slide <= 50 else "Hamamatsu S360" if slide <= 100 else "Aperio CS2")


def write_sample(output: Path, seed: int) -> Path:
    """Draws the sample stack (16 pages, 7 atypical, mixed) and its ground truth; the same seed gives the same bytes."""
    rng = np.random.default_rng(seed)
    kinds = [(kind, label) for label, figures in FIGURES.items() for kind in figures]
    chosen = kinds + [pair for pair in kinds if pair[1] == "normal"] + [kinds[0]] + kinds[-2:]
    rng.shuffle(chosen)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "stack_0.tiff"
    write_stack(path, [Image.fromarray(draw(kind, rng, stain=i % 4)) for i, (kind, _) in enumerate(chosen)])
    domains = [i % 4 for i in range(len(chosen))]
    entry: dict[str, object] = {"image": path.name, "labels": [label for _, label in chosen], "tumordomains": domains}
    write_truth(output, [entry | {"figures": [kind for kind, _ in chosen]}])
    return path


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m test.support.stacks", description="Make stacks for the platform.")
    commands = parser.add_subparsers(dest="command", required=True)
    sample = commands.add_parser("sample", help="draw the bundled sample stack")
    sample.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[1] / "sample")
    sample.add_argument("--seed", type=int, default=7)
    labelled = commands.add_parser("labelled", help="turn a folder of labelled crops (AMi-Br, MIDOG25) into stacks")
    labelled.add_argument("data", type=Path)
    labelled.add_argument("--output", type=Path, required=True)
    labelled.add_argument("--csv", type=Path, help="the table of labels and domains, where it cannot be found in DATA")
    labelled.add_argument("--pages", type=int, default=16)
    labelled.add_argument("--limit", type=int, help="keep this many crops, drawn at random")
    labelled.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.command == "sample":
        print(write_sample(options.output, options.seed))
        return 0
    try:
        crops = read_labelled(options.data, options.csv)
    except (ValueError, KeyError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.limit:
        crops = random.Random(options.seed).sample(crops, min(options.limit, len(crops)))
    files = write_stacks(crops, options.output, options.pages, options.seed)
    atypical = sum(crop.label == "atypical" for crop in crops)
    print(f"{len(files)} stacks, {len(crops)} crops ({atypical} atypical) and ground_truth.json in {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
