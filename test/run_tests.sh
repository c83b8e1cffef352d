#!/usr/bin/env bash
# Sets up .venv with everything and runs all checks and tests; further arguments go to pytest (e.g. -k stack).
# Where a Docker engine answers, the image is built first and tested too; else those tests are skipped, or with
# REQUIRE_DOCKER=1 fail.
# On a bare Debian machine release/engine.sh start brings an engine up.
set -euo pipefail
cd "$(dirname "$0")/.."
./build.sh --engine native --requirements requirements/dev.txt
export PATH="$PWD/.venv/bin:$PATH"

if python -c 'import sys; from test.harness.engines import docker; sys.exit(docker() is None)'; then
    echo "building the image (log: test/output/build.log)"
    mkdir -p test/output
    ./build.sh --engine docker >test/output/build.log 2>&1 || { tail -n 30 test/output/build.log >&2; exit 1; }
    sed -n '/^layers of/,$p' test/output/build.log
elif [ -n "${REQUIRE_DOCKER:-}" ]; then
    echo "run_tests.sh: REQUIRE_DOCKER is set, and no Docker engine answers; see release/engine.sh" >&2
    exit 1
fi

folders=()
for folder in inference training release test benchmarks; do
    if compgen -G "$folder/*.py" >/dev/null; then folders+=("$folder"); fi
done
status=0
ruff check "${folders[@]}" || status=1
ruff format --check "${folders[@]}" || status=1
mypy "${folders[@]/test/test/harness}" || status=1 # the harness is a program; tests themselves need no types
shellcheck ./*.sh .ci/run test/*.sh requirements/*.sh || status=1

# two workers, a file at a time and each with one thread; the floor under coverage holds only where no tests were chosen
floor=()
for word in "$@"; do
    case $word in -k* | -m* | --lf | --ff | --co | test/* | *.py*) floor=(--cov-fail-under=0) ;; esac
done
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov "${floor[@]}" "$@" || status=$?
[ "$status" = 0 ] || echo "run_tests.sh: failed; see ruff, mypy, shellcheck or pytest above" >&2
exit "$status"
