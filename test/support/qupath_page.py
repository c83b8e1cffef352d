"""Makes what docs/qupath.md shows: a drawn slide, its detections, what the command prints, and the report's pictures.

    python -m test.support.qupath_page [--output docs/gallery]

Needs Chromium with chromedriver. The slide and its figures are synthetic: no number means anything.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from contextlib import chdir
from pathlib import Path

import numpy as np

from inference.example.figures import FIGURES, draw
from inference.manifest import default_ensemble
from test.support import commands
from test.support.browser import Browser, browser
from test.support.detection_files import features, square, write_json
from test.support.gallery import ROOT, photograph
from test.support.pyramids import pyramid, write_slide

WIDTH, HEIGHT = 12800, 9600  # 3.2 by 2.4 mm: much more than the 2 mm² of a hot spot
# figures in two clusters, so that the hot spot of atypical ones is another: centre, number, share of atypical ones
CLUSTERS = (((3600, 3400), 40, 0.3), ((9600, 6400), 25, 0.8))


def draw_slide(folder: Path) -> None:
    """case-7.tif and case-7.geojson: 65 figures in two clusters, one place on blank glass, and a tumour outline."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:HEIGHT:8, :WIDTH:8]
    edge = 1 + 0.1 * np.sin(x / 1070) * np.cos(y / 800)
    tissue = ((x - WIDTH / 2) / 5870) ** 2 + ((y - HEIGHT / 2) / 4270) ** 2 < edge
    coarse = np.where(tissue[..., None], [222, 178, 205], [242, 240, 243]) + rng.integers(-6, 6, (*tissue.shape, 3))
    pixels = coarse.clip(0, 255).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    places: list[tuple[float, float]] = []
    for centre, number, atypical in CLUSTERS:
        wanted = len(places) + number
        while len(places) < wanted:
            left, top = (int(value) - 64 for value in rng.normal(centre, 850))
            if all(abs(left + 64 - a) > 130 or abs(top + 64 - b) > 130 for a, b in places):
                kind = rng.choice(list(FIGURES["atypical" if rng.random() < atypical else "normal"]))
                pixels[top : top + 128, left : left + 128] = draw(kind, rng)
                places.append((left + 64.0, top + 64.0))
    write_slide(folder / "case-7.tif", pyramid(pixels, 4))
    tumour = features([(0.0, 0.0)], "Tumor")[0] | {"geometry": square(WIDTH / 2, HEIGHT / 2, 4200)}
    tumour["id"] = "00000000-0000-4000-8000-0000000000ff"
    content = [*features([*places, (300.0, 300.0)]), tumour]
    write_json(folder / "case-7.geojson", {"type": "FeatureCollection", "features": content})


def photograph_slide(window: Browser, page: Path, output: Path) -> None:
    """The top of the page, a place on the slide enlarged, and one crop opened."""
    window.view(1280, 1580)
    window.open(page)
    photograph(window, output / "slide-report.webp")
    window.view(1000, 720)
    window.run(
        "const picture = document.querySelector('.thumbnails figure');"
        "window.scrollBy(0, picture.closest('section').getBoundingClientRect().top - 10);"
        "const box = picture.getBoundingClientRect();"
        "const at = {clientX: box.x + 0.28 * box.width, clientY: box.y + 170};"
        "for (let n = 0; n < 3; n++)"
        " picture.querySelector('svg').dispatchEvent(new MouseEvent('dblclick', {bubbles: true, ...at}))"
    )
    photograph(window, output / "slide-closer.webp")
    window.view(1000, 660)
    window.run(
        "const mark = document.querySelector('[data-crop] circle.atypical');"
        "mark.dispatchEvent(new MouseEvent('click', {bubbles: true, cancelable: true}));"
        "document.activeElement.blur()"
    )
    photograph(window, output / "slide-crop.webp")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/gallery", metavar="DIR")
    parser.add_argument("--page", type=Path, metavar="FILE.html", help="keep the report too")
    options = parser.parse_args()
    output, weights, keep = (
        options.output.resolve(),
        default_ensemble().resolve(),
        options.page and options.page.resolve(),
    )
    with tempfile.TemporaryDirectory() as name, chdir(name):
        draw_slide(Path())
        results = ["--output", "case-7-classes.geojson", "--csv", "case-7.csv", "--summary", "summary.csv"]
        chosen = ["--class", "Mitosis", "--region", "Tumor", "--device", "cpu", "--weights", str(weights)]
        commands.inference("slides", "case-7.geojson", *chosen, *results, "--report", "case-7.html")
        print(Path("summary.csv").read_text())
        print(Path("case-7-classes.geojson").read_text()[:1400])
        if keep:
            shutil.copy("case-7.html", keep)
        with browser() as window:
            photograph_slide(window, Path("case-7.html"), output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
