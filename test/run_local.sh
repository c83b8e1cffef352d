#!/usr/bin/env bash
# Runs the algorithm on this machine as Grand Challenge would: builds what is missing, runs each stack, checks, scores.
#   ./test/run_local.sh [--input STACK_OR_FOLDER] [--truth ground_truth.json] [--weights DIR] [--strict] ...; see --help
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
PYTHONPATH=$PWD exec "$python" -m test.harness "$@"
