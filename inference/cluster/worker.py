"""What works on a cluster: an actor with the ensemble, which takes one piece of work after another."""

from __future__ import annotations

import os
import platform
import traceback
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..answers import Computed
from ..checksums import check_ensemble
from ..errors import UserError
from ..manifest import Manifest
from .shards import one_line

if TYPE_CHECKING:
    from ..ensemble import Ensemble


class Unusable(Exception):
    """The whole run has to stop, whatever the piece of work."""


class Worker(ABC):
    """Subclasses implement `work`. Its Unusable ends the run; any other exception ends this process."""

    def __init__(self, manifest: Manifest, computed: Computed, precision: str, threads: int) -> None:
        """computed: of the whole run; precision: the option's value, which may be `auto`."""
        self.manifest, self.computed, self.precision, self.threads = manifest, computed, precision, threads
        self.pool = ThreadPoolExecutor(max(2, threads))

    def take(self, piece: Any) -> Any:
        try:
            return self.work(piece)
        except Unusable:
            raise
        except Exception as error:  # unexpected, such as a lost GPU: another process may succeed
            traceback.print_exc()
            self.give_up(piece, error)
            os._exit(1)

    @abstractmethod
    def work(self, piece: Any) -> Any:
        """The result of one piece of work."""

    def give_up(self, piece: Any, error: Exception) -> None:  # noqa: B027 only shards leave a trace
        """Called before the process ends."""

    @cached_property
    def ensemble(self) -> Ensemble:
        """Loaded when it is first needed. Unusable where this machine has another ensemble, device or precision."""
        import torch

        from ..ensemble import Ensemble

        torch.set_num_threads(self.threads)
        try:
            check_ensemble(self.manifest)
            ensemble = Ensemble(self.manifest, self.computed.device, self.precision)
        except UserError as error:
            raise Unusable(str(error)) from None
        except OSError as error:
            raise Unusable(
                f"the ensemble cannot be read on {platform.node()} ({one_line(error)}); copy it there"
            ) from None
        if ensemble.precision != self.computed.precision:
            raise Unusable(
                f"{platform.node()} computes in {ensemble.precision}; expected {self.computed.precision}, as the "
                "others do; name one with --precision"
            )
        return ensemble
