"""Runs stacks through the algorithm as the platform would, checks and scores the answers (test/run_local.sh)."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

from inference.checks import Check, passed
from inference.manifest import MODEL_TARBALL
from test.harness import engines, environments, images, layout, network, page, readout, report, s3, sagemaker, served

ROOT = engines.ROOT
SAMPLE = ROOT / "test/sample"
OUR_IMAGE = os.environ.get("IMAGE", "midog-lora")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options; the defaults are what the platform gives a job of this track, as far as that is known."""
    parser = argparse.ArgumentParser(prog="test/run_local.sh", description=__doc__)
    add = parser.add_argument
    add("--input", type=Path, default=SAMPLE / "stack_0.tiff", metavar="STACK_OR_FOLDER", help="default: the sample")
    add("--output", type=Path, default=ROOT / "test/output", metavar="DIR", help="default: test/output")
    add("--weights", type=Path, help="ensemble folder, or model tarball, in place of the bundled ensemble")
    add("--as", choices=("mha",), dest="form", help="also as SimpleITK writes it; the answers must be the same")
    add("--truth", type=Path, metavar="ground_truth.json", help="score the answers; writes metrics.json")
    add("--engine", choices=("docker", "native"), help="default: docker where an engine answers")
    add("--image", help="any image, which is run as it is; default: our own, tagged $IMAGE or midog-lora")
    add("--api", choices=("exec", "invoke"), help="one job per start, or a server for all; default: the image's label")
    add("--shim", action="store_true", help="with the platform's own entry shim and image reader; needs docker")
    add("--no-build", action="store_true", help="run what is there, stale or not")
    add("--strict", action="store_true", help="read-only root, no capabilities, no new privileges, 256 processes")
    add("--gpus", choices=("auto", "all", "none"), default="auto", help="auto: one, with a T4's memory")
    add("--memory", type=int, default=16, metavar="GIB", help="of the machine; data memory is 1 GiB less")
    add("--shm-size", default="8g", help="the organisers' own re-run gave 1g")
    add("--time-limit", type=float, default=300, metavar="SECONDS", help="a phase may set 300 and more")
    add("--inputs-json", choices=(*layout.VARIANTS, "rotate"), default="rotate", help="form of inputs.json")
    add("--seed", type=int, default=0, help="of the random file names")
    return parser.parse_args(arguments)


def start_again(arguments: list[str] | None, needs: tuple[str, ...]) -> None:
    """Resume in a Python that can write the report, once the algorithm is built: .venv, else one made for the report.

    RuntimeError where none can be made. Called from another program (arguments given) it does nothing.
    """
    if arguments is not None or all(map(importlib.util.find_spec, needs)):
        return
    python = ROOT / ".venv/bin/python"
    if not python.exists():
        python = environments.make(ROOT / ".cache/report", page.pinned(ROOT / "requirements.txt"), "the report")
    if Path(sys.executable) == python:  # that Python lacks the packages too
        raise RuntimeError(f"not all of {needs} are installed in {python}; run ./build.sh --engine native")
    os.execv(python, [str(python), "-m", "test.harness", *sys.argv[1:], "--no-build"])


def run_stacks(
    stacks: list[tuple[int, Path]],
    options: argparse.Namespace,
    limits: engines.Limits,
    bucket: s3.Bucket | None,
    details: bool = True,
) -> list[report.Result]:
    """Runs stacks, each with its number, in one fresh container (or natively); keeps answers and logs.

    More than one stack is for a server, with options.api "invoke", or for the published shim.
    details: as in `engines.run_docker`.
    """
    with tempfile.TemporaryDirectory(prefix="harness-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        pks, pages = [], []
        for place, (index, stack) in enumerate(stacks):
            variant = options.inputs_json if options.inputs_json != "rotate" else layout.VARIANTS[index % 5]
            pages.append(layout.count_pages(stack))
            rng = Random(f"{options.seed} {index}")
            pks.append(layout.write_input(stack, folder / str(place) / "input", variant, rng))
        if bucket is not None:
            runs = sagemaker.run(options.image, folder, pks, options.weights, limits, bucket, options.api)
        elif options.api == "invoke" and options.engine == "docker":
            runs = served.run_docker(options.image, folder, pks, options.weights, limits)
        elif options.api == "invoke":
            runs = served.run_native(folder, pks, options.weights, limits)
        elif options.engine == "docker":
            runs = [engines.run_docker(options.image, folder / "0", pks[0], options.weights, limits, details)]
        else:
            runs = [engines.run_native(folder / "0", pks[0], options.weights, limits)]
        results = []
        for place, ((_, stack), run) in enumerate(zip(stacks, runs, strict=True)):
            answers, findings = readout.judge(run, pages[place])
            keep(folder / str(place), run, options.kept[stack])
            results.append(report.Result(stack, pages[place], run, answers, findings))
    return results


def containers(numbered: list[tuple[int, Path]], options: argparse.Namespace) -> list[list[tuple[int, Path]]]:
    """Stacks by the container that they run in: one for each, but one for all with a server or the published shim."""
    return [numbered] if options.api == "invoke" or options.shim else [[entry] for entry in numbered]


@contextlib.contextmanager
def given_model(weights: Path | None) -> Iterator[list[str]]:
    """Options of `docker run` that give a container the model of --weights, a folder or a tarball."""
    with tempfile.TemporaryDirectory(prefix="harness-model-") as name:
        model = weights
        if weights is not None and weights.is_file():
            model = Path(name)
            with tarfile.open(weights) as archive:
                archive.extractall(model, filter="data")
            model.chmod(0o755)  # the image's user is another
        yield [] if model is None else ["--volume", f"{model.resolve()}:{MODEL_TARBALL}:ro"]


def start_exactly(first: tuple[int, Path], options: argparse.Namespace, limits: engines.Limits) -> list[Check]:
    """The image's own command on the first stack, as the platform starts it: later jobs get --details as well.

    A server never gets --details; it is called from another container instead.
    """
    if options.api != "exec":
        with given_model(options.weights) as volume:
            return [network.check_health(options.image, [*engines.limit_options(limits), *volume])]
    [result] = run_stacks([first], options, limits, None, details=False)
    exactly = Check("PASS", f"the image's own command, with nothing added, answers {first[1].name}")
    return [exactly] if result.passed else result.findings


def run_copies(
    originals: list[report.Result], options: argparse.Namespace, limits: engines.Limits, bucket: s3.Bucket | None
) -> list[Check]:
    """Runs the stacks as .mha, one stack in every form and many in turn, and compares their answers with the TIFF's."""
    from test.harness import converted  # SimpleITK

    with tempfile.TemporaryDirectory(prefix="harness-") as name:
        copies: dict[Path, report.Result] = {}
        for index, original in enumerate(originals):
            forms = converted.FORMS if len(originals) == 1 else [converted.FORMS[index % len(converted.FORMS)]]
            for form in forms:
                copy = converted.write_metaimage(original.stack, Path(name), form)
                copies[copy] = original
                options.kept[copy] = options.output / copy.name
        numbered = list(enumerate(copies))
        findings = []
        for batch in containers(numbered, options):
            for result in run_stacks(batch, options, limits, bucket):
                same = result.answers is not None and result.answers == copies[result.stack].answers
                findings += result.findings if not result.passed else []
                name_of = copies[result.stack].stack.name
                findings.append(
                    Check("PASS", f"{result.stack.name}: the answers of {name_of}")
                    if same
                    else Check("FAIL", f"{result.stack.name}: other answers than {name_of}, or none")
                )
                print(findings[-1], flush=True)
        return findings


def keep(folder: Path, run: engines.Run, target: Path) -> None:
    """Copies what a job left into the output folder, replacing what an earlier job left there."""
    target.mkdir(parents=True, exist_ok=True)
    for file in (layout.ANSWER, "stdout.log", "stderr.log", "details.json"):
        (target / file).unlink(missing_ok=True)
        found = folder / file if file != layout.ANSWER else run.output / file
        if found.exists():
            shutil.copyfile(found, target / file)


def score(results: list[report.Result], truth: Path, output: Path) -> list[Check]:
    """Scores the answers as the official evaluator does; as there, one failed job fails the whole evaluation."""
    from test.harness import scoring  # numpy

    failed = [result.stack.name for result in results if result.answers is None]
    if failed:
        message = f"not scored: the algorithm failed on {len(failed)} of {len(results)} stacks, first {failed[0]}"
        return [Check("FAIL", message, "one failed job fails the whole evaluation")]
    try:
        metrics = scoring.score(
            {result.stack.name: result.answers or [] for result in results}, scoring.read_truth(truth)
        )
    except ValueError as error:
        return [Check("FAIL", f"the evaluator stops: {error}", f"check {truth}")]
    scoring.write(metrics, output / "metrics.json")
    report.print_metrics(metrics)
    warnings = [Check("WARN", text) for text in metrics["warnings"]]
    if any(value is None for name, value in metrics["aggregates"].items() if name.startswith("overall_")):
        message = "the evaluator stops: the crops are all of one class, and it divides by the number of the other"
        return [*warnings, Check("FAIL", message, "score stacks that hold both classes")]
    return warnings


def choose_api(options: argparse.Namespace) -> str:
    """exec or invoke, which an image's label decides. RuntimeError where the label and --api differ."""
    if options.engine == "native":
        return options.api or "exec"
    label = served.api_method(options.image)
    if options.api and options.api != label:
        fix = f"build it with ./build.sh --api {options.api}, or leave --api out"
        raise RuntimeError(f"{options.image} is labelled {label}, and the platform follows the label; {fix}")
    return label


def print_result(result: report.Result, many: bool, strict: bool) -> None:
    """A row of the table, or the table of the only stack, and what was found; strict: and what others see of it."""
    if many:
        report.print_row(result)
    elif result.answers:
        report.print_pages(result)
    for finding in [*result.findings, *(report.judge_shown(result) if strict else [])]:
        if finding.level != "PASS" or not many:
            print(finding, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 when every check of every stack passed, 1 when one failed, 2 for wrong options."""
    options = parse(arguments)
    options.engine = options.engine or ("docker" if engines.docker() else "native")
    limits = engines.Limits(
        options.memory, options.time_limit, options.shm_size, gpus=options.gpus, strict=options.strict
    )
    try:
        if options.engine == "docker" and not engines.docker():
            raise RuntimeError("--engine docker: no engine answers; start one or use --engine native")
        if options.shim and (options.engine == "native" or options.strict):
            raise RuntimeError("--shim runs the platform's own shim in a container; it needs docker and no --strict")
        stacks = layout.find_stacks(options.input)
        stems = Counter(stack.stem for stack in stacks)  # stack_0.tif and stack_0.tiff keep their suffixes
        names = {stack: stack.stem if stems[stack.stem] == 1 else stack.name for stack in stacks}
        options.many = options.input.is_dir()
        options.kept = {
            stack: options.output / name if options.many else options.output for stack, name in names.items()
        }
        for path in (options.weights, options.truth):
            if path is not None and not path.exists():
                raise FileNotFoundError(f"{path} does not exist")
        if not (options.no_build or options.image):
            images.build(options.engine, OUR_IMAGE, options.api)
        start_again(arguments, (*page.NEEDS, "SimpleITK") if options.form else page.NEEDS)
        options.image = options.image or OUR_IMAGE
        options.api = choose_api(options)
        if options.shim:
            sagemaker.install()
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    options.weights = options.weights and options.weights.resolve()
    where = f"container of {options.image}" if options.engine == "docker" else "native, no container"
    how = "one server for all" if options.api == "invoke" else "one fresh job each"
    how = "one job each, in one container" if options.shim and options.api == "exec" else how
    print(f"{len(stacks)} stack(s), {how} ({where}{', the published shim' if options.shim else ''})", flush=True)
    numbered = list(enumerate(stacks))
    results: list[report.Result] = []
    before: list[Check] = []
    try:
        if options.engine == "docker":
            before = images.check(options.image)
            before += sagemaker.check_upload(stacks) if options.shim else start_exactly(numbered[0], options, limits)
            print(*before, sep="\n", flush=True)
        with s3.s3_server() if options.shim else contextlib.nullcontext() as bucket:
            if options.many:
                report.print_header()
            for batch in containers(numbered, options):
                for result in run_stacks(batch, options, limits, bucket):
                    results.append(result)
                    print_result(result, options.many, options.strict)
            same = run_copies(results, options, limits, bucket) if options.form else []
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print("".join(f"{finding}\n" for finding in report.judge_others(results)), end="", flush=True)
    good = all(result.passed for result in results) and passed([*before, *same])
    if options.truth:
        findings = score(results, options.truth, options.output)
        print(*findings, sep="\n", end="\n" if findings else "")
        good = good and passed(findings)
    ensemble = options.weights or (ROOT / images.bundled(OUR_IMAGE) if options.image == OUR_IMAGE else None)
    said = page.write_page(results, options.truth, ensemble, options.output / "report.html")
    passes = sum(result.passed for result in results)
    where = os.path.relpath(options.output)
    print(f"{passes} of {len(results)} stacks passed every check; answers and logs are in {where}")
    print(said)  # last: the file to open
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
