"""DeepSpeed writes and reads its files by torch.save and torch.load; their errors are turned into types here."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pickle import UnpicklingError

import torch

from trainer.checkpoint.weights import CheckpointError

WRITER = (
    "PytorchStreamWriter",
    "inline_container",
    "iostream error",
)  # in the bare RuntimeErrors of torch.save's writer
FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class IncompleteWriteError(OSError):
    """torch could not write a file to its end."""


class ForbiddenContentError(CheckpointError):
    """A file asks for more than tensors, plain containers and the classes that are allowed by name."""


@contextlib.contextmanager
def torch_writing() -> Iterator[None]:
    """Inside the block torch.save's writer raises :class:`IncompleteWriteError` where it would raise a bare RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in WRITER):
            raise
        raise IncompleteWriteError("a file could not be written to its end") from error


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """Inside the block torch.load takes tensors, plain containers and DeepSpeed's four classes, and nothing else.

    DeepSpeed asks for weights_only=False; torch's own variable overrules it.

    Raises:
        ForbiddenContentError: a file asks for something else; nothing of it was run.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except UnpicklingError as error:
        raise ForbiddenContentError(_asked_for(error)) from error
    except RuntimeError as error:
        if "weights_only" not in str(error):  # torch's refusal of a TorchScript archive
            raise
        raise ForbiddenContentError("a TorchScript program") from error
    finally:
        if before is None:
            del os.environ[FORCED]
        else:
            os.environ[FORCED] = before


def _asked_for(error: UnpicklingError) -> str:
    """What a file asks for, without torch's advice to read it all the same."""
    found = re.search(r"GLOBAL ([\w.]+)|(?:class|function|type|operand) ([\w.]*\w)", str(error))
    return next((name for name in found.groups() if name), "") if found else "something that torch does not name"
