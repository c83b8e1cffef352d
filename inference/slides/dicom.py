"""The objects of a DICOM slide as DICOM: Microscopy Bulk Simple Annotations (PS3.3 A.87; Supplement 222), by highdicom.

Two groups of points, atypical and normal, in pixels of the slide's base level from its corner, as x and y everywhere
here: (0, 0) is the outer corner of the first pixel. Each has P(atypical) and the folds' spread. The categories are
coded by SNOMED CT (of DICOM's context group 7150); for mitotic figures and for P(atypical) DICOM's context groups have
no code, so these are in a private scheme, CODES. Each file is a new instance: two files never have the same UIDs.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import __version__
from ..checksums import ensemble_id
from ..errors import UserError
from ..files import write_whole
from ..manifest import Manifest
from .pyramid import file_of, open_slide
from .qupath import CLASSES
from .slide_work import Scored

if TYPE_CHECKING:
    from highdicom.ann import AnnotationGroup
    from pydicom import Dataset

CODES = "99MIDOGLORA"  # names of private schemes begin with 99
MAKER = "midog-lora"
SUFFIX = (".dcm",)
PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex")
STUDY = ("AccessionNumber", "StudyID", "StudyDate", "StudyTime")
SERIES = 9000  # its number in the study, behind the images'


def base_level(file: Path) -> Dataset:
    """The header of a DICOM slide's full resolution. UserError where `file` is none, or that cannot be told.

    As OpenSlide does, looks at all files of the folder that belong to the same series.
    """
    from pydicom.misc import is_dicom
    from pydicom.uid import VLWholeSlideMicroscopyImageStorage

    if not is_dicom(file):
        raise UserError(f"{file} is no DICOM file; expected a DICOM slide for --dicom; leave --dicom out for it")
    own = series(file)
    levels = [
        dataset
        for other in sorted(file.parent.iterdir())
        if other.is_file() and is_dicom(other) and series(other) == own  # a folder may hold many slides
        if (dataset := header(other)).get("SOPClassUID") == VLWholeSlideMicroscopyImageStorage
        and "VOLUME" in dataset.get("ImageType", ())
    ]
    largest = max((area(dataset) for dataset in levels), default=0)
    base_levels = [dataset for dataset in levels if area(dataset) == largest]
    if len(base_levels) != 1:
        raise UserError(
            f"{file.parent} has {len(base_levels)} files of the full resolution of {file.name}; expected one; copy the "
            "slide's files into a folder of their own"
        )
    return base_levels[0]


def series(file: Path) -> str | None:
    """UserError where the header is damaged."""
    uid: str | None = header(file, "SeriesInstanceUID").get("SeriesInstanceUID")
    return uid


def header(file: Path, *tags: str) -> Dataset:
    """All but the pixels, or `tags` alone. UserError where it is damaged."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    try:
        return dcmread(file, stop_before_pixels=True, specific_tags=list(tags) or None)
    except (InvalidDicomError, OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({error!s:.100}); expected DICOM; copy it again") from None


def area(dataset: Dataset) -> int:
    return int(dataset.get("TotalPixelMatrixColumns", 0)) * int(dataset.get("TotalPixelMatrixRows", 0))


def is_ours(file: Path) -> bool:
    """Whether annotations of this command. OSError where it cannot be read."""
    from pydicom.misc import is_dicom
    from pydicom.uid import MicroscopyBulkSimpleAnnotationsStorage

    if not is_dicom(file):
        return False
    try:
        dataset = header(file)
    except UserError:
        return False
    kind, maker = dataset.get("SOPClassUID"), dataset.get("Manufacturer")
    return bool(kind == MicroscopyBulkSimpleAnnotationsStorage and maker == MAKER)


def annotations_file(output: Path, slide: Path) -> Path:
    """`output` itself, or the slide's file in it where it is a folder."""
    return output if output.suffix.lower() in SUFFIX else output / f"{slide.name}.annotations.dcm"


def check(slide: Path, manifest: Manifest) -> None:
    """UserError where a slide cannot have annotations. One that cannot be opened is for the run to report."""
    try:
        file = file_of(slide)
        open_slide(file)
    except UserError:
        return
    encoded(base_level(file), [], manifest)


def write(output: Path, scored: Scored, manifest: Manifest) -> Path | None:
    """One slide's objects; returns the file, or None without objects: DICOM has no empty annotations.

    UserError where the slide is not what it was; OSError where the file cannot be written.
    """
    file = annotations_file(output, scored.slide.file)
    groups = annotation_groups(scored, manifest)
    if not groups:
        file.unlink(missing_ok=True)  # of an earlier run, which had some
        return None
    image = base_level(scored.slide.opens)
    size = image.TotalPixelMatrixColumns, image.TotalPixelMatrixRows
    if size != scored.slide.size:
        raise UserError(f"{scored.slide.file} has {size} pixels by its header; expected {scored.slide.size}; check it")
    content = encoded(image, groups, manifest)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, content)
    return file


def encoded(image: Dataset, groups: Sequence[AnnotationGroup], manifest: Manifest) -> bytes:
    """A file of annotations. image: `base_level` of the slide. UserError where its header has no place in them."""
    import highdicom as hd

    for name in (*PATIENT, *STUDY):  # must be there, and may be empty; slides that were anonymised lack some
        if name not in image:
            setattr(image, name, None)
    content = BytesIO()
    try:
        hd.ann.MicroscopyBulkSimpleAnnotations(
            source_images=[image],
            annotation_coordinate_type=hd.ann.AnnotationCoordinateTypeValues.SCOORD,
            annotation_groups=groups,
            series_instance_uid=hd.UID(),
            series_number=SERIES,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer=MAKER,
            manufacturer_model_name=manifest.name,
            software_versions=__version__,
            device_serial_number=ensemble_id(manifest),
            content_description="Mitotic figures, atypical and normal",
            content_label="MITOSES",
        ).save_as(content)
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # the header's values are copied, and checked
        raise UserError(
            f"{image.filename} has a header that annotations cannot refer to ({error!s:.100}); expected DICOM's "
            "attributes and values; correct it, or leave --dicom out"
        ) from None
    return content.getvalue()


def annotation_groups(scored: Scored, manifest: Manifest) -> Sequence[AnnotationGroup]:
    """Those of the two groups that have objects."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    algorithm = hd.AlgorithmIdentificationSequence(
        name=MAKER,
        family=codes.DCM.ArtificialIntelligence,
        version=__version__,
        parameters={"ensemble": ensemble_id(manifest), "threshold": f"{manifest.threshold:g}"},
    )
    p = np.array([answer.p_atypical for answer in scored.answers])
    spread = np.array([answer.spread for answer in scored.answers])
    places = np.array(scored.places, np.float32).reshape(-1, 1, 2)  # as viewers expect it: 0.004 pixels at 100,000
    kinds = ("normal", codes.SCT.AnatomicalStructure), ("atypical", codes.SCT.MorphologicallyAbnormalStructure)
    groups: list[AnnotationGroup] = []
    for kind, (name, category) in enumerate(kinds):
        chosen = np.flatnonzero((p >= manifest.threshold) == kind)
        if not len(chosen):
            continue
        label, colour = CLASSES[kind]
        measured = (("p_atypical", "P(atypical)", p), ("spread", "Spread of P(atypical) over folds", spread))
        groups.append(
            hd.ann.AnnotationGroup(
                number=len(groups) + 1,
                uid=hd.UID(),
                label=label,
                annotated_property_category=category,
                annotated_property_type=hd.sr.CodedConcept(name, CODES, f"{name.capitalize()} mitotic figure"),
                graphic_type=hd.ann.GraphicTypeValues.POINT,
                graphic_data=list(places[chosen]),
                algorithm_type=hd.ann.AnnotationGroupGenerationTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
                measurements=[
                    hd.ann.Measurements(
                        hd.sr.CodedConcept(code, CODES, meaning), values[chosen].astype(np.float32), codes.UCUM.NoUnits
                    )
                    for code, meaning, values in measured
                ],
                display_color=hd.color.CIELabColor.from_rgb(*colour),
            )
        )
    return groups
