"""A checkpoint on another number of ranks, through DeepSpeed's universal format.

ZeRO 1 to 3 cut optimizer states into as many parts as there are ranks. The conversion puts the parts of a checkpoint
together, a folder per parameter; loading cuts them again, for the ranks there are now. What the format does not carry is put back
here: frozen weights were rebuilt from their source and compared by hash before, buffers (the gate's usage) come from the
checkpoint's weights, each group's own settings from the engine. (At stage 3 DeepSpeed 0.19 gives all groups those of the
first, and one step counter between them, which then counts every group's step.)
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer.checkpoint.torch_files import torch_writing
from trainer.distributed.world import World
from trainer.logs import captured_stdout

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)

TAG = "universal"


@contextlib.contextmanager
def universal(folder: Path, place: Path, world: World) -> Iterator[Path]:
    """DeepSpeed's checkpoint `folder` in the universal format, under `place` (on storage that all ranks share).

    Inside the block it is there, as `place`/universal; afterwards `place` is gone. Called by all ranks.
    """
    try:
        with world.on_rank_zero() as first:
            if first:
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                _convert(folder, place / TAG)
        yield place
    except BaseException:
        if world.is_rank_zero:
            shutil.rmtree(place, ignore_errors=True)
        raise
    world.barrier()  # all have read it
    with world.on_rank_zero() as first:
        if first:
            shutil.rmtree(place)


def load_universal(engine: DeepSpeedEngine, place: Path) -> str | None:
    """Put weights and optimizer of `place`/universal into `engine`, whatever number of ranks wrote them.

    Returns DeepSpeed's path, None where it found nothing.
    """
    settings = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    before = engine._config.load_universal_checkpoint
    engine._config.load_universal_checkpoint = True
    library = logging.getLogger("DeepSpeed")
    level = library.level
    library.setLevel(logging.ERROR)  # it warns that there is no tensor parallelism, which is meant
    loaded: str | None
    try:
        loaded, _ = engine.load_checkpoint(str(place), tag=TAG, load_module_strict=False)
    finally:
        library.setLevel(level)
        engine._config.load_universal_checkpoint = before
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    own_steps(engine.basic_optimizer)
    return loaded


def own_steps(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter a count of steps of its own, where its optimizer wants it: DeepSpeed leaves one tensor for all on the CPU.

    A fused or capturable optimizer has it beside the parameter, as `torch.optim.Optimizer.load_state_dict` puts it. The groups
    are asked for the kind alone: those of ZeRO-3 hold parameters during a step only.
    """
    beside = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():
        if isinstance(step := state.get("step"), torch.Tensor):
            own = step.detach().clone()
            state["step"] = own.to(parameter.device, torch.float32) if beside else own


def _convert(folder: Path, out: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(out),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with torch_writing(), captured_stdout(), contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        ds_to_universal.main(options)
