"""A run whose backbone came from a hub: the exported model names the commit that was read."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from tests.distributed.processes import egmf
from tests.models.tiny_models import save_family
from tests.serving.artefact.made import SMALL
from tests.toy import prepare_toy
from trainer.serving.artefact.description import read_description


def test_a_base_of_a_hub_is_named_by_its_commit(tmp_path: Path) -> None:
    """A model in the local cache of a hub, without a network: the commit that was read is what is opened, wherever `main` is then."""
    prepare_toy("meld", tmp_path)
    cache, commit = tmp_path / "hub" / "models--group--model", "0123456789abcdef0123456789abcdef01234567"
    save_family("qwen2", cache / "snapshots" / commit)
    (cache / "snapshots" / commit / "README.md").write_text("---\nlicense: mit\n---\n")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    where = ("task=meld", f"data.path={tmp_path}/{{task}}", "model.backbone.name=group/model")
    for command in (
        ("train", "configs/tiny.yaml", *SMALL, *where, "--out", str(tmp_path / "run")),
        ("export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--merge"),
    ):
        done = egmf(*command, **offline)
        assert done.returncode == 0, done.stderr
    described = read_description(tmp_path / "out")
    base = described.base
    assert (base.place, base.name, base.revision, base.license) == ("hub", "group/model", commit, "mit")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("group/model", "adapter")
    assert 'AutoModelForCausalLM.from_pretrained("group/model")' in card.text
    (cache / "refs" / "main").write_text("f" * 40)  # main has moved on
    (tmp_path / "in.jsonl").write_text('{"id": "a", "text": "red so"}\n')
    command = ("predict", str(tmp_path / "out"), "--input", str(tmp_path / "in.jsonl"), "--out", "-")
    answered = egmf(*command, **offline)
    assert answered.returncode == 0, answered.stderr
    other = save_family("qwen2", tmp_path / "other", tied=True)
    refused = egmf(*command, "--base", str(other), **offline)
    assert (refused.returncode, "does not hold the weights that the adapter was trained on" in refused.stderr) == (
        1,
        True,
    )
