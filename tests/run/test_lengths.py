"""What samples need of a model's positions is known before the first step: learned tables, trained lengths, cut texts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from tests.distributed.processes import ROOT, egmf
from tests.models.families import FAMILIES, save_public
from tests.run.older import edit_state
from tests.tokenizers import byte_level, llama2
from tests.toy import prepare_toy
from trainer.config import BackboneConfig, RunConfig, dump_config, load_config
from trainer.data.dataset import open_dataset
from trainer.data.preparation.prepare import prepare
from trainer.data.sampling import MicroBatch
from trainer.distributed.world import World
from trainer.models.backbone.positions import PositionLimit, position_limit, skeleton
from trainer.results.predict import Options, predict
from trainer.run import assemble as assembling
from trainer.run import model_parts
from trainer.run.assemble import assemble
from trainer.run.evaluate import Scorer
from trainer.run.guards import probe
from trainer.run.lengths import PositionsError, check_positions, measure_splits
from trainer.run.saved import open_run
from trainer.tasks import get_task

ALONE = World(0, 1, torch.device("cpu"))
WORDS = (
    "i",
    "you",
    "we",
    "they",
    "really",
    "never",
    "always",
    "told",
    "said",
    "think",
    "know",
    "want",
    "go",
    "come",
    "see",
)
LONG = 160  # words of the longest text


def gpt2(folder: Path, tokenizer: PreTrainedTokenizerBase, positions: int) -> Path:
    """A random GPT-2 with so many positions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=positions,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )  # fmt: skip
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def samples(path: Path, long: dict[str, int]) -> Path:
    """30 samples of meld, ten a split, with `long` words in the fifth of some splits."""
    labels, lines = get_task("meld").labels, []
    for split in ("train", "valid", "test"):
        for i in range(10):
            words = long.get(split, 4) if i == 5 else 4
            text = " ".join(WORDS[(i + j) % len(WORDS)] for j in range(words))
            lines.append({"id": f"{split}-{i}", "text": text, "label": labels[i % 7], "split": split, "dialogue": f"{split}{i // 2}", "turn": i % 2})  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with 192 positions, and data whose longest texts are in train and test."""
    root = tmp_path_factory.mktemp("lengths")
    gpt2(root / "gpt2", byte_level(), 192)
    prepare(get_task("meld"), [samples(root / "long.jsonl", {"train": LONG, "test": LONG})], root / "long")
    prepare(get_task("meld"), [samples(root / "short.jsonl", {})], root / "short")
    return root


def config(folder: Path, *overrides: str, data: str = "long", model: str = "gpt2") -> RunConfig:
    return load_config(
        f"{ROOT}/configs/tiny.yaml",
        [
            "task=meld", f"data.path={folder}/{data}", f"model.backbone.name={folder / model}", "model.fusion.modalities=[text]",
            "train.steps=2", "train.global_batch=4", "track.mlflow=false", "track.report=false", *overrides,
        ],
    )  # fmt: skip


def train(asked: RunConfig, out: Path, *options: str) -> str:
    """What a run says."""
    path = out.parent / f"{out.name}.yaml"
    path.write_text(dump_config(asked))
    done = egmf("train", str(path), "--out", str(out), *options)
    assert done.returncode == 0, done.stderr
    return done.stderr


def refusal(asked: RunConfig, out: Path) -> str:
    with pytest.raises(PositionsError) as error:
        assemble(asked, out, ALONE, torch.float32)
    return str(error.value)


def test_every_split_is_compared_before_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(model_parts, "build_backbone", never)
    text = refusal(config(folder), tmp_path)
    assert "its table of positions has 192" in text
    assert "task meld, train: 1 of 10 samples, the longest of" in text
    assert "task meld, test: 1 of 10 samples" in text
    assert "train-5" in text
    assert "test-5" in text
    assert "valid" not in text
    assert "set data.max_text_tokens=" in text
    assert "test-5" not in refusal(config(folder, "eval.splits=[valid]"), tmp_path)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("mode", ["score", "generate"])
@pytest.mark.parametrize("more", [(), ("data.history=1",)])
def test_what_the_refusal_advises_is_enough_and_no_more_can_be_computed(
    folder: Path, tmp_path: Path, layout: str, mode: str, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest sample of `test` passes through the model with as many tokens as advised, and beyond the table it does not."""
    loss = (
        ("train.loss=constrained",) if mode == "score" else ()
    )  # as many tokens of an answer in training as in scoring
    asked = (f"data.layout={layout}", f"eval.mode={mode}", *loss, *more)
    room = int(refusal(config(folder, *asked), tmp_path).split("data.max_text_tokens=")[1].split()[0])

    def answer(tokens: int) -> Any:
        chosen = config(folder, *asked, f"data.max_text_tokens={tokens}")
        parts = assemble(chosen, tmp_path, ALONE, torch.float32)
        view = parts.data["meld"]["test"]
        parts.model.eval()
        at = view.ids.index("test-5")
        with torch.no_grad():
            scorer = Scorer(parts.model, parts, chosen, "meld", ALONE)
            answers = scorer.answer([view[at]], MicroBatch((at,), 1.0, (1,)))
        need = measure_splits(chosen, parts.data, parts.collators, parts.tries, ["test"], parts.limit)
        return answers, int(need[0].positions_N.max())

    _, need = answer(room)
    assert need <= 192
    assert more or need == 192
    monkeypatch.setattr(assembling, "check_positions", lambda *_: [])
    if not more:
        if mode == "score":  # a generated answer may end before its longest
            with pytest.raises(IndexError):
                answer(room + 1)
        monkeypatch.undo()
        assert "1 of 10" in refusal(config(folder, *asked, f"data.max_text_tokens={room + 1}"), tmp_path)


def test_a_prompt_that_leaves_no_room_is_told_as_such(folder: Path, tmp_path: Path) -> None:
    gpt2(tmp_path / "small", byte_level(), 24)
    text = refusal(config(folder, model=str(tmp_path / "small"), data="short"), tmp_path / "run")
    assert "the instruction, pseudo tokens, cue and longest answer alone take" in text
    assert "10 of 10 samples" in text
    assert "train-0, train-1, train-2, train-3, train-4, …" in text


FEW = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
OLD = {"n_positions": 40, "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50}
TABLES: dict[str, dict[str, Any]] = {
    "gpt2": OLD,
    "gpt_bigcode": OLD,
    "openai-gpt": OLD,
    "ctrl": {**OLD, "dff": 32},
    "gptj": {**OLD, "rotary_dim": 8},
    "codegen": {**OLD, "n_ctx": 40, "n_head": 4, "rotary_dim": 8},
    "opt": {**FEW, "max_position_embeddings": 40, "word_embed_proj_dim": 32, "ffn_dim": 32},
    "biogpt": {**FEW, "max_position_embeddings": 40},
    "bert": {**FEW, "max_position_embeddings": 40, "is_decoder": True},
    "gpt_neo": {"max_position_embeddings": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "vocab_size": 50},
    "llama": {**FEW, "max_position_embeddings": 40},
    "xglm": {"max_position_embeddings": 40, "d_model": 32, "num_layers": 1, "attention_heads": 2, "ffn_dim": 32, "vocab_size": 50},
    "falcon": {**FEW, "max_position_embeddings": 40},
    "bloom": {**FEW, "n_layer": 1, "n_head": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
@torch.no_grad()
def test_a_limit_is_where_the_model_itself_ends(kind: str, tmp_path: Path) -> None:
    shape = CONFIG_MAPPING[kind](**TABLES[kind])
    shape.save_pretrained(tmp_path)
    limit = position_limit(skeleton(BackboneConfig(name=str(tmp_path))))
    decoder = AutoModelForCausalLM.from_config(shape).eval().get_decoder()

    def read(length: int) -> None:
        embeds = torch.zeros(1, length, 32)
        decoder(inputs_embeds=embeds, position_ids=torch.arange(length)[None], use_cache=False)

    read(40)
    if limit is not None and limit.kind == "table":
        assert limit.positions == 40
        with pytest.raises((IndexError, RuntimeError)):
            read(41)
    else:
        assert limit == (None if kind == "bloom" else PositionLimit(40, "trained"))
        read(41)


def test_a_folder_that_cannot_be_read_has_no_limit_yet(tmp_path: Path) -> None:
    assert skeleton(BackboneConfig(name=str(tmp_path))) is None
    assert position_limit(None) is None


@pytest.mark.parametrize(
    ("changes", "hard"), [({}, False), ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, True)]
)  # fmt: skip
def test_rotary_models_warn_unless_answers_would_hang_on_the_batch(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], hard: bool
) -> None:
    tokenizer = byte_level()
    few = {**FEW, "vocab_size": len(tokenizer), "max_position_embeddings": 192, "eos_token_id": 0, "bos_token_id": None}
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**few, **changes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    asked = config(folder, model=str(tmp_path / "model"))
    if hard:
        assert "its rotary embedding depends on the longest sample of the batch" in refusal(asked, tmp_path)
        return
    with caplog.at_level(logging.WARNING):
        assemble(asked, tmp_path, ALONE, torch.float32)
    said = [r.message for r in caplog.records if "was trained on (192)" in r.message]
    assert len(said) == 1
    assert "train: 1 of 10 samples" in said[0]
    assert "test-5" in said[0]


def test_questions_of_one_dataset_and_folds_are_compared_too(folder: Path) -> None:
    parts = assemble(config(folder, data="short"), folder / "run", ALONE, torch.float32)
    lengths = measure_splits(
        config(folder), {"meld": open_dataset(folder / "long"), "other": open_dataset(folder / "long")},
        {"meld": parts.collators["meld"], "other": parts.collators["meld"]}, {"meld": parts.tries["meld"], "other": parts.tries["meld"]},
        ["train", "test"], parts.limit,
    )  # fmt: skip
    assert len(lengths) == 4
    with pytest.raises(PositionsError, match="train-5") as error:
        check_positions(lengths, parts.limit, config(folder))
    assert len(str(error.value).splitlines()) == 4


@pytest.mark.distributed
def test_cut_texts_are_told_and_recorded_and_an_evaluation_is_compared(folder: Path, tmp_path: Path) -> None:
    said = " ".join(train(config(folder, "data.max_text_tokens=40"), tmp_path / "run").split())
    longest = len(byte_level()(" ".join(WORDS[(5 + j) % len(WORDS)] for j in range(LONG)))["input_ids"])
    for split in ("train", "test"):
        told = f"task meld, {split}: 1 of 10 texts are cut to their last 40 tokens (data.max_text_tokens), the longest has {longest}"
        assert said.count(told) == 1
    assert "task meld, valid" not in said
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["texts"]["meld"]["test"] == {"texts": 10, "cut": 1, "longest": longest}
    assert record["texts"]["meld"]["valid"]["cut"] == 0
    longer = open_run(tmp_path / "run", ALONE, ["data.max_text_tokens=256"])
    with pytest.raises(PositionsError, match="test-5"):
        longer.evaluate("test")
    longer.evaluate("valid")

    def lines(run: Any, name: str) -> tuple[list[str], list[str]]:
        notes: list[str] = []
        predict(run, [folder / "long.jsonl"], tmp_path / name, Options(), report=notes.append)
        return [json.loads(line)["id"] for line in (tmp_path / name).read_text().splitlines()], notes

    answered, notes = lines(open_run(tmp_path / "run", ALONE), "cut.jsonl")
    assert len(answered) == 30
    assert notes[-1] == (
        f"note: 2 of 30 texts were cut to their last 40 tokens (data.max_text_tokens of the run), the longest had {longest}"
    )
    answered, notes = lines(longer, "left.jsonl")
    assert len(answered) == 28
    assert not {"train-5", "test-5"} & set(answered)
    assert sum("left out: too long for" in note and "its table of positions has 192" in note for note in notes) == 2


@pytest.mark.parametrize("mode", ["score", "generate"])
def test_the_probe_answers_the_largest_batches_of_every_split(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    seen: list[list[str]] = []

    class Noted(Scorer):
        def answer(self, samples: Any, micro: MicroBatch) -> Any:
            assert not self.parts.model.training
            seen.append([sample.id for sample in samples])
            return super().answer(samples, micro)

    monkeypatch.setattr(probe, "Scorer", Noted)
    asked = config(folder, "data.max_text_tokens=100", f"eval.mode={mode}", "eval.batch=3")
    parts = assemble(asked, tmp_path, ALONE, torch.float32)
    before = torch.get_rng_state()
    for split in ("valid", "test"):
        probe._answer(parts.model, parts, asked, "meld", [split], ALONE)  # type: ignore[arg-type]
        assert {name.partition("-")[0] for ids in seen for name in ids} == {split}
        assert max(map(len, seen)) == 3
        assert (f"{split}-5" in {name for ids in seen for name in ids}) == (split == "test") or split == "valid"
        seen.clear()
    assert parts.model.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.distributed
@pytest.mark.slow
def test_the_probe_changes_no_bit_of_a_training(tmp_path: Path) -> None:
    prepare_toy("meld", tmp_path, test=40)
    small = ["task=meld", "train.steps=2", "train.global_batch=8", "model.backbone.tiny.vocab_size=400", "track.mlflow=false",
             "track.report=false", f"data.path={tmp_path}/{{task}}", "eval.tokens=400"]  # fmt: skip
    weights = []
    for name, more in (("probed", "train.probe=true"), ("plain", "train.probe=false"), ("free", "eval.mode=generate")):
        train(load_config(f"{ROOT}/configs/tiny.yaml", [*small, more]), tmp_path / name)
        weights.append((tmp_path / name / "checkpoints/step-00000002/model.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]


def test_an_evaluation_batch_that_is_larger_than_memory_is_named_with_its_split(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Scorer):
        def answer(self, samples: Any, micro: MicroBatch) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(probe, "Scorer", Full)
    asked = config(folder, data="short")
    parts = assemble(asked, tmp_path, ALONE, torch.float32)
    with pytest.raises(probe.MemoryFault, match=r"(?s)the largest evaluation batch of test \(.*eval\.tokens="):
        probe._answer(parts.model, parts, asked, "meld", ["test"], ALONE)  # type: ignore[arg-type]


def test_layers_that_lora_cannot_adapt_are_refused_before_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(model_parts, "build_backbone", never)
    save_public(FAMILIES["Qwen 2 MoE"], tmp_path / "model")
    asked = config(folder, "model.adapter.targets=[q_proj,gate_proj]", model=str(tmp_path / "model"), data="short")
    with pytest.raises(ValueError, match=r"'gate_proj' names experts, which are fused here"):
        assemble(asked, tmp_path, ALONE, torch.float32)


@pytest.mark.distributed
def test_every_rank_refuses_and_none_waits(folder: Path, tmp_path: Path) -> None:
    done = egmf(
        "launch", "local", "--procs", "2", f"{ROOT}/configs/tiny.yaml", "--out", str(tmp_path / "run"), "task=meld", f"data.path={folder}/long",
        f"model.backbone.name={folder}/gpt2", "model.fusion.modalities=[text]", "train.steps=2", "track.mlflow=false", "track.report=false",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "task meld, test: 1 of 10 samples" in done.stderr


@pytest.mark.distributed
def test_a_run_of_an_earlier_version_keeps_its_joining(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpt2(tmp_path / "model", llama2(), 512)
    asked = config(folder, "train.steps=2", "train.save_every=1", model=str(tmp_path / "model"), data="short")
    train(asked, tmp_path / "run")
    now = open_run(tmp_path / "run", ALONE)
    assert now.parts.joining == "running"
    table, _ = now.evaluate("test")
    for checkpoint in (tmp_path / "run/checkpoints").glob("step-*"):
        edit_state(checkpoint, lambda state: state.pop("joining"))
    with caplog.at_level(logging.WARNING):
        older = open_run(tmp_path / "run", ALONE)
    assert "tokenised the pieces of its prompts apart" in caplog.text
    assert older.parts.joining == "apart"
    mark = older.parts.model.backbone.tokenizer.convert_tokens_to_ids("▁")
    assert [row.count(mark) - new.count(mark) for row, new in zip(older.parts.collators["meld"].answers, now.parts.collators["meld"].answers, strict=True)] == [1] * 7  # fmt: skip
    changed, _ = older.evaluate("test")
    assert not np.allclose(np.stack(list(table["probabilities"])), np.stack(list(changed["probabilities"])))
    longer = config(folder, "train.steps=3", "train.save_every=1", model=str(tmp_path / "model"), data="short")
    train(longer, tmp_path / "run", "--force")
    newest = json.loads((tmp_path / "run/checkpoints/step-00000003/state.json").read_text())
    assert newest["joining"] == "apart"


def test_generated_answers_that_would_never_be_a_label_are_refused(folder: Path, tmp_path: Path) -> None:
    from tests.tokenizers import bert

    gpt2(tmp_path / "model", bert(), 512)
    prepare_toy("mosei", tmp_path)
    asked = load_config(
        f"{ROOT}/configs/tiny.yaml",
        ["task=mosei", f"data.path={tmp_path}/mosei", f"model.backbone.name={tmp_path}/model", "eval.mode=generate"],
    )
    with pytest.raises(ValueError, match=r"does not give '-3\.0' \('- 3\. 0'\).* back as written.*eval\.mode=score"):
        assemble(asked, tmp_path / "run", ALONE, torch.float32)
