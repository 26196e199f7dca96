"""The tensors of a checkpoint that only rank 0 can read, on every rank, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from trainer.files import load_json
from trainer.models.ranks import Ranks

PIECE = 1 << 30  # bytes of one broadcast


class BroadcastTensor:
    """A tensor in rank 0's files; `[...]` gives it, and every rank must ask for the same one at the same time."""

    def __init__(
        self, key: str, file: Any, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device, ranks: Ranks
    ) -> None:
        self.key, self.file, self.dtype, self.shape = key, file, dtype, shape
        self.device, self.ranks = device, ranks

    def __getitem__(self, everything: EllipsisType) -> Tensor:
        if self.file is None:
            tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        else:
            tensor = self.file.get_tensor(self.key).to(self.device).contiguous()
        for piece in tensor.view(-1).view(torch.uint8).split(PIECE):
            self.ranks.broadcast(piece)
        return tensor


def broadcast_tensors(find: Callable[[], list[Path]], device: torch.device, ranks: Ranks) -> dict[str, BroadcastTensor]:
    """Every tensor of the safetensors files that `find`, called on rank 0 only, lists.

    Raises:
        ValueError: rank 0 cannot read them; on every rank.
    """
    files: dict[str, Any] = {}
    listing: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    fault: str | None = None
    if ranks.is_rank_zero:
        try:
            for path in find():
                file = safe_open(path, framework="pt", device="cpu")
                for key in file.keys():  # noqa: SIM118
                    stored = file.get_tensor(key)  # mapped from the file, not read
                    files[key], listing[key] = file, (stored.dtype, tuple(stored.shape))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            fault = f"{type(error).__name__}: {error}"
    listing, fault = ranks.broadcast_object((listing, fault))
    if fault is not None:
        raise ValueError(f"rank 0 cannot read the weights: {fault}")
    return {key: BroadcastTensor(key, files.get(key), *form, device, ranks) for key, form in listing.items()}


def safetensors_files(source: str, **where: Any) -> list[Path]:
    """The safetensors files of a model: a folder, or a hub name, from which they are fetched.

    A single file counts before an index, as in transformers.

    Raises:
        OSError: there are none, or they cannot be fetched.
    """
    single, index = (
        cached_file(source, name, _raise_exceptions_for_missing_entries=False, **where)
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    if single is not None:
        return [Path(single)]
    if index is None:
        raise OSError(f"no file named {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME} in {source}")
    names = sorted(set(load_json(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [Path(str(cached_file(source, name, **where))) for name in names]
