"""docs/scripts/classify_mitoses.groovy, run by Groovy on classes that stand in for QuPath's (test/support/qupath).

Debian: apt-get install groovy (2.4). QuPath itself, which runs Groovy 4 and 5, is in none of the package registries.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from test.support import detection_files as files
from test.support.pyramids import FIGURES

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = ROOT / "test/support/qupath"
PLACES = [(float(x), float(y)) for x, y in FIGURES]
# stands for the command: every second object is atypical, and those of the class "Lost" cannot be scored
PROGRAM = """#!{python}
import json, sys
arguments = sys.argv[1:]
print("run with", *arguments)
found, scored = arguments[arguments.index("slides") + 1], arguments[arguments.index("--output") + 1]
inside = lambda path: path.replace("/exchange", {work!r}) if {work!r} else path
features = json.load(open(inside(found)))["features"]
for n, feature in enumerate(features):
    name = ["Atypical mitosis", "Normal mitosis"][n % 2]
    feature["properties"]["classification"] = {{"name": name, "color": [1, 2, 3]}}
    feature["properties"]["measurements"] = {{"P(atypical)": n / 10}}
json.dump({{"features": features}}, open(inside(scored), "w"))
print({last!r})
sys.exit({code})
"""


def groovy(folder: Path, script: Path, state: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The state after the script, and what it printed."""
    if not shutil.which("groovy"):
        message = "no Groovy; expected it; apt-get install groovy"
        pytest.fail(message) if os.environ.get("REQUIRE_GROOVY") else pytest.skip(message)
    file = files.write_json(folder / "state.json", {"selected": [], "server": None, "answers": {}, "kept": {}} | state)
    java = Path(shutil.which("java") or "").resolve()
    environment = os.environ | {
        "JAVA_HOME": str(java.parents[1])
    }  # Debian's groovy looks for a link that may be missing
    command = ["groovy", "-cp", STAND_INS, STAND_INS / "run.groovy", script, file]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text()), done.stdout


@pytest.fixture(scope="session")
def script() -> Path:
    return ROOT / "docs/scripts/classify_mitoses.groovy"


def program(file: Path, last: str = "done", code: int = 0, work: str = "") -> Path:
    file.write_text(PROGRAM.format(python=sys.executable, last=last, code=code, work=work))
    file.chmod(0o755)
    return file


def names(state: dict[str, Any]) -> list[str]:
    return [one["properties"].get("classification", {"name": ""})["name"] for one in state["features"]]


def test_classes_come_back_to_the_open_objects(script, slide, miniature, tmp_path) -> None:
    """The real command on a real slide: a polygon, points, several points in one object, and blank glass."""
    command = tmp_path / "midog lora"  # a path with a blank
    options = f"--weights {miniature} --device cpu --precision fp32"
    command.write_text(f'#!/bin/sh\ncd {ROOT} && exec {sys.executable} -m inference "$@" {options}\n')
    command.chmod(0o755)
    polygon, point, several, twin, blank = files.features([*PLACES[:2], (0, 0), PLACES[2], (150.004, 120)])
    polygon["geometry"], polygon["properties"]["objectType"] = files.square(*PLACES[0]), "detection"
    several["geometry"] = {"type": "MultiPoint", "coordinates": [[720, 320], [150, 800]]}
    several["properties"]["name"] = "by hand"
    blank["id"] = twin["id"]  # as in a file that was dragged onto the slide twice
    tumour = files.features([(0, 0)], "Tumor")[0] | {"id": files.uuid(99), "geometry": files.square(650, 500, 480)}
    before = [polygon, point, several, twin, blank, tumour]
    asked = {"slide": str(slide), "features": before, "answers": {"input": str(command)}}
    after, printed = groovy(tmp_path, script, asked)

    assert after["shown"][:2] == ["choice: Mitosis, Tumor; Mitosis", "input"]
    assert after["kept"] == {"midogLoraCommand": str(command)} and after["updates"] == 1
    found = {tuple(map(tuple, map(str, one["geometry"]["coordinates"]))): one for one in after["features"]}
    assert len(found) == 7
    classified = [one for one in after["features"] if "mitosis" in one["properties"]["classification"]["name"]]
    atypical = sum(one["properties"]["classification"]["name"] == "Atypical mitosis" for one in classified)
    assert len(classified) == 4
    assert after["shown"][2] == (
        f"info: 4 mitotic figures, {atypical} atypical; what could not be scored is selected, and the log says why"
    )
    for one in classified:
        assert 0 < one["properties"]["measurements"]["P(atypical)"] < 1
        assert one["properties"]["metadata"] == {"Detected as": "Mitosis"}
    assert [one["id"] for one in after["features"][:2]] == [polygon["id"], point["id"]]
    single = next(one for one in classified if one["geometry"]["coordinates"] == [720, 320])
    assert single["properties"]["name"] == "by hand" and single["geometry"]["type"] == "Point"
    rest = next(one for one in after["features"] if one["geometry"]["coordinates"] == [150, 800])
    assert rest["properties"]["classification"]["name"] == "Mitosis"
    [left] = [one for one in after["features"] if one["geometry"]["coordinates"] == [150, 120]]
    assert set(after["selected"]) == {rest["id"], left["id"]}
    assert left["properties"]["classification"]["name"] == "Mitosis"
    assert next(one for one in after["features"] if one["id"] == tumour["id"]) == tumour
    assert printed.count("it lies on blank glass") == 2 and "2 of 6 detections could not be scored" in printed


def test_selected_outlines_and_selected_objects(script, slide, tmp_path) -> None:
    command = program(tmp_path / "program")
    figures = files.features([*PLACES, (500.0, 500.0)])
    del figures[3]["properties"]["classification"]  # as an object that was just drawn
    area = files.features([(0, 0)], "Tumor")[0] | {"id": files.uuid(99), "geometry": files.square(650, 400, 200)}
    state = {"slide": str(slide), "features": [*figures, area], "kept": {"midogLoraCommand": str(command)}}
    inside, _ = groovy(tmp_path, script, state | {"selected": [area["id"]]})
    assert names(inside) == ["Atypical mitosis", "Mitosis", "Mitosis", "", "Tumor"] and inside["selected"] == []
    drawn = {"selected": [figures[3]["id"]], "answers": {"choice": "Unclassified"}}
    one, _ = groovy(tmp_path, script, state | drawn)
    assert names(one) == ["Mitosis", "Mitosis", "Mitosis", "Atypical mitosis", "Tumor"]
    assert one["shown"] == ["choice: Mitosis, Tumor, Unclassified; Mitosis", "info: 1 mitotic figures, 1 atypical"]
    empty = area | {"id": files.uuid(98), "geometry": files.square(100, 100, 20)}
    none, _ = groovy(tmp_path, script, state | {"features": [*figures, empty], "selected": [empty["id"]]})
    assert none["shown"][1].startswith("error: No objects of class Mitosis in the selected outlines; expected some")
    assert none["features"] == [*figures, empty]


@pytest.mark.parametrize(
    "words, user",
    [
        ("docker run --rm", "--user {uid}:{gid} "),
        ("docker run --user 0", ""),
        ("podman run --rm", "--userns=keep-id --user {uid}:{gid} " if os.getuid() else "--user {uid}:{gid} "),
    ],
)
def test_a_container_gets_its_folders_and_who_may_read_them(words, user, script, slide, tmp_path) -> None:
    """A program called docker or podman, first on the PATH, which notes how it was called."""
    engine, options = words.split(" ", 1)
    file = tmp_path / "bin" / engine
    file.parent.mkdir()
    program(file, work="WORK")
    second = 'arguments[arguments.index("-v", arguments.index("-v") + 1) + 1].split(":")[0]'
    file.write_text(file.read_text().replace("'WORK'", second))
    state = {
        "slide": str(slide),
        "features": files.features(PLACES),
        "kept": {"midogLoraCommand": f"{words} midog-lora"},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        after, printed = groovy(tmp_path, script, state)
    assert names(after) == ["Atypical mitosis", "Normal mitosis", "Atypical mitosis"]
    called = next(line for line in printed.splitlines() if line.startswith("run with")).split(" ", 2)[2]
    user = user.format(uid=os.getuid(), gid=os.getgid())
    assert called.startswith(f"{options} {user}-v {slide.parent}:/slides:ro -v ")
    assert called.endswith(
        f"midog-lora slides /exchange/found.geojson --slide /slides/{slide.name} --output /exchange/scored.geojson"
    )


@pytest.mark.parametrize("server", ["RotatedImageServer", "TiledTransformingImageServer"])
def test_a_transformed_image_is_refused(server, script, slide, tmp_path) -> None:
    features = files.features(PLACES)
    after, _ = groovy(tmp_path, script, {"slide": str(slide), "server": server, "features": features})
    [shown] = after["shown"]
    assert shown.startswith("error: The open image is not one file of this computer, opened as it is")
    assert after["features"] == features


@pytest.mark.parametrize("kind", ["fails", "missing", "elsewhere"])
def test_what_goes_wrong_is_shown_and_nothing_changes(kind, script, slide, tmp_path) -> None:
    command = program(tmp_path / "program", last="none of 3 detections could be scored", code=1)
    kept = str(tmp_path / "gone") if kind == "missing" else str(command)
    features = files.features(PLACES)
    where = "https://server/slide" if kind == "elsewhere" else str(slide)
    state = {"slide": where, "features": features, "kept": {"midogLoraCommand": kept}}
    after, _ = groovy(tmp_path, script, state)
    messages = {
        "fails": "error: none of 3 detections could be scored",
        "missing": "error: Cannot run program",
        "elsewhere": "error: The open image is not one file of this computer",
    }
    assert after["shown"][-1].startswith(messages[kind]) and after["updates"] == 0
    assert [(one["id"], one["properties"]) for one in after["features"]] == [
        (one["id"], one["properties"]) for one in features
    ]
    assert bool(after["kept"]["midogLoraCommand"]) == (kind != "missing")  # asked for again
