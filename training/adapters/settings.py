"""What a source says of the way from a crop to its network's input, and of its pooling; what it does not say is asked.

Options come first, then `preprocessor_config.json` (transformers) or `config.yaml` beside the adapters, then the class
that PEFT noted. Nothing is guessed: an input that is scaled otherwise than in training costs accuracy without a sound.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from inference.errors import UserError
from inference.files import read_json
from inference.head import ACTIVATIONS
from inference.manifest import KERNELS, POOLS

from .head import NONE
from .source import CONFIG, Source

PROCESSOR, YAML = "preprocessor_config.json", "config.yaml"
PILLOW = {2: "bilinear", 3: "bicubic"}  # numbers of PIL's kernels
PREPROCESSING = {  # names in a config.yaml, at any depth
    "size": ("image_size", "img_size", "input_size"),
    "kernel": ("kernel", "interpolation"),
    "mean": ("mean", "image_mean"),
    "std": ("std", "image_std"),
}
BESIDE = {"size": ("size",), "crop": ("crop",)}  # names too common unless one of those above is beside them
OTHERS = {
    "pool": ("pool", "pooling", "global_pool"),
    "alpha": ("lora_alpha",),
    "use_rslora": ("use_rslora",),
}
SECTIONS, ACTIVATION = ("head", "classifier"), ("activation", "act")  # of a head alone, not of the backbone
SCALES = {"alpha", "use_rslora"}  # PEFT's configuration says these, where there is one
CLASSES = {  # of transformers, and what their classifiers see
    "Dinov2ForImageClassification": "token+avg",
    "Dinov2WithRegistersForImageClassification": "token+avg",
    "ViTForImageClassification": "token",
}
EXPECTED = {
    "crop": "the side of the central square in pixels, or all",
    "size": "the side of the network's input in pixels",
    "kernel": " or ".join(KERNELS),
    "mean": "three numbers on the scale of 0 to 1",
    "std": "three numbers on the scale of 0 to 1",
    "pool": ", ".join(POOLS),
}


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--crop",
        type=lambda text: None if text == "all" else int(text),
        default=...,
        metavar="PX",
        help=EXPECTED["crop"],
    )
    add("--size", type=int, metavar="PX", help=EXPECTED["size"])
    add("--kernel", choices=KERNELS, help="of the resize, always antialiased")
    add("--mean", type=float, nargs=3, metavar="X", help="of red, green and blue, on the scale of 0 to 1")
    add("--std", type=float, nargs=3, metavar="X", help="the same for the standard deviation")
    add("--pool", choices=POOLS, help="what the head sees")
    add("--alpha", type=float, help="lora_alpha, where the source has no adapter_config.json")
    help_ = "between a head's layers, for each place where one may be: none is nothing, or dropout"
    add("--activation", nargs="+", choices=(*ACTIVATIONS, NONE), metavar="A", help=help_)
    add("--norm-eps", type=small, metavar="X", help="eps of a normalisation in the head; PyTorch's own is 1e-5")


def small(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def settings(options: argparse.Namespace, source: Source) -> dict[str, Any]:
    """crop, size, kernel, mean, std, pool; alpha and use_rslora where said of a source without PEFT's configuration;
    activation (a list) and norm_eps of a head, where said.

    Prints what said each. UserError where one of the first six is missing.
    """
    if options.alpha is not None and source.config is not None:
        raise UserError(
            f"--alpha {options.alpha:g} for {source.folder}, whose {CONFIG} has lora_alpha; expected one; leave out "
            "--alpha"
        )
    said: dict[str, tuple[Any, str]] = {}
    for name in (*EXPECTED, "alpha", "activation", "norm_eps"):
        value = getattr(options, name)
        if value is not (... if name == "crop" else None):
            said[name] = value, f"--{name.replace('_', '-')}"
    scales = set() if source.config is not None else SCALES
    wanted = ({*EXPECTED, "activation"} | scales) - said.keys()
    for file, read in ((PROCESSOR, processor), (YAML, yaml_settings)):
        if (source.folder / file).is_file():
            for name, value in read(source.folder / file, wanted).items():
                said.setdefault(name, (value, file))
    noted = (source.config or {}).get("auto_mapping") or {}
    kind = noted.get("base_model_class") if isinstance(noted, dict) else None
    if kind in CLASSES:
        said.setdefault("pool", (CLASSES[kind], kind))
    missing = [name for name in EXPECTED if name not in said]
    if missing:
        asked = "; ".join(f"--{name}: {EXPECTED[name]}" for name in missing)
        raise UserError(
            f"{source.folder} does not say {', '.join(missing)}; expected what the adapters were trained with; give "
            f"{asked}"
        )
    for name, (value, origin) in said.items():
        print(f"  {name} {'all' if value is None else value}, by {origin}")
    return {name: value for name, (value, _) in said.items()}


def processor(file: Path, wanted: set[str]) -> dict[str, Any]:
    """What an image processor of transformers does to a crop. UserError where we would do something else.

    wanted: the settings that are not given otherwise; about others it may say what it likes
    """
    config = read_json(file, "give --crop, --size, --kernel, --mean and --std")
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no settings; expected an image processor's; give options instead")
    found: dict[str, Any] = {}
    if wanted & {"crop", "size"}:
        side, cropped = _side(config.get("size")), _side(config.get("crop_size"))
        if config.get("do_center_crop") and cropped != side:
            raise UserError(
                f"{file}: resizes to {side} and then crops {cropped} pixels; expected a crop first, as a job does it; "
                "give --crop (in pixels of your crops) and --size"
            )
        if config.get("do_resize", True) and isinstance(side, int):
            found |= {"crop": None, "size": side}
    kernel = PILLOW.get(config.get("resample", -1)) if isinstance(config.get("resample"), int) else None
    if kernel:
        found["kernel"] = kernel
    rescale = config.get("rescale_factor", 1 / 255)
    if config.get("do_rescale", True) and isinstance(rescale, float) and abs(rescale * 255 - 1) < 1e-3:
        normal = config.get("do_normalize", True)
        for name, plain in (("mean", 0.0), ("std", 1.0)):
            value = config.get(f"image_{name}") if normal else [plain] * 3
            if isinstance(value, list) and _is_triple(value):
                found[name] = [float(part) for part in value]
    return found


def _side(size: Any) -> Any:
    """The side that a processor's `size` means for a square crop; None where it has none."""
    if isinstance(size, dict):
        sides = {size[key] for key in ("height", "width", "shortest_edge") if isinstance(size.get(key), int)}
        return sides.pop() if len(sides) == 1 else None
    return size if isinstance(size, int) else None


def yaml_settings(file: Path, wanted: set[str]) -> dict[str, Any]:
    """The settings among `wanted` that a YAML file has under a known name. UserError where two differ."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({str(error)[:100]!r}); expected YAML; give options instead") from None
    values: dict[str, list[Any]] = {}
    _collect(content, values, set())
    accepts = {
        "size": lambda v: type(v) is int,  # which True is not
        "crop": lambda v: type(v) is int,
        "kernel": lambda v: v in KERNELS,
        "mean": _is_triple,
        "std": _is_triple,
        "pool": lambda v: v in POOLS,
        "alpha": lambda v: type(v) in (int, float),
        "use_rslora": lambda v: type(v) is bool,
        "activation": lambda v: all(part in (*ACTIVATIONS, NONE) for part in v),
    }
    chosen = {}
    for name in wanted:
        known = values.get(name, [])
        right = [value for value in known if accepts[name](value)]
        if any(value != right[0] for value in right):
            way = "correct the file" if name == "use_rslora" else f"give --{name}"
            raise UserError(f"{file} says {name} twice: {known!r:.100}; expected one; {way}")
        if right:
            chosen[name] = right[0]
    return chosen


def _collect(content: Any, values: dict[str, list[Any]], seen: set[int]) -> None:
    """Add the values below known names, at any depth; what YAML's references repeat is visited once."""
    if not isinstance(content, dict) or id(content) in seen:
        return
    seen.add(id(content))
    preprocesses = any(key in spellings for key in content for spellings in PREPROCESSING.values())
    known = [*PREPROCESSING.items(), *OTHERS.items(), *(BESIDE.items() if preprocesses else ())]
    for key, value in content.items():
        for name, spellings in known:
            if key in spellings:
                values.setdefault(name, []).append(value)
        if key in SECTIONS and isinstance(value, dict):
            for said in (value[spelling] for spelling in ACTIVATION if spelling in value):
                listed = said if isinstance(said, list) else [said]
                values.setdefault("activation", []).append([str(part).lower() for part in listed])
        _collect(value, values, seen)


def _is_triple(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 3 and all(type(part) in (int, float) for part in value)
    return bool(numbers and all(-10 < part < 10 for part in value))
