"""The light harness and the platform's own entry shim run the same images: the same answers, codes and messages."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from release.tarball import write_model_tarball
from test.harness import __main__ as command_line
from test.harness import engines, layout, readout, report, s3, sagemaker, served
from test.platform.test_containers import USER, WRITE, build  # noqa: F401  (build is a fixture)
from test.platform.test_whole_run import server_image  # noqa: F401  (a fixture)
from test.support.miniature import make_members
from test.support.programs import make_stack, messages

ROOT = engines.ROOT
IMAGE = os.environ.get("IMAGE", "midog-lora")
SERVER = """
import http.server, json, os, pathlib, sys
class Handler(http.server.BaseHTTPRequestHandler):
    count = 0
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        Handler.count += 1
        [stack] = pathlib.Path("/input/images/stacked-histopathology-roi-cropouts").iterdir()
        answers = [{"class": "normal", "confidence": k / 10} for k in range(3)]
        path = "/output/multiple-mitotic-figure-classification.json"
        if Handler.count < 3:
            json.dump(answers, open(path, "w"))
        print("task", Handler.count, os.listdir("/output"), flush=True)
        if Handler.count == 3:
            print("the third fails", file=sys.stderr, flush=True)
        self.send_response(201 if Handler.count < 3 else 500); self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("", 4743), Handler).serve_forever()
"""
FINDS = """
import resource
print(json.dumps({"uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups(), "cwd": os.getcwd(),
    "home": os.environ["HOME"], "link": os.readlink("/input"), "owner": os.stat("/input/inputs.json").st_uid,
    "folders": [[oct(os.stat(p).st_mode & 0o7777), sorted(os.listdir(p))] for p in ("/input/", "/output", "/tmp",
        "/opt/ml/model", "/opt/ml/output/data", "/opt/ml/checkpoints", "/opt/ml/input/data/ground_truth")],
    "file": oct(os.stat("/input/inputs.json").st_mode & 0o7777), "leader": os.getsid(0) == os.getpid(),
    "data": resource.getrlimit(resource.RLIMIT_DATA), "shm": os.statvfs("/dev/shm").f_blocks,
    "env": sorted(k for k in os.environ if not k.startswith("AWS_"))}))
"""

pytestmark = [
    pytest.mark.docker,
    pytest.mark.shim,
    pytest.mark.skipif(engines.docker() is None, reason="no Docker engine answers (release/engine.sh start)"),
]


@pytest.fixture(scope="module", autouse=True)
def published() -> None:
    """The published software, installed; where the registry cannot be reached the tests are skipped, but not in CI."""
    try:
        sagemaker.install()
    except RuntimeError as error:
        if os.environ.get("REQUIRE_DOCKER"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def bucket() -> Iterator[s3.Bucket]:
    with s3.s3_server() as server:
        yield server


Both = Callable[..., list[list[tuple[engines.Run, str]]]]


@pytest.fixture
def both(bucket: s3.Bucket, tmp_path: Path) -> Both:
    """Runs tasks in both harnesses; for each a list of (run, fail messages), one a task."""

    def run(
        image: str, tasks: int = 1, weights: Path | None = None, **limits: float
    ) -> list[list[tuple[engines.Run, str]]]:
        api, allowed = served.api_method(image), engines.Limits(**{"seconds": 60, **limits})  # type: ignore[arg-type]
        ended = []
        for way in ("light", "shim"):
            folder = tmp_path / way
            stack = make_stack(tmp_path / "stack_3.tiff")
            pks = [layout.write_input(stack, folder / f"{k}/input", "2026", Random(k)) for k in range(tasks)]
            if way == "shim":
                runs = sagemaker.run(image, folder, pks, weights, allowed, bucket, api)
            elif api == "invoke":
                runs = served.run_docker(image, folder, pks, weights, allowed)
            else:
                runs = [engines.run_docker(image, folder / "0", pks[0], weights, allowed)]
            ended.append([(one, messages(readout.judge(one, 3)[1])) for one in runs])
        return ended

    return run


def outputs(run: engines.Run) -> dict[str, bytes]:
    return {str(path.relative_to(run.output)): path.read_bytes() for path in run.output.rglob("*") if path.is_file()}


def test_a_good_job_finds_and_leaves_the_same(build: Callable[..., str], both: Both) -> None:  # noqa: F811
    lines = "ENV GRAND_CHALLENGE_X=1 MINE=1\nRUN touch /tmp/baked && mkdir -p /output /opt/app && touch /output/stale\n"
    lines += "RUN groupadd extra && useradd --create-home --groups extra user\nUSER user\nWORKDIR /opt/app\n"
    [[(light, said)], [(real, real_said)]] = both(build(WRITE + FINDS, lines))
    assert said == real_said == ""
    assert light.code == real.code == 0
    assert json.loads(light.stdout) == json.loads(real.stdout)
    assert outputs(light) == outputs(real) != {}


@pytest.mark.parametrize(
    ("script", "lines", "message"),
    [
        ("raise SystemExit('weights not found')", USER, "exit code 1: weights not found"),
        ("print('slow', file=__import__('sys').stderr); raise SystemExit(3)", USER, "exit code 3: slow"),
        ("raise SystemExit(4)", USER, "exit code 4: no errors were reported"),
        ("import os; os.kill(os.getpid(), 9)", USER, "exit code -9: no errors"),
        ("raise SystemExit(137)", USER, "exceeded its memory limit"),
        ("x = bytearray(20 * 2**30)", USER, "exit code 1: MemoryError"),
        (WRITE, "USER ghost\n", "The platform ended the job: The user defined in the containers USER instruction does"),
        (WRITE, USER + "VOLUME /input\n", "input and output directories could not be reset"),
        ("import time; time.sleep(100)", USER, "Time limit exceeded"),
        (WRITE + "open('/output/x', 'w').write('NaN')\nos.unlink('/output/x')\nprint('\\xe9')", USER, ""),
    ],
)
def test_jobs_end_alike(
    build: Callable[..., str],  # noqa: F811
    both: Both,
    script: str,
    lines: str,
    message: str,
) -> None:
    seconds = 3 if "sleep" in script else 60
    [[(light, said)], [(real, real_said)]] = both(build(script, lines), seconds=seconds)
    assert message in said
    # the light one adds the name or the path that is wrong, and how a job was stopped
    plain = lambda text: re.sub(r" \(.*\)$|: \[Errno.*$| after \d+ s: .*$", "", text)  # noqa: E731
    assert plain(said) == plain(real_said)
    assert light.timed_out == real.timed_out
    assert light.timed_out or light.code == real.code
    assert light.stdout == real.stdout
    assert light.stderr == real.stderr
    assert outputs(light) == outputs(real)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (WRITE + "os.symlink('/nowhere', '/output/link')", "the upload of the output breaks"),
        (WRITE + "os.symlink('/usr', '/output/link')", "the upload of the output breaks"),
        (WRITE + "sys.stdout.buffer.write(b'\\xff\\n')", "stdout is not valid UTF-8"),
    ],
)
def test_what_crashes_the_shim_fails_in_the_light_one(
    build: Callable[..., str],  # noqa: F811
    both: Both,
    script: str,
    message: str,
) -> None:
    """The platform knows no more than that something unexpected happened; the light harness says what."""
    [[(_, said)], [(real, real_said)]] = both(build(script))
    assert message in said
    assert "An unexpected error occurred" in real_said
    assert outputs(real) == {} or real.code is None


def test_only_the_light_one_has_no_network(build: Callable[..., str], both: Both, bucket: s3.Bucket) -> None:  # noqa: F811
    """The published shim needs the host's network, because its S3 is there; so a job reaches it too."""
    port = bucket.url.rpartition(":")[2]
    [[(_, said)], [(_, real_said)]] = both(
        build(WRITE + f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)")
    )
    assert "refused" in said
    assert real_said == ""


def test_a_child_that_stays_is_named(build: Callable[..., str], both: Both) -> None:  # noqa: F811
    """The platform waits for it as long as it may, and then knows no more than that the time is over."""
    image = build(WRITE + "import subprocess\nsubprocess.Popen(['sleep', '1000'])")
    [[(_, said)], [(_, real_said)]] = both(image, seconds=20)
    assert "a child process kept stdout or stderr open" in said
    assert "Time limit exceeded" in real_said


def test_long_lines_are_dropped_with_a_warning(build: Callable[..., str], both: Both) -> None:  # noqa: F811
    """Here the light harness is the stricter one: a dropped line does not fail a job on the platform."""
    [[(_, said)], [(real, real_said)]] = both(build(WRITE + "print('x' * 200_000)\nprint('after')"))
    assert "over 64 KiB are dropped" in said
    assert real_said == ""
    assert b"A log line was skipped as it was too long" in real.stderr
    assert b"after" in real.stdout


def test_a_model_tarball_arrives_alike(build: Callable[..., str], both: Both, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "ensemble"
    (folder / "fold0").mkdir(parents=True)
    (folder / "fold0/adapter").write_text("x")
    (folder / "fold0/adapter").chmod(0o640)
    (folder / "ensemble.json").symlink_to("fold0/adapter")
    tarball = tmp_path / "model.tar.gz"
    subprocess.run(["tar", "-czf", tarball, "-C", folder, "."], check=True)
    walk = "print(sorted([str(p), oct(p.stat().st_mode), p.stat().st_uid, p.stat().st_gid] for p in P('/opt/ml/model')"
    image = build(WRITE + f"from pathlib import Path as P\n{walk}.rglob('*')))")
    [[(light, said)], [(real, _)]] = both(image, weights=tarball)
    assert said == ""
    assert light.stdout == real.stdout
    assert b"1000" in light.stdout
    tarball.write_bytes(b"no tarball")
    for way in both_again(image, tarball, both):
        assert "Could not set up model: Tarfile could not be extracted" in way


def both_again(image: str, tarball: Path, both: Both) -> list[str]:
    for way in ("light", "shim"):
        subprocess.run(["rm", "-rf", tarball.parent / way], check=True)
    return [said for [(_, said)] in both(image, weights=tarball)]


def test_a_server_runs_tasks_alike(build: Callable[..., str], both: Both) -> None:  # noqa: F811
    """Two good tasks, a third that fails, a fourth that is never run."""
    image = build(SERVER, "LABEL org.grand-challenge.api-method=invoke\n" + USER)
    light, real = both(image, tasks=4)
    for (one, said), (other, _) in zip(light[:2], real[:2], strict=True):
        assert said == ""
        assert one.code == other.code == 0
        assert one.stdout == other.stdout
        assert outputs(one) == outputs(other) != {}
    assert light[2][1] == real[2][1] == "The job ended with exit code 1: the third fails"
    assert "not run" in light[3][1]
    assert "not run" in real[3][1]


COUNTED = """
import pathlib, sys
count = pathlib.Path("/tmp/count")  # /tmp is not emptied between the tasks of a container
number = int(count.read_text()) if count.exists() else 0
count.write_text(str(number + 1))
if number == BAD: sys.exit("the bad one")
"""


@pytest.mark.parametrize(("api", "bad"), [("exec", 0), ("exec", 1), ("exec", 3), ("invoke", 0), ("invoke", 3)])
def test_one_of_four_tasks_in_one_container_fails(
    build: Callable[..., str],  # noqa: F811
    bucket: s3.Bucket,
    tmp_path: Path,
    api: str,
    bad: int,
) -> None:
    """Those before it have left their answers, which are worth nothing; those after it were not run."""
    script = COUNTED.replace("BAD", str(bad)) + WRITE
    if api == "invoke":
        script = SERVER.replace("count < 3", f"count != {bad + 1}").replace("count == 3", f"count == {bad + 1}")
        script = script.replace("the third fails", "the bad one")
    stack = make_stack(tmp_path / "stack_3.tiff")
    pks = [layout.write_input(stack, tmp_path / f"{k}/input", "2026", Random(k)) for k in range(4)]
    image = build(script, f"LABEL org.grand-challenge.api-method={api}\n{USER}")
    runs = sagemaker.run(image, tmp_path, pks, None, engines.Limits(seconds=60), bucket, api)
    assert [run.skipped for run in runs] == [k > bad for k in range(4)]
    assert [outputs(run) != {} for run in runs] == [k < bad for k in range(4)]
    assert runs[bad].code == 1 and readout.last_line(runs[bad]) == "the bad one"
    results = []
    for run in runs:
        answers, findings = readout.judge(run, 3)
        results.append(report.Result(stack, 3, run, answers, findings))
    [finding] = report.judge_others(results)
    assert f"the answers of {bad} stack(s) count for nothing, {3 - bad} were not run" in finding.message


def test_a_silent_failure_shows_an_older_line(build: Callable[..., str], both: Both) -> None:  # noqa: F811
    """The platform shows the last line of the server's stderr, whichever task it was written for."""
    script = SERVER.replace("count == 3", "count == 1").replace("the third fails", "old")
    _, real = both(build(script, "LABEL org.grand-challenge.api-method=invoke\n" + USER), tasks=3)
    assert real[2][1] == "The job ended with exit code 1: old"


def test_a_servers_start_counts(build: Callable[..., str], both: Both) -> None:  # noqa: F811
    """Two seconds for the task; before the server listens they are over."""
    script = "import time; time.sleep(3)\n" + SERVER
    for [(run, said)] in both(build(script, "LABEL org.grand-challenge.api-method=invoke\n" + USER), seconds=2):
        assert run.timed_out
        assert "Time limit exceeded" in said


def test_a_server_that_is_never_healthy(build: Callable[..., str], both: Both) -> None:  # noqa: F811
    image = build("raise SystemExit('no GPU')", "LABEL org.grand-challenge.api-method=invoke\n" + USER)
    [[(light, said)], [(real, real_said)]] = both(image, start_seconds=5)
    assert "The inference server ended with exit code 1 before it was healthy" in said
    # the shim waits for its limit, and then may also take the server for healthy
    assert "health check within 5 seconds" in real_said or "Could not connect to invoke endpoint" in real_said
    assert light.code is real.code is None
    assert light.stderr == real.stderr == b"no GPU\n"


@pytest.mark.skipif(engines.inspect(IMAGE) is None, reason=f"no image {IMAGE} (./build.sh)")
@pytest.mark.parametrize("api", ["exec", "invoke"])
def test_the_real_image_answers_alike(
    api: str,
    server_image: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The sample, both ways: the same bytes."""
    answers, image = [], {"exec": IMAGE, "invoke": server_image}[api]
    for way in ((), ("--shim",)):
        options = ["--engine", "docker", "--image", image, "--output", str(tmp_path / f"out{len(way)}"), *way]
        code = command_line.main(options)
        table = capsys.readouterr().out
        assert code == 0, table
        assert "warn" not in table
        answers.append((tmp_path / f"out{len(way)}" / layout.ANSWER).read_bytes())
    assert answers[0] == answers[1]
    assert ("one server for all" in table) == (api == "invoke")
    assert "stack_0.tiff: accepted as an upload (128 x 128" in table


@pytest.mark.skipif(engines.inspect(IMAGE) is None, reason=f"no image {IMAGE} (./build.sh)")
def test_the_real_image_takes_a_tarball_of_two_members(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two bases, in our container and through the shim: the same bytes, and what a job outside of both answers."""
    folder = tmp_path / "two"
    folder.mkdir()
    members = {
        "lite": {"backbone": "efficientnet-lite0", "folds": 2, "tta": "rot4"},
        "uni": {"backbone": "uni", "folds": 3, "preprocess": {"crop": None, "size": 112}},
    }
    make_members(folder, members, weights=[0.25, 0.75], temperature=1.7, threshold=0.45)
    tarball = write_model_tarball(folder, tmp_path)
    answers = []
    for way in (("docker",), ("docker", "--shim"), ("native", "--no-build")):
        output = tmp_path / f"out{len(answers)}"
        image = ["--image", IMAGE] if way[0] == "docker" else []
        options = ["--engine", way[0], *image, "--weights", str(tarball), "--output", str(output), *way[1:]]
        assert command_line.main(options) == 0, capsys.readouterr().out
        answers.append((output / layout.ANSWER).read_bytes())
    assert answers[0] == answers[1]
    inside, outside = ([page["confidence"] for page in json.loads(text)] for text in answers[1:])
    assert inside == pytest.approx(outside, abs=1e-5)
    assert max(inside) - min(inside) > 1e-3


def test_uploads_are_judged_as_on_the_platform(tmp_path: Path) -> None:
    good = make_stack(tmp_path / "stack_1.tiff", 16)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.tiff")
    Image.new("RGB", (8, 8)).save(tmp_path / "no_unit.tiff", tiffinfo={282: 100.0, 283: 100.0, 296: 1})
    (tmp_path / "broken.tiff").write_bytes(b"II*\0nothing")
    names = ("plain", "no_unit", "broken")
    findings = sagemaker.check_upload([good, *(tmp_path / f"{name}.tiff" for name in names)])
    assert [finding.level for finding in findings] == ["PASS", "FAIL", "FAIL", "FAIL"]
    assert "refused as an upload" in findings[1].message


def test_run_local_refuses_what_the_shim_cannot_do() -> None:
    script = ROOT / "test/run_local.sh"
    for options in (["--engine", "native"], ["--strict"]):
        done = subprocess.run([script, "--shim", "--no-build", *options], capture_output=True, text=True)
        assert done.returncode == 2
        assert "it needs docker and no --strict" in done.stderr
