"""One rank of the tests of sharded loading: weights, logits, what a forward pass holds, checkpoints; results as JSON."""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from trainer.distributed.process_group import quiet_deepspeed, start_world, stop_world
from trainer.distributed.world import World

quiet_deepspeed()

ZERO3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
LOOSE = (  # nothing stays gathered longer than its layer needs it
    "deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
    "deepspeed.zero_optimization.stage3_max_reuse_distance=0",
    "deepspeed.zero_optimization.stage3_max_live_parameters=0",
    "deepspeed.zero_optimization.stage3_prefetch_bucket_size=0",
)
MODES = {
    "none": (),
    "non-reentrant": ("model.backbone.gradient_checkpointing=true",),
    "reentrant": ("model.backbone.gradient_checkpointing=true", "model.backbone.reentrant=true"),
}


def printed(work: Callable[[], Any]) -> str:
    try:
        return str(work())
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


def equality(models: Path, world: World) -> dict[str, Any]:
    """Every model of `models` loaded whole by transformers and in parts by us: are logits and hashes the same?"""
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    from trainer.config import BackboneConfig
    from trainer.models.backbone.fingerprint import fingerprint, measure
    from trainer.models.backbone.loading import load_model
    from trainer.models.backbone.quantization import nf4_config
    from trainer.models.backbone.sharded import gathered_by_layer, is_partitioned

    cases = json.loads((models / "cases.json").read_text())
    results = {}
    ids = torch.randint(2, 320, (2, 9), generator=torch.Generator().manual_seed(1))
    for name, case in cases.items():
        dtype = getattr(torch, case["dtype"])
        config = BackboneConfig(name=str(models / case["folder"]), **case["backbone"])
        nf4 = nf4_config(dtype, config.double_quantization) if config.quantization == "nf4" else None
        whole = AutoModelForCausalLM.from_pretrained(config.name, dtype=dtype, quantization_config=nf4).eval()
        for layer in whole.modules():
            if isinstance(layer, Linear4bit):
                layer.support_avx512bf16_for_cpu = False  # would repack the weights
        loaded = load_model(config, dtype, world.device, None, zero3=ZERO3, ranks=world)
        model = loaded.model.eval()
        with torch.no_grad():
            expected = whole(ids, use_cache=False).logits
            with gathered_by_layer(model):
                got = model(ids, use_cache=False).logits
        parts = [p for p in model.parameters() if is_partitioned(p)]
        results[name] = {
            "equal": torch.equal(got, expected),
            "finite": bool(expected.isfinite().all()),
            "hash": fingerprint(loaded.measured.items()) == fingerprint((n, measure(p)) for n, p in whole.named_parameters()),
            "norm": loaded.embedding_norm(300) == float(whole.get_input_embeddings().weight[:300].float().norm(dim=1).mean()),
            "all cut up": len(parts) == len(list(model.parameters())) == len(list(whole.parameters())),
            "held": sum(p.ds_tensor.numel() * p.ds_tensor.element_size() + p.numel() for p in parts),
            "whole": sum(p.numel() * p.element_size() for p in whole.parameters()),
            "buffers": all(torch.equal(a, b) for a, b in zip(whole.buffers(), model.buffers(), strict=True)),
            "tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        }  # fmt: skip
    return results


def adapted(models: Path, data: Path, out: Path, world: World) -> dict[str, Any]:
    """LoRA of every model with experts under ZeRO-3: losses and gradients of a batch, beside the whole model without an engine."""
    from deepspeed.utils import safe_get_full_grad

    from tests.distributed.cases import ONE_EXPERT, Case, config_of
    from trainer.models.backbone.sharded import is_partitioned
    from trainer.run.assemble import assemble
    from trainer.run.engine import build_engine

    results = {}
    for name, case in json.loads((models / "cases.json").read_text()).items():
        if not case.get("experts"):
            continue
        still = ("model.adapter.dropout=0", "model.fusion.dropout=0", f"model.backbone.name={models / case['folder']}")
        config = config_of(Case("", (*ONE_EXPERT, *still), ("train.zero=3",)), data, engine=True)

        def batch(parts: Any) -> Any:
            view = parts.data["meld"]["train"]
            return parts.collators["meld"].pack([view[i] for i in range(4)])

        whole = assemble(config, out / "run", world, torch.float32)
        expected = whole.model.train()(batch(whole))
        (expected.loss_B.mean() + expected.unused_param_zero).backward()
        wanted = {n: p.grad.clone() for n, p in whole.model.named_parameters() if p.grad is not None}
        parts = assemble(config, out / "run", world, torch.float32, partition=True)
        engine = build_engine(parts.model, config)
        got = engine(batch(parts))
        engine.backward(got.loss_B.mean() + got.unused_param_zero)
        found = {n: safe_get_full_grad(p) for n, p in parts.model.named_parameters() if p.requires_grad}
        lora = [n for n in wanted if "lora_B" in n]
        largest = max(float(wanted[n].abs().max()) for n in lora)
        results[name] = {
            "loss": float((got.loss_B - expected.loss_B).abs().max()),
            "gradient": max(float((found[n] - wanted[n]).abs().max()) for n in lora) / largest,
            "learns": largest,
            "all": {n for n in found if "lora_B" in n} == set(lora),
            "experts": [n for n in lora if ".experts." in n],
            "in parts": all(is_partitioned(p) for p in parts.model.backbone.parameters()),
        }
        engine.destroy()
    return results


def faults(models: Path, world: World) -> dict[str, str]:
    """The error where ranks find different files."""
    from trainer.config import AdapterConfig, BackboneConfig
    from trainer.models.backbone.causal_lm import build_backbone

    def build(first: str, others: str, **changes: Any) -> str:
        config = BackboneConfig(
            name=str(models / (first if world.is_rank_zero else others)), quantization="nf4", **changes
        )
        result = printed(
            lambda: build_backbone(config, AdapterConfig(), torch.float32, "cpu", zero3=ZERO3, ranks=world).fingerprint
        )
        everyone = world.gather_all(result)
        return everyone[0] if len(set(everyone)) == 1 else " | ".join(everyone)

    return {
        "others differ": build("qwen2", "changed"),
        "others have none": build("qwen2", "bare", read="rank0"),
        "first has none": build("bare", "qwen2", read="rank0"),
        "first is damaged": build("cut", "qwen2", read="rank0"),
        "each finds nan": build("nan", "nan"),
        "first finds nan": build("nan", "nan", read="rank0"),
        "each finds other sizes": build("sizes", "sizes"),
        "first finds other sizes": build("sizes", "sizes", read="rank0"),
    }


def weights_kept_by_autograd(data: Path, out: Path, world: World) -> dict[str, Any]:
    """Bytes of gathered 4-bit weights that are alive between forward and backward, and the first gradients."""
    from bitsandbytes.nn import Linear4bit
    from deepspeed.utils import safe_get_full_grad

    from tests.distributed.cases import NF4, ONE_EXPERT, Case, config_of
    from trainer.models.backbone.linear4bit import FrozenLinear4bit
    from trainer.run.assemble import assemble
    from trainer.run.engine import build_engine

    def run(overrides: tuple[str, ...], steps: int) -> dict[str, Any]:
        config = config_of(Case("", (*NF4, *ONE_EXPERT, *overrides), ("train.zero=3",)), data, engine=True)
        parts = assemble(config, out / "run", world, torch.float32, partition=True)
        engine = build_engine(parts.model, config)
        layers = [m for m in parts.model.modules() if isinstance(m, Linear4bit)]
        view = parts.data["meld"]["train"]
        batch = parts.collators["meld"]([view[i] for i in range(4)], weight=1.0, epoch=0)
        alive, gradients = [], {}
        for step in range(steps):
            seen: list[tuple[StorageWeakRef, int]] = []

            def note(module: Any, *_: Any, seen: Any = seen) -> None:
                storage = module.weight.data.untyped_storage()
                seen.append((StorageWeakRef(storage), storage.nbytes()))

            hooks = [layer.register_forward_pre_hook(note) for layer in layers]
            output = engine(batch)
            for hook in hooks:
                hook.remove()
            gc.collect()
            alive.append(sum({ref.cdata: size for ref, size in seen if not ref.expired()}.values()))
            assert len(seen) >= len(layers)
            engine.backward(output.loss_B.mean() + output.unused_param_zero)
            if step == 0:
                trained = {name: p for name, p in parts.model.named_parameters() if p.requires_grad}
                gradients = {name: float(safe_get_full_grad(p).double().norm()) for name, p in trained.items()}
            engine.step()
        total = sum(layer.weight.ds_numel for layer in layers)
        engine.destroy()
        return {"layers": len(layers), "alive": alive, "total": total, "gradients": gradients}

    # DeepSpeed follows its trace of the first step from the second on; the gradients are those of the first
    results = {name: run((*LOOSE, *mode), 3) for name, mode in MODES.items()}
    results["defaults"] = run((), 1)
    own = FrozenLinear4bit.forward
    FrozenLinear4bit.forward = Linear4bit.forward  # type: ignore[method-assign]
    results["bitsandbytes"] = run(LOOSE, 1)
    FrozenLinear4bit.forward = own  # type: ignore[method-assign]
    return results


def whole_run(data: Path, out: Path, world: World) -> dict[str, Any]:
    """Training, checkpoints, continuation and evaluation of a sharded 4-bit run."""
    from tests.distributed.cases import NF4, ONE_EXPERT, Case, config_of
    from trainer.distributed.signals import StopRequest
    from trainer.run.loop import fit
    from trainer.run.saved import open_run

    def config(steps: int) -> Any:
        more = (
            f"train.steps={steps}",
            "train.schedule=constant",
            "train.warmup=0",
            "train.save_every=1",
            "train.keep=9",
        )
        return config_of(
            Case("", (*NF4, *ONE_EXPERT, *more, "track.report=false"), ("train.zero=3",)), data, engine=True
        )

    codes = [fit(config(3), out / "through", world, stop=StopRequest())]
    saved = open_run(out / "through", world)
    table, _ = saved.evaluate("test")
    return {
        "codes": codes,
        "probabilities": dict(zip(table["id"], table["probabilities"].tolist(), strict=True)),
        "partitioned": all(hasattr(p, "ds_id") for p in saved.parts.model.backbone.parameters()),
    }


def main(work: Path, data: Path, out: Path, wanted: list[str]) -> None:
    from trainer.logs import set_up_logging

    world = start_world()
    set_up_logging(None, world.rank)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    results: dict[str, Any] = {}
    if "equality" in wanted:
        results["equality"] = equality(work, world)
    if "adapted" in wanted:
        results["adapted"] = adapted(work, data, out, world)
    if "faults" in wanted:
        results["faults"] = faults(work, world)
    if "held" in wanted:
        results["held"] = weights_kept_by_autograd(data, out, world)
    if "run" in wanted:
        results["run"] = whole_run(data, out, world)
    everyone = world.gather(results)
    if everyone is not None:
        (out / "results.json").write_text(json.dumps(everyone))
    stop_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
