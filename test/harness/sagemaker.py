"""Runs tasks with the platform's own entry shim (sagemaker-shim), and checks stacks with its own image reader (panimg).

Both are public packages; `install` puts them into .cache/shim. The shim is mounted into a container of the unchanged
image and gets its tasks from S3, which moto's server imitates on loopback. Its results are read back into the
light harness's `Run`, so that the same rules judge both.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import secrets
import subprocess
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from inference.checks import Check
from test.harness import engines, environments, gpus, layout
from test.harness.s3 import BUCKET, HOME, Bucket

PACKAGES = HOME / "lib/python3.11/site-packages"
REQUIREMENTS = engines.ROOT / "requirements/shim.txt"


def install() -> None:
    """Makes .cache/shim with Python 3.11, once for each requirements/shim.txt. RuntimeError where it cannot be made."""
    environments.make(HOME, REQUIREMENTS.read_text(), "the platform's own shim", "--ignore-requires-python")


def run(
    image: str,
    folder: Path,
    pks: list[str],
    weights: Path | None,
    limits: engines.Limits,
    bucket: Bucket,
    api: str = "exec",
) -> list[engines.Run]:
    """Hands the tasks folder/0/input, folder/1/input, ... to the shim in one fresh container of `image`.

    The container has the host's network, because S3 is there; everything else is as in the light harness.

    Args:
        pks: one for each task, as its folder is named in the container.
        api: exec or invoke, as the image's label says.
    Returns: one Run a task, in order; those after a failed one were not run. RuntimeError when there is no such image.
    """
    about = engines.inspect(image)
    if about is None:
        raise RuntimeError(f"no image {image}; build it with ./build.sh")
    config, prefix = about["Config"], f"runs/{uuid.uuid4()}"
    tasks = [upload_task(folder / str(index), pk, prefix, limits, bucket) for index, pk in enumerate(pks)]
    component = {
        "CMD_B64J": encode(config.get("Cmd")),
        "ENTRYPOINT_B64J": encode(config.get("Entrypoint")),
        "USER": config.get("User") or "",
        "API_METHOD": api,
        "MAX_MEMORY_MB": str(limits.data_bytes // 2**20),
        "SIGNING_KEY_HEX": secrets.token_hex(32),
        "RUNTIME_OUTPUT_BUCKET_NAME": BUCKET,
        "RUNTIME_OUTPUT_PREFIX": f"{prefix}/runtime/",
        "START_AND_HEALTH_TIMEOUT_SECONDS": str(round(limits.start_seconds)),
        "HEALTH_CHECK_CALL_TIMEOUT_SECONDS": "2",  # also its pause between two calls; 10 on the platform
    }
    if weights is not None:
        component["MODEL"] = bucket.put(f"{prefix}/model.tar.gz", model_tarball(weights, folder))
    env = {f"GRAND_CHALLENGE_COMPONENT_{key}": value for key, value in component.items()}
    env |= engines.PLATFORM_ENV | gpus.environment(limits.gpus)
    env |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "eu-central-1"}
    env |= {"AWS_S3_ENDPOINT_URL": bucket.url, "PYTHONCOERCECLOCALE": "0"}
    image_env = dict(line.split("=", 1) for line in config.get("Env") or [])
    if "LD_LIBRARY_PATH" in image_env:  # the platform's single binary saves it under this name
        env["LD_LIBRARY_PATH_ORIG"] = image_env["LD_LIBRARY_PATH"]
    name = f"harness-{uuid.uuid4()}"
    options = ["--rm", "--name", name, "--network", "host", "--user", "0", "--entrypoint", "python3"]
    options += ["--tmpfs", "/tmp:rw,exec,mode=0777", *engines.limit_options(limits)]
    options += [word for key, value in env.items() for word in ("--env", f"{key}={value}")]
    mounts = {
        PACKAGES: "packages",
        Path(__file__).with_name("sagemaker_start.py"): "start.py",
        host_tarfile(): "tarfile.py",
    }
    options += [f"--volume={source}:/platform/{target}:ro" for source, target in mounts.items()]
    file = bucket.put(f"{prefix}/invocation.json", json.dumps(tasks).encode())
    log = folder / "shim.log"
    wall, code, _ = engines.docker_run(
        [*options, image, "/platform/start.py", "invoke", "--file", file], name, limits, len(pks), log
    )
    setup = json.loads(bucket.get(f"{prefix}/runtime/.sagemaker_shim/runtime_setup_result.json") or b"{}")
    runs = [read_task(folder / str(index), task, pks[0], setup, log, code, bucket) for index, task in enumerate(tasks)]
    if wall > len(pks) * limits.seconds:  # SageMaker's clock runs from the shim's start to its end
        last = max((index for index, each in enumerate(runs) if not each.skipped), default=0)
        runs[last] = replace(runs[last], timed_out=True)
    rest = wall - sum(each.seconds for each in runs)
    return [replace(each, wall_seconds=each.seconds + (0 if i else rest)) for i, each in enumerate(runs)]


def encode(command: object) -> str:
    return base64.b64encode(json.dumps(command).encode()).decode()


def host_tarfile() -> Path:
    """tarfile.py of .cache/shim's Python, for images whose own lacks `filter="data"` (before 3.11.4)."""
    command = [str(HOME / "bin/python"), "-c", "import tarfile; print(tarfile.__file__)"]
    return Path(subprocess.check_output(command, text=True).strip())


def model_tarball(weights: Path, folder: Path) -> bytes:
    """The tarball's bytes; an ensemble folder is packed first."""
    if weights.is_file():
        return weights.read_bytes()
    subprocess.run(["tar", "-czf", folder / "model.tar.gz", "-C", weights, "."], check=True)
    return (folder / "model.tar.gz").read_bytes()


def upload_task(folder: Path, pk: str, prefix: str, limits: engines.Limits, bucket: Bucket) -> dict[str, Any]:
    """Uploads a task's input; returns its entry in invocation.json."""
    inputs = []
    for path in sorted(path for path in (folder / "input").rglob("*") if path.is_file()):
        place = path.relative_to(folder / "input").as_posix()
        key = f"{prefix}/{pk}/input/{place}"
        bucket.put(key, path.read_bytes())
        inputs.append({"relative_path": place, "bucket_name": BUCKET, "bucket_key": key})
    output = {"output_bucket_name": BUCKET, "output_prefix": f"{prefix}/{pk}/output/"}
    return {"pk": pk, "inputs": inputs, **output, "timeout": f"PT{limits.seconds:f}S"}


def read_task(
    folder: Path, task: dict[str, Any], first: str, setup: dict[str, Any], log: Path, code: int, bucket: Bucket
) -> engines.Run:
    """What the shim reported of a task, as a Run; its outputs and logs are written to the task's folder.

    What a server logged before its first task is counted as that task's; its pk is `first`.
    """
    streams = {"stdout": "", "stderr": ""}
    for line in (log.read_text(errors="replace") if log.exists() else "").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            if not entry["internal"] and (entry["task"] or first) == task["pk"]:
                streams[entry["source"]] += entry["log"] + "\n"
    result = json.loads(bucket.get(task["output_prefix"] + ".sagemaker_shim/inference_result.json") or b"null")
    error = result["user_safe_error_message"] if result else setup.get("user_safe_error_message")
    timed_out = bool(result) and "ime limit exceeded" in (error or "")
    skipped = result is None and not error and setup.get("return_code") == 0 and code == 0
    if error:  # the shim's own message, which is also in the log: the platform shows it, but not as a line of the job's
        streams["stderr"] = streams["stderr"].replace(f"{error}\n", "")
    elif result is None:
        ended = "the task was not run" if skipped else f"the shim ended with code {code}"
        error = f"An unexpected error occurred ({ended})"
    output = folder / "output"
    output.mkdir(parents=True)
    for entry in result["outputs"] if result else ():
        path = output / entry["relative_path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bucket.get(entry["bucket_key"]) or b"")
    for name, text in streams.items():
        (folder / f"{name}.log").write_text(text)
    duration = (result or {}).get("exec_duration") or (result or {}).get("invoke_duration") or "PT0S"
    return engines.Run(
        code=result["return_code"] if result and (timed_out or not error) else None,
        error=error or None,
        output=output,
        stdout=streams["stdout"].encode(),
        stderr=streams["stderr"].encode(),
        timed_out=timed_out,
        oom=code == 137,
        skipped=skipped,
        reported=result["user_process_last_stderr_lines"] if result else None,
        seconds=seconds(duration),
    )


def seconds(duration: str) -> float:
    """Seconds of an ISO 8601 duration such as PT1M2.5S."""
    parts = re.fullmatch(r"P(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:([\d.]+)S)?)?", duration)
    if not parts:
        raise ValueError(f"{duration} is no duration")
    days, hours, minutes, rest = (float(part or 0) for part in parts.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def check_upload(stacks: list[Path]) -> list[Check]:
    """What panimg, which reads uploaded images on the platform, makes of each stack: one finding each."""
    program = """
import json, pathlib, shutil, sys, tempfile
from panimg import convert
for name in sys.argv[1:]:
    with tempfile.TemporaryDirectory() as source, tempfile.TemporaryDirectory() as target:
        copied = pathlib.Path(source) / pathlib.Path(name).name
        shutil.copyfile(name, copied)
        result = convert(input_directory=pathlib.Path(source), output_directory=pathlib.Path(target))
        files = [file.file.read_bytes() == pathlib.Path(name).read_bytes() for file in result.new_image_files]
        images = [dict(width=i.width, height=i.height, colour=str(i.color_space)) for i in result.new_images]
        errors = [f"{k}: {m}" for errors in result.file_errors.values() for k, m in enumerate(errors)]
        print("panimg:" + json.dumps([images, files, errors]))
"""
    paths = [str(path.resolve()) for path in stacks]
    done = subprocess.run([HOME / "bin/python", "-c", program, *paths], capture_output=True, text=True)
    lines = [line.removeprefix("panimg:") for line in done.stdout.splitlines() if line.startswith("panimg:")]
    if len(lines) != len(stacks):
        raise RuntimeError(f"panimg failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    findings = []
    for path, line in zip(stacks, lines, strict=True):
        images, same, errors = json.loads(line)
        if len(images) != 1:
            reason = "; ".join(errors) or "no image in it"
            findings.append(
                Check("FAIL", f"{path.name}: refused as an upload ({reason[:300]})", "python -m test.support.stacks")
            )
        elif path.suffix.lower() in layout.SUFFIXES[:2] and same != [True]:
            findings.append(Check("FAIL", f"{path.name}: the platform stores other bytes", "write a TIFF"))
        else:
            about = images[0]
            message = f"{path.name}: accepted as an upload ({about['width']} x {about['height']}, {about['colour']})"
            findings.append(Check("PASS", message))
    return findings
