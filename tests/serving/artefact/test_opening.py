"""What an opened artefact notices: every changed, missing or added file, other formats, and prompts that are asked in other words."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import egmf
from tests.serving.artefact.made import WORLD, answers
from trainer.config_files import ConfigError
from trainer.serving import check
from trainer.serving.artefact.description import (
    ArtefactError,
    Description,
    check_files,
    is_artefact,
    read_description,
    write_description,
)
from trainer.serving.artefact.opening import open_artefact
from trainer.serving.check import check_source
from trainer.serving.locate import open_model
from trainer.tasks import BUILT_IN

Copy = Callable[[Path], Path]


def described(folder: Path, **changes: Any) -> None:
    """Write the description with other values, and the hash that fits them."""
    write_description(folder, read_description(folder).model_copy(update=changes))


def test_a_changed_byte_is_noticed_in_every_file(artefact: Path, copy: Copy, caplog: pytest.LogCaptureFixture) -> None:
    changed = copy(artefact)
    files = [*read_description(artefact).files, "egmf.json"]
    assert len(files) > 15
    for name in files:
        path = changed / name
        raw = path.read_bytes()
        for place in {0, len(raw) // 2, len(raw) - 1}:
            path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
            if name == "README.md":  # which may be edited
                assert check_files(changed, read_description(changed)) == [
                    f"{changed}/README.md has changed since it was written: answers do not depend on it"
                ]
                continue
            with pytest.raises(ArtefactError) as raised:
                check_files(changed, read_description(changed))
            assert name in str(raised.value)
        path.write_bytes(raw)
    check_files(changed, read_description(changed))


def test_missing_cut_and_added_files_are_named_together(artefact: Path, copy: Copy) -> None:
    changed = copy(artefact)
    (changed / "fusion.safetensors").unlink()
    with (changed / "tokenizer" / "tokenizer.json").open("r+b") as file:
        file.truncate(100)
    (changed / "tokenizer" / "added_tokens.json").write_text('{"joy": 7}')  # which transformers would read
    (changed / "adapter" / "linked").symlink_to(changed, target_is_directory=True)
    with pytest.raises(ArtefactError) as raised:
        open_artefact(changed, WORLD)
    told = str(raised.value)
    for part in (
        "fusion.safetensors is missing", "tokenizer/tokenizer.json has 100 bytes and not ",
        "tokenizer/added_tokens.json is not part of the exported model", "adapter/linked is not part of the exported model",
    ):  # fmt: skip
        assert part in told


def test_what_clones_and_hubs_leave_is_no_fault(artefact: Path, copy: Copy) -> None:
    changed = copy(artefact)
    (changed / ".git").mkdir()
    (changed / ".git" / "config").write_text("")
    (changed / ".cache" / "huggingface").mkdir(parents=True)
    (changed / ".cache" / "huggingface" / "x.metadata").write_text("")
    (changed / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert check_files(changed, read_description(changed)) == []


def test_files_of_a_hubs_cache_are_links(artefact: Path, copy: Copy, tmp_path: Path) -> None:
    changed = copy(artefact)
    (tmp_path / "blobs").mkdir()
    for number, name in enumerate([*read_description(artefact).files, "egmf.json"]):
        blob = tmp_path / "blobs" / str(number)
        (changed / name).rename(blob)
        (changed / name).symlink_to(os.path.relpath(blob, (changed / name).parent))
    assert check_files(changed, read_description(changed)) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda raw: raw.update(format=2),
            r"has format 2, and this version of egmf-trainer reads format 1: use the version that wrote it \(0",
        ),
        (lambda raw: raw.pop("format"), "has format None"),
        (
            lambda raw: raw.update(more=1),
            "does not have what its format asks for .more: Extra inputs are not permitted",
        ),
        (lambda raw: raw.pop("tasks"), "tasks: Field required"),
        (lambda raw: raw["tasks"]["meld"].update(zero_frames="drop"), r"tasks\.meld\.zero_frames"),
        (lambda raw: raw["run"].update(seed=1), r"has changed since it was written \(its hash does not fit\)"),
        (lambda raw: raw["files"].pop("fusion.safetensors"), "its hash does not fit"),
        (lambda raw: raw.clear() or raw.update(format=1), r"version: Field required; .*; and \d+ more"),
    ],
)
def test_another_description_is_refused(
    change: Callable[[dict[str, Any]], None], told: str, artefact: Path, tmp_path: Path
) -> None:
    raw = json.loads((artefact / "egmf.json").read_text())
    change(raw)
    (tmp_path / "egmf.json").write_text(json.dumps(raw))
    with pytest.raises(ArtefactError, match=told):
        read_description(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"format": 1, "x": ' + "[" * 100_000])
def test_what_is_no_description_is_said(text: str, tmp_path: Path) -> None:
    (tmp_path / "egmf.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtefactError, match=r"egmf\.json is damaged"):
        read_description(tmp_path)


def test_a_folder_without_one_is_no_artefact(tmp_path: Path) -> None:
    assert not is_artefact(tmp_path)
    with pytest.raises(ArtefactError, match=r"is no exported model: it has no egmf\.json"):
        read_description(tmp_path)
    with pytest.raises(ValueError, match=r"is not a run folder: it has no config.yaml .*; nor is it an exported model"):
        check_source(tmp_path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../run/config.yaml", "adapter/../../x", "./README.md", ""])
def test_no_file_outside_is_read(name: str, artefact: Path, copy: Copy) -> None:
    changed = copy(artefact)
    files = read_description(artefact).files
    described(changed, files={**files, name: files["README.md"]})
    with pytest.raises(ArtefactError, match="names files outside of its folder"):
        open_artefact(changed, WORLD)


def test_a_config_that_refers_to_something_is_not_read(artefact: Path, copy: Copy) -> None:
    changed = copy(artefact)
    config = json.loads(json.dumps(read_description(artefact).config))
    config["model"]["backbone"]["name"] = "${oc.env:HOME}"
    described(changed, config=config)
    with pytest.raises(ArtefactError, match=r"a config that refers to something"):
        open_artefact(changed, WORLD)


def test_settings_of_other_versions(artefact: Path, copy: Copy) -> None:
    """One that this version does not have is left out where it was not used; one that the writer did not have is what it did then."""
    changed = copy(artefact)
    config = json.loads(json.dumps(read_description(artefact).config))
    config["model"]["fusion"]["former"] = None
    del config["eval"]["score"]
    described(changed, config=config)
    assert open_artefact(changed, WORLD).config.eval.score == "full"
    config["model"]["fusion"]["former"] = 3
    described(changed, config=config)
    with pytest.raises(ConfigError, match=r"does not have: model.fusion.former=3; use the version that wrote it \(0"):
        check_source(changed)


def test_prompts_in_other_words_are_refused(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a version would have it that writes its prompts in another way."""
    task = type(BUILT_IN["meld"])
    monkeypatch.setattr(task, "cue", lambda self, language=None: "Feeling:")
    with pytest.raises(
        ArtefactError,
        match="task meld: this version of egmf-trainer asks it in other words than the model was trained with",
    ):
        open_artefact(artefact, WORLD)


def test_overrides_are_checked_before_anything_is_loaded(artefact: Path) -> None:
    check_source(artefact, ["eval.batch=3"])
    with pytest.raises(ConfigError, match=r"eval\.batches: unknown key; did you mean batch"):
        check_source(artefact, ["eval.batches=3"])
    assert check.check_source is check_source
    opened = open_model(artefact, WORLD, ["eval.batch=3", "eval.prediction=mode"])
    assert (opened.config.eval.batch, opened.config.eval.prediction) == (3, "mode")
    done = egmf("predict", str(artefact), "--input", "none.jsonl", "--out", "-", "train.zero=7")
    assert (done.returncode, "train.zero: must be 0, 1, 2 or 3" in done.stderr) == (1, True), done.stderr


def test_the_artefacts_own_tokenizer_is_read(artefact: Path, copy: Copy, tmp_path: Path) -> None:
    """The base's may be gone, as where a hub's model was fetched without it."""
    changed = copy(artefact)
    files = dict(read_description(artefact).files)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (changed / "base" / name).unlink()
        del files[f"base/{name}"]
    described(changed, files=files)
    lines = [{"id": "a", "text": "red so", "task": "meld"}]
    assert answers(open_model(changed, WORLD), lines, tmp_path) == answers(open_model(artefact, WORLD), lines, tmp_path)


def test_a_description_is_known_by_its_hash(artefact: Path, tmp_path: Path) -> None:
    shutil.copy(artefact / "egmf.json", tmp_path)
    found = read_description(tmp_path)
    assert isinstance(found, Description)
    assert found.hash == found.digest
    assert found.model_copy(update={"created": "later"}).digest != found.hash
