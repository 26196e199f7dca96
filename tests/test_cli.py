"""The command line: help, JSON alone on stdout, faults in words with the right exit codes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.main import get_command

from tests.distributed.processes import egmf
from tests.toy import prepare_toy
from trainer.cli import app
from trainer.commands.options import default_out, option_groups

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("train",),
        ("sweep",),
        ("reproduce",),
        ("evaluate",),
        ("predict",),
        ("prepare",),
        ("score",),
        ("report",),
        ("compare",),
        ("show",),
        ("runs",),
        ("demo",),
        ("doctor",),
        ("data", "show"),
        ("config", "list"),
        ("config", "show"),
        ("config", "check"),
        ("launch", "local"),
    ],
    ids=" ".join,
)
def test_every_command_explains_itself(words: tuple[str, ...]) -> None:
    done = egmf(*words, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: egmf" in done.stdout
    assert len(done.stdout.splitlines()) > 6


def test_usage_faults_exit_2_and_name_the_word() -> None:
    for words in (("trian",), ("train",), ("score", "x.csv"), ("launch", "local", "--procs", "0", "c.yaml")):
        done = egmf(*words)
        assert done.returncode == 2, (words, done.stderr)
        assert "Traceback" not in done.stderr
        assert done.stderr


def test_faults_are_one_message_and_exit_1(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("task: meld\ntrain: {zero: 7, sed: 1}\n")
    cases = {
        ("config", "check", str(tmp_path / "bad.yaml")): ("train.zero", "did you mean seed?"),
        ("config", "check", f"{ROOT}/configs/meld.yml"): ("did you mean meld.yaml?",),
        ("train", f"{ROOT}/configs/tiny.yaml", "task=meldd"): ("did you mean meld?",),
        ("train", f"{ROOT}/configs/tiny.yaml", f"data.path={tmp_path}/none", "--out", str(tmp_path / "r")): (
            "egmf prepare",
        ),
        ("evaluate", str(tmp_path)): ("is not a run folder",),
        ("predict", str(tmp_path), "--input", "none.jsonl", "--out", "-"): ("is not a run folder",),
        ("prepare", "meld", "--out", str(tmp_path / "d")): ("--source",),
        ("prepare", "diagnostic", "--out", str(tmp_path / "d"), "--size", "train=x"): ("SPLIT=N",),
        ("score", "--task", "meld", str(tmp_path / "none.csv")): ("none.csv",),
        ("data", "show", str(tmp_path)): ("not a prepared dataset",),
    }
    for words, expected in cases.items():
        done = egmf(*words)
        assert done.returncode == 1, (words, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, (words, done.stderr)
        assert not done.stdout
        for text in expected:
            assert text in done.stderr, (words, done.stderr)


def test_json_is_alone_on_stdout(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("id,label,prediction\na,joy,joy\nb,anger,neutral\nc,fear,rage\n", encoding="utf-8")
    done = egmf("score", "--task", "meld", str(tmp_path / "p.csv"), "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert (scores["n"], scores["invalid_rate"], scores["acc"]) == (3, pytest.approx(1 / 3), pytest.approx(1 / 3))
    folder = prepare_toy("simsv2", tmp_path)
    summary = egmf("data", "show", str(folder), "--json")
    assert json.loads(summary.stdout)["train"]["n"] == 48
    table = egmf("data", "show", str(folder))
    assert "48" in table.stdout
    assert "…" not in table.stdout


@pytest.mark.slow
def test_a_run_can_be_evaluated_again_alone_and_with_other_settings(tmp_path: Path) -> None:
    folder = prepare_toy("simsv2", tmp_path)
    small = (
        "train.steps=3",
        "model.backbone.tiny.vocab_size=400",
        "train.global_batch=8",
        "train.micro_batch=4",
        "track.mlflow=false",
        "track.report=false",
    )
    run = tmp_path / "run"
    done = egmf("train", f"{ROOT}/configs/tiny.yaml", "task=simsv2", f"data.path={folder}", *small, "--out", str(run))
    assert done.returncode == 0, done.stderr
    assert "acc2" in done.stdout
    written = json.loads((run / "metrics.json").read_text())["test"]["simsv2"]
    again = egmf(
        "evaluate", str(run), "--split", "test", "--json", "eval.batch=3", "--predictions", str(tmp_path / "p.parquet")
    )
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert found.keys() == written.keys()
    assert {"n", "invalid_rate", "acc2", "acc3", "acc5", "f1", "weak_acc2", "mae", "corr", "r2"} <= found.keys()
    for key, value in written.items():
        assert found[key] == (value if value is None else pytest.approx(value, abs=1e-5)), key
    scored = egmf("score", "--task", "simsv2", str(tmp_path / "p.parquet"), "--json")
    assert json.loads(scored.stdout)["mae"] == pytest.approx(found["mae"], abs=1e-9)
    mode = egmf("evaluate", str(run), "--json", "eval.prediction=mode")
    assert json.loads(mode.stdout)["mae"] != found["mae"]
    free = egmf("evaluate", str(run), "--json", "eval.mode=generate")
    scores = json.loads(free.stdout)
    assert scores["invalid_rate"] > 0.0
    answers = egmf("evaluate", str(run), "--json", "eval.mode=generate", "eval.generation=constrained")
    assert json.loads(answers.stdout)["invalid_rate"] == 0.0
    full = egmf("evaluate", str(run), "--json", "eval.score=full")
    assert json.loads(full.stdout)["mae"] != pytest.approx(found["mae"], abs=1e-6)
    wrong = egmf("evaluate", str(run), "--split", "tset")
    assert wrong.returncode == 1
    assert "did you mean test" in wrong.stderr
    (run / "backbone" / "model.safetensors").write_bytes(
        (run / "backbone" / "model.safetensors").read_bytes()[:-4] + b"\1\2\3\4"
    )
    other = egmf("evaluate", str(run))
    assert other.returncode == 1
    assert "another frozen backbone" in other.stderr


@pytest.mark.parametrize(
    ("words", "sources", "drop_bad"),
    [
        ("meld --source a b --strict --source c --out d", ["a", "b", "c"], "none"),
        ("meld --out d --drop-bad --source a b", ["a", "b"], "train"),
        ("meld --out d --source=a --drop-bad=all", ["a"], "all"),
        ("--source a meld --drop-bad --out d", ["a"], "train"),
        ("--drop-bad meld --out d", [], "train"),
    ],
)
def test_prepare_takes_several_sources_and_drop_bad_with_or_without_a_value(
    words: str, sources: list[str], drop_bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parsed(*, source: list[Path] | None, drop_bad: str, **others: object) -> dict[str, object]:
        return {"source": list(map(str, source or [])), "drop_bad": drop_bad, **others}

    command = get_command(app).commands["prepare"]  # type: ignore[attr-defined]
    monkeypatch.setattr(command, "callback", parsed)
    found = command.main(words.split(), standalone_mode=False)
    assert (found["source"], found["drop_bad"]) == (sources, drop_bad)
    assert (found["name"], found["out"]) == ("meld", Path("d"))


def test_several_sources_belong_to_the_option_alone() -> None:
    for words in (("meld", "a", "--out", "d"), ("meld", "--strict", "a", "--out", "d"), ("meld", "--out", "d", "a")):
        done = egmf("prepare", *words)
        assert done.returncode == 2, (words, done.stderr)
        assert "unexpected extra argument" in done.stderr


def test_the_deepspeed_launchers_rank_is_taken_before_the_command(tmp_path: Path) -> None:
    done = egmf("--local_rank=3", "score", "--task", "meld", str(tmp_path / "none.csv"))
    assert done.returncode == 1
    assert "none.csv" in done.stderr
    assert "local_rank" not in egmf("--help").stdout


def test_the_name_of_a_run_folder_is_its_config_and_seed() -> None:
    assert default_out(Path("configs/meld.yaml"), 3) == Path("runs/meld-s3")


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option(min=1)] = 2
    tags: Annotated[list[str] | None, typer.Option()] = None


def test_a_dataclass_parameter_becomes_one_option_for_each_field() -> None:
    found = []
    small = typer.Typer()

    @small.command()
    @option_groups
    def measure(name: str, size: Size, force: bool = False) -> None:
        """Measure it."""
        found.append((name, size, force))

    command = get_command(small)
    command.main(["a", "--width", "5", "--tags", "x", "--tags", "y", "--force"], standalone_mode=False)
    command.main(["b"], standalone_mode=False)
    assert [(name, size.width, list(size.tags or ()), force) for name, size, force in found] == [
        ("a", 5, ["x", "y"], True),
        ("b", 2, [], False),
    ]
    with pytest.raises(typer.BadParameter):
        command.main(["c", "--width", "0"], standalone_mode=False)


def test_control_characters_of_files_do_not_reach_the_terminal(tmp_path: Path) -> None:
    line = {"text": "a", "label": "\x1b]0;owned\x07\x1b[31mjoy\u202e", "split": "train", "id": "x\x1b[2J"}
    (tmp_path / "own.jsonl").write_text(json.dumps(line) + "\n")
    done = egmf("prepare", "meld", "--source", str(tmp_path / "own.jsonl"), "--out", str(tmp_path / "data"))
    assert done.returncode == 1
    assert "\\x1b[31mjoy" in done.stderr.replace("\\\\", "\\")
    assert not set(done.stderr + done.stdout) & set("\x1b\x07\u202e")
