"""Makes what docs/qupath.md shows: a drawn slide, its detections, what the command prints, and the report's pictures.

    python -m test.support.qupath_page [--output docs/gallery]

Needs Chromium with chromedriver. The slide and its figures are synthetic: no number means anything.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import chdir
from pathlib import Path

import numpy as np

from inference.manifest import default_ensemble
from test.support import commands
from test.support.browser import browser
from test.support.detection_files import features, square, write_json
from test.support.figures import FIGURES, draw
from test.support.gallery import ROOT, photograph
from test.support.pyramids import pyramid, write_slide

WIDTH, HEIGHT = 4800, 3600


def draw_slide(folder: Path) -> None:
    """case-7.tif and case-7.geojson: 60 figures in two clusters, one place on blank glass, and a tumour outline."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:HEIGHT:8, :WIDTH:8]
    tissue = ((x - 2400) / 2200) ** 2 + ((y - 1800) / 1600) ** 2 < 1 + 0.1 * np.sin(x / 400) * np.cos(y / 300)
    coarse = np.where(tissue[..., None], [222, 178, 205], [242, 240, 243]) + rng.integers(-6, 6, (*tissue.shape, 3))
    pixels = coarse.clip(0, 255).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    kinds = [(label, kind) for label, some in FIGURES.items() for kind in some]
    places: list[tuple[float, float]] = []
    while len(places) < 60:
        centre = (1700, 1500) if len(places) < 35 else (3200, 2200)
        place = tuple(int(value) for value in rng.normal(centre, 380))
        if all(abs(place[0] - a) > 130 or abs(place[1] - b) > 130 for a, b in places):
            left, top = place[0] - 64, place[1] - 64
            pixels[top : top + 128, left : left + 128] = draw(kinds[len(places) % len(kinds)][1], rng)
            places.append((float(place[0]), float(place[1])))
    write_slide(folder / "case-7.tif", pyramid(pixels, 3))
    tumour = features([(0.0, 0.0)], "Tumor")[0] | {"geometry": square(2400, 1800, 1500)}
    tumour["id"] = "00000000-0000-4000-8000-0000000000ff"
    content = [*features([*places, (300.0, 300.0)]), tumour]
    write_json(folder / "case-7.geojson", {"type": "FeatureCollection", "features": content})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/gallery", metavar="DIR")
    output, weights = parser.parse_args().output.resolve(), default_ensemble().resolve()
    with tempfile.TemporaryDirectory() as name, chdir(name):
        draw_slide(Path())
        results = ["--output", "case-7-classes.geojson", "--csv", "case-7.csv", "--summary", "summary.csv"]
        chosen = ["--class", "Mitosis", "--region", "Tumor", "--device", "cpu", "--weights", str(weights)]
        commands.inference("slides", "case-7.geojson", *chosen, *results, "--report", "case-7.html")
        print(Path("summary.csv").read_text())
        print(Path("case-7-classes.geojson").read_text()[:1400])
        with browser() as window:
            window.view(1280, 980)
            window.open(Path("case-7.html"))
            window.run("document.getElementById('h-slides').scrollIntoView()")
            photograph(window, output / "slide-report.webp")
            window.view(1000, 660)
            window.run(
                "const mark = document.querySelector('[data-crop] circle.atypical');"
                "mark.dispatchEvent(new MouseEvent('click', {bubbles: true, cancelable: true}));"
                "document.activeElement.blur()"
            )
            photograph(window, output / "slide-crop.webp")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
