"""The report in a real headless Chromium: what it counts, how it sorts, keys, paper, narrow and dark, 10,000 crops."""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from inference.answers import Answer
from inference.errors import UserError
from inference.manifest import load_manifest
from inference.metrics import scores
from inference.report import page as report
from inference.report.attribution import Attribution
from inference.report.page import Page, picture, write_report
from test.support.browser import Browser
from test.support.stub import stub_manifest

THRESHOLD = 0.4237
NASTY = '</script><script>document.title="broken"</script>&amp;<b>\u2028"\'.png'


def make_rows(count: int, seed: int = 0) -> list[Answer]:
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        label = int(rng.integers(2)) if n % 10 else None  # every tenth crop has no label
        logits = rng.normal(2 * (label or 0) - 1, 1.2) + rng.normal(0, 0.5, 3)
        folds = 1 / (1 + np.exp(-logits))
        p = round(float(1 / (1 + np.exp(-logits.mean()))), 2 if n % 2 else 6)  # with ties between the classes
        name = NASTY if n == 7 else f"slide {n % 3}/crop{n}.png"
        rows.append(Answer(name, 0, p, tuple(folds.tolist()), label=label, domain=("breast", "lung", "")[n % 3]))
    return rows


def make_crops(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(1).integers(0, 256, (count, 24, 24, 3), dtype=np.uint8))


ROWS = make_rows(90)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    rng = np.random.default_rng(2)
    maps = [Attribution(rng.normal(0, 1, (24, 24)), n / 90, 0.2) if n % 2 else None for n in range(90)]
    return write_report(ROWS, iter(make_crops(90)), THRESHOLD, file, Page("A <test>"), maps)


@pytest.fixture
def opened(window: Browser, page: Path) -> Iterator[Browser]:
    window.view(1280, 900)
    window.open(page)
    window.settle()
    yield window
    assert window.console() == []  # no script error, and nothing that the page's policy had to refuse


def names(window: Browser) -> list[str]:
    """The files of the crops in the document, in its order."""
    return window.run("return [...document.querySelectorAll('.file')].map(e => e.title)")


def shown(window: Browser) -> dict[str, str]:
    """The figures at the top: name to value."""
    pair = "e => [e.children[0].textContent, e.children[1].firstChild.data]"
    script = f"return [...document.querySelectorAll('#figures div')].map({pair})"
    return dict(window.run(script))


def test_the_figures_follow_the_threshold(opened: Browser) -> None:
    p = np.array([row.p_atypical for row in ROWS])
    labelled = np.array([row.label is not None for row in ROWS])
    labels = np.array([row.label for row in ROWS if row.label is not None])
    for threshold in (THRESHOLD, 0.0, 0.2, 0.75, 1.0):
        opened.choose("threshold-number", threshold)
        found, expected = shown(opened), scores(labels, p[labelled], threshold)
        assert found["Crops"] == "90" and found["Called atypical"] == str(int((p >= threshold).sum()))
        disagree = sum(
            any(f >= threshold for f in row.fold_p) and any(f < threshold for f in row.fold_p) for row in ROWS
        )
        assert found["Folds disagree"] == str(disagree)
        for name in ("balanced_accuracy", "sensitivity", "specificity"):
            assert float(found[name.replace("_", " ").capitalize()]) == pytest.approx(expected[name], abs=5e-4)
    auc = opened.run("return document.querySelector('#roc .strong').textContent")
    assert float(auc.split()[1]) == pytest.approx(expected["auc"], abs=5e-4)
    called = opened.run("return document.querySelectorAll('.card.atypical-card').length")
    assert called == int((p >= 1).sum())
    opened.run("document.getElementById('reset').click()")
    assert shown(opened)["Called atypical"] == str(int((p >= THRESHOLD).sum()))


def test_every_order(opened: Browser) -> None:
    def wrongness(row: Answer) -> float:
        if row.label is None:
            return -np.inf
        p = row.p_atypical
        return (THRESHOLD - p) / THRESHOLD if row.label else (p - THRESHOLD) / (1 - THRESHOLD)

    keys = {
        "error": lambda row: -wrongness(row),
        "high": lambda row: -row.p_atypical,
        "low": lambda row: row.p_atypical,
        "doubt": lambda row: abs(row.p_atypical - THRESHOLD),
        "spread": lambda row: -row.spread,
        "input": ROWS.index,
    }
    assert opened.run("return document.getElementById('sort').value") == "error"  # with labels the worst come first
    for order, key in keys.items():
        opened.choose("sort", order)
        found = names(opened)
        assert 24 <= len(found) < 90  # the rest is below the window
        assert found == [row.path for row in sorted(ROWS, key=key)][: len(found)], order
    opened.choose("sort", "name")
    first = names(opened)[:3]
    assert first[1:] == ["slide 0/crop0.png", "slide 0/crop3.png"] or first == [
        "slide 0/crop0.png",
        "slide 0/crop3.png",
        "slide 0/crop6.png",
    ]


def test_filters_and_the_confusion_matrix(opened: Browser) -> None:
    missed = {row.path for row in ROWS if row.label == 1 and row.p_atypical < THRESHOLD}
    cells = opened.run("return [...document.querySelectorAll('table.confusion button')].map(e => e.textContent)")
    assert cells[1] == f"{len(missed)} missed"
    opened.run("document.querySelectorAll('table.confusion button')[1].click()")
    opened.settle()
    assert set(names(opened)) == missed
    assert opened.run("return document.getElementById('count').textContent") == f"{len(missed)} of 90"
    opened.choose("domain", "1")
    assert set(names(opened)) == {row.path for row in ROWS if row.path in missed and row.domain == "lung"}
    opened.choose("show", "all")
    opened.choose("domain", "-1")
    opened.choose("name", "Slide 1/")
    assert set(names(opened)) == {row.path for row in ROWS if row.path.startswith("slide 1/")}
    scroll = "dispatchEvent(new Event('scroll'))"  # in the same frame, as when the page is laid out anew
    opened.run(f"$('name').value = 'slide 2/'; $('name').dispatchEvent(new Event('input')); {scroll}")
    opened.settle()
    assert set(names(opened)) == {row.path for row in ROWS if row.path.startswith("slide 2/")}
    opened.choose("name", "no such crop")
    assert opened.run("return !document.getElementById('empty').hidden")
    opened.run("document.getElementById('clear').click()")
    opened.settle()
    assert opened.run("return document.getElementById('count').textContent") == "90"


def test_keys_move_open_and_close(opened: Browser) -> None:
    opened.choose("sort", "input")
    active = "return document.activeElement.dataset.position"
    opened.run("document.querySelector('.card').focus()")
    columns = opened.run("return columns")
    for key, position in (("Right", 1), ("Down", 1 + columns), ("Left", columns), ("End", 89), ("Up", 89 - columns)):
        opened.press(key)
        opened.settle()
        assert opened.run(active) == str(position), key
    assert opened.run("return document.activeElement.getBoundingClientRect().bottom <= innerHeight")
    assert opened.run("return document.querySelectorAll('.card[tabindex=\"0\"]').length") == 1
    opened.run("scrollTo(0, 0)")
    opened.settle()
    assert opened.run(active) == str(89 - columns)  # scrolled out of sight, and the focus is still there
    opened.press("Home", "Right", "Enter")
    opened.settle()
    title = "return document.getElementById('detail').open && document.getElementById('detail-title').textContent"
    assert opened.run(title) == "crop1.png"
    assert opened.run("return document.querySelectorAll('#stage canvas').length") == 1
    opened.press("Right")
    assert opened.run(title) == "crop2.png"
    opened.press("Escape")
    opened.settle()
    assert opened.run(title) is False and opened.run(active) == "2"


def test_everything_has_a_name_for_a_screen_reader(opened: Browser) -> None:
    opened.run("document.querySelectorAll('details').forEach(e => e.open = true)")
    nodes = opened.devtools("Accessibility.getFullAXTree")["nodes"]
    roles = {
        "button",
        "combobox",
        "slider",
        "spinbutton",
        "checkbox",
        "searchbox",
        "link",
        "listitem",
        "image",
        "region",
    }
    found: dict[str, int] = {}
    for node in nodes:
        role = node.get("role", {}).get("value")
        if role in roles and not node.get("ignored"):
            found[role] = found.get(role, 0) + 1
            assert role == "listitem" or node.get("name", {}).get("value"), node
    assert {"button", "combobox", "slider", "spinbutton", "searchbox", "image", "region"} <= set(found)
    spoken = next(node["name"]["value"] for node in nodes if ".png folds" in node.get("name", {}).get("value", ""))
    pattern = (
        r"(missed|false alarm) 0\.\d{3} (normal|atypical) labelled (normal|atypical) \S+ folds 0\.\d{3} to 0\.\d{3}"
    )
    assert re.fullmatch(pattern, spoken), spoken


@pytest.mark.parametrize("width", [320, 400, 768, 1280])
def test_nothing_is_cut_off(opened: Browser, width: int) -> None:
    opened.view(width, 900)
    opened.settle()
    opened.run("document.querySelectorAll('main details').forEach(e => e.open = true)")
    opened.run("document.querySelector('.legend').open = false")
    opened.settle()
    assert opened.run("return document.documentElement.scrollWidth") <= width
    opened.run("document.querySelector('.card').click()")
    assert opened.run(
        "return document.getElementById('detail').scrollWidth <= document.getElementById('detail').clientWidth"
    )


def test_on_paper_the_crops_flow(opened: Browser) -> None:
    pdf = base64.b64decode(opened.devtools("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF") and len(pdf) > 50_000
    opened.run("dispatchEvent(new Event('beforeprint'))")
    assert len(names(opened)) == 90
    opened.run("dispatchEvent(new Event('afterprint'))")
    assert len(names(opened)) < 90


def test_file_names_are_text(opened: Browser, page: Path) -> None:
    opened.choose("sort", "input")
    assert names(opened)[7] == NASTY
    assert opened.run("return document.title").startswith("A <test>")
    content = page.read_text(encoding="utf-8")
    assert content.count("<script") == 3 and "@@" not in content


def test_ten_thousand_crops_stay_usable(window: Browser, tmp_path: Path) -> None:
    """What is drawn is a tenth of a second's work; the limits are far above it, and far below work on all pairs."""
    one = [picture(crop) for crop in make_crops(20)]
    rows = make_rows(10_000)
    file = write_report(rows, [one[n % 20] for n in range(10_000)], THRESHOLD, tmp_path / "big.html", Page())
    window.view(1280, 900)
    assert window.open(file) < 300
    resort = "document.getElementById('sort').dispatchEvent(new Event('change'))"
    timed = f"const t = performance.now(); {resort}; return performance.now() - t"
    for order in ("spread", "high", "name"):
        window.run("document.getElementById('sort').value = arguments[0]", order)
        assert window.run(timed) < 30_000
    timed = "const t = performance.now(); setThreshold(arguments[0]); return performance.now() - t"
    assert window.run(timed, 0.3) < 30_000
    assert shown(window)["Called atypical"] == f"{sum(row.p_atypical >= 0.3 for row in rows):,}"
    window.run("scrollTo(0, 1e9)")
    window.settle()
    assert window.run("return document.querySelectorAll('.card').length") < 200
    assert window.console() == []


def test_one_crop_without_folds_labels_or_manifest(window: Browser, tmp_path: Path) -> None:
    file = write_report([Answer("x.png", 0, 0.5, ())], make_crops(1), 0.5, tmp_path / "one.html", Page())
    window.open(file)
    assert shown(window) == {"Crops": "1", "Called atypical": "1"}
    labels = "[...document.querySelectorAll('.controls label')]"
    visible = window.run(f"return {labels}.filter(e => e.offsetWidth).length")
    assert visible == 3  # show, sort, name: nothing that would have no effect
    assert window.console() == []


def test_an_ensemble_of_members_shows_each(window: Browser, tmp_path: Path) -> None:
    """Three folds in members of two and one: a filter, an order, strokes, and each member's answer in the details."""
    stub_manifest(tmp_path, folds=3)
    manifest = load_manifest(tmp_path)
    [whole] = manifest.members
    near = dataclasses.replace(whole, name="near", weight=0.25, folds=whole.folds[:2])
    far = dataclasses.replace(whole, name="far", weight=0.75, folds=whole.folds[2:], tta="d4")
    manifest = dataclasses.replace(manifest, members=(near, far), threshold=THRESHOLD)
    rows = []
    for row in ROWS:
        each = (float(np.mean(row.fold_p[:2])), row.fold_p[2])
        rows.append(dataclasses.replace(row, member_p=each, p_atypical=0.25 * each[0] + 0.75 * each[1]))
    file = write_report(rows, make_crops(90), manifest, tmp_path / "two.html", Page())
    window.view(1280, 900)
    window.open(file)
    window.settle()
    torn = {row.path for row in rows if min(row.member_p) < THRESHOLD <= max(row.member_p)}
    assert 0 < len(torn) < 90 and shown(window)["Members disagree"] == str(len(torn))
    window.choose("show", "members")
    assert set(names(window)) == torn
    window.choose("show", "all")
    window.choose("sort", "apart")
    found = names(window)
    assert found == [row.path for row in sorted(rows, key=lambda row: -np.ptp(row.member_p))][: len(found)]
    first = max(rows, key=lambda row: np.ptp(row.member_p))
    assert window.run("return document.querySelector('.card').querySelectorAll('.track .member').length") == 2
    spoken = window.run("return document.querySelector('.card .more').textContent")
    assert f"near {first.member_p[0]:.3f}, far {first.member_p[1]:.3f}" in spoken
    window.run("document.querySelector('.card').click()")
    window.settle()
    facts = dict(
        window.run(
            "return [...document.querySelectorAll('#detail-facts tr')].map(e => "
            "[e.children[0].textContent, e.children[1].textContent])"
        )
    )
    for (name, p), folds in zip(
        zip(("near", "far"), first.member_p, strict=True), (first.fold_p[:2], first.fold_p[2:]), strict=True
    ):
        called = "atypical" if p >= THRESHOLD else "normal"
        assert facts[name] == f"{p:.3f}, {called}folds {', '.join(f'{fold:.3f}' for fold in folds)}"
    assert window.run("return document.querySelectorAll('#detail-facts .fold-dot').length") == 3
    assert "Fold 0" not in facts
    card = window.run("return document.querySelector('dl.facts').textContent")
    assert "Member near" in card and "weight 0.75" in card and "8 views" in card
    window.view(320, 900)
    window.settle()
    assert window.run("return document.documentElement.scrollWidth") <= 320
    assert window.run(
        "return document.getElementById('detail').scrollWidth <= document.getElementById('detail').clientWidth"
    )
    assert window.console() == []


def test_one_member_is_not_told_apart(opened: Browser) -> None:
    assert opened.run("return document.querySelectorAll('.member, .member-name').length") == 0
    assert "members" not in opened.run("return [...document.getElementById('show').options].map(e => e.value)")
    assert "Members disagree" not in shown(opened)


def test_what_cannot_be_reported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no crops"):
        write_report([], [], 0.5, tmp_path / "x.html", Page())
    with pytest.raises(ValueError, match="2 crops for 1 rows"):
        write_report(ROWS[:1], make_crops(2), 0.5, tmp_path / "x.html", Page())
    with pytest.raises(UserError, match="cannot write"):
        write_report(ROWS[:1], make_crops(1), 0.5, tmp_path / "missing" / "x.html", Page())
    assert list(tmp_path.iterdir()) == []


def luminance(colour: str) -> float:
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(scheme: str) -> None:
    """WCAG 2.2 AA: 4.5 for text, on every ground that it stands on."""
    block = re.findall(r":root \{(.*?)\n\s*\}", (report.HERE / "page.css").read_text(), re.DOTALL)[scheme == "dark"]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    grounds = ("ground", "surface", "sunken")
    pairs = [(text, ground) for text in ("ink", "muted") for ground in grounds]
    pairs += [(text, ground) for text in ("accent", "atypical", "normal", "warn") for ground in grounds[:2]]
    pairs += [("on-accent", "accent"), ("surface", "warn")]
    for text, ground in pairs:
        light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, text, ground)
