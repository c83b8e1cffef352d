"""The recipes as files: each loads, says whose every value is, and runs from crops to answers on a small backbone."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from inference.backbones import lookup
from inference.ensemble import Ensemble
from inference.errors import UserError
from inference.manifest import load_manifest
from inference.preprocess import to_batch
from test.support import miniature
from test.support.tables import tiny_table
from training.__main__ import main
from training.augment.strengths import Augment
from training.data.crop import Crop
from training.data.splits import KINDS
from training.data.table import load_data
from training.fit.command import fit, make_accelerator, settle_precision
from training.fit.feed import Feed, epoch_order, generator, load_crops
from training.fit.loop import Training
from training.fit.recipe import FOLDER, Recipe, load_recipe

FILES = sorted(FOLDER.glob("*.toml"))
SIDES = ((64, 64), (128, 128), (31, 47), (200, 90), (65, 300), (257, 256))
MARKS = ("[paper]", "[code]", "[ours]", "[v1]", "[count]", "not used")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_fits_its_backbone(file):
    recipe = load_recipe(file.stem)
    assert recipe == load_recipe(str(file))
    assert recipe.targets in lookup(recipe.backbone).targets
    assert recipe.split in KINDS
    preprocess = recipe.preprocess()
    assert preprocess.kernel in ("bilinear", "bicubic")
    if not recipe.backbone.startswith("efficientnet"):
        assert preprocess.size % (14 if "14" in lookup(recipe.backbone).timm else 16) == 0


PAPERS = [file for file in FILES if file.stem not in ("default", "lite0")]


@pytest.mark.parametrize("file", PAPERS, ids=lambda file: file.stem)
def test_a_papers_recipe_gives_every_value_and_says_whose_it_is(file):
    table = tomllib.loads(file.read_text())
    assert table.keys() == {field.name for field in dataclasses.fields(Recipe)}
    assert table["augment"].keys() == {field.name for field in dataclasses.fields(Augment)}
    lines = file.read_text().split("[augment]")
    unmarked = [
        line for line in lines[0].splitlines() if re.match(r"\w+ =", line) and not any(m in line for m in MARKS)
    ]
    assert not unmarked
    if "[ours]" not in lines[1].splitlines()[0]:  # the table's own line may speak for all of it
        unmarked = [line for line in lines[1].splitlines() if "=" in line and not any(m in line for m in MARKS)]
        assert not unmarked


def test_what_the_papers_state_is_there():
    virchow = load_recipe("virchow-r8")
    assert (virchow.backbone, virchow.rank, virchow.folds) == ("virchow", 8, 3)
    dino = load_recipe("dinov3-hplus-domain-focal")
    assert (dino.backbone, dino.rank, dino.targets, dino.domain_weighting) == (
        "dinov3-vith16plus",
        8,
        "qv",
        "sqrt_inverse",
    )
    assert dino.gamma > 0


def test_changes_and_mistakes(tmp_path):
    assert load_recipe("default", ["augment.hed=0.25", "rank=2", "rslora=true"]).augment.hed == 0.25
    for change, message in (
        ("rankk=2", "rankk is not a setting"),
        ("augment.hedd=1", "augment.hedd is not a setting"),
        ("rank=two", "rank = 'two'; .* integer"),
        ("rank=0", "rank = '0'; .* greater than or equal to 1"),
        ("sampling=often", "sampling = 'often'; .* 'shuffle', 'class' or 'domain'"),
        ("augment.jpeg_p=2", "augment.jpeg_p = '2'; .* less than or equal to 1"),
        ("rslora=maybe", "rslora = 'maybe'; .* boolean"),
    ):
        with pytest.raises(UserError, match=message):
            load_recipe("default", [change])
    with pytest.raises(UserError, match=r"expected a \.toml file or one of default, dinov3-hplus"):
        load_recipe("nothing")
    (tmp_path / "broken.toml").write_text("rank = = 3")
    with pytest.raises(UserError, match="not valid TOML"):
        load_recipe(str(tmp_path / "broken.toml"))


@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_training_sees_what_inference_sees(name):
    """Any mix of crop sizes, and both the recipe's own part of the crop and the documented variant of 64 pixels."""
    off = [
        "augment.dihedral=false",
        *(f"augment.{f.name}=0" for f in dataclasses.fields(Augment) if f.name != "dihedral"),
    ]
    g = np.random.default_rng(0)
    for crop in (load_recipe(name).crop, 64):
        recipe = load_recipe(name, [*off, f"crop={crop}", "batch=6", "sampling=shuffle"])
        preprocess = recipe.preprocess()
        images = [g.integers(0, 256, (*sides, 3), dtype=np.uint8) for sides in SIDES]
        crops = [Crop(Path(str(n)), n % 2, f"g{n}", "d") for n in range(len(images))]
        ((batch,),) = Feed(recipe, crops, images, 0).epoch(0)
        order = epoch_order(crops, "shuffle", generator(recipe.seed, 0, 0)).tolist()
        expected = to_batch([images[n] for n in order], preprocess)
        assert (batch.rgb - expected).abs().max() < 1e-3, crop


@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_every_recipe_runs_from_crops_to_answers(name, tmp_path, monkeypatch):
    """Virchow and DINOv3 at full width, the others small; two blocks, few patches, random bases."""
    recipe = load_recipe(name)
    if name in ("virchow-r8", "dinov3-hplus-domain-focal"):
        monkeypatch.setattr(miniature, "overrides", lambda backbone: dict(depth=2))
    patch = 14 if "14" in lookup(recipe.backbone).timm else 16
    recipe = load_recipe(name, ["epochs=1", "batch=4", "folds=2", f"size={2 * patch}", "crop=24"])
    base = miniature.random_base(recipe.backbone, tmp_path / f"{recipe.backbone}.safetensors")
    crops = load_data([tiny_table(tmp_path, 12, 4)], lambda line: None)
    images = load_crops(crops)
    recipe = settle_precision(recipe, tmp_path)
    accelerator = make_accelerator(recipe)
    run, ensemble = tmp_path / "run", tmp_path / "ensemble"
    fit(Training(recipe, run, crops, images, base, accelerator, overrides=miniature.overrides(recipe.backbone)))
    assert main(["export", str(run), "--output", str(ensemble), "--bases", str(tmp_path), "--include-base"]) == 0
    found = Ensemble.load(ensemble, "cpu", "fp32").predict(images)
    assert found.fold_p.shape == (2, 12)
    assert all(np.isfinite(logits).all() for logits in found.logits)
    assert found.p_atypical.std() > 0
    folds = load_manifest(ensemble).members[0].folds
    assert len(folds) == 2
    assert all((fold / "adapter_model.safetensors").stat().st_size < base.stat().st_size for fold in folds)
