"""`python -m inference cluster PATH... --output DIR`: scores crops on a Ray cluster, for 10^5 of them and more.

Exit codes are those of `score`.
"""

from __future__ import annotations

import argparse

from ..commandline import add_cluster_options, add_ensemble_options, count, require
from ..hub import local_folder
from ..manifest import default_ensemble

SHARD = 4096  # crops: seconds of work for a GPU


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="folder, .parquet, .tar or image file, URI of a store, or CSV table")
    add("--output", required=True, metavar="DIR", help="folder or URI for the answers; the same command resumes there")
    add_cluster_options(parser, "local")
    add("--shard", type=count, default=SHARD, metavar="CROPS", help=f"what a worker takes at a time (default {SHARD})")
    add("--image", metavar="COLUMN", help="of Parquet files, the column with image bytes (default: the only one)")
    add_ensemble_options(parser, hub=True)


def run(options: argparse.Namespace) -> int:
    """Exit code; UserError where nothing can be done."""
    require("ray", "ray", "pyarrow")
    from . import driver

    options.weights = local_folder(options.weights or default_ensemble())
    return driver.run(options)
