"""Runs several tasks through one server, as the platform does with an image labelled `invoke`; natively too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from test.harness import engines

INVOKE = "shim_invoke.py"
LABEL = "org.grand-challenge.api-method"
PORT = 4743


def api_method(image: str) -> str:
    """What the image's label asks for, as the platform reads it; exec without one."""
    labels = ((engines.inspect(image) or {}).get("Config") or {}).get("Labels") or {}
    found = {key.strip().lower(): value for key, value in labels.items()}.get(LABEL, "exec")
    return str(found).lower().strip("\"'")


def run_docker(
    image: str, folder: Path, pks: list[str], weights: Path | None, limits: engines.Limits
) -> list[engines.Run]:
    """Runs the server of `image` in one fresh container without network, and one task after the other through it.

    Args:
        folder: holds 0/input, 1/input, ..., one for each of `pks`; receives the tasks' outputs and logs.
    Returns: one Run a task, in order. RuntimeError as in `engines.run_docker`.
    """
    job = engines.describe_image(image, limits) | {"port": PORT, "start_limit": limits.start_seconds}
    job["tasks"] = [
        {"name": str(index), "input_source": f"/opt/ml/input/data/{pk}-input" if job["link_input"] else "/input"}
        for index, pk in enumerate(pks)
    ]
    return collect(folder, len(pks), *engines.run_container(image, folder, job, weights, limits, INVOKE))


def run_native(
    folder: Path, pks: list[str], weights: Path | None, limits: engines.Limits, command: list[str] | None = None
) -> list[engines.Run]:
    """The same, natively: `python -m inference serve`, or `command`, in which {input} and {output} are the folders."""
    places, job = engines.native_places(folder)
    if command is None:
        command = [engines.native_python(), *engines.OURS, "serve", "--input", "{input}", "--output", "{output}"]
        if weights is not None:
            command += ["--weights", str(job["model"] if weights.is_file() else weights)]
    command = [word.format(**places) if word in ("{input}", "{output}", "{tmp}") else word for word in command]
    job |= engines.describe(command, str(engines.ROOT), limits) | {"port": PORT, "start_limit": limits.start_seconds}
    data = folder / "root/opt/ml/input/data"
    job["tasks"] = [{"name": str(index), "input_source": f"{data}/{pk}-input"} for index, pk in enumerate(pks)]
    # both in one network namespace, so that they can reach each other
    ended = engines.run_natively(folder, job, weights, limits, INVOKE, engines.offline())
    return collect(folder, len(pks), *ended)


def collect(folder: Path, tasks: int, wall_seconds: float, code: int, message: str) -> list[engines.Run]:
    """One Run a task. The first one also counts what the container took beyond the tasks: start, load and stop."""
    runs = [engines.collect(folder / str(index), 0.0, code, message) for index in range(tasks)]
    server = json.loads((folder / "server.json").read_text()) if (folder / "server.json").exists() else {}
    rest = wall_seconds - sum(run.seconds for run in runs)
    return [
        replace(run, wall_seconds=run.seconds + (0 if index else rest), peak_mib=server.get("peak_mib", 0.0))
        for index, run in enumerate(runs)
    ]
