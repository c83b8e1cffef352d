"""Runs stacks through the algorithm as the platform would, checks and scores the answers (test/run_local.sh)."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from random import Random

from test.harness import engines, layout, readout, report
from test.harness.findings import Finding

ROOT = engines.ROOT
SAMPLE = ROOT / "test/sample"
OUR_IMAGE = os.environ.get("IMAGE", "midog-lora")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options; the defaults are what the platform gives a job of this track as far as it is known."""
    parser = argparse.ArgumentParser(prog="test/run_local.sh", description=__doc__)
    add = parser.add_argument
    add("--input", type=Path, default=SAMPLE / "stack_0.tiff", metavar="STACK_OR_FOLDER", help="default: the sample")
    add("--output", type=Path, default=ROOT / "test/output", metavar="DIR", help="default: test/output")
    add("--weights", type=Path, help="ensemble folder, or model tarball, in place of the bundled ensemble")
    add("--truth", type=Path, metavar="ground_truth.json", help="score the answers; writes metrics.json")
    add("--engine", choices=("docker", "native"), help="default: docker where an engine answers")
    add("--image", help="any image, which is run as it is; default: our own, tagged $IMAGE or midog-lora")
    add("--no-build", action="store_true", help="run what is there, stale or not")
    add("--strict", action="store_true", help="read-only root, no capabilities, no new privileges, 256 processes")
    add("--gpus", choices=("auto", "all", "none"), default="auto", help="default: what the host has")
    add("--memory", type=int, default=16, metavar="GIB", help="of the machine; data memory is 1 GiB less")
    add("--shm-size", default="8g", help="the organisers' own re-run gave 1g")
    add("--time-limit", type=float, default=300, metavar="SECONDS", help="a phase may set 300 and more")
    add("--inputs-json", choices=(*layout.VARIANTS, "rotate"), default="rotate", help="form of inputs.json")
    add("--seed", type=int, default=0, help="of the random file names")
    return parser.parse_args(arguments)


def build(engine: str, image: str) -> None:
    """Calls build.sh where something is missing or older than its sources.

    Raises: RuntimeError when it fails.
    """
    if engine == "docker":
        about = engines.inspect(image)
        sources = [ROOT / name for name in ("Dockerfile", "requirements.txt", "inference", "weights/default")]
        files = [
            file for source in sources for file in [source, *source.rglob("*.*")] if "__pycache__" not in file.parts
        ]
        newest = max((file.stat().st_mtime for file in files if file.is_file()), default=0)
        if about and datetime.fromisoformat(about["Created"][:19] + "+00:00").timestamp() > newest:
            return
    # natively build.sh itself knows what is installed, and says nothing new when all is
    done = subprocess.run([str(ROOT / "build.sh"), "--engine", engine], env=os.environ | {"IMAGE": image})
    if done.returncode:
        raise RuntimeError(f"build.sh --engine {engine} failed; its message stands above")


def run_stack(stack: Path, index: int, options: argparse.Namespace, limits: engines.Limits) -> report.Result:
    """Runs one stack in a fresh container (or natively) and keeps its answer and logs in the output folder."""
    rng = Random(f"{options.seed} {index}")
    variant = options.inputs_json if options.inputs_json != "rotate" else layout.VARIANTS[index % 5]
    pages = layout.count_pages(stack)
    with tempfile.TemporaryDirectory(prefix="harness-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        pk = layout.write_input(stack, folder / "input", variant, rng)
        if options.engine == "docker":
            run = engines.run_docker(options.image, folder, pk, options.weights, limits)
        else:
            run = engines.run_native(folder, pk, options.weights, limits)
        answers, findings = readout.judge(run, pages)
        target = options.output / stack.stem if options.many else options.output
        target.mkdir(parents=True, exist_ok=True)
        for file in (layout.ANSWER, "stdout.log", "stderr.log", "details.json"):
            (target / file).unlink(missing_ok=True)
            found = folder / file if file != layout.ANSWER else run.output / file
            if found.exists():
                shutil.copyfile(found, target / file)
    return report.Result(stack, pages, run, answers, findings)


def score(results: list[report.Result], truth: Path, output: Path) -> list[Finding]:
    """Scores the answers as the official evaluator does; one failed job fails the whole evaluation, as there."""
    from test.harness import scoring  # numpy

    failed = [result.stack.name for result in results if result.answers is None]
    if failed:
        message = f"not scored: the algorithm failed on {len(failed)} of {len(results)} stacks, first {failed[0]}"
        return [Finding("fail", message, "one failed job fails the whole evaluation")]
    try:
        metrics = scoring.score(
            {result.stack.name: result.answers or [] for result in results}, scoring.read_truth(truth)
        )
    except ValueError as error:
        return [Finding("fail", f"the evaluator stops: {error}", f"check {truth}")]
    scoring.write(metrics, output / "metrics.json")
    report.print_metrics(metrics)
    return [Finding("warn", text) for text in metrics["warnings"]]


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 when every check of every stack passed, 1 when one failed, 2 for wrong options."""
    options = parse(arguments)
    options.engine = options.engine or ("docker" if engines.docker() else "native")
    if options.engine == "docker" and not engines.docker():
        print("--engine docker: no engine answers; start one or use --engine native", file=sys.stderr)
        return 2
    limits = engines.Limits(
        options.memory, options.time_limit, options.shm_size, gpus=options.gpus, strict=options.strict
    )
    try:
        stacks = layout.find_stacks(options.input)
        for path in (options.weights, options.truth):
            if path is not None and not path.exists():
                raise FileNotFoundError(f"{path} does not exist")
        if options.truth and not importlib.util.find_spec("numpy"):
            raise RuntimeError("--truth needs numpy; make .venv with ./build.sh --engine native, or install numpy")
        if not (options.no_build or options.image):
            build(options.engine, OUR_IMAGE)
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    options.image = options.image or OUR_IMAGE
    options.weights = options.weights and options.weights.resolve()
    options.many = options.input.is_dir()
    where = f"container of {options.image}" if options.engine == "docker" else "native, no container"
    print(f"{len(stacks)} stack(s), one fresh job each ({where})", flush=True)
    if options.many:
        report.print_header()
    results = []
    for index, stack in enumerate(stacks):
        try:
            results.append(run_stack(stack, index, options, limits))
        except (RuntimeError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        if options.many:
            report.print_row(results[-1])
        elif results[-1].answers:
            report.print_pages(results[-1])
        for finding in results[-1].findings:
            if finding.level != "pass" or not options.many:
                print(finding)
    good = all(result.passed for result in results)
    if options.truth:
        findings = score(results, options.truth, options.output)
        print(*findings, sep="\n", end="\n" if findings else "")
        good = good and all(finding.level != "fail" for finding in findings)
    passes = sum(result.passed for result in results)
    where = os.path.relpath(options.output)
    print(f"{passes} of {len(results)} stacks passed every check; answers and logs are in {where}")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
