#!/usr/bin/env bash
# Writes what is uploaded to Grand Challenge: the image (NAME.tar.gz) and its ensemble as a model (NAME-model.tar.gz).
# Beside them, for whoever runs or checks them: the image's bill of materials (NAME.cdx.json) and all sums (SHA256SUMS).
#   ./export.sh [--image TAG] [--ensemble DIR] [--output DIR] [--without-base] [--only image|model]
# What was written is checked as the platform checks it (release/preflight.py); a failed check is a failed export.
# --ensemble      default: the one in the image. With --only model any, for an upload that is to override the image's
# --without-base  leaves the bases out of the model tarball, for an image that already holds the same ones
# --only          writes one of the two
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
fail() { echo "export.sh: $*" >&2; exit 1; }

image=${IMAGE:-midog-lora} ensemble='' output=$here/export only='' model_options=()
while [ $# -gt 0 ]; do
    case $1 in
        --image | --ensemble | --output | --only) [ -n "${2:-}" ] || fail "$1 has no value; see --help" ;;
    esac
    case $1 in
        --image) image=$2; shift 2 ;;
        --ensemble) ensemble=${2%/}; shift 2 ;;
        --output) output=$2; shift 2 ;;
        --only) only=$2; shift 2 ;;
        --without-base) model_options+=(--without-base); shift ;;
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit ;;
        *) fail "unknown option $1; see --help" ;;
    esac
done
case $only in image | model | '') ;; *) fail "--only $only; expected image or model" ;; esac
python=$here/.venv/bin/python
[ -x "$python" ] || python=python3
export PYTHONPATH=$here

docker=$("$here/release/engine.sh" client) || true
if [ "$only" = model ]; then
    [ -n "$docker" ] && "$docker" image inspect "$image" >/dev/null 2>&1 || image='' # the folder alone decides then
elif [ -z "$docker" ]; then
    [ -z "$only" ] || fail "no Docker engine answers, so there is no image to save; run this where the image was built"
    image=''
else
    "$docker" image inspect "$image" >/dev/null 2>&1 || fail "no image $image; build it with ./build.sh"
fi

# Which ensemble: an uploaded model replaces the image's own, so a tarball of another beside the image is an accident.
bundled=''
[ -z "$image" ] || bundled=$("$docker" image inspect --format '{{index .Config.Labels "midog-lora.ensemble"}}' "$image")
case $bundled in '' | '<no value>') bundled='' ;; /*) ;; *) bundled=$here/$bundled ;; esac
if [ -z "$ensemble" ] && [ "$only" != image ]; then
    [ -z "$image" ] || [ -n "$bundled" ] ||
        fail "$image does not say which ensemble it holds; name it with --ensemble, or use --only image"
    ensemble=${bundled:-$here/weights/default}
fi
if [ -n "$image" ] && [ -z "$only" ]; then
    manifest=/opt/app/weights/default/ensemble.json
    inside=$("$docker" run --rm --network none --entrypoint sha256sum "$image" "$manifest") ||
        fail "$image holds no ensemble; export one of the two with --only"
    [ -f "$ensemble/ensemble.json" ] ||
        fail "no $ensemble/ensemble.json, which $image was built with; name another with --ensemble --only model"
    [ "${inside%% *}" = "$(sha256sum <"$ensemble/ensemble.json" | cut -d ' ' -f 1)" ] ||
        fail "$image holds another ensemble than $ensemble; run ./build.sh --ensemble DIR, or export one with --only"
fi

mkdir -p "$output"
rm -f "$output/SHA256SUMS" # of what is replaced here
trap 'rm -f "$output"/*.partial' EXIT
describe() { # size of a file, and what the platform would say of it
    wc -c <"$1" | awk '{printf "  %.3f GB (%s bytes), ", $1 / 1e9, $1}'
    echo "SHA-256 $(sha256sum "$1" | cut -d ' ' -f 1)"
    "$python" -m release.preflight "$1" || {
        rm -f "$1"
        fail "$(basename "$1") would be refused, or fail on the platform; see the lines above; it was removed"
    }
}

export_image() {
    local target size name=${image##*/} # a registry may have a port
    name=${name%%[:@]*}
    # one tag: the platform refuses an archive with several images. gzip: it cannot read zstd
    target=$output/$name.tar.gz
    size=$("$docker" image inspect --format '{{.Size}}' "$image")
    echo "Saving $image, compressed on all cores; the time that is left is printed as it goes:"
    "$docker" save "$image" | "$python" -m release.compress --total "$size" >"$target.partial"
    mv "$target.partial" "$target"
    echo "Image:"
    describe "$target"
    case $("$docker" image inspect --format '{{index .Config.Labels "org.grand-challenge.api-method"}}' "$image") in
        *[Ii][Nn][Vv][Oo][Kk][Ee]*)
            echo "API: invoke: one server (port 4743) answers many tasks. The platform takes either;" \
                "the organisers' own re-run of a final phase started one program per stack" ;;
        *)
            echo "API: exec: one program start per stack, as in the organisers' re-run. The platform takes either;" \
                "the test script of newly generated example algorithms takes invoke only (./build.sh --api invoke)" ;;
    esac
    "$python" -m release.bom "$image" --docker "$docker" >"$output/$name.cdx.json.partial" || exit 1
    mv "$output/$name.cdx.json.partial" "$output/$name.cdx.json"
    echo "Bill of materials: $output/$name.cdx.json"
}

export_model() {
    local target
    target=$("$python" -m release.tarball "$ensemble" "$output" "${model_options[@]}") || exit 1
    echo "Model:"
    describe "$target"
}

[ "$only" = image ] || export_model
if [ "$only" != model ] && [ -n "$image" ]; then export_image; fi
[ -n "$image" ] || [ "$only" = model ] ||
    echo "Image: not written, for no Docker engine answers here. Build and export it on a machine with Docker."
(
    cd "$output" && shopt -s nullglob
    sha256sum ./*.tar.gz ./*.cdx.json | sed 's# \./# #' >SHA256SUMS.partial
    mv SHA256SUMS.partial SHA256SUMS
)
echo "Upload, at grand-challenge.org as a verified user:"
[ "$only" = model ] || cat <<'STEPS'
  - Your algorithm > Containers > Upload a container: the image. It is checked for minutes, and active in about twenty.
STEPS
[ "$only" = image ] || cat <<'STEPS'
  - For a new ensemble alone: Models > Upload a model: the model tarball. It is unpacked to /opt/ml/model and overrides
    the ensemble in the image, which is what a job uses without one. The same bytes are accepted only once, from anyone.
STEPS
cat <<'STEPS'
  - Try out algorithm: one of your own stacks; compare with ./test/run_local.sh.
  - The challenge > Submit: choose the phase and the algorithm.
STEPS
