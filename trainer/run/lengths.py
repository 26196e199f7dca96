"""Before the first step, from token counts alone: what every split needs of the model's positions, and which texts are cut.

Shapes: N samples of a split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np

from trainer.batch import AnswerTrie, Sample
from trainer.config import RunConfig
from trainer.data.collate import Collator
from trainer.data.dataset import PreparedDataset, SplitView
from trainer.models.backbone.positions import PositionLimit

IDS = 5  # that are named of the samples of a split
GENERATED_BEYOND = 4  # tokens that may be generated beyond the longest answer

Use = Literal["trained", "scored", "generated"]


class PositionsError(ValueError):
    """Samples that are longer than the model's positions."""


class TextCuts(TypedDict):
    """Of a split: its texts, how many of them are longer than `data.max_text_tokens`, and the tokens of the longest."""

    texts: int
    cut: int
    longest: int


@dataclass(frozen=True)
class SplitLengths:
    """How long the samples of one task and split are.

    Attributes: `positions_N`, of the prompt with the longest answer that is read behind it (in training: with the sample's
    own); `text_N`, tokens of the sample's own text before it is cut; `least`, of the prompt without any text.
    """

    task: str
    split: str
    ids: Sequence[str]
    positions_N: np.ndarray
    text_N: np.ndarray
    least: int

    def cuts(self, most: int) -> TextCuts:
        """What a limit of `most` tokens cuts of the texts."""
        longest = int(self.text_N.max(initial=0))
        return {"texts": int((self.text_N > 0).sum()), "cut": int((self.text_N > most).sum()), "longest": longest}


def measure(
    collate: Collator,
    trie: AnswerTrie,
    split: str,
    samples: SplitView | Sequence[Sample],
    use: Use,
    limit: PositionLimit | None,
) -> SplitLengths:
    """The lengths of some samples of a task.

    A sample's positions are those of prefix, pseudo tokens, history, text and suffix, and of what is read of the answer: all its
    tokens but the end. Positions restart behind the prefix for every sample of a packed row, and the nodes of a tree of
    answers have their depth; where rotary frequencies depend on the longest row, its places count, so all nodes do.
    """
    ids = samples.ids if isinstance(samples, SplitView) else [sample.id for sample in samples]
    prefix, longest, text_N = len(collate.prefix), max(map(len, collate.answers)) - 1, collate.text_lengths(samples)
    carried = {"trained": collate.objective.trie_in_batch, "scored": trie, "generated": None}[use]
    if use == "trained" and carried is None:
        tokens_N, behind, most = collate.sizes(samples).tokens_N, 0, max(map(len, collate.targets)) - 1
    else:
        behind = longest + GENERATED_BEYOND if carried is None else carried.depth
        if carried is not None and limit is not None and limit.kind == "rotary":
            behind = len(carried.token_N)
        tokens_N, most = collate.sizes(samples, nodes=0).tokens_N, behind
    least = prefix + collate.pseudo_tokens + len(collate.suffix) + most
    return SplitLengths(collate.task.name, split, ids, prefix + tokens_N + behind, text_N, least)


def measure_splits(
    config: RunConfig,
    data: Mapping[str, PreparedDataset],
    collators: Mapping[str, Collator],
    tries: Mapping[str, AnswerTrie],
    splits: Iterable[str],
    limit: PositionLimit | None,
    *,
    scored: bool = False,
) -> list[SplitLengths]:
    """The lengths of every task's samples in some splits; those of `train` are measured as they are trained on, unless they are
    to be `scored` alone, and as they are scored where the run does that."""
    answered: Use = "generated" if config.eval.mode == "generate" else "scored"

    def uses(split: str) -> list[Use]:
        if split != "train" or scored:
            return [answered]
        return ["trained", answered] if "train" in config.eval.splits else ["trained"]

    return [
        measure(collators[name], tries[name], split, opened[split], use, limit)
        for name, opened in data.items()
        for split in dict.fromkeys(splits)
        for use in uses(split)
    ]


def splits_of_run(config: RunConfig) -> list[str]:
    """The splits that a training reads."""
    return list(dict.fromkeys(["train", "valid", *config.eval.splits]))


def check_positions(lengths: Sequence[SplitLengths], limit: PositionLimit | None, config: RunConfig) -> list[str]:
    """Compare what samples need with what the model has; what is only beyond its training comes back as warnings.

    Raises:
        PositionsError: with every task and split that has samples beyond the limit, the first of them, and what to do.
    """
    if limit is None:
        return []
    over = [one for one in lengths if (one.positions_N > limit.positions).any()]
    lines = list(dict.fromkeys(_line(one, limit) for one in over))
    if not lines:
        return []
    name = config.model.backbone.name
    if not limit.hard:
        return [
            f"samples need more positions than {name} was trained on ({limit.positions}), where it may answer worse: "
            + "; ".join(lines)
        ]
    raise PositionsError(
        f"samples are too long for {name}: {limit.reason}\n"
        + "\n".join(f"  {line}" for line in lines)
        + f"\n{_way_out(over, limit, config)}"
    )


def log_lines(lengths: Sequence[SplitLengths], config: RunConfig) -> list[str]:
    """What is to be said of texts that are cut, a line for each task and split that has some."""
    most = config.data.max_text_tokens
    lines = []
    for one in lengths:
        cuts = one.cuts(most)
        if cuts["cut"]:
            lines.append(
                f"task {one.task}, {one.split}: {cuts['cut']} of {cuts['texts']} texts are cut to their last {most} tokens "
                f"(data.max_text_tokens), the longest has {cuts['longest']}"
            )
    return list(dict.fromkeys(lines))


def cut_record(lengths: Sequence[SplitLengths], config: RunConfig) -> dict[str, dict[str, TextCuts]]:
    """Task -> split -> what is cut of its texts."""
    record: dict[str, dict[str, TextCuts]] = {}
    for one in lengths:
        record.setdefault(one.task, {})[one.split] = one.cuts(config.data.max_text_tokens)
    return record


def _line(one: SplitLengths, limit: PositionLimit) -> str:
    places = np.flatnonzero(one.positions_N > limit.positions)
    named = ", ".join(str(one.ids[i]) for i in places[:IDS]) + (", …" if len(places) > IDS else "")
    return (
        f"task {one.task}, {one.split}: {len(places)} of {len(one.positions_N)} samples, the longest of {one.positions_N.max()} positions: "
        f"{named}"
    )


def _way_out(over: Sequence[SplitLengths], limit: PositionLimit, config: RunConfig) -> str:
    """The largest `data.max_text_tokens` that is sure to fit, if any."""
    least, history = max(one.least for one in over), config.data.history
    room = (limit.positions - least) // (1 + history)
    if room < 1:
        return (
            f"the instruction, pseudo tokens, cue and longest answer alone take {least}"
            + (f" beside {history} utterances of history" if history else "")
            + ": "
            + ("set data.history=0, " if history else "")
            + "shorten the task's prompts (docs/data.md), set a smaller model.fusion.pseudo_tokens, or use another backbone"
        )
    fewer = f"fewer utterances of history than data.history={history}, " if history else ""
    return (
        f"set data.max_text_tokens={room} or less (now {config.data.max_text_tokens}; longer texts are cut to their last tokens), "
        f"{fewer}or use a backbone with more positions"
    )
