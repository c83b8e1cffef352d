"""integrations/nextflow: the module's script and stub, run with bash as Nextflow runs them (Nextflow cannot be had)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from test.support import detection_files as files
from test.support.commands import rows_of
from test.support.pyramids import FIGURES

ROOT = Path(__file__).resolve().parents[2]
MODULE = (ROOT / "integrations/nextflow/main.nf").read_text()
PLACES = [(float(x), float(y)) for x, y in FIGURES]


def block(name: str, **values: str) -> str:
    """The text of a block, as Groovy's string makes it: ${names} replaced, escapes undone, indentation stripped."""
    [text] = re.findall(rf'^    {name}:\n.*?"""\n(.*?)\n    """', MODULE, re.MULTILINE | re.DOTALL)
    text = re.sub(r"\\(.)|\$\{([\w.]+)\}", lambda match: match[1] or values[match[2]], text)
    return "\n".join(line.removeprefix("    ") for line in text.split("\n"))


def escaped(file: Path) -> str:
    """A path as Nextflow inserts it (nextflow.util.Escape)."""
    return re.sub(r"""['" ()\\!&|<>`:]""", r"\\\g<0>", file.name)


def run(
    folder: Path, name: str, weights: Path, slide: Path, detections: Path, prefix: str = "case 7"
) -> subprocess.CompletedProcess[str]:
    """In a folder of the task's own, with its inputs as links, by bash -ue, as Nextflow does by default."""
    folder.mkdir()
    for file in (slide, detections):
        (folder / file.name).symlink_to(file)
    text = block(
        name,
        detections=escaped(detections),
        file=escaped(slide),
        prefix=prefix,
        args=f"--device cpu --precision fp32 --weights {weights}",
        **{"task.process": "MIDOGLORA_SLIDES"},
    )
    (folder / ".command.sh").write_text(text)
    image = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # its environment
    command = ["/bin/bash", "-ue", ".command.sh"]
    return subprocess.run(command, cwd=folder, env=os.environ | image, capture_output=True, text=True)


def outputs(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if not file.is_symlink() and file.name[0] != "."}


DECLARED = {name.replace("${prefix}", "case 7") for name in re.findall(r'path\(?\s*"([^"]+)"', MODULE)}


def test_the_script_writes_what_it_declares(slide, miniature, tmp_path) -> None:
    done = run(tmp_path / "task", "script", miniature, slide, files.qupath(tmp_path / "found.geojson", PLACES))
    assert done.returncode == 0, done.stderr
    assert outputs(tmp_path / "task") == DECLARED | {"messages.txt"}
    assert (
        len(rows_of(tmp_path / "task/case 7.classes.csv")) == 3
        and not (tmp_path / "task/case 7.not_scored.txt").read_text()
    )
    [version] = yaml.safe_load((tmp_path / "task/versions.yml").read_text()).items()
    assert version[0] == "MIDOGLORA_SLIDES" and re.fullmatch(r"\d+\.\d+\.\d+", version[1]["midog-lora"])


@pytest.mark.parametrize("name", ["script", "stub"])
def test_the_names_of_the_readme_do_not_meet(name, slide, miniature, tmp_path) -> None:
    """The detections are called like the sample."""
    example = r"\[id: '([^']+)'\], file\('([^']+)'\), file\('([^']+)'\)"
    [(prefix, *names)] = re.findall(example, (ROOT / "integrations/nextflow/README.md").read_text())
    shutil.copy(slide, tmp_path / names[0])
    found = files.qupath(tmp_path / names[1], PLACES)
    before = found.read_bytes()
    done = run(tmp_path / "task", name, miniature, tmp_path / names[0], found, prefix)
    assert done.returncode == 0, done.stderr
    assert outputs(tmp_path / "task") - {"messages.txt"} == {one.replace("case 7", prefix) for one in DECLARED}
    assert found.read_bytes() == before


def test_the_images_program_is_not_in_the_way() -> None:
    """Nextflow leaves an ENTRYPOINT in place, and a configuration's containerOptions take the place of the module's."""
    assert re.search(r"^ENTRYPOINT", (ROOT / "integrations/Dockerfile").read_text(), re.MULTILINE)
    for text in (MODULE, (ROOT / "integrations/nextflow/README.md").read_text()):
        options = re.findall(r"^.*\bcontainerOptions (?:= )?\".*$", text, re.MULTILINE)
        assert options and all("--entrypoint ''" in one for one in options)


def test_objects_that_cannot_be_scored_keep_the_others(slide, miniature, tmp_path) -> None:
    found = files.qupath(tmp_path / "found.geojson", [*PLACES, (150.0, 120.0)])
    done = run(tmp_path / "task", "script", miniature, slide, found)
    assert done.returncode == 0 and "1 of 4 detections could not be scored" in done.stderr
    [line] = (tmp_path / "task/case 7.not_scored.txt").read_text().splitlines()
    assert line.startswith("not scored: found.geojson, feature 4: it lies on blank glass")
    assert len(rows_of(tmp_path / "task/case 7.classes.csv")) == 3


def test_an_error_fails_the_task(slide, miniature, tmp_path) -> None:
    found = files.qupath(tmp_path / "found.geojson", [(150.0, 120.0)])
    done = run(tmp_path / "task", "script", miniature, slide, found)
    assert done.returncode == 1 and "none of 1 detections could be scored" in done.stderr


def test_the_stub_and_the_description_agree(slide, miniature, tmp_path) -> None:
    done = run(tmp_path / "task", "stub", miniature, slide, files.qupath(tmp_path / "found.geojson", PLACES))
    assert done.returncode == 0 and outputs(tmp_path / "task") == DECLARED
    about = yaml.safe_load((ROOT / "integrations/nextflow/meta.yml").read_text())
    assert list(about["output"]) == re.findall(r"emit: (\w+)", MODULE)
    named = {name for channel in about["output"].values() for name in re.findall(r"'([^']+\.\w+)': \{", str(channel))}
    assert {name.replace("${prefix}", "case 7") for name in named} == DECLARED
    [inputs] = re.findall(r"tuple (.*?) //", MODULE)
    assert re.findall(r"\((\w+)\)", inputs) == [name for one in about["input"][0] for name in one]
