"""Samples to batches: prompts with places for pseudo tokens, answer targets, padded features on one time axis.

A prompt reads ``instruction <Multimodal> [K places] history text </> cue answer``; its pieces are tokenised
apart, each as it stands in running text (:class:`trainer.text.Pieces`), and joined. What stands before the places, the
prefix, is the same for every sample of a task. A packed batch is one
row: the prefix once, then what is left of every sample. A padded batch has a row with the whole prompt for every sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer.batch import AnswerTrie, Batch, Features, FusionInput, PackedBatch, Packing, Sample
from trainer.config import DataConfig
from trainer.data.dataset import SplitView
from trainer.data.objective import Objective
from trainer.data.sampling import MicroBatch, Sizes, dropped_modalities
from trainer.data.token_counts import TokenCounts
from trainer.tasks import Language, Task
from trainer.text import Joining, Pieces, end_token, start_tokens

OPEN = "<Multimodal>"
NOMINAL_SECONDS = 10.0  # a clip's length on the time axis where no frame rate is known


def prompt_texts(task: Task, config: DataConfig) -> tuple[str, str]:
    """What stands before the pseudo tokens, and between the sample's text and the answer."""
    language = prompt_language(task, config)
    return f"{task.instruction(config.answers, language)}\n{OPEN}", f"{task.close(language)}\n{task.cue(language)}"


def prompt_language(task: Task, config: DataConfig) -> Language:
    """The language of a task's prompts.

    Raises:
        ValueError: the task has no prompt in the language that the config names.
    """
    language = task.language if config.prompt_language == "auto" else config.prompt_language
    if language not in task.prompts:
        raise ValueError(
            f"data.prompt_language={language}: task {task.name} has no prompt in it, but in {', '.join(task.prompts)}; write one "
            "into the task's YAML file, or take auto"
        )
    return language


@dataclass(frozen=True)
class _Encoded:
    """Samples as tokens, a list for each, and the objective of their batch."""

    texts: list[list[int]]  # the samples' own texts, for the fusion network
    contexts: list[list[int]]  # from the first place of a pseudo token to the cue's end
    chosen: list[int]  # index of every sample's answer; empty where samples are scored, or have shares of answers
    answers: list[list[int]]  # their tokens that are predicted; of no tokens where `chosen` is empty
    dropped: list[set[str]]  # modalities that modality dropout removes
    objective: Objective

    def own_tokens(self, trie: AnswerTrie | None) -> list[list[int]]:
        """What a packed row holds of every sample: its context, then the nodes of a trie, or its answer without the last token."""
        if trie is not None:
            nodes = trie.token_N.tolist()
            return [context + nodes for context in self.contexts]
        return [context + answer[:-1] for context, answer in zip(self.contexts, self.answers, strict=True)]

    def answer_places(self, cues: Sequence[int]) -> list[int]:
        """Where in a packed row each answer token is predicted, with samples whose contexts end at `cues`."""
        if self.chosen and self.objective.trie_in_batch is not None:  # an answer's tokens are then nodes of the trie
            places = [self.objective.places[c] for c in self.chosen]
        else:
            places = [list(range(len(answer))) for answer in self.answers]
        return [cue + place for cue, own in zip(cues, places, strict=True) for place in own]


class Collator:
    """Makes batches of one task's samples.

    Args:
        task: the question.
        tokenizer: the backbone's.
        config: the run's ``data`` section.
        widths: features per frame of audio and video; 0 where the task has none.
        rates: frames per second of audio and video, None where unknown.
        pseudo_tokens: K.
        modalities: those the model uses; the text of a model without text is empty.
        seed: of the run, for modality dropout.
        objective: what the training loss asks of batches with answers; its tree, where it has one, is that of the task's answers.
        joining: how the prompt's pieces are tokenised; see :class:`trainer.text.Pieces`.
        dataset: the folder of the prepared dataset, where the counts of its texts' tokens are kept.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        *,
        widths: Mapping[str, int],
        rates: Mapping[str, float | None],
        pseudo_tokens: int,
        modalities: Sequence[str],
        seed: int = 0,
        objective: Objective | None = None,
        joining: Joining = "running",
        dataset: Path | None = None,
    ) -> None:
        self.task, self.tokenizer, self.config = task, tokenizer, config
        self.pieces = Pieces(tokenizer, joining)
        self.counts = TokenCounts(self.pieces, dataset)
        self.pseudo_tokens, self.modalities, self.seed = pseudo_tokens, tuple(modalities), seed
        self.widths = {name: widths.get(name) or 0 for name in ("audio", "video")}
        known = all(rates.get(name) for name, width in self.widths.items() if width)
        self.rates = {name: rates.get(name) if known else None for name in self.widths}
        self.objective = objective or Objective()
        self.end = end_token(tokenizer)
        language = prompt_language(task, config)
        before, after = prompt_texts(task, config)
        self.prefix = start_tokens(tokenizer) + self.pieces.first(before)
        self.suffix = self.pieces.following(after)
        self.answers = [
            [*self.pieces.following(text), self.end] for text in task.answer_texts(config.answers, language)
        ]
        self.targets = [self.objective.target(answer, c) for c, answer in enumerate(self.answers)]
        self._tokens: dict[str, list[int]] = {}

    def __call__(
        self, samples: Sequence[Sample], *, answers: bool = True, weight: float = 1.0, epoch: int | None = None
    ) -> Batch:
        """A batch of `samples`. `epoch` switches modality dropout on (training); `answers` adds the targets."""
        encoded = self._encode(samples, answers, epoch)
        objective, targets = encoded.objective, encoded.answers
        contexts = [self.prefix + context for context in encoded.contexts]
        rows = [context + target[:-1] for context, target in zip(contexts, targets, strict=True)]
        return Batch(
            task=self.task.name,
            ids=[sample.id for sample in samples],
            input_ids_BL=_pad(rows)[0],
            context_length_B=torch.tensor([len(c) for c in contexts]),
            pseudo_start=len(self.prefix),
            pseudo_tokens=self.pseudo_tokens,
            answer_ids_BA=_pad(targets)[0],
            answer_mask_BA=_pad(targets)[1],
            text_ids_BS=_pad(encoded.texts, least=1)[0],
            text_mask_BS=_pad(encoded.texts, least=1)[1],
            audio=self._features("audio", samples, encoded.dropped),
            video=self._features("video", samples, encoded.dropped),
            target_B=torch.tensor([s.target for s in samples], dtype=torch.float32),
            weight_B=objective.weights(self.task, samples, weight),
            choices=objective.choices(encoded.chosen, max(map(len, targets))),
            trie=objective.trie_in_batch,
            error_weight=objective.error_weight,
            answer_B=torch.tensor(encoded.chosen) if encoded.chosen else None,
            share_BC=objective.shares(self.task, samples),
        )

    def pack(
        self,
        samples: Sequence[Sample],
        groups: Sequence[int] | None = None,
        *,
        trie: AnswerTrie | None = None,
        weight: float = 1.0,
        epoch: int | None = None,
    ) -> PackedBatch:
        """`samples` in one row. With a `trie` they are to be scored and carry its nodes, else they carry their answers (all
        answers, where the training loss needs their probabilities).

        The fusion network reads them in `groups` of neighbours; 0 stands for a dummy group.
        """
        encoded = self._encode(samples, trie is None, epoch)
        objective = encoded.objective
        carried = objective.trie_in_batch if trie is None else trie
        own = encoded.own_tokens(carried)
        lengths = [len(row) for row in own]
        starts = np.cumsum([0, *lengths[:-1]])
        cues = starts + [len(c) - 1 for c in encoded.contexts]
        longest = max(map(len, encoded.answers))
        slots = [b * longest + i for b, answer in enumerate(encoded.answers) for i in range(len(answer))]
        return PackedBatch(
            task=self.task.name,
            ids=[sample.id for sample in samples],
            prefix_ids_P=torch.tensor(self.prefix, dtype=torch.long),
            own_ids_T=torch.tensor(_concatenate(own)),
            place_BK=torch.from_numpy(starts[:, None] + np.arange(self.pseudo_tokens)),
            cue_at_B=torch.from_numpy(cues),
            packing=Packing(len(self.prefix), torch.tensor(lengths), sum(lengths), max(lengths), carried),
            answer_at_n=torch.tensor(encoded.answer_places(cues.tolist()), dtype=torch.long),
            answer_id_n=torch.tensor(_concatenate(encoded.answers), dtype=torch.long),
            answer_slot_n=torch.tensor(slots, dtype=torch.long),
            longest_answer=longest,
            inputs=self._inputs(samples, encoded, [len(samples)] if groups is None else groups),
            target_B=torch.tensor([s.target for s in samples], dtype=torch.float32),
            weight_B=objective.weights(self.task, samples, weight),
            choices=objective.choices(encoded.chosen),
            error_weight=objective.error_weight,
            answer_B=torch.tensor(encoded.chosen) if encoded.chosen else None,
            share_BC=objective.shares(self.task, samples),
        )

    def training(self, samples: Sequence[Sample], micro: MicroBatch, epoch: int | None) -> Batch | PackedBatch:
        """A training batch of a micro-batch's samples, in the layout of the config."""
        if self.config.layout == "packed":
            batch: Batch | PackedBatch = self.pack(samples, micro.groups, weight=micro.weight, epoch=epoch)
        else:
            batch = self(samples, weight=micro.weight, epoch=epoch)
        batch.most_samples = micro.most_samples
        return batch

    def sizes(self, samples: SplitView | Sequence[Sample], *, nodes: int | None = None, cached: bool = False) -> Sizes:
        """What every sample needs in training, its answer (or all answers) included, or to be scored over `nodes`.

        With the prefix `cached` no row holds it.
        """
        view = samples if isinstance(samples, SplitView) else None
        text_N = np.minimum(self.text_lengths(samples), self.config.max_text_tokens)
        tokens_N = text_N + self.pseudo_tokens + len(self.suffix)
        if self.config.history:
            tokens_N += [len(self._said(sample)[0]) for sample in samples]
        if nodes is None and self.objective.trie_in_batch is not None:
            nodes = len(self.objective.trie_in_batch.token_N)
        if nodes is None:
            targets = view.targets() if view is not None else [s.target for s in samples]
            longer = np.array([len(target) - 1 for target in self.targets])
            tokens_N += longer[[self.task.answer_index(target) for target in targets]]
        frames = [
            view.frames(name) if view is not None else [_frames(getattr(s, f"{name}_TF")) for s in samples]
            for name in ("audio", "video")
        ]
        read_N3 = np.stack([text_N, *(np.asarray(f, dtype=np.int64) for f in frames)], 1)
        read_N3 *= ["text" in self.modalities, *(name in self.modalities for name in ("audio", "video"))]
        return Sizes(0 if cached else len(self.prefix), tokens_N + (nodes or 0), read_N3)

    def text_lengths(self, samples: SplitView | Sequence[Sample]) -> np.ndarray:
        """`[N]`: tokens of every sample's own text before it is cut to `data.max_text_tokens`; 0 where no text is read."""
        if "text" not in self.modalities:
            return np.zeros(len(samples), dtype=np.int64)
        if self.config.history and self.pieces.drops_ends:
            texts = [self._connected(sample)[-1] for sample in samples]
        else:
            texts = list(samples.texts()) if isinstance(samples, SplitView) else [sample.text for sample in samples]
        return self.counts.of(texts) if isinstance(samples, SplitView) else self.pieces.count(texts)

    def _encode(self, samples: Sequence[Sample], answers: bool, epoch: int | None) -> _Encoded:
        said = [self._said(sample) for sample in samples]
        texts = [text for _, text in said]
        places = [self.end] * self.pseudo_tokens
        one = answers and not self.objective.shared  # the target is one answer, whose tokens are predicted
        chosen = [self.task.answer_index(sample.target) for sample in samples] if one else []
        return _Encoded(
            texts,
            [places + history + text + self.suffix for history, text in said],
            chosen,
            [self.targets[c] for c in chosen] if one else [[] for _ in samples],
            [self._dropped(sample, text, epoch) for sample, text in zip(samples, texts, strict=True)],
            self.objective if answers else Objective(),  # what is scored may have no truth
        )

    def _inputs(self, samples: Sequence[Sample], encoded: _Encoded, groups: Sequence[int]) -> list[FusionInput]:
        out, start = [], 0
        for size in groups:
            chosen = slice(start, start + size) if size else slice(0, 1)
            ids, mask = _pad(encoded.texts[chosen] if size else [[]], least=1)
            dropped = encoded.dropped[chosen] if size else [{"audio", "video"}]
            audio, video = (self._features(name, samples[chosen], dropped) for name in ("audio", "video"))
            out.append(FusionInput(ids, mask, audio, video, dummy=not size))
            start += size
        return out

    def _dropped(self, sample: Sample, text: Sequence[int], epoch: int | None) -> set[str]:
        """The modalities that modality dropout removes. Where a sample has no text, the longest of its streams stays."""
        if epoch is None:
            return set()
        dropped = dropped_modalities(self.config.modality_dropout, self.seed, epoch, sample.id)
        if dropped and not text:
            frames = {name: _frames(getattr(sample, f"{name}_TF")) for name in ("audio", "video")}
            there = [name for name in frames if name in self.modalities and frames[name]]
            if there and dropped.issuperset(there):
                dropped = dropped - {max(there, key=lambda name: frames[name])}
        return dropped

    def _text(self, text: str) -> list[int]:
        tokens = self._tokens.get(text)
        if tokens is None:
            tokens = self._tokens[text] = self.pieces.following(text)[-self.config.max_text_tokens :]
        return tokens

    def forget_texts(self) -> None:
        """Drop the tokens that are kept of every text: of samples that do not come again they would only grow."""
        self._tokens.clear()

    def _connected(self, sample: Sample) -> list[str]:
        """The utterances of a sample's history, and its own text behind them."""
        said = [f"{speaker}: {text}\n" if speaker else f"{text}\n" for speaker, text in sample.history]
        return self.pieces.connected([*said, sample.text if "text" in self.modalities else ""])

    def _said(self, sample: Sample) -> tuple[list[int], list[int]]:
        """The tokens of a sample's history, and those of its own text."""
        *history, text = (self._text(piece) for piece in self._connected(sample))
        return _concatenate(history), text

    def _features(self, name: str, samples: Sequence[Sample], dropped: Sequence[set[str]]) -> Features:
        width, rate = max(self.widths[name], 1), self.rates[name]
        used = name in self.modalities and self.widths[name] > 0
        values = [
            getattr(s, f"{name}_TF") if used and name not in h else None for s, h in zip(samples, dropped, strict=True)
        ]
        longest = max([1, *(len(v) for v in values if v is not None)])
        out = torch.zeros(len(samples), longest, width)
        mask = torch.zeros(len(samples), longest, dtype=torch.bool)
        time = torch.zeros(len(samples), longest)
        frames = np.arange(longest, dtype=np.float32)
        for row, (sample, value) in enumerate(zip(samples, values, strict=True)):
            if value is None or len(value) == 0:
                continue
            if value.shape[1] != width:
                raise ValueError(
                    f"sample {sample.id} of task {self.task.name}: {name} has {value.shape[1]} features a frame, "
                    f"the dataset's record says {width}"
                )
            n = len(value)
            out[row, :n] = torch.from_numpy(np.array(value, dtype=np.float32))
            valid = getattr(sample, f"{name}_mask_T")
            mask[row, :n] = True if valid is None else torch.from_numpy(np.array(valid, dtype=bool))
            time[row, :n] = torch.from_numpy((frames[:n] + 0.5) / (rate if rate else n / NOMINAL_SECONDS))
        return Features(out, mask, time)


def _concatenate(rows: Sequence[Sequence[int]]) -> list[int]:
    return [token for row in rows for token in row]


def _frames(values_TF: np.ndarray | None) -> int:
    return 0 if values_TF is None else len(values_TF)


def _pad(rows: Sequence[Sequence[int]], least: int = 0) -> tuple[Tensor, Tensor]:
    longest = max([least, *map(len, rows)])
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = True
    return ids, mask
