"""Runs inside the container, as root: the platform's own entry shim, from packages that are mounted beside this file.

On the platform one added layer holds the shim (a single binary), /input, /output and /tmp. Here the image's own Python
runs the shim, and only `sys.path` changes, so that the job does not notice it.
"""

import os
import sys
from pathlib import Path

for folder, mode in {"/input": 0o755, "/output": 0o777, "/tmp": 0o777}.items():
    Path(folder).mkdir(exist_ok=True)
    Path(folder).chmod(mode)
os.environ.pop("PYTHONCOERCECLOCALE", None)  # set by the caller to keep this Python from adding LC_CTYPE
# beside this file lie the shim's packages, and a newer tarfile: Python before 3.11.4 lacks filter="data"
sys.path.insert(0, "/platform/packages")

from sagemaker_shim.cli import cli  # noqa: E402

cli()
