"""The weights of a backbone read from its files one at a time, as training holds them, without the model in memory.

A weight is cast to the precision of training; under NF4 it is quantised, and what it stands for is what dequantising gives back. What
is measured of each on the way makes the fingerprint that loading the whole model would (:mod:`trainer.models.backbone.fingerprint`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.nn import Linear4bit
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from trainer.config import BackboneConfig
from trainer.models.backbone import quantization
from trainer.models.backbone.fingerprint import BaseFingerprint, Measured, fingerprint, source_fingerprint
from trainer.models.backbone.loading import BackboneError, load_shape, model_weights
from trainer.models.backbone.positions import skeleton
from trainer.models.backbone.sharded import StreamingLoad, StreamQuantizer


@dataclass(frozen=True)
class StreamedWeight:
    """One weight: its values in the precision of training, whether they went through 4 bits, and what was measured before that."""

    values: Tensor
    quantised: bool
    measured: Measured


class StreamedBase:
    """A backbone's weights by the names of its files, each read when it is asked for.

    Attributes: `model` without values; `files`, name in the files -> the file; `parameter_of`, name in the files -> the model's parameter, of
    those that the files have as the model has them. A family whose files hold other tensors than its model (experts one by one, that the
    model has in one weight) has some in `files` alone, and others in the model alone.

    Args:
        config: says where the model is, and how it is quantised.
        dtype: the precision of training.
        folder: of the tiny backbone.

    Raises:
        BackboneError: it is not found, has no safetensors, or is of no family that transformers knows.
    """

    def __init__(self, config: BackboneConfig, dtype: torch.dtype, folder: Path | None = None) -> None:
        self.config, self.dtype = config, dtype
        shape = load_shape(config, folder)  # its faults are explained
        made = skeleton(config, folder)
        if made is None:
            raise BackboneError(f"{config.name}: no model can be made of its configuration without its weights")
        self.model: PreTrainedModel = made
        four_bit = None
        if config.quantization == "nf4":
            quantization.check_sizes(shape, config.name, config.trust_remote_code)
            four_bit = quantization.nf4_config(dtype, config.double_quantization)
        self._stream = StreamingLoad(four_bit, None, dtype, torch.device("cpu"))
        if four_bit is not None:
            quantizer: Any = StreamQuantizer(self._stream, pre_quantized=False)
            quantizer.preprocess_model(self.model, dtype=dtype, device_map=None)
        self.files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path in model_weights(config, folder):
            with _explained(path):
                self._open[path] = safe_open(path, framework="pt", device="cpu")
                self.files |= dict.fromkeys(self._open[path].keys(), path)
        self.parameter_of = self._parameters()

    @property
    def is_whole(self) -> bool:
        """Whether every parameter of the model is in the files as the model has it."""
        return {name for name, _ in self.model.named_parameters()} <= set(self.parameter_of.values())

    def stored(self, name: str) -> Tensor:
        """A tensor as its file has it, mapped into memory."""
        path = self.files[name]
        with _explained(path):
            tensor: Tensor = self._open[path].get_tensor(name)
        return tensor

    def weight(self, name: str) -> StreamedWeight:
        """A tensor by its name in :attr:`parameter_of`, as training holds it."""
        parameter_name = self.parameter_of[name]
        stored = self.stored(name)
        value = stored.to(self.dtype) if stored.is_floating_point() else stored
        parameter: Any = self._stream.take(self.model, parameter_name, value)
        measured: Measured = vars(parameter).pop("measured")
        if getattr(parameter, "quant_state", None) is None:
            return StreamedWeight(parameter.data, False, measured)
        values = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
        return StreamedWeight(values.reshape(value.shape), True, measured)

    def is_quantised(self, name: str) -> bool:
        """Whether a parameter of the model goes through 4 bits."""
        owner, _, leaf = name.rpartition(".")
        return leaf == "weight" and isinstance(self.model.get_submodule(owner), Linear4bit)

    def fingerprint(self) -> BaseFingerprint | None:
        """Of all weights, read one by one: what loading the model finds, with all of it frozen. None where :attr:`is_whole` is not so, since
        what loading makes of the files is then not known here.

        A family of which some weights stay in another precision than training's has another fingerprint than this one.
        """
        if not self.is_whole:
            return None
        place = {parameter: name for name, parameter in self.parameter_of.items()}
        names = [name for name, _ in self.model.named_parameters()]
        measured = [(name, self.weight(place[name]).measured) for name in names]
        exact = self.config.quantization == "none" or not self.config.double_quantization
        return BaseFingerprint(source_fingerprint(measured), fingerprint(measured), exact)

    def _parameters(self) -> dict[str, str]:
        """Name in the files -> parameter: the same name, or without or with the prefix of the family's decoder, as transformers reads them."""
        left = {name for name, _ in self.model.named_parameters()}
        prefix = f"{self.model.base_model_prefix}."
        found: dict[str, str] = {}
        for name in self.files:
            candidates = (name, prefix + name, name.removeprefix(prefix))
            if (parameter := next((one for one in candidates if one in left), None)) is not None:
                found[name] = parameter
                left.remove(parameter)
        return found


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"{path} cannot be read: {error}") from error
