"""Runs of every kind are exported and answer as they did: backbones trained whole or not at all, text alone, own tasks, questions, folds, code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.data.test_folds import SESSIONS, lines, write
from tests.data.test_questions import AROUSAL, EMOTION, TOPICS, VALENCE, corpus
from tests.models.tiny_models import save_family
from tests.serving.artefact.made import WORLD, answers, sample_lines, train
from tests.test_extending import example
from tests.toy import prepare_toy
from trainer.data.preparation.prepare import prepare
from trainer.questions import define
from trainer.run.saved import open_run
from trainer.serving.artefact.description import ArtefactError, Description
from trainer.serving.artefact.export import ExportOptions, export_run
from trainer.serving.locate import open_model
from trainer.tasks import get_task
from trainer.trust import UntrustedCodeError

Exported = Callable[..., tuple[Path, Path, Description]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared toy dataset of MELD."""
    folder = tmp_path_factory.mktemp("kinds")
    prepare_toy("meld", folder)
    return folder


@pytest.fixture
def exported(folder: Path, tmp_path: Path) -> Exported:
    """Trains a run with some settings, and exports it: the run, the folder, and its description."""

    def make(*overrides: str, data: str = "", options: ExportOptions | None = None) -> tuple[Path, Path, Description]:
        where = data or f"data.path={folder}/{{task}}"
        run = train(tmp_path / "run", *(overrides or ("task=meld",)), where)
        return run, tmp_path / "out", export_run(run, tmp_path / "out", options)

    return make


def assert_same_answers(run: Path, out: Path, asked: list[dict[str, Any]], folder: Path) -> list[Any]:
    found = answers(open_model(out, WORLD), asked, folder)
    assert found == answers(open_run(run, WORLD), asked, folder)
    return found


@torch.no_grad()
def test_a_backbone_that_was_trained_whole(folder: Path, exported: Exported, tmp_path: Path) -> None:
    run, out, described = exported("task=meld", "model.adapter.kind=full", "train.precision=bf16")
    assert (described.adapter.kind, described.base.place, described.adapter.pairs) == ("full", "inside", 0)
    assert sorted(p.name for p in out.iterdir()) == [
        "LICENSE",
        "README.md",
        "backbone",
        "egmf.json",
        "fusion.safetensors",
        "tokenizer",
    ]
    assert_same_answers(run, out, sample_lines(folder / "meld", "meld", tmp_path), tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(out / "backbone")
    assert opened.dtype is torch.bfloat16
    ids = AutoTokenizer.from_pretrained(out / "backbone")("red so", return_tensors="pt")["input_ids"]
    ours = open_run(run, WORLD).parts.model.backbone.base
    assert torch.equal(opened.eval()(ids).logits, ours(input_ids=ids, use_cache=False).logits)
    with pytest.raises(ArtefactError, match="the run trained the backbone itself, which is exported whole anyway"):
        export_run(run, tmp_path / "merged", ExportOptions(merge=True))


def test_a_backbone_that_was_not_trained(folder: Path, exported: Exported, tmp_path: Path) -> None:
    run, out, described = exported("task=meld", "model.adapter.kind=frozen")
    assert described.adapter.tensors == 0
    assert not (out / "adapter").exists()
    assert "the backbone was not trained" in (out / "README.md").read_text()
    assert_same_answers(run, out, sample_lines(folder / "meld", "meld", tmp_path), tmp_path)
    with pytest.raises(ArtefactError, match="there is nothing to merge"):
        export_run(run, tmp_path / "merged", ExportOptions(merge=True))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_text_alone(kind: str, folder: Path, exported: Exported, tmp_path: Path) -> None:
    run, out, described = exported("task=meld", "model.fusion.pseudo_tokens=0", f"model.adapter.kind={kind}")
    assert described.pseudo_tokens == 0
    assert not (out / "fusion.safetensors").exists()
    assert "the model reads text alone" in (out / "README.md").read_text()
    assert_same_answers(run, out, sample_lines(folder / "meld", "meld", tmp_path), tmp_path)


def test_several_questions_about_the_same_samples(exported: Exported, tmp_path: Path) -> None:
    """The YAML file of the questions is gone when the model is opened; they share encoders."""
    raw = {"name": "corpus", "questions": [VALENCE, AROUSAL, EMOTION]}
    (tmp_path / "corpus.yaml").write_text(yaml.safe_dump(raw))
    source = corpus(tmp_path)
    prepare(define(raw), [source], tmp_path / "data" / "corpus")
    where = f"data.path={tmp_path}/data/{{task}}"
    run, out, described = exported(f"task={tmp_path}/corpus.yaml", "eval.select.emotion=uar", data=where)
    assert {name: task.dataset for name, task in described.tasks.items()} == dict.fromkeys(
        ("valence", "arousal", "emotion"), "corpus"
    )
    assert described.tasks["emotion"].definition["select"] == "uar"
    asked = [json.loads(line) for line in source.read_text().splitlines()]
    asked = [
        {"id": one["id"], "text": one["text"], "audio": f"{tmp_path}/{one['audio']}", "task": "corpus"}
        for one in asked
        if one["split"] == "test"
    ]
    before = answers(open_run(run, WORLD), asked, tmp_path)
    (tmp_path / "corpus.yaml").unlink()
    assert answers(open_model(out, WORLD), asked, tmp_path) == before
    assert len(before) == 3 * len(asked)


def test_several_labels_a_sample_by_a_yaml_file(exported: Exported, tmp_path: Path) -> None:
    file = tmp_path / "topics.yaml"
    file.write_text(
        yaml.safe_dump(TOPICS | {"prompts": {"en": {"instruction": "Which of {answers}?", "cue": "They are:"}}})
    )
    prepare_toy(str(file), tmp_path)
    run, out, described = exported(f"task={file}", data=f"data.path={tmp_path}/{{task}}")
    entry = described.tasks["topics"]
    assert entry.answers == [" work: yes", " work: no", " home: yes", " home: no"]
    assert entry.prompt.before.startswith("Which of work, home?")
    asked = sample_lines(tmp_path / "topics", "topics", tmp_path)
    before = answers(open_run(run, WORLD), asked, tmp_path)
    file.unlink()
    assert answers(open_model(out, WORLD), asked, tmp_path) == before


def test_a_fold_is_written_down(exported: Exported, tmp_path: Path) -> None:
    prepare(get_task("meld"), [write(tmp_path / "own.jsonl", lines())], tmp_path / "meld")
    run, out, described = exported("task=meld", "data.fold=Ses2", data=f"data.path={tmp_path}/{{task}}")
    assert described.run.fold == {"name": "Ses2", "names": list(SESSIONS), "train": 20, "test": 20}
    assert "with the fold Ses2 as test" in (out / "README.md").read_text().replace("\n", " ")
    asked = [{"id": one["id"], "text": one["text"], "task": "meld"} for one in lines()[:9]]
    assert_same_answers(run, out, asked, tmp_path)


def test_code_of_the_user_travels_and_runs_where_it_is_agreed_to(
    folder: Path, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = tmp_path / "rhythm.py"
    plugin.write_text(example("rhythm.py"), encoding="utf-8")
    run, out, described = exported(
        "task=meld", f'model.fusion.plugins=["{plugin}"]', "model.fusion.experts=[local,semantic,global,rhythm]"
    )
    assert list(described.code) == ["code/rhythm.py"]
    assert (out / "code" / "rhythm.py").read_bytes() == plugin.read_bytes()
    asked = sample_lines(folder / "meld", "meld", tmp_path)
    before = answers(open_run(run, WORLD), asked, tmp_path)
    plugin.unlink()
    assert answers(open_model(out, WORLD), asked, tmp_path) == before  # who trained with it has agreed
    assert "rhythm" in before[0]["gate_expert"]
    monkeypatch.setenv("EGMF_CONFIG_DIR", str(tmp_path / "somebody else"))
    with pytest.raises(
        UntrustedCodeError, match=r"would run Python code that came with it.*\n  .*out/code/rhythm\.py"
    ) as raised:
        open_model(out, WORLD)
    agreed = str(raised.value).split("--trust-code ")[1].split(";")[0]
    assert answers(open_model(out, WORLD, trust_code=agreed), asked, tmp_path) == before


def test_a_base_in_a_folder_is_named_by_path_and_hash(folder: Path, exported: Exported, tmp_path: Path) -> None:
    base = save_family("qwen2", tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    run, out, described = exported(
        "task=meld", f"model.backbone.name={base}", options=ExportOptions(merge=True, dtype="bf16")
    )
    assert (described.base.place, described.base.name, described.base.license) == ("folder", str(base), "apache-2.0")
    assert not (out / "base").exists()
    assert "Its licence, as its folder or its card says: apache-2.0." in (out / "LICENSE").read_text()
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert AutoModelForCausalLM.from_pretrained(out / "merged").dtype is torch.bfloat16
    asked = sample_lines(folder / "meld", "meld", tmp_path)
    before = assert_same_answers(run, out, asked, tmp_path)
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(
        ArtefactError,
        match=r"was the folder .*base, which is not here: say where it is now with model.backbone.name=PATH",
    ):
        open_model(out, WORLD)
    assert answers(open_model(out, WORLD, [f"model.backbone.name={moved}"]), asked, tmp_path) == before
    other = save_family("qwen2", tmp_path / "other", hidden_size=64, tied=True)
    with pytest.raises(ArtefactError, match=r"other does not hold the weights that the adapter was trained on \(hash"):
        open_model(out, WORLD, [f"model.backbone.name={other}"])
    with pytest.raises(
        ArtefactError, match="does not hold the weights that the adapter was trained on"
    ):  # before it merges
        export_run(run, tmp_path / "wrong", ExportOptions(merge=True, base=str(other)))
    assert not (tmp_path / "wrong").exists()


def test_the_same_base_held_in_another_way(folder: Path, exported: Exported, tmp_path: Path) -> None:
    """Another precision or 4 bits: its hash is then compared as training held it."""
    base = save_family("qwen2", tmp_path / "base")
    _, out, _ = exported("task=meld", f"model.backbone.name={base}")
    asked = sample_lines(folder / "meld", "meld", tmp_path)
    before = answers(open_model(out, WORLD), asked, tmp_path)
    half = open_model(out, WORLD, ["train.precision=bf16"])
    assert half.parts.model.backbone.base.dtype is torch.bfloat16
    for one, two in zip(before, answers(half, asked, tmp_path), strict=True):
        assert list(one["probabilities"].values()) == pytest.approx(list(two["probabilities"].values()), abs=0.1)
    open_model(out, WORLD, ["model.backbone.quantization=nf4"])
    other = save_family("qwen2", tmp_path / "other", tied=True)
    for how in ("train.precision=bf16", "model.backbone.quantization=nf4"):
        with pytest.raises(ArtefactError, match="does not hold the weights that the adapter was trained on"):
            open_model(out, WORLD, [how, f"model.backbone.name={other}"])
