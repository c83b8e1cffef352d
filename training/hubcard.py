"""The hub's part of an ensemble's card: the front matter of its README.md, made from its manifest and nothing else.

`python -m training hubcard ENSEMBLE...` writes it again; the text below it stays. `export` and `combine` do the same.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from inference.errors import UserError
from inference.files import write_whole
from inference.manifest import FILE, TTA_VIEWS

from .layouts import LAYOUTS

CARD = "README.md"
FRONT_MATTER = re.compile(r"\A---\n.*?^---\n", re.DOTALL | re.MULTILINE)
TAGS = ["lora", "pathology", "histopathology", "mitosis", "atypical-mitotic-figures", "midog"]
METRICS = {  # the hub's name, and ours in `out_of_fold` of the provenance
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
        "cc-by-nc-nd-4.0",
        forbidden="it allows no changed versions to be passed on, and a trained adapter may be one",
    ),
}


def read(folder: Path) -> dict[str, Any]:
    """The manifest as it is, unchecked: the bases are not needed to describe an ensemble."""
    file = folder / FILE
    try:
        content = json.loads(file.read_bytes())
        members = content.get("members", [content])
        if not all(isinstance(member["licence"], dict) and member["folds"] for member in members):
            raise ValueError("a member without licence or folds")
        return content | {"members": members}
    except FileNotFoundError:
        raise UserError(f"no {FILE} in {folder}; expected an ensemble folder; see weights/default") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no manifest ({error!r}); expected one; export the ensemble again") from None


def base_model(member: dict[str, Any]) -> str:
    """The hub's name of the adapted weights, or the backbone's own name if they are from another place.

    A copy on the hub that may be the same is not claimed to be the one used.
    """
    source = str(member["licence"].get("base_source", ""))
    return source.removeprefix("hf-hub:") if source.startswith("hf-hub:") else str(member["backbone"])


def data_sets(manifest: dict[str, Any]) -> list[str]:
    """Names of the published data sets that were trained on."""
    provenance = manifest.get("provenance", {})
    parts = [provenance, *provenance.get("members", {}).values()]
    found = [name for part in parts for name in part.get("data", {}).get("sets", {})]
    published = {layout.name.split(" (")[0] for layout in LAYOUTS}  # a table of one's own is named after its file
    return [name for name in dict.fromkeys(found) if name in published]


def licence(manifest: dict[str, Any]) -> dict[str, Any]:
    """The ensemble's licence as hub cards name it: Apache-2.0 if bases and adapters have it, else theirs."""
    licences = [member["licence"] for member in manifest["members"]]
    parts = [about.get(part, "not known") for about in licences for part in ("base", "adapters")]
    names = sorted({str(part) for part in parts} - {"Apache-2.0"}) or ["Apache-2.0"]
    terms = TERMS.get(names[0], Terms()) if len(names) == 1 else Terms()
    if terms.identifier != "other":
        return {"license": terms.identifier}
    slug = re.sub(r"[^a-z0-9.]+", "-", " and ".join(names).lower())
    return {"license": "other", "license_name": slug, "license_link": terms.text}


def metadata(folder: Path) -> ModelCardData:
    """The hub's metadata of the ensemble in `folder`. UserError where it has no readable manifest."""
    manifest = read(folder)
    scores, sets = manifest.get("provenance", {}).get("out_of_fold", {}), data_sets(manifest)
    names = " + ".join(sets) or "its own data"
    common: dict[str, Any] = {
        "task_type": "image-classification",
        "task_name": "atypical or normal mitotic figure",
        "dataset_type": "+".join(sets) or "own",
        "dataset_name": f"{names}: {scores.get('crops', 0):,} crops, {scores.get('atypical', 0):,} of them atypical",
        "dataset_split": "out of fold",
    }
    results = [
        EvalResult(**common, metric_type=kind, metric_name=name, metric_value=round(scores[key], 4))
        for key, (kind, name) in METRICS.items()
        if key in scores
    ]
    return ModelCardData(
        base_model=list(dict.fromkeys(map(base_model, manifest["members"]))),
        base_model_relation="adapter",
        library_name="peft",
        **licence(manifest),
        pipeline_tag="image-classification",
        datasets=sets or None,
        tags=TAGS,
        metrics=[result.metric_type for result in results] or None,
        model_name=manifest["name"],
        eval_results=results or None,
    )


def front_matter(folder: Path) -> str:
    return f"---\n{metadata(folder).to_yaml()}\n---\n"


def write_card(folder: Path, text: str | None = None) -> None:
    """Write `folder`/README.md: the front matter, then `text`, or else the card's present text, or else a plain one."""
    file = folder / CARD
    if text is None:
        text = FRONT_MATTER.sub("", file.read_text("utf-8")) if file.exists() else plain(folder)
    write_whole(file, front_matter(folder) + text)


def is_current(folder: Path) -> bool:
    """Whether the card in `folder` begins with the front matter of its manifest."""
    return (folder / CARD).read_text("utf-8").startswith(front_matter(folder))


def plain(folder: Path) -> str:
    """A card's text for an ensemble that nobody has described yet."""
    manifest = read(folder)
    lines = [f"# {manifest['name']}", "", "Atypical (1) against normal (0) mitotic figures, by adapters (LoRA) on:", ""]
    lines += ["| backbone | folds | views | input | base |", "|---|--:|--:|---|---|"]
    for member in manifest["members"]:
        crop = member["preprocess"]["crop"]
        seen = f"central {crop} px" if crop else "the whole crop"
        about = member["licence"]
        base = f"{about.get('base_source', 'not known')}, {about.get('base', 'not known')}"
        lines.append(
            f"| {member['backbone']} | {len(member['folds'])} | {TTA_VIEWS[member['tta']]} | {seen}, resized to "
            f"{member['preprocess']['size']} px | {base} |"
        )
    scores = manifest.get("provenance", {}).get("out_of_fold", {})
    found = ", ".join(f"{name} {scores[key]:.4f}" for key, (_, name) in METRICS.items() if key in scores)
    about = f"mean {manifest['averaging']}, temperature {manifest['temperature']}, threshold {manifest['threshold']}"
    lines += ["", f"Answer: {about}.", *([f"Out of fold: {found}."] if found else [])]
    lines += ["", "`ensemble.json` has the rest: hashes, recipe, data, versions. Not a medical device.", ""]
    return "\n".join(lines)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="ENSEMBLE")


def run(options: argparse.Namespace) -> None:
    for folder in options.folders:
        write_card(folder)
        print(f"{folder / CARD}: front matter as {FILE} gives it")
