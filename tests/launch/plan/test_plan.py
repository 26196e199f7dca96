"""The plan against real models, published sizes and counting by hand; measured memory is in test_plan_memory.py."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, Qwen2Config

from launch.plan.fake_model import build_fake_model, fake_tensors
from launch.plan.lengths import run_lengths
from launch.plan.memory import Setting, rank_memory, wire_bytes
from launch.plan.plan import RESERVED, MemoryPlan, Throughput, make_plan, profile_model
from launch.plan.recorded_pass import SAMPLE_LAYERS, extrapolate_layers, record_pass
from launch.plan.rows import Rows
from launch.plan.tables import render
from launch.plan.weights import count_weights
from launch.units import GIB
from tests.distributed.processes import egmf
from tests.models.tiny_models import ANSWERS, make_model, save_family
from tests.toy import prepare_toy
from trainer.batch import Batch, PackedBatch
from trainer.config import AdapterConfig, RunConfig, check_config
from trainer.data.collate import Collator
from trainer.data.dataset import open_dataset
from trainer.data.sampling import GlobalBatchSampler, Limits, all_micro_batches
from trainer.distributed.deepspeed_config import ZERO_DEFAULTS
from trainer.models.backbone.loading import load_tokenizer
from trainer.run.guards.probe import largest
from trainer.tasks import get_task

# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied; parameters as published
QWEN = {
    "0.5B": ((896, 4864, 24, 14, 2, 151936, True), 494_032_768),
    "1.5B": ((1536, 8960, 28, 12, 2, 151936, True), 1_543_714_304),
    "7B": ((3584, 18944, 28, 28, 4, 152064, False), 7_615_616_512),
    "72B": ((8192, 29568, 80, 64, 8, 152064, False), 72_706_203_648),
}
WIDTHS = {"one": {"audio": 6, "video": 5}, "two": {"audio": 4, "video": 0}}


def qwen(name: str, folder: Path) -> Path:
    hidden, inner, layers, heads, kv_heads, vocabulary, tied = QWEN[name][0]
    Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder)
    return folder


def config_of(**changes: object) -> RunConfig:
    raw: dict = {"task": "meld", "model": {"backbone": {}, "adapter": {}, "fusion": {}}, "train": {}, "data": {}}
    for key, value in changes.items():
        place = raw
        *path, leaf = key.split("__")
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = value
    return check_config(raw)


def small(folder: Path, **changes: object) -> RunConfig:
    """A run like the models of `tests/models/tiny_models.py`."""
    fusion = {"width": 32, "heads": 2, "dropout": 0.0, "pseudo_tokens": 3, "expert_loss_weight": 0.5}
    return config_of(
        model__backbone__name=str(folder),
        model__adapter__dropout=0.0,
        train__precision="fp32",
        model__fusion=fusion,
        **changes,
    )


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("llama", False)])
@pytest.mark.parametrize(("quantization", "double", "kind"), [("none", True, "full"), ("nf4", True, "lora"), ("nf4", False, "lora")])  # fmt: skip
def test_weighs_what_is_loaded(tmp_path, family, tied, quantization, double, kind):
    folder = save_family(family, tmp_path, tied=tied)
    options = {"quantization": quantization, "double_quantization": double}
    real = make_model(folder, expert_loss_weight=0.5, adapter=AdapterConfig(kind=kind, dropout=0.0), **options)
    config = small(folder, **{f"model__backbone__{k}": v for k, v in options.items()}, model__adapter__kind=kind)
    with fake_tensors():
        weights = count_weights(
            build_fake_model(config, AutoConfig.from_pretrained(folder), WIDTHS, torch.float32, answers=ANSWERS), 100
        )
    trained = [p for p in real.parameters() if p.requires_grad]
    frozen = [p for p in real.parameters() if not p.requires_grad]
    states = [p.quant_state for p in frozen if hasattr(p, "quant_state")]
    scales = [t for s in states for key, t in s.as_dict(packed=True).items() if "bitsandbytes" not in key]
    assert weights.trainable == sum(p.numel() for p in trained)
    assert sum(weights.trainable_parts.values()) == sum(weights.groups) == weights.trainable
    assert weights.dense_bytes + weights.packed_bytes == sum(p.nbytes for p in frozen)
    assert weights.packed_bytes == sum(p.nbytes for p in frozen if hasattr(p, "quant_state"))
    assert weights.scale_bytes == pytest.approx(sum(t.nbytes for t in scales), abs=4 * len(states))  # the offsets
    assert weights.four_bit == sum(math.prod(s.shape) for s in states)


@pytest.mark.parametrize("name", QWEN)
def test_counts_published_sizes(tmp_path, name):
    config = config_of(model__backbone={"name": str(qwen(name, tmp_path)), "quantization": "none"})
    with fake_tensors():
        weights = count_weights(
            build_fake_model(
                config, AutoConfig.from_pretrained(tmp_path), {"meld": {"audio": 3, "video": 2}}, torch.bfloat16
            ),
            0,
        )
    assert weights.frozen == QWEN[name][1]
    assert weights.dense_bytes == 2 * QWEN[name][1]


@pytest.mark.parametrize(
    ("packed", "quantization", "checkpointing"),
    [
        (True, "nf4", True),
        (False, "none", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((True, "none", False), (True, "nf4", False), (False, "none", True), (False, "nf4", False))),
    ],
)  # fmt: skip
def test_a_pass_without_weights_is_a_pass_with_them(tmp_path, packed, quantization, checkpointing):
    """The same recorder over a real model, and the model of 6 layers from those of 2 and 4."""
    folder = save_family("qwen2", tmp_path, num_hidden_layers=6)
    shape = AutoConfig.from_pretrained(folder)
    config = small(folder, model__backbone__quantization=quantization)
    rows = Rows("one", packed, 14, (34, 25), 3, ((1, 7, 9, 6), (1, 2, 0, 4)) if packed else ((2, 7, 9, 6),))
    with fake_tensors():
        few = [
            record_pass(build_fake_model(config, shape, WIDTHS, torch.float32, answers=ANSWERS, layers=n, checkpointing=checkpointing), rows)
            for n in (*SAMPLE_LAYERS, 6)
        ]  # fmt: skip
    grown = extrapolate_layers(few[0], few[1], 6)
    assert grown == few[2]
    real = make_model(folder, expert_loss_weight=0.5, quantization=quantization, gradient_checkpointing=checkpointing)
    recorded = record_pass(real.train(), rows)
    assert grown.flops == recorded.flops
    assert grown.peak == pytest.approx(recorded.peak, rel=0.03)


@pytest.mark.parametrize("packed", [True, False])
def test_counts_operations(tmp_path, packed):
    """A frozen layer multiplies twice for the output and twice for the input's gradient, twice more when recomputed."""
    config = config_of(
        model__backbone={"name": str(qwen("0.5B", tmp_path)), "quantization": "none"}, model__fusion__pseudo_tokens=0,
        model__adapter__rank=1,
    )  # fmt: skip
    rows = Rows("meld", packed, 256, (512, 384), 1, ((2, 8, 1, 1),))
    positions = 256 + 512 + 384 if packed else 2 * 768
    assert rows.positions == positions
    shape, layers = AutoConfig.from_pretrained(tmp_path), 6
    linear = layers * (896 * 896 * 2 + 896 * 128 * 2 + 3 * 896 * 4864) * positions
    # pairs of a query and a key: half of the square of a row; packed, both samples padded to the longer one, and the prefix
    pairs = 2 * 512 * 768 + 256 * 256 / 2 if packed else 2 * 768 * 768 / 2
    attention = layers * 14 * 64 * pairs * 2  # multiplications of scores and sums
    head = 2 * 896 * 151936
    with fake_tensors():
        work = {
            ck: record_pass(build_fake_model(config, shape, {"meld": {}}, torch.bfloat16, layers=layers, checkpointing=ck), rows)
            for ck in (False, True)
        }  # fmt: skip
    assert work[False].flops == pytest.approx(4 * linear + 3.5 * 2 * attention + 4 * head, rel=0.02)
    assert work[True].flops == pytest.approx(6 * linear + 4.5 * 2 * attention + 4 * head, rel=0.02)


def setting(stage: int, ranks: int, **changes: object) -> Setting:
    return dataclasses.replace(Setting(stage, False, ranks, torch.bfloat16, 1, {}), **changes)


def test_memory_by_hand(tmp_path):
    """Full tuning of 0.5B in bf16 on 8 ranks: 16 bytes a weight at stage 0, shared by 8 where a stage cuts."""
    config = config_of(
        model__backbone={"name": str(qwen("0.5B", tmp_path)), "quantization": "none"},
        model__adapter__kind="full", model__fusion__pseudo_tokens=0, data__path=str(tmp_path / "none"),
    )  # fmt: skip
    shape = AutoConfig.from_pretrained(tmp_path)
    model = profile_model(config, shape, run_lengths(config, 8))
    W = QWEN["0.5B"][1]
    parts = {z: rank_memory(model.weights, model.passes[True], setting(z, 8)).device for z in range(4)}
    assert model.weights.trainable == W
    assert [parts[z]["trainable weights"] for z in range(4)] == [2 * W, 2 * W, 2 * W, W // 4]
    assert [parts[z]["Adam's moments"] for z in range(4)] == [8 * W, W, W, W]
    assert [parts[z]["fp32 master weights"] for z in range(4)] == [4 * W, W // 2, W // 2, W // 2]
    offloaded = rank_memory(model.weights, model.passes[True], setting(2, 8, offload=True))
    assert "Adam's moments" not in offloaded.device
    assert offloaded.host["Adam's moments"] == W
    ring = 7 / 8
    sent = {z: sum(wire_bytes(model.weights, setting(z, 8)).values()) for z in range(4)}
    assert sent[0] == pytest.approx(2 * 2 * W * ring)
    assert sent[1] == pytest.approx(3 * 2 * W * ring)  # in bf16, although gradients accumulate in fp32
    assert sent[2] == pytest.approx(3 * 2 * W * ring)
    assert sent[3] == pytest.approx(2 * 2 * W * ring, rel=0.01)  # 0.5B stay from the forward pass to the backward pass
    forgets = setting(3, 8, zero={"stage3_max_reuse_distance": 0})
    assert sum(wire_bytes(model.weights, forgets).values()) == pytest.approx(3 * 2 * W * ring, rel=0.01)
    assert not any(wire_bytes(model.weights, setting(z, 1)) for z in range(4))


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param("0.5B", 1, marks=pytest.mark.slow),  # which `test_command` plans too
        ("7B", 64),
        pytest.param("72B", 1024, marks=pytest.mark.slow),
    ],
)
def test_plans_from_a_folder_alone(tmp_path, name, ranks):
    config = config_of(
        model__backbone={"name": str(qwen(name, tmp_path)), "quantization": "nf4", "gradient_checkpointing": True},
        data__path=str(tmp_path / "none"), train__global_batch=8 * ranks,
    )  # fmt: skip
    plan = make_plan(config, -(-ranks // 8), min(8, ranks), 80, Throughput(tflops=200), samples=100_000)
    assert plan.ranks == ranks
    assert plan.recommended is not None
    whole = plan.option(2, False, True).memory.total
    assert plan.option(3, True, True).memory.total <= whole
    assert all(plan.fits(option) == (option.memory.total + RESERVED <= 80 * GIB) for option in plan.options)
    if ranks > 1:
        assert plan.option(3, False, True).memory.device["4-bit weights"] == -(
            -plan.model.weights.packed_bytes // ranks
        )
    result = plan.to_json()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert plan.steps == 10 * math.ceil(100_000 / (8 * ranks))
    assert plan.hours == pytest.approx(plan.steps * plan.flops_per_step / 200e12 / 3600)
    assert any("no prepared dataset" in note for note in plan.lengths.assumptions)
    assert any("no tokenizer" in note for note in plan.lengths.assumptions)


@pytest.mark.parametrize(
    ("layout", "limits", "history"),
    [
        ("packed", {"micro_batch": 4}, 0),
        ("packed", {"micro_tokens": 220}, 2),
        ("padded", {"micro_batch": 4}, 0),
        ("padded", {"micro_tokens": 220}, 2),
    ],
)
def test_counts_positions_of_prepared_data(tmp_path, layout, limits, history):
    folder, data = save_family("qwen2", tmp_path / "model"), prepare_toy("meld", tmp_path, train=45)
    config = small(
        folder, data__path=str(data), data__layout=layout, data__history=history, train__global_batch=10,
        **{f"train__{key}": value for key, value in limits.items()},
    )  # fmt: skip
    lengths = run_lengths(config, 2)
    view = open_dataset(data, history=history)["train"]
    collate = Collator(
        get_task("meld"), load_tokenizer(config.model.backbone), config.data,
        widths=view.widths, rates=view.rates, pseudo_tokens=3, modalities=("text", "audio", "video"),
    )  # fmt: skip
    chosen = Limits.of_training(config, "cuda")
    order, sizes = GlobalBatchSampler({"meld": view.lengths()}, global_batch=10, seed=0), collate.sizes(view)
    steps = [
        [collate.training([view[i] for i in micro.indices], micro, None) for micro in cut]
        for step in range(order.steps_per_epoch)
        for cut in [all_micro_batches(order.step(step).indices, sizes, chosen, 2)]
    ]
    positions = [sum(batch.positions for batch in step) for step in steps]
    assert lengths.step_positions == pytest.approx(np.mean(positions))
    assert lengths.positions_per_sample == pytest.approx(np.sum(positions) / 45)
    assert lengths.micro_batches == np.mean([len(step) for step in steps])
    assert lengths.micro_steps == np.mean([-(-len(step) // 2) for step in steps])
    every = [batch for step in steps for batch in step]
    for micro in largest(sizes, chosen, 10, 2):  # what a run tries before its first step
        every.append(collate.training([view[i] for i in micro.indices], micro, None))
    assert max(rows.positions for rows in lengths.largest) == max(batch.positions for batch in every)
    assert max(rows.read for rows in lengths.largest) == max(map(reading, every))
    assert lengths.steps_per_epoch == order.steps_per_epoch
    assert lengths.samples == {"meld": 45}
    assert lengths.assumptions == []


def reading(batch: Batch | PackedBatch) -> int:
    """Tokens and frames of the fusion network's calls, padding included; a modality that is missing counts nothing."""
    return sum(
        len(group)
        * sum(int(mask_BT.sum(1).max()) for mask_BT in (group.text_mask_BS, group.audio.mask_BT, group.video.mask_BT))
        for group in batch.inputs
    )


def test_packed_rows_hold_the_instruction_once(tmp_path):
    """Without data: a step of 64 samples of 25 tokens in rows of up to 1024 positions."""
    config = config_of(
        model__backbone__name=str(qwen("0.5B", tmp_path)), data__path=str(tmp_path / "none"), train__global_batch=64,
        train__micro_tokens=1024,
    )  # fmt: skip
    packed = run_lengths(config, 2)
    prefix, own = packed.largest[0].prefix, packed.largest[0].own[0]
    each = (1024 - prefix) // own
    assert packed.micro_steps == math.ceil(64 / 2 / each)  # even, so as many for both
    assert packed.micro_batches == 2 * packed.micro_steps
    assert packed.step_positions == 64 * own + packed.micro_batches * prefix
    config.data.layout = "padded"
    padded = run_lengths(config, 2)
    assert padded.positions_per_sample == prefix + own
    assert padded.micro_batches == math.ceil(64 / (1024 // (prefix + own)))
    stated = run_lengths(config, 2, positions=prefix + 40)
    assert stated.positions_per_sample == prefix + 40
    with pytest.raises(ValueError, match=rf"--positions={prefix} .* alone has {prefix}"):
        run_lengths(config, 2, positions=prefix)


def test_samples_that_carry_all_answers_have_more_positions(tmp_path: Path) -> None:
    about: dict[str, Any] = {"task": "simsv2", "data": {"path": str(tmp_path)}, "model": {"backbone": {"name": "tiny"}}}
    plain = run_lengths(check_config(about), 1)
    with_answers = run_lengths(check_config({**about, "train": {"regression_loss": 1.0}}), 1)
    most, least = (min(min(rows.own) for rows in lengths.largest) for lengths in (with_answers, plain))
    answers = most - least + plain.largest[0].answer - 1
    assert 21 <= answers <= 60  # the numbers from -1.0 to 1.0, each a token or two
    assert any(f"at most {answers} positions of answers" in note for note in with_answers.assumptions)


def test_command(tmp_path):
    folder = qwen("0.5B", tmp_path / "model")
    smaller = ("model.fusion.experts=[local]", f"data.path={tmp_path}/none")
    arguments = ["plan", "configs/meld.yaml", f"model.backbone.name={folder}", *smaller]
    result = egmf(*arguments, "--nodes", "2", "--gpus-per-node", "4", "--gpu-memory", "24", "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["parameters"]["frozen"] == QWEN["0.5B"][1]
    assert plan["ranks"] == 8
    assert plan["hours"] is None


@pytest.mark.slow  # a process of its own; tests/launch/doctor/test_preflight.py has the words of a model that is not there
def test_command_offline():
    result = egmf("plan", "configs/meld.yaml", "model.backbone.name=owner/model", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set: fetch it where there is a network" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.returncode == 1


def test_faults_in_words(tmp_path):
    with pytest.raises(ValueError, match="no model folder /no/such/folder"):
        make_plan(config_of(model__backbone__name="/no/such/folder"), 1, 1, 80, Throughput())
    with pytest.raises(
        ValueError, match=r"gpu-memory=0 .*\n.*an optimizer in host memory needs ZeRO: use train\.zero=1, 2 or 3"
    ):
        make_plan(config_of(train__offload="cpu", train__zero=0), 1, 1, 0, Throughput())


def test_says_which_files_of_a_folder_a_run_would_refuse(tmp_path: Path) -> None:
    folder = save_family("qwen2", tmp_path / "model")
    config = config_of(model__backbone__name=str(folder))
    assert not [note for note in run_lengths(config, 1).assumptions if "refuse" in note]
    (folder / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{")
    notes = [note for note in run_lengths(config, 1).assumptions if note.startswith(f"a run would refuse {folder}: ")]
    assert len(notes) == 3
    for part in ("model.safetensors is an HTML page", "adapter_config.json lies beside", "tokenizer.json is no JSON"):
        assert sum(part in note for note in notes) == 1
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").unlink()
    (folder / "tokenizer.json").unlink()  # nor does a folder without weights and tokenizer hinder a plan
    assert not [note for note in run_lengths(config, 1).assumptions if "refuse" in note]


@pytest.fixture(scope="module")
def plan_of_7b(tmp_path_factory: pytest.TempPathFactory) -> MemoryPlan:
    """A 7B model in bf16 with LoRA on 8 GPUs of 80 GiB, a step of fewer micro-batches than GPUs."""
    folder = tmp_path_factory.mktemp("7B")
    config = config_of(
        model__backbone={"name": str(qwen("7B", folder)), "quantization": "none"}, data__path=str(folder / "none"),
        model__fusion__experts=["local"], train__micro_batch=16,
    )  # fmt: skip
    return make_plan(config, 1, 8, 80, Throughput())


def test_shows_what_does_not_fit(plan_of_7b):
    plan = dataclasses.replace(plan_of_7b, gpu_memory=0.5)
    lines = [part for part in render(plan) if isinstance(part, str)]
    assert any(part.startswith("nothing fits: the smallest needs") for part in lines)
    assert any(part.startswith("left out:") for part in lines)
    assert any("train.micro_tokens=1024 (now 2048)" in part for part in lines)
    assert any(
        "GPUs have nothing to do: raise train.global_batch, or cut it finer with train.micro_batch=4, or null" in part
        for part in lines
    )


def test_recommends_what_fits(plan_of_7b):
    """24 GiB hold the model whole only with checkpointing, 12 GiB only cut up."""

    def chosen(memory: float) -> tuple[int, bool, bool] | None:
        option = dataclasses.replace(plan_of_7b, gpu_memory=memory).recommended
        return None if option is None else (option.stage, option.offload, option.checkpointing)

    assert chosen(80) == (2, False, False)
    assert chosen(24) == (2, False, True)
    assert chosen(12) == (3, False, True)
    assert chosen(3) is None


def test_zero_defaults_are_those_of_deepspeed():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = DeepSpeedZeroConfig(stage=3).model_dump()
    names = {"stage3_" + name: name for name in ("prefetch_bucket_size", "param_persistence_threshold")}
    names["stage3_max_reuse_distance"] = "max_reuse_distance"
    assert {key: config[names.get(key, key)] for key in ZERO_DEFAULTS} == ZERO_DEFAULTS
