"""The offline backbone: the same bytes from the same texts, standard form, and a frozen random net that LoRA can teach."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Sequence

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.fork_server import run
from tests.distributed.processes import ROOT, environment
from tests.models.tiny_models import TEXTS, make_trie
from trainer.batch import Batch, Features
from trainer.config import AdapterConfig, BackboneConfig, TinyConfig
from trainer.models.backbone.causal_lm import build_backbone, build_tiny
from trainer.models.egmf import EGMF
from trainer.models.optimizer_groups import parameter_groups
from trainer.text import encode, end_token, start_tokens

SMALL = TinyConfig(vocab_size=400)


def digest(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "backbone"
    build_tiny(SMALL, TEXTS, folder)
    return folder


def test_the_same_texts_give_the_same_files_in_another_process(folder, tmp_path):
    program = (
        "import json, sys, pathlib\n"
        "from trainer.config import TinyConfig\nfrom trainer.models.backbone.tiny import build_tiny\n"
        "build_tiny(TinyConfig(vocab_size=400), json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", program, json.dumps(TEXTS), str(tmp_path / "again")]
    done = run(command, env=environment(), cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "again") == digest(folder)


def test_building_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    build_tiny(SMALL, TEXTS, tmp_path / "t")
    assert torch.equal(torch.rand(3), want)


def test_a_seed_or_text_changes_what_is_built_and_replaces_what_stood_there(tmp_path):
    build_tiny(SMALL, TEXTS, tmp_path / "t")
    first = digest(tmp_path / "t")
    time = (tmp_path / "t" / "model.safetensors").stat().st_mtime_ns
    build_tiny(SMALL, iter(TEXTS), tmp_path / "t")
    assert (tmp_path / "t" / "model.safetensors").stat().st_mtime_ns == time  # built from the same: left alone
    build_tiny(SMALL.model_copy(update={"seed": 1}), TEXTS, tmp_path / "t")
    second = digest(tmp_path / "t")
    assert second["model.safetensors"] != first["model.safetensors"]
    assert second["tokenizer.json"] == first["tokenizer.json"]
    build_tiny(SMALL, [*TEXTS, "more more more more"], tmp_path / "t")
    assert digest(tmp_path / "t")["tokenizer.json"] != first["tokenizer.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"mine is in the way.*no tiny backbone"):
        build_tiny(SMALL, TEXTS, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("disk full")

    monkeypatch.setattr("trainer.models.backbone.tiny._random_model", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        build_tiny(SMALL, TEXTS, tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_it_loads_by_the_usual_classes(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "qwen3"
    assert model.config.vocab_size == 400
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == end_token(tokenizer)


@pytest.mark.parametrize(
    "text", ["Hello, it's  me \n", "今天天气很好，我很高兴！", "so 😀👩‍👩‍👧 happy", "\t-0.5 1.0", "ﬁ Å \u0000"]
)
def test_text_survives_tokens(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_special_tokens_in_a_text_are_text(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "bye<|endoftext|> and <|pad|>"
    ids = encode(tokenizer, text)
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)
    assert tokenizer.decode(ids) == text
    tokenizer.add_tokens(["<think>"])  # an added token that is not special
    ids = encode(tokenizer, "I <think> so<think>")
    assert tokenizer.convert_tokens_to_ids("<think>") not in ids
    assert tokenizer.decode(ids) == "I <think> so<think>"
    assert encode(tokenizer, "") == []


def test_start_tokens_are_those_the_tokenizer_writes_itself(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert start_tokens(tokenizer) == []
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    special = [("<|pad|>", pad), ("<|endoftext|>", end)]
    for template, want in (
        ("<|pad|> $A", [pad]),
        ("<|pad|> <|pad|> $A <|endoftext|>", [pad, pad]),
        ("$A <|endoftext|>", []),
    ):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
        assert start_tokens(tokenizer) == want
        assert encode(tokenizer, "a") == encode(AutoTokenizer.from_pretrained(folder), "a")


def test_digits_are_single_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, "-12.5")) == ["-", "1", "2", ".", "5"]


def test_the_config_refuses_a_head_that_cannot_be_confident():
    with pytest.raises(ValueError, match="at least 12"):
        TinyConfig(hidden_size=128, initializer_range=0.02)


class Clips:
    """Texts that name their answer by a word of its own, as batches."""

    def __init__(self, answers: Sequence[str], tokenizer) -> None:
        self.answers, self.tokenizer = list(answers), tokenizer
        self.random = random.Random(0)
        self.end = end_token(tokenizer)
        self.tokens = [encode(tokenizer, answer) for answer in answers]

    @staticmethod
    def text(index: int) -> str:
        return f"the clip says {chr(97 + index // 8) * 2}{chr(97 + index % 8)} now"

    def batch(self, indices: Sequence[int], answers: bool = True) -> Batch:
        contexts = [encode(self.tokenizer, f"<Multimodal>{self.text(i)}</Multimodal>\nAnswer:") for i in indices]
        targets = [[*self.tokens[i], self.end] if answers else [] for i in indices]
        rows = [context + target[:-1] for context, target in zip(contexts, targets, strict=True)]
        longest, most = max(map(len, rows)), max(map(len, targets))
        n = len(rows)
        none = Features(torch.zeros(n, 1, 1), torch.zeros(n, 1, dtype=torch.bool), torch.zeros(n, 1))
        return Batch(
            task="clips",
            ids=[str(i) for i in indices],
            input_ids_BL=torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
            context_length_B=torch.tensor([len(context) for context in contexts]),
            pseudo_start=0,
            pseudo_tokens=0,
            answer_ids_BA=torch.tensor([target + [0] * (most - len(target)) for target in targets]),
            answer_mask_BA=torch.tensor([[i < len(target) for i in range(most)] for target in targets]),
            text_ids_BS=torch.zeros(n, 1, dtype=torch.long),
            text_mask_BS=torch.zeros(n, 1, dtype=torch.bool),
            audio=none,
            video=none,
            target_B=torch.zeros(n),
            weight_B=torch.ones(n),
        )

    def draw(self, n: int) -> Batch:
        return self.batch([self.random.randrange(len(self.answers)) for _ in range(n)])


def teach(answers: Sequence[str], folder, steps: int) -> torch.Tensor:
    """Probabilities `[C, C]` of all answers for every answer's own text, after NF4 + LoRA on the frozen random net."""
    texts = [Clips.text(i) for i in range(len(answers))] + [*answers, "<Multimodal>", "</Multimodal>", "Answer:"] * 20
    build_tiny(TinyConfig(vocab_size=512), texts, folder)
    torch.manual_seed(0)
    config = BackboneConfig(quantization="nf4")
    backbone = build_backbone(config, AdapterConfig(dropout=0.0), torch.float32, "cpu", folder=folder)
    clips = Clips(answers, backbone.tokenizer)
    model = EGMF(backbone, None).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 3e-3, 0.0), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(clips.draw(32)).loss_B.mean().backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        out = model(clips.batch(range(len(answers)), answers=False), make_trie(clips.tokens, clips.end))
    return out.logprob_BC.exp()


def test_nf4_and_lora_make_the_frozen_head_confident(tmp_path):
    probability = teach(["joy", "anger", "sadness", "fear"], tmp_path / "t", steps=40)
    assert probability.diag().min() > 0.95  # of all texts there are, not only of the four


@pytest.mark.parametrize(
    "steps_of_ten", [pytest.param(10, marks=pytest.mark.slow), 30]
)  # the smaller grid is a second look
def test_the_expectation_over_the_grid_is_not_shrunk(tmp_path, steps_of_ten):
    values = [i / 10 for i in range(-steps_of_ten, steps_of_ten + 1)]
    probability = teach([f"{v:.1f}" for v in values], tmp_path / "t", steps=140)
    truth = torch.tensor(values)
    expected = (probability / probability.sum(1, keepdim=True)) @ truth
    assert expected.std() / truth.std() >= 0.95
    assert (expected - truth).abs().mean() < 0.1
