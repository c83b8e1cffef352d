"""Makes the pictures of docs/gallery from drawn crops: what a scoring run shows, as a browser shows it.

    python -m test.support.gallery [--output docs/gallery] [--weights DIR] [--training REPORT.html]

Needs Chromium with chromedriver. The crops are synthetic (inference/example/figures.py), so no number in the pictures
means anything.
"""

from __future__ import annotations

import argparse
import base64
import csv
import tempfile
from contextlib import chdir
from pathlib import Path

import numpy as np
from PIL import Image

from inference.example.figures import FIGURES, STAINS, draw
from inference.manifest import load_manifest
from test.support import commands
from test.support.browser import Browser, browser

ROOT = Path(__file__).resolve().parents[2]
QUALITY = 80  # of WebP; the pictures are committed
STAIN_NAMES = ("scanner A", "scanner B", "scanner C", "scanner D")


def draw_crops(folder: Path, per_kind: int, seed: int) -> Path:
    """Draws `per_kind` crops of every kind into `folder`; returns the table with paths, labels and domains."""
    rng = np.random.default_rng(seed)
    table = folder / "crops.csv"
    with table.open("w", newline="") as stream:
        lines = csv.writer(stream)
        lines.writerow(["path", "label", "domain"])
        for label, figures in FIGURES.items():
            for number, kind in enumerate(figures):
                for k in range(per_kind):
                    stain = (number + k) % len(STAINS)
                    name = f"{kind}_{k}.png"
                    Image.fromarray(draw(kind, rng, stain=stain)).save(folder / name)
                    lines.writerow([name, label, STAIN_NAMES[stain]])
    return table


def photograph(window: Browser, file: Path) -> None:
    window.settle()
    window.settle()
    shot = window.devtools("Page.captureScreenshot", format="webp", quality=QUALITY)
    file.write_bytes(base64.b64decode(shot["data"]))
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


def photograph_report(window: Browser, report: Path, output: Path) -> None:
    """The page in light, dark and on a telephone, maps, one crop opened, and a blinded reading that has begun."""
    for name, width, height, dark in (
        ("light", 1280, 1180, False),
        ("dark", 1280, 1180, True),
        ("narrow", 390, 1500, False),
    ):
        window.view(width, height, dark, phone=width < 500)
        window.open(report)
        window.run("document.getElementById('maps').click()")  # off, to see the crops
        photograph(window, output / f"report-{name}.webp")
    window.view(1280, 900)
    window.open(report)
    window.run("show({ show: 'maps' }); document.activeElement.blur()")
    photograph(window, output / "where-it-looks.webp")
    window.view(1000, 660)
    window.run("document.querySelectorAll('.card')[2].click(); document.activeElement.blur()")
    photograph(window, output / "one-crop.webp")
    window.view(1280, 900)
    window.open(report)
    window.run("document.getElementById('blinded').click()")
    window.run("['n', 'a', 'x', 'n', 'a'].forEach((key, n) => give(state.order[n], key))")
    photograph(window, output / "reading.webp")


def photograph_training(window: Browser, report: Path, output: Path) -> None:
    """The top of the page, and the crops of its mistakes."""
    window.view(1280, 1250)
    window.open(report)
    photograph(window, output / "training.webp")
    window.view(1000, 960)
    window.run("document.querySelector('.crops').closest('section').scrollIntoView()")
    photograph(window, output / "training-crops.webp")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m test.support.gallery", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs/gallery", metavar="DIR")
    parser.add_argument("--weights", type=Path, default=ROOT / "weights/default", metavar="DIR")
    parser.add_argument("--training", type=Path, metavar="FILE", help="photograph a training report too")
    parser.add_argument("--per-kind", type=int, default=4, help="crops of each of the nine kinds")
    parser.add_argument("--seed", type=int, default=11)
    options = parser.parse_args(arguments)
    load_manifest(options.weights)  # reports what is missing before a minute of drawing
    output, weights = options.output.resolve(), options.weights.resolve()
    training = options.training and options.training.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, chdir(name), browser() as window:  # paths in the pictures are short
        folder, report = Path("crops"), Path("report.html")
        folder.mkdir()
        table = draw_crops(folder, options.per_kind, options.seed)
        commands.inference(
            *[
                "score",
                str(table),
                "--report",
                str(report),
                "--weights",
                str(weights),
                "--device",
                "cpu",
                "--attribution",
                "16",
                "--title",
                "Drawn crops",
            ]
        )
        photograph_report(window, report, output)
        if training:
            photograph_training(window, training, output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
