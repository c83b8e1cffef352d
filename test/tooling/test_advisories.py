"""A package that no service knows is never counted as free of advisories."""

from __future__ import annotations

import pytest

from test.support import advisories

VULNERABLE = {
    "name": "a",
    "version": "1.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}, {"id": "PYSEC-2", "fix_versions": []}],
}
GOOD = {"name": "b", "version": "2.0", "vulns": []}
SKIPPED = {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited: c (3.0)"}


def test_what_was_skipped_is_not_looked_up() -> None:
    known, lines = advisories.judge([VULNERABLE, GOOD, SKIPPED])
    assert known == 2
    assert lines == ["a 1.0: PYSEC-1, fixed in 1.1", "a 1.0: PYSEC-2, fixed in no version"]


@pytest.mark.parametrize(
    ("entries", "code", "said"),
    [
        ([], 0, "not checked: no service reachable (the reason; the reason)"),
        ([SKIPPED], 0, "not checked: no service reachable (the reason; the reason)"),
        ([GOOD, SKIPPED], 0, "0 on 1 of 2 packages\n  not checked: c"),
        ([VULNERABLE], 1, "2 on 1 of 1 packages\n  a 1.0: PYSEC-1"),
    ],
)
def test_the_exit_code_and_the_words(
    entries: list[dict], code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(advisories, "ask", lambda *_: (entries, "the reason"))
    assert advisories.main() == code
    assert said in capsys.readouterr().out
