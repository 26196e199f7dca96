"""Loading a checkpoint tensor by tensor: each weight is quantised, measured and partitioned over the ranks as it is read.

transformers reads, renames and joins the tensors of a checkpoint one weight at a time when a quantizer asks for it, and
hands each to that quantizer. Ours stores it as 4 bits, hashes it, and keeps this rank's part (ZeRO-3), so that no rank
ever holds the model, neither in 4 bits nor in the precision of training. Peak memory: this rank's parts and one weight.

What is private: DeepSpeed's `zero.Init._convert_to_deepspeed_param`; `tests/distributed/test_sharded.py` compares every
result with the model that is loaded whole.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from trainer.models.backbone.fingerprint import Measured, count_non_finite, is_finite, measure, measure_read
from trainer.models.backbone.linear4bit import FrozenLinear4bit

log = logging.getLogger(__name__)

METHOD = "egmf-stream"


class Partitioner:
    """Keeps 1/world of a parameter on this rank, as DeepSpeed's ZeRO-3 does; needs the process group."""

    def __init__(self, deepspeed_config: dict[str, Any]) -> None:
        import deepspeed

        # neither a module nor a context: only the means to convert a parameter
        self._zero = deepspeed.zero.Init(config_dict_or_path=deepspeed_config)

    def __call__(self, parameter: Any) -> None:
        if not is_partitioned(parameter):
            self._zero._convert_to_deepspeed_param(parameter)
            parameter.partition()


class StreamingLoad(QuantizationConfigMixin):
    """What happens to every weight while it loads, given to `from_pretrained` as its `quantization_config`.

    Attributes: `shapes`, by name, a weight's shape in the files and the model's where they differ; `not_finite`, by name, how many
    values of a weight are nan or infinite.
    """

    def __init__(
        self,
        four_bit: BitsAndBytesConfig | None,
        partition: Partitioner | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.quant_method: Any = METHOD
        self.four_bit, self.partition, self.dtype, self.device = four_bit, partition, dtype, device
        self.shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.not_finite: dict[str, str] = {}
        self.finished = False
        if METHOD not in AUTO_QUANTIZER_MAPPING:
            register_quantizer(METHOD)(StreamQuantizer)

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamingLoad:
        return self  # configs are copied while they load; process groups cannot be

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}

    def take(self, model: PreTrainedModel, name: str, value: Tensor) -> nn.Parameter:
        """Store a whole weight under `name`: in 4 bits where its layer asks for it, measured, partitioned."""
        module, leaf = _owner(model, name)
        old, read = module.get_parameter(leaf), None
        if value.shape != old.shape:
            self.shapes[name] = tuple(value.shape), tuple(old.shape)
        if isinstance(module, Linear4bit) and leaf == "weight":
            options = {key: option for key, option in vars(old).items() if not key.startswith("_")}
            packed: Any = Params4bit(value, **{**options, "requires_grad": False})
            read, finite = measure_read(value, _quantised_as(packed, module))
            self._check_finite(name, value, finite)
            parameter: Any = packed.to(self.device)  # quantises
        else:
            parameter = nn.Parameter(value.to(self.device), requires_grad=value.is_floating_point())
        rows = isinstance(module, nn.Embedding) or name in _tied_names(model)
        parameter.measured = measure(parameter, rows=rows, read=read)
        self._check_finite(name, parameter.data, parameter.measured.finite)
        if self.partition is not None:
            self.partition(parameter)
            parameter = self._same_as_tied(model, name, parameter)
        if self.device.type == "cpu":
            _return_freed_memory()
        return parameter

    def finish(self, model: PreTrainedModel) -> dict[str, Measured]:
        """Treat what did not come to :meth:`take`; returns what was measured of every parameter, tied ones once.

        What is not finite is added to `not_finite`.
        """

        def settle(entry: tuple[str, nn.Parameter]) -> Measured:
            name, parameter = entry
            measured: Measured | None = vars(parameter).pop("measured", None)
            if measured is None:
                measured = measure(parameter, rows=isinstance(_owner(model, name)[0], nn.Embedding))
                self._check_finite(name, parameter.data, measured.finite)
            return measured

        parameters = dict(model.named_parameters())
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            found = dict(zip(parameters, pool.map(settle, parameters.items()), strict=True))
        if self.partition is not None:
            for parameter in parameters.values():
                self.partition(parameter)
        self.finished = True
        return found

    def _check_finite(self, name: str, values: Tensor, finite: bool) -> None:
        if not finite:
            self.not_finite[name] = count_non_finite(values)

    def not_finite_in(self, model: PreTrainedModel) -> dict[str, str]:
        """`not_finite`, of a model that is refused before :meth:`finish` too."""
        if not self.finished:
            for name, parameter in model.named_parameters():
                if "measured" not in vars(parameter) and not (parameter.is_meta or is_partitioned(parameter)):
                    self._check_finite(name, parameter.data, is_finite(parameter.data))
        return self.not_finite

    def _same_as_tied(self, model: PreTrainedModel, name: str, parameter: Any) -> nn.Parameter:
        """The tied weight that was read before, where this one equals it. transformers would compare the two itself, but
        cannot tell partitioned ones apart."""
        tied = model.all_tied_weights_keys
        for target, source in list(tied.items()):
            if name not in (target, source):
                continue
            other = model.get_parameter(source if name == target else target)
            seen = vars(other).get("measured")
            if seen is None:  # not read yet
                continue
            if seen.parts == parameter.measured.parts:
                return other
            log.warning("%s and %s should be one weight and differ in the files: they stay two", target, source)
            tied.pop(target)
        return parameter


class StreamQuantizer(Bnb4BitHfQuantizer):
    """transformers' hook for :class:`StreamingLoad`: it sees every weight, quantised or not."""

    def __init__(self, quantization_config: StreamingLoad, **options: Any) -> None:
        super().__init__(quantization_config.four_bit or quantization_config, **options)
        self.stream = quantization_config

    def validate_environment(self, *args: Any, **options: Any) -> None:
        if self.stream.four_bit is not None:
            super().validate_environment(*args, **options)

    def update_device_map(self, device_map: Any) -> Any:
        return device_map

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **options: Any) -> bool:
        """Whether a weight comes to :meth:`StreamingLoad.take`. The few of another dtype than training's would be cast
        before that: they load as they always do, and are settled at the end."""
        if self.stream.four_bit is not None and super().param_needs_quantization(model, param_name, **options):
            return True
        own = model.get_parameter_or_buffer(param_name)
        return isinstance(own, nn.Parameter) and own.dtype == self.stream.dtype

    def get_quantize_ops(self) -> ConversionOps:
        return _Take(self.stream)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, device_map: Any = None, **options: Any
    ) -> None:
        if self.stream.four_bit is None:
            return
        super()._process_model_before_weight_loading(model, device_map, **options)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                FrozenLinear4bit.adopt(module)

    def postprocess_model(self, model: Any, **options: Any) -> None:
        super().postprocess_model(model, **options)
        if self.stream.four_bit is None:
            self.remove_quantization_config(model)
            for module in model.modules():
                if isinstance(module, PreTrainedModel):
                    module.config._is_quantized = False
            del model.is_loaded_in_4bit
        else:
            model.config.quantization_config = self.stream.four_bit
            model.hf_quantizer = Bnb4BitHfQuantizer(self.stream.four_bit, pre_quantized=False)
            model.quantization_method = QuantizationMethod.BITS_AND_BYTES


class _Take(ConversionOps):
    """The last step of loading a weight."""

    def __init__(self, stream: StreamingLoad) -> None:
        self.stream = stream

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        model: Any = None,
        **options: Any,
    ) -> dict[str, Any]:
        stored = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        input_dict.clear()
        return {name: self.stream.take(model, name, stored.pop(name)) for name in list(stored)}


def _return_freed_memory() -> None:
    """Give the system what quantising freed: glibc would keep it, cut into pieces by what stays (twice the model)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _quantised_as(weight: Any, layer: Linear4bit) -> str:
    """How a 4-bit weight is quantised, stored and computed with, in words of which each setting makes others."""
    scales = "quantised again" if weight.compress_statistics else "float32"
    return f"{weight.quant_type} blocks {weight.blocksize} scales {scales} stored {weight.quant_storage} computed {layer.compute_dtype}"


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _tied_names(model: PreTrainedModel) -> set[str]:
    tied = model.all_tied_weights_keys
    return {*tied.keys(), *tied.values()}


def is_partitioned(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered_by_layer(model: nn.Module) -> Iterator[None]:
    """Inside the block each module has its weights whole while its own forward runs: ZeRO-3 without an engine.

    Every rank calls the same modules in the same order, without gradients.
    """
    hooks = []
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if is_partitioned(p)]
        if own:
            hooks.append(module.register_forward_pre_hook(lambda _, __, own=own: own[0].all_gather(own)))
            hooks.append(module.register_forward_hook(lambda _, __, ___, own=own: own[0].partition(own)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
