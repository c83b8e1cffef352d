"""Fuzz with atheris: `python -m test.fuzz [TARGET ...] [--seconds 120] [--runs N] [--seed N] [--corpus DIR]`.

Each target runs in a process of its own for its share of the seconds, or until it has seen N inputs. What it finds is
kept in test/fuzz/regressions/TARGET, which the ordinary tests replay. Ends with a table, and with exit code 1 after a
find: a crash, a wrong exit, an input that takes ten seconds of processor time, or memory beyond 3 GiB.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REGRESSIONS = Path(__file__).parent / "regressions"
NAMES = (
    "tiff",
    "mha",
    "image",
    "inputs",
    "manifest",
    "adapter-config",
    "adapter-tensors",
    "foreign-config",
    "foreign-tensors",
    "foreign-head",
    "foreign-pickle",
    "foreign-processor",
    "foreign-yaml",
    "tables",
    "detections",
    "objects",
    "crops",
    "shards",
    "requests",
)
SHARES = {"tiff": 8, "mha": 3, "image": 3}  # of the time; the others take one each
TIMEOUT, MEMORY = 120, 3072  # seconds on the wall and MiB of one input; the targets count processor time


def fuzz_here(name: str, flags: list[str]) -> None:
    """Fuzz one target in this process; does not return."""
    import atheris

    with atheris.instrument_imports(include=["inference", "training.adapters", "PIL"], enable_loader_override=False):
        from test.fuzz.targets import TARGETS
    target = TARGETS[name]
    corpus = Path(flags[0])
    corpus.mkdir(parents=True, exist_ok=True)
    for seed, content in target.seeds().items():
        (corpus / f"seed-{seed}").write_bytes(content)
    words = corpus.with_suffix(".dict")
    words.write_text("".join(f'"{word}"\n' for word in target.words))
    flags = [*flags, f"-dict={words}"] if target.words else flags
    own = target.mutate

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        return own(data, largest, seed) if own and seed % 2 else atheris.Mutate(data, largest)

    atheris.Setup(["fuzz", *flags], target.run, **({"custom_mutator": mutate} if own else {}))
    atheris.Fuzz()


def fuzz(name: str, seconds: int, runs: int, seed: int, corpus: Path) -> tuple[dict[str, int], bool]:
    """Fuzz one target in a new process; libFuzzer's figures, and whether all went well."""
    found = REGRESSIONS / name
    found.mkdir(parents=True, exist_ok=True)
    flags = [
        str(corpus / name),
        f"-artifact_prefix={found}/",
        f"-timeout={TIMEOUT}",
        f"-rss_limit_mb={MEMORY}",
        f"-max_total_time={seconds}",
        f"-runs={runs}",
        f"-seed={seed}",
        "-print_final_stats=1",
        "-max_len=65536",
        "-len_control=0",
    ]
    command = [sys.executable, "-m", "test.fuzz", "--here", name, *flags]
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as folder:  # libFuzzer ends without cleaning up
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": folder})
    if done.returncode:
        print(done.stdout[-1500:])
    if not any(found.iterdir()):
        found.rmdir()
    return {key: int(value) for key, value in re.findall(r"stat::(\w+):\s+(\d+)", done.stderr)}, done.returncode == 0


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--here"]:
        fuzz_here(arguments[1], arguments[2:])
    parser = argparse.ArgumentParser(prog="python -m test.fuzz", description="Fuzz what reads others' files.")
    parser.add_argument("targets", nargs="*", choices=[*NAMES, []], metavar="TARGET", help=", ".join(NAMES))
    parser.add_argument("--seconds", type=int, default=120, help="for all targets together (default 120)")
    parser.add_argument("--runs", type=int, default=-1, help="end a target after this many inputs")
    parser.add_argument("--seed", type=int, default=0, help="of the alterations (default 0: another one each time)")
    parser.add_argument("--corpus", type=Path, help="keep what is learned here, and start from it")
    options = parser.parse_args(arguments)
    if not importlib.util.find_spec("atheris"):
        advice = "run ./build.sh --engine native --requirements requirements/dev.txt"
        print(f"atheris is not installed; {advice}", file=sys.stderr)
        return 2
    names = options.targets or list(NAMES)
    shares = {name: SHARES.get(name, 1) for name in names}
    corpus = options.corpus or Path(tempfile.mkdtemp(prefix="corpus-"))
    print(f"{'target':16} {'inputs':>9} {'a second':>9} {'slowest s':>9} {'MiB':>6}", flush=True)
    total, well = 0, True
    for name in names:
        seconds = max(5, options.seconds * shares[name] // sum(shares.values()))
        figures, ended = fuzz(name, seconds, options.runs, options.seed, corpus)
        get = figures.get
        count = get("number_of_executed_units", 0)
        print(
            f"{name:16} {count:9,} {get('average_exec_per_sec', 0):9,} {get('slowest_unit_time_sec', 0):9} "
            f"{get('peak_rss_mb', 0):6}{'' if ended else '  FOUND, see above'}",
            flush=True,
        )
        total, well = total + count, well and ended
    print(f"{'all':16} {total:9,}")
    if options.corpus is None:
        shutil.rmtree(corpus)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
