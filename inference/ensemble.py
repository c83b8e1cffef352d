"""An ensemble folder, loaded: one shared base, F fused folds, one P(atypical) per crop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .adapters import Weights
from .backbones import lookup
from .device import DTYPES, choose_device, choose_precision, keep_freed_memory
from .errors import UserError
from .manifest import Manifest, check_hashes, load_manifest
from .models import logits
from .preprocess import TTA_VIEWS, Preprocess, to_batch, views

# Bytes of the widest layer's activations in a pass. A GPU is busy long before; on the CPU larger ones leave the caches.
WIDEST = {"cuda": 96 << 20, "cpu": 32 << 20}


@dataclass(frozen=True)
class Prediction:
    """p_atypical (N,) of the ensemble and fold_p (F, N) of each fold, in [0, 1]; logits (F, V, N) before averaging."""

    p_atypical: np.ndarray
    fold_p: np.ndarray
    logits: np.ndarray

    @property
    def spread(self) -> np.ndarray:
        """Largest minus smallest fold, per crop (N,)."""
        return self.fold_p.max(0) - self.fold_p.min(0)


def average(logits: np.ndarray, averaging: str, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits (F, V, N) to P(atypical) of the ensemble (N,) and of each fold (F, N), by the manifest's rule."""
    scaled = logits.astype(np.float64) / temperature
    with np.errstate(over="ignore"):
        sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
        if averaging == "logit":
            return sigmoid(scaled.mean((0, 1))), sigmoid(scaled.mean(1))
        return sigmoid(scaled).mean((0, 1)), sigmoid(scaled).mean(1)


class Ensemble:
    """Load with `Ensemble.load(folder)`; `predict` takes crops of any size and number."""

    def __init__(self, manifest: Manifest, device: str = "auto", precision: str = "auto") -> None:
        """The files are taken to be checked already; `load` checks them first."""
        self.manifest = manifest
        self.row = lookup(manifest.backbone)
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device, manifest.precision, self.row.fp16_safe)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.preprocess = Preprocess(**manifest.preprocess)
        self.recomputed = 0  # crops whose logits were not finite in the chosen precision
        self.weights = Weights(manifest.base, list(manifest.folds), self.device, DTYPES[self.precision])
        self._batch = 0

    @classmethod
    def load(cls, folder: Path, device: str = "auto", precision: str = "auto") -> Ensemble:
        """Read, validate and hash-check the ensemble in `folder`. UserError where anything is missing or altered."""
        manifest = load_manifest(Path(folder))
        check_hashes([*manifest.files.items(), (manifest.base, manifest.base_sha256)])
        return cls(manifest, device, precision)

    def predict(self, crops: Sequence[np.ndarray]) -> Prediction:
        """P(atypical) of crops, each uint8 RGB (H, W, 3). A crop's answer does not depend on its neighbours."""
        if not len(crops):
            raise UserError("found no crops; expected one or more")
        all_logits = []
        begin = 0
        while begin < len(crops):
            size = self._batch or self._first_batch()
            try:
                all_logits.append(self._logits(crops[begin : begin + size], self.weights))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise UserError(
                        "out of device memory with one crop; expected a GPU with more; use --device cpu"
                    ) from None
                torch.cuda.empty_cache()
                self._batch = size // 2
                continue
            begin += size
        result = np.concatenate(all_logits, axis=2)
        return Prediction(*average(result, self.manifest.averaging, self.manifest.temperature), result)

    def _first_batch(self) -> int:
        """Crops per pass, from the widest layer's activations."""
        size, folds = self.preprocess.size, len(self.manifest.folds)
        if not self.row.heads:  # a convolutional network: about 96 channels at half the side, before most folds part
            values = 96 * (size // 2) ** 2
        else:
            _, _, patch, _ = self.weights.shape("patch_embed.proj.weight")
            names = ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1_g.weight", "blocks.0.attn.qkv.weight")
            values = (
                folds * (size // patch) ** 2 * max(self.weights.shape(n)[0] for n in names if n in self.weights.names)
            )
        values *= TTA_VIEWS[self.manifest.tta] * self.weights.dtype.itemsize
        return max(1, WIDEST[self.device.type] // values)

    @torch.inference_mode()
    def _logits(self, crops: Sequence[np.ndarray], weights: Weights) -> np.ndarray:
        """Finite fp32 logits (F, V, N)."""
        batch = views(to_batch(crops, self.preprocess).to(self.device), self.manifest.tta)
        out = logits(batch, weights, self.row, self.manifest.pool)  # (F, V * N)
        out = out.unflatten(1, (TTA_VIEWS[self.manifest.tta], len(crops))).cpu().numpy()
        if not np.isfinite(out).all():
            if weights.dtype == torch.float32:
                raise UserError("the ensemble's logits are not finite in fp32; expected finite ones; export it again")
            self.recomputed += len(crops)
            return self._logits(crops, weights.convert_to(torch.float32))
        return out
