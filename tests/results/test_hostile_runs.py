"""Run folders whose files are bombs: nested, expanding, endless, of another kind. Commands say so or go on, in little memory and time."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed.processes import ROOT, egmf, environment
from tests.results.seeded import make_seeded
from trainer.files import DEEPEST, LARGEST, check_nesting, load_json, load_yaml

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
DEEP = "[" * 100_000
DIGITS = '{"step": ' + "9" * 10_000 + "}\n"
BOMBS = {
    "laughs": ("config.yaml", LAUGHS),
    "laughs after the config": ("config.yaml", None),
    "deep config": ("config.yaml", f"x: {DEEP}"),
    "deep blocks": ("config.yaml", "- " * 100_000 + "x"),
    "deep record": ("run.json", DEEP),
    "deep metrics": ("metrics.json", DEEP),
    "deep journal": ("journal.jsonl", f"{DEEP}\n"),
    "a list as record": ("run.json", "[]"),
    "digits in the record": ("run.json", DIGITS),
    "digits in the metrics": ("metrics.json", DIGITS),
    "digits in the journal": ("journal.jsonl", DIGITS),
    "another kind of predictions": ("predictions/test.parquet", "x"),
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run for each bomb."""
    folder = tmp_path_factory.mktemp("hostile")
    whole = make_seeded(folder / "whole", 1)
    for name, (file, text) in BOMBS.items():
        shutil.copytree(whole, folder / name)
        path = folder / name / file
        path.write_text((whole / file).read_text() + LAUGHS if text is None else text)
    return folder


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))


def test_all_are_listed_in_little_memory(hostile: Path) -> None:
    command = [sys.executable, "-m", "trainer", "runs", str(hostile)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for name in BOMBS:
        assert name in done.stdout


@pytest.mark.parametrize("name", BOMBS)
def test_each_is_shown_or_refused_in_words(hostile: Path, name: str) -> None:
    done = egmf("show", str(hostile / name))
    assert done.returncode in (0, 1)
    assert "Traceback" not in done.stderr
    assert "set_int_max_str_digits" not in done.stdout


def test_comparing_them_names_each_file(hostile: Path) -> None:
    done = egmf("compare", str(hostile))
    assert "Traceback" not in done.stderr
    text = " ".join((done.stdout + done.stderr).split())
    for name in (
        "laughs",
        "deep config",
        "deep blocks",
        "deep record",
        "a list as record",
        "another kind of predictions",
    ):
        assert f"{name}/{BOMBS[name][0]}" in text, name


@pytest.mark.parametrize("signs", ["[", "{a: ", "- ", "? ", "[{a: "])
def test_yaml_is_read_to_its_depth_and_no_deeper(signs: str) -> None:
    close = {"[": "]", "{a: ": "}", "[{a: ": "}]"}.get(signs, "")
    per = 2 if signs == "[{a: " else 1
    for levels in (1, DEEPEST // per):
        text = signs * levels + "x" + close * levels
        if signs != "? ":  # a key that is no plain value
            assert load_yaml(text) == yaml.safe_load(text)
        check_nesting(text)
    with pytest.raises(yaml.YAMLError, match="nested deeper than 100 levels"):
        check_nesting(signs * (DEEPEST + 1) + "x" + close * (DEEPEST + 1))
    for endless in (signs * 10**6, signs * 10**6 + "x"):
        with pytest.raises(yaml.YAMLError):
            load_yaml(endless)


def test_wide_yaml_is_not_deep() -> None:
    wide = "\n".join(f"- {{a: [{i}], b: {{c: [[1]]}}}}" for i in range(2000))
    assert load_yaml(wide) == yaml.safe_load(wide)
    assert load_yaml("a:\n" + " " * 150 + "b: 1") == {"a": {"b": 1}}


def test_json_that_is_too_deep_is_a_value_error() -> None:
    for text in (DEEP, '{"a":' * 100_000):
        with pytest.raises(ValueError, match="nested too deep"):
            load_json(text)


def test_aliases_may_stand_for_much_and_not_for_everything() -> None:
    for text in ("a: &a [1, 2]\nb: [*a, *a]\nc: {<<: {d: 1}}", "a: &x 1\nb: *x"):
        assert load_yaml(text) == yaml.safe_load(text)
    rows = LARGEST // 1000
    check_nesting("a: &a [" + "x," * 900 + "]\nb: [" + "*a," * rows + "]")
    with pytest.raises(yaml.YAMLError, match="larger than 1000000 values"):
        check_nesting("a: &a [" + "x," * 1100 + "]\nb: [" + "*a," * rows + "]")
    with pytest.raises(yaml.YAMLError, match="holds itself"):
        load_yaml("a: &a [1, *a]")
    with pytest.raises(yaml.YAMLError, match="larger than"):
        load_yaml(LAUGHS)
