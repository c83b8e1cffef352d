"""A reader's own verdicts in the report: keys, blinding, what the browser keeps, agreement, and both CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from inference.answers import Answer
from inference.report.attribution import Attribution
from inference.report.page import Page, key_of, write_report
from inference.slides.outputs import plain
from test.support.browser import Browser
from test.support.processes import until

THRESHOLD = 0.4
COUNT = 24


def make_rows() -> list[Answer]:
    rng = np.random.default_rng(5)
    p = np.round(rng.uniform(0, 1, COUNT), 4)
    labels = [int(value > 0.55) if n % 6 else None for n, value in enumerate(p)]
    names = [f"{'Atypical' if label else 'Normal'}/crop{n}.png" for n, label in enumerate(labels)]
    names[3] = '=1+1,"3".png'
    domains = ["lung" if n % 2 else "" for n in range(COUNT)]
    return [
        Answer(name, 0, float(value), (float(value),), label=label, domain=domain)
        for name, value, label, domain in zip(names, p, labels, domains, strict=True)
    ]


ROWS = make_rows()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reading")
    rng = np.random.default_rng(1)
    crops = rng.integers(0, 256, (COUNT, 64, 64, 3), dtype=np.uint8)
    maps = [Attribution(rng.normal(0, 1, (24, 24)), 0.5, 0.2) for _ in ROWS]
    return write_report(ROWS, crops, THRESHOLD, folder / "report.html", Page("Two readers"), maps)


@pytest.fixture
def opened(window: Browser, page: Path) -> Iterator[Browser]:
    window.view(1280, 900)
    window.open(page)
    window.run("localStorage.clear()")
    window.open(page)
    window.settle()
    yield window
    assert window.console() == []


def cards(window: Browser) -> list[str]:
    return window.run("return [...document.querySelectorAll('.card')].map(e => e.textContent)")


def own(window: Browser) -> dict[int, str]:
    """Crop to the letter in its card's corner."""
    pair = "e => [state.order[e.dataset.position], e.querySelector('.own')?.textContent]"
    found = window.run(f"return [...document.querySelectorAll('.card')].map({pair})")
    return {crop: letter for crop, letter in found if letter}


def click(window: Browser, name: str) -> None:
    window.run("document.getElementById(arguments[0]).click()", name)
    window.settle()


def saved(window: Browser, name: str, folder: Path, file: str) -> list[dict[str, str]]:
    """The rows of the CSV file that a button downloads."""
    folder.mkdir(exist_ok=True)
    window.devtools("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    click(window, name)
    until((folder / file).exists, file)
    return list(csv.DictReader(io.StringIO((folder / file).read_text(encoding="utf-8"), newline="")))


def elsewhere(window: Browser, page: Path, script: str) -> None:
    """Run statements, which store one thing each, in a second tab with the report; wait until the first has heard."""
    first = window.call("GET", "/window")
    window.run("window.heard = 0; window.onstorage = () => heard++")
    window.call("POST", "/window", {"handle": window.call("POST", "/window/new", {"type": "tab"})["handle"]})
    try:
        window.open(page)
        window.run(script)
    finally:
        window.call("DELETE", "/window")
        window.call("POST", "/window", {"handle": first})
    until(lambda: window.run("return heard") == script.count(";"), "the first tab")
    window.settle()


def kappa(a: list[int], b: list[int]) -> float:
    from sklearn.metrics import cohen_kappa_score

    return float(cohen_kappa_score(a, b))


def test_keys_give_and_take_back_verdicts(opened: Browser) -> None:
    opened.choose("sort", "input")
    opened.run("document.querySelector('.card').focus()")
    opened.press("a", "n", "x")
    opened.settle()
    assert own(opened) == {0: "A", 1: "N", 2: "X"}
    assert opened.run("return document.activeElement.dataset.position") == "3"  # one key a crop
    spoken = opened.run("return document.querySelectorAll('.card')[2].querySelector('.more').textContent")
    assert spoken.endswith("your verdict no mitosis")
    opened.press("Left", "x", "Left", "a")
    opened.settle()
    assert own(opened) == {0: "A", 1: "A"}
    opened.press("Enter")
    opened.press("n")
    opened.settle()
    title = "return document.getElementById('detail').open && document.getElementById('detail-title').textContent"
    assert opened.run(title) == "crop2.png"  # stays, for the answer
    assert opened.run("return document.querySelector('#verdicts [aria-pressed=true]').value") == "n"
    opened.run("document.querySelector('#verdicts [value=x]').click()")
    opened.press("Escape")
    opened.settle()
    assert own(opened) == {0: "A", 1: "A", 2: "X"}
    assert opened.run("return document.getElementById('reading-summary').textContent") == f"3 of {COUNT} crops"
    opened.choose("show", "read")
    assert len(cards(opened)) == 3
    opened.choose("show", "unread")
    assert len(cards(opened)) == COUNT - 3
    opened.choose("name", "a search for axn is no verdict")
    opened.run("document.getElementById('name').focus()")
    opened.press("a", "x", "n")
    assert opened.run("return readCrops().length") == 3


def test_a_second_tab_moves_neither_the_dialog_nor_the_focus(opened: Browser, page: Path) -> None:
    opened.choose("sort", "input")
    opened.run("openDetail(20)")
    elsewhere(opened, page, "give(5, 'n'); give(20, 'x');")
    assert opened.run("return document.querySelector('#verdicts [aria-pressed=true]').value") == "x"
    opened.press("a")
    title = "return detail.open && document.getElementById('detail-title').textContent"
    assert opened.run(title) == "crop20.png"
    assert opened.run("return readCrops().map(i => [i, verdictOf(i)])") == [[5, "n"], [20, "a"]]
    elsewhere(opened, page, "setBlinded(true);")  # another order, with the same crop in the dialog
    assert opened.run(title) == "crop20.png" and opened.run("return state.order[state.active]") == 20
    opened.press("n", "Escape")
    position = opened.run("return document.activeElement.dataset.position")
    assert opened.run("return state.order[arguments[0]]", position) == 20
    elsewhere(opened, page, "give(6, 'x');")
    assert own(opened) == {5: "N", 6: "X", 20: "N"}
    assert opened.run("return document.activeElement.dataset.position") == position


def test_a_held_key_gives_one_verdict(opened: Browser) -> None:
    key = {"key": "a", "code": "KeyA", "windowsVirtualKeyCode": 65}
    for before in ("document.querySelector('.card').focus()", "openDetail(3)"):
        opened.run(before)
        for repeated in (False, True, True, True):
            opened.devtools("Input.dispatchKeyEvent", type="keyDown", text="a", autoRepeat=repeated, **key)
        opened.devtools("Input.dispatchKeyEvent", type="keyUp", **key)
    assert opened.run("return readCrops().map(i => state.order.indexOf(i)).sort()") == [0, 3]


def test_the_browser_keeps_verdicts_for_this_report_alone(opened: Browser, page: Path, tmp_path: Path) -> None:
    opened.run("give(4, 'a'); give(5, 'x')")
    opened.open(page)
    opened.settle()
    assert own(opened) == {4: "A", 5: "X"}
    crops = np.zeros((COUNT, 8, 8, 3), np.uint8)
    again = write_report(ROWS, crops, THRESHOLD, tmp_path / "same.html", Page("Another title"))
    opened.open(again)
    opened.settle()
    assert own(opened) == {4: "A", 5: "X"}  # the same crops and answers, written once more
    other = write_report(ROWS[::-1], crops, THRESHOLD, tmp_path / "other.html", Page())
    opened.open(other)
    opened.settle()
    assert own(opened) == {}
    assert key_of(ROWS, THRESHOLD) != key_of(ROWS, 0.5) != key_of(ROWS[1:], 0.5)
    opened.open(page)
    opened.run("window.confirm = () => true")
    click(opened, "forget")
    opened.open(page)
    assert own(opened) == {} and opened.run("return localStorage.length") == 0


def test_without_a_store_it_says_so(opened: Browser, page: Path) -> None:
    script = "Object.defineProperty(window, 'localStorage', { get() { throw new Error('denied'); } })"
    added = opened.devtools("Page.addScriptToEvaluateOnNewDocument", source=script)
    opened.open(page)
    opened.run("give(0, 'a')")
    assert own(opened) == {0: "A"} and opened.run("return !document.getElementById('not-kept').hidden")
    opened.devtools("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])


def test_blinded_hides_answer_label_and_name_until_the_verdict(opened: Browser, page: Path) -> None:
    opened.choose("sort", "high")
    click(opened, "blinded")
    opened.run("document.getElementById('crops').scrollIntoView()")
    opened.settle()
    assert cards(opened) == [f" Crop {n + 1}" for n in range(COUNT)]
    order = opened.run("return state.order")
    assert sorted(order) == list(range(COUNT)) and order != list(range(COUNT))
    scores = np.array([row.p_atypical for row in ROWS])[order]
    assert abs(np.corrcoef(scores, np.arange(COUNT))[0, 1]) < 0.5  # the order says nothing
    titles = "[...document.querySelectorAll('main [title]')].map(e => e.title)"
    text = opened.run(f"return document.body.innerText + {titles}")
    assert "Normal/" not in text and ".png" not in text and "labelled" not in text and "AUC" not in text
    assert opened.run("return document.querySelectorAll('canvas, .track, .truth').length") == 0
    parts = ["figures", "threshold", "roc", "confusion", "scores-panel", "sort", "name", "save-crops"]
    assert opened.run("return arguments[0].filter(name => $(name).offsetWidth)", parts) == []
    offered = "return [...document.getElementById('show').options].filter(e => !e.disabled).map(e => e.value)"
    assert opened.run(offered) == ["all", "unread", "read"]
    opened.run("document.querySelector('.card').click()")
    opened.settle()
    about = "return document.getElementById('detail').innerText + document.querySelector('#stage img').alt"
    assert "P(atypical)" not in opened.run(about) and ".png" not in opened.run(about)
    opened.press("n")
    opened.settle()
    assert "P(atypical)" in opened.run(about) and ".png" in opened.run(about)
    opened.press("Escape")
    opened.open(page)  # still blinded, and nothing is shown before
    opened.settle()
    first, second, *_ = cards(opened)
    assert "labelled" in first or "no label" in first
    assert second == " Crop 2"
    assert opened.run("return document.getElementById('agreement').textContent").startswith(
        "Agreement with ensemble and"
    )
    click(opened, "blinded")
    assert opened.run("return document.getElementById('figures').offsetWidth > 0")
    assert opened.run("return document.querySelectorAll('table.agreement').length") == 1


def test_a_verdict_counts_as_blinded_only_if_it_is_the_first(opened: Browser, tmp_path: Path) -> None:
    click(opened, "blinded")
    opened.run("give(0, 'a'); give(1, 'a'); give(1, 'n'); give(2, 'x'); give(2, 'x'); give(2, 'a')")
    click(opened, "blinded")
    opened.run("give(3, 'x')")
    rows = saved(opened, "save-verdicts", tmp_path / "downloads", "Two-readers-verdicts.csv")
    assert [row["verdict"] for row in rows] == ["atypical", "normal", "atypical", "no mitosis"]
    assert [row["blinded"] for row in rows] == ["yes", "no", "no", "no"]
    assert rows[3]["path"] == """'=1+1,"3".png"""  # no formula for a spreadsheet
    assert [row["path"] for row in rows[:3]] == [row.path for row in ROWS[:3]]
    for row, answer in zip(rows, ROWS, strict=False):
        assert float(row["p_atypical"]) == answer.p_atypical and float(row["threshold"]) == THRESHOLD
        assert row["class"] == ("atypical" if answer.p_atypical >= THRESHOLD else "normal")
        assert row["label"] == {None: "", 0: "normal", 1: "atypical"}[answer.label] and row["domain"] == answer.domain


def test_text_in_the_csv_is_what_it_is_in_tables_of_slides(opened: Browser) -> None:
    texts = ['=HYPERLINK("x")', "@a", "\t1", "-1.5", "+2e3", "-inf", "-", "- a\r\n =b", "\n=c", "a\n b", ""]
    opened.run("texts = arguments[0]; texts.forEach((text, i) => { domains[i] = text; domain[i] = i; })", texts)
    rows = csv.DictReader(io.StringIO(opened.run("return csvOf([...texts.keys()])"), newline=""))
    assert [row["domain"] for row in rows] == [plain(text) for text in texts]


def test_the_csv_of_the_filter_has_its_crops_in_its_order(opened: Browser, tmp_path: Path) -> None:
    opened.choose("show", "atypical")
    opened.choose("sort", "high")
    opened.choose("domain", "0")
    rows = saved(opened, "save-crops", tmp_path / "downloads", "Two-readers-crops.csv")
    chosen = [row for row in ROWS if row.p_atypical >= THRESHOLD and row.domain == "lung"]
    assert [float(row["p_atypical"]) for row in rows] == sorted((row.p_atypical for row in chosen), reverse=True)
    assert {row["verdict"] + row["blinded"] for row in rows} == {""}


def test_agreement_is_cohens_kappa(opened: Browser) -> None:
    rng = np.random.default_rng(3)
    keys = ["anx"[k] for k in rng.choice(3, COUNT, p=[0.4, 0.5, 0.1])]
    click(opened, "blinded")
    opened.run("arguments[0].slice(1).forEach((key, n) => give(n + 1, key))", keys)
    assert opened.run("return document.querySelectorAll('table.agreement').length") == 0  # one crop is left
    opened.run("give(0, arguments[0])", keys[0])
    cells = "e => [...e.children].map(c => c.textContent)"
    found = opened.run(f"return [...document.querySelectorAll('table.agreement tbody tr')].map({cells})")
    sure = [n for n in range(COUNT) if keys[n] != "x"]
    mine = {n: int(keys[n] == "a") for n in sure}
    called = {n: int(ROWS[n].p_atypical >= THRESHOLD) for n in sure}
    labels = {n: label for n in sure if (label := ROWS[n].label) is not None}
    expected = [(mine, called), (mine, labels), (called, labels)]
    for (name, n, same, value, interval), (one, other) in zip(found, expected, strict=True):
        both = [k for k in sure if k in one and k in other]
        pairs = [(one[k], other[k]) for k in both]
        agreed = sum(a == b for a, b in pairs) / len(pairs)
        assert int(n) == len(pairs) and int(same.split()[0]) == sum(a == b for a, b in pairs), name
        assert float(value) == pytest.approx(kappa(*map(list, zip(*pairs, strict=True))), abs=6e-4), name
        chance = (agreed - float(value)) / (1 - float(value))
        error = 1.96 * (agreed * (1 - agreed) / len(pairs)) ** 0.5 / (1 - chance)
        low, high = map(float, interval.split(" to "))
        assert (low, high) == pytest.approx((max(-1, float(value) - error), min(1, float(value) + error)), abs=3e-3)
    notes = opened.run("return document.querySelector('#agreement p').textContent")
    assert notes == f"{COUNT} of {COUNT} verdicts were given blinded. {keys.count('x')} of “no mitosis” are left out."
    assert opened.run("return kappaOf([[1, 1], [1, 1]]).kappa") is None
    assert opened.run("return kappaOf([[1, 1], [0, 0]])") == {"n": 2, "same": 2, "kappa": 1, "low": None, "high": None}


def test_labels_maps_and_a_scale_bar_are_on_the_cards(opened: Browser) -> None:
    opened.choose("sort", "input")
    text = cards(opened)
    assert "no label" in text[0] and f"labelled {['normal', 'atypical'][ROWS[1].label or 0]}" in text[1]
    assert opened.run("return document.querySelectorAll('.card canvas').length") == len(text)  # they were asked for
    bar = "const e = document.querySelector(arguments[0]); return e.offsetWidth / e.parentElement.clientWidth"
    assert opened.run(bar, ".card .scale") == pytest.approx(5 / (64 * 0.25), abs=0.02)  # 5 µm: 10 are more than half
    opened.run("document.querySelector('.card').click()")
    opened.settle()
    assert opened.run(bar, "#stage .scale") == pytest.approx(5 / (64 * 0.25), abs=0.01)
    assert opened.run("return document.querySelector('#stage .scale').textContent") == "5 µm"


def test_on_a_phone_nothing_is_cut_off_and_verdicts_have_buttons(opened: Browser) -> None:
    opened.view(390, 844, phone=True)
    opened.settle()
    click(opened, "blinded")
    assert opened.run("return document.documentElement.scrollWidth") <= 390
    opened.run("document.querySelector('.card').click(); document.querySelector('#verdicts [value=a]').click()")
    opened.settle()
    assert opened.run("return readCrops().length") == 1
    click(opened, "blinded")
    assert opened.run("return document.documentElement.scrollWidth") <= 390
    opened.view(1280, 900)
