"""Writes the files beside it: two-block models, adapters and answers, as transformers 4 and its PEFT save them.

The project's lock has transformers 5, whose layers have other names. Everything here is made and answered by the
libraries alone, in an environment of its own, from the root of the project:

    python -m venv /tmp/four
    /tmp/four/bin/pip install torch==2.10.0 torchvision==0.25.0 transformers==4.57.6 peft==0.17.1 pillow
    /tmp/four/bin/python test/support/transformers4/write.py test/support/transformers4

For each backbone: model.safetensors (the base, fp16), adapter/ (PEFT's folder with a `preprocessor_config.json`) and
answers.json (logits of `crops`, and versions). Two heads of eight channels, patches of 4 pixels, 5 x 5 positions; crops
of 7 x 7 patches, so that positions are resampled.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

WIDTH, HEADS, PATCH, NATIVE, SIZE = 16, 2, 4, 20, 28
COMMON: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
COMMON |= {"patch_size": PATCH, "image_size": NATIVE}
# our backbone: class, settings, the classifier's layer, adapted layers, more of LoRA
MODELS: dict[str, tuple[str, dict[str, Any], str, list[str], dict[str, Any]]] = {
    "dinov2-vits14": ("Dinov2", {"mlp_ratio": 1}, "classifier", ["query", "value"], {}),
    "dinov2-vits14-reg": ("Dinov2WithRegisters", {"mlp_ratio": 1}, "classifier", ["query", "key"], {"use_dora": True}),
    "dinov3-vits16": (
        "DINOv3ViT",
        {"intermediate_size": WIDTH, "num_register_tokens": 4},
        "fc",
        ["q_proj", "v_proj", "o_proj", "up_proj"],
        {},
    ),
    "vit-b16": ("ViT", {"intermediate_size": WIDTH}, "classifier", ["query", "value", "dense"], {"use_rslora": True}),
}


class Classifier(torch.nn.Module):
    """A linear layer on the class token, for a backbone without a classifier of its own."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone, self.fc = backbone, torch.nn.Linear(WIDTH, 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.backbone(pixel_values=pixel_values).last_hidden_state[:, 0])
        return logits


def crops() -> np.ndarray:
    """(3, S, S, 3), uint8."""
    return np.random.default_rng(0).integers(256, size=(3, SIZE, SIZE, 3), dtype=np.uint8)


def write(name: str, folder: Path) -> None:
    import peft
    import transformers

    kind, more, layer, targets, lora = MODELS[name]
    assert transformers.__version__.startswith("4."), transformers.__version__
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**COMMON, **more, num_labels=2)
    named = getattr(transformers, f"{kind}ForImageClassification", None)
    model = named(config) if named else Classifier(getattr(transformers, f"{kind}Model")(config))
    with torch.no_grad():
        for key, value in model.named_parameters():
            scale = 0.3 if value.ndim < 3 else 0.2
            value.copy_((torch.randn_like(value) * scale + ("norm" in key and value.ndim == 1)).half().float())
            if kind == "DINOv3ViT" and key.endswith(("q_proj.bias", "v_proj.bias")):
                value.zero_()  # as published for the sizes that timm has without them
    backbone = model.backbone if not named else model.base_model
    copy.deepcopy(backbone).half().save_pretrained(folder)  # its weights alone: buffers in half would not come back
    model.eval()
    (folder / "config.json").unlink()

    settings: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": targets, "modules_to_save": [layer]} | lora
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for key, value in adapted.named_parameters():
            if "lora_A" in key or "lora_B" in key:
                value.normal_(0, 0.4)
            elif "magnitude" in key:
                value.mul_(1 + 0.2 * torch.randn_like(value))
    adapted.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    side = {"height": SIZE, "width": SIZE}
    processor = transformers.ViTImageProcessor(size=side, resample=3, image_mean=[0.5, 0.4, 0.6], image_std=[0.2] * 3)
    processor.save_pretrained(folder / "adapter")
    x = processor(images=list(crops()), return_tensors="pt")
    asked = {"interpolate_pos_encoding": True} if kind == "ViT" else {}
    with torch.inference_mode():
        found = adapted(**x, **asked)
    answers = {
        "logits": getattr(found, "logits", found).tolist(),
        "versions": {library.__name__: library.__version__ for library in (transformers, peft, torch)},
    }
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # which safetensors writes for the owner alone
    (folder / "answers.json").write_text(json.dumps(answers, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args().folder
    for backbone in MODELS:
        write(backbone, chosen / backbone)
