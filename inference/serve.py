"""`python -m inference serve`: load the ensemble once and answer HTTP requests, the platform's `invoke` among them.

    GET  /health   200 once the ensemble is loaded and has computed; until then the port is closed
    POST /invoke   one task, /input to /output as in a job: 201, or 500 and one line on stderr if it fails
    POST /score    crops in the request, probabilities in the response: see inference/score_request.py
    GET  /         which ensemble answers, and what it expects; GET /openapi.json describes all of these

Tasks run one at a time in one thread, however many are requested at once. Nothing is kept between tasks: the previous
answers are removed first, and the input is read again. SIGTERM ends the server with exit code 0 after the current task.
Source: the platform's entry shim (sagemaker-shim 0.7 and later), which calls 127.0.0.1:4743 without a body.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import score_request
from .commandline import add_ensemble_options
from .contract import remove_answers
from .exits import log, stderr_in_log
from .job import Clock, answer_stack
from .manifest import default_ensemble
from .server import ScoreEndpoint, Server

if TYPE_CHECKING:
    from .ensemble import Ensemble

PORT = 4743  # the platform's


def load(weights: Path, device: str, precision: str) -> Ensemble:
    """Check and load the ensemble, and warm it up with one grey crop."""
    import numpy as np

    from .ensemble import Ensemble

    ensemble = Ensemble.load(weights, device, precision)
    ensemble.predict([np.full((64, 64, 3), 128, np.uint8)])
    return ensemble


def run_task(ensemble: Ensemble, input_dir: Path, output_dir: Path) -> dict[str, Any]:
    """Answer the stack in `input_dir`; returns the number of pages and the seconds. UserError as in a job."""
    clock = Clock(time.perf_counter())
    remove_answers(output_dir)
    _, prediction = answer_stack(input_dir, output_dir, lambda: ensemble, clock)
    return {"pages": len(prediction.p_atypical), "seconds": round(sum(clock.seconds.values()), 3)}


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", type=Path, default=Path("/input"), metavar="DIR", help="input of every task (default /input)")
    add("--output", type=Path, default=Path("/output"), metavar="DIR", help="output of every task (default /output)")
    add_ensemble_options(parser)
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1; in the image 0.0.0.0)")
    add("--port", type=int, default=PORT, help=f"port to listen on (default {PORT}, the platform's)")


def run(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT; UserError if the ensemble cannot be loaded or the port is taken."""
    for number in (signal.SIGTERM, signal.SIGINT):  # while it loads there is nothing to finish
        signal.signal(number, lambda *_: os._exit(0))
    start = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:  # PyTorch ties its worker threads to the thread that first computed
        with stderr_in_log():
            ensemble = pool.submit(
                load, options.weights or default_ensemble(), options.device, options.precision
            ).result()
        scorer = ScoreEndpoint(score_request.about(ensemble), partial(score_request.score, ensemble))
        task = partial(run_task, ensemble, options.input, options.output)
        server = Server((options.host, options.port), pool, task, scorer)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, server.stop)
        log(f"ensemble {ensemble.manifest.name}, device {ensemble.device.type}, precision {ensemble.precision}")
        log(f"ready on {options.host}:{server.server_port} after {time.perf_counter() - start:.1f} seconds")
        server.serve_forever(poll_interval=0.1)
        server.finish()
    log("stopped")
