"""Every published layout, merged; what is broken or missing is an error that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.errors import UserError
from inference.imageio.stack import read_stack
from test.support.tables import tiny_table, write_crop, write_csv
from training.__main__ import main
from training.data.atnorm import DOMAINS, GROUPS, PUBLISHED, domain_of, group_of, groups_near
from training.data.crop import Crop
from training.data.source import check_names
from training.data.table import describe, load_data, load_set, same_data, table_hash

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "ami-br"
AMI_HEADER = (
    "slide,dataset,uid,x,y,expert1_label,expert2_label,expert1_atypical,expert2_atypical,expert3_atypical,"
    "majority_atypical"
)
MIDOG_HEADER = "image_id,filename,coordinateX,coordinateY,Tumor,Scanner,Origin,Species,expert1,expert2,expert3,majority"
AMI_ROWS = [
    ("002.tiff", "MIDOG21", 6, "False False True", "False"),
    ("060.tiff", "MIDOG21", 7, "True True False", "True"),
    ("101.tiff", "MIDOG21", 8, "False False False", "False"),
    ("30_x.tif", "TUPAC16", 9, "True True True", "True"),
]


def ami_br_split(folder: Path) -> Path:
    rows = []
    for slide, dataset, uid, votes, majority in AMI_ROWS:
        label = "Atypical" if majority == "True" else "Normal"
        write_crop(folder / label / f"{dataset}_{uid}.png", uid)
        rows.append([slide, dataset, uid, 0, 0, "", "", *votes.split(), majority, label, f"{dataset}_{uid}.png"])
    write_csv(folder / "amibr_train_split.csv", f"{AMI_HEADER},final_label,dataset_uid", rows)
    return folder


def midog25(folder: Path) -> Path:
    rows = [
        ["1.png", "002.tiff", 0, 0, "human breast cancer", "Hammamatsu XR", "", "human", "NMF", "NMF", "", "NMF"],
        ["2.png", "003.tiff", 0, 0, "human breast cancer", "Hamamatsu XR", "", "human", "AMF", "NMF", "AMF", "AMF"],
        [
            "3.png",
            "245.tiff",
            0,
            0,
            "canine lymphoma",
            "3D Histech",
            "VMU Vienna",
            "canine",
            "AMF",
            "AMF",
            "NMF",
            "NMF",
        ],
    ]
    for row in rows:
        write_crop(folder / "MIDOG25_Binary_Classification_Train_Set" / str(row[0]), int(str(row[0])[0]))
    write_csv(folder / "MIDOG25_Atypical_Classification_Train_Set.csv", MIDOG_HEADER, rows)
    return folder


def test_ami_br_in_the_benchmarks_layout(tmp_path):
    crops = load_set(ami_br_split(tmp_path)).crops
    assert [crop.label for crop in crops] == [0, 1, 0, 1]
    assert [crop.domain.split(" x ")[1] for crop in crops] == [
        "Hamamatsu XR",
        "Hamamatsu S360",
        "Aperio CS2",
        "Leica SCN400",
    ]
    assert crops[0].votes == (0, 0, 1)
    assert crops[0].group == "MIDOG21/002.tiff"
    assert crops[0].name == "AMi-Br/MIDOG21_6.png"


def test_ami_brs_own_layout_leaves_out_and_counts_figures_without_a_crop(tmp_path):
    rows = [
        [slide, dataset, uid, 0, 0, "", "", *votes.split(), majority]
        for slide, dataset, uid, votes, majority in AMI_ROWS
    ]
    write_csv(tmp_path / "AMI-BR.csv", AMI_HEADER, rows)
    for _, dataset, uid, _, majority in AMI_ROWS[:3]:
        write_crop(tmp_path / "patches" / ("atypical" if majority == "True" else "normal") / f"{dataset}_{uid}.png")
    layout, crops, notes = load_set(tmp_path)
    assert layout.name == "AMi-Br"
    assert len(crops) == 3
    assert any("1 of 4 rows have no crop" in note for note in notes)


def test_midog25_has_one_spelling_per_scanner_and_reports_outvoted_labels(tmp_path):
    _, crops, notes = load_set(midog25(tmp_path))
    assert {crop.domain for crop in crops[:2]} == {"human breast cancer x Hamamatsu XR"}
    assert crops[0].votes == (0, 0)
    assert crops[2].label == 0  # as published, though two of three experts say otherwise
    assert any("1 published labels differ from the majority" in note for note in notes)


def test_merging_counts_the_figures_of_midog25_that_are_ami_brs_once(tmp_path):
    lines: list[str] = []
    crops = load_data([ami_br_split(tmp_path / "a"), midog25(tmp_path / "m")], lines.append)
    assert len(crops) == 4 + 3 - 1  # 002.tiff is in both; 003.tiff is not in this AMi-Br table
    assert any("1 breast figures of MIDOG25 are AMi-Br's" in line for line in lines)
    assert any("1 breast figures" in line and "they stay in" in line for line in lines)
    assert load_data([tmp_path / "m", tmp_path / "a"], lines.append).__len__() == 6  # in either order


def test_omg_octo_keeps_mitotic_figures_and_groups_by_slide(tmp_path):
    write_crop(tmp_path / "any" / "0ab_x1_y2_3_4_5_6.png", side=30)
    write_crop(tmp_path / "any" / "0cd_x1_y2_3_4_5_6.png", side=36)
    write_csv(
        tmp_path / "labels.csv",
        "image_file,label",
        [["0ab_x1_y2_3_4_5_6.png", "AMF"], ["0cd_x1_y2_3_4_5_6.png", "MF"], ["0ef_x.png", "artefact"]],
    )
    _, crops, notes = load_set(tmp_path)
    assert [(crop.label, crop.group) for crop in crops] == [(1, "OMG-Octo/0ab"), (0, "OMG-Octo/0cd")]
    assert any("1 rows are neither" in note for note in notes)


ATNORM_HEADER = "Filename,Expert_1,Expert_2,Expert_3,Expert_4,Expert_5,Majority"


def test_atnorm_md_has_five_votes_and_inferred_slides(tmp_path):
    folder = tmp_path / "AtNorM-MD"
    write_crop(folder / "Atypical" / "40.png", 1)
    for number in (41, 45, 46, 60, 1563, 1564):
        write_crop(folder / "Normal" / f"{number}.png", number)
    normal = [[f"{number}.png", *["Normal"] * 6] for number in (41, 45, 46, 60, 1563, 1564)]
    rows = [["40.png", *["Atypical"] * 3, *["Normal"] * 2, "Atypical"], *normal]
    write_csv(folder / "AtNorM-MD_expert_votes.csv", ATNORM_HEADER, rows)
    _, crops, notes = load_set(folder)
    by_number = {int(crop.path.stem): crop for crop in crops}
    assert by_number[40].votes == (1, 1, 1, 0, 0)
    assert [by_number[n].group.split("/")[1] for n in (40, 45, 46, 1563, 1564)] == [
        "1-45",
        "1-45",
        "46-69",
        "1533-1563",
        "1564-2107",
    ]
    assert [by_number[n].domain.split(" (")[0] for n in (45, 1563)] == ["AtNorM-MD 1 to 437", "AtNorM-MD 1168 to 1563"]
    assert by_number[1564].domain == "AtNorM-MD 1564 to 2107 (not segmented)"
    assert [by_number[n].beside for n in (40, 41, 45, 46, 60)] == [
        (),
        ("AtNorM-MD/46-69",),
        ("AtNorM-MD/46-69",),
        ("AtNorM-MD/1-45",),
        (),
    ]
    assert any("inferred" in note for note in notes) and any("held-out test set" in note for note in notes)
    write_csv(folder / "AtNorM-MD_expert_votes.csv", ATNORM_HEADER, [[*rows[0][:-1], "Normal"], *normal])
    with pytest.raises(UserError, match="folder and its votes to agree"):
        load_set(folder)
    (folder / "AtNorM-MD_expert_votes.csv").unlink()
    layout, crops, _ = load_set(folder.rename(tmp_path / "AtNorM-Br"))
    assert layout.name == "AtNorM-Br" and {crop.group for crop in crops} == {"AtNorM-Br"}


def test_the_inferred_slides_of_atnorm_md_are_whole_within_domains():
    numbers = range(1, PUBLISHED + 1)
    assert set(DOMAINS) < set(GROUPS) and list(GROUPS) == sorted(set(GROUPS))
    for group in {group_of(n) for n in numbers}:
        assert len({domain_of(n) for n in numbers if group_of(n) == group}) == 1
    assert len({group_of(n) for n in numbers}) == 30
    for n in numbers:  # a crop is doubtful exactly within five of a cut
        cuts = [cut for cut in GROUPS if cut - 5 < n <= cut + 5]
        assert (len(groups_near(n)) > 1) == bool(cuts)


def test_blanks_do_not_make_another_slide(tmp_path):
    """They did: one slide was on both sides of a split, and the check for leaks passed."""
    table = tiny_table(tmp_path, 12, 4, 8)
    table.write_text(table.read_text().replace("slide1,", "slide1 ,", 1).replace(",tumour", ", tumour"))
    crops = load_data([table], lambda line: None)
    assert {crop.group for crop in crops} == {"slide0", "slide1", "slide2", "slide3"}
    assert not any(crop.domain.startswith(" ") for crop in crops)


@pytest.mark.parametrize("other", ["Slide1", "slide 1", "SLIDE\u00a01", "\uff53lide1"])
def test_slides_that_differ_in_nothing_but_blanks_or_capitals_are_named(tmp_path, other):
    table = tiny_table(tmp_path, 12, 4, 8)
    table.write_text(table.read_text().replace("slide1,", f"{other},", 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"groups '.*' and '.*' differ in nothing but blanks or capital letters"):
        load_data([table], lambda line: None)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a 1", "b2", "c"]), st.sampled_from(["", " ", "\t"]), st.booleans()), min_size=6
    )
)
def test_however_slides_are_spelt_none_is_on_both_sides(rows):
    """Blanks around a name change nothing; a name in capitals beside the same one in small letters is refused."""
    with TemporaryDirectory() as folder:
        lines = [
            [f"{n}.png", n % 2, (name.upper() if capitals else name) + blank, "d"]
            for n, (name, blank, capitals) in enumerate(rows)
        ]
        table = write_csv(Path(folder) / "t.csv", "path,label,group,domain", lines)
        for line in lines:
            (Path(folder) / str(line[0])).touch()
        groups = [crop.group for crop in load_set(table).crops]
    slides = {name for name, _, _ in rows}
    if len({(name, capitals) for name, _, capitals in rows}) > len(slides):
        with pytest.raises(UserError, match="differ in nothing but"):
            check_names(crops_of(groups))
    else:
        check_names(crops_of(groups))
        assert len(set(groups)) == len(slides)


def crops_of(groups: list[str]) -> list[Crop]:
    return [Crop(Path(f"{n}.png"), n % 2, group, "d") for n, group in enumerate(groups)]


@pytest.mark.parametrize("column", ["slide", "case", "patient"])
def test_slides_stand_in_the_column_that_there_is_or_that_is_named(tmp_path, column):
    table = tiny_table(tmp_path, 6, 3, 8)
    table.write_text(table.read_text().replace("group", column, 1))
    if column == "patient":
        with pytest.raises(UserError, match=r"names no slides .* name its column with --group"):
            load_data([table], lambda line: None)
    asked = column if column == "patient" else ""
    crops = load_data([table], lambda line: None, group=asked)
    assert {crop.group for crop in crops} == {"slide0", "slide1", "slide2"}
    with pytest.raises(UserError, match="expected nothing, as --group says"):
        load_data([table], group="nothing")


def test_folders_atypical_and_normal(tmp_path):
    for n in range(6):
        write_crop(tmp_path / "mine" / ("Atypical" if n % 3 == 0 else "normal") / f"case{n % 2}_{n}.png", n)
    with pytest.raises(UserError, match=r"names no slides \(6 of 6 images .* --group .* split=random"):
        load_data([tmp_path / "mine"], lambda line: None)
    crops = load_data([tmp_path / "mine"], lambda line: None, group=r"(.+)_\d+")
    assert sorted((crop.label, crop.group) for crop in crops) == sorted(
        (int(n % 3 == 0), f"case{n % 2}") for n in range(6)
    )
    notes: list[str] = []
    assert len({crop.group for crop in load_data([tmp_path / "mine"], notes.append, ungrouped=True)}) == 6
    assert any("each crop counts as one" in note for note in notes)
    for pattern, message in (("(x.+)_", "does not match"), ("case", "0 pairs"), ("(", "no pattern")):
        with pytest.raises(UserError, match=message):
            load_data([tmp_path / "mine"], lambda line: None, group=pattern)
    for folder in ("Atypical", "normal"):
        for file in list((tmp_path / "mine" / folder).glob("*")):
            (file.parent / file.name[:5]).mkdir(exist_ok=True)
            file.rename(file.parent / file.name[:5] / file.name)
    assert {crop.group for crop in load_data([tmp_path / "mine"], lambda line: None)} == {"case0", "case1"}


def test_group_is_for_data_of_ones_own(tmp_path):
    with pytest.raises(UserError, match="published data sets name their slides"):
        load_data([ami_br_split(tmp_path)], group="slide")


def test_plain_csv_with_votes_and_absolute_paths(tmp_path):
    path = write_crop(tmp_path / "elsewhere" / "b.png")
    write_crop(tmp_path / "t" / "a.png")
    file = write_csv(
        tmp_path / "t" / "mine.csv",
        "path,label,group,domain,votes",
        [["a.png", "AMF", "s1", "x", "1 1 0"], [path, "normal", "s2", "", ""]],
    )
    _, crops, _ = load_set(file)
    assert [(crop.label, crop.domain, crop.votes) for crop in crops] == [(1, "x", (1, 1, 0)), (0, "unknown", ())]
    assert [crop.name for crop in crops] == ["mine/a.png", "mine/b.png"]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ami-br", "AMi-Br_Benchmark"),
        ("MIDOG25", "zenodo.16044804"),
        ("omg_octo", "zenodo.16107743"),
        ("AtNorM-MD", "AMi-Br_Benchmark"),
        ("mine", "training datasets"),
    ],
)
def test_a_missing_data_set_says_where_it_is_published(tmp_path, name, source):
    with pytest.raises(UserError, match=source):
        load_data([tmp_path / name])


def test_broken_tables_are_errors(tmp_path):
    table = tiny_table(tmp_path, 6, 3, 8)
    (tmp_path / "crops" / "3.png").unlink()
    with pytest.raises(UserError, match=r"1 of 6 crops .* are missing \(first: .*3.png\)"):
        load_data([table])
    write_crop(tmp_path / "crops" / "3.png")
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, lines[1].replace(",1,", ",0,")]))
    with pytest.raises(UserError, match="listed as label 1"):
        load_data([table], lambda line: None)
    table.write_text("\n".join([*lines, lines[1]]))
    notes: list[str] = []
    assert len(load_data([table], notes.append)) == 6
    assert any("1 rows name a file" in note for note in notes)
    table.write_text("\n".join([lines[0], lines[1].replace("slide0", "")]))
    with pytest.raises(UserError, match="line 2: no group"):
        load_data([table])
    table.write_text("\n".join([lines[0], lines[1].replace(",1,", ",maybe,")]))
    with pytest.raises(UserError, match="label is 'maybe'; expected one of"):
        load_data([table])
    table.write_text("image,answer\n")
    with pytest.raises(UserError, match="columns answer, image"):
        load_data([table])


def test_a_crop_in_the_other_classs_folder_is_an_error(tmp_path):
    folder = ami_br_split(tmp_path)
    text = (folder / "amibr_train_split.csv").read_text()
    (folder / "amibr_train_split.csv").write_text(
        text.replace("False,False,False,False,Normal", "True,True,True,True,Atypical")
    )
    (folder / "Normal" / "MIDOG21_8.png").rename(folder / "Atypical" / "MIDOG21_8.png")
    assert sum(crop.label for crop in load_set(folder).crops) == 3
    write_csv(tmp_path / "t.csv", "path,label,group,domain", [["Atypical/MIDOG21_8.png", 0, "g", "d"]])
    with pytest.raises(UserError, match="in the other class's folder"):
        load_data([tmp_path / "t.csv"])


def test_the_hash_and_the_description_do_not_depend_on_the_machine(tmp_path):
    one, two = (load_data([ami_br_split(tmp_path / name)], lambda line: None) for name in ("one", "two"))
    assert describe(one) == describe(two)
    assert str(tmp_path) not in json.dumps(describe(one))
    assert table_hash(one) != table_hash(one[1:])
    write_crop(tmp_path / "two" / "Normal" / "MIDOG21_6.png", 99)
    other = load_data([tmp_path / "two"], lambda line: None)
    assert table_hash(other) == table_hash(one) and not same_data(describe(one), describe(other))
    earlier = {key: value for key, value in describe(one).items() if key != "pixels"}
    assert same_data(earlier, describe(one))  # of a version that did not hash pixels


def test_the_command_lists_and_checks(tmp_path, capsys):
    assert main(["datasets"]) == 0
    assert "10.5281/zenodo.16044804" in capsys.readouterr().out
    table = tiny_table(tmp_path, 6, 3, 8)
    assert main(["datasets", str(table), "--json", str(tmp_path / "out.json")]) == 0
    assert "6 crops, 2 atypical" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["groups"] == 3
    assert main(["datasets", str(tmp_path / "nowhere")]) == 1


def test_two_layouts_of_one_data_set_are_counted_once(tmp_path):
    split = ami_br_split(tmp_path / "split")
    own = tmp_path / "own"
    rows = []
    for slide, dataset, uid, votes, majority in AMI_ROWS:
        label = "Atypical" if majority == "True" else "Normal"
        name = f"{dataset}_{uid}.png"
        (own / "patches").mkdir(parents=True, exist_ok=True)
        (own / "patches" / name).write_bytes((split / label / name).read_bytes())
        rows.append([slide, dataset, uid, 0, 0, "", "", *votes.split(), majority])
    write_csv(own / "AMI-BR.csv", AMI_HEADER, rows)
    lines: list[str] = []
    assert load_data([split, own], lines.append) == load_data([split], lambda line: None)
    assert any("4 crops have the pixels of another and are counted once" in line for line in lines)
    rows[0][-1] = "True"  # the same figure, contradicted
    write_csv(own / "AMI-BR.csv", AMI_HEADER, rows)
    with pytest.raises(UserError, match=r"1 crops have the pixels .* label \(first: AMi-Br/MIDOG21_6.png, label 0"):
        load_data([split, own], lambda line: None)


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_no_copy_lies_in_another_fold_whatever_its_name_or_format(tmp_path, ending):
    """Twelve of a set's crops are in another set too, under other names, in slides of other names."""
    from PIL import Image

    table = tiny_table(tmp_path / "a", 24, 8, 16)
    rows = []
    for n in range(12):
        (tmp_path / "b").mkdir(exist_ok=True)
        with Image.open(tmp_path / "a" / "crops" / f"{n}.png") as image:
            image.save(tmp_path / "b" / f"x{n}.{ending}")
        rows.append([f"x{n}.{ending}", int(n % 3 == 0), f"case{n % 3}", "y"])
    other = write_csv(tmp_path / "b" / "other.csv", "path,label,group,domain", rows)
    crops = load_data([table, other], lambda line: None)
    pixels = [read_stack(crop.path)[0].tobytes() for crop in crops]
    assert len(set(pixels)) == len(pixels) == 24


def test_columns_that_a_split_may_go_by(tmp_path):
    ami, midog = load_set(ami_br_split(tmp_path / "a")).crops, load_set(midog25(tmp_path / "m")).crops
    assert {crop.tumour for crop in ami} == {"human breast cancer"}
    assert [crop.origin for crop in ami] == ["UMC Utrecht", "UMC Utrecht", "UMC Utrecht", ""]
    assert (midog[2].tumour, midog[2].scanner, midog[2].origin) == ("canine lymphoma", "3D Histech", "VMU Vienna")
    write_crop(tmp_path / "p" / "a.png")
    header = "path,label,group,domain,tumour,scanner,origin"
    (crop,) = load_set(write_csv(tmp_path / "p" / "mine.csv", header, [["a.png", 1, "g", "d", "t", "s", "o"]])).crops
    assert (crop.domain, crop.tumour, crop.scanner, crop.origin) == ("d", "t", "s", "o")


@pytest.mark.skipif(not REAL.exists(), reason="the AMi-Br training split is not here")
def test_the_real_training_split():
    lines: list[str] = []
    crops = load_data([REAL], lines.append)
    summary = describe(crops)
    assert (summary["crops"], summary["atypical"], summary["groups"], len(summary["domains"])) == (2894, 648, 146, 5)
    assert lines == ["AMi-Br (benchmark split): 2,894 crops, 648 atypical"]
