"""Scoring of predictions files: what is read, what is invalid, and every fault in one message."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.answers.metrics import compute
from trainer.answers.score_file import ScoreError, read_predictions, score_predictions
from trainer.tasks import BUILT_IN

MELD, MOSEI, SIMS, CHERMA = (BUILT_IN[name] for name in ("meld", "mosei", "simsv2", "cherma"))
ROWS = [("a", "joy", "joy"), ("b", "anger", "joy"), ("c", "neutral", "Joy"), ("d", "fear", "")]
WANT = compute(MELD, [4, 6, 0, 2], [4, 4, None, None])


def write(path, text: str, encoding: str = "utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def table(rows, delimiter: str = ",") -> str:
    return "\n".join(delimiter.join(row) for row in [("id", "label", "prediction"), *rows]) + "\n"


def faults(task, path) -> str:
    with pytest.raises(ScoreError) as error:
        score_predictions(task, path)
    return str(error.value)


def check(path) -> None:
    got = score_predictions(MELD, path)
    assert got.pop("invalid_examples") == ["Joy", ""]
    assert got == WANT
    assert json.loads(json.dumps(got, allow_nan=False)) == got


def test_the_score_of_a_csv(tmp_path):
    got = score_predictions(MELD, write(tmp_path / "p.csv", table(ROWS)))
    assert list(got)[:5] == ["n", "invalid_rate", "acc", "wf1", "macro_f1"]
    assert (got["n"], got["invalid_rate"], got["acc"]) == (4, 0.5, 0.25)
    check(tmp_path / "p.csv")


def test_ways_to_write_the_same_file(tmp_path):
    text = table(ROWS)
    check(write(tmp_path / "bom.csv", text, "utf-8-sig"))
    check(write(tmp_path / "crlf.csv", text.replace("\n", "\r\n")))
    check(write(tmp_path / "cr.csv", text.replace("\n", "\r")))
    check(write(tmp_path / "no-newline.csv", text.rstrip("\n")))
    check(write(tmp_path / "blank.csv", "\n" + text.replace("\n", "\n\n")))
    check(write(tmp_path / "spaces.csv", text.replace(",", " , ")))
    check(write(tmp_path / "predictions", text))
    check(write(tmp_path / "p.tsv", table(ROWS, "\t")))
    check(
        write(tmp_path / "quoted.csv", "\n".join(",".join(f'"{f}"' for f in line.split(",")) for line in text.split()))
    )
    lines = [json.dumps({"prediction": p or None, "x": [1], "label": a, "id": i}) for i, a, p in ROWS]
    check(write(tmp_path / "p.jsonl", "\n".join(lines)))
    columns = dict(zip(("id", "label", "prediction"), map(list, zip(*ROWS, strict=True)), strict=True))
    columns["prediction"][3] = None
    pq.write_table(pa.table(columns | {"probabilities": [[0.5, 0.5]] * 4}), tmp_path / "p.parquet")
    check(tmp_path / "p.parquet")


def test_further_columns_and_any_order(tmp_path):
    text = 'note,prediction,id,label\n"a, ""b""\nsecond line",joy,a,joy\n,joy,b,anger\n-,Joy,c,neutral\n\x85,,d,fear\n'
    check(write(tmp_path / "p.csv", text))


def test_chinese_labels(tmp_path):
    got = score_predictions(CHERMA, write(tmp_path / "p.csv", table([("一", "愤怒", "愤怒"), ("二", "高兴", "喜悦")])))
    assert (got["acc"], got["invalid_rate"], got["invalid_examples"]) == (0.5, 0.5, ["喜悦"])


def test_any_finite_number_is_a_prediction(tmp_path):
    output = [
        "0.123456789",
        "-7",
        "+.5",
        "1e-3",
        "2.",
        "1E400",
        "nan",
        "inf",
        "",
        "1_0",
        "１.０",
        "one",
        "1,5",
        "0x1",
        "None",
    ]
    rows = [(str(i), "0.5", f'"{text}"') for i, text in enumerate(output)]
    read = read_predictions(MOSEI, write(tmp_path / "p.csv", table(rows)))
    assert read.prediction_N[:5].tolist() == [0.123456789, -7, 0.5, 0.001, 2.0]
    assert np.isnan(read.prediction_N[5:]).all()
    assert read.invalid == output[5:]
    got = score_predictions(MOSEI, tmp_path / "p.csv")
    assert (got["n"], got["invalid_rate"], got["has0_acc"]) == (15, 10 / 15, 4 / 15)


def test_numbers_of_jsonl_and_float32_parquet(tmp_path):
    values = [0.1, -0.1, 0.7, -0.7, 0.4]
    lines = [json.dumps({"id": i, "label": v, "prediction": v}) for i, v in enumerate(values)]
    lines += ['{"id": 7, "label": 1, "prediction": NaN}', '{"id": 8, "label": 1, "prediction": true}']
    lines += ['{"id": 9, "label": 1, "prediction": "0.9"}', '{"id": 10, "label": 1, "prediction": {"a": 1}}']
    got = score_predictions(SIMS, write(tmp_path / "p.jsonl", "\n".join(lines)))
    assert (got["n"], got["invalid_rate"], got["acc5"]) == (9, 3 / 9, 6 / 9)
    single = np.array(values, dtype=np.float32)
    pq.write_table(pa.table({"id": list("abcde"), "label": values, "prediction": single}), tmp_path / "p.parquet")
    got = score_predictions(SIMS, tmp_path / "p.parquet")
    assert got["acc5"] == got["acc3"] == got["weak_acc2"] == 1.0


def test_a_parquet_file_of_several_tasks(tmp_path):
    columns = {
        "task": ["meld", "mosei", "meld"],
        "id": ["a", "a", "b"],
        "label": ["joy", "1.0", "fear"],
        "prediction": ["joy", "2.0", "joy"],
    }
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    assert score_predictions(MELD, tmp_path / "p.parquet")["n"] == 2
    assert score_predictions(MOSEI, tmp_path / "p.parquet")["mae"] == 1.0
    assert "row 0" in faults(SIMS, tmp_path / "p.parquet")  # names no such task: all rows are read


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(allow_nan=False, allow_infinity=False)), min_size=1, max_size=8))
def test_numbers_come_back_as_they_were_written(tmp_path_factory, samples):
    path = tmp_path_factory.mktemp("score") / "p.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "label", "prediction"), *((i, *row) for i, row in enumerate(samples))])
    read = read_predictions(MOSEI, path)
    assert list(zip(read.target_N, read.prediction_N, strict=True)) == samples


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=12), min_size=1, max_size=6))
def test_any_text_is_a_prediction_or_invalid_but_no_fault(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("score") / "p.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(
            [("id", "label", "prediction"), *((i, "joy", text) for i, text in enumerate(texts))]
        )
    read = read_predictions(MELD, path)
    for text, value in zip(texts, read.prediction_N, strict=True):
        word = text.strip()
        assert value == MELD.labels.index(word) if word in MELD.labels else math.isnan(value)


# ---- faults


def test_faults_come_together(tmp_path):
    rows = [("a", "joy", "joy"), ("a", "hapy", "joy"), ("b", "angr", "joy"), ("", "joy", "joy"), ("c", "angr", "x")]
    text = faults(MELD, write(tmp_path / "p.csv", table(rows) + "d,joy\ne,joy,joy,extra\n"))
    assert text.startswith(f"{tmp_path / 'p.csv'}: 5 faults\n")
    assert "not the header's 3 fields" in text
    assert "line 7 has 2, line 8 has 4" in text
    assert "duplicate ids: a (line 2 and line 3)" in text
    assert "without an id: line 5" in text
    assert "the truth 'angr' is not a label of meld; did you mean anger?" in text
    assert "(line 4, line 6)" in text
    assert "the truth 'hapy' is not a label of meld" in text


@pytest.mark.parametrize("label", ["3.2", "-3.001", "nan", "inf", "", "positive", "1e9"])
def test_a_truth_outside_the_range(tmp_path, label):
    text = faults(MOSEI, write(tmp_path / "p.csv", table([("a", label, "0.0"), ("b", "1.0", "0.0")])))
    assert f"the truth {label!r} is not a number from -3 to 3 (line 2)" in text


@pytest.mark.parametrize("label", ["3", "-3.0", "3.0000001", "0.333333", "-0.0", "1e-1"])
def test_a_truth_inside_the_range(tmp_path, label):
    rows = table([("a", label, "0.0")])
    assert read_predictions(MOSEI, write(tmp_path / "p.csv", rows)).target_N.tolist() == [float(label)]


def test_label_numbers_are_not_label_words(tmp_path):
    path = write(tmp_path / "p.csv", table([("a", "4", "4")]))
    assert "the truth '4' is not a label of meld" in faults(MELD, path)
    got = score_predictions(MELD, write(path, table([("a", "joy", "4")])))
    assert (got["invalid_rate"], got["invalid_examples"]) == (1.0, ["4"])


def test_many_unknown_truths_are_counted(tmp_path):
    text = faults(MELD, write(tmp_path / "p.csv", table([(str(i), f"x{i}", "joy") for i in range(10)])))
    assert "7 more truths like these" in text
    assert text.count("\n") == 4


def test_missing_columns_say_what_was_found(tmp_path):
    text = faults(MELD, write(tmp_path / "p.csv", "ID,truth,predicted\n1,joy,joy\n"))
    assert "no column 'id'; is 'ID' meant?" in text
    assert "no column 'label'" in text
    assert "no column 'prediction'; is 'predicted' meant?" in text
    assert "found the columns 'ID', 'truth', 'predicted'; needed: id, label, prediction" in text
    assert "found the columns 'id;label;prediction'" in faults(MELD, write(tmp_path / "p.csv", table(ROWS, ";")))
    twice = write(tmp_path / "p.csv", "id,label,label,prediction\n1,joy,joy,joy\n")
    assert "the column 'label' occurs 2 times" in faults(MELD, twice)
    pq.write_table(pa.table({"id": ["a"], "label": ["joy"]}), tmp_path / "p.parquet")
    assert "no column 'prediction'" in faults(MELD, tmp_path / "p.parquet")


@pytest.mark.parametrize("text", ["", "\n\n", "id,label,prediction\n", "\ufeff"])
def test_a_file_without_rows(tmp_path, text):
    assert "there are no rows" in faults(MELD, write(tmp_path / "p.csv", text))


def test_files_that_cannot_be_read(tmp_path):
    assert "no such file" in faults(MELD, tmp_path / "p.csv")
    assert "is a folder" in faults(MELD, tmp_path)
    text = table([("a", "joy", "joy"), ("b", "joy", "радость")])
    assert "line 3 is not UTF-8, UTF-16 or" in faults(MELD, write(tmp_path / "cyrillic.csv", text, "cp1251"))
    assert "cannot be read" in faults(MELD, write(tmp_path / "p.parquet", "PAR1 and no more"))
    assert "is a quote left open" in faults(MELD, write(tmp_path / "open.csv", table(ROWS) + 'e,joy,"joy\n'))
    assert "a '\\t' in a text" in faults(MELD, write(tmp_path / "p.tsv", table(ROWS, "\t") + "e\tjoy\n"))


def test_jsonl_faults(tmp_path):
    lines = [
        '{"id": 1, "label": "joy", "prediction": "joy"}',
        "[1]",
        '{"id": 2, "label": "joy"',
        '{"id": 3, "label": "joy"}',
    ]
    lines += ['{"id": 4, "prediction": "joy"}', '{"id": ' + "9" * 5000 + "}", "[" * 100000]
    text = faults(MELD, write(tmp_path / "p.jsonl", "\n".join(lines)))
    assert "not a JSON object: line 2, line 3, line 6 and 1 more" in text
    assert "without prediction: line 4" in text
    assert "without label: line 5" in text
