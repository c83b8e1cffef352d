"""Loaders for the published data sets; each turns a data set's own layout into one list of labelled crops.

A layout is recognised by the columns of its CSV, never guessed from images. Broken files raise UserError; oddities of
the published labels are kept and become a note.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from inference.errors import UserError
from inference.labels import parse_label

from .atnorm import atnorm_br, atnorm_md
from .crop import Crop
from .own import from_folders, from_table
from .source import Row, Source, images_below

Loader = Callable[[Source], list[Crop]]


def ami_br_scanner(dataset: str, slide: str) -> str:
    """The scanner of an AMi-Br slide. AMi-Br does not list it; MIDOG21 and TUPAC16 give it by slide number."""
    digits = re.match(r"\d+", slide)
    if digits is None:
        raise UserError(
            f"AMi-Br slide {slide!r} has no number; expected a name such as 002.tiff; take the published CSV"
        )
    number = int(digits[0])
    if dataset == "MIDOG21":
        return ("Hamamatsu XR", "Hamamatsu S360", "Aperio CS2")[min((number - 1) // 50, 2)]
    return "Aperio ScanScope XT" if number <= 23 else "Leica SCN400"


def scanner_name(text: str) -> str:
    """One spelling per scanner: MIDOG25 has both "Hamamatsu XR" and "Hammamatsu XR"."""
    return re.sub(r"\s+", " ", text.strip()).replace("Hammamatsu", "Hamamatsu")


def _ami_br(source: Source, path_of: Callable[[Row], Path | None]) -> list[Crop]:
    crops, without = [], 0
    for row in source.rows:
        path = path_of(row)
        if path is None:
            without += 1
            continue
        votes = tuple(int(row[f"expert{e}_atypical"] == "True") for e in (1, 2, 3))
        scanner, tumour = ami_br_scanner(row["dataset"], row["slide"]), "human breast cancer"
        origin = "" if scanner == "Leica SCN400" else "UMC Utrecht"  # Leica: one of two unnamed centres
        label = parse_label(row.get("final_label") or row["majority_atypical"], str(source.file))
        group, name = f"{row['dataset']}/{row['slide']}", f"AMi-Br/{_ami_br_name(row)}"
        crops.append(Crop(path, label, group, f"{tumour} x {scanner}", votes, name, tumour, scanner, origin))
    if without:
        folder = source.file.parent.name
        source.note(f"AMi-Br: {without} of {len(source.rows)} rows have no crop in {folder}/patches; left out")
    source.note_outvoted("AMi-Br", crops)
    return crops


def _ami_br_name(row: Row) -> str:
    return row.get("dataset_uid") or f"{row['dataset']}_{row['uid']}.png"


def ami_br_split(source: Source) -> list[Crop]:
    """The benchmark's amibr_train_split.csv beside the folders Atypical and Normal."""
    return _ami_br(source, lambda row: source.file.parent / row["final_label"] / row["dataset_uid"])


def ami_br_own(source: Source) -> list[Crop]:
    """AMi-Br's own AMI-BR.csv; crops lie anywhere below `patches`, and only those that the experts agreed on exist."""
    folder = source.file.parent / "patches"
    patches = {path.name: path for path in images_below(folder)}
    crops = _ami_br(source, lambda row: patches.get(_ami_br_name(row)))
    if not crops:
        example = _ami_br_name(source.rows[0]) if source.rows else "MIDOG21_6.png"
        raise UserError(
            f"{folder} holds none of the table's crops; expected names such as {example}; download the data set again"
        )
    return crops


def midog25(source: Source) -> list[Crop]:
    """MIDOG25_Atypical_Classification_Train_Set.csv beside MIDOG25_Binary_Classification_Train_Set/."""
    folder = source.file.parent / "MIDOG25_Binary_Classification_Train_Set"
    crops = []
    for row in source.rows:
        answers = [row.get(f"expert{e}", "") for e in (1, 2, 3)]
        votes = tuple(
            parse_label(answer, str(source.file)) for answer in answers if answer
        )  # the third expert voted only where the first two disagreed
        tumour, scanner, origin = row["Tumor"], scanner_name(row["Scanner"]), row.get("Origin", "")
        image, label, group = row["image_id"], parse_label(row["majority"], str(source.file)), row["filename"]
        domain, name = f"{tumour} x {scanner}", f"MIDOG25/{image}"
        crops.append(Crop(folder / image, label, f"MIDOG25/{group}", domain, votes, name, tumour, scanner, origin))
    source.note_outvoted("MIDOG25", crops)
    return crops


def omg_octo(source: Source) -> list[Crop]:
    """A CSV with image_file and label (AMF, MF; others are not mitotic figures); the slide is the name up to "_"."""
    folder = source.file.parent
    images = {path.name: path for path in images_below(folder)}
    kept = [row for row in source.rows if row["label"].upper() in ("AMF", "MF", "NMF")]
    if len(kept) < len(source.rows):
        source.note(f"OMG-Octo: {len(source.rows) - len(kept)} rows are neither AMF nor MF; left out")
    source.note("OMG-Octo: its table lists no tumours or scanners, so it counts as one domain")
    crops = []
    for row in kept:
        file = Path(row["image_file"]).name
        label, group = parse_label(row["label"], str(source.file)), f"OMG-Octo/{file.split('_')[0]}"
        crops.append(Crop(images.get(file, folder / file), label, group, "OMG-Octo", (), f"OMG-Octo/{file}"))
    return crops


@dataclass(frozen=True)
class Layout:
    """A data set: the columns that identify its CSV, its loader, where it is published, and its files.

    crops, atypical: as published; 0 where that is not known
    """

    name: str
    columns: frozenset[str]
    load: Loader
    source: str
    files: str
    crops: int = 0
    atypical: int = 0


BENCHMARK = "github.com/DeepMicroscopy/AMi-Br_Benchmark (arXiv 2506.21444)"
LAYOUTS = (
    Layout(
        "AMi-Br (benchmark split)",
        frozenset(["dataset_uid", "final_label", "slide"]),
        ami_br_split,
        BENCHMARK,
        "amibr_train_split.csv, Atypical/, Normal/",
        2894,
        648,
    ),
    Layout(
        "AMi-Br",
        frozenset(["uid", "majority_atypical", "slide"]),
        ami_br_own,
        "github.com/DeepMicroscopy/AMi-Br (arXiv 2501.04467)",
        "AMI-BR.csv, patches/",
        3720,
        832,
    ),
    Layout(
        "MIDOG25",
        frozenset(["image_id", "filename", "majority", "Tumor", "Scanner"]),
        midog25,
        "doi.org/10.5281/zenodo.16044804",
        "MIDOG25_Atypical_Classification_Train_Set.csv, MIDOG25_Binary_Classification_Train_Set/",
        11937,
        1748,
    ),
    Layout(
        "OMG-Octo",
        frozenset(["image_file", "label"]),
        omg_octo,
        "doi.org/10.5281/zenodo.16107743",
        "a CSV with image_file and label, and the crops",
        1757,
        1378,
    ),
    Layout(
        "AtNorM-MD",
        frozenset(["Filename", "Majority"]),
        atnorm_md,
        BENCHMARK,
        "AtNorM-MD_expert_votes.csv, Atypical/, Normal/",
        2107,
        219,
    ),
    Layout("AtNorM-Br", frozenset(), atnorm_br, BENCHMARK, "Atypical/ and Normal/, called AtNorM-Br", 746, 128),
    Layout(
        "your own table",
        frozenset(["path", "label"]),
        from_table,
        "your own",
        "a CSV with path, label, group (or slide, case, or --group), domain; optionally votes, tumour, scanner, origin",
    ),
    Layout(
        "your own folders",
        frozenset(),
        from_folders,
        "your own",
        "Atypical/ and Normal/; slides are folders in them, or the part of a file name that --group matches",
    ),
)
