"""One rank of the two-process test: every case in turn, results of rank 0 as one JSON file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from trainer.run.distributed import quiet_deepspeed, start_world, stop_world

quiet_deepspeed()


def main(data: Path, out: Path) -> None:
    from tests.distributed.cases import CASES, STEPS, config_of
    from trainer.data.sampling import Order
    from trainer.run.assemble import assemble
    from trainer.run.engine import Schedule, build_engine, dtype_of, trainable_state
    from trainer.run.evaluate import evaluate
    from trainer.run.guard import Evidence, Guard
    from trainer.run.logs import set_up_logging
    from trainer.run.loop import Training, train_step
    from trainer.run.signals import StopRequest

    world = start_world()
    set_up_logging(None, world.rank)
    results = {}
    for case in CASES:
        config = config_of(case, data, engine=True)
        dtype = dtype_of(config)
        parts = assemble(config, out / "-".join(config.tasks), world, dtype)
        engine = build_engine(parts.model, config)
        schedule = Schedule(engine, config.train, STEPS)
        training = Training(engine, parts, config, world, Guard(engine, world.device, gradients=True), StopRequest())
        lengths = {name: opened["train"].lengths() for name, opened in parts.data.items()}
        order = Order(lengths, global_batch=config.train.global_batch, seed=config.train.seed)
        steps = []
        for s in range(STEPS):
            schedule.set(s)
            steps.append(train_step(training, order.step(s), s, Evidence()))
        engine.eval()
        table, metrics = evaluate(engine, parts, config, "valid", world, dtype)
        state = trainable_state(parts.model, world)
        results[case.name] = {
            "losses": [step.loss for step in steps],
            "balance": [step.balance for step in steps],
            "probabilities": dict(zip(table["id"] + table["task"], table["probabilities"].tolist(), strict=True)),
            "n": {name: values["n"] for name, values in metrics.items()},
            "state": {name: float(t.double().square().sum().sqrt()) for name, t in state.items()},
        }
        engine.destroy()
    if world.first:
        (out / "results.json").write_text(json.dumps(results))
    stop_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
