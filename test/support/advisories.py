"""Asks pip-audit for published advisories on every locked package: `python -m test.support.advisories`.

pip-audit succeeds even if a service knows none of the packages, as behind a mirror of PyPI. So its answer is read here:
packages that were not looked up are counted and named, and count as not checked.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from test.support.licences import LOCKS, ROOT

SERVICES = ("pypi", "osv")
SECONDS = 120


def ask(service: str, lock: str) -> tuple[list[dict[str, Any]], str]:
    """pip-audit's entries for the packages of `lock`, or none and the reason."""
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "-r", str(ROOT / lock)]
    command += ["--vulnerability-service", service, "--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return [], f"{service}: no answer in {SECONDS} s"
    try:
        return list(json.loads(done.stdout)["dependencies"]), f"{service} knows none of the packages"
    except (ValueError, KeyError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [], f"{service}: {last[:100]}"


def judge(entries: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """How many packages were looked up, and one line for each advisory."""
    known = [entry for entry in entries if "vulns" in entry]
    lines = [
        f"{entry['name']} {entry['version']}: {found['id']}, "
        f"fixed in {', '.join(found['fix_versions']) or 'no version'}"
        for entry in known
        for found in entry["vulns"]
    ]
    return len(known), lines


def main() -> int:
    """1 where there is an advisory. Where nothing was looked up it says so, and returns 0."""
    code = 0
    for lock in (*LOCKS, "requirements/shim.txt"):
        asked = [ask(service, lock) for service in SERVICES]
        answers = [entries for entries, _ in asked if judge(entries)[0]]
        if not answers:
            print(f"advisories, {lock}: not checked: no service reachable ({'; '.join(why for _, why in asked)})")
            continue
        known, lines = judge(answers[0])
        print(f"advisories, {lock}: {len(lines)} on {known} of {len(answers[0])} packages")
        for line in lines:
            print(f"  {line}")
        for entry in answers[0]:
            if "vulns" not in entry:
                print(f"  not checked: {entry['name']}")
        code = code or int(bool(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
