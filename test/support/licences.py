"""Lists the licence of every locked package, with all of them installed.

    python -m test.support.licences > docs/licences.md

The licence is what the installed package itself declares: License-Expression, a classifier, License, or else the first
line of its licence file.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCKS = {
    "requirements/job.txt": "In the image",
    "requirements.txt": "For training and the harness, in addition",
    "requirements/bases.txt": "For base weights, in addition",
    "requirements/ray.txt": "For a cluster, in addition",
    "requirements/slides.txt": "For whole slides, in addition",
    "requirements/dev.txt": "For tests, in addition",
}
# copyleft that would extend to code that uses the package, and terms that exclude uses; the lesser licences do neither
REFUSED = re.compile(r"\b(?<!L)A?GPL|GNU (?!Lesser).*General Public|non-?commercial|CC-BY-NC|SSPL|BUSL", re.IGNORECASE)


def locked(lock: Path) -> dict[str, str]:
    """Name to version of a requirements file; every line of it must pin one version with hashes."""
    pins = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==(\S+) \\\n    --hash=sha256:", lock.read_text(), re.MULTILINE)
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith((" ", "#"))]
    if len(pins) != len(lines):
        raise ValueError(f"{lock.name} holds {len(lines)} requirements, {len(pins)} of them pinned and hashed")
    return dict(pins)


def licence(name: str) -> str:
    """What the installed package declares; "not installed" where it is not."""
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return "not installed"
    found = package.metadata
    classifiers = [
        value.rsplit(" :: ", 1)[-1] for value in found.get_all("Classifier", []) if value.startswith("License")
    ]
    text = " ".join((found.get("License") or "").split())
    for value in (found.get("License-Expression"), ", ".join(c for c in classifiers if c != "OSI Approved"), text):
        if value and value.upper() != "UNKNOWN":
            return value if len(value) <= 100 else f"{value[:60].rstrip()} ..."
    for file in package.files or ():
        if file.name.upper().startswith("LICEN") and ".dist-info" in str(file):
            return f"{next(filter(None, map(str.strip, file.read_text().splitlines())))} (its {file.name})"
    return "not declared"


def table() -> str:
    parts = [
        "# Licences of all dependencies",
        "Made by `python -m test.support.licences > docs/licences.md`; a test compares it. Each package's own words.",
        "Not listed: `requirements/shim.txt`, the platform's software, which only `run_local.sh --shim` installs.",
        "",
    ]
    known: dict[str, str] = {}
    for lock, title in LOCKS.items():
        packages = {name: version for name, version in locked(ROOT / lock).items() if known.get(name) != version}
        known |= packages
        parts += [f"## {title} (`{lock}`)", "| package | version | licence |", "|---|---|---|"]
        parts += [f"| {name} | {version} | {licence(name).replace('|', '/')} |" for name, version in packages.items()]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
