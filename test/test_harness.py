"""The harness itself, natively: deliberately broken programs in place of the job are caught with the right message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from test.harness import __main__ as command_line
from test.harness import engines, layout, readout
from test.harness.findings import Finding, passed
from test.harness.layout import ANSWER
from test.stacks import write_stack

ROOT = Path(__file__).resolve().parents[1]
GOOD = """
import json, os, sys
source, target = sys.argv[1:3]
answers = [{"class": "normal", "confidence": k / 10} for k in range(3)]
path = target + "/multiple-mitotic-figure-classification.json"
"""
WRITE = GOOD + "json.dump(answers, open(path, 'w'))\n"
Outcome = tuple[engines.Run, "list[dict[str, object]] | None", list[Finding]]


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    """A stack of three pages, 8 x 8."""
    path = tmp_path / "stack_12.tiff"
    write_stack(path, [Image.new("RGB", (8, 8), (k, k, k)) for k in range(3)])
    return path


@pytest.fixture
def run(stack: Path, tmp_path: Path) -> Callable[..., Outcome]:
    def run_program(program: str, variant: str = "2026", weights: Path | None = None, **limits: float) -> Outcome:
        folder = tmp_path / "job"
        pk = layout.write_input(stack, folder / "input", variant, Random(0))
        command = [sys.executable, "-c", program, "{input}", "{output}", "{tmp}"]
        ended = engines.run_native(folder, pk, weights, engines.Limits(**{"seconds": 60, **limits}), command)  # type: ignore[arg-type]
        return ended, *readout.judge(ended, layout.count_pages(stack))

    return run_program


def messages(findings: list[Finding], *levels: str) -> str:
    return "\n".join(str(finding) for finding in findings if finding.level in (levels or ("fail",)))


def test_a_good_program_passes_silently(run: Callable[..., Outcome]) -> None:
    ended, answers, findings = run(WRITE)
    assert passed(findings)
    assert messages(findings, "warn") == ""
    assert answers == [{"class": "normal", "confidence": k / 10} for k in range(3)]
    assert ended.code == 0
    assert ended.peak_mib > 1


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (WRITE.replace("k / 10", "k"), "confidence is 0; it needs to be of type float"),
        (WRITE.replace("k / 10", "True"), "confidence is true; it needs"),
        (WRITE.replace("k / 10", "str(k)"), 'confidence is "0"; it needs'),
        (WRITE.replace("k / 10", "float('nan')"), "NaN in the answers becomes null"),
        (WRITE.replace("k / 10", "float('inf')"), "Infinity in the answers becomes null"),
        (WRITE.replace("k / 10", "k - 0.5"), "outside [0, 1]"),
        (WRITE.replace('"normal"', '"Normal"'), "class is 'Normal'"),
        (WRITE.replace('"class"', '"label"'), 'lacks "class" or "confidence"'),
        (WRITE.replace("range(3)", "range(2)"), "2 answers for 3 pages"),
        (WRITE.replace("range(3)", "range(16)"), "16 answers for 3 pages"),
        (WRITE.replace("dump(answers", "dump([0.1, 0.2, 0.3]"), "Needs list of dictionaries"),
        (WRITE.replace("dump(answers", "dump({'answers': answers}"), "the answer is a dict"),
        (WRITE.replace("'w'", "'w', encoding='utf-8-sig'"), "it starts with a BOM"),
        (WRITE.replace("'w'", "'w', encoding='utf-16'"), "is not UTF-8"),
        (GOOD + "open(path, 'w').write(str(answers))", "is not valid json"),
        (GOOD + "open(path, 'w')", "is not valid json"),
        (GOOD, "was not produced; /output holds nothing"),
        (WRITE.replace("path, 'w'", "target + '/answers.json', 'w'"), "/output holds answers.json"),
        (WRITE + "os.symlink('/nowhere', target + '/link')", "link is a dangling link"),
        (GOOD + "raise SystemExit('weights not found')", "exit code 1: weights not found"),
        (WRITE + "sys.exit(3)", "exit code 3: no errors were reported"),
        (WRITE + "os.kill(os.getpid(), 9)", "exit code -9"),
        (WRITE + "print('x' * 100 * 1024)", "stdout: 1 line(s) over 64 KiB are dropped, the longest has 102400 bytes"),
        (WRITE + "for k in range(9000): print('\\r{:9d}'.format(k), end='')", "over 64 KiB are dropped"),
        (WRITE + "sys.stdout.buffer.write(b'\\xff\\n')", "stdout is not valid UTF-8"),
        (WRITE + "open(sys.argv[3] + '/weights.pt').read()", "No such file"),
        (WRITE.replace("k / 10", "bytearray(20 * 2**30)"), "MemoryError"),
    ],
)
def test_broken_programs_fail(run: Callable[..., Outcome], program: str, message: str) -> None:
    _, answers, findings = run(program)
    assert message in messages(findings)
    assert answers is None
    assert all(finding.fix for finding in findings if finding.level != "pass")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (WRITE + "print('UserWarning: chatter', file=sys.stderr)", "1 line(s) on stderr mark the job with a warning"),
        (WRITE + "print('x\\n' * 600)", "only the last 500 are kept"),
        (WRITE + "open(target + '/debug.png', 'w')", "/output also holds debug.png"),
        (WRITE.replace("k / 10", "0.5"), "all confidences are equal"),
        (
            WRITE.replace(
                '"normal", "confidence": k / 10', '"normal" if k else "atypical", "confidence": 0.7 + k / 10'
            ),
            "no threshold explains the classes",
        ),
    ],
)
def test_doubtful_programs_are_warned_of(run: Callable[..., Outcome], program: str, message: str) -> None:
    _, answers, findings = run(program)
    assert passed(findings)
    assert message in messages(findings, "warn")
    assert answers


def test_a_hang_gets_term_and_may_end_cleanly(run: Callable[..., Outcome]) -> None:
    program = "import signal, time; signal.signal(15, lambda *_: print('got TERM') or exit(0)); time.sleep(60)"
    ended, answers, findings = run(program, seconds=1)
    assert "Time limit exceeded" in messages(findings)
    assert answers is None
    assert ended.stdout == b"got TERM\n"
    assert ended.seconds < 5  # not killed


def test_a_hang_that_ignores_term_is_killed_with_its_children(run: Callable[..., Outcome]) -> None:
    program = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.fork()); time.sleep(60)"
    ended, _, findings = run(program, seconds=0.5)
    assert "Time limit exceeded" in messages(findings)
    assert ended.code == -9
    assert ended.seconds >= 5
    for pid in (int(line) for line in ended.stdout.split() if line != b"0"):
        state = Path(f"/proc/{pid}/stat")  # gone, or a zombie until its new parent looks
        assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_child_that_keeps_stdout_open_is_found(run: Callable[..., Outcome]) -> None:
    program = WRITE + "import subprocess; subprocess.Popen(['sleep', '30'])"
    _, _, findings = run(program, seconds=2)
    assert "kept stdout or stderr open" in messages(findings)


def test_what_the_program_finds(run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
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
    ended, _, findings = run(program)
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
def test_forms_of_inputs_json(variant: str, stack: Path, tmp_path: Path) -> None:
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


def test_names_differ_between_jobs(stack: Path, tmp_path: Path) -> None:
    names = set()
    for index in range(3):
        layout.write_input(stack, tmp_path / str(index), "2026", Random(f"0 {index}"))
        names |= {file.name for file in (tmp_path / str(index) / "images" / layout.SLUG).iterdir()}
    assert len(names) == 3


def test_model_tarball_is_unpacked(run: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "ensemble.json").write_text("{}")
    good = tmp_path / "model.tar.gz"
    with tarfile.open(good, "w:gz") as tar:
        tar.add(tmp_path / "ensemble.json", "./ensemble.json")
    program = WRITE + "print(os.listdir(os.path.dirname(source) + '/opt/ml/model'))"
    ended, _, findings = run(program, weights=good)
    assert passed(findings)
    assert ended.stdout == b"['ensemble.json']\n"


@pytest.mark.parametrize("content", [b"no tarball", "link"])
def test_bad_model_tarballs_end_the_job(run: Callable[..., Outcome], tmp_path: Path, content: bytes | str) -> None:
    bad = tmp_path / "model.tar.gz"
    if isinstance(content, bytes):
        bad.write_bytes(content)
    else:
        with tarfile.open(bad, "w:gz") as tar:
            info = tarfile.TarInfo("base")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
    assert "Could not set up model: Tarfile could not be extracted" in messages(run(WRITE, weights=bad)[2])


def test_a_command_that_cannot_start(stack: Path, tmp_path: Path) -> None:
    pk = layout.write_input(stack, tmp_path / "job/input", "2026", Random(0))
    ended = engines.run_native(tmp_path / "job", pk, None, engines.Limits(), ["/no/such/program"])
    _, findings = readout.judge(ended, 3)
    assert "No such file or directory" in messages(findings)


def test_shim_refuses_to_empty_this_machine(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"tmp": "/tmp"}))
    ended = subprocess.run([sys.executable, engines.SHIM, tmp_path / "job.json"], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "outside a container" in ended.stderr


def test_stacks_are_found_in_natural_order(tmp_path: Path) -> None:
    for name in ("stack_10.tiff", "stack_9.TIF", "notes.txt", ".stack_1.tiff", "stack_0.mha"):
        (tmp_path / name).touch()
    assert [path.name for path in layout.find_stacks(tmp_path)] == ["stack_0.mha", "stack_9.TIF", "stack_10.tiff"]
    with pytest.raises(FileNotFoundError, match="no stack here"):
        layout.find_stacks(tmp_path / "notes")


def test_pages_are_counted(stack: Path, tmp_path: Path) -> None:
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
    assert "    15  atypical       0.9375   0.010    0.031" in table
    assert "load 1.00, predict 0.50" in table
    assert "roc_auc" in table
    assert len(json.loads((tmp_path / "out" / ANSWER).read_text())) == 16
    assert "overall_balanced_accuracy" in json.loads((tmp_path / "out/metrics.json").read_text())["aggregates"]


@pytest.mark.usefixtures("fake_job")
def test_command_line_on_a_folder_fails_as_a_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, pages in (("stack_0", 16), ("stack_1", 8)):
        write_stack(tmp_path / f"{name}.tiff", [Image.new("RGB", (8, 8))] * pages)
    truth = tmp_path / "ground_truth.json"
    truth.write_text("[]")
    options = ["--engine", "native", "--no-build", "--output", str(tmp_path / "out"), "--truth", str(truth)]
    assert command_line.main([*options, "--input", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "16 answers for 8 pages" in output
    assert "not scored: the algorithm failed on 1 of 2 stacks, first stack_1.tiff" in output
    assert (tmp_path / "out/stack_0" / ANSWER).exists()
    assert "1 of 2 stacks passed" in output


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
        command_line.build("docker", tag)
    assert calls == [["--engine", "docker", "old"], ["--engine", "docker", "missing"]]
    with pytest.raises(RuntimeError, match=r"build\.sh --engine docker failed"):
        command_line.build("docker", "broken")


def test_run_local_prefers_this_repository_to_the_standard_library(tmp_path: Path) -> None:
    """Python has a package called test of its own; the script must find ours from any folder."""
    script = ROOT / "test/run_local.sh"
    ended = subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ))
    assert ended.returncode == 0, ended.stderr
    assert "STACK_OR_FOLDER" in ended.stdout
