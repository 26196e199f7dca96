"""Batches: rows token by token, features on the common time axis, answers, missing modalities."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tests.toy import prepare_toy
from trainer.answers.tree import task_tree
from trainer.batch import Sample
from trainer.config import BackboneConfig, DataConfig, TinyConfig
from trainer.data.collate import Collator, prompt_texts
from trainer.data.dataset import open_dataset
from trainer.data.objective import Objective
from trainer.models.backbone.causal_lm import build_tiny, load_tokenizer
from trainer.tasks import BUILT_IN
from trainer.text import count_tokens, encode

WIDTHS = {"audio": 3, "video": 2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    texts = ["Recognise the emotion of the speaker", "判断说话人的情绪", "so happy", *BUILT_IN["meld"].labels] * 4
    build_tiny(TinyConfig(vocab_size=400), texts, folder)
    return load_tokenizer(BackboneConfig(), folder)


def collator(tokenizer: PreTrainedTokenizerBase, task: str = "meld", **more: object) -> Collator:
    arguments: dict[str, object] = {
        "widths": WIDTHS,
        "rates": {"audio": 10.0, "video": 2.0},
        "pseudo_tokens": 4,
        "modalities": ("text", "audio", "video"),
    }
    config = more.pop("config", DataConfig())
    return Collator(BUILT_IN[task], tokenizer, config, **{**arguments, **more})  # type: ignore[arg-type]


def sample(i: int, text: str = "so happy", **more: object) -> Sample:
    rng = np.random.default_rng(i)
    values: dict[str, object] = {
        "audio_TF": rng.normal(size=(5 + i, 3)).astype("f4"),
        "video_TF": rng.normal(size=(2 + i, 2)).astype("f4"),
    }
    return Sample(id=f"s{i}", text=text, target=i % 7, **{**values, **more})  # type: ignore[arg-type]


def test_rows_are_their_pieces_token_by_token(tokenizer: PreTrainedTokenizerBase) -> None:
    collate = collator(tokenizer)
    samples = [sample(0, "so happy"), sample(3, "我 <|endoftext|> very very sad 😀")]
    batch = collate(samples)
    before, after = prompt_texts(BUILT_IN["meld"], DataConfig())
    assert "neutral, surprise, fear, sadness, joy, disgust, anger" in before
    end = tokenizer.eos_token_id
    for b, s in enumerate(samples):
        answer = [*encode(tokenizer, " " + BUILT_IN["meld"].labels[int(s.target)]), end]
        prefix, text, suffix = encode(tokenizer, before), encode(tokenizer, s.text), encode(tokenizer, after)
        row = batch.input_ids_BL[b].tolist()
        assert batch.pseudo_start == len(prefix)
        assert row[: len(prefix)] == prefix
        rest = [*text, *suffix, *answer[:-1]]
        assert row[len(prefix) + 4 :][: len(rest)] == rest
        assert batch.context_length_B[b] == len(prefix) + 4 + len(text) + len(suffix)
        assert batch.answer_ids_BA[b][batch.answer_mask_BA[b]].tolist() == answer
        assert batch.text_ids_BS[b][batch.text_mask_BS[b]].tolist() == text
        assert end not in text
    scoring = collate(samples, answers=False)
    assert scoring.answer_ids_BA.shape == (2, 0)
    assert scoring.input_ids_BL.shape[1] == int(scoring.context_length_B.max())


def test_a_packed_row_is_its_pieces_token_by_token(tokenizer: PreTrainedTokenizerBase) -> None:
    collate = collator(tokenizer)
    samples = [
        sample(0, "so happy"),
        sample(3, "我 <|endoftext|> very very sad 😀", history=[("Ross", "hi")]),
        sample(5, "", audio_TF=None),
    ]
    row = collate.pack(samples, [2, 0, 1])
    before, after = prompt_texts(BUILT_IN["meld"], DataConfig())
    end = tokenizer.eos_token_id
    assert row.prefix_ids_P.tolist() == encode(tokenizer, before)
    own, targets, start = [], [], 0
    for b, s in enumerate(samples):
        answer = [*encode(tokenizer, " " + BUILT_IN["meld"].labels[int(s.target)]), end]
        output = [token for who, what in s.history for token in encode(tokenizer, f"{who}: {what}\n")]
        context = [end] * 4 + output + encode(tokenizer, s.text) + encode(tokenizer, after)
        own += context + answer[:-1]
        assert row.packing.length_B[b] == len(context) + len(answer) - 1
        assert row.place_BK[b].tolist() == [start, start + 1, start + 2, start + 3]
        assert row.cue_at_B[b] == start + len(context) - 1
        targets += [(start + len(context) - 1 + a, token, b, a) for a, token in enumerate(answer)]
        start = len(own)
    assert row.own_ids_T.tolist() == own
    assert (row.packing.prefix, row.packing.total) == (len(row.prefix_ids_P), len(own))
    assert row.packing.longest == int(row.packing.length_B.max())
    slots = [divmod(slot, row.longest_answer) for slot in row.answer_slot_n.tolist()]
    got = zip(row.answer_at_n.tolist(), row.answer_id_n.tolist(), slots, strict=True)
    assert [(at, token, *slot) for at, token, slot in got] == targets
    assert [len(i) for i in row.inputs] == [2, 1, 1]  # the one between is of no use
    assert [i.dummy for i in row.inputs] == [False, True, False]
    assert row.inputs[0].audio.mask_BT.sum(1).tolist() == [5, 8]
    assert row.inputs[1].audio.mask_BT.shape == (1, 1)
    assert row.positions == len(row.prefix_ids_P) + len(own)


def test_a_row_to_be_scored_carries_the_trie(tokenizer: PreTrainedTokenizerBase) -> None:
    collate, trie = (
        collator(tokenizer, "mosei"),
        task_tree(BUILT_IN["mosei"], tokenizer, "words", "en").trie("constrained"),
    )
    samples = [sample(0), sample(1, "well, well")]
    row = collate.pack(samples, trie=trie)
    nodes = trie.token_N.tolist()
    for b, (text, stop) in enumerate(zip(("so happy", "well, well"), row.packing.length_B.cumsum(0), strict=True)):
        own = row.own_ids_T[stop - row.packing.length_B[b] : stop].tolist()
        assert own[-len(nodes) :] == nodes
        assert own[4 : -len(nodes)] == encode(tokenizer, text) + collate.suffix
        assert row.cue_at_B[b] == stop - len(nodes) - 1
    assert len(row.answer_at_n) == 0
    assert row.packing.trie is trie


@pytest.mark.parametrize("history", [0, 2])
@pytest.mark.parametrize("task", ["meld", "mosei"])
def test_sizes_are_those_of_the_batches(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, task: str, history: int
) -> None:
    path = prepare_toy(task, tmp_path)
    view = open_dataset(path, history=history)["train"]
    config = DataConfig(history=history, max_text_tokens=9)
    collate = collator(tokenizer, task, config=config, widths=view.widths)
    trie = task_tree(BUILT_IN[task], tokenizer, "words", "en").trie("constrained")
    samples = list(view)
    for given in (view, samples):
        train, scored = collate.sizes(given), collate.sizes(given, nodes=len(trie.token_N), cached=True)
        assert train.prefix == len(collate.prefix)
        assert scored.prefix == 0
        assert train.tokens_N.tolist() == collate.pack(samples).packing.length_B.tolist()
        assert scored.tokens_N.tolist() == collate.pack(samples, trie=trie).packing.length_B.tolist()
        read = [
            [min(len(encode(tokenizer, s.text)), 9), *(0 if v is None else len(v) for v in (s.audio_TF, s.video_TF))]
            for s in samples
        ]
        assert train.read_N3.tolist() == read
    padded = collate(samples)
    lengths = padded.context_length_B + padded.answer_mask_BA.sum(1) - 1
    assert (train.prefix + train.tokens_N).tolist() == lengths.tolist()


def test_tokens_are_counted_as_they_are_made(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<think>"])
    texts = ["", "so happy", "a <think> b", "<|endoftext|>", "我 😀"]
    assert count_tokens(tokenizer, texts).tolist() == [len(encode(tokenizer, text)) for text in texts]
    assert count_tokens(tokenizer, []).tolist() == []


def test_the_prefix_is_the_same_for_every_sample_and_history_stands_behind_it(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    collate = collator(tokenizer)
    result = sample(1, history=[("Ross", "hi"), ("", "well")])
    batch = collate([sample(0), result], answers=False)
    assert torch.equal(batch.input_ids_BL[0, : batch.pseudo_start], batch.input_ids_BL[1, : batch.pseudo_start])
    history = [*encode(tokenizer, "Ross: hi\n"), *encode(tokenizer, "well\n")]
    start = batch.pseudo_start + 4
    assert batch.input_ids_BL[1, start : start + len(history)].tolist() == history
    assert batch.text_ids_BS[1][batch.text_mask_BS[1]].tolist() == encode(
        tokenizer, "so happy"
    )  # history is no text of its own


def test_time_is_common_to_audio_and_video(tokenizer: PreTrainedTokenizerBase) -> None:
    samples = [sample(0, audio_TF=np.ones((20, 3), "f4"), video_TF=np.ones((4, 2), "f4")), sample(1)]
    known = collator(tokenizer)(samples)
    np.testing.assert_allclose(known.audio.time_BT[0], (np.arange(20) + 0.5) / 10.0, rtol=1e-6)
    np.testing.assert_allclose(known.video.time_BT[0, :4], (np.arange(4) + 0.5) / 2.0, rtol=1e-6)
    for rates in ({"audio": 10.0, "video": None}, {}):  # one unknown: both as fractions of ten seconds
        unknown = collator(tokenizer, rates=rates)(samples)
        np.testing.assert_allclose(unknown.audio.time_BT[0], (np.arange(20) + 0.5) / 2.0, rtol=1e-6)
        np.testing.assert_allclose(unknown.video.time_BT[0, :4], (np.arange(4) + 0.5) * 2.5, rtol=1e-6)


def test_missing_and_repaired_frames_are_masked(tokenizer: PreTrainedTokenizerBase) -> None:
    holes = np.array([True, False, True, True, False, True])
    samples = [sample(0, audio_TF=None), sample(1, audio_mask_T=holes), sample(2, video_TF=None)]
    batch = collator(tokenizer)(samples)
    assert not batch.audio.mask_BT[0].any()
    assert not batch.audio.values_BTF[0].any()
    assert batch.audio.mask_BT[1, :6].tolist() == holes.tolist()
    assert not batch.audio.mask_BT[1, 6:].any()
    assert not batch.video.mask_BT[2].any()
    np.testing.assert_array_equal(batch.video.values_BTF[0, :2], samples[0].video_TF)
    nothing = collator(tokenizer)([sample(0, audio_TF=None, video_TF=None)])
    assert nothing.audio.values_BTF.shape == (1, 1, 3)  # T is at least 1


def test_modalities_that_the_model_does_not_use_are_not_shown(tokenizer: PreTrainedTokenizerBase) -> None:
    text_only = collator(tokenizer, modalities=("text",))([sample(0)])
    assert not text_only.audio.mask_BT.any()
    assert not text_only.video.mask_BT.any()
    no_text = collator(tokenizer, modalities=("audio", "video"))([sample(0), sample(1, "other words entirely")])
    assert not no_text.text_mask_BS.any()
    assert torch.equal(no_text.input_ids_BL[0, :-3], no_text.input_ids_BL[1, :-3])


def test_samples_without_a_truth_are_scored_whatever_the_objective(tokenizer: PreTrainedTokenizerBase) -> None:
    tree = task_tree(BUILT_IN["meld"], tokenizer, "words", "en")
    trie = tree.trie("full")
    collate = collator(tokenizer, objective=Objective(np.arange(7, dtype=np.float32), 0.1, 0.0, tree))
    held = [sample(0), sample(3)]
    assert collate.pack(held).weight_B.tolist() == collate(held).weight_B.tolist() == [0.0, 3.0]
    assert collate.pack(held, weight=0.0).weight_B.tolist() == [0.0, 0.0]
    for one in held:
        one.target = float("nan")
    for batch in (collate.pack(held, trie=trie), collate(held, answers=False)):
        assert batch.weight_B.tolist() == [1.0, 1.0]
        assert batch.choices is None


def test_modality_dropout_never_leaves_a_sample_without_anything(tokenizer: PreTrainedTokenizerBase) -> None:
    """Where there is no text the longest stream stays; where there is, both may go."""
    config = DataConfig(modality_dropout=0.9)
    silent = [sample(i, "", video_TF=None if i % 2 else np.ones((2, 2), "f4")) for i in range(40)]
    both = 0
    for collate, held, texts in (
        (collator(tokenizer, config=config), silent, False),
        (collator(tokenizer, config=config, modalities=("audio", "video")), [sample(i) for i in range(40)], False),
        (collator(tokenizer, config=config), [sample(i) for i in range(40)], True),
    ):
        batch = collate(held, epoch=0)
        row = collate.pack(held, [20, 20], epoch=0)
        left = batch.audio.mask_BT.any(1).int() + batch.video.mask_BT.any(1).int()
        packed = torch.cat([g.audio.mask_BT.any(1).int() + g.video.mask_BT.any(1).int() for g in row.inputs])
        assert torch.equal(left, packed)
        assert bool(batch.text_mask_BS.any()) == texts
        if texts:
            both += int((left == 0).sum())
        else:
            assert left.min() == 1
            assert left.float().mean() < 1.5  # some are hidden
    assert both > 20


def test_modality_dropout_acts_in_training_only(tokenizer: PreTrainedTokenizerBase) -> None:
    collate = collator(tokenizer, config=DataConfig(modality_dropout=0.5), seed=1)
    samples = [sample(i) for i in range(40)]
    shown = collate(samples).audio.mask_BT.any(1)
    assert shown.all()
    first, again, later = (collate(samples, epoch=e).audio.mask_BT.any(1) for e in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert 0 < int(first.sum()) < 40


def test_answers_as_numbers_and_indices(tokenizer: PreTrainedTokenizerBase) -> None:
    numbers = collator(tokenizer, "mosei")
    assert numbers.answers[0][:-1] == encode(tokenizer, " -3.0")
    batch = numbers([sample(0, audio_TF=None, video_TF=None)])
    assert batch.answer_ids_BA[0].tolist() == [*encode(tokenizer, " 0.0"), tokenizer.eos_token_id]
    indices = collator(tokenizer, config=DataConfig(answers="indices"))
    assert indices.answers[4][:-1] == encode(tokenizer, " 4")
    chinese = collator(tokenizer, "cherma")
    assert chinese.answers[0][:-1] == encode(tokenizer, "愤怒")


def test_long_texts_keep_their_end_and_wrong_widths_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    collate = collator(tokenizer, config=DataConfig(max_text_tokens=3))
    text = "one two three four five six"
    batch = collate([sample(0, text)])
    assert batch.text_ids_BS[0].tolist() == encode(tokenizer, text)[-3:]
    with pytest.raises(ValueError, match="s1 of task meld: audio has 7 features a frame, the dataset's record says 3"):
        collate([sample(0), sample(1, audio_TF=np.zeros((2, 7), "f4"))])


def test_the_offline_tokenizer_is_in_standard_form(tokenizer: PreTrainedTokenizerBase) -> None:
    held = json.loads((Path(tokenizer.name_or_path) / "tokenizer.json").read_text(encoding="utf-8"))
    assert held["model"]["type"] == "BPE"
