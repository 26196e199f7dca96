"""From a name or a folder to a causal language model and its tokenizer, every fault explained in one sentence."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from trainer.config import BackboneConfig
from trainer.models.backbone import quantization
from trainer.models.backbone.fingerprint import Measured
from trainer.models.backbone.header_check import family_of, faults_of_shapes, incomplete, some
from trainer.models.backbone.model_files import (
    WeightFiles,
    folder_faults,
    has_vocabulary,
    has_weights,
    quantised_weights,
    tokenizer_faults,
    weight_files,
)
from trainer.models.backbone.rank0_reader import broadcast_tensors, safetensors_files
from trainer.models.backbone.sharded import Partitioner, StreamingLoad
from trainer.models.ranks import Ranks, SingleProcess
from trainer.text import encode, end_token

log = logging.getLogger(__name__)

CONVERT = (  # shown to users; transformers reads pickles with weights_only
    'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
    "M.from_pretrained('{source}', dtype='auto').save_pretrained('converted'); "
    "T.from_pretrained('{source}').save_pretrained('converted')\""
)
NO_CUDA_EXTENSION = "the installed flash_attn lacks its CUDA extension (it was built without CUDA)"
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, StrictDataclassError)


class BackboneError(ValueError):
    """A backbone that cannot be loaded or used as asked; says what to do."""


class UnusableAttention(BackboneError):
    """An attention backend that cannot run here; `reasons` has every reason."""

    def __init__(self, asked: str, reasons: list[str]) -> None:
        super().__init__(f"model.backbone.attention={asked} cannot run: {'; '.join(reasons)}. Use auto, or sdpa")
        self.reasons = reasons


def load_tokenizer(
    config: BackboneConfig, folder: Path | None = None, *, kept: Path | None = None
) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer; `folder` is where `build_tiny` wrote the tiny backbone.

    `kept`: a folder with its files, which are read in place of the backbone's own.

    Raises:
        BackboneError: not found, not usable offline, or without an end-of-sequence token.
    """
    if config.trust_remote_code:
        log.warning(
            "model.backbone.trust_remote_code is on: Python code that comes with %s (revision %s) runs on this machine",
            config.name,
            config.revision or "newest",
        )
    source = _source(config, folder) if kept is None else str(kept)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **_common(config))
    except UNREADABLE as error:
        faults = _faults_of(source, tokenizer=True)
        what = (
            "configuration" if isinstance(error, StrictDataclassError) else "tokenizer"
        )  # which reads config.json too
        raise BackboneError(_listed(config, faults) or _explain(config, source, what, error)) from error
    try:
        end = end_token(tokenizer)
    except ValueError as error:
        raise BackboneError(_listed(config, _faults_of(source, tokenizer=True)) or str(error)) from error
    if not encode(tokenizer, "a word 字"):  # transformers makes an empty one of some folders without any
        faults = _faults_of(source, tokenizer=True) or ["its tokenizer makes no tokens of words: fetch its files again"]
        raise BackboneError(_listed(config, faults))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = end
    return tokenizer


@dataclass
class Loaded:
    """A model and what was measured of its weights while they were whole."""

    model: PreTrainedModel
    measured: dict[str, Measured]  # by parameter name; tied weights once

    def embedding_norm(self, used: int) -> float:
        """Mean L2 norm of the first `used` input embeddings."""
        table = self.model.get_input_embeddings().weight
        name = next(name for name, parameter in self.model.named_parameters() if parameter is table)
        norm_V = self.measured[name].row_norm_V
        assert norm_V is not None
        return float(norm_V[:used].mean())


def load_model(
    config: BackboneConfig,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None,
    folder: Path | None = None,
    zero3: dict[str, Any] | None = None,
    ranks: Ranks | None = None,
) -> Loaded:
    """The pretrained weights in `dtype` on `device`, quantised if asked, read from safetensors only.

    With `zero3`, DeepSpeed's JSON, each rank keeps its part of every weight (stage 3). All `ranks` call this together. No rank
    ever holds the whole of a quantised or a partitioned model in another form than its last one.

    Raises:
        BackboneError: not found, no network, no safetensors, own code needed, no causal LM, weights missing from the
            files or of another shape, already quantised, or weights that NF4 cannot hold.
    """
    source = _source(config, folder)
    ranks = ranks or SingleProcess()
    _check_files(config, source, ranks)
    shape = load_shape(config, folder)
    attention = _with_soft_cap(config, shape, attention)
    four_bit = None
    if config.quantization == "nf4":
        quantization.check_sizes(shape, config.name, config.trust_remote_code)
        four_bit = quantization.nf4_config(dtype, config.double_quantization)
    stream = StreamingLoad(four_bit, None if zero3 is None else Partitioner(zero3), dtype, device)
    options: dict[str, Any] = {
        "config": shape,
        "dtype": dtype,
        "attn_implementation": attention,
        "use_safetensors": True,
        "ignore_mismatched_sizes": True,  # all of them are in the report, and refused
    }
    if four_bit is not None or zero3 is not None or config.read == "rank0":
        options["quantization_config"] = stream
    elif device.type != "cpu":
        options["device_map"] = {"": device}
    try:
        model, info = _from_pretrained(config, source, device, options, ranks)
    except BackboneError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise BackboneError(_explain(config, source, "weights", error)) from error
    faults = incomplete(shape.model_type, info, stream.shapes)
    measured = {} if faults else stream.finish(model)
    faults += _not_finite(source, model, stream)
    if faults:
        raise BackboneError(_listed(config, faults))
    _warn_of_unused(config.name, shape.model_type, info["unexpected_keys"])
    if four_bit is not None:
        quantization.settle(model, config.name)
    return Loaded(model, measured)


def _with_soft_cap(config: BackboneConfig, shape: PretrainedConfig, attention: str | None) -> str | None:
    """The attention of a family that caps its scores softly (Gemma 2), which only the eager one here does: transformers
    before 5.21 chooses sdpa for it, which drops the cap without a word.

    Raises:
        BackboneError: another was asked for.
    """
    if not getattr(shape.get_text_config(), "attn_logit_softcapping", None):
        return attention
    if attention not in (None, "eager"):
        raise BackboneError(
            f"{config.name}: models of type {shape.model_type!r} cap their attention's scores softly, which "
            f"model.backbone.attention={config.attention} leaves out: use auto, or eager"
        )
    return "eager"


def _check_files(config: BackboneConfig, source: str, ranks: Ranks) -> None:
    """Refuse a folder whose files cannot make a model, before any weight is read; under `read: rank0` rank 0 alone looks."""
    each = config.read == "each"
    faults = faults_before_reading(config, source) if each or ranks.is_rank_zero else []
    if not each:
        faults = ranks.broadcast_object(faults)
    if faults:
        raise BackboneError(_listed(config, faults))


def faults_before_reading(config: BackboneConfig, source: str | Path) -> list[str]:
    """Everything about a folder's model that JSON and headers tell: its files, missing weights, other sizes."""
    folder = Path(source)
    if not folder.is_dir():
        return []
    found = weight_files(folder)
    faults = folder_faults(folder, found)
    if not found.shape_of:
        return faults
    try:
        shape = AutoConfig.from_pretrained(folder, **_common(config))
    except UNREADABLE:
        return faults  # among them; else load_shape explains it
    if getattr(shape, "quantization_config", None) is not None:
        return faults  # its tensors are not the model's; load_shape refuses it
    faults += quantised_weights(found)
    trusted = config.trust_remote_code
    return faults + faults_of_shapes(shape, found.shape_of, whole=not found.faults, trust_remote_code=trusted)


def faults_of_present_files(config: BackboneConfig) -> list[str]:
    """What a run would refuse in a model's folder; weights and tokenizer may have been left out, to plan with."""
    folder = Path(config.name).expanduser()
    if not folder.is_dir():
        return []
    faults = faults_before_reading(config, folder) if has_weights(folder) else folder_faults(folder)
    return faults + (tokenizer_faults(folder) if has_vocabulary(folder) else [])


def _faults_of(source: str, *, tokenizer: bool = False) -> list[str]:
    """What is wrong with a folder's files, its weights among them where it has any."""
    folder = Path(source)
    if not folder.is_dir():
        return []
    faults = folder_faults(folder, weight_files(folder) if has_weights(folder) else None)
    return faults + (tokenizer_faults(folder) if tokenizer else [])


def _listed(config: BackboneConfig, faults: list[str]) -> str:
    """All faults in one message, "" for none."""
    if len(faults) < 2:
        return "".join(f"{config.name}: {fault}" for fault in faults)
    return f"{config.name} has {len(faults)} faults:\n" + "\n".join(f"  - {fault}" for fault in faults)


def _from_pretrained(
    config: BackboneConfig, source: str, device: torch.device, options: dict[str, Any], ranks: Ranks
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and transformers' report on its keys."""
    common = _common(config)
    load: Any = AutoModelForCausalLM.from_pretrained  # with loading info: a pair, which its type does not say
    if config.read == "rank0" and ranks.size > 1:
        family: Any = family_of(options["config"], common.pop("trust_remote_code"))
        options["state_dict"] = broadcast_tensors(lambda: safetensors_files(source, **common), device, ranks)
        return family.from_pretrained(None, output_loading_info=True, **options)
    return load(source, output_loading_info=True, **options, **common)


def _not_finite(source: str, model: PreTrainedModel, stream: StreamingLoad) -> list[str]:
    """Weights with nan or infinity, with their files."""
    found = stream.not_finite_in(model)
    if not found:
        return []
    folder = Path(source)
    files = weight_files(folder) if folder.is_dir() else WeightFiles()
    listed = "; ".join(f"{name}{files.where(name)} has {what}" for name, what in sorted(found.items())[:4])
    more = f"; so have {len(found) - 4} more weights" if len(found) > 4 else ""
    half = (
        "float16 has no values beyond 65504: try train.precision=bf16 or fp32; else "
        if stream.dtype == torch.float16
        else ""
    )
    return [
        f"weights that are not finite: {listed}{more}: {half}copy or fetch the files again, and if they stay so, use another "
        "checkpoint of the model: this one is broken"
    ]


def _warn_of_unused(name: str, kind: str, keys: Collection[str]) -> None:
    if keys:
        log.warning(
            "%s: %d tensors in its files are no part of a %s and are left out: %s", name, len(keys), kind, some(keys)
        )


def load_shape(config: BackboneConfig, folder: Path | None = None) -> PretrainedConfig:
    """The model's configuration: a fresh copy, since two models of one object would share their attention kernel."""
    source = _source(config, folder)
    try:
        shape = copy.deepcopy(AutoConfig.from_pretrained(source, **_common(config)))
    except UNREADABLE as error:
        faults = _faults_of(source)
        raise BackboneError(_listed(config, faults) or _explain(config, source, "configuration", error)) from error
    made = getattr(shape, "quantization_config", None)
    if made is not None:
        method = made.get("quant_method") if isinstance(made, dict) else getattr(made, "quant_method", made)
        raise BackboneError(
            f"{config.name} is already quantised ({method}): name the unquantised model, and set "
            "model.backbone.quantization=nf4 for 4 bits"
        )
    other = set(getattr(shape, "layer_types", None) or ()) - KNOWN_LAYERS
    if other:
        raise BackboneError(
            f"{config.name}: models of type {shape.model_type!r} are not supported: their layers of "
            f"{', '.join(sorted(other))} cannot see answers as a tree"
        )
    shape.use_cache = False
    return shape


def resolve_attention(asked: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The attention to use: `auto` is flash-attn where it can run, else on a GPU PyTorch's own kernel for unequal lengths, else None:
    what serves the family best without them.

    Raises:
        UnusableAttention: what was asked for cannot run here, with every reason.
    """
    if asked == "auto":
        kernels = ("flash_attention_2", "varlen") if device.type == "cuda" else ()
        return next((kernel for kernel in kernels if not _why_not(kernel, device, dtype)), None)
    reasons = _why_not(asked, device, dtype)
    if reasons:
        raise UnusableAttention(asked, reasons)
    return asked


def _why_not(backend: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why an attention backend cannot run on this device, in this dtype, with what is installed."""
    reasons = []
    cuda, half = device.type == "cuda", dtype in (torch.bfloat16, torch.float16)
    if backend in ("flash_attention_2", "flex") and not cuda:
        reasons.append(f"it needs a CUDA device, and this run is on {device.type}")
    if (backend == "flash_attention_2" or (backend == "varlen" and cuda)) and not half:
        reasons.append(f"it needs bf16 or fp16, and train.precision gives {str(dtype).removeprefix('torch.')}")
    if backend == "flash_attention_2":
        try:
            if not hasattr(importlib.import_module("flash_attn"), "flash_attn_func"):
                reasons.append(NO_CUDA_EXTENSION)
        except ImportError as error:
            reasons.append(f"flash_attn cannot be imported ({error}); docs/clusters.md says how to install it")
    if backend == "varlen" and cuda:
        try:
            signature = inspect.signature(importlib.import_module("torch.nn.attention.varlen").varlen_attn)
            if not {"window_size", "enable_gqa"} <= signature.parameters.keys():
                reasons.append(f"PyTorch {torch.__version__} is too old for it")
        except ImportError:
            reasons.append(f"PyTorch {torch.__version__} is too old for it")
    if backend == "flex" and importlib.util.find_spec("triton") is None:
        reasons.append("it is compiled by Triton, which is not installed")
    return reasons


def model_file(config: BackboneConfig, name: str, folder: Path | None = None) -> Path | None:
    """One file of the backbone by its name in the folder or the hub's repository; None where there is none.

    Raises:
        BackboneError: not found, or it cannot be fetched.
    """
    source = _source(config, folder)
    try:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **_common(config))
    except (OSError, ValueError) as error:
        raise BackboneError(_explain(config, source, name, error)) from error
    return None if found is None else Path(found)


def model_weights(config: BackboneConfig, folder: Path | None = None) -> list[Path]:
    """The safetensors files of the backbone; those of a hub's model are fetched where they are not here.

    Raises:
        BackboneError: there are none, or they cannot be fetched.
    """
    source = _source(config, folder)
    try:
        return safetensors_files(source, **_common(config))
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(_explain(config, source, "weights", error)) from error


def _source(config: BackboneConfig, folder: Path | None) -> str:
    if config.name == "tiny":
        if folder is None:
            raise BackboneError("backbone 'tiny' is read from the folder where build_tiny wrote it: give that folder")
        if not (Path(folder) / "config.json").is_file():
            raise BackboneError(f"no tiny backbone in {folder}: build_tiny writes it")
        return str(folder)
    path = Path(config.name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                raise BackboneError(
                    f"{config.name} has an adapter (adapter_config.json) and no model: merge it into its base (peft's "
                    "merge_and_unload) and name the result"
                )
            raise BackboneError(f"{config.name} is a folder without config.json: no Hugging Face model")
        return str(path)
    if path.exists() or config.name.startswith((".", "/", "~")) or config.name.count("/") > 1 or os.sep != "/":
        raise BackboneError(f"no model folder {config.name} (a hub name is written owner/name)")
    return config.name


def _common(config: BackboneConfig) -> dict[str, Any]:
    return {
        "revision": config.revision or "main",
        "trust_remote_code": config.trust_remote_code,
        "local_files_only": bool(constants.HF_HUB_OFFLINE),
    }


def _explain(config: BackboneConfig, source: str, what: str, error: Exception) -> str:
    text = str(error)
    at = f" at revision {config.revision}" if config.revision else ""
    hub = not Path(source).is_dir()
    if "trust_remote_code" in text:
        return (
            f"{config.name} brings its own code, which would run on this machine. If you trust its authors, read the code "
            "and set model.backbone.trust_remote_code=true and model.backbone.revision=<the commit you read>"
        )
    if "does not support" in text and "attention" in text:
        return f"{config.name} cannot attend with {config.attention}: set model.backbone.attention=auto, or eager"
    if isinstance(error, ImportError):
        return f"the {what} of {config.name} needs a library that is not here: {text}"
    if isinstance(error, SafetensorError) or "SafetensorError" in text:  # of another rank
        return f"the {what} of {config.name}{at} are damaged ({text}): fetch them again"
    if "safetensors" in text:
        return (
            f"{config.name}{at} has no safetensors weights, and others (pickles) are not read: name a model that has them, "
            f"or convert them where you trust them: {CONVERT.format(source=source)}"
        )
    if "Unrecognized configuration class" in text or "Unrecognized model" in text:
        return f"{config.name} is not a causal language model that transformers knows: {text.splitlines()[0]}"
    if isinstance(error, KeyError):
        return (
            f"the {what} of {config.name}{at} could not be read: {text} is missing from its files, or is named in them and unknown to "
            f"transformers {transformers.__version__}"
        )
    if hub and constants.HF_HUB_OFFLINE:
        return (
            f"the {what} of {config.name}{at} is not in the local cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is "
            f"set: fetch it where there is a network (hf download {config.name}), or name a folder"
        )
    if "gated repo" in text or "401" in text or "403" in text:
        return (
            f"{config.name}{at} is not open to you: accept its terms on its hub page and log in (hf auth login). {text}"
        )
    if "is not a valid model identifier" in text or "404" in text:
        return f"the hub knows no model {config.name}{at}: check the name, or give the path of a folder"
    if hub and isinstance(error, OSError):
        return (
            f"the {what} of {config.name}{at} could not be fetched and is not in the local cache: is there a network? "
            f"Else name a folder. ({text.splitlines()[0]})"
        )
    return f"the {what} of {config.name}{at} could not be read: {text}"
