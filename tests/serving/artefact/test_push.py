"""An artefact goes to a hub: to a stand-in of its HTTP interface, with the real client in a process of its own."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import egmf
from tests.serving.artefact.hub import LARGE, Hub, local_hub
from tests.serving.artefact.made import WORLD, answers
from trainer.serving.artefact.description import ArtefactError, read_description
from trainer.serving.artefact.push import list_files, push_artefact
from trainer.serving.locate import open_model

Copy = Callable[[Path], Path]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with local_hub() as hub:
        yield hub


def push(hub: Hub, *arguments: str, token: str = "hf_right") -> Any:
    return egmf(
        "push", *arguments, HF_ENDPOINT=hub.url, HF_TOKEN=token, HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1",
    )  # fmt: skip


def written(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_what_a_hub_has_afterwards_answers(hub: Hub, artefact: Path, tmp_path: Path) -> None:
    done = push(hub, str(artefact), "group/model", "--private")
    assert done.returncode == 0, done.stderr
    assert f"pushed: {hub.url}/group/model/commit/" in done.stderr
    assert hub.private
    description = read_description(artefact)
    assert hub.messages == [f"run: artefact {description.hash[:16]}"]  # one commit
    files = hub.branches["main"]
    assert files.keys() == {*description.files, "egmf.json"}
    assert all((artefact / name).read_bytes() == content for name, content in files.items())
    assert len(hub.blobs) == len({content for content in files.values() if len(content) >= LARGE}) > 3  # by LFS
    lines = [{"id": "a", "text": "red so", "task": "meld"}]
    fetched = open_model(written(files, tmp_path / "fetched"), WORLD)
    assert answers(fetched, lines, tmp_path) == answers(open_model(artefact, WORLD), lines, tmp_path)


def test_a_branch_and_a_repository_that_is_there(hub: Hub, artefact: Path) -> None:
    assert push(hub, str(artefact), "group/model").returncode == 0
    assert push(hub, str(artefact), "group/model", "--revision", "v2").returncode == 0
    assert hub.branches["v2"].keys() == hub.branches["main"].keys()
    assert len(hub.messages) == 2


def test_a_dry_run_lists_files_and_sizes_and_asks_nobody(hub: Hub, artefact: Path) -> None:
    done = push(hub, str(artefact), "group/model", "--dry-run")
    assert done.returncode == 0, done.stderr
    listed = dict(re.findall(r"│ (\S+) +│ ([\d,]+) +│", done.stdout))
    assert {name: int(size.replace(",", "")) for name, size in listed.items()} == list_files(artefact)
    assert re.search(rf"{len(listed)} files, [\d,]+ bytes; nothing was uploaded", done.stderr)
    wrong = push(hub, str(artefact), "no name", "--dry-run")
    assert wrong.returncode == 1
    assert "write OWNER/NAME" in wrong.stderr
    assert hub.asked == []


def test_a_changed_file_is_not_uploaded(hub: Hub, artefact: Path, copy: Copy) -> None:
    changed = copy(artefact)
    raw = bytearray((changed / "fusion.safetensors").read_bytes())
    raw[-1] ^= 1
    (changed / "fusion.safetensors").write_bytes(raw)
    for more in ((), ("--dry-run",)):
        done = push(hub, str(changed), "group/model", *more)
        assert done.returncode == 1
        assert "fusion.safetensors has changed since it was written" in done.stderr
    assert hub.asked == []


def test_nothing_else_in_the_folder_is_uploaded(hub: Hub, artefact: Path, copy: Copy) -> None:
    changed = copy(artefact)
    (changed / ".git").mkdir()
    (changed / ".git" / "credentials").write_text("secret")
    assert push(hub, str(changed), "group/model").returncode == 0
    assert hub.branches["main"].keys() == {*read_description(artefact).files, "egmf.json"}


@pytest.mark.parametrize(
    ("refuse", "token", "told"),
    [
        ({}, "hf_wrong", "log in with a token that may write"),
        ({"/api/repos/create": 403}, "hf_right", "log in with a token that may write"),
        ({"/preupload/": 400}, "hf_right", "could not be pushed to group/model"),
        ({"/blobs/": 400}, "hf_right", "could not be pushed to group/model"),
        ({"/commit/": 403}, "hf_right", "log in with a token that may write"),
    ],
)
def test_a_hub_that_refuses_is_explained(
    refuse: dict[str, int], token: str, told: str, hub: Hub, artefact: Path
) -> None:
    hub.refuse = refuse
    done = push(hub, str(artefact), "group/model", token=token)
    assert (done.returncode, told in done.stderr, "Traceback" in done.stderr) == (1, True, False), done.stderr
    assert not hub.branches.get("main")


def test_names_and_folders_that_are_none(artefact: Path, tmp_path: Path) -> None:
    for name in ("model", "a/b/c", "/a", "a b/c", "https://hub/a/b", ""):
        with pytest.raises(ArtefactError, match="is no name of a hub's repository: write OWNER/NAME"):
            push_artefact(artefact, name)
    with pytest.raises(ArtefactError, match="is no exported model"):
        push_artefact(tmp_path, "a/b")
    shutil.copy(artefact / "egmf.json", tmp_path)
    with pytest.raises(ArtefactError, match="is missing"):
        push_artefact(tmp_path, "a/b")
