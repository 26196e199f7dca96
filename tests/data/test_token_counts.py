"""Kept counts of tokens: equal to counting each text alone, never those of another tokenizer or other texts, and no fault where they cannot be kept."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from tests.tokenizers import byte_level, llama2
from tests.toy import prepare_toy
from trainer.config import DataConfig
from trainer.data import token_counts
from trainer.data.collate import Collator
from trainer.data.dataset import open_dataset
from trainer.data.token_counts import FOLDER, LEAST, TokenCounts
from trainer.tasks import BUILT_IN
from trainer.text import Pieces

TEXTS = [f"speaker {i % 7}: so {'very ' * (i % 5)}happy {i}" for i in range(LEAST + 5)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_level()


class Counting(Pieces):
    """Notes how many texts it counted."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, joining: str = "running") -> None:
        super().__init__(tokenizer, joining)  # type: ignore[arg-type]
        self.counted = 0

    def count(self, texts):  # type: ignore[no-untyped-def]
        self.counted += len(texts)
        return super().count(texts)


def one_by_one(pieces: Pieces, texts: list[str]) -> list[int]:
    return [len(pieces.following(text)) for text in texts]


def files(folder: Path) -> list[Path]:
    return sorted((folder / FOLDER).glob("*"))


@pytest.mark.parametrize("make", [byte_level, llama2])
def test_counts_are_those_of_each_text_alone_and_are_kept_for_later_runs(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    first, second = Counting(make()), Counting(make())
    expected = one_by_one(first, TEXTS)
    counts = TokenCounts(first, tmp_path)
    assert counts.of(TEXTS).tolist() == expected
    assert counts.of(list(TEXTS)).tolist() == expected
    assert first.counted == len(TEXTS)
    assert [path.suffix for path in files(tmp_path)] == [".npy"]
    later = TokenCounts(second, tmp_path)
    assert later.of(TEXTS).tolist() == expected
    assert later.of(TEXTS).dtype == np.int64
    assert second.counted == 0


def test_other_texts_another_tokenizer_or_joining_are_counted_anew(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    TokenCounts(Counting(tokenizer), tmp_path).of(TEXTS)
    changed = [*TEXTS[:-1], TEXTS[-1] + "!!"]
    moved = [TEXTS[0] + TEXTS[1], "", *TEXTS[2:]]  # the same characters, other borders
    for texts in (changed, moved, TEXTS[::-1], TEXTS[:-1]):
        again = Counting(tokenizer)
        assert TokenCounts(again, tmp_path).of(texts).tolist() == one_by_one(again, texts)
        assert again.counted == len(texts)
    grown = byte_level()
    grown.add_tokens(["happy"])
    for pieces in (Counting(llama2()), Counting(llama2(), "apart"), Counting(grown), Counting(byte_level(prefix=True))):
        assert TokenCounts(pieces, tmp_path).of(TEXTS).tolist() == one_by_one(pieces, TEXTS)
        assert pieces.counted == len(TEXTS)


def test_another_version_counts_anew(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    TokenCounts(Counting(tokenizer), tmp_path).of(TEXTS)
    monkeypatch.setattr(token_counts.importlib.metadata, "version", lambda name: "0.0")
    again = Counting(tokenizer)
    TokenCounts(again, tmp_path).of(TEXTS)
    assert again.counted == len(TEXTS)


@pytest.mark.parametrize(
    "damage", ["empty", "cut", "text", "other type", "other length", "negative", "pickle", "folder"]
)
def test_a_damaged_file_is_left_out_and_replaced(tokenizer, tmp_path: Path, damage: str) -> None:  # type: ignore[no-untyped-def]
    expected = TokenCounts(Counting(tokenizer), tmp_path).of(TEXTS).tolist()
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage in ("empty", "cut", "text", "pickle"):
        content = {"empty": b"", "cut": whole[:-7], "text": b"a note", "pickle": pickle.dumps(expected)}
        path.write_bytes(content[damage])
    else:
        values = {
            "other type": np.ones(len(TEXTS)),
            "other length": np.ones(3, "<i4"),
            "negative": -np.ones(len(TEXTS), "<i4"),
        }
        np.save(path, values[damage])
    again = Counting(tokenizer)
    assert TokenCounts(again, tmp_path).of(TEXTS).tolist() == expected
    assert again.counted == len(TEXTS)
    assert [found.name for found in files(tmp_path)] == [path.name]  # nothing temporary is left
    assert damage == "folder" or path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_only_the_counting(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    expected = one_by_one(Pieces(tokenizer), TEXTS)
    absent = Counting(tokenizer)
    assert TokenCounts(absent, tmp_path / "no" / "such").of(TEXTS).tolist() == expected
    (tmp_path / FOLDER).write_text("a file")
    assert TokenCounts(Counting(tokenizer), tmp_path).of(TEXTS).tolist() == expected
    if os.access("/proc/1", os.R_OK):  # nobody writes there, root neither
        assert TokenCounts(Counting(tokenizer), Path("/proc/1")).of(TEXTS).tolist() == expected


def test_a_tokenizer_that_cannot_be_written_out_and_few_texts_are_not_kept(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    TokenCounts(Counting(tokenizer), tmp_path).of(TEXTS[: LEAST - 1])
    pieces = Counting(tokenizer)
    pieces.tokenizer = SimpleNamespace(backend_tokenizer=None)  # type: ignore[assignment]
    counts = TokenCounts(pieces, tmp_path)
    assert counts._tokenizer is None
    assert not files(tmp_path)


def test_many_at_once_write_one_whole_file(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    expected = one_by_one(Pieces(tokenizer), TEXTS)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: TokenCounts(Pieces(tokenizer), tmp_path).of(TEXTS).tolist(), range(24)))
    assert found == [expected] * 24
    assert len(files(tmp_path)) == 1


def test_a_collator_counts_a_split_once_and_finds_the_counts_again(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # type: ignore[no-untyped-def]
) -> None:  # fmt: skip
    monkeypatch.setattr(token_counts, "LEAST", 1)
    folder = prepare_toy("meld", tmp_path)

    def collate() -> Collator:
        made = Collator(
            BUILT_IN["meld"], tokenizer, DataConfig(), widths={}, rates={}, pseudo_tokens=2, modalities=("text",), dataset=folder
        )  # fmt: skip
        made.counts.pieces = Counting(tokenizer)
        return made

    view = open_dataset(folder)["train"]
    first, second = collate(), collate()
    sizes = first.sizes(view, nodes=0)
    assert first.counts.pieces.counted == len(view)  # type: ignore[attr-defined]
    assert sizes.tokens_N.tolist() == first.sizes(list(view), nodes=0).tokens_N.tolist()  # samples, not kept
    first.text_lengths(view)
    assert first.counts.pieces.counted == len(view)  # type: ignore[attr-defined]
    assert second.text_lengths(view).tolist() == one_by_one(Pieces(tokenizer), list(view.texts()))
    assert second.counts.pieces.counted == 0  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(first)).text_lengths(view).tolist() == second.text_lengths(view).tolist()
