"""One process that trains, stops and continues runs of ``train.zero=2``, as it does on a GPU alone and as it does on a CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from trainer.distributed.process_group import quiet_deepspeed, start_world, stop_world

quiet_deepspeed()


def main(data: Path, out: Path) -> None:
    from tests.distributed.cases import Case, config_of
    from trainer.distributed.signals import StopRequest
    from trainer.run.callbacks import Callback, FinishedStep
    from trainer.run.loop import fit
    from trainer.run.run import Run

    class StopAt(Callback):
        def __init__(self, step: int, stop: StopRequest) -> None:
            self.step, self.stop = step, stop

        def on_step_end(self, run: Run, finished: FinishedStep) -> None:
            assert torch.are_deterministic_algorithms_enabled() == run.config.train.deterministic
            self.stop.asked = finished.step >= self.step

    world = start_world()
    settings = ("train.steps=4", "train.eval_every=4", "train.log_every=1", "train.probe=false", "eval.splits=[valid]")

    def train(
        name: str, *, alone_at_0: bool, until: int | None = None, zero: int = 2, more: tuple[str, ...] = ()
    ) -> int:
        config: Any = config_of(Case("", (*settings, *more), (f"train.zero={zero}",)), data, engine=True)
        stop = StopRequest()
        types = ("cuda", "cpu") if alone_at_0 else ("cuda",)
        with mock.patch("trainer.distributed.deepspeed_config.UNSHARDED_ALONE", types):
            return fit(config, out / name, world, stop=stop, callbacks=[] if until is None else [StopAt(until, stop)])

    assert train("stage0", alone_at_0=False, zero=0) == 0
    assert train("deterministic", alone_at_0=False, zero=0, until=2, more=("train.deterministic=true",)) == 85
    assert not torch.are_deterministic_algorithms_enabled()
    assert train("deterministic", alone_at_0=False, zero=0, more=("train.deterministic=true",)) == 0
    assert train("alone", alone_at_0=True) == 0
    assert train("continued", alone_at_0=True, until=2) == 85
    assert train("continued", alone_at_0=False) == 0  # on a device where it would have begun at stage 2
    assert train("older", alone_at_0=False, until=2) == 85
    assert train("older", alone_at_0=True) == 0
    stop_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
