"""Fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ensemble of real architecture with random weights, in two folds. Not to be changed."""
    from test.miniature import make_ensemble

    folder = tmp_path_factory.mktemp("miniature")
    make_ensemble(folder, folds=2)
    return folder
