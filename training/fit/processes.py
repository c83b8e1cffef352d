"""Several processes for one run: folds side by side, one main process that owns the run folder, and no orphans."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate.utils import broadcast_object_list

from inference.errors import UserError
from inference.progress import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

PR_SET_PDEATHSIG = 1  # prctl(2)
T = TypeVar("T")


def die_with_parent() -> None:
    """Have the kernel kill this process when its launcher dies, even by kill -9. Does nothing except on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # checkpoints are replaced atomically


def say(accelerator: Accelerator, line: str) -> None:
    """Print once; accelerator.print would print once per machine."""
    if accelerator.is_main_process:
        print(line, flush=True)


def progress(work: Iterable[T], accelerator: Accelerator, unit: str, total: int) -> Iterator[T]:
    """`work`, with what the main process says of it. unit: such as "steps of fold 0"."""
    if not accelerator.is_main_process:
        yield from work
        return
    with Progress(total, unit, rate=unit.partition(" ")[0]) as shown:
        for done, piece in enumerate(work):
            shown.show(done, done, done)
            yield piece


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run `work` in the main process and return its result in every process; a UserError there ends all of them.

    Only one process reads and writes the run folder this way: on a shared file system others may see changes late.
    """
    outcome: list[object] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = str(error)
    value, message = broadcast_object_list(outcome)
    if message:
        raise UserError(message) if accelerator.is_main_process else SystemExit(1)
    return value


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; [] without a GPU."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(n) for n in range(count)]


def fit_in_parallel(numbers: Sequence[int], at_once: int, arguments: Sequence[str]) -> None:
    """Run `python -m training fit ARGUMENTS --fold NUMBER` for each of `numbers`, `at_once` at a time.

    Each gets a GPU of its own as far as they go round, and an equal share of the CPU threads. A fold that fails, SIGINT
    or SIGTERM stops all of them and raises UserError; each keeps its last epoch's checkpoint.
    """
    asyncio.run(_fit_all(numbers, min(at_once, len(numbers)), arguments))


async def _fit_all(numbers: Sequence[int], at_once: int, arguments: Sequence[str]) -> None:
    threads, devices = max(1, torch.get_num_threads() // at_once), gpus()
    slots: asyncio.Queue[str] = asyncio.Queue()
    for n in range(at_once):
        slots.put_nowait(devices[n % len(devices)] if devices else "")
    devices_used = f"GPUs {', '.join(devices[:at_once])}" if devices else "the CPU"
    print(f"{at_once} folds at once on {devices_used}, {threads} CPU threads each", flush=True)
    stopped_by: list[str] = []
    this, loop = asyncio.current_task(), asyncio.get_running_loop()

    def stop(received: signal.Signals) -> None:
        stopped_by.append(received.name)
        this.cancel()  # type: ignore[union-attr]

    for each in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(each, stop, each)
    try:
        async with asyncio.TaskGroup() as group:  # one failure cancels the others
            for number in numbers:
                group.create_task(_fit_one(number, slots, threads, arguments))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    except asyncio.CancelledError:
        raise UserError(f"{stopped_by[0]} stopped all folds; run the same command to resume") from None


async def _fit_one(number: int, slots: asyncio.Queue[str], threads: int, arguments: Sequence[str]) -> None:
    gpu = await slots.get()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        __name__.removesuffix(".fit.processes"),
        "fit",
        *arguments,
        "--fold",
        str(number),
        "--parent",
        str(os.getpid()),
        env=environment | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}),
        limit=2**20,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        process_group=0,  # so that Ctrl-C reaches only the parent, which stops the folds
    )
    try:
        async for raw in process.stdout:  # type: ignore[union-attr]
            line = raw.decode(errors="replace").rstrip()
            print(line if line.startswith(f"fold {number}") else f"fold {number}: {line}", flush=True)
        code = await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    if code:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}, see above"
        raise UserError(f"fold {number} {how}; the other folds were stopped; run the same command to resume")
    slots.put_nowait(gpu)
