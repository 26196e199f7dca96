"""One rank of the test of changed world sizes: every case trains, saves, trains on; then others' checkpoints are continued."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.distributed.cases import BF16, NF4, Case
from trainer.distributed.process_group import quiet_deepspeed, start_world, stop_world

quiet_deepspeed()

BEFORE, AFTER = 2, 3
DECAY = ("train.weight_decay=2.0",)  # so large that groups which get each other's would be seen
CASES = (
    Case("zero0", DECAY, ("train.zero=0",)),
    Case("zero1", DECAY, ("train.zero=1",)),
    Case("zero2-nf4", (*NF4, *DECAY), ("train.zero=2",)),
    Case("zero3", DECAY, ("train.zero=3",)),
    Case("zero3-nf4", (*NF4, *DECAY), ("train.zero=3",)),
    Case("zero2-nf4-bf16", (*NF4, *DECAY, *BF16), ("train.zero=2",)),
)


def main(data: Path, out: Path, writers: list[int]) -> None:
    """Write checkpoints of this world if there are none yet, and continue those of the worlds `writers`."""
    from tests.distributed.cases import config_of, state_at
    from trainer.checkpoint.identity import identify
    from trainer.checkpoint.state import check_fit, read_state
    from trainer.checkpoint.store import Checkpoints, resume_engine
    from trainer.checkpoint.weights import trainable_state
    from trainer.data.sampling import GlobalBatchSampler
    from trainer.distributed.deepspeed_config import dtype_of
    from trainer.distributed.signals import StopRequest
    from trainer.logs import set_up_logging
    from trainer.run.assemble import assemble
    from trainer.run.engine import Schedule, build_engine
    from trainer.run.guards.dump import NonFiniteDump
    from trainer.run.guards.guard import Guard
    from trainer.run.step import StepContext, train_step

    world = start_world()
    set_up_logging(None, world.rank)
    results: dict[str, Any] = {}
    written = world.broadcast_object((out / f"world{world.size}").exists())
    for case in CASES:
        for writer in (*writers, *(() if written else (None,))):
            config = config_of(case, data, engine=True)
            parts = assemble(config, out / "backbone", world, dtype_of(config), partition=True)
            engine = build_engine(parts.model, config)
            schedule = Schedule(engine, config.train, BEFORE + AFTER)
            guard = Guard(engine, world.device, gradients=True)
            training = StepContext(engine, parts, config, world, guard, StopRequest())
            lengths = {name: opened["train"].lengths() for name, opened in parts.data.items()}
            order = GlobalBatchSampler(lengths, global_batch=config.train.global_batch, seed=config.train.seed)
            identity = identify(
                config, data=parts.fingerprints, base=parts.model.backbone.fingerprint, world_size=world.size
            )
            start = 0
            if writer is not None:
                folder = out / f"world{writer}" / case.name
                last = Checkpoints(folder, world).newest()
                assert last is not None
                saved = read_state(last)
                check_fit(saved, identity, last)
                resume_engine(engine, last, world)
                assert not list(folder.glob(".*"))
                start = saved.step
            losses, fusion, ids = [], [], []
            for step in range(start, BEFORE + AFTER):
                schedule.set(step)
                batch = order.step(step)
                result = train_step(training, batch, step, NonFiniteDump())
                losses.append(result.loss)
                ids.append(list(map(int, batch.indices)))
                if parts.model.fusion is not None:
                    fusion.append(parts.model.fusion.gate.usage_E.tolist())
                if writer is None and step + 1 == BEFORE:
                    checkpoints = Checkpoints(out / f"world{world.size}" / case.name, world)
                    checkpoints.open()
                    checkpoints.save(engine, state_at(BEFORE, identity=identity))
            state = trainable_state(parts.model, world)
            weights = {name: t.double().square().sum().sqrt().item() for name, t in state.items()}
            results[f"{case.name} {writer or 'whole'}"] = {
                "losses": losses, "usage": fusion, "ids": ids, "weights": weights, "base": identity.base,
                "groups": [[g.get("name"), g["weight_decay"], g["lr"]] for g in engine.optimizer.param_groups],
            }  # fmt: skip
            engine.destroy()
    if world.is_rank_zero:
        (out / f"results{world.size}-{'-'.join(map(str, writers))}.json").write_text(json.dumps(results))
    stop_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(word) for word in sys.argv[3:]])
