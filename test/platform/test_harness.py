"""The harness itself, natively: what a program finds, the layout of its input, model tarballs, the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from inference.checks import passed
from test.harness import __main__ as command_line
from test.harness import engines, images, layout, readout
from test.harness.layout import ANSWER
from test.support.programs import GOOD, WRITE, make_stack, messages, run_program

ROOT = Path(__file__).resolve().parents[2]


def test_what_the_program_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linked input under random names, empty writable folders, a clean environment, limited memory, no network."""
    monkeypatch.setenv("GRAND_CHALLENGE_SECRET", "1")
    program = (
        WRITE
        + """
import resource, socket
inputs = json.load(open(source + "/inputs.json"))
[image] = os.listdir(source + "/images/stacked-histopathology-roi-cropouts")
try:
    socket.create_connection(("192.0.2.1", 80), 1); network = True
except OSError as error:
    network = error.errno != 101  # unreachable at once, not filtered
print(json.dumps({"link": os.path.islink(source), "target": os.readlink(source), "image": image, "inputs": inputs,
    "output": os.listdir(target), "tmp": os.listdir(sys.argv[3]), "env": dict(os.environ), "network": network,
    "modes": [oct(os.stat(p).st_mode & 0o777) for p in (source, source + "/inputs.json", target, sys.argv[3])],
    "data": resource.getrlimit(resource.RLIMIT_DATA)[0], "session": os.getsid(0) == os.getpid()}))
"""
    )
    ended, _, findings = run_program(tmp_path, program)
    assert passed(findings), messages(findings)
    seen = json.loads(ended.stdout)
    assert seen["link"]
    assert seen["target"].endswith("-input")
    assert len(seen["image"]) == 36 + len(".tiff")
    assert seen["inputs"][0]["image"]["name"] == "stack_12.tiff"
    assert seen["output"] == [ANSWER]
    assert seen["tmp"] == []
    assert seen["modes"] == ["0o755", "0o644", "0o777", "0o777"]
    assert seen["data"] == 15 * 2**30
    assert seen["session"]
    assert seen["env"]["LOG_LEVEL"] == "INFO"
    assert not any(name.startswith("GRAND_CHALLENGE") for name in seen["env"])
    assert not (engines.offline() and seen["network"])


@pytest.mark.parametrize("variant", layout.VARIANTS)
def test_forms_of_inputs_json(variant: str, tmp_path: Path) -> None:
    stack = make_stack(tmp_path / "stack_12.tiff")
    layout.write_input(stack, tmp_path / "input", variant, Random(1))
    [image] = (tmp_path / "input/images" / layout.SLUG).iterdir()
    assert image.read_bytes() == stack.read_bytes()
    path = tmp_path / "input/inputs.json"
    assert path.exists() == (variant != "missing")
    if path.exists():
        [value] = json.loads(path.read_text())
        keys = {"2025": ["interface"], "template": ["interface"], "stub": ["socket"]}.get(
            variant, ["socket", "interface"]
        )
        assert [key for key in ("socket", "interface") if key in value] == keys
        assert all(value[key]["slug"] == layout.SLUG for key in keys)


def test_names_differ_between_jobs(tmp_path: Path) -> None:
    names = set()
    for index in range(3):
        layout.write_input(make_stack(tmp_path / "stack_12.tiff"), tmp_path / str(index), "2026", Random(f"0 {index}"))
        names |= {file.name for file in (tmp_path / str(index) / "images" / layout.SLUG).iterdir()}
    assert len(names) == 3


def test_model_tarball_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "ensemble.json").write_text("{}")
    good = tmp_path / "model.tar.gz"
    with tarfile.open(good, "w:gz") as tar:
        tar.add(tmp_path / "ensemble.json", "./ensemble.json")
    program = WRITE + "print(os.listdir(os.path.dirname(source) + '/opt/ml/model'))"
    ended, _, findings = run_program(tmp_path, program, weights=good)
    assert passed(findings)
    assert ended.stdout == b"['ensemble.json']\n"


@pytest.mark.parametrize("content", [b"no tarball", "link"])
def test_bad_model_tarballs_end_the_job(tmp_path: Path, content: bytes | str) -> None:
    bad = tmp_path / "model.tar.gz"
    if isinstance(content, bytes):
        bad.write_bytes(content)
    else:
        with tarfile.open(bad, "w:gz") as tar:
            info = tarfile.TarInfo("base")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
    _, _, findings = run_program(tmp_path, WRITE, weights=bad)
    assert "Could not set up model: Tarfile could not be extracted" in messages(findings)


def test_a_command_that_cannot_start(tmp_path: Path) -> None:
    pk = layout.write_input(make_stack(tmp_path / "stack_12.tiff"), tmp_path / "job/input", "2026", Random(0))
    ended = engines.run_native(tmp_path / "job", pk, None, engines.Limits(), ["/no/such/program"])
    _, findings = readout.judge(ended, 3)
    assert "No such file or directory" in messages(findings)


def test_shim_refuses_to_empty_this_machine(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"tmp": "/tmp"}))
    program = engines.place_programs(tmp_path) / engines.SHIM
    ended = subprocess.run([sys.executable, program, tmp_path / "job.json"], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "outside a container" in ended.stderr


def test_stacks_are_found_in_natural_order(tmp_path: Path) -> None:
    for name in ("stack_10.tiff", "stack_9.TIF", "notes.txt", ".stack_1.tiff", "stack_0.mha"):
        (tmp_path / name).touch()
    assert [path.name for path in layout.find_stacks(tmp_path)] == ["stack_0.mha", "stack_9.TIF", "stack_10.tiff"]
    with pytest.raises(FileNotFoundError, match="no stack here"):
        layout.find_stacks(tmp_path / "notes")


def test_pages_are_counted(tmp_path: Path) -> None:
    stack = make_stack(tmp_path / "stack_3.tiff")
    assert layout.count_pages(stack) == 3
    Image.new("RGB", (8, 8)).save(tmp_path / "one.tiff", big_tiff=True)
    assert layout.count_pages(tmp_path / "one.tiff") == 1
    (tmp_path / "a.mha").write_bytes(
        b"ObjectType = Image\nNDims = 3\nDimSize = 128 128 7\nElementDataFile = LOCAL\n\xff"
    )
    assert layout.count_pages(tmp_path / "a.mha") == 7
    (tmp_path / "cut.tiff").write_bytes(stack.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"truncated|neither"):
        layout.count_pages(tmp_path / "cut.tiff")


@pytest.fixture
def fake_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the command line run a small program in place of the job."""
    real = engines.run_native
    program = GOOD.replace("range(3)", "range(16)").replace('"normal"', '"normal" if k < 9 else "atypical"')
    program = program.replace("k / 10", "k / 16") + (
        "json.dump(answers, open(path, 'w'))\n"
        "pages = [{'page': k, 'spread': 0.01} for k in range(16)]\n"
        "json.dump({'pages': pages, 'seconds': {'load': 1.0, 'predict': 0.5}, 'ensemble': 'default'},"
        " open(sys.argv[3] + '/details.json', 'w'))\n"
    )

    def run(folder: Path, pk: str, weights: Path | None, limits: engines.Limits) -> engines.Run:
        return real(folder, pk, weights, limits, [sys.executable, "-c", program, "{input}", "{output}", "{tmp}"])

    monkeypatch.setattr(engines, "run_native", run)


@pytest.mark.usefixtures("fake_job")
def test_command_line_on_the_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = str(ROOT / "test/sample/ground_truth.json")
    options = ["--engine", "native", "--no-build", "--output", str(tmp_path / "out"), "--truth", truth]
    assert command_line.main(options) == 0
    table = capsys.readouterr().out
    assert f"    15  atypical       0.9375   0.010  {'#' * 19}\n" in table
    assert "load 1.00, predict 0.50" in table
    assert "roc_auc" in table
    assert len(json.loads((tmp_path / "out" / ANSWER).read_text())) == 16
    assert "overall_balanced_accuracy" in json.loads((tmp_path / "out/metrics.json").read_text())["aggregates"]


@pytest.mark.usefixtures("fake_job")
def test_command_line_on_a_folder_fails_as_a_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, pages in (("stack_0", 16), ("stack_1", 8)):
        make_stack(tmp_path / f"{name}.tiff", pages)
    truth = tmp_path / "ground_truth.json"
    truth.write_text("[]")
    options = ["--engine", "native", "--no-build", "--output", str(tmp_path / "out"), "--truth", str(truth)]
    assert command_line.main([*options, "--input", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "16 answers for 8 pages" in output
    assert "not scored: the algorithm failed on 1 of 2 stacks, first stack_1.tiff" in output
    assert (tmp_path / "out/stack_0" / ANSWER).exists()
    assert "1 of 2 stacks passed" in output
    assert "evaluation of all 2 stacks: the answers of 1 stack(s) count for nothing, 0 were not run" in output


def test_command_line_refuses_missing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--engine", "native", "--no-build", "--input", str(tmp_path)]) == 2
    assert "no stack here" in capsys.readouterr().err
    assert command_line.main(["--engine", "native", "--no-build", "--weights", str(tmp_path / "w")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_missing_and_stale_images_are_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[list[str]] = []
    created = {"old": "2020-01-01T00:00:00.123456789Z", "new": "2099-01-01T00:00:00Z"}
    monkeypatch.setattr(engines, "inspect", lambda tag: {"Created": created[tag]} if tag in created else None)

    def build(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        calls.append([*command[1:], env["IMAGE"]])
        return subprocess.CompletedProcess(command, 1 if env["IMAGE"] == "broken" else 0)

    monkeypatch.setattr(subprocess, "run", build)
    for tag in ("old", "new", "missing"):
        images.build("docker", tag)
    ours = ["--engine", "docker", "--ensemble", "weights/default"]
    assert calls == [[*ours, "old"], [*ours, "missing"]]
    with pytest.raises(RuntimeError, match=r"build\.sh --engine docker failed"):
        images.build("docker", "broken")


def test_run_local_prefers_this_repository_to_the_standard_library(tmp_path: Path) -> None:
    """Python has a package called test of its own; the script must find ours from any folder."""
    script = ROOT / "test/run_local.sh"
    ended = subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ))
    assert ended.returncode == 0, ended.stderr
    assert "STACK_OR_FOLDER" in ended.stdout
