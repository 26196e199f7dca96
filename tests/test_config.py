"""Configs: every file loads, every fault is named, nothing is lost between file and run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainer.checkpoint.identity import effect_of, training_settings
from trainer.config import ConfigError, check_config, dump_config, flatten, load_config
from trainer.saved_config import saved_config
from trainer.tasks import get_task

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_comes_back_from_its_dump(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    for name in config.tasks:
        get_task(name)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again) == config


def test_all_the_configs_of_the_issue_are_there() -> None:
    assert {"base", "meld", "cherma", "mosei", "simsv2", "unified", "demo", "zero0", "zero1", "zero3"} <= {
        p.stem for p in CONFIGS
    }


def test_every_fault_is_reported_at_once_with_the_nearest_name() -> None:
    raw = {
        "task": "meld",
        "trian": {},
        "train": {"zero": 5, "seedd": 1, "precision": "bf61", "lr": {"fusoin": 1}, "global_batch": 0},
        "model": {"fusion": {"width": 255, "experts": ["locl"]}, "backbone": {"tiny": {"hidden_size": 100}}},
        "data": {"history": -1, "modality_dropout": 1.0},
    }
    with pytest.raises(ConfigError) as caught:
        check_config(raw, "run.yaml")
    text = str(caught.value)
    for expected in (
        "run.yaml: 10 faults",
        "trian: unknown key; did you mean train?",
        "train.seedd: unknown key; did you mean seed?",
        "train.lr.fusoin: unknown key; did you mean fusion?",
        "train.precision: must be 'fp32', 'bf16' or 'fp16', not 'bf61'; did you mean bf16?",
        "train.zero: must be 0, 1, 2 or 3, not 5",
        "train.global_batch",
        "model.fusion.experts.0",
        "did you mean local?",
        "hidden_size=100 must be a multiple of 64",
        "data.history",
        "data.modality_dropout",
    ):
        assert expected in text, f"{expected!r} not in:\n{text}"


def test_combinations_that_cannot_train_are_refused() -> None:
    with pytest.raises(ConfigError, match="full cannot train a quantised backbone"):
        check_config({"task": "meld", "model": {"adapter": {"kind": "full"}, "backbone": {"quantization": "nf4"}}})
    with pytest.raises(ConfigError, match="nothing to train"):
        check_config({"task": "meld", "model": {"adapter": {"kind": "frozen"}, "fusion": {"pseudo_tokens": 0}}})
    with pytest.raises(ConfigError, match="at least 12"):
        check_config({"task": "meld", "model": {"backbone": {"tiny": {"initializer_range": 0.02}}}})


def test_extends_and_overrides_merge_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.yaml").write_text("task: meld\ntrain: {zero: 1, seed: 4}\nmodel: {fusion: {experts: [local]}}\n")
    (tmp_path / "b.yaml").write_text("train: {zero: 0}\n")
    (tmp_path / "sub" / "c.yaml").write_text("extends: [../a.yaml, ../b.yaml]\ntrain: {clip: 0.5}\n")
    config = load_config(
        tmp_path / "sub" / "c.yaml", ["train.lr.fusion=1e-5", "model.fusion.experts=[global]", "deepspeed.a.b=3"]
    )
    assert (config.train.zero, config.train.seed, config.train.clip, config.train.lr.fusion) == (0, 4, 0.5, 1e-5)
    assert config.model.fusion.experts == ["global"]
    assert config.deepspeed == {"a": {"b": 3}}
    assert flatten(config)["deepspeed.a.b"] == 3
    assert flatten(config)["model.fusion.experts"] == ["global"]


def test_bad_files_are_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").write_text("extends: loop.yaml\ntask: meld\n")
    (tmp_path / "list.yaml").write_text("- task\n")
    (tmp_path / "broken.yaml").write_text("task: [meld\n")
    (tmp_path / "orphan.yaml").write_text("extends: lop.yaml\n")
    for name, words in (
        ("loop.yaml", "extends itself"),
        ("list.yaml", "mapping of sections"),
        ("broken.yaml", "not readable YAML"),
        ("orphan.yaml", "did you mean loop.yaml"),
        ("lst.yaml", "did you mean list.yaml"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_config(tmp_path / name)
    with pytest.raises(ConfigError, match="key=value"):
        load_config(tmp_path / "list.yaml", ["train.zero"])


def test_the_selecting_metric_is_a_name_or_a_mapping_and_affects_the_selection_alone(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("task: [meld, mosei]\neval: {select: uar}\n")
    for overrides, expected in (
        ([], "uar"),
        (["eval.select=acc"], "acc"),
        (["eval.select.meld=acc"], {"meld": "acc"}),
        (["eval.select={meld: acc, mosei: mae}"], {"meld": "acc", "mosei": "mae"}),
        (["eval.select=null"], {}),
    ):
        config = load_config(path, overrides)
        assert config.eval.select == expected
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/config.yaml").write_text(dump_config(config))
        assert saved_config(tmp_path / "run") == config
        assert training_settings(config) == training_settings(check_config({"task": ["meld", "mosei"]}))
    assert effect_of("eval.select") == effect_of("eval.select.meld") == "selection"
    assert effect_of("model.adapter.targets.meld") == "training"  # a list, or a name: no dictionary
    with pytest.raises(ConfigError, match=r"eval\.select: must be a metric's name, or task -> metric .*, not 3"):
        check_config({"task": "meld", "eval": {"select": 3}})
    with pytest.raises(ConfigError, match=r"eval\.select: must be a metric's name"):
        check_config({"task": "meld", "eval": {"select": {"meld": ["uar"]}}})


def test_shares_of_steps_are_fixed_once() -> None:
    with pytest.raises(ConfigError, match="leave one out"):
        check_config({"task": ["meld", "mosei"], "data": {"weights": {"meld": 2}, "mixing_temperature": 2}})
    assert check_config({"task": "meld", "data": {"mixing_temperature": float("inf")}}).data.mixing_temperature > 1e9


def test_the_config_of_a_run_reads_neither_the_environment_nor_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    (tmp_path / "keys.yaml").write_text("password: hush\n")
    for text, says in (
        ("task: meld\ntrack: {uri: 'http://there/${oc.env:SECRET_TOKEN}'}\n", "track.uri"),
        ("task: meld\ndata: {path: 'a'}\ntrain: {stop_signals: ['${oc.env:SECRET_TOKEN}']}\n", "train.stop_signals"),
        ("extends: ../keys.yaml\ntask: meld\n", "extends"),
    ):
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        (run / "config.yaml").write_text(text)
        with pytest.raises(ConfigError, match="refers to other files or to the environment") as raised:
            saved_config(run)
        assert says in str(raised.value)
        assert "hush" not in str(raised.value)


def test_extends_takes_yaml_files_alone_and_shows_none(tmp_path: Path) -> None:
    (tmp_path / "secrets.env").write_text("TOKEN=hush\n")
    (tmp_path / "odd.yaml").write_text("hush: [\n")
    for base, says in (("secrets.env", "a YAML file, or a shipped config"), ("odd.yaml", "is not readable YAML")):
        (tmp_path / "mine.yaml").write_text(f"extends: {base}\ntask: meld\n")
        with pytest.raises(ConfigError, match=says) as raised:
            load_config(tmp_path / "mine.yaml")
        assert "hush" not in str(raised.value)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (("model: {fusion: [a]}", ()), "model.fusion: must be a section with keys such as"),
        (("task: meld", ("train.lr=[1,2]",)), "train.lr: must be a section"),
    ],
)
def test_a_list_where_a_section_belongs_is_named(
    tmp_path: Path, layers: tuple[str, tuple[str, ...]], says: str
) -> None:
    (tmp_path / "mine.yaml").write_text(f"extends: meld\n{layers[0]}\n")
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_config(tmp_path / "mine.yaml", list(layers[1]))


def test_free_text_is_not_asked_of_a_model_that_is_trained_on_answers_alone() -> None:
    raw = {"task": "meld", "train": {"loss": "constrained"}, "eval": {"mode": "generate"}}
    with pytest.raises(ConfigError, match=r"eval\.generation=constrained, or train\.loss=full"):
        check_config(raw)
    check_config(raw | {"eval": {"mode": "generate", "generation": "constrained"}})
