"""A trained run, opened again: its config, its parts, and its chosen weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.answers.scores import SplitScores
from trainer.checkpoint.state import is_other_base, read_state
from trainer.checkpoint.store import Checkpoints
from trainer.checkpoint.weights import CheckpointError, load_weights
from trainer.data.folds import fold_choice
from trainer.distributed.deepspeed_config import dtype_of, zero_stage
from trainer.distributed.world import World
from trainer.run.assemble import RunComponents, assemble
from trainer.run.evaluate import Change, evaluate
from trainer.run.lengths import check_positions, log_lines, measure_splits
from trainer.run.model_parts import OpenedModel
from trainer.run.recipes import check_recipes, saved_recipes
from trainer.saved_config import saved_config
from trainer.trust import check_trust

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


@dataclass
class SavedRun(OpenedModel):
    """A run whose chosen weights are loaded."""

    parts: RunComponents
    checkpoint: Path
    _checked: set[str] = field(default_factory=set)  # splits whose lengths were looked at

    def evaluate(
        self, split: str, advance: Callable[[int], None] = lambda n: None, change: Change = lambda task, sample: sample
    ) -> tuple[pd.DataFrame, SplitScores]:
        """See :func:`trainer.run.evaluate.evaluate`.

        Raises:
            ValueError: samples are longer than the model's positions.
        """
        self._check_lengths(split)
        return evaluate(self.forward, self.parts, self.config, split, self.world, advance, change=change)

    def _check_lengths(self, split: str) -> None:
        """Once for a split: refuse samples that the model cannot read, and say which texts are cut."""
        if split in self._checked:
            return
        parts, config = self.parts, self.config
        lengths = measure_splits(config, parts.data, parts.collators, parts.tries, [split], parts.limit, scored=True)
        warnings = check_positions(lengths, parts.limit, config)
        if self.world.is_rank_zero:
            for warning in [*warnings, *log_lines(lengths, config)]:
                log.warning("%s", warning)
        self._checked.add(split)


def open_run(
    run: Path, world: World, overrides: Sequence[str] = (), data: str | None = None, agreed: str | None = None
) -> SavedRun:
    """Rebuild a run's model and load the checkpoint that validation chose (the newest, with a warning, if none was).

    Args:
        agreed: the hash of Python code that the run would bring along, see :func:`trainer.trust.check_trust`.

    Raises:
        UntrustedCodeError: the run would run code that its user has not agreed to.
        ValueError: no run, no checkpoint, another frozen base, data that do not fit or come from another recipe, or another choice of folds.
    """
    config = saved_config(run, overrides, data)
    check_trust(run, config, agreed)
    trained = fold_choice(saved_config(run))
    if trained is not None and data is None and fold_choice(config) != trained:
        raise ValueError(
            f"{run} was trained to test fold {trained.fold}: other samples than those are ones that it was trained on or validated with, so "
            "data.fold, data.fold_valid and train.seed are not changed here"
        )
    chosen = chosen_checkpoint(run, world)
    partition = world.size > 1
    state = read_state(chosen)
    parts = assemble(config, run, world, dtype_of(config), partition=partition, saved=True, joining=state.joining)
    recipes = saved_recipes(run)
    check_recipes(recipes, parts.data, f"the run {run}", warn=world.is_rank_zero)
    parts.inputs = {name: replace(one, recipe=recipes.get(name)) for name, one in parts.inputs.items()}
    if is_other_base(state, parts.model.backbone.fingerprints, chosen):
        raise CheckpointError(
            f"{chosen} was trained on another frozen backbone (hash {state.base}, here {parts.model.backbone.fingerprint}): "
            f"model.backbone.name={config.model.backbone.name} no longer gives the same weights"
        )
    load_weights(parts.model, chosen)
    forward: Callable[..., Any] = parts.model.eval()
    if zero_stage(config) == 3 and partition:
        from trainer.run.engine import build_inference_engine  # of DeepSpeed, which is imported where it is needed

        engine = build_inference_engine(parts.model, config)
        engine.eval()  # gives nothing back, unlike a module's
        forward = engine
    return SavedRun(config, parts, world, forward, chosen)


def chosen_checkpoint(run: Path, world: World) -> Path:
    """The checkpoint that validation chose (the newest, with a warning, if none was), read in full and found whole.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    checkpoints = Checkpoints(run / "checkpoints", world)
    chosen = checkpoints.best()
    if chosen is not None and (faults := checkpoints.verify(chosen)):
        raise CheckpointError(
            f"{chosen}, which validation chose, is damaged: {'; '.join(faults[:3])}; bring it back from a copy, or remove "
            f"{chosen.parent / 'best'} to use the newest"
        )
    if chosen is None:
        chosen = checkpoints.newest()
        if chosen is None:
            raise CheckpointError(f"{run} has no checkpoint yet: train it first (egmf train)")
        log.warning("validation has chosen no checkpoint of %s: the newest is used", run)
    return chosen
