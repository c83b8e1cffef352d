"""Stacks as the platform's converter may deliver them: .mha by SimpleITK, with the header keys that a source left.

The keys are real: SimpleITK writes a page as DICOM, NIfTI or NRRD, and its reader says which keys it would keep.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK

from inference.imageio.stack import read_stack


class Form(NamedTuple):
    """What the stack was before, by its suffix, and whether its pixels are deflated now."""

    source: str
    compressed: bool


FORMS = [Form(source, compressed) for source in ("dcm", "nii", "nrrd") for compressed in (False, True)]


def write_metaimage(stack: Path, folder: Path, form: Form) -> Path:
    """Writes `stack` as .mha in `form` into `folder`; returns its path. UserError where it cannot be read."""
    pages = np.stack(read_stack(stack))
    image = SimpleITK.GetImageFromArray(pages, isVector=True)
    for key, value in header_keys(pages[0], form.source).items():
        image.SetMetaData(key, value)
    target = folder / f"{stack.stem}-{form.source}{'-deflated' if form.compressed else ''}.mha"
    SimpleITK.WriteImage(image, str(target), useCompression=form.compressed)
    return target


def header_keys(page: np.ndarray, suffix: str) -> dict[str, str]:
    """The keys, with their values, that SimpleITK keeps of a file that holds `page`, (H, W, 3)."""
    with tempfile.TemporaryDirectory(prefix="harness-") as name:
        file = f"{name}/page.{suffix}"
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(page, isVector=True), file)
        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(file)
        reader.LoadPrivateTagsOn()
        reader.ReadImageInformation()
        return {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()}
