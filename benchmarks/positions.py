"""How many positions pass through the backbone per sample: packed rows against padded ones, counted by the run's own planner.

MELD's published annotations, a byte-level BPE of 8,000 tokens trained on their training texts, K = 4 pseudo tokens, no
history. MOSEI-length texts are made of the same words, without punctuation as its transcripts are; their lengths are
log-normal with a mean of 19 words (sigma 0.55, cut at 100). Fixed: every text padded to the longest, the instruction in every row, as published scripts do it.

    python -m benchmarks.positions --meld FOLDER_WITH_THE_CSV_FILES --out benchmarks/results/positions.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TypedDict

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.machine import describe, today
from trainer.batch import Sample
from trainer.config import DataConfig
from trainer.data.collate import Collator
from trainer.data.dataset import SplitView, open_dataset
from trainer.data.preparation.prepare import prepare
from trainer.data.sampling import GlobalBatchSampler, Limits, Sizes, micro_batches
from trainer.tasks import get_task

BUDGETS = ((32, 1024), (64, 1024), (64, 2048), (128, 4096))
SAMPLES = 10_000
TARGETS = {"meld": 32, "mosei": 45}


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 8,000 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=8000, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def mosei_like(texts: list[str]) -> list[Sample]:
    """Samples whose texts are as long as CMU-MOSEI's and made of the words of `texts`."""
    rng = np.random.default_rng(0)
    words = [word for word in (w.strip('-.,!?:;"()*…').replace("’", "'") for w in " ".join(texts).split()) if word]
    sigma = 0.55
    lengths = np.clip(rng.lognormal(np.log(19) - sigma**2 / 2, sigma, SAMPLES).round().astype(int), 1, 100)
    starts = rng.integers(0, len(words) - 100, SAMPLES)
    targets = rng.uniform(-3, 3, SAMPLES)
    return [
        Sample(str(i), " ".join(words[a : a + n]), float(t))
        for i, (a, n, t) in enumerate(zip(starts, lengths, targets, strict=True))
    ]


def positions(sizes: Sizes, lengths: np.ndarray, global_batch: int, limits: Limits) -> float:
    """Per sample, over an epoch."""
    order = GlobalBatchSampler({"task": lengths}, global_batch=global_batch, seed=0)
    total = 0
    for step in range(order.steps_per_epoch):
        for micro in micro_batches(order.step(step).indices, sizes, limits, 0, 1):
            tokens_n = sizes.tokens_N[list(micro.indices)]
            total += sizes.prefix + tokens_n.sum() if limits.packed else len(tokens_n) * (sizes.prefix + tokens_n.max())
    return float(total / len(lengths))


class Counts(TypedDict):
    """Positions of a sample: of the instruction, the text, all its own; and in all by layout. `target` is what was aimed at."""

    instruction: int
    text: float
    own: float
    fixed: int
    padded: float
    packed: dict[str, float]
    target: float


def count(
    task: str, tokenizer: PreTrainedTokenizerFast, samples: SplitView | list[Sample], lengths: np.ndarray
) -> Counts:
    collate = Collator(
        get_task(task), tokenizer, DataConfig(),
        widths={}, rates={}, pseudo_tokens=4, modalities=("text", "audio", "video"),
    )  # fmt: skip
    sizes = collate.sizes(samples)
    return {
        "instruction": sizes.prefix,
        "text": float(sizes.read_N3[:, 0].mean()),
        "own": float(sizes.tokens_N.mean()),
        "fixed": int(sizes.prefix + sizes.tokens_N.max()),
        "padded": positions(sizes, lengths, 64, Limits(8 * 4096, 8, packed=False)),
        "packed": {f"{g}/{t}": positions(sizes, lengths, g, Limits(t)) for g, t in BUDGETS},
        "target": TARGETS[task],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meld", type=Path, required=True, help="the folder of MELD's published annotations")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(get_task("meld"), [args.meld], Path(folder) / "meld")
        view = open_dataset(Path(folder) / "meld")["train"]
        texts = list(view.texts())
        tokenizer = make_tokenizer(texts)
        found = {"meld": count("meld", tokenizer, view, view.lengths())}
    made = mosei_like(texts)
    found["mosei"] = count("mosei", tokenizer, made, np.array([len(s.text) for s in made]))
    for task, counts in found.items():
        print(
            f"{task}: texts of {counts['text']:.1f} tokens, instruction {counts['instruction']}; a sample: fixed padding {counts['fixed']}, "
            f"padded by batch of 8 {counts['padded']:.1f}, packed "
            + ", ".join(f"{value:.1f} (batch/budget {key})" for key, value in counts["packed"].items())
            + f"; target {counts['target']}"
        )
    if args.out:
        command = "python -m benchmarks.positions --meld FOLDER --out benchmarks/results/positions.json"
        report = {"date": today(), "command": command, "machine": describe("tokenizers", "transformers"), **found}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
