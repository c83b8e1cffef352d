"""`python -m inference slides --dicom`: annotations of a DICOM slide, as highdicom reads them back."""

from __future__ import annotations

import shutil
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest

from inference import __version__
from inference.checksums import ensemble_id
from inference.errors import UserError
from inference.manifest import load_manifest
from inference.slides import dicom
from test.support import detection_files as files
from test.support import slide_formats
from test.support.commands import rows_of
from test.support.commands import slides as run
from test.support.pyramids import FIGURES, halves

PLACES = [(x + 0.25, float(y)) for x, y in FIGURES]


@pytest.fixture(scope="module")
def level(drawn, tmp_path_factory) -> Path:
    return slide_formats.dicom(tmp_path_factory.mktemp("dicom") / "slide.dcm", drawn)


def add_level(folder: Path, level: Path, drawn: np.ndarray) -> None:
    """A smaller level of the same series beside it, as slides have, whose name comes first."""
    small, base = pydicom.dcmread(slide_formats.dicom(folder / "0.dcm", halves(drawn))), pydicom.dcmread(level)
    small.SeriesInstanceUID, small.FrameOfReferenceUID = base.SeriesInstanceUID, base.FrameOfReferenceUID
    small.StudyInstanceUID = base.StudyInstanceUID
    small.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED"]
    small.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [0.0005, 0.0005]
    small.save_as(folder / "0.dcm")


def test_points_and_measurements_are_read_back(level, drawn, miniature, tmp_path) -> None:
    shutil.copy(level, tmp_path / "slide.dcm")
    add_level(tmp_path, level, drawn)
    detections, manifest = files.qupath(tmp_path / "a.geojson", PLACES), load_manifest(miniature)
    out, table = tmp_path / "out" / "mitoses.dcm", tmp_path / "out.csv"
    out.parent.mkdir()
    for slide in ("slide.dcm", "0.dcm"):  # whichever of its files is named: points belong to the full resolution
        command = [detections, "--slide", tmp_path / slide, "--dicom", out, "--csv", table]
        assert run(miniature, *command) == 0
        found, image = hd.ann.annread(out), pydicom.dcmread(level)
        [reference] = found.ReferencedImageSequence
        assert reference.ReferencedSOPInstanceUID == image.SOPInstanceUID
        assert (found.StudyInstanceUID, found.SOPClassUID.name) == (
            image.StudyInstanceUID,
            "Microscopy Bulk Simple Annotations Storage",
        )
        assert (found.AnnotationCoordinateType, found.PixelOriginInterpretation) == ("2D", "VOLUME")
        seen = {}
        for group in found.get_annotation_groups():
            points = np.array(group.get_graphic_data("2D"))[:, 0]
            names, values, units = group.get_measurements()
            assert [name.meaning for name in names] == ["P(atypical)", "Spread of P(atypical) over folds"]
            assert {unit.scheme_designator for unit in units} == {"UCUM"}
            kind = group.annotated_property_type
            assert (kind.scheme_designator, group.annotated_property_category.scheme_designator) == (
                "99MIDOGLORA",
                "SCT",
            )
            algorithm = group.algorithm_identification
            assert (algorithm.version, algorithm.parameters["ensemble"]) == (__version__, ensemble_id(manifest))
            seen |= {
                tuple(point): (kind.value, *row) for point, row in zip(points.tolist(), values.tolist(), strict=True)
            }
        rows = rows_of(table)
        assert list(map(tuple, sorted(seen))) == sorted((float(row["x"]), float(row["y"])) for row in rows)
        for row in rows:
            kind, p, spread = seen[float(row["x"]), float(row["y"])]
            assert kind == row["class"]
            assert (p, spread) == pytest.approx((float(row["p_atypical"]), float(row["spread"])), abs=1e-6)


def test_several_slides_get_a_file_each_and_one_without_figures_none(drawn, miniature, tmp_path, capsys) -> None:
    for name in "ab":
        slide_formats.dicom(tmp_path / name / f"{name}.dcm", drawn)
    inputs = [tmp_path / name / f"{name}.geojson" for name in "ab"]
    for file in inputs:
        files.qupath(file, PLACES)
    out = tmp_path / "out"
    assert run(miniature, *inputs, "--dicom", out) == 0
    names = ["a.dcm.annotations.dcm", "b.dcm.annotations.dcm"]
    assert sorted(file.name for file in out.iterdir()) == names
    files.write_json(inputs[1], {"type": "FeatureCollection", "features": []})
    assert run(miniature, *inputs, "--dicom", out) == 0
    assert [file.name for file in out.iterdir()] == names[:1]
    assert "b.dcm: no annotations" in capsys.readouterr().out
    with pytest.raises(UserError, match="for 2 slides; expected a folder"):
        run(miniature, *inputs, "--dicom", tmp_path / "one.dcm")


def test_what_is_no_dicom_slide_is_refused_before_anything_is_computed(level, slide, miniature, tmp_path) -> None:
    detections = files.qupath(tmp_path / "a.geojson", PLACES)
    with pytest.raises(UserError, match=r"case 1\.tif is no DICOM file; expected a DICOM slide for --dicom"):
        run(miniature, detections, "--slide", slide, "--dicom", tmp_path / "out.dcm")
    for name in ("slide.dcm", "copy.dcm"):
        shutil.copy(level, tmp_path / name)
    with pytest.raises(UserError, match=r"has 2 files of the full resolution of slide\.dcm; expected one"):
        run(miniature, detections, "--slide", tmp_path / "slide.dcm", "--dicom", tmp_path / "out.dcm")


def test_dicom_of_somebody_else_is_kept(level, miniature, tmp_path) -> None:
    detections, out = files.qupath(tmp_path / "a.geojson", PLACES), tmp_path / "out.dcm"
    command = [detections, "--slide", level, "--dicom", out]
    assert run(miniature, *command) == 0 and run(miniature, *command) == 0
    other = pydicom.dcmread(out)
    other.Manufacturer = "somebody else"
    other.save_as(out)
    before = out.read_bytes()
    with pytest.raises(UserError, match="holds something else"):
        run(miniature, *command)
    assert out.read_bytes() == before


@pytest.mark.filterwarnings("ignore:Invalid value:UserWarning")
@pytest.mark.parametrize(
    "tag, value", [("PatientSex", "W"), ("StudyDate", "2020.13.45"), ("FrameOfReferenceUID", None)]
)
def test_a_header_that_annotations_cannot_have_is_named_before_anything_is_computed(
    tag, value, level, miniature, tmp_path
) -> None:
    image, slide = pydicom.dcmread(level), tmp_path / "slide.dcm"
    if value is None:
        delattr(image, tag)
    else:
        setattr(image, tag, value)
    image.save_as(slide)
    command = [files.qupath(tmp_path / "a.geojson", PLACES), "--slide", slide, "--csv", tmp_path / "out.csv"]
    with pytest.raises(UserError, match=r"/slide\.dcm has a header that annotations cannot refer to"):
        run(miniature, *command, "--dicom", tmp_path / "out.dcm")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.geojson", "slide.dcm"]


def test_a_slide_is_named_by_its_folder_and_may_share_one_with_results(level, miniature, tmp_path, capsys) -> None:
    (tmp_path / "case").mkdir()
    shutil.copy(level, tmp_path / "case")
    table, out = tmp_path / "t.csv", tmp_path / "out"
    table.write_text("slide,x,y\n" + "".join(f"{slide},{x},{y}\n" for slide in ("case", "gone") for x, y in PLACES))
    assert run(miniature, table, "--dicom", out, "--output", out) == 3
    assert sorted(file.name for file in out.iterdir()) == ["case.annotations.dcm", "case.geojson"]
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("not scored")]
    assert line.endswith(
        "gone (3 detections): cannot be opened (No such file or directory); expected a slide; check the path"
    )


def test_of_other_slides_in_the_folder_only_the_series_is_read(drawn, tmp_path, monkeypatch) -> None:
    slides = [slide_formats.dicom(tmp_path / f"{n}.dcm", drawn[:256, :256]) for n in range(3)]
    whole: list[Path] = []
    header = dicom.header

    def counted(file: Path, *tags: str) -> pydicom.Dataset:
        whole.extend([file] * (not tags))
        return header(file, *tags)

    monkeypatch.setattr(dicom, "header", counted)
    for slide in slides:
        dicom.base_level(slide)
    assert whole == slides
