"""`training import`: folds that another program trained become an ensemble folder, if it answers as they do.

A source is one fold: a folder of `PeftModel.save_pretrained`, or a checkpoint of a training program. The folder is
written only when the logits of every fold are those of its own library (timm or `transformers`, with PEFT).
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inference.adapters import open_safetensors
from inference.backbones import BACKBONES, Backbone, lookup
from inference.checksums import sha256
from inference.ensemble import Ensemble
from inference.errors import UserError
from inference.manifest import MAX_FOLDS, POSITIONS, load_manifest
from inference.preprocess import Preprocess

from ..ensemble.folder import add_options, beside, check_findable, check_name, hand_over
from ..ensemble.hubcard import write_card
from ..ensemble.members import UNMEASURED, clean_config, measure_drift, member_entry, versions, write_manifest
from ..ensemble.verify import choose_crops, verdict
from ..fit.averaged import FILES
from . import settings
from .fold import Fold, read_fold
from .fused import write_fold
from .head import Said
from .names import Shapes
from .reference import fold_logits
from .source import check_base, read_source

TOLERANCE = 1e-4  # of logits, relative to the largest where that is above 1


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "sources", type=Path, nargs="+", metavar="SOURCE", help="a fold: PEFT's folder, or a checkpoint; several: folds"
    )
    add("--base", required=True, choices=list(BACKBONES), metavar="BACKBONE", help="what they were trained on")
    help_ = "the number of the class of atypical figures in training; a single logit is that of class 1"
    add("--positive", type=int, choices=(0, 1), required=True, help=help_)
    add_options(parser)
    settings.configure(parser)
    add("--licence", default="not known", help="of the adapters, for manifest and card (default: not known)")
    add("--data", type=Path, metavar="CROPS", help="crops to compare on, better than the generated ones")


def run(options: argparse.Namespace) -> None:
    name = check_name(options)
    if len(options.sources) > MAX_FOLDS:
        raise UserError(f"{len(options.sources)} sources; expected at most {MAX_FOLDS} folds; leave some out")
    base = options.bases / f"{options.base}.safetensors"
    if not base.is_file():
        raise UserError(f"{base} is missing; expected the base weights; run 'python -m training base {options.base}'")
    check_findable(base, options)
    crops, origin = choose_crops(options.data)
    with beside(options.output) as work:
        maker = Maker(work, name, options.base, base, options.positive)
        folds, said = maker.read(options)
        maker.write(folds, said, options.licence)
        worst = maker.compare(folds, said, crops, origin)
        maker.finish(crops if options.data else [], options.device, f"{worst:.1e} on {origin}")
        hand_over(maker.folder, options)
    print(f"PASS\n{options.output}: written, not calibrated")
    print(f"next: python -m training calibrate {options.output} --data CROPS")


@dataclasses.dataclass
class Maker:
    """An ensemble of imported folds, made in the folder `work`. positive: the number of atypical figures' class."""

    work: Path
    name: str
    backbone: str
    base: Path
    positive: int

    def __post_init__(self) -> None:
        stored = open_safetensors(self.base)
        self.shapes: Shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        self.read_base: Callable[[str], torch.Tensor] = stored.get_tensor

    @property
    def folder(self) -> Path:
        return self.work / "ensemble"

    @property
    def row(self) -> Backbone:
        return lookup(self.backbone)

    def read(self, options: argparse.Namespace) -> tuple[list[Fold], dict[str, Any]]:
        """All folds, and the settings that they share."""
        sources = [read_source(path) for path in options.sources]
        if len({source.file.resolve() for source in sources}) < len(sources):
            raise UserError("a source is named twice; expected every fold once; name each")
        said = settings.settings(options, sources[0])
        folds = []
        for source in sources:
            check_base(source, self.backbone)
            own = said if source is sources[0] else settings.settings(options, source)
            if own != said:
                raise UserError(
                    f"{source.folder} and {sources[0].folder} say different settings; expected the same; give options"
                )
            scales = {"lora_alpha": said.get("alpha"), "use_rslora": said.get("use_rslora")}
            of_head = Said(tuple(said.get("activation", ())), said.get("norm_eps"))
            folds.append(read_fold(source, self.read_base, self.shapes, scales, of_head))
            if len(folds[-1].head.parts) > 1:
                print(f"  {source.file}: the head is {folds[-1].head}")
        widths = {fold.head.features for fold in folds}
        width = self.shapes["norm.weight"][0] if self.row.heads else widths.copy().pop()
        wanted = width * len(said["pool"].split("+"))
        if widths != {wanted}:
            found = " and ".join(map(str, sorted(widths)))
            raise UserError(
                f"the head sees {found} features; expected {wanted} with pooling {said['pool']}; give --pool"
            )
        if len({str(fold.head) for fold in folds}) > 1:
            found = " and ".join(sorted({str(fold.head) for fold in folds}))
            raise UserError(f"the folds' heads differ ({found:.300}); expected one shape; import them apart")
        if len({fold.library for fold in folds}) > 1:
            raise UserError("folds of timm and of transformers; expected one library's; import them apart")
        return folds, said

    def write(self, folds: Sequence[Fold], said: dict[str, Any], licence: str) -> None:
        """Write the ensemble with temperature 1 and threshold 0.5, and a link to its base."""
        self.folder.mkdir()
        (self.folder / self.base.name).symlink_to(self.base.resolve())
        entries = []
        for number, fold in enumerate(folds):
            target = self.folder / f"{self.backbone}-fold{number}"
            write_fold(fold, target, self.row, self.shapes, self.read_base, self.positive)
            (target / FILES[1]).chmod(0o644)  # safetensors writes for the owner alone, and an image's user is another
            clean_config(target / FILES[0], self.row.source)
            entries.append({"folder": target.name, "sha256": {file: sha256(target / file) for file in FILES}})
        preprocess = Preprocess(**{field.name: said[field.name] for field in dataclasses.fields(Preprocess)})
        entry = member_entry(self.backbone, said["pool"], self.base, preprocess, licence)
        # transformers resamples DINOv2's and ViT's positions plainly, and those of DINOv2 with registers as timm does
        learned = "pos_embed" in self.shapes and "reg_token" not in self.shapes
        plain = folds[0].library == "transformers" and learned
        entry |= {"folds": entries, "tta": "none", "precision": UNMEASURED}
        entry |= {"positions": POSITIONS[1]} if plain else {}
        layers = [part.layer.entry for part in folds[0].head.one_logit(self.positive)]
        entry |= {"head": layers} if len(layers) > 1 else {}
        self.manifest: dict[str, Any] = {
            "format": 2,
            "name": self.name,
            "members": [{"name": self.backbone, **entry}],
            "weights": [1.0],
            "averaging": "logit",
            "temperature": 1.0,
            "threshold": 0.5,
            "provenance": {
                "imported": [describe(fold) for fold in folds],
                "positive": self.positive,
                "calibration": {"of": "nothing: temperature 1 and threshold 0.5, as the source answers"},
                "versions": versions(),
            },
        }
        write_manifest(self.folder, self.manifest)

    def compare(self, folds: Sequence[Fold], said: dict[str, Any], crops: Sequence[np.ndarray], origin: str) -> float:
        """Print how far each fold's logits are from its library's; returns the most. UserError where it is too far."""
        folds_logits = Ensemble.load(self.folder, "cpu", "fp32").predict(crops).logits[0][:, 0]
        preprocess = Preprocess(**{field.name: said[field.name] for field in dataclasses.fields(Preprocess)})
        print(f"{len(folds)} folds against {folds[0].library} and PEFT, {origin}, fp32")
        worst = 0.0
        for number, (fold, ours) in enumerate(zip(folds, folds_logits, strict=True)):
            work = self.work / f"reference{number}"
            work.mkdir()
            theirs = fold_logits(fold, self.row, self.base, said["pool"], self.positive, crops, preprocess, work)
            shutil.rmtree(work)
            difference, allowed = float(np.abs(ours - theirs).max()), TOLERANCE * max(1.0, float(np.abs(theirs).max()))
            passed = difference <= allowed
            print(
                f"{fold.source.file}: logits differ by at most {difference:.1e}, "
                f"allowed {allowed:.1e}: {verdict(passed)}"
            )
            if not passed:
                raise UserError(
                    f"{fold.source.file}: FAIL, its logits differ by {difference:.1e}, allowed {allowed:.1e}; expected "
                    f"what {fold.library} and PEFT compute; nothing is written; report it with the versions of both"
                )
            worst = max(worst, difference)
        return worst

    def finish(self, crops: Sequence[np.ndarray], device: str, difference: str) -> None:
        """Measure precisions on real crops, if there are any, and write manifest and card."""
        self.manifest["provenance"]["verified"] = f"logits differ from the source library's by at most {difference}"
        if crops:
            [self.manifest["members"][0]["precision"]] = measure_drift(self.folder, crops, device)
        write_manifest(self.folder, self.manifest)
        write_card(self.folder)
        load_manifest(self.folder)


def describe(fold: Fold) -> dict[str, Any]:
    """What the manifest says of a source: its file without this machine's path, its hash, whose layers it adapts."""
    base = fold.settings.get("base_model_name_or_path")
    return {
        "file": f"{fold.source.folder.resolve().name}/{fold.source.file.name}",
        "sha256": sha256(fold.source.file),
        "library": fold.library,
        "base": Path(base).name if isinstance(base, str) and Path(base).is_absolute() else base,
        "logits": fold.head.logits,
        **({"head": str(fold.head)} if len(fold.head.parts) > 1 else {}),
        "ranks": sorted({len(pair.a) for pair in fold.pairs}),
        "dora": any(pair.magnitude is not None for pair in fold.pairs),
    }
