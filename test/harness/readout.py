"""What the platform makes of a finished job: exit code, log rules, the read-out of the JSON, the evaluator's checks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from inference.checks import Check, passed
from inference.phase import PHASE
from test.harness.engines import Run
from test.harness.layout import ANSWER

LINE_BYTES = 64 * 1024
LOG_LINES = 500
ERROR_CHARS = 1024


def judge(run: Run, pages: int) -> tuple[list[dict[str, Any]] | None, list[Check]]:
    """Judges one job as the platform and then the evaluator do.

    Args:
        run: how the job ended.
        pages: crops in its stack; the evaluator expects as many answers.
    Returns: the answers as the evaluator sees them (None when it gets none), and what was found.
    """
    findings = judge_end(run)
    findings += judge_logs(run.stdout, run.stderr if passed(findings) else b"")  # else it is reported already
    if not passed(findings):
        return None, findings
    answers, found = read_answers(run.output, pages)
    return answers, findings + found


def judge_end(run: Run) -> list[Check]:
    """Exit code and time, mapped to the message that the platform shows."""
    if run.timed_out:
        fix = "stay far below the limit; set --time-limit to your phase's"
        how = run.error or "TERM, then KILL"
        return [Check("FAIL", f"Time limit exceeded after {run.seconds:.0f} s: {how}", fix)]
    if run.oom or run.code == 137:
        return [Check("FAIL", "The job was killed as it exceeded its memory limit", "load and batch less at a time")]
    if run.code is None or (run.code == 0 and run.error):
        return [Check("FAIL", f"The platform ended the job: {run.error}", "see the message")]
    if run.code != 0:
        message = last_line(run)
        fix = "see stderr.log in the output folder"
        if "MemoryError" in message or "bad_alloc" in message:
            fix = "stay below 15 GiB of data memory"
        return [Check("FAIL", f"The job ended with exit code {run.code}: {message}", fix)]
    findings = [Check("PASS", f"exit code 0 after {run.seconds:.1f} s, peak memory {run.peak_mib / 1024:.2f} GiB")]
    if run.streams_held:
        message = "a child process kept stdout or stderr open after the end: on the platform the job hangs"
        findings.append(Check("FAIL", message, "end worker processes before the program ends"))
    return findings


def last_line(run: Run) -> str:
    """What the platform shows of a job that failed: the last line of stderr that is not empty."""
    lines = run.stderr.decode(errors="replace").splitlines() if run.reported is None else run.reported
    lines = [line for line in lines if line.strip()]
    return lines[-1].strip()[:ERROR_CHARS] if lines else "no errors were reported in the logs"


def judge_logs(stdout: bytes, stderr: bytes) -> list[Check]:
    """The rules for log lines: valid UTF-8, at most 64 KiB, the last 500 are kept, and nothing on stderr."""
    findings = []
    for name, log in (("stdout", stdout), ("stderr", stderr)):
        lines = log.split(b"\n")[: -1 if log.endswith(b"\n") else None]
        dropped = [line for line in lines if len(line) > LINE_BYTES]
        kept = [line.replace(b"\0", b"") for line in lines if len(line) <= LINE_BYTES]
        if dropped:
            longest = max(map(len, dropped))
            message = f"{name}: {len(dropped)} line(s) over 64 KiB are dropped, the longest has {longest} bytes"
            findings.append(Check("FAIL", message, "print lines; a progress bar that uses \\r is one long line"))
        try:
            b"\n".join(kept).decode("utf-8")
        except UnicodeDecodeError as error:
            message = f"{name} is not valid UTF-8 (byte {error.start}): the platform's reader fails and the job with it"
            findings.append(Check("FAIL", message, "set PYTHONUTF8=1 and print no raw bytes"))
        if len(lines) > LOG_LINES:
            message = f"{name} has {len(lines)} lines: only the last {LOG_LINES} are kept"
            findings.append(Check("WARN", message, "print less"))
    if stderr.strip():
        first = stderr.strip().splitlines()[0].decode(errors="replace")[:200]
        message = f"{len(stderr.splitlines())} line(s) on stderr mark the job with a warning; the first: {first}"
        findings.append(Check("WARN", message, "log to stdout, silence library warnings"))
    return findings


def read_answers(output: Path, pages: int) -> tuple[list[dict[str, Any]] | None, list[Check]]:
    """Reads the answer file as the platform does (bytes to UTF-8, no BOM, NaN to null, re-serialised) and checks it."""
    path = output / ANSWER
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in output.glob("*"))) or "nothing"
        message = f"Output file '{ANSWER}' was not produced; /output holds {there}"
        return None, [Check("FAIL", message, "write it at the top of /output")]
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return None, [Check("FAIL", f"'{ANSWER}' is not UTF-8 (byte {error.start})", "write it as UTF-8")]
    if text.startswith("\ufeff"):
        return None, [Check("FAIL", f"'{ANSWER}' is not valid json: it starts with a BOM", "write it as plain UTF-8")]
    odd: list[str] = []
    try:
        value = json.loads(text, parse_constant=odd.append)  # NaN and Infinity become null on the platform
    except ValueError as error:
        return None, [Check("FAIL", f"'{ANSWER}' is not valid json: {error}", "write it with json.dumps")]
    except RecursionError:
        message = f"'{ANSWER}' is nested deeper than Python's json reads, here and on the platform"
        return None, [Check("FAIL", message, "write flat values, or leave other keys out")]
    findings = check_answers(value, pages)
    if odd:
        # only a warning by itself: null as a class or a confidence is refused above, and elsewhere nobody reads it
        message = f"{', '.join(sorted(set(odd)))} in the answers becomes null on the platform"
        findings.insert(0, Check("WARN", message, "never write a number that is not finite"))
    extra = sorted(str(file.relative_to(output)) for file in output.rglob("*") if file.is_file() and file != path)
    if extra:
        message = f"/output also holds {', '.join(extra[:3])}: uploaded and ignored"
        findings.append(Check("WARN", message, "write nothing else there"))
    if not passed(findings):
        return None, findings
    return value, [*findings, Check("PASS", f"{pages} answers in the form that the evaluator accepts")]


def check_answers(value: object, pages: int) -> list[Check]:
    """The evaluator's checks in its order, then ours: range, the meaning of the confidence, answers that never vary."""
    if not isinstance(value, list):
        return [
            Check("FAIL", f"the answer is a {type(value).__name__}, expected a list", "write a list, one answer a page")
        ]
    if len(value) != pages:
        message = f"Results length does not match GT length: {len(value)} answers for {pages} pages"
        return [Check("FAIL", message, "answer every page once, in page order")]
    for page, answer in enumerate(value):
        if not isinstance(answer, dict):
            return [Check("FAIL", f"page {page}: Output format is wrong. Needs list of dictionaries", "see the README")]
        if "class" not in answer or "confidence" not in answer:
            return [Check("FAIL", f'page {page}: lacks "class" or "confidence"', "write both for every page")]
        if answer["class"] not in PHASE.classes:
            message = (
                f'page {page}: class is {answer["class"]!r}; expected "{PHASE.classes[0]}" or "{PHASE.classes[1]}"'
            )
            return [Check("FAIL", message, "write the exact word")]
        if not isinstance(answer["confidence"], float):
            message = f"page {page}: confidence is {json.dumps(answer['confidence'])}; it needs to be of type float"
            return [Check("FAIL", message, "write float(p): 1 is refused, 1.0 is not")]
        if not (math.isfinite(answer["confidence"]) and 0 <= answer["confidence"] <= 1):
            message = f"page {page}: confidence is {answer['confidence']}, outside [0, 1]"
            return [Check("FAIL", message, f"write P({PHASE.positive})")]
    findings = []
    positive = [answer["confidence"] for answer in value if answer["class"] == PHASE.positive]
    negative = [answer["confidence"] for answer in value if answer["class"] != PHASE.positive]
    if positive and negative and max(negative) > min(positive):
        other = next(word for word in PHASE.classes if word != PHASE.positive)
        message = (
            f"a page called {other} has confidence {max(negative):.3f}, one called {PHASE.positive} {min(positive):.3f}"
        )
        fix = f"confidence is P({PHASE.positive}) for every page, not the score of the predicted class"
        findings.append(Check("WARN", f"{message}: no threshold explains the classes", fix))
    if pages > 1 and len({answer["confidence"] for answer in value}) == 1:
        findings.append(Check("WARN", "all confidences are equal", "check that the pages reach the model"))
    return findings
