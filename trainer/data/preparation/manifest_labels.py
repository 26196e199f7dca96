"""Labels of a manifest of clips, checked before any clip is read."""

from __future__ import annotations

from dataclasses import replace

from trainer.data.preparation.faults import DataError, Fault, describe, group_faults
from trainer.data.preparation.rows import checker_of
from trainer.data.readers.jsonl import labelled_sample
from trainer.data.readers.raw import SPLIT_NAMES
from trainer.features.manifest import ClipLine, Manifest
from trainer.questions import Definition, Questions, questions_of


def check_labels(definition: Definition, manifest: Manifest, drop_bad: str = "none") -> None:
    """Refuse a manifest with labels that the dataset would be refused for after the extraction.

    Args:
        drop_bad: of preparation: "train" or "all", the samples of which splits are left out instead.

    Raises:
        DataError: every such label, as preparation tells it.
    """
    if drop_bad == "all":
        return
    questions = questions_of(definition) if isinstance(definition, Questions) else ()
    checker, faults = checker_of(definition), list[Fault]()
    for row in manifest.rows:
        line = ClipLine.model_validate(row.values)
        split = SPLIT_NAMES.get((line.split or "").lower(), line.split or "")
        if drop_bad == "train" and split == "train":
            continue
        sample = labelled_sample(questions_of(definition)[0], questions, line, row.id, split, f"line {row.line}")
        if not (sample.text or "").strip():  # what a clip has to say is not known yet
            sample = replace(sample, text="-")
        faults += [fault for fault in checker.check(sample, split)[1] if not fault.repair]
    if faults:
        lines = describe(group_faults(faults, otherwise="refused"))
        raise DataError(
            "\n".join(
                [f"{manifest.path} has labels that cannot be used; no clip was read:", *(f"  {line}" for line in lines)]
            )
        )
