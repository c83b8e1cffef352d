#!/usr/bin/env bash
# Writes what is uploaded to Grand Challenge: the image (NAME.tar.gz) and the ensemble as a model tarball (NAME-model.tar.gz).
#   ./export.sh [--image TAG] [--ensemble DIR] [--output DIR] [--without-base] [--only image|model]
# What was written is checked as the platform checks it (test/harness/preflight.py); a failed check is a failed export.
# --without-base  leaves the base out of the model tarball, for an image that already holds the same one
# --only          writes one of the two
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
fail() { echo "export.sh: $*" >&2; exit 1; }

image=${IMAGE:-midog-lora} ensemble=$here/weights/default output=$here/export only='' model_options=()
while [ $# -gt 0 ]; do
    case $1 in
        --image) image=${2:-}; shift 2 ;;
        --ensemble) ensemble=${2:-}; shift 2 ;;
        --output) output=${2:-}; shift 2 ;;
        --only) only=${2:-}; shift 2 ;;
        --without-base) model_options+=(--without-base); shift ;;
        -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit ;;
        *) fail "unknown option $1; see --help" ;;
    esac
done
case $only in image | model | '') ;; *) fail "--only $only; expected image or model" ;; esac
mkdir -p "$output"
python=$here/.venv/bin/python
[ -x "$python" ] || python=python3
export PYTHONPATH=$here

describe() { # size and SHA-256 of a file, and what the platform would say of it
    echo "  $(wc -c <"$1" | awk '{printf "%.3f GB (%s bytes)", $1 / 1e9, $1}'), SHA-256 $(sha256sum "$1" | cut -d ' ' -f 1)"
    "$python" -m test.harness.preflight "$1" || fail "$1 would be refused, or fail on the platform; see the lines above"
}

export_image() {
    local client docker='' target size
    for client in ${DOCKER:-/usr/bin/docker docker}; do
        if timeout 20 "$client" info >/dev/null 2>&1; then docker=$client; break; fi
    done
    if [ -z "$docker" ]; then
        [ -z "$only" ] || fail "no Docker engine answers, so there is no image to save; run this where the image was built"
        echo "Image: not written, for no Docker engine answers here. Build and export it on a machine with Docker."
        return
    fi
    "$docker" image inspect "$image" >/dev/null 2>&1 || fail "no image $image; build it with ./build.sh"
    # one tag: the platform refuses an archive with several images. gzip: it cannot read zstd
    target=$output/$(basename "${image%%:*}").tar.gz
    size=$("$docker" image inspect --format '{{.Size}}' "$image")
    echo "Saving $image, compressed on all cores (minutes):"
    "$docker" save "$image" | "$python" -m training.compress --total "$size" >"$target.partial"
    mv "$target.partial" "$target"
    echo "Image:"
    describe "$target"
}

export_model() {
    local target
    target=$("$python" -m training.tarball "$ensemble" "$output" "${model_options[@]}") || exit 1
    echo "Model:"
    describe "$target"
}

[ "$only" = image ] || export_model
[ "$only" = model ] || export_image
cat <<'STEPS'
Upload, at grand-challenge.org as a verified user:
  1. Your algorithm > Containers > Upload a container: the image. It is checked for minutes and activated in about twenty.
  2. For a new ensemble alone: Models > Upload a model: the model tarball. It is unpacked to /opt/ml/model and overrides
     the ensemble in the image, which is what a job uses without one. The same bytes are accepted only once, from anyone.
  3. Try out algorithm: one of your own stacks; compare with ./test/run_local.sh.
  4. The challenge > Submit: choose the phase and the algorithm; every stack starts a container of its own.
STEPS
