#!/usr/bin/env bash
# Sets up .venv with everything and runs all checks and tests; further arguments go to pytest (e.g. -k stack, -m "not docker").
# Tests that need a Docker engine are skipped where none answers; test/engine.sh start brings one up on a bare Debian machine.
set -euo pipefail
cd "$(dirname "$0")/.."
./build.sh --engine native --requirements requirements-dev.txt
export PATH="$PWD/.venv/bin:$PATH"

folders=()
for folder in inference training test benchmarks; do
    if compgen -G "$folder/*.py" >/dev/null; then folders+=("$folder"); fi
done
status=0
ruff check "${folders[@]}" || status=1
ruff format --check "${folders[@]}" || status=1
mypy || status=1
python -m pytest "$@" test || status=$?
[ "$status" = 0 ] || echo "run_tests.sh: failed; see ruff, mypy or pytest above" >&2
exit "$status"
