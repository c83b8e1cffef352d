"""Loaders for the published data sets; each turns a data set's own layout into one list of labelled crops.

A layout is recognised by the columns of its CSV, never guessed from images. Broken files raise UserError; oddities of
the published labels are kept and become a line in `notes`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from inference.errors import UserError
from inference.labels import parse_label

IMAGES = (".png", ".tif", ".tiff", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Crop:
    """One labelled image.

    label: atypical = 1, normal = 0; votes: each expert's label
    group: slide or case, which no split may divide; domain: tumour x scanner
    name: data set and file name, the same on every machine
    tumour, scanner, origin: what a split by domain can use; "" where unknown
    """

    path: Path
    label: int
    group: str
    domain: str
    votes: tuple[int, ...] = ()
    name: str = ""
    tumour: str = ""
    scanner: str = ""
    origin: str = ""


Row = dict[str, str]
Loader = Callable[[Path, list[Row], list[str]], list[Crop]]  # (CSV file, its rows, notes to add to) -> crops


def ami_br_scanner(dataset: str, slide: str) -> str:
    """The scanner of an AMi-Br slide. AMi-Br does not list it; MIDOG21 and TUPAC16 give it by slide number."""
    found = re.match(r"\d+", slide)
    if found is None:
        raise UserError(
            f"AMi-Br slide {slide!r} has no number; expected a name such as 002.tiff; take the published CSV"
        )
    number = int(found[0])
    if dataset == "MIDOG21":
        return ("Hamamatsu XR", "Hamamatsu S360", "Aperio CS2")[min((number - 1) // 50, 2)]
    return "Aperio ScanScope XT" if number <= 23 else "Leica SCN400"


def scanner_name(text: str) -> str:
    """One spelling per scanner: MIDOG25 has both "Hamamatsu XR" and "Hammamatsu XR"."""
    return re.sub(r"\s+", " ", text.strip()).replace("Hammamatsu", "Hamamatsu")


def _folder_label(path: Path) -> int | None:
    """The label that a folder named Atypical or Normal implies; None for any other folder."""
    return {"atypical": 1, "normal": 0}.get(path.parent.name.lower())


def check_folders(crops: Iterable[Crop]) -> None:
    wrong = [crop for crop in crops if _folder_label(crop.path) not in (None, crop.label)]
    if wrong:
        raise UserError(
            f"{len(wrong)} crops lie in the other class's folder (first: {wrong[0].path}, label {wrong[0].label}); "
            "expected the table and the folders to agree; download the data set again"
        )


def _count_outvoted(name: str, crops: Iterable[Crop], notes: list[str]) -> None:
    outvoted = sum(bool(crop.votes) and crop.label != (2 * sum(crop.votes) > len(crop.votes)) for crop in crops)
    if outvoted:
        notes.append(f"{name}: {outvoted} published labels differ from the majority of their votes; labels are kept")


def _ami_br(file: Path, rows: list[Row], notes: list[str], path_of: Callable[[Row], Path | None]) -> list[Crop]:
    crops, without = [], 0
    for row in rows:
        path = path_of(row)
        if path is None:
            without += 1
            continue
        votes = tuple(int(row[f"expert{e}_atypical"] == "True") for e in (1, 2, 3))
        scanner, tumour = ami_br_scanner(row["dataset"], row["slide"]), "human breast cancer"
        origin = "" if scanner == "Leica SCN400" else "UMC Utrecht"  # Leica: one of two unnamed centres
        label = parse_label(row.get("final_label") or row["majority_atypical"], str(file))
        group, name = f"{row['dataset']}/{row['slide']}", f"AMi-Br/{_ami_br_name(row)}"
        crops.append(Crop(path, label, group, f"{tumour} x {scanner}", votes, name, tumour, scanner, origin))
    if without:
        notes.append(f"AMi-Br: {without} of {len(rows)} rows have no crop in {file.parent.name}/patches; left out")
    _count_outvoted("AMi-Br", crops, notes)
    return crops


def _ami_br_name(row: Row) -> str:
    return row.get("dataset_uid") or f"{row['dataset']}_{row['uid']}.png"


def ami_br_split(file: Path, rows: list[Row], notes: list[str]) -> list[Crop]:
    """The benchmark's amibr_train_split.csv beside the folders Atypical and Normal."""
    return _ami_br(file, rows, notes, lambda row: file.parent / row["final_label"] / row["dataset_uid"])


def ami_br_own(file: Path, rows: list[Row], notes: list[str]) -> list[Crop]:
    """AMi-Br's own AMI-BR.csv; crops lie anywhere below `patches`, and only those that the experts agreed on exist."""
    patches = {path.name: path for path in (file.parent / "patches").rglob("*") if path.suffix.lower() in IMAGES}
    crops = _ami_br(file, rows, notes, lambda row: patches.get(_ami_br_name(row)))
    if not crops:
        raise UserError(
            f"{file.parent}/patches holds none of the crops; expected names such as {_ami_br_name(rows[0])}"
        )
    return crops


def midog25(file: Path, rows: list[Row], notes: list[str]) -> list[Crop]:
    """MIDOG25_Atypical_Classification_Train_Set.csv beside MIDOG25_Binary_Classification_Train_Set/."""
    folder = file.parent / "MIDOG25_Binary_Classification_Train_Set"
    crops = []
    for row in rows:
        answers = [row.get(f"expert{e}", "").strip() for e in (1, 2, 3)]
        votes = tuple(
            parse_label(answer, str(file)) for answer in answers if answer
        )  # the third expert voted only where the first two disagreed
        tumour, scanner, origin = row["Tumor"].strip(), scanner_name(row["Scanner"]), row.get("Origin", "").strip()
        image, label, group = row["image_id"], parse_label(row["majority"], str(file)), f"MIDOG25/{row['filename']}"
        domain, name = f"{tumour} x {scanner}", f"MIDOG25/{image}"
        crops.append(Crop(folder / image, label, group, domain, votes, name, tumour, scanner, origin))
    _count_outvoted("MIDOG25", crops, notes)
    return crops


def omg_octo(file: Path, rows: list[Row], notes: list[str]) -> list[Crop]:
    """A CSV with image_file and label (AMF, MF; others are not mitotic figures); the slide is the name up to "_"."""
    images = {path.name: path for path in file.parent.rglob("*") if path.suffix.lower() in IMAGES}
    kept = [row for row in rows if row["label"].strip().upper() in ("AMF", "MF", "NMF")]
    if len(kept) < len(rows):
        notes.append(f"OMG-Octo: {len(rows) - len(kept)} rows are neither AMF nor MF; left out")
    notes.append("OMG-Octo: its table lists no tumours or scanners, so it counts as one domain")
    return [
        Crop(
            images.get(name, file.parent / name),
            parse_label(row["label"], str(file)),
            f"OMG-Octo/{name.split('_')[0]}",
            "OMG-Octo",
            (),
            f"OMG-Octo/{name}",
        )
        for row in kept
        for name in [Path(row["image_file"]).name]
    ]


def atnorm(file: Path, rows: list[Row], notes: list[str]) -> list[Crop]:
    """AtNorM-Br or AtNorM-MD: folders Atypical and Normal; -MD also has five votes in AtNorM-MD_expert_votes.csv.

    file: the CSV of votes, or the folder if there is none. Slides are not named, so all crops form one group: any other
    grouping could put one slide on both sides of a split.
    """
    folder = file if file.is_dir() else file.parent
    name, domain = ("AtNorM-MD", "MIDOG++ (mixed)") if rows else ("AtNorM-Br", "human breast cancer x TCGA (mixed)")
    votes = {row["Filename"].strip(): row for row in rows}
    crops = []
    for path in sorted(
        p for kind in ("Atypical", "Normal") for p in (folder / kind).glob("*") if p.suffix.lower() in IMAGES
    ):
        label, row = int(path.parent.name == "Atypical"), votes.pop(path.name, None)
        answers = tuple(parse_label(row[f"Expert_{e}"], str(file)) for e in range(1, 6)) if row else ()
        if row and parse_label(row["Majority"], str(file)) != label:
            raise UserError(f"{path} is {row['Majority']} in {file.name}; expected its folder and its votes to agree")
        crops.append(Crop(path, label, name, domain, answers, f"{name}/{path.parent.name}/{path.name}"))
    if votes:
        raise UserError(
            f"{file} names {len(votes)} crops that do not exist (first: {next(iter(votes))}); download it again"
        )
    notes.append(f"{name}: its slides are not published, so it is one group and stays in one fold")
    notes.append(
        f"{name}: a held-out test set of arXiv 2506.21444; a model trained on it cannot be compared with that paper"
    )
    return crops


def plain(file: Path, rows: list[Row], notes: list[str]) -> list[Crop]:
    """A CSV with path, label, group and domain, and optionally votes ("1 0 1"), tumour, scanner and origin.

    Paths are relative to the CSV's folder.
    """
    crops = []
    for number, row in enumerate(rows, 2):
        where = f"{file}, line {number}"
        votes = tuple(parse_label(vote, where) for vote in re.split(r"[\s;|]+", row.get("votes") or "") if vote)
        if not row["group"]:
            raise UserError(f"{where}: no group; expected its slide or case, needed to check a split for leaks; add it")
        path = Path(row["path"])
        name = f"{file.stem}/{path.name if path.is_absolute() else path.as_posix()}"
        label, domain = parse_label(row["label"], where), row["domain"] or "unknown"
        columns = (row.get(column, "").strip() for column in ("tumour", "scanner", "origin"))
        crops.append(Crop(file.parent / path, label, row["group"], domain, votes, name, *columns))
    _count_outvoted(file.name, crops, notes)
    return crops


@dataclass(frozen=True)
class Layout:
    """A data set: the columns that identify its CSV, its loader, and where to get it."""

    name: str
    columns: frozenset[str]
    load: Loader
    place: str
    files: str
    crops: int = 0  # as published; 0 where that is not known
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
        atnorm,
        BENCHMARK,
        "AtNorM-MD_expert_votes.csv, Atypical/, Normal/",
        2107,
        219,
    ),
    Layout("AtNorM-Br", frozenset(), atnorm, BENCHMARK, "Atypical/ and Normal/ in a folder called AtNorM-Br", 746, 128),
    Layout(
        "plain CSV",
        frozenset(["path", "label", "group", "domain"]),
        plain,
        "your own",
        "a CSV with path, label, group, domain; optionally votes, tumour, scanner, origin",
    ),
)
