"""One rank of the two-process test: every case in turn, results of rank 0 as one JSON file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from trainer.distributed.process_group import quiet_deepspeed, start_world, stop_world

quiet_deepspeed()


class Spoil(torch.autograd.Function):
    """Nothing on the way forward; a gradient with one inf on the way back."""

    @staticmethod
    def forward(ctx, value):  # type: ignore[no-untyped-def]
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient.clone().index_fill_(0, torch.tensor([0]), float("inf"))


@contextlib.contextmanager
def planted(model: torch.nn.Module, plant: str | None) -> Iterator[None]:
    """Inside the block the model's losses, or their gradients, are not finite."""

    def spoil(_, __, output):  # type: ignore[no-untyped-def]
        spoiled = output.loss_B * float("nan") if plant == "loss" else Spoil.apply(output.loss_B)
        return output._replace(loss_B=spoiled)

    handle = model.register_forward_hook(spoil) if plant else None
    yield
    if handle is not None:
        handle.remove()


def digest(model: torch.nn.Module) -> str:
    """Of the trainable weights that this rank holds whole; the same on every rank below ZeRO-3."""
    digest = hashlib.sha256()
    for p in model.parameters():
        if p.requires_grad and not hasattr(p, "ds_id"):
            digest.update(p.detach().float().numpy().tobytes())
    return digest.hexdigest()


def main(data: Path, out: Path, wanted: str) -> None:
    from tests.distributed.cases import PLANTED, SETS, STEPS, backbone_of, config_of
    from trainer.checkpoint.weights import trainable_state
    from trainer.data.imbalance import training_sampler
    from trainer.distributed.deepspeed_config import dtype_of
    from trainer.distributed.signals import StopRequest
    from trainer.logs import set_up_logging
    from trainer.run.assemble import assemble
    from trainer.run.engine import Schedule, build_engine
    from trainer.run.evaluate import evaluate
    from trainer.run.guards.dump import NonFiniteDump
    from trainer.run.guards.guard import Guard
    from trainer.run.step import StepContext, train_step

    world = start_world()
    set_up_logging(None, world.rank)
    results = {}
    for case in SETS[wanted]:
        config = config_of(case, data, engine=True)
        dtype = dtype_of(config)
        parts = assemble(config, backbone_of(config, out), world, dtype, partition=True)
        engine = build_engine(parts.model, config)
        schedule = Schedule(engine, config.train, STEPS)
        training = StepContext(engine, parts, config, world, Guard(engine, world.device, gradients=True), StopRequest())
        order = training_sampler(config, {name: opened["train"] for name, opened in parts.data.items()})
        steps = []
        for s in range(STEPS):
            schedule.set(s)
            with planted(parts.model, case.plant if s == PLANTED and world.rank == world.size - 1 else None):
                steps.append(train_step(training, order.step(s), s, NonFiniteDump()))
        engine.eval()
        table, metrics = evaluate(engine, parts, config, "valid", world)
        state = trainable_state(parts.model, world)
        actual = {"skipped": [step.skipped for step in steps], "rates": engine.get_lr(), "weights": digest(parts.model)}
        results[case.name] = {
            "ranks": world.gather(actual),
            "losses": [step.loss for step in steps],
            "auxiliary_loss": [step.auxiliary_loss for step in steps],
            "probabilities": dict(zip(table["id"] + table["task"], table["probabilities"].tolist(), strict=True)),
            "n": {name: values["n"] for name, values in metrics.items()},
            "state": {name: float(t.double().square().sum().sqrt()) for name, t in state.items()},
        }
        engine.destroy()
    if world.is_rank_zero:
        (out / "results.json").write_text(json.dumps(results))
    stop_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
