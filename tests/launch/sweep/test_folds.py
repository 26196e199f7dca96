"""Sweeps over the folds of a cross-validation: which runs they make, what they refuse, and a real one that is compared."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from launch.sweep.folds import chosen_folds
from launch.sweep.grid import expand
from launch.sweep.record import open_record, write_record
from launch.sweep.sweep import Sweep
from tests.data.test_folds import SESSIONS, lines, write
from tests.distributed.processes import ROOT, egmf
from tests.toy import prepare_toy
from trainer.commands.arity import command_class
from trainer.data.preparation.prepare import prepare
from trainer.tasks import get_task

TINY = ROOT / "configs" / "tiny.yaml"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config on a dataset of three folds."""
    folder = tmp_path_factory.mktemp("folds")
    prepare(get_task("meld"), [write(folder / "own.jsonl", lines())], folder / "meld")
    path = folder / "toy.yaml"
    path.write_text(
        f"""
extends: {TINY}
task: meld
data: {{path: "{folder}/{{task}}"}}
model: {{backbone: {{tiny: {{vocab_size: 400}}}}}}
train: {{steps: 2, global_batch: 12, micro_batch: 6, probe: false}}
track: {{system_metrics: false, report: false, mlflow: false}}
"""
    )
    return path


def test_each_fold_of_each_variant_is_a_run_of_its_own(config: Path, tmp_path: Path) -> None:
    variants = expand(config, [], ["model.fusion.width=64,128"])
    folds = chosen_folds("all", variants)
    assert folds == SESSIONS
    children = Sweep(tmp_path, variants, (1, 2), folds).children()
    assert len({child.out for child in children}) == 12
    assert [child.name for child in children[:3]] == [
        "width=64,fold=Ses1-s1",
        "width=128,fold=Ses1-s1",
        "width=64,fold=Ses2-s1",
    ]
    assert {(child.fold, child.config.data.fold) for child in children} == {(name, name) for name in SESSIONS}
    alone = Sweep(tmp_path, expand(config, [], []), (1,), chosen_folds("1,Ses10", variants))
    assert [child.name for child in alone.children()] == ["fold=Ses1-s1", "fold=Ses10-s1"]
    assert alone.plan()["folds"] == ["Ses1", "Ses10"]
    assert [child.name for child in Sweep(tmp_path, expand(config, [], []), (1,), ("a b", "a_b")).children()] == [
        "fold=1-s1",
        "fold=2-s1",
    ]
    write_record(alone, open_record(alone))
    with pytest.raises(ValueError, match="folds: there Ses1, Ses10, now Ses1, Ses2, Ses10"):
        open_record(Sweep(tmp_path, expand(config, [], []), (1,), folds))
    assert "folds" not in Sweep(tmp_path, variants, (1,)).plan()


def test_what_is_refused(config: Path, tmp_path: Path) -> None:
    variants = expand(config, [], [])
    with pytest.raises(
        ValueError, match=r"no fold '4': the folds are Ses1, Ses2, Ses10, or a number.*\n.*names a fold twice"
    ):
        chosen_folds("4,1,Ses1", variants)
    with pytest.raises(ValueError, match=r"data\.fold=2 and --folds name the fold twice"):
        chosen_folds("all", expand(config, ["data.fold=2"], []))
    with pytest.raises(ValueError, match="add --folds"):
        chosen_folds(None, variants)
    assert chosen_folds(None, expand(config, [], ["data.fold=1,2"])) == ()
    whole = prepare_toy("meld", tmp_path)
    both = expand(config, [], [f"data.path={whole},{tmp_path}/gone"])
    with pytest.raises(ValueError, match=r"prepared without folds.*--fold-column[\s\S]*gone is not a prepared dataset"):
        chosen_folds("all", both)
    assert chosen_folds(None, both) == ()


def test_the_option_takes_the_next_word_where_it_is_a_value() -> None:
    command = command_class(following={"--folds": "all"})("sweep", callback=lambda: None)

    def words(*args: str) -> list[str]:
        context = command.make_context("sweep", [], resilient_parsing=True)
        context.allow_extra_args = context.ignore_unknown_options = True
        command.parse_args(context, list(args))
        return context.args

    assert words("c", "--folds", "1,3", "a.b=1") == ["c", "--folds=1,3", "a.b=1"]
    assert words("c", "a.b=1", "--folds") == ["c", "a.b=1", "--folds=all"]
    assert words("c", "--folds", "a.b=1") == ["c", "--folds=all", "a.b=1"]
    assert words("c", "--folds", "--out", "x") == ["c", "--folds=all", "--out", "x"]
    assert words("--folds", "c") == ["--folds=all", "c"]
    assert words("c", "--folds=2") == ["c", "--folds=2"]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_sweep_over_folds_tests_every_sample_once(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    dry = egmf("sweep", str(config), "--folds", "--dry-run", "--out", str(out))
    assert dry.returncode == 0, dry.stderr
    assert all(f"data.fold={name}" in dry.stdout for name in SESSIONS)
    done = egmf("sweep", str(config), "--folds", "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    assert [run["fold"] for run in json.loads(done.stdout)["runs"]] == list(SESSIONS)
    tables = [pd.read_parquet(out / f"fold={name}-s0" / "predictions" / "test.parquet") for name in SESSIONS]
    assert sorted(pd.concat(tables)["id"]) == [row["id"] for row in lines()]
    record = json.loads((out / "fold=Ses2-s0" / "run.json").read_text())
    assert record["fold"] == {"name": "Ses2", "names": list(SESSIONS), "train": 20, "test": 20}
    other = egmf("evaluate", str(out / "fold=Ses2-s0"), "data.fold=Ses1")
    assert other.returncode == 1
    assert "was trained to test fold Ses2" in other.stderr
    continued = egmf("train", str(config), "--out", str(out / "fold=Ses2-s0"), "data.fold=Ses1")
    assert continued.returncode == 1
    assert "data.fold" in continued.stderr
