"""``egmf push``: an artefact goes to a hub, whole and in one commit."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from trainer.serving.artefact.description import DESCRIPTION, ArtefactError, check_files, read_description

log = logging.getLogger(__name__)

REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def check_repo(repo: str) -> None:
    """Raises ArtefactError for what cannot be the name of a hub's repository."""
    if not REPO.fullmatch(repo):
        raise ArtefactError(f"{repo!r} is no name of a hub's repository: write OWNER/NAME")


def list_files(folder: Path) -> dict[str, int]:
    """The files of an artefact with their sizes in bytes, after all were checked.

    Raises:
        ArtefactError: it is none, or a file has changed.
    """
    description = read_description(folder)
    for note in check_files(folder, description):
        log.warning("%s", note)
    return {name: (folder / name).stat().st_size for name in sorted([*description.files, DESCRIPTION])}


def push_artefact(folder: Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload an artefact's files, and no others, in one commit; the address of the commit is returned.

    The repository, and the branch `revision`, are made where they are not there.

    Raises:
        ArtefactError: no artefact, a file that has changed, or a hub that refuses; the message says why.
    """
    check_repo(repo)
    files = list_files(folder)
    description = read_description(folder)
    if description.base.place == "folder":
        log.warning(
            "%s names the folder of its base on this machine, %s, which others do not have: they give model.backbone.name=PATH",
            DESCRIPTION,
            description.base.name,
        )
    api = HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[_literal(name) for name in files],
            revision=revision,
            commit_message=f"{description.run.name}: artefact {description.hash[:16]}",
        )
    except HFValidationError as error:
        raise ArtefactError(f"{repo!r} is no name of a hub's repository: {error}") from error
    except (HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
        raise ArtefactError(f"{folder} could not be pushed to {repo} at {api.endpoint}: {_why(error)}") from error
    return str(commit.commit_url)


def _literal(name: str) -> str:
    """A file's name as a pattern that fits it alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _why(error: Exception) -> str:
    """The first line of a hub's answer, and what to do about it."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"{text}: log in with a token that may write (hf auth login)"
    if status is None and isinstance(error, OSError):
        return f"{text}: is there a network?"
    return text
