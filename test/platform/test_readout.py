"""Deliberately broken programs in place of the job are caught with the right message (natively)."""

from __future__ import annotations

from pathlib import Path

import pytest

from inference.checks import passed
from test.support.programs import GOOD, WRITE, messages, run_program

DEEP = """
text = json.dumps(answers)
open(path, 'w').write(text.replace('}}', ', "extra": ' + '[' * {levels} + ']' * {levels} + '}}'))
"""


def test_a_good_program_passes_silently(tmp_path: Path) -> None:
    ended, answers, findings = run_program(tmp_path, WRITE)
    assert passed(findings)
    assert messages(findings, "WARN") == ""
    assert answers == [{"class": "normal", "confidence": k / 10} for k in range(3)]
    assert ended.code == 0
    assert ended.peak_mib > 1


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (WRITE.replace("k / 10", "k"), "confidence is 0; it needs to be of type float"),
        (WRITE.replace("k / 10", "True"), "confidence is true; it needs"),
        (WRITE.replace("k / 10", "str(k)"), 'confidence is "0"; it needs'),
        (WRITE.replace("k / 10", "float('nan')"), "confidence is null; it needs"),
        (WRITE.replace("k / 10", "float('inf')"), "confidence is null; it needs"),
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
        (GOOD + "open(path, 'w').write('[' * 100000 + ']' * 100000)", "is nested deeper than Python's json reads"),
        (GOOD + DEEP.format(levels=100_000), "is nested deeper than Python's json reads"),
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
def test_broken_programs_fail(tmp_path: Path, program: str, message: str) -> None:
    _, answers, findings = run_program(tmp_path, program)
    assert message in messages(findings)
    assert answers is None
    assert all(finding.fix for finding in findings if finding.level != "PASS")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (WRITE + "print('UserWarning: chatter', file=sys.stderr)", "1 line(s) on stderr mark the job with a warning"),
        (WRITE + "print('x\\n' * 600)", "only the last 500 are kept"),
        (WRITE + "open(target + '/debug.png', 'w')", "/output also holds debug.png"),
        (WRITE.replace("k / 10", "0.5"), "all confidences are equal"),
        (WRITE.replace("k / 10", "k / 10, 'extra': float('nan')"), "NaN in the answers becomes null"),
        (
            WRITE.replace(
                '"normal", "confidence": k / 10', '"normal" if k else "atypical", "confidence": 0.7 + k / 10'
            ),
            "no threshold explains the classes",
        ),
    ],
)
def test_doubtful_programs_are_warned_of(tmp_path: Path, program: str, message: str) -> None:
    _, answers, findings = run_program(tmp_path, program)
    assert passed(findings)
    assert message in messages(findings, "WARN")
    assert answers


def test_other_keys_may_hold_anything_that_python_reads(tmp_path: Path) -> None:
    _, answers, findings = run_program(tmp_path, GOOD + DEEP.format(levels=100))
    assert passed(findings) and messages(findings, "WARN") == ""
    assert answers and len(answers) == 3


def test_a_hang_gets_term_and_may_end_cleanly(tmp_path: Path) -> None:
    program = "import signal, time; signal.signal(15, lambda *_: print('got TERM') or exit(0)); time.sleep(60)"
    ended, answers, findings = run_program(tmp_path, program, seconds=5)
    assert "Time limit exceeded" in messages(findings)
    assert answers is None
    assert (ended.code, ended.stdout) == (0, b"got TERM\n")  # not killed


def test_a_hang_that_ignores_term_is_killed_with_its_children(tmp_path: Path) -> None:
    program = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.fork()); time.sleep(60)"
    ended, _, findings = run_program(tmp_path, program, seconds=5)
    assert "Time limit exceeded" in messages(findings)
    assert ended.code == -9
    assert ended.seconds >= 10
    for pid in (int(line) for line in ended.stdout.split() if line != b"0"):
        state = Path(f"/proc/{pid}/stat")  # gone, or a zombie until its new parent looks
        assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_child_that_keeps_stdout_open_is_found(tmp_path: Path) -> None:
    program = WRITE + "import subprocess; subprocess.Popen(['sleep', '30'])"
    _, _, findings = run_program(tmp_path, program, seconds=5)
    assert "kept stdout or stderr open" in messages(findings)
