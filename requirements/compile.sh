#!/usr/bin/env bash
# Pins every requirement with its hashes for linux x86_64 and Python 3.11. What is pinned stays, without --upgrade.
set -euo pipefail
cd "$(dirname "$0")/.."
compile() { # the files agree with each other because each takes the ones before as its constraints
    uv pip compile "requirements/$1.in" --output-file "$2" --quiet --generate-hashes --no-strip-extras \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --no-emit-index-url --no-emit-find-links --custom-compile-command "requirements/compile.sh [--upgrade]" "${@:3}"
}
compile job requirements/job.txt "$@" # what the image installs
compile project requirements.txt "$@"
for name in ray slides dev; do compile "$name" "requirements/$name.txt" "$@"; done
compile bases requirements/bases.txt --no-deps "$@"

# the platform's own entry shim; see requirements/shim.in
compile shim requirements/shim.txt "$@"
sum=16ba40dde975632b7d8588711147074d849cf2b9b285dfaedc37ce1a82bb91ba
echo "sagemaker-shim==0.8.3 --hash=sha256:$sum" >>requirements/shim.txt
