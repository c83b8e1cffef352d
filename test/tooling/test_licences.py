"""Every dependency is pinned, hashed and listed with its licence, and none has terms that this project cannot take."""

from __future__ import annotations

import pytest

from test.support.licences import LOCKS, REFUSED, ROOT, licence, locked, table

PACKAGES = sorted({name for lock in LOCKS for name in locked(ROOT / lock)})


def test_the_list_is_up_to_date() -> None:
    made = table()
    if "not installed" in made:
        pytest.skip("not all packages are installed here")
    assert (ROOT / "docs/licences.md").read_text() == made, "run: python -m test.support.licences > docs/licences.md"


def test_no_licence_is_refused_or_unknown() -> None:
    found = {name: licence(name) for name in PACKAGES}
    assert not {name: text for name, text in found.items() if REFUSED.search(text)}
    assert not [name for name, text in found.items() if text == "not declared"]
    for text in (
        "GPL-3.0",
        "AGPL-3.0-only",
        "GNU General Public License v2",
        "GNU Affero General Public",
        "CC-BY-NC-4.0",
    ):
        assert REFUSED.search(text)
    for text in ("LGPL-2.1", "GNU Lesser General Public License v3 (LGPLv3)", "MIT"):
        assert not REFUSED.search(text)


def test_the_locks_agree_and_are_hashed() -> None:
    job, train, bases, ray, slides, dev = (locked(ROOT / lock) for lock in LOCKS)
    for extra in (train, ray, slides):
        assert job.items() <= extra.items() <= dev.items()
    together = {**bases, **dev, **job}  # a base is made with what is installed for the job, for training or for tests
    assert all(together[name] == version for name, version in bases.items())
    assert "--require-hashes" in (ROOT / "Dockerfile").read_text()
    assert not {"peft", "onnx", "ray", "atheris", "pytest", "opencv-python-headless"} & job.keys()
