"""An ensemble on the Hugging Face hub, named `hf-hub:USER/NAME@REVISION`: fetched once, checked, then a local folder.

`score`, `slides` and `training verify` take such a name. A job and the server take folders only, and never get here.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from .checksums import sha256
from .errors import UserError
from .manifest import FILE, load_manifest
from .seen import SEEN

PREFIX = "hf-hub:"
FORM = "hf-hub:USER/NAME@REVISION"
COMMIT = r"[0-9a-f]{40}"


def local_folder(given: Path) -> Path:
    """`given` itself, or for a name on the hub the folder in the hub's own cache that holds that ensemble.

    A commit is fetched once; from then on no network is asked for it. What a branch or a tag, or no revision at all,
    stands for is asked each time, and the commit is printed on stderr. UserError where anything is missing or altered.
    """
    name = str(given)
    if not name.startswith(PREFIX):
        return given
    match = re.fullmatch(r"hf-hub:([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-][\w./-]*))?", name)
    if not match:
        raise UserError(f"{name:.100} names no ensemble on the hub; expected {FORM}; correct it")
    repository, revision = match.groups()
    commit = revision if re.fullmatch(COMMIT, revision or "") else _commit(repository, revision)
    folder = _fetch(repository, commit, FILE).parent
    manifest = load_manifest(folder)
    for file, expected in manifest.files.items():
        _fetch(repository, commit, file.relative_to(folder).as_posix())
        if (digest := sha256(file)) != expected:
            raise UserError(
                f"{file} has SHA-256 {digest}; {FILE} of {PREFIX}{repository}@{commit} expects {expected}; "
                f"remove {file.resolve()} to fetch it again, and do not use the repository if that changes nothing"
            )
    _fetch_seen(repository, commit)
    return folder


def _fetch_seen(repository: str, commit: str) -> None:
    """Fetch the list of crops that the ensemble was trained on, if there is one; once a commit it is asked for."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    if try_to_load_from_cache(repository, SEEN, revision=commit) is not None:
        return  # here, or known to be missing
    try:
        hf_hub_download(repository, SEEN, revision=commit)
    except EntryNotFoundError:
        pass  # or no network: then `score` says that it is not known
    except Exception as error:
        raise explain(error, repository, commit, SEEN) from None


def _commit(repository: str, revision: str | None) -> str:
    """What a branch or a tag stands for now; None for the default branch."""
    try:
        from huggingface_hub import HfApi

        commit = HfApi().model_info(repository, revision=revision).sha
    except Exception as error:
        raise explain(error, repository, revision) from None
    if not re.fullmatch(COMMIT, commit or ""):
        raise UserError(f"the hub says that {repository} is at {commit!r:.80}; expected a commit; check HF_ENDPOINT")
    print(f"{PREFIX}{repository}@{commit} is what {revision or 'its default branch'} stands for now", file=sys.stderr)
    return str(commit)


def _fetch(repository: str, commit: str, file: str) -> Path:
    """Where the cache holds a file of a commit; only a file that it lacks is asked for."""
    try:
        from huggingface_hub import hf_hub_download

        quiet()
        return Path(hf_hub_download(repository, file, revision=commit))
    except Exception as error:
        raise explain(error, repository, commit, file) from None


def quiet() -> None:
    """Silence the hub's client: it says of each try that there is no network (we say it once), and draws bars."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()


def explain(error: Exception, repository: str, revision: str | None = None, file: str = FILE) -> UserError:
    """What the hub's client raised, as one line with what to do."""
    if isinstance(error, ModuleNotFoundError):
        return UserError(
            f"package {error.name} is not installed; expected huggingface_hub for what lies on the hub; "
            "run 'pip install huggingface_hub'"
        )
    from huggingface_hub import constants, errors

    if isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__
    page = f"{constants.ENDPOINT}/{repository}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    if isinstance(error, errors.GatedRepoError):
        if status == 403:
            return UserError(f"{repository} is gated, and your token has no access (status 403); ask for it at {page}")
        return UserError(f"{repository} is gated; expected access; ask for it at {page}, then run 'hf auth login'")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"the hub shows no repository {repository}; expected one that you may read; check the name, or run "
            "'hf auth login' if it is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{repository} has no revision {revision}; expected a commit, branch or tag; see {page}")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return UserError(f"{repository} holds no {file}; expected an ensemble; see {page}")
    if status == 401:
        return UserError(
            f"the hub knows no token of yours (status 401) for {repository}; expected one; run 'hf auth login'"
        )
    if status == 403:
        return UserError(
            f"your token may not do this with {repository} (status 403); expected one that may; see {page}, then run "
            "'hf auth login'"
        )
    reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    if constants.is_offline_mode():
        return UserError(
            f"{repository} at {revision or 'its default branch'} is not in the cache, or only in part, and "
            "HF_HUB_OFFLINE is set; expected a commit that was fetched before; name one, or unset it"
        )
    if isinstance(error, errors.LocalEntryNotFoundError) or type(error).__module__.startswith("httpx"):
        return UserError(f"the hub at {constants.ENDPOINT} cannot be reached ({reason}); expected a network; try again")
    return UserError(f"the hub failed on {repository} ({reason}); expected it to answer; try again, or see {page}")
