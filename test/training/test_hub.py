"""Ensembles on the hub: cards that its client reads, what is sent, what comes back. Real client, stand-in server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from inference.errors import UserError
from inference.hub import local_folder
from inference.manifest import load_manifest
from test.support.hub import TOKEN, Hub, Repository, serving
from test.support.miniature import make_ensemble
from training.__main__ import main
from training.ensemble.hubcard import check_card, metadata, write_card
from training.ensemble.publish import files_to_send

ROOT = Path(__file__).resolve().parents[2]
SHARED = sorted(
    ROOT / line.rpartition("/")[0]
    for line in subprocess.check_output(["git", "ls-files", "weights/*/ensemble.json"], cwd=ROOT, text=True).split()
)
OPEN = {"base": "Apache-2.0", "base_source": "pypi:some-package==1", "adapters": "Apache-2.0"}
SCORES = {"crops": 24, "atypical": 8, "balanced_accuracy": 0.81234, "auc": 0.9, "specificity": 0.75}
NAME = "someone/mitoses"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble as one would share it. Not to be changed."""
    folder = tmp_path_factory.mktemp("weights") / "mine"
    folder.mkdir()
    about = {"recipe": {}, "data": {"sets": {"AMi-Br": 24}}, "out_of_fold": SCORES}
    make_ensemble(folder, folds=2, licence=OPEN, provenance=about)
    for note in folder.glob("fold*/README.md"):  # PEFT's, which export leaves out
        note.unlink()
    write_card(folder)
    return folder


@pytest.fixture
def shared(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, whose base lies where all bases do: what is shared holds none."""
    folder = tmp_path / "weights" / "mine"
    shutil.copytree(made, folder)
    (tmp_path / "weights" / "bases").mkdir()
    (folder / "base.safetensors").rename(tmp_path / "weights" / "bases" / "base.safetensors")
    monkeypatch.setattr("inference.manifest.BASES", tmp_path / "weights" / "bases")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The client's own settings, which it reads from the environment when it is imported, set to a stand-in."""
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def upload(hub: Hub, folder: Path, **about: bool) -> str:
    """Put the files of `folder` on the hub without our command; returns the commit."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.repositories[NAME] = Repository(**about)
    return hub.repositories[NAME].commit(files)


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / "ensemble.json").read_text())
    change(content)
    (folder / "ensemble.json").write_text(json.dumps(content))


@pytest.mark.parametrize("folder", SHARED, ids=lambda folder: folder.name)
def test_the_cards_of_this_repository(folder: Path) -> None:
    """The hub's own class reads what the manifest says; where this fails, run python -m training hubcard weights/*/"""
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == metadata(folder).to_dict()
    assert card.data.library_name == "peft" and card.data.license and card.data.base_model
    scores = json.loads((folder / "ensemble.json").read_text())["provenance"]["out_of_fold"]
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["roc_auc"] == round(scores["auc"], 4)
    assert values["balanced_accuracy"] == round(scores["balanced_accuracy"], 4)
    assert card.data.datasets == ["AMi-Br"]
    assert card.text.strip().startswith(f"# {folder.name}")


def test_a_card_of_two_members(made: Path, tmp_path: Path) -> None:
    """Bases on the hub by their names there, others by ours; a licence that is not Apache's goes on the card."""
    content = json.loads((made / "ensemble.json").read_text())
    keys = ("backbone", "pool", "base", "folds", "licence", "preprocess", "tta", "precision")
    member = {"name": "a"} | {key: content[key] for key in keys}
    folds = [fold | {"folder": f"other-{fold['folder']}"} for fold in member["folds"]]
    licence = OPEN | {"base_source": "hf-hub:timm/some.model"}
    other = member | {"name": "b", "backbone": "dinov3-vits16", "folds": folds, "licence": licence}
    parts = {"a": {"data": {"sets": {"AMi-Br": 1}}}, "b": {"data": {"sets": {"clinic_2024": 1, "MIDOG25": 1}}}}
    content |= {
        "format": 2,
        "members": [member, other],
        "weights": [0.5, 0.5],
        "provenance": {"members": parts, "out_of_fold": SCORES},
    }
    (tmp_path / "ensemble.json").write_text(json.dumps(content))
    about = metadata(tmp_path).to_dict()
    assert about["base_model"] == ["efficientnet-lite0", "timm/some.model"]
    assert about["datasets"] == ["AMi-Br", "MIDOG25"] and about["license"] == "apache-2.0"
    other["licence"]["base"] = "DINOv3 License"
    (tmp_path / "ensemble.json").write_text(json.dumps(content))
    assert main(["hubcard", str(tmp_path)]) == 0
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.license_name, data.license_link) == ("other", "dinov3-license", "LICENSE.md")


def test_a_cards_text_stays(made: Path, tmp_path: Path) -> None:
    shutil.copy(made / "ensemble.json", tmp_path)
    (tmp_path / "README.md").write_text("# Mine\n\n---\nMy own words.\n")
    write_card(tmp_path)
    edit(tmp_path, lambda content: content["provenance"]["out_of_fold"].update(auc=0.5))
    write_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.strip() == "# Mine\n\n---\nMy own words."
    with pytest.raises(UserError, match=r"not known to be of these weights.*hubcard --read-again"):
        check_card(tmp_path)
    assert main(["hubcard", "--read-again", str(tmp_path)]) == 0
    check_card(tmp_path)
    assert "My own words." in (tmp_path / "README.md").read_text()
    edit(tmp_path, lambda content: content.update(threshold=0.4))
    write_card(tmp_path)
    with pytest.raises(UserError, match="not known to be of these weights"):
        check_card(tmp_path)
    assert [r.metric_value for r in card.data.eval_results] == [0.8123, 0.5, 0.75]


def test_there_and_back(shared: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run asks nobody; one commit brings exactly the files; what is fetched is what was sent."""
    names = sorted(files_to_send(shared))
    assert len(names) == 6
    assert main(["publish", str(shared), "--repo", NAME, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert not hub.asked and all(re.search(rf"bytes  SHA-256 [0-9a-f]{{64}}  {name}$", printed, re.M) for name in names)
    assert main(["publish", str(shared), "--repo", NAME]) == 0
    place = re.search(r"hf-hub:\S+", capsys.readouterr().out)[0]
    repository = hub.repositories[NAME]
    assert repository.private and len(repository.commits) == 2  # the hub's own, and ours
    commit, files = repository.commits[-1]
    assert place == f"hf-hub:{NAME}@{commit}"
    assert sorted(files.keys() - {".gitattributes"}) == names
    folder = local_folder(Path(place))
    fetched = load_manifest(folder)
    assert [file.read_bytes() for file in fetched.files] == [file.read_bytes() for file in load_manifest(shared).files]
    asked = len(hub.asked)
    assert local_folder(Path(place)) == folder and len(hub.asked) == asked  # a commit that is here asks nobody
    assert local_folder(Path(f"hf-hub:{NAME}")) == folder
    assert f"@{commit} is what its default branch stands for now" in capsys.readouterr().err
    assert main(["verify", place, "--device", "cpu"]) == 0 and "PASS" in capsys.readouterr().out
    assert main(["publish", str(shared), "--repo", NAME]) == 0


def test_score_fetches_once_and_then_needs_no_network(shared: Path, tmp_path: Path) -> None:
    """The command as a user runs it, with the client's settings from the environment."""
    shutil.copy(tmp_path / "weights" / "bases" / "base.safetensors", tmp_path)
    program = "import sys; from pathlib import Path; import inference.manifest; inference.manifest.BASES = Path({!r}); "
    program += "from inference.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program.format(str(tmp_path)), "score", str(ROOT / "test/sample/stack_0.tiff")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    with serving() as server:
        environment["HF_ENDPOINT"] = server.url
        place = f"hf-hub:{NAME}@{upload(server, shared)}"
        first = subprocess.run([*command, "--weights", place], env=environment, capture_output=True, text=True)
        assert first.returncode == 0, first.stderr
        assert len(first.stdout.splitlines()) == 17
    environment["HF_HUB_OFFLINE"] = "1"
    again = subprocess.run([*command, "--weights", place], env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout == first.stdout


def test_what_cannot_be_fetched_is_one_line(
    shared: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = upload(hub, shared)
    for name, message in {
        "hf-hub:nothing": "names no ensemble on the hub",
        f"hf-hub:{NAME}@../x": "names no ensemble on the hub",
        "hf-hub:someone/other": "shows no repository someone/other",
        f"hf-hub:{NAME}@v9": f"{NAME} has no revision v9",
        f"hf-hub:{NAME}@{'0' * 40}": "has no revision 0000",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            local_folder(Path(name))
    place = Path(f"hf-hub:{NAME}@{commit}")
    hub.repositories[NAME].gated = True
    with pytest.raises(UserError, match=r"is gated, and your token has no access \(status 403\); ask for it at http"):
        local_folder(place)
    hub.repositories[NAME].gated = False
    del hub.repositories[NAME].commits[-1][1]["fold1/adapter_config.json"]
    with pytest.raises(UserError, match=r"holds no fold1/adapter_config\.json"):
        local_folder(place)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"only in part, and HF_HUB_OFFLINE is set"):
        local_folder(place)
    with pytest.raises(UserError, match=r"at its default branch is not in the cache"):
        local_folder(Path(f"hf-hub:{NAME}"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"package huggingface_hub is not installed.*pip install"):
        local_folder(place)


def test_altered_adapters_are_refused(shared: Path, hub: Hub) -> None:
    file = shared / "fold1" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match=r"fold1/adapter_model\.safetensors has SHA-256 .* expects .*; remove "):
        local_folder(Path(f"hf-hub:{NAME}@{upload(hub, shared)}"))


def test_no_network_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as gone:
        monkeypatch.setattr(constants, "ENDPOINT", gone.url)
    with pytest.raises(UserError, match=rf"the hub at {gone.url} cannot be reached \(.*\); expected a network"):
        local_folder(Path(f"hf-hub:{NAME}"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "notes.txt").write_text("x"), "notes.txt is no part of the ensemble"),
        (lambda f: (f / "fold0" / ".cache").write_text("x"), ".cache is no part of the ensemble"),
        (lambda f: (f / "base.safetensors").write_text("x"), "SHA-256"),
        (lambda f: (f / "README.md").unlink(), "no README.md in"),
        (
            lambda f: (f / "README.md").write_text("# mine\n"),
            "does not match ensemble.json; expected what ensemble.json gives",
        ),
        (lambda f: edit(f, lambda c: c["provenance"]["out_of_fold"].update(auc=0.99)), "does not match ensemble.json"),
        (lambda f: edit(f, lambda c: c["licence"].update(base="CC-BY-NC-ND-4.0")), "allows no changed versions"),
        (lambda f: edit(f, lambda c: c.update(backbone="uni")), "is under CC-BY-NC-ND-4.0"),  # whatever it claims
        (lambda f: edit(f, lambda c: c["licence"].update(base="Own")), "nobody here has read"),
        (lambda f: edit(f, lambda c: c.update(backbone="dinov3-vits16")), "no LICENSE.md in"),
    ],
)
def test_what_must_not_be_sent(spoil: Callable, message: str, shared: Path, hub: Hub) -> None:
    spoil(shared)
    with pytest.raises(UserError, match=re.escape(message)):
        files_to_send(shared)
    assert main(["publish", str(shared), "--repo", NAME]) == 1 and not hub.asked


def test_a_licence_goes_with_its_adapters(shared: Path) -> None:
    edit(shared, lambda content: content["licence"].update(base="DINOv3 License"))
    (shared / "LICENSE.md").write_text("its text")
    write_card(shared)
    assert "LICENSE.md" in files_to_send(shared)
    edit(shared, lambda content: content["licence"].update(adapters="CC-BY-NC-ND-4.0"))
    with pytest.raises(UserError, match="is under CC-BY-NC-ND"):
        files_to_send(shared)


def test_a_hub_that_refuses(shared: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Whatever fails, no commit is made."""
    upload(hub, shared)
    repository = hub.repositories[NAME]
    command = ["publish", str(shared), "--repo", NAME]
    edit(shared, lambda content: content.update(threshold=0.4))
    write_card(shared, read_again=True)
    hub.lose_uploads = True
    assert main(command) == 1 and "status 403" in capsys.readouterr().err
    hub.lose_uploads = False
    repository.commits[-1][1]["fold2/adapter_config.json"] = b"{}"
    assert main(command) == 1 and "holds fold2/adapter_config.json, which is no part" in capsys.readouterr().err
    del repository.commits[-1][1]["fold2/adapter_config.json"]
    _, there, *rest = repository.commits[-1]
    other = there["ensemble.json"].replace(b'"name": "', b'"name": "not ')
    repository.commits.append(("f" * 40, there | {"ensemble.json": other}, *rest))
    assert main(command) == 1 and "holds the ensemble not " in capsys.readouterr().err
    repository.commits.pop()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(command) == 1 and "run 'hf auth login'" in capsys.readouterr().err
    assert len(repository.commits) == 1
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(command) == 0 and len(repository.commits) == 2
