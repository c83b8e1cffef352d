"""The whole job on a miniature ensemble: what it answers and logs, and how each failure ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from inference import manifest
from inference.contract import OUTPUT, SLUG, check_answers
from test.support.image_files import bad_files, good_files, stack, with_pillow
from test.support.stub import Ended, check_ended, make_input, run_job, stub_manifest

ROOT = Path(__file__).resolve().parents[2]
BAD = bad_files()
FORBIDDEN = (
    "peft",
    "transformers",
    "pandas",
    "sklearn",
    "matplotlib",
    "timm",
    "torchvision",
    "SimpleITK",
    "cv2",
    "shapely",
)


def sixteen(seed: int = 5, pages: int = 16) -> bytes:
    return with_pillow([Image.fromarray(page) for page in stack(seed, pages)], "tiff_adobe_deflate")


def failed(ended: Ended, *words: str) -> None:
    check_ended(ended)
    assert ended.code == 1
    for word in words:
        assert word in ended.err


def test_a_process_answers_logs_and_is_silent(miniature: Path, tmp_path: Path) -> None:
    """As the platform starts it, from another directory, without a home, with a terminal that knows only ASCII."""
    (tmp_path / "output").mkdir()
    make_input(tmp_path / "real", sixteen(), "9f1c.TIFF")
    (tmp_path / "input").symlink_to(tmp_path / "real")
    details = tmp_path / "details.json"
    code = (
        f"import sys; from inference.__main__ import main; code = main(); found = {set(FORBIDDEN)} & sys.modules.keys()"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}; assert not found, found; sys.exit(code)",
            "--input",
            tmp_path / "input",
            "--output",
            tmp_path / "output",
            "--weights",
            miniature,
            "--details",
            details,
            "--device",
            "cpu",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "HOME": "/nonexistent"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(tmp_path / "output") == [OUTPUT]
    answers = json.loads((tmp_path / "output" / OUTPUT).read_text())
    check_answers(answers, 16, 0.5)
    assert len({answer["confidence"] for answer in answers}) == 16
    log = done.stdout.splitlines()
    assert len(log) <= 6
    assert "miniature" in log[0] and "device cpu" in log[0] and "pages 16" in log[0]
    assert "efficientnet-lite0, 2 folds" in log[1] and "precision" in log[1]
    assert log[-1].startswith("seconds ") and all(word in log[-1] for word in ("input", "load", "predict", "write"))
    pages = json.loads(details.read_text())["pages"]
    assert [page["p_atypical"] for page in pages] == [answer["confidence"] for answer in answers]
    assert all(page["spread"] == pytest.approx(max(page["fold_p"]) - min(page["fold_p"])) for page in pages)


def test_what_was_uploaded_is_what_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tarball that holds no ensemble must fail: the bundled one would answer in its name."""
    uploaded = tmp_path / "model"
    monkeypatch.setattr(manifest, "MODEL_TARBALL", uploaded)
    assert manifest.default_ensemble() == manifest.BUNDLED
    uploaded.mkdir()
    (uploaded / ".keep").touch()
    assert manifest.default_ensemble() == manifest.BUNDLED
    (uploaded / "my-ensemble").mkdir()
    make_input(tmp_path / "input", sixteen())
    ended = run_job(tmp_path / "input", tmp_path / "output", manifest.default_ensemble())
    failed(ended, f"no ensemble.json in {uploaded}")


def test_a_process_fails_with_one_line(tmp_path: Path) -> None:
    stub_manifest(tmp_path / "weights")
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / OUTPUT).write_text("[]")  # of an earlier job: must not be taken for this one's
    make_input(tmp_path / "input", BAD["truncated-deflate.tiff"][0])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "inference",
            "--input",
            tmp_path / "input",
            "--output",
            tmp_path / "output",
            "--weights",
            tmp_path / "weights",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, os.listdir(tmp_path / "output")) == (1, "", [])
    assert done.stderr.startswith("error: page ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["one-page.tif", "sixteen.TIFF", "grey16.tiff", "rgba.tiff", "stack-deflated.MHA", "page.mha"]
)
def test_answers_every_kind_of_stack(name: str, miniature: Path, tmp_path: Path) -> None:
    content, pages, _ = good_files()[name]
    ended = run_job(make_input(tmp_path / "in", content, name), tmp_path / "out", miniature, stub=False)
    check_ended(ended)
    assert len(ended.answers) == len(pages)
    assert f"pages {len(pages)}" in ended.out


def test_order_of_answers_is_order_of_pages(tmp_path: Path) -> None:
    stub_manifest(tmp_path / "weights")
    pages = [Image.new("RGB", (9, 7), (value, value, value)) for value in (200, 10, 90, 250, 0, 128)]
    ended = run_job(make_input(tmp_path / "in", with_pillow(pages)), tmp_path / "out", tmp_path / "weights")
    assert [round(255 * answer["confidence"]) for answer in ended.answers] == [200, 10, 90, 250, 0, 128]
    assert [answer["class"] for answer in ended.answers] == [
        "atypical",
        "normal",
        "normal",
        "atypical",
        "normal",
        "atypical",
    ]


@pytest.mark.parametrize("name", BAD)
def test_every_bad_stack_fails_the_job(name: str, tmp_path: Path) -> None:
    """The truncated, empty, unreadable, absurd and hostile files of image_files."""
    stub_manifest(tmp_path / "weights")
    failed(run_job(make_input(tmp_path / "in", BAD[name][0], name), tmp_path / "out", tmp_path / "weights"))


def test_bad_inputs_fail_the_job(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    stub_manifest(weights)
    (tmp_path / "empty").mkdir()
    failed(run_job(tmp_path / "empty", tmp_path / "out", weights), "cannot be read")
    none = make_input(tmp_path / "none", sixteen(), "stack.txt")
    failed(run_job(none, tmp_path / "out", weights), "no image among 1 files", SLUG)
    two = make_input(make_input(tmp_path / "two", sixteen()), sixteen(), "other.mha")
    failed(run_job(two, tmp_path / "out", weights), "2 images")
    other = make_input(tmp_path / "other", sixteen(), listing=[{"socket": {"slug": "x-ray"}}])
    failed(run_job(other, tmp_path / "out", weights), "x-ray", SLUG)


def test_bad_weights_fail_the_job(miniature: Path, tmp_path: Path) -> None:
    stack_input = make_input(tmp_path / "in", sixteen(pages=2))

    def ends(folder: Path) -> Ended:
        return run_job(stack_input, tmp_path / "out", folder, stub=False)

    assert ends(miniature).code == 0
    failed(ends(tmp_path / "missing"), "no ensemble.json")
    for file, change, words in (
        ("fold0/adapter_model.safetensors", b"altered", "has SHA-256"),
        ("fold1/adapter_config.json", b"{}", "has SHA-256"),
        ("base.safetensors", b"altered", "has SHA-256"),
        ("base.safetensors", None, "base weights base.safetensors not found"),
        ("fold1/adapter_model.safetensors", None, "cannot be read"),
        ("ensemble.json", b"{}", "has format None"),
    ):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(miniature, copy, copy_function=os.link)
        (copy / file).unlink()
        if change is not None:
            (copy / file).write_bytes(change)
        failed(ends(copy), words)


def rehashed(folder: Path, **changes: object) -> Path:
    """The manifest of `folder` with changes, and the hashes that its files have now."""
    import hashlib

    content = json.loads((folder / "ensemble.json").read_text()) | changes
    for fold in content["folds"]:
        for name in fold["sha256"]:
            fold["sha256"][name] = hashlib.sha256((folder / fold["folder"] / name).read_bytes()).hexdigest()
    (folder / "ensemble.json").unlink()
    (folder / "ensemble.json").write_text(json.dumps(content))
    return folder


def test_weights_that_are_signed_but_wrong_fail_the_job(miniature: Path, tmp_path: Path) -> None:
    """With right hashes: another backbone's adapters, a table without the backbone, not a number."""
    from safetensors.torch import load_file, save_file

    stack_input = make_input(tmp_path / "in", sixteen(pages=1))

    def copied(name: str) -> Path:
        return Path(shutil.copytree(miniature, tmp_path / name))

    for name, changes, words in (
        ("unknown", {"backbone": "resnet18"}, "not in the table"),
        ("misfit", {"backbone": "virchow"}, "error: "),
    ):
        ended = run_job(stack_input, tmp_path / "out", rehashed(copied(name), **changes), stub=False)
        assert (ended.code, ended.files, ended.err.count("\n")) == (1, [], 1)
        assert words in ended.err
    folder = copied("nan")
    file = folder / "fold0/adapter_model.safetensors"
    state = load_file(file)
    state[sorted(state)[0]].fill_(float("nan"))
    file.unlink()
    save_file(state, file)
    failed(run_job(stack_input, tmp_path / "out", rehashed(folder), stub=False), "not finite")


def test_an_unexpected_error_is_one_line_and_a_traceback_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test.support.stub import StubEnsemble

    def predict(self: StubEnsemble, crops: list) -> None:
        print("noise", file=sys.stderr)
        os.write(2, b"noise from below Python\n")
        raise KeyError("two\nlines \x1b[31m" + "x" * 5000)

    monkeypatch.setattr(StubEnsemble, "predict", predict)
    stub_manifest(tmp_path / "weights")
    ended = run_job(make_input(tmp_path / "in", sixteen()), tmp_path / "out", tmp_path / "weights")
    assert ended.code == 1 and ended.files == []
    assert ended.err.startswith("error: unexpected KeyError") and ended.err.count("\n") == 1 and len(ended.err) < 1024
    assert ended.err[:-1].isprintable() and "report it" in ended.err
    assert "Traceback" in ended.out and "noise from below Python" in ended.out and "noise\n" in ended.out


def test_what_libraries_say_on_success_goes_to_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test.support.stub import StubEnsemble

    real = StubEnsemble.predict

    def predict(self: StubEnsemble, crops: list) -> object:
        os.write(2, b"[W NNPACK.cpp:51] Could not initialize NNPACK!\n")
        return real(self, crops)

    monkeypatch.setattr(StubEnsemble, "predict", predict)
    stub_manifest(tmp_path / "weights")
    ended = run_job(make_input(tmp_path / "in", sixteen()), tmp_path / "out", tmp_path / "weights")
    check_ended(ended)
    assert ended.code == 0 and "NNPACK" in ended.out


def test_details_that_cannot_be_written_leave_no_answers(tmp_path: Path) -> None:
    stub_manifest(tmp_path / "weights")
    job = (make_input(tmp_path / "in", sixteen()), tmp_path / "out", tmp_path / "weights")
    failed(run_job(*job, "--details", str(tmp_path / "missing/details.json")), "details.json", "No such file")
