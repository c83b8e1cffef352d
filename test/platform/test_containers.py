"""Broken images in real containers are caught with the right message; the real image passes (needs an engine)."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from inference.checks import Check, passed
from release.preflight import check_file
from test.harness import __main__ as command_line
from test.harness import engines, images, layout, readout
from test.support.programs import make_stack, messages

BASE = os.environ.get("BASE_IMAGE", "python:3.11-slim-bookworm")
IMAGE = os.environ.get("IMAGE", "midog-lora")
WRITE = """
import json, os, sys
answers = [{"class": "normal", "confidence": k / 10} for k in range(3)]
json.dump(answers, open("/output/multiple-mitotic-figure-classification.json", "w"))
"""
USER = "RUN useradd --create-home user\nUSER user\n"

pytestmark = [
    pytest.mark.docker,
    pytest.mark.skipif(engines.docker() is None, reason="no Docker engine answers (release/engine.sh start)"),
]


def docker(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([engines.docker() or "docker", *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Builds an image from lines of a Dockerfile and a script; all of them are removed at the end."""
    if engines.inspect(BASE) is None and docker("pull", BASE).returncode:
        pytest.skip(f"the base image {BASE} cannot be had (release/engine.sh start)")
    tags: list[str] = []

    def build_image(script: str = WRITE, lines: str = USER, start: str = 'ENTRYPOINT ["python3", "/run.py"]') -> str:
        folder = tmp_path_factory.mktemp("context")
        (folder / "run.py").write_text(script)
        (folder / "Dockerfile").write_text(f"FROM {BASE}\nCOPY run.py /run.py\n{lines}{start}\n")
        tags.append(f"harness-test-{os.getpid()}-{len(tags)}")
        done = docker("build", "--quiet", "--network", "host", "--tag", tags[-1], folder)
        assert done.returncode == 0, done.stderr
        return tags[-1]

    yield build_image
    docker("image", "rm", "--force", *tags)


Outcome = tuple[engines.Run, list[Check]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Outcome]:
    def run_image(image: str, weights: Path | None = None, **limits: object) -> Outcome:
        stack, folder = make_stack(tmp_path / "stack_3.tiff"), tmp_path / uuid.uuid4().hex
        pk = layout.write_input(stack, folder / "input", "2026", Random(0))
        ended = engines.run_docker(image, folder, pk, weights, engines.Limits(**{"seconds": 30, **limits}))  # type: ignore[arg-type]
        return ended, readout.judge(ended, 3)[1]

    return run_image


def test_what_a_job_finds(build: Callable[..., str], run: Callable[..., Outcome]) -> None:
    script = (
        WRITE
        + """
import resource
def writable(path):
    try: open(path + "/probe", "w").close(); os.unlink(path + "/probe"); return True
    except OSError: return False
print(json.dumps({"uid": os.getuid(), "home": os.environ["HOME"], "env": list(os.environ), "cwd": os.getcwd(),
    "link": os.readlink("/input"), "owner": os.stat("/input/inputs.json").st_uid, "tmp": os.listdir("/tmp"),
    "output": os.listdir("/output"), "model": os.listdir("/opt/ml/model"), "network": os.listdir("/sys/class/net"),
    "writable": [p for p in ("/input", "/output", "/tmp", "/opt/ml/model", "/opt/app") if writable(p)],
    "modes": [oct(os.stat(p).st_mode & 0o7777) for p in ("/input/", "/input/inputs.json", "/output", "/tmp")],
    "data": resource.getrlimit(resource.RLIMIT_DATA)[0], "shm": os.statvfs("/dev/shm").f_blocks * 4096,
    "harness": os.access("/harness/job.json", os.R_OK), "leader": os.getsid(0) == os.getpid()}))
"""
    )
    lines = "ENV GRAND_CHALLENGE_X=1 MINE=1\nRUN touch /tmp/baked && mkdir -p /output /opt/app && touch /output/stale\n"
    ended, findings = run(build(script, lines + "WORKDIR /opt/app\n" + USER))
    assert passed(findings), messages(findings)
    seen = json.loads(ended.stdout)
    assert seen["uid"] == 1000
    assert seen["home"] == "/home/user"
    assert seen["cwd"] == "/opt/app"
    given = {"PATH", "HOSTNAME", "HOME", "MINE", "LOG_LEVEL", "PYTHONUNBUFFERED", "no_proxy"}
    assert set(seen["env"]) - {"LC_CTYPE"} == given  # Python itself adds LC_CTYPE
    assert seen["link"].startswith("/opt/ml/input/data/")
    assert seen["owner"] == 0
    assert seen["output"] == [layout.ANSWER]
    assert seen["tmp"] == seen["model"] == []
    assert seen["network"] == ["lo"]
    assert seen["writable"] == ["/output", "/tmp", "/opt/ml/model"]
    assert seen["modes"] == ["0o755", "0o644", "0o777", "0o777"]
    assert seen["data"] == 15 * 2**30
    assert seen["shm"] == 8 * 2**30
    assert seen["leader"]
    assert not seen["harness"]


def test_a_number_without_passwd_line_keeps_roots_home(build: Callable[..., str], run: Callable[..., Outcome]) -> None:
    ended, findings = run(build(WRITE + "print(os.getuid(), os.getgid(), os.environ['HOME'])", "USER 4321\n"))
    assert passed(findings)
    assert ended.stdout == b"4321 0 /root\n"


@pytest.mark.parametrize(
    ("script", "lines", "message"),
    [
        (
            "print(open('/tmp/weights.pt').read())",
            "RUN echo w >/tmp/weights.pt\n" + USER,
            "No such file or directory: '/tmp/w",
        ),
        ("open('/opt/cache', 'w')", USER, "Permission denied: '/opt/cache'"),
        ("x = bytearray(20 * 2**30)", USER, "exit code 1: MemoryError"),
        (WRITE, "USER ghost\n", "USER instruction does not exist ('ghost')"),
        (WRITE, USER + "VOLUME /input\n", "directories could not be reset"),
        ("import urllib.request as u; u.urlopen('http://198.51.100.1')", USER, "Network is unreachable"),
    ],
)
def test_broken_images_fail(
    build: Callable[..., str], run: Callable[..., Outcome], script: str, lines: str, message: str
) -> None:
    assert message in messages(run(build(script, lines))[1])


def test_a_hang_is_ended(build: Callable[..., str], run: Callable[..., Outcome]) -> None:
    ended, findings = run(build("import time; time.sleep(100)"), seconds=1)
    assert "Time limit exceeded" in messages(findings)
    assert ended.wall_seconds < 100


def test_memory_beyond_the_machine_is_killed(build: Callable[..., str], run: Callable[..., Outcome]) -> None:
    """Shared memory is not data memory: no MemoryError, the kernel kills."""
    script = "import mmap\nm = mmap.mmap(-1, 3 * 2**30)\nfor k in range(0, len(m), 4096): m[k] = 1\n"
    _, findings = run(build(script), memory_gib=2)
    assert "killed as it exceeded its memory limit" in messages(findings)


def test_strict_run_is_read_only_without_capabilities(build: Callable[..., str], run: Callable[..., Outcome]) -> None:
    status = "d = dict(l.split(':', 1) for l in open('/proc/self/status'))\nprint(d['CapEff'], d['NoNewPrivs'])\n"
    ended, findings = run(build(WRITE + status), strict=True)
    assert passed(findings), messages(findings)
    assert ended.stdout.split() == [b"0000000000000000", b"1"]


def test_only_a_strict_run_fails_a_cache_in_the_home(build: Callable[..., str], run: Callable[..., Outcome]) -> None:
    image = build(WRITE + "open(os.path.expanduser('~/cache'), 'w')")
    assert passed(run(image)[1])
    assert "Read-only file system" in messages(run(image, strict=True)[1])


def test_an_image_without_command_cannot_start(build: Callable[..., str], run: Callable[..., Outcome]) -> None:
    with pytest.raises(RuntimeError, match="neither ENTRYPOINT nor CMD"):
        run(build(start="ENTRYPOINT []\nCMD []"))
    with pytest.raises(RuntimeError, match=r"build it with \./build\.sh"):
        run("no-such-image-here")


def test_weights_as_tarball_and_as_folder(
    build: Callable[..., str], run: Callable[..., Outcome], tmp_path: Path
) -> None:
    folder = tmp_path / "ensemble"
    folder.mkdir()
    (folder / "ensemble.json").write_text("{}")
    (folder / "ensemble.json").chmod(0o600)
    tarball = tmp_path / "model.tar.gz"
    subprocess.run(["tar", "-czf", tarball, "-C", folder, "."], check=True)
    image = build(WRITE + "print(os.listdir('/opt/ml/model'), os.stat('/opt/ml/model/ensemble.json').st_uid)")
    for weights, strict in ((tarball, False), (tarball, True), (folder, False), (folder, True)):
        ended, findings = run(image, weights=weights, strict=strict)
        assert passed(findings), messages(findings)
        assert ended.stdout == b"['ensemble.json'] 1000\n"


def test_preflight_of_files_that_docker_saved(build: Callable[..., str], tmp_path: Path) -> None:
    good, root = build(), build(lines="")

    def check(*tags: str) -> list[Check]:
        path = tmp_path / f"{len(tags)}.tar"
        assert docker("save", "--output", path, *tags).returncode == 0
        return check_file(path)

    findings = check(good)
    assert passed(findings), messages(findings)
    assert not any(finding.level == "WARN" for finding in findings)
    assert "runs as root" in messages(check(root))
    assert "only have 1 image, it has 2" in messages(check(good, root))


def test_a_rebuild_keeps_the_ensemble_of_the_image(
    build: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    other = build(lines="LABEL midog-lora.ensemble=weights/gone org.grand-challenge.api-method=exec\n")
    images.build("docker", other)  # newer than all sources: left alone
    with pytest.raises(RuntimeError, match=r"build\.sh"):
        images.build("docker", other, "invoke")
    assert "no weights/gone/ensemble.json" in capfd.readouterr().err


def test_an_image_is_judged_alike_from_the_engine_and_from_a_file(tmp_path: Path) -> None:
    if engines.inspect(BASE) is None:
        pytest.skip(f"no image {BASE} (release/engine.sh start)")
    assert docker("save", "--output", tmp_path / "base.tar", BASE).returncode == 0
    saved = [finding for finding in check_file(tmp_path / "base.tar") if "GB" not in finding.message]
    assert images.check(BASE) == saved[2:]  # after the number of members, and the digest
    assert "runs as root" in messages(saved)


@pytest.mark.skipif(engines.inspect(IMAGE) is None, reason=f"no image {IMAGE} (./build.sh)")
@pytest.mark.parametrize("options", [[], ["--strict", "--shm-size", "1g"]])
def test_the_real_image_passes_everything(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--engine", "docker", "--no-build", "--output", str(tmp_path), *options]
    code = command_line.main(arguments)
    table = capsys.readouterr().out
    assert code == 0, table
    assert "WARN" not in table
    assert "spread" in json.loads((tmp_path / "details.json").read_text())["pages"][0]
