"""Alignment: against brute force on small listings, and on MELD's real annotations with made-up features."""

from __future__ import annotations

import itertools
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trainer.data.readers.align import AlignmentError, Key, _Scores, align, normalise
from trainer.data.readers.raw import RawSample, ReaderError
from trainer.data.readers.source import open_source
from trainer.tasks import get_task

MELD = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "meld"
needs_meld = pytest.mark.skipif(not MELD.is_dir(), reason="MELD's annotations are not in ../shared/data/meld")
PAIR = 1 << 20


def brute_force(left: list[Key], right: list[Key]) -> tuple[int, set[tuple[int, int]]]:
    """The best alignment's size and the union of all best ones, by looking at every alignment there is."""

    def score(i: int, j: int) -> int:
        if left[i] == right[j]:
            return PAIR + 2
        return PAIR + 1 if (normalise(left[i][0]), left[i][1]) == (normalise(right[j][0]), right[j][1]) else 0

    best: dict[int, set[tuple[int, int]]] = {0: set()}
    for k in range(1, min(len(left), len(right)) + 1):
        for rows in itertools.combinations(range(len(left)), k):
            for others in itertools.combinations(range(len(right)), k):
                pairs = list(zip(rows, others, strict=True))
                scores = [score(i, j) for i, j in pairs]
                if all(scores):
                    best.setdefault(sum(scores), set()).update(pairs)
    return max(best) // PAIR, best[max(best)]


def test_best_pairs_equal_brute_force() -> None:
    draw = random.Random(7)
    words = [("No", "a"), ("no!", "a"), ("No", "b"), ("x", "a"), ("y", "a")]
    ambiguous = 0
    for _ in range(150):
        left, right = ([draw.choice(words) for _ in range(draw.randint(1, 6))] for _ in range(2))
        count, pairs = _Scores(left, right, slack=6).best_pairs()
        expected, union = brute_force(left, right)
        assert (count, set(pairs)) == (expected, union), (left, right)
        ambiguous += len(union) > expected
    assert 20 < ambiguous < 130


def rows_of(n: int) -> list[Key]:
    return [(f"utterance {i} of the talk", "joy" if i % 3 else "anger") for i in range(n)]


def test_equal_listings_align_row_by_row() -> None:
    rows = [("Yes.", "joy")] * 30 + rows_of(70)
    assert align(rows, rows).pairs == [(i, i) for i in range(100)]
    assert align([], []).pairs == []


def test_rows_on_one_side_only_stay_in_their_place() -> None:
    rows = rows_of(200)
    right = [*rows[:50], *rows[51:120], ("only here", "joy"), *rows[120:]]
    alignment = align(rows, right)
    assert alignment.left_only == [50]
    assert alignment.right_only == [119]
    assert alignment.pairs[49:52] == [(49, 49), (50, None), (51, 50)]
    assert alignment.pairs[119:123] == [(119, 118), (None, 119), (120, 120), (121, 121)]


def test_a_changed_label_is_a_row_on_each_side() -> None:
    rows = rows_of(100)
    right = [*rows[:9], (rows[9][0], "fear"), *rows[10:]]
    assert align(rows, right).pairs[9:11] == [(9, None), (None, 9)]


@pytest.mark.parametrize("at", [0, 99])
def test_a_row_may_lack_at_either_end(at: int) -> None:
    rows = rows_of(100)
    assert align(rows, rows[:at] + rows[at + 1 :]).left_only == [at]
    assert align(rows[:at] + rows[at + 1 :], rows).right_only == [at]


def test_an_ambiguous_run_is_refused() -> None:
    rows = [*rows_of(60), ("No.", "anger"), ("No.", "anger"), *rows_of(60)]
    with pytest.raises(
        AlignmentError, match=r"ambiguous run: feature row 60 'No.' \[anger\] fits annotation rows 60 .*61 "
    ):
        align(rows, rows[:60] + rows[61:])
    with pytest.raises(
        AlignmentError, match=r"ambiguous run: annotation row 60 'No.' \[anger\] fits feature rows 60 .*61 "
    ):
        align(rows[:60] + rows[61:], rows)


def test_literal_equality_settles_what_normalisation_confuses() -> None:
    rows = [*rows_of(60), ("No!", "anger"), ("No.", "anger"), *rows_of(60)]
    assert align(rows, rows[:60] + rows[61:]).left_only == [60]
    assert align(rows, rows[:61] + rows[62:]).left_only == [61]


def test_under_98_percent_is_refused_with_the_first_mismatch() -> None:
    rows = rows_of(100)
    assert len(align(rows, rows[2:]).left_only) == 2
    with pytest.raises(AlignmentError, match=r"98%.*first mismatch: row 0, 'utterance 0 of.* against 'utterance 3 of"):
        align(rows, rows[3:])
    with pytest.raises(AlignmentError, match=r"first mismatch: row 97, 'utterance 97.* against no row"):
        align(rows, rows[:97])
    wrong = [(text, "fear") if i in (40, 50, 60) else (text, label) for i, (text, label) in enumerate(rows)]
    with pytest.raises(
        AlignmentError, match=r"only 0 of 100|only 97 of 100.*first mismatch: row 40, .*\[joy\] against .*\[fear\]"
    ):
        align(rows, wrong)
    with pytest.raises(AlignmentError, match="no row"):
        align(rows, [])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("You’re right, I don’t know…", "you 're right , i do n't know ..."),
        ("You’re", "Youâ€™re"),
        ("You’re", "You\x92re"),
        ("Café, José!", "cafe jose"),
        ("Okay.", "OKAY !"),
        ("ＡＢＣ１２", "abc12"),
        ("你好，世界", "你好世界"),
    ],
)
def test_normalise(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


def test_normalise_keeps_texts_apart() -> None:
    assert normalise("!") == "!"
    assert len({normalise(t) for t in ("!", "?", "no", "yes", "")}) == 5


def test_cut_texts_align_and_short_ones_do_not_count_as_cut() -> None:
    rows = [*rows_of(100), ("No, that is not what I said to her", "anger"), *rows_of(100)]
    cut = [(text[:13], label) for text, label in rows]
    assert len(align(rows, cut).pairs) == 201
    assert align(rows, cut[:100] + cut[101:]).left_only == [100]
    alignment = align(rows, [*rows[:100], ("No", "anger"), *rows[101:]])
    assert (alignment.left_only, alignment.right_only) == ([100], [100])


# ── the real annotations ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def annotations() -> list[RawSample]:
    return list(open_source(get_task("meld"), [MELD / "train_sent_emo.csv"]).samples("train"))


def place(row: RawSample) -> float:
    """A number of its own for each annotation."""
    return 100.0 * int(row.dialogue or 0) + (row.turn or 0)


def write_features(path: Path, rows: list[RawSample], text: Callable[[str], str]) -> None:
    """A pickle like the published one; a row's audio holds its place, so that pairs can be proved."""
    samples = [
        {
            "features": {
                "text": text(row.text or ""),
                "audio": np.full((2, 3), place(row), dtype=np.float32),
                "video": np.zeros((1, 2), dtype=np.float32),
                "audio_len": 2,
                "video_len": 1,
            },
            "label": row.label,
        }
        for row in rows
    ]
    path.write_bytes(pickle.dumps(samples, 4))


def joined(
    tmp_path: Path, rows: list[RawSample], text: Callable[[str], str] = str
) -> tuple[list[RawSample], list[str]]:
    write_features(tmp_path / "meld_train.pkl", rows, text)
    source = open_source(get_task("meld"), [tmp_path / "meld_train.pkl", MELD / "train_sent_emo.csv"])
    return list(source.samples("train")), source.notes


def check_pairs(found: list[RawSample], annotations: list[RawSample], missing: set[int]) -> None:
    """Every annotation is there in order with its own features, but for the missing ones."""
    assert [row.id for row in found] == [row.id for row in annotations]
    for at, (row, annotation) in enumerate(zip(found, annotations, strict=True)):
        assert (row.text, row.speaker, row.dialogue) == (annotation.text, annotation.speaker, annotation.dialogue)
        if at in missing:
            assert row.audio is None
            assert row.video is None
        else:
            assert row.audio is not None
            assert row.audio[0, 0] == place(annotation)
            assert (row.audio_length, row.video_length) == (2, 1)


@needs_meld
def test_meld_complete(tmp_path: Path, annotations: list[RawSample]) -> None:
    found, notes = joined(tmp_path, annotations)
    check_pairs(found, annotations, set())
    assert notes == []


def words(text: str) -> str:
    """Cut to eight words and tokenised, as feature extractors leave texts."""
    return " ".join(text.lower().replace("’", " '").replace(",", " ,").replace("!", " !").split()[:8])


@needs_meld
@pytest.mark.parametrize("text", [str, lambda t: t[:20], words], ids=["whole", "20 letters", "8 words"])
def test_meld_with_missing_rows(tmp_path: Path, annotations: list[RawSample], text: Callable[[str], str]) -> None:
    missing = {0, 500, 777, 9988}
    found, notes = joined(tmp_path, [row for i, row in enumerate(annotations) if i not in missing], text)
    check_pairs(found, annotations, missing)
    assert len(notes) == 1
    assert "4 row(s) without features" in notes[0]
    assert "train_sent_emo.csv line 502 " in notes[0]


@needs_meld
def test_meld_never_pairs_wrongly(annotations: list[RawSample]) -> None:
    """Rows missing at random, many among repeated utterances: aligned rightly, or refused as ambiguous."""
    keys = [(row.text or "", str(row.label)) for row in annotations][:2500]
    repeated = [i for i in range(1, 2500) if normalise(keys[i][0]) == normalise(keys[i - 1][0])]
    draw, refused = random.Random(3), 0
    for trial in range(12):
        missing = set(draw.sample(range(2500), 3)) | ({draw.choice(repeated)} if trial % 2 else set())
        kept = [i for i in range(2500) if i not in missing]
        try:
            pairs = align(keys, [keys[i] for i in kept]).pairs
        except AlignmentError as error:
            refused += "ambiguous run" in str(error)
        else:
            assert [i for i, j in pairs if j is not None] == kept
    assert 0 < refused < 12


@needs_meld
def test_meld_shuffled(tmp_path: Path, annotations: list[RawSample]) -> None:
    rows = list(annotations)
    random.Random(0).shuffle(rows)
    with pytest.raises(
        ReaderError, match=r"of 9,989 rows align in order.*first mismatch: row 0, 'also I was the point"
    ):
        joined(tmp_path, rows)
