"""The plain path, as published containers do it: `python -m benchmarks.plain KIND FOLDER STACK OUT`.

foundation: for each fold build the backbone with random initialisation, unpickle the fp32 base, merge with PEFT; then
run every crop alone through every fold in fp32 (resized as in our path, so that the answers can be compared).
reference: as the official container does, torchvision and timm, one EfficientNetV2-M from a .pth at 224 px, crops one
by one. Both write seconds by phase and the probabilities as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(kind: str, folder: Path, stack: Path, out: Path) -> None:
    clock = [time.perf_counter()]
    tick = lambda: clock.append(time.perf_counter())  # noqa: E731
    import numpy as np
    import timm
    import torch
    from PIL import Image, ImageSequence
    from torchvision import transforms

    if kind == "foundation":
        from peft import PeftModel

        from inference.backbones import build, lookup
        from inference.preprocess import Preprocess, to_batch
    tick()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = []
    if kind == "foundation":
        manifest = json.loads((folder / "ensemble.json").read_text())
        preprocess = Preprocess(**manifest["preprocess"])
        prepare = lambda page: to_batch([np.asarray(page)], preprocess)  # noqa: E731
        for number in range(len(manifest["folds"])):
            model = build(lookup(manifest["backbone"]), 1, manifest["pool"])
            state = torch.load(folder.with_suffix(".pth"), map_location="cpu", weights_only=True)
            model.load_state_dict(state, strict=False)
            models.append(
                PeftModel.from_pretrained(model, folder / f"fold{number}").merge_and_unload().eval().to(device)
            )
    else:
        chain = transforms.Compose(
            [
                transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )
        prepare = lambda page: chain(page)[None]  # noqa: E731
        model = timm.create_model("tf_efficientnetv2_m", pretrained=False, num_classes=1)
        model.load_state_dict(torch.load(folder / "reference.pth", map_location="cpu", weights_only=True))
        models.append(model.eval().to(device))
    tick()
    answers = []
    with Image.open(stack) as image, torch.no_grad():
        for page in ImageSequence.Iterator(image):
            crop = prepare(page.convert("RGB")).to(device)
            answers.append([float(model(crop)[0, 0]) for model in models])
    tick()
    p = torch.tensor(answers, dtype=torch.float64).mean(dim=1).sigmoid()
    seconds = dict(zip(("import", "load", "predict"), np.diff(clock).round(3).tolist(), strict=True))
    device_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    out.write_text(json.dumps({"seconds": seconds, "p_atypical": p.tolist(), "device_bytes": device_bytes}))


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:5]))
