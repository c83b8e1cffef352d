#!/bin/sh
# The checks that need a GPU, in one command: ./test/run_gpu.sh
# Needs no network. Prints one table and runs the tests marked gpu; exits with a clear line where there is no GPU.
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m test.gpu "$@"
