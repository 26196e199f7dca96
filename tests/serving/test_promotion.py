"""Promotion: an alias moves to the group that is better with significance on validation, and for no other reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from sklearn.metrics import f1_score

from tests.distributed.processes import egmf
from tests.results.seeded import make_baseline, make_folds, make_seeded, make_two, track
from trainer.results.compare.comparison import compare
from trainer.results.compare.result import Comparison
from trainer.results.compare.sources.find import find_runs
from trainer.saved_config import saved_config
from trainer.serving.mlflow_model.promotion import PromotionError, Target, check_request, parse_target, promote
from trainer.serving.mlflow_model.tags import validation_tag

CHAMPION = Target("meld", "champion")


def score(run: Path) -> float:
    """The weighted F1 of a made run on validation, by scikit-learn."""
    table = pd.read_parquet(run / "predictions" / "valid.parquet")
    return float(
        f1_score(table.label, table.prediction.fillna("?"), average="weighted", labels=sorted(set(table.label)))
    )


def registered(run: Path, uri: str | None = None, **tags: str) -> str:
    """Record a made run in MLflow, and register a version of it; the version."""
    if "mlflow" not in json.loads((run / "run.json").read_text()):
        track(run, saved_config(run), uri)
    place = json.loads((run / "run.json").read_text())["mlflow"]
    client = MlflowClient(place["uri"])
    entity = client.get_run(place["run_id"])
    model = client.create_logged_model(entity.info.experiment_id, name="egmf", source_run_id=entity.info.run_id)
    if not client.search_registered_models("name = 'meld'"):
        client.create_registered_model("meld")
    made = client.create_model_version(
        "meld", model.artifact_location, entity.info.run_id, tags=tags, model_id=model.model_id
    )
    return str(made.version)


def store(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def holder(folder: Path, alias: str = "champion") -> str | None:
    aliases = MlflowClient(store(folder)).get_registered_model("meld").aliases
    return None if alias not in aliases else str(aliases[alias])


def compared(folder: Path, *more: Path, baseline: str | None = None, **options: object) -> Comparison:
    found = find_runs([str(folder), *map(str, more)], ["valid"])
    return compare(found.runs, split="valid", baseline=baseline, resamples=200, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Two groups of three seeds, of which `full` is far better, all registered in the store beside them; run's name -> version."""
    folder = make_two(tmp_path_factory.mktemp("filled") / "runs")
    return folder, {run.name: registered(run) for run in sorted(folder.glob("*-s?"))}


def fill(filled: tuple[Path, dict[str, str]], folder: Path) -> dict[str, str]:
    """A copy of them all in `folder`, to be changed."""
    shutil.copytree(filled[0], folder, dirs_exist_ok=True)
    return filled[1]


def test_the_better_group_gets_the_alias_by_its_best_run_on_validation(
    filled: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    versions = fill(filled, tmp_path)
    best = max(tmp_path.glob("full-s?"), key=score)
    done = promote(compared(tmp_path), CHAMPION, store(tmp_path))
    assert holder(tmp_path) == versions[best.name] == done.version
    assert (done.previous, done.changed) == (None, True)
    text = "\n".join(done.lines)
    assert f"version {versions[best.name]} is that of {best.name}" in text
    assert f"wf1 {score(best):.4f} on valid" in text
    assert "3 registered runs" in text
    assert "significant" in text
    tag = MlflowClient(store(tmp_path)).get_model_version("meld", done.version).tags["egmf.promoted.champion"]
    assert best.name in tag


def test_a_champion_that_is_better_stays_and_one_that_is_worse_goes(
    filled: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    versions = fill(filled, tmp_path)
    client = MlflowClient(store(tmp_path))
    worst = min(tmp_path.glob("full-s?"), key=score).name
    client.set_registered_model_alias("meld", "champion", versions[worst])
    stays = promote(compared(tmp_path), CHAMPION, store(tmp_path))
    assert (stays.changed, stays.version, holder(tmp_path)) == (False, versions[worst], versions[worst])
    client.set_registered_model_alias("meld", "champion", versions["less-s1"])
    moved = promote(compared(tmp_path), CHAMPION, store(tmp_path))
    assert (moved.previous, moved.changed) == (versions["less-s1"], True)
    assert holder(tmp_path) == moved.version != versions["less-s1"]


def test_refused_with_the_numbers_where_nothing_is_significant(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_seeded(tmp_path / f"full-s{seed}", seed, 0.70)
        make_seeded(tmp_path / f"less-s{seed}", seed, 0.69, ["model.fusion.experts=[semantic,global]"])
    for run in sorted(tmp_path.glob("*-s?")):
        registered(run)
    comparison = compared(tmp_path)
    (d,) = comparison.differences
    assert d.p_corrected is not None
    with pytest.raises(PromotionError, match="no group is better than every other") as refused:
        promote(comparison, CHAMPION, store(tmp_path))
    assert f"corrected {d.p_corrected:.3g}: not significant (2 seeds, 200 samples)" in str(refused.value)
    assert holder(tmp_path) is None


def test_a_champion_that_was_not_compared_refuses(filled: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    fill(filled, tmp_path / "runs")
    other = make_seeded(tmp_path / "other-s1", 1, 0.9, ["model.fusion.width=128"])
    version = registered(other, store(tmp_path / "runs"))
    client = MlflowClient(store(tmp_path / "runs"))
    client.set_registered_model_alias("meld", "champion", version)
    with pytest.raises(PromotionError, match=r"not among the compared runs[\s\S]*delete_registered_model_alias"):
        promote(compared(tmp_path / "runs"), CHAMPION, store(tmp_path / "runs"))
    done = promote(compared(tmp_path / "runs"), Target("meld", "candidate"), store(tmp_path / "runs"))
    assert holder(tmp_path / "runs", "candidate") == done.version
    assert holder(tmp_path / "runs") == version
    again = promote(compared(tmp_path / "runs", other), CHAMPION, store(tmp_path / "runs"))
    assert (again.changed, again.version) == (False, version)


def test_of_three_groups_the_best_must_beat_both_unless_one_is_named(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        make_seeded(tmp_path / f"a-s{seed}", seed, 0.75)
        make_seeded(tmp_path / f"b-s{seed}", seed, 0.74, ["model.fusion.width=128"])
        make_seeded(tmp_path / f"c-s{seed}", seed, 0.5, ["model.fusion.width=64"])
    versions = {run.name: registered(run) for run in sorted(tmp_path.glob("*-s?"))}
    with pytest.raises(PromotionError, match="no group is better than every other"):
        promote(compared(tmp_path), CHAMPION, store(tmp_path))
    with pytest.raises(PromotionError, match="were not compared with each other"):
        promote(compared(tmp_path, baseline="width=64"), CHAMPION, store(tmp_path))
    client = MlflowClient(store(tmp_path))
    client.set_registered_model_alias("meld", "champion", versions["b-s1"])
    with pytest.raises(PromotionError, match="--baseline 'width=128' compares with the group that has the alias alone"):
        promote(compared(tmp_path), CHAMPION, store(tmp_path))
    with pytest.raises(PromotionError, match="none with width=128, which has the alias now"):
        promote(compared(tmp_path, baseline="width=64"), CHAMPION, store(tmp_path))
    for seed in (1, 2, 3):  # where `b` is as bad as `c`, `a` beats both
        make_seeded(tmp_path / "more" / f"b-s{seed}", seed, 0.45, ["model.fusion.width=128"])
    runs = [*tmp_path.glob("a-s?"), *tmp_path.glob("c-s?"), *(tmp_path / "more").glob("b-s?")]
    found = find_runs([str(run) for run in runs], ["valid"])
    done = promote(compare(found.runs, split="valid", resamples=200), Target("meld", "other"), store(tmp_path))
    assert done.group == "width=256"


def test_a_baseline_must_be_beaten_and_is_never_promoted(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_seeded(tmp_path / f"full-s{seed}", seed, 0.6)
        registered(tmp_path / f"full-s{seed}")
    make_baseline(tmp_path / "baseline-text", "text", 0.9)
    with pytest.raises(PromotionError, match="baseline text, which no training made"):
        promote(compared(tmp_path), CHAMPION, store(tmp_path))
    assert holder(tmp_path) is None


def test_only_registered_runs_are_a_choice_and_only_as_they_were_compared(tmp_path: Path) -> None:
    make_two(tmp_path, (1, 2, 3))
    track(tmp_path / "less-s1", saved_config(tmp_path / "less-s1"))
    with pytest.raises(PromotionError, match="no registered model meld"):
        promote(compared(tmp_path), CHAMPION, store(tmp_path))
    registered(tmp_path / "less-s1")
    with pytest.raises(PromotionError, match="none of its runs is registered as meld"):
        promote(compared(tmp_path), CHAMPION, store(tmp_path))
    worst = min(tmp_path.glob("full-s?"), key=score)
    tag = validation_tag("meld", "wf1")
    registered(worst, **{tag: repr(score(worst) + 0.01)})
    with pytest.raises(PromotionError, match=r"not what was compared[\s\S]*egmf export RUN --mlflow meld"):
        promote(compared(tmp_path), CHAMPION, store(tmp_path))
    version = registered(worst, **{tag: repr(score(worst))})
    done = promote(compared(tmp_path), CHAMPION, store(tmp_path))
    assert done.version == version
    assert "not registered, so not a choice" in "\n".join(done.lines)


def test_several_metrics_must_all_agree(filled: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    fill(filled, tmp_path)
    done = promote(compared(tmp_path, metrics=["wf1", "acc"]), CHAMPION, store(tmp_path))
    assert sum("significant" in line for line in done.lines) == 2


def test_runs_that_are_named_by_their_experiment(filled: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    versions = fill(filled, tmp_path)
    found = find_runs(["egmf"], ["valid"], store(tmp_path))
    done = promote(compare(found.runs, split="valid", resamples=200), CHAMPION, store(tmp_path))
    assert done.version in {version for name, version in versions.items() if name.startswith("full")}
    assert holder(tmp_path) == done.version


def test_folds_promote_nothing(tmp_path: Path) -> None:
    make_folds(tmp_path, "full", 0.8)
    make_folds(tmp_path, "less", 0.5, ["model.fusion.width=64"])
    for run in tmp_path.glob("full*"):
        registered(run, store(tmp_path))
    with pytest.raises(ValueError, match=r"cross-validation|several folds|no group is better"):
        promote(compared(tmp_path), CHAMPION, store(tmp_path))


def test_one_group_and_comparisons_on_test_promote_nothing(filled: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    fill(filled, tmp_path)
    found = find_runs([str(tmp_path / "full-s1")], ["valid"])
    with pytest.raises(PromotionError, match="nothing to compare it with"):
        promote(compare(found.runs, split="valid"), CHAMPION, store(tmp_path))
    found = find_runs([str(tmp_path)], ["test"])
    with pytest.raises(PromotionError, match="on test promotes nothing"):
        promote(compare(found.runs, split="test"), CHAMPION, store(tmp_path))


@pytest.mark.parametrize("text", ["meld", "meld@", "@champion", "meld@v3", "meld@latest", "a/b@c", "it's@champion", ""])
def test_targets_that_are_none(text: str) -> None:
    with pytest.raises(PromotionError, match="--promote"):
        parse_target(text)


def test_options_that_do_not_go_together_are_refused_at_once() -> None:
    with pytest.raises(PromotionError, match=r"--split test[\s\S]*--force[\s\S]*--correction none[\s\S]*--kinds"):
        check_request("meld@champion", split="test", force=True, correction="none", kinds=True)
    assert check_request("meld@champion", split=None, force=False, correction="holm", kinds=False) == CHAMPION
    assert check_request("meld@champion", split="valid", force=False, correction="bh", kinds=False) == CHAMPION


def test_the_command(filled: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    fill(filled, tmp_path)
    refused = egmf("compare", str(tmp_path), "--promote", "meld@champion", "--split", "test")
    assert refused.returncode == 1
    assert "no honest test score" in refused.stderr
    assert holder(tmp_path) is None
    done = egmf("compare", str(tmp_path), "--promote", "meld@champion", "--no-log", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["split"] == "valid"
    assert found["promotion"]["version"] == holder(tmp_path)
    assert "meld@champion is now version" in done.stderr
    again = egmf("compare", str(tmp_path), "--promote", "meld@champion", "--no-log")
    assert (again.returncode, "stays version" in again.stderr) == (0, True), again.stderr
