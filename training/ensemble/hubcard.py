"""The hub's part of an ensemble's card: the front matter of its README.md, made from its manifest and nothing else.

`python -m training hubcard ENSEMBLE...` writes it again; the text below it stays. `export` does the same.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from inference.errors import UserError
from inference.files import write_whole
from inference.manifest import FILE, TTA_VIEWS, Manifest, Member, load_manifest

from ..data.layouts import LAYOUTS

CARD = "README.md"
STAMP = re.compile(r"<!-- text of the weights [0-9a-f]{16} -->\n?")
FRONT_MATTER = re.compile(r"\A---\n.*?^---\n", re.DOTALL | re.MULTILINE)
TAGS = ["lora", "pathology", "histopathology", "mitosis", "atypical-mitotic-figures", "midog"]
ON_THE_HUB = {  # the hub's name, and ours in `out_of_fold` of the provenance
    "balanced_accuracy": ("balanced_accuracy", "balanced accuracy"),
    "auc": ("roc_auc", "AUC"),
    "sensitivity": ("recall", "sensitivity"),
    "specificity": ("specificity", "specificity"),
}


@dataclass(frozen=True)
class Terms:
    """What a base's licence means for adapters that were trained on it.

    identifier: the licence's on the hub
    text: the file in the ensemble's folder that must hold the licence itself, if required
    forbidden: why the adapters may not be passed on, if so
    """

    identifier: str = "other"
    text: str | None = None
    forbidden: str = ""


TERMS = {
    "Apache-2.0": Terms("apache-2.0"),
    "DINOv3 License": Terms(text="LICENSE.md"),
    "CC-BY-NC-ND-4.0": Terms(
        "cc-by-nc-nd-4.0", forbidden="it allows no changed versions to be passed on, and a trained adapter may be one"
    ),
}


def base_model(member: Member) -> str:
    """The hub's name of the adapted weights, or the backbone's own name if they are from another place.

    A copy on the hub that may be the same is not claimed to be the one used.
    """
    source = str(member.licence.get("base_source", ""))
    return source.removeprefix("hf-hub:") if source.startswith("hf-hub:") else member.backbone


def data_sets(manifest: Manifest) -> list[str]:
    """Names of the published data sets that were trained on."""
    members = manifest.provenance.get("members", {}).values()
    names = [name for member in members for name in member.get("data", {}).get("sets", {})]
    return [name for name in dict.fromkeys(names) if name in published()]


def published() -> set[str]:
    """Names of the published data sets; a table of one's own is named after its file."""
    return {layout.name.split(" (")[0] for layout in LAYOUTS}


def scores_of(manifest: Manifest) -> dict[str, Any]:
    """Scores out of fold, or those of a calibration on held-out crops, which takes their place; {} without either."""
    calibration = manifest.provenance.get("calibration", {})
    found: dict[str, Any] = calibration if "auc" in calibration else manifest.provenance.get("out_of_fold", {})
    return found


def licence(manifest: Manifest) -> dict[str, Any]:
    """The ensemble's licence as hub cards name it: Apache-2.0 if bases and adapters have it, else theirs."""
    parts = [member.licence.get(part, "not known") for member in manifest.members for part in ("base", "adapters")]
    names = sorted({str(part) for part in parts} - {"Apache-2.0"}) or ["Apache-2.0"]
    terms = TERMS.get(names[0], Terms()) if len(names) == 1 else Terms()
    if terms.identifier != "other":
        return {"license": terms.identifier}
    slug = re.sub(r"[^a-z0-9.]+", "-", " and ".join(names).lower())
    return {"license": "other", "license_name": slug, "license_link": terms.text}


def split_name(scores: dict[str, Any]) -> str:
    """What the scores are, for the hub: nested or not, and by which split."""
    if scores.get("of"):
        return f"{scores['of']}, cross-fitted by slides"
    kind = scores.get("split", {}).get("split")
    words = ["out of fold", *(["nested"] if scores.get("nested") else []), *([f"{kind} split"] if kind else [])]
    if kind == "random":
        words.append("slides on both sides")
    return ", ".join(words)


def metadata(folder: Path) -> ModelCardData:
    """The hub's metadata of the ensemble in `folder`. UserError where it has no valid manifest."""
    manifest = load_manifest(folder, with_bases=False)
    scores, sets = scores_of(manifest), data_sets(manifest)
    judged = [name for name in scores.get("data", {}).get("sets", {}) if name in published()] or sets
    names = " + ".join(judged) or "its own data"
    common: dict[str, Any] = {
        "task_type": "image-classification",
        "task_name": "atypical or normal mitotic figure",
        "dataset_type": "+".join(judged) or "own",
        "dataset_name": f"{names}: {scores.get('crops', 0):,} crops, {scores.get('atypical', 0):,} of them atypical",
        "dataset_split": split_name(scores),
    }
    results = [
        EvalResult(**common, metric_type=kind, metric_name=name, metric_value=round(scores[key], 4))
        for key, (kind, name) in ON_THE_HUB.items()
        if key in scores
    ]
    return ModelCardData(
        base_model=list(dict.fromkeys(map(base_model, manifest.members))),
        base_model_relation="adapter",
        library_name="peft",
        **licence(manifest),
        pipeline_tag="image-classification",
        datasets=sets or None,
        tags=TAGS,
        metrics=[result.metric_type for result in results] or None,
        model_name=manifest.name,
        eval_results=results or None,
    )


def front_matter(folder: Path) -> str:
    return f"---\n{metadata(folder).to_yaml()}\n---\n"


def stamp(folder: Path) -> str:
    """The line that ties a card's text to the weights and the rule that it describes."""
    manifest = load_manifest(folder, with_bases=False)
    rule = [manifest.averaging, manifest.temperature, manifest.threshold]
    parts = [*manifest.files.values(), *manifest.bases.values(), *map(str, rule)]
    return f"<!-- text of the weights {hashlib.sha256(' '.join(parts).encode()).hexdigest()[:16]} -->"


def write_card(folder: Path, text: str | None = None, read_again: bool = False) -> None:
    """Write `folder`/README.md: the front matter, then `text`, or else the card's present text, or else a plain one.

    read_again: somebody has compared the present text with the weights, so that it gets their stamp
    """
    file = folder / CARD
    if text is None and file.exists():
        text = FRONT_MATTER.sub("", file.read_text("utf-8"))
        if not read_again:
            write_whole(file, front_matter(folder) + text)
            return
    text = STAMP.sub("", plain(folder) if text is None else text).rstrip()
    write_whole(file, f"{front_matter(folder)}{text}\n\n{stamp(folder)}\n")


def check_card(folder: Path) -> None:
    """UserError unless front matter and text of the card in `folder` are those of its manifest."""
    text = (folder / CARD).read_text("utf-8")
    if not text.startswith(front_matter(folder)):
        raise UserError(
            f"the front matter of {folder / CARD} does not match {FILE}; expected what {FILE} gives; write it with "
            f"'python -m training hubcard {folder}'"
        )
    if stamp(folder) not in text:
        raise UserError(
            f"the text of {folder / CARD} is not known to be of these weights; expected the line that says so; read "
            f"it, correct it, then run 'python -m training hubcard --read-again {folder}'"
        )


def plain(folder: Path) -> str:
    """A card's text for an ensemble that nobody has described yet."""
    manifest = load_manifest(folder, with_bases=False)
    lines = [f"# {manifest.name}", "", "Atypical (1) against normal (0) mitotic figures, by adapters (LoRA) on:", ""]
    lines += ["| backbone | folds | views | input | base |", "|---|--:|--:|---|---|"]
    for member in manifest.members:
        crop = member.preprocess["crop"]
        seen = f"central {crop} px" if crop else "the whole crop"
        base = f"{member.licence.get('base_source', 'not known')}, {member.licence.get('base', 'not known')}"
        lines.append(
            f"| {member.backbone} | {len(member.folds)} | {TTA_VIEWS[member.tta]} | {seen}, resized to "
            f"{member.preprocess['size']} px | {base} |"
        )
    for member in manifest.members:
        if member.head:
            lines += [
                "",
                f"{member.name} has more than a linear layer as its head: {', '.join(map(str, member.head))}.",
            ]
    scores = scores_of(manifest)
    values = ", ".join(f"{name} {scores[key]:.4f}" for key, (_, name) in ON_THE_HUB.items() if key in scores)
    rule = f"mean {manifest.averaging}, temperature {manifest.temperature}, threshold {manifest.threshold}"
    lines += ["", f"Answer: {rule}.", *([f"Scores ({split_name(scores)}): {values}."] if values else [])]
    lines += ["", "`ensemble.json` has the rest: hashes, recipe, data, versions. Not a medical device.", ""]
    return "\n".join(lines)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="ENSEMBLE")
    help_ = "the text was read again and is of these weights: publish asks for that"
    parser.add_argument("--read-again", action="store_true", help=help_)


def run(options: argparse.Namespace) -> None:
    for folder in options.folders:
        write_card(folder, read_again=options.read_again)
        print(f"{folder / CARD}: front matter as {FILE} gives it")
