"""Runs cases on the fake device and writes what was seen as JSON: ``python -m tests.fake_gpu.worker FOLDER``.

It is a process of its own because the device must be loaded before torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.fake_gpu import device

if __name__ == "__main__":
    device.load(Path(sys.argv[1]) / "device")

import contextlib
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers import AutoTokenizer, Qwen2Config

from benchmarks.shapes import SHAPES, make_backbone, make_samples
from launch.plan.fake_model import build_fake_model, fake_tensors, to_fake
from tests.distributed.cases import LABEL_TASKS
from tests.fake_gpu.batches import on_host
from tests.fake_gpu.cases import CASES, Case
from tests.fake_gpu.recorder import Recorder, recorded
from tests.toy import prepare_toy
from trainer.batch import AnswerTrie, Batch, PackedBatch, _to
from trainer.config import RunConfig, load_config
from trainer.data.collate import Collator
from trainer.data.sampling import GlobalBatch, Limits, MicroBatch, micro_batches
from trainer.distributed.deepspeed_config import dtype_of
from trainer.distributed.signals import StopRequest
from trainer.distributed.world import World
from trainer.models.optimizer_groups import parameter_groups
from trainer.run.assemble import RunComponents, assemble
from trainer.run.evaluate import Scorer
from trainer.run.guards.dump import NonFiniteDump
from trainer.run.guards.guard import Guard
from trainer.run.step import StepContext, train_step

ROOT = Path(__file__).resolve().parents[2]
HOST, DEVICE = torch.device("cpu"), torch.device("cuda", 0)
SAMPLES = 24
QWEN2_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip


class PlainEngine:
    """What a step asks of an engine, in plain PyTorch: DeepSpeed itself needs a GPU that is there.

    It notes which waits of a step happened before its boundary.
    """

    def __init__(self, module: Any, config: RunConfig, recorder: Recorder) -> None:
        self.module, self._recorder = module, recorder
        train = config.train
        groups: Any = parameter_groups(module, train.lr.fusion, train.lr.backbone, train.weight_decay)
        self.basic_optimizer = torch.optim.AdamW(groups, betas=train.betas, fused=True)
        self.micro_steps: list[tuple[int, int, int]] = []  # launches, of these forward, and waits

    def __call__(self, batch: Batch | PackedBatch) -> Any:
        output = self.module(batch)
        self._forward = self._recorder.total - sum(all for all, _, _ in self.micro_steps)
        return output

    def fp16_enabled(self) -> bool:
        return False

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        pass

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()
        before = [sum(numbers) for numbers in zip(*self.micro_steps, strict=True)] or [0, 0, 0]
        launches, waits = self._recorder.total - before[0], sum(self._recorder.waits.values()) - before[2]
        self.micro_steps.append((launches, self._forward, waits))

    def step(self) -> None:
        trained = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        self.without_gradient = [n for n, p in trained if p.grad is None]
        self.misplaced = [n for n, p in trained if p.grad is not None and _kind(p.grad) != _kind(p)]
        self.basic_optimizer.step()
        self.basic_optimizer.zero_grad()


def _kind(tensor: torch.Tensor) -> tuple[torch.device, torch.dtype]:
    return tensor.device, tensor.dtype


class Collated:
    """Batches that were collated before, in place of :class:`trainer.run.prefetch.BatchPrefetcher`."""

    def __init__(self, batches: Sequence[Batch | PackedBatch]) -> None:
        self.batches = batches

    def step(self, step: int, batch: GlobalBatch, micros: Sequence[MicroBatch]) -> Iterator[Batch | PackedBatch]:
        yield from self.batches


def trie_to(trie: AnswerTrie, device: torch.device) -> AnswerTrie:
    """A trie that was made outside of fake tensors, on a device inside of them."""
    return _to(on_host(trie), device)


class FakeCollator:
    """A collator inside fake tensors: it collates outside of them."""

    def __init__(self, collate: Collator) -> None:
        self.collate = collate

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collate, name)

    def __call__(self, *arguments: Any, **options: Any) -> Batch:
        with unset_fake_temporarily():
            batch = self.collate(*arguments, **options)
        return on_host(batch)

    def pack(self, *arguments: Any, **options: Any) -> PackedBatch:
        with unset_fake_temporarily():
            batch = self.collate.pack(*arguments, **options)
        return on_host(batch)


@contextlib.contextmanager
def lists_count_once(recorder: Recorder) -> Iterator[None]:
    """`tolist` copies a tensor once; fake tensors ask for every element."""

    def tolist(tensor: Any) -> Any:
        if tensor.device.type == "cuda":
            recorder.wait("tolist")
        return _zeros(tensor.shape, float if tensor.is_floating_point() else int)

    with mock.patch.object(FakeTensor, "tolist", tolist):
        yield


def _zeros(shape: Sequence[int], kind: type) -> Any:
    return kind(0) if not shape else [_zeros(shape[1:], kind) for _ in range(shape[0])]


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """What a case came to."""
    data = folder / "data" / case.task
    task = case.task
    if case.task in LABEL_TASKS:
        file = folder / f"{case.task}.yaml"
        file.write_text(LABEL_TASKS[case.task])
        task = str(file)
    if not data.exists():
        prepare_toy(task, folder / "data")
    about = (
        "train.precision=bf16",
        "train.zero=0",
        f"train.global_batch={SAMPLES}",
        "train.micro_batch=null",
        "track.mlflow=false",
    )
    tiny = "model.backbone.tiny.vocab_size=400"
    config = load_config(
        ROOT / "configs" / "tiny.yaml", [f"task={task}", tiny, *about, f"data.path={data}", *case.overrides]
    )
    out = folder / f"run-{case.task}"
    parts = assemble(config, out, World(0, 1, HOST), dtype_of(config))
    parts.model.backbone.attention = (
        case.attention if config.data.layout == "packed" else parts.model.backbone.attention
    )
    found = {"train": train, "score": answer, "generate": answer}[case.what](parts, config)
    return {"task": case.task, **found}


def train(parts: RunComponents, config: RunConfig) -> dict[str, Any]:
    """The second step: in the first the optimizer allocates."""
    (name,) = parts.tasks
    world = World(0, 1, DEVICE)
    view, collate = parts.data[name]["train"], parts.collators[name]
    batch = GlobalBatch(name, 0, tuple(range(config.train.global_batch)))
    limits = Limits.of_training(config, "cuda")
    micros = micro_batches(batch.indices, collate.sizes(view), limits, 0, 1)
    collated = [collate.training([view[i] for i in micro.indices], micro, 0) for micro in micros]
    with fake_tensors():
        to_fake(parts.model, "cuda")
        parts.model.train()
        with recorded(answer=0.0) as recorder, lists_count_once(recorder):
            engine: Any = PlainEngine(parts.model, config, recorder)
            guard = Guard(engine, DEVICE, gradients=True)
            with mock.patch("trainer.run.step.BatchPrefetcher"), mock.patch.object(AnswerTrie, "to", trie_to):
                training = StepContext(engine, parts, config, world, guard, StopRequest())
            training.prefetcher = Collated([on_host(rows) for rows in collated])  # type: ignore[assignment]
            for step in range(2):
                recorder.reset()
                engine.micro_steps.clear()
                result = train_step(training, batch, step, NonFiniteDump())
    return {
        "groups": [micro.groups for micro in micros],
        "positions": [rows.positions for rows in collated],
        "micro_steps": engine.micro_steps,
        "launches": recorder.total,
        "by_operator": dict(recorder.launches),
        "sums_of_floats": recorder.sums_of_floats,
        "waits": dict(recorder.waits),
        "skipped": result.skipped,
        "without_gradient": engine.without_gradient,
        "misplaced": engine.misplaced,
    }


def answer(parts: RunComponents, config: RunConfig) -> dict[str, Any]:
    """One batch of an evaluation."""
    (name,) = parts.tasks
    view = parts.data[name]["valid"]
    with fake_tensors():
        to_fake(parts.model, "cuda")
        parts.model.eval()
        with torch.no_grad(), recorded(answer=0.0) as recorder, lists_count_once(recorder):
            with mock.patch.object(AnswerTrie, "to", trie_to):
                scorer = Scorer(parts.model, parts, config, name, World(0, 1, DEVICE))
            scorer.collate = FakeCollator(scorer.collate)  # type: ignore[assignment]
            (micro, *_) = scorer.batches(view, view.lengths())
            samples = [view[i] for i in micro.indices]
            recorder.reset()
            if config.eval.mode == "generate":
                scorer.answer(samples, micro)
                shape = None
            else:
                shape = list(scorer._output(samples, micro).logprob_BC.shape)
    expected = [len(samples), len(parts.tries[name].answers)]
    return {
        "launches": recorder.total,
        "by_operator": dict(recorder.launches),
        "sums_of_floats": recorder.sums_of_floats,
        "waits": dict(recorder.waits),
        "shape": shape,
        "expected": expected,
    }


def large(folder: Path) -> dict[str, Any]:
    """A step of `configs/meld.yaml` with a 7B model's shape and MELD's lengths on one GPU."""
    shape, config = SHAPES["meld"], load_config("meld")
    tokenizer = AutoTokenizer.from_pretrained(make_backbone(folder / "large", 8192))
    samples: Any = make_samples(shape, config.train.global_batch)
    name, widths = shape.task.name, {n: stream[0] for n, stream in shape.streams.items()}
    fusion = config.model.fusion
    collate = Collator(
        shape.task, tokenizer, config.data, widths=widths, rates={n: stream[1] for n, stream in shape.streams.items()},
        pseudo_tokens=fusion.pseudo_tokens, modalities=fusion.modalities,
    )  # fmt: skip
    with fake_tensors():
        checkpointing = config.model.backbone.gradient_checkpointing
        backbone = Qwen2Config(**QWEN2_7B)
        model = build_fake_model(config, backbone, {name: widths}, dtype_of(config), checkpointing=checkpointing)
    parts = RunComponents(
        tasks={name: shape.task}, data={name: {"train": samples}}, collators={name: collate}, tries={}, model=model
    )  # type: ignore[dict-item]
    return train(parts, config)


def detections() -> dict[str, list[int]]:
    """What the recorder makes of operators of which it is known: waits and launches."""
    found = {}
    with fake_tensors():
        on_device = torch.ones(8, device=DEVICE)
        host, many = torch.ones(8), [torch.ones(8, device=DEVICE) for _ in range(40)]
        mask, index = on_device > 0, torch.zeros(2, dtype=torch.long)
        actions: dict[str, Callable[[], Any]] = {
            "add": lambda: on_device + 1,
            "view": lambda: on_device.view(2, 4)[0],
            "item": lambda: on_device[0].item(),
            "bool": lambda: bool(on_device[0] > 0),
            "nonzero": lambda: mask.nonzero(),
            "mask": lambda: on_device[mask],
            "index of the host": lambda: on_device[index],
            "list": lambda: on_device[[1, 2]],
            "new_tensor": lambda: on_device.new_tensor([1.0]),
            "blocking copy": lambda: host.to(DEVICE),
            "copy": lambda: host.to(DEVICE, non_blocking=True),
            "to the host": lambda: on_device.cpu(),
            "repeat": lambda: torch.repeat_interleave(on_device.long()),
            "repeat to a length": lambda: torch.repeat_interleave(on_device.long(), output_size=8),
            "foreach": lambda: torch._foreach_norm(many),
            "mixed": lambda: on_device + host,
        }
        for name, action in actions.items():
            with recorded(answer=0.0) as recorder:
                try:
                    action()
                except Exception as error:  # noqa: BLE001
                    found[name] = [sum(recorder.waits.values()), type(error).__name__]
                else:
                    found[name] = [sum(recorder.waits.values()), recorder.total]
    return found


def main(folder: Path) -> None:
    found: dict[str, Any] = {"detections": detections()}
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)):
        for case in CASES:
            try:
                found[case.name] = run_case(case, folder)
            except Exception as error:  # noqa: BLE001  # the others are looked at all the same
                frames = [
                    f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT / "trainer"))
                ]
                places = [f"{Path(f.filename).relative_to(ROOT)}:{f.lineno}" for f in reversed(frames[-3:])]
                found[case.name] = {"fault": f"{type(error).__name__}: {error}"[:2000], "at": places}
        found["7B"] = large(folder)
    (folder / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
