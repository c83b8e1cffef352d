"""An ensemble folder, loaded: members one after another, each a shared base with F fused folds; one answer per crop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import manifest as manifests
from .averaging import average
from .backbones import lookup
from .checksums import check_ensemble, check_hashes
from .device import DTYPES, choose_device, choose_precision, keep_freed_memory
from .errors import UserError
from .exits import is_device_memory
from .manifest import TTA_VIEWS, Manifest, ensemble_folder, load_manifest
from .models import logits, widest_layer
from .preprocess import Preprocess, to_batch, views
from .weights import Weights

# Bytes of the widest layer's activations in a pass. Enough to keep a GPU busy; larger ones leave a CPU's caches.
WIDEST = {"cuda": 96 << 20, "cpu": 32 << 20}


@dataclass(frozen=True)
class Prediction:
    """Answers for N crops by M members with F folds in all; every probability in [0, 1].

    p_atypical (N,) of the ensemble; member_p (M, N) of each member; fold_p (F, N) of each fold, member after member;
    logits: (folds, V, N) of each member before averaging; recomputed: crops whose logits were not finite at first
    """

    p_atypical: np.ndarray
    member_p: np.ndarray
    fold_p: np.ndarray
    logits: tuple[np.ndarray, ...]
    recomputed: int = 0

    @property
    def spread(self) -> np.ndarray:
        """Largest minus smallest fold, per crop (N,)."""
        spread: np.ndarray = np.ptp(self.fold_p, axis=0)
        return spread

    @property
    def member_spread(self) -> np.ndarray:
        """Largest minus smallest fold of each member (M, N)."""
        ends = np.cumsum([len(member) for member in self.logits])[:-1]
        return np.stack([np.ptp(folds, axis=0) for folds in np.split(self.fold_p, ends)])


def combine(member_logits: Sequence[np.ndarray], about: Manifest, recomputed: int = 0) -> Prediction:
    """The answers from the members' logits, each (folds, V, N), by the manifest's rule."""
    rule = about.averaging, about.temperature
    p = average(member_logits, *rule, [member.weight for member in about.members])
    member_p = np.stack([average([z], *rule) for z in member_logits])
    fold_p = np.stack([average([fold[None]], *rule) for z in member_logits for fold in z])
    return Prediction(p, member_p, fold_p, tuple(member_logits), recomputed)


class LoadedMember:
    """One base with its folds on a device: fused when it first predicts, and dropped by `free`."""

    def __init__(
        self, about: manifests.Member, device: torch.device, precision: str, shared: dict[Any, dict[Any, Any]]
    ) -> None:
        """shared: by base and precision, the tensors that members with the same base have in common."""
        self.about = about
        self.backbone = lookup(about.backbone)
        self.device = device
        self.precision = choose_precision(precision, device, about.precision, self.backbone.fp16_safe)
        self.preprocess = Preprocess(**about.preprocess)
        self.seconds = 0.0  # spent in `predict`
        self.weights_seconds = 0.0  # of these, spent reading, fusing and converting weights
        self.recomputed = 0  # crops whose logits were not finite in the chosen precision
        self._shared = shared
        self._weights: Weights | None = None
        self._batch = 0

    @property
    def weights(self) -> Weights:
        if self._weights is None:
            start = time.perf_counter()
            shared = self._shared.setdefault(self.base, {})
            folds = list(self.about.folds)
            dtype = DTYPES[self.precision]
            how = self.about.positions, self.about.head
            self._weights = Weights(self.about.base, folds, self.device, dtype, shared, *how)
            self.weights_seconds += time.perf_counter() - start
        return self._weights

    @property
    def base(self) -> tuple[Path, str]:
        """The key of the tensors that it shares: members with the same base and precision hold them once."""
        return self.about.base, self.precision

    def free(self, later: Sequence[LoadedMember]) -> None:
        """Drop the folds' weights, and the base's unless a later member needs them."""
        self._weights = None
        if all(self.base != member.base for member in later):
            self._shared.pop(self.base, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def predict(self, crops: Sequence[np.ndarray], tta: str) -> np.ndarray:
        """Finite fp32 logits (F, V, N) by the views of `tta`.

        A pass that does not fit into the device's memory is halved, and later passes keep that size.
        """
        start, read = time.perf_counter(), self.weights.seconds
        parts = []
        begin = 0
        while begin < len(crops):
            size = self._batch or self._first_batch(tta)
            try:
                parts.append(self._logits(crops[begin : begin + size], tta, self.weights))
            except RuntimeError as error:  # torch.OutOfMemoryError is one; CUDA's libraries raise others
                if not is_device_memory(error):
                    raise
                if size == 1:
                    raise UserError(
                        f"{self.about.name} ran out of device memory with one crop; expected a GPU with more; "
                        "use --device cpu"
                    ) from None
                torch.cuda.empty_cache()
                self._batch = size // 2
                continue
            begin += size
        self.seconds += time.perf_counter() - start
        self.weights_seconds += self.weights.seconds - read
        return np.concatenate(parts, axis=2)

    def _first_batch(self, tta: str) -> int:
        """Crops per pass, from the widest layer's activations."""
        values = widest_layer(self.weights, self.backbone, self.preprocess.size)
        return max(1, WIDEST[self.device.type] // (values * TTA_VIEWS[tta] * self.weights.dtype.itemsize))

    @torch.inference_mode()
    def _logits(self, crops: Sequence[np.ndarray], tta: str, weights: Weights) -> np.ndarray:
        """Finite fp32 logits (F, V, N)."""
        batch = views(to_batch(crops, self.preprocess).to(self.device), tta)
        out = logits(batch, weights, self.backbone, self.about.pool)  # (F, V * N)
        found: np.ndarray = torch.unflatten(out, 1, (TTA_VIEWS[tta], len(crops))).cpu().numpy()
        if not np.isfinite(found).all():
            if weights.dtype == torch.float32:
                raise UserError(
                    f"the logits of {self.about.name} are not finite in fp32; expected finite ones; export it again"
                )
            # the files are read again: they may have been replaced since they were checked
            check_hashes([(self.about.base, self.about.base_sha256), *self.about.files.items()])
            self.recomputed += len(crops)
            return self._logits(crops, tta, weights.convert_to(torch.float32))
        return found


class Ensemble:
    """Load with `Ensemble.load(folder)`; `predict` takes crops of any size and number.

    A crop's answer does not depend on its neighbours.
    """

    def __init__(
        self,
        manifest: Manifest,
        device: str = "auto",
        precision: str = "auto",
        *,
        checks: Sequence[Future[None]] = (),
        keep: bool = True,
    ) -> None:
        """The files must have been checked already, unless `checks` has a future for each member.

        keep: hold every member's weights for the next call; a job makes only one, and needs memory for the largest only
        """
        self.manifest = manifest
        self.device = choose_device(device)
        shared: dict[Any, dict[Any, Any]] = {}
        self.members = [LoadedMember(about, self.device, precision, shared) for about in manifest.members]
        self.checks, self.keep = checks, keep
        if self.device.type == "cpu":
            keep_freed_memory()

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto", precision: str = "auto") -> Ensemble:
        """Read, validate and hash-check the ensemble in `folder`, or the bundled one of that name, such as "default".

        UserError where anything is missing or altered.
        """
        manifest = load_manifest(ensemble_folder(folder))
        check_ensemble(manifest)
        return cls(manifest, device, precision)

    @property
    def precision(self) -> str:
        """Of all members: one name, or one for each where they differ."""
        precisions = [member.precision for member in self.members]
        return precisions[0] if len(set(precisions)) == 1 else "+".join(precisions)

    @property
    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"cpu ({torch.get_num_threads()} threads)"

    def device_bytes(self) -> int:
        """The peak of allocated GPU memory in bytes; 0 on the CPU."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0

    def predict(self, crops: Sequence[np.ndarray], tta: str | None = None) -> Prediction:
        """P(atypical) of crops, each uint8 RGB (H, W, 3). tta: views to use instead of each member's own."""
        if not len(crops):
            raise UserError("found no crops; expected one or more; check the input")
        before = sum(member.recomputed for member in self.members)
        logits = []
        for number, member in enumerate(self.members):
            if number < len(self.checks):
                self.checks[number].result()
            logits.append(member.predict(crops, tta or member.about.tta))
            if not self.keep:
                member.free(self.members[number + 1 :])
        return combine(logits, self.manifest, sum(member.recomputed for member in self.members) - before)
