"""The stack reader: every kind of file is read as stated or refused in one line, in page order, within its bounds."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from inference.errors import UserError
from inference.imageio import stack as stack_module
from inference.imageio.pixels import from_array
from inference.imageio.stack import read_stack
from test.support.image_files import bad_files, good_files, metaimage, stack, with_pillow

GOOD, BAD = good_files(), bad_files()


def read(folder: Path, name: str, content: bytes) -> list[np.ndarray]:
    (folder / name).write_bytes(content)
    return read_stack(folder / name)


@pytest.mark.parametrize("name", GOOD)
def test_reads(name: str, tmp_path: Path) -> None:
    content, expected, tolerance = GOOD[name]
    pages = read(tmp_path, name, content)
    assert all(page.dtype == np.uint8 and page.ndim == 3 and page.shape[2] == 3 for page in pages)
    if name == "pyramid.tiff":  # smaller copies in the main chain are pages too: no page is ever dropped
        assert [page.shape[:2] for page in pages] == [(20, 24), (10, 12), (5, 6)]
        pages, expected = pages[:1], expected[None]
    assert len(pages) == len(expected)
    for page, wanted in zip(pages, expected, strict=True):
        assert page.shape == wanted.shape
        assert np.abs(page.astype(float) - wanted).max() <= tolerance


@pytest.mark.parametrize("name", BAD)
def test_refuses(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content, reason = BAD[name]
    start = time.process_time()
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        read(tmp_path, name, content)
    assert time.process_time() - start < 2
    assert "expected" in str(caught.value) and str(caught.value).count(";") >= 2
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    "name", ["stack.mha", "stack-deflated.MHA", "grey.mha", "rgb16.mha", "rgb16-big-endian.mha", "rgba.mha"]
)
def test_metaimage_is_read_as_itk_does(name: str, tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    file = tmp_path / name.lower()
    file.write_bytes(GOOD[name][0])
    pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    for page, wanted in zip(read_stack(file), pixels, strict=True):
        assert np.array_equal(page, from_array(wanted, "ITK"))


@pytest.mark.parametrize("compressed", [True, False])
def test_metaimage_that_itk_writes(compressed: bool, tmp_path: Path) -> None:
    """Grand Challenge turns other uploads into such files."""
    sitk = pytest.importorskip("SimpleITK")
    sitk.WriteImage(sitk.GetImageFromArray(stack(), isVector=True), str(tmp_path / "x.mha"), compressed)
    assert np.array_equal(np.stack(read_stack(tmp_path / "x.mha")), stack())


@settings(max_examples=200, deadline=None)
@given(order=st.permutations(range(8)), compression=st.sampled_from(["raw", "tiff_lzw", "tiff_adobe_deflate"]))
def test_pages_keep_their_order(order: list[int], compression: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    pages = stack(3, 8)[order]
    content = with_pillow([Image.fromarray(page) for page in pages], compression)
    found = read(tmp_path_factory.getbasetemp(), "order.tiff", content)
    assert np.array_equal(np.stack(found), pages)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "raw"])
def test_one_damaged_page_among_sixteen_fails_the_stack(compression: str, tmp_path: Path) -> None:
    """Never a guess for the page, never fifteen answers: see the reasons in inference/imageio/stack.py."""
    pages = [Image.fromarray(page) for page in stack(4, 16)]
    content = bytearray(with_pillow(pages, compression))
    file = tmp_path / "x.tiff"
    file.write_bytes(content)
    with Image.open(file) as image:
        image.seek(9)
        tags = dict(image.tag_v2)  # type: ignore[attr-defined]
        place = image.tag_v2._offset  # type: ignore[attr-defined]
    if compression == "raw":  # without a checksum only a length can be wrong: halve the strip's
        entry = content.index(b"\x17\x01", place)
        content[entry + 8 : entry + 12] = (tags[279][0] // 2).to_bytes(4, "little")
    else:
        start, count = tags[273][0], tags[279][0]
        content[start + count // 3 : start + 2 * count // 3] = b"\xff" * len(
            content[start + count // 3 : start + 2 * count // 3]
        )
    with pytest.raises(UserError, match="page 9 of"):
        read(tmp_path, "x.tiff", bytes(content))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), name=st.sampled_from([n for n in GOOD if len(GOOD[n][0]) < 20000]))
def test_a_damaged_file_ends_in_pages_or_one_line(
    data: st.DataObject, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(GOOD[name][0])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(1, 8))] = data.draw(st.binary(max_size=8))
    try:
        pages = read(tmp_path_factory.getbasetemp(), name, bytes(content))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert pages and all(page.dtype == np.uint8 and page.shape[2] == 3 for page in pages)


def test_sixteen_bits_keep_the_upper_eight() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    assert from_array(values, "here")[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_an_animation_and_a_second_picture_are_not_pages(tmp_path: Path) -> None:
    images = [Image.fromarray(page) for page in stack()]
    images[0].save(tmp_path / "x.png", save_all=True, append_images=images[1:])
    images[0].save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=images[1:])
    assert len(read_stack(tmp_path / "x.png")) == len(read_stack(tmp_path / "x.jpg")) == 1


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tiff")  # opening it would wait for a writer
    (tmp_path / "y.tiff").mkdir()
    (tmp_path / "z.tiff").symlink_to("/dev/zero")
    for name in ("x.tiff", "z.tiff"):
        with pytest.raises(UserError, match="not a regular file"):
            read_stack(tmp_path / name)
    with pytest.raises(UserError, match=r"^y\.tiff is a folder; expected a stack"):
        read_stack(tmp_path / "y.tiff")
    with pytest.raises(UserError, match="cannot be read"):
        read_stack(tmp_path / "missing.tiff")


def test_a_file_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    for name in ("x.tiff", "x.mha", "x.jpg"):
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(3 << 30)  # sparse
        with pytest.raises(UserError, match="expected a stack of up to"):
            read_stack(tmp_path / name)


def test_the_bounds_on_pages_and_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = with_pillow([Image.fromarray(page) for page in stack()])
    read(tmp_path, "x.tiff", content)
    monkeypatch.setattr(stack_module, "MAX_PAGES", 2)
    for name, file in {"x.tiff": content, "x.mha": metaimage(stack(), 3)}.items():
        with pytest.raises(UserError, match="more than 2 pages"):
            read(tmp_path, name, file)
    monkeypatch.setattr(stack_module, "MAX_PAGES", 3)
    monkeypatch.setattr(stack_module, "MAX_PIXELS", stack()[..., 0].size - 1)
    with pytest.raises(UserError, match="pixels"):
        read(tmp_path, "x.tiff", content)
