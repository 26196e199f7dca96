"""One rank of the callbacks' test: a short run with a callback that notes every moment."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from trainer.distributed.process_group import quiet_deepspeed, start_world, stop_world

quiet_deepspeed()


DOCS = Path(__file__).parents[2] / "docs" / "extending.md"


def documented(name: str) -> Any:
    """An instance of the class that a Python block of docs/extending.md defines."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    (block,) = (text for text in blocks if f"class {name}(" in text)
    names: dict[str, Any] = {}
    exec(block, names)
    return names[name]()


def main(data: Path, out: Path) -> None:
    from tests.distributed.cases import Case, config_of
    from tests.run.test_callbacks import EVAL_EVERY, SAVE_EVERY, STEPS
    from trainer.answers.scores import SplitScores
    from trainer.distributed.signals import StopRequest
    from trainer.run.callbacks import Callback, FinishedStep
    from trainer.run.loop import fit
    from trainer.run.run import Run
    from trainer.run.scalars import StepScalars

    events: list[list[Any]] = []

    class Notes(Callback):
        def on_train_start(self, run: Run, step: int) -> None:
            events.append(["on_train_start", step])

        def on_step_scalars(self, run: Run, scalars: StepScalars) -> None:
            scalars.add("sum of ranks + 1", run.world.rank + 1)
            scalars.add("mean of ranks", run.world.rank, "mean")
            events.append(["on_step_scalars"])

        def on_step_end(self, run: Run, finished: FinishedStep) -> None:
            names = ("sum of ranks + 1", "mean of ranks")
            own = {name: finished.result.scalars[name] for name in names}
            events.append(["on_step_end", finished.step])
            events.append(["result", {"loss": finished.result.loss, **own}])

        def on_evaluation_progress(self, run: Run, split: str) -> None:
            events.append(["on_evaluation_progress", split])

        def on_validation_end(self, run: Run, step: int, metrics: SplitScores) -> None:
            events.append(["on_validation_end", step, list(metrics)])

        def on_save_start(self, run: Run, step: int) -> None:
            events.append(["on_save_start", step])

        def on_save_end(self, run: Run, step: int, checkpoint: Path) -> None:
            assert (checkpoint / "manifest.json").is_file()
            events.append(["on_save_end", step, checkpoint.name])

        def on_best_evaluated(self, run: Run, split: str, metrics: SplitScores, predictions: Path) -> None:
            assert predictions.is_file()
            events.append(["on_best_evaluated", split, predictions.name])

        def on_train_end(self, run: Run) -> None:
            events.append(["on_train_end"])

    world = start_world()
    steps = (f"train.steps={STEPS}", f"train.eval_every={EVAL_EVERY}", f"train.save_every={SAVE_EVERY}")
    config = config_of(
        Case("", (*steps, "train.log_every=1", "train.probe=false"), ("train.zero=2",)), data, engine=True
    )
    assert fit(config, out, world, stop=StopRequest(), callbacks=[Notes(), documented("ResidentMemory")]) == 0
    (out / f"events{world.rank}.json").write_text(json.dumps(events))
    stop_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
