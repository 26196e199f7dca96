"""What a config asks for: its data, its model, and answers that the model's tokenizer can tell apart."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from launch.doctor.findings import Findings, State
from trainer.config import BackboneConfig, RunConfig, load_config
from trainer.data.dataset import PreparedDataset
from trainer.tasks import Task

PART = "config"
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
GB = 10**9


@dataclass
class ResolvedConfig:
    """A config that can be read, and what of it is there."""

    config: RunConfig
    tasks: dict[str, Task]
    data: dict[str, PreparedDataset]
    model: bool = False  # its weights are on this machine

    @property
    def complete(self) -> bool:
        return bool(self.data) and self.model


def check_resolved_config(
    findings: Findings, path: Path, overrides: Sequence[str], scratch: Path
) -> ResolvedConfig | None:
    """Config, data, model and answers; `scratch` is a folder for the offline backbone."""
    from trainer.run.assemble import open_data

    try:
        resolved = ResolvedConfig(load_config(path, overrides), {}, {})
    except ValueError as error:
        findings.add(PART, "config", "fault", str(error), f"egmf config show {path} names every key")
        return None
    findings.add(PART, "config", "ok", f"{path}: {', '.join(resolved.config.tasks)}")
    with findings.explained(PART, "data"):
        resolved.tasks, resolved.data = open_data(resolved.config)
        for name, data in resolved.data.items():
            _check_data(findings, name, data)
    with findings.explained(PART, "model"):
        resolved.model = _check_model(findings, resolved, scratch)
    return resolved


def _check_data(findings: Findings, name: str, data: PreparedDataset) -> None:
    sizes = {split: len(data[split]) for split in ("train", "valid", "test")}
    found = f"{', '.join(f'{n} {split}' for split, n in sizes.items())}; fingerprint {data.fingerprint[:12]}"
    empty = [split for split in ("train", "valid") if not sizes[split]]
    if empty:
        advice = "prepare it again with samples in every split (egmf prepare)"
        findings.add(
            PART, f"data of {name}", "fault", f"no samples in {', '.join(empty)}; {found}", advice, samples=sizes
        )
    else:
        findings.add(PART, f"data of {name}", "ok", found, fingerprint=data.fingerprint, samples=sizes)


def _check_model(findings: Findings, resolved: ResolvedConfig, scratch: Path) -> bool:
    """Whether the weights are here. Looks at tokenizer, shape and files, and at the answers."""
    from trainer.models.backbone.loading import load_shape, load_tokenizer
    from trainer.models.backbone.tiny import build_tiny
    from trainer.run.assemble import tiny_texts

    backbone, folder = resolved.config.model.backbone, scratch / "backbone"
    tiny = backbone.name == "tiny"
    if tiny:
        if not resolved.data:
            findings.add(PART, "model", "skipped", "the offline backbone's tokenizer is made from the data")
            return False
        build_tiny(backbone.tiny, tiny_texts(resolved.config, resolved.tasks, resolved.data), folder)
    tokenizer = load_tokenizer(backbone, folder)  # its error has all faults of a folder
    shape = load_shape(backbone, folder)
    rows = getattr(shape.get_text_config(), "vocab_size", None)
    found = f"{backbone.name} ({shape.model_type}), {rows} embeddings, {len(tokenizer)} tokens"
    if rows is not None and len(tokenizer) > rows:
        findings.add(
            PART, "model", "fault", f"{found}: the tokenizer has more tokens than the model",
            "the two do not belong together: fetch both from one source",
        )  # fmt: skip
        return False
    findings.add(PART, "model", "ok", found, type=shape.model_type, vocabulary=rows, tokens=len(tokenizer))
    _check_answers(findings, resolved, tokenizer)
    _check_lengths(findings, resolved, tokenizer, folder)
    return True if tiny else _check_weights(findings, backbone)


def _check_answers(findings: Findings, resolved: ResolvedConfig, tokenizer: Any) -> None:
    from trainer.answers.tree import task_tree
    from trainer.data.collate import prompt_language

    for name, task in resolved.tasks.items():
        with findings.explained(PART, f"answers of {name}"):
            tree = task_tree(task, tokenizer, resolved.config.data.answers, prompt_language(task, resolved.config.data))
            findings.add(
                PART, f"answers of {name}", "ok", f"{len(tree.answers)} answers, all distinct under the tokenizer"
            )


def _check_lengths(findings: Findings, resolved: ResolvedConfig, tokenizer: Any, folder: Path) -> None:
    """Whether every sample of every split fits into the model's positions, and which texts are cut."""
    from trainer.answers.tree import AnswerError
    from trainer.data.task_input import task_inputs
    from trainer.models.backbone.positions import position_limit, skeleton
    from trainer.run.assemble import make_run_collators
    from trainer.run.lengths import check_positions, log_lines, measure_splits, splits_of_run

    config = resolved.config
    tasks = {name: task for name, task in resolved.tasks.items() if name in resolved.data}
    limit = position_limit(skeleton(config.model.backbone, folder))
    with findings.explained(PART, "lengths of samples"), contextlib.suppress(AnswerError):  # which are faults already
        collators, tries = make_run_collators(config, task_inputs(tasks, resolved.data), resolved.data, tokenizer)
        found = measure_splits(config, resolved.data, collators, tries, splits_of_run(config), limit)
        said = [*check_positions(found, limit, config), *log_lines(found, config)]
        longest = max((int(one.positions_N.max(initial=0)) for one in found), default=0)
        of = "" if limit is None else f" of {limit.positions}"
        state: State = "warning" if said else "ok"
        findings.add(
            PART, "lengths of samples", state, "; ".join([f"at most {longest}{of} positions", *said]), positions=longest
        )


def _check_weights(findings: Findings, backbone: BackboneConfig) -> bool:
    path = Path(backbone.name).expanduser()
    if path.is_dir():
        bytes_, faults = _weights_in(backbone, path)
        found = f"{bytes_ / GB:.2f} GB in {path}"
        if faults:
            findings.add(PART, "weights", "fault", "; ".join(faults), "copy or fetch the model again")
            return False
        findings.add(PART, "weights", "ok", found, bytes=bytes_)
        return True
    return _check_hub(findings, backbone)


def _check_hub(findings: Findings, backbone: BackboneConfig) -> bool:
    revision = backbone.revision or "main"
    for name in (INDEX, WEIGHTS):
        cached = try_to_load_from_cache(backbone.name, name, revision=revision)
        if isinstance(cached, str):
            bytes_, faults = _weights_in(backbone, Path(cached).parent)
            if not faults:
                findings.add(PART, "weights", "ok", f"{bytes_ / GB:.2f} GB in the local cache", bytes=bytes_)
                return True
    fetch = f"fetch it before the run: hf download {backbone.name}"
    if constants.HF_HUB_OFFLINE:
        findings.add(PART, "weights", "fault", "not in the local cache, and HF_HUB_OFFLINE is set", fetch)
        return False
    try:
        about = HfApi().model_info(backbone.name, revision=revision, timeout=15, files_metadata=True)
    except (OSError, HfHubHTTPError) as error:
        findings.add(PART, "weights", "fault", f"not in the local cache, and the hub does not answer: {error}", fetch)
        return False
    bytes_ = sum(s.size or 0 for s in about.siblings or () if s.rfilename.endswith(".safetensors"))
    findings.add(
        PART, "weights", "warning", f"not in the local cache: {bytes_ / GB:.1f} GB to fetch", fetch, bytes=bytes_
    )
    return False


def _weights_in(backbone: BackboneConfig, folder: Path) -> tuple[int, list[str]]:
    """Bytes of a model folder's safetensors files, and what is wrong with the folder; headers are read."""
    from trainer.models.backbone.loading import faults_before_reading
    from trainer.models.backbone.model_files import weight_files

    found, faults = weight_files(folder), faults_before_reading(backbone, folder)
    if not found.file_of and not faults:
        faults = [f"neither {WEIGHTS} nor {INDEX} is there"]
    return found.size, faults
