"""Share an ensemble on the Hugging Face hub: exactly its files, in one commit, where the bases' licences allow it.

The hub's client handles the token: `hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from inference.backbones import lookup
from inference.checksums import check_ensemble, sha256
from inference.errors import UserError
from inference.hub import PREFIX, explain
from inference.manifest import FILE, Manifest, load_manifest
from inference.seen import SEEN, load_seen

from .hubcard import CARD, TERMS, check_card


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ensemble", type=Path, help="an ensemble folder, such as weights/mine")
    help_ = "of the hub; where there is none it is made, and private until you change that on its page"
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help=help_)
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent, and ask no network")


def run(options: argparse.Namespace) -> None:
    files = files_to_send(options.ensemble)
    for name, path in files.items():
        print(f"{path.stat().st_size:12,} bytes  SHA-256 {sha256(path)}  {name}")
    total = f"{len(files)} files, {sum(path.stat().st_size for path in files.values()):,} bytes"
    if options.dry_run:
        print(f"{total} would go to {options.repo}; nothing was sent")
        return
    commit = send(options.repo, files, load_manifest(options.ensemble))
    print(f"{total} are {PREFIX}{options.repo}@{commit}")


def files_to_send(folder: Path) -> dict[str, Path]:
    """The files of the ensemble, by name in the repository.

    UserError where a file is missing, altered or not part of it, or where a licence does not allow passing it on.
    """
    manifest = load_manifest(folder)
    check_ensemble(manifest)
    wanted = [folder / FILE, folder / CARD, *manifest.files, *(folder / name for name in licence_texts(manifest))]
    if load_seen(manifest):
        wanted.append(folder / SEEN)
    files = {path.relative_to(folder).as_posix(): path for path in wanted}
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()):
        if path.relative_to(folder).as_posix() not in files:
            raise UserError(f"{path} is no part of the ensemble; expected what {FILE} names; move it out of the folder")
    for name, path in files.items():
        if not path.is_file():
            advice = f"write it with 'python -m training hubcard {folder}'" if name == CARD else "save it there"
            raise UserError(f"no {name} in {folder}; expected it beside the adapters; {advice}")
    check_card(folder)
    return dict(sorted(files.items()))


def licence_texts(manifest: Manifest) -> set[str]:
    """Files with licences that must accompany the adapters. UserError where one forbids passing them on.

    Both the manifest and the table of backbones are consulted, and the stricter one counts.
    """
    texts = set()
    for member in manifest.members:
        parts = [str(member.licence.get(part, "not known")) for part in ("base", "adapters")]
        for name in (*parts, lookup(member.backbone).licence):
            terms = TERMS.get(name)
            if terms is None or terms.forbidden:
                reason = terms.forbidden if terms else "nobody here has read what it says of derivatives"
                raise UserError(
                    f"{member.name} is under {name}: {reason}; expected a licence among "
                    f"{', '.join(key for key, known in TERMS.items() if not known.forbidden)}; ask its authors"
                )
            if terms.text:
                texts.add(terms.text)
    return texts


def identity(manifest: Manifest) -> str:
    """What stays the same from version to version of the ensemble: its name and its backbones."""
    return f"{manifest.name} ({' + '.join(member.backbone for member in manifest.members)})"


def send(repository: str, files: dict[str, Path], manifest: Manifest) -> str:
    """Send all files in one commit; returns its hash.

    UserError where the repository holds anything else or another ensemble, where it changes meanwhile, or where the
    hub refuses.
    """
    try:
        from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download

        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        remote = api.model_info(repository)
        names = {entry.rfilename for entry in remote.siblings or ()}
        others = names - files.keys() - {".gitattributes"}
        if others:
            raise UserError(
                f"{repository} holds {', '.join(sorted(others)[:3])}, which is no part of this ensemble; expected an "
                "empty repository or an earlier version; remove it there, or name another"
            )
        if FILE in names:
            file = Path(hf_hub_download(repository, FILE, revision=remote.sha))
            published, own = identity(load_manifest(file.parent, with_bases=False)), identity(manifest)
            if published != own:
                raise UserError(
                    f"{repository} holds the ensemble {published}; expected an empty repository or an earlier version "
                    f"of {own}; name another"
                )
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        done = api.create_commit(
            repository, operations, commit_message=f"Ensemble {manifest.name}", parent_commit=remote.sha
        )
        return str(done.oid)
    except UserError:
        raise
    except Exception as error:
        raise explain(error, repository) from None
