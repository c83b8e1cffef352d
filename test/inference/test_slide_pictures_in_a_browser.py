"""The report's slides in a real headless Chromium: their table comes first, and the scale bar is right at any zoom."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from test.support import detection_files as files
from test.support.browser import Browser, browser, find
from test.support.commands import slides as run
from test.support.pyramids import FIGURES, write_slide

MPP = 0.5
# µm that the scale bar says, µm that it spans on the screen, and the pixels of a mark's radius on the screen
MEASURE = """
const svg = document.querySelector('svg[data-mpp]'), pixel = svg.getScreenCTM().a;
const name = svg.querySelector('.length').textContent, [value, unit] = name.split(' ');
const bar = svg.querySelector('.bar:not(.below)').getBBox().width, { x, y, width, height } = svg.viewBox.baseVal;
const radius = svg.querySelector('circle').getBBox().width / 2;
const says = Number(value) * (unit === 'mm' ? 1000 : 1);
return [says, bar * arguments[0], bar * pixel, radius * pixel, [x, y, width, height]];
"""
PRESS = "document.querySelector(`button[aria-label^='${arguments[0]}']`).click()"


@pytest.fixture(scope="module")
def page(drawn, miniature, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_slide(folder / "a <b>.tif", [drawn], MPP)
    detections = files.qupath(folder / "a <b>.geojson", list(FIGURES))
    assert run(miniature, detections, "--report", folder / "report.html") == 0
    return folder / "report.html"


@pytest.fixture
def window(page) -> Iterator[Browser]:
    if not find():
        message = "no Chromium with chromedriver (apt-get install chromium chromium-driver)"
        pytest.fail(message) if os.environ.get("REQUIRE_BROWSER") else pytest.skip(message)
    with browser() as opened:
        opened.view(1000, 900)
        opened.open(page)
        opened.settle()
        yield opened
        assert opened.console() == []


def test_the_table_comes_first_and_the_scale_bar_measures(window) -> None:
    assert window.run("return document.querySelector('main > section h2').textContent") == "Slides"
    words, spans, pixels, radius, _ = window.run(MEASURE, MPP)
    assert words == pytest.approx(spans) == 100  # at most a quarter of 650 µm
    assert pixels == pytest.approx(100 / 650 * 720, rel=0.05) and radius == pytest.approx(5, rel=0.01)
    window.view(500, 900)
    window.settle()
    words, spans, narrow, radius, _ = window.run(MEASURE, MPP)
    assert words == pytest.approx(spans) == 100 and narrow < pixels and radius == pytest.approx(5, rel=0.01)
    window.run("setBlinded(true)")
    assert window.run("return [...document.querySelectorAll('.slides')].filter(e => e.offsetWidth).length") == 0


def test_zoom_keeps_the_scale_and_opens_crops(window) -> None:
    window.run(PRESS, "Closer")
    words, spans, pixels, radius, view = window.run(MEASURE, MPP)
    assert words == pytest.approx(spans) == 100
    assert view[2:] == pytest.approx([800, 615.4], rel=0.01)  # pixels: no closer look than that
    assert window.run("return document.querySelector(`button[aria-label^='Closer']`).disabled")
    assert pixels > 150 and radius == pytest.approx(10 / MPP * pixels / 200)  # a ring of 10 µm: the figure is seen
    window.run("document.querySelectorAll('[data-crop]')[1].dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    assert window.run("return document.getElementById('detail').open")
    window.press("Escape")
    window.run(PRESS, "The whole slide")
    assert window.run(MEASURE, MPP)[4] == [0, 0, 1300, 1000]
    assert window.run("return document.querySelector(`button[aria-label^='Farther']`).disabled")


def test_dragging_moves_the_picture_within_the_slide_and_opens_nothing(window) -> None:
    window.run(PRESS, "Closer")
    window.run(
        "const svg = document.querySelector('svg[data-mpp]'), mark = svg.querySelector('circle');"
        "svg.setPointerCapture = () => {};"
        "window.send = (kind, clientX, buttons = 1) =>"
        " mark.dispatchEvent(new PointerEvent(kind, {bubbles: true, clientX, clientY: 9, pointerId: 1, buttons}));"
        "send('pointerdown', 900); send('pointermove', 100); send('pointermove', -9000); send('pointerup', -9000, 0);"
        "mark.dispatchEvent(new MouseEvent('click', {bubbles: true, cancelable: true}))"
    )
    assert not window.run("return document.getElementById('detail').open")
    x, y, width, _ = window.run(MEASURE, MPP)[4]
    assert x + width == pytest.approx(1300) and y > 0  # it ends at the slide's border
    window.run("send('pointerdown', 100); send('pointermove', 900, 0); send('pointermove', 950, 0)")  # let go outside
    assert window.run(MEASURE, MPP)[4][0] == x
