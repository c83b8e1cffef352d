"""Builds the wheel: one package `midog_lora`, whose subpackages are this tree's folders. All else is in pyproject.toml.

The folders are imported by their own names in a clone, as the platform's container does. Installed they must not claim
names such as `inference`, which other packages have too. So the copies in the wheel import `midog_lora.inference`, and
messages name the command `midog-lora` where the clone's say `python -m training`.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

PACKAGE = "midog_lora"
FOLDERS = ("inference", "training", "release")
IMPORT = re.compile(rf"^(\s*)(from|import) ({'|'.join(FOLDERS)})\b", re.MULTILINE)
PROGRAM = re.compile(r"python -m (?:inference|training)\b")
INIT = f'''"""Fused LoRA ensembles for atypical mitotic figures.

from {PACKAGE} import Ensemble
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .inference import __version__

if TYPE_CHECKING:
    from .inference import Ensemble

__all__ = ["Ensemble", "__version__"]


def __getattr__(name: str) -> Any:
    """Import PyTorch when `Ensemble` is first used, not with the package."""
    from . import inference

    return getattr(inference, name)
'''


class Build(build_py):
    """The usual copy of the folders, then their imports of each other by the names that they have in the wheel."""

    def run(self) -> None:
        super().run()
        top = Path(self.build_lib, PACKAGE)
        for file in top.rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            text = IMPORT.sub(rf"\1\2 {PACKAGE}.\3", text)
            file.write_text(PROGRAM.sub("midog-lora", text), encoding="utf-8")
        (top / "__init__.py").write_text(INIT, encoding="utf-8")


setup(
    packages=[f"{PACKAGE}.{name}" for name in find_packages(include=[f"{folder}*" for folder in FOLDERS])]
    + [f"{PACKAGE}.weights", f"{PACKAGE}.requirements"],
    package_dir={f"{PACKAGE}.{folder}": folder for folder in (*FOLDERS, "weights", "requirements")},
    package_data={
        f"{PACKAGE}.inference": ["*.json", "report/*.css", "report/*.html", "report/*.js"],
        f"{PACKAGE}.training": ["recipes/*.toml"],
        f"{PACKAGE}.weights": ["default/*", "default/*/*", "fast/*", "fast/*/*"],
        f"{PACKAGE}.requirements": ["bases.txt"],
    },
    cmdclass={"build_py": Build},
)
