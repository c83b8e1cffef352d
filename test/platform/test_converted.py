"""Stacks as SimpleITK writes them, with the header keys of what they were before, are answered as the TIFF is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from inference.imageio.stack import read_stack
from test.harness.__main__ import main
from test.harness.converted import FORMS, Form, header_keys, write_metaimage
from test.support.programs import make_stack

SAMPLE = Path("test/sample/stack_0.tiff")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_as_the_tiff_is(tmp_path: Path, form: Form) -> None:
    copy = write_metaimage(SAMPLE, tmp_path, form)
    assert (b"CompressedData = True" in copy.read_bytes()[:65536]) == form.compressed
    assert np.array_equal(np.stack(read_stack(copy)), np.stack(read_stack(SAMPLE)))


def test_the_keys_are_those_of_the_source() -> None:
    page = np.zeros((8, 8, 3), np.uint8)
    assert "0028|0010" in header_keys(page, "dcm")
    assert "descrip" in header_keys(page, "nii")
    assert any(key.startswith("NRRD") for key in header_keys(page, "nrrd"))


def test_a_local_run_compares_the_answers(tmp_path: Path, miniature: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stack = make_stack(tmp_path / "stack_3.tiff")
    options = ["--engine", "native", "--no-build", "--weights", str(miniature), "--as", "mha"]
    code = main([*options, "--input", str(stack), "--output", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert code == 0, said
    assert said.count(".mha: the answers of stack_3.tiff") == len(FORMS)
