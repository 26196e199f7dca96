"""Shipped configs are found by name, from any folder; a file of the user's wins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.processes import ROOT, egmf
from trainer.config import ConfigError, load_config
from trainer.shipped import list_configs, list_suites, locate, shipped_folder


def test_every_file_of_the_folder_is_listed_and_describes_itself() -> None:
    assert shipped_folder() == ROOT / "configs"
    assert [one.path for one in list_configs()] == sorted((ROOT / "configs").glob("*.yaml"), key=lambda p: p.stem)
    assert [one.path for one in list_suites()] == sorted((ROOT / "configs/suites").glob("*.yaml"), key=lambda p: p.stem)
    for one in (*list_configs(), *list_suites()):
        text = one.path.read_text(encoding="utf-8")
        assert text.startswith(f"# {one.description}\n"), one.path
        assert one.description.endswith("."), f"{one.path}: its first line is not a sentence"


def test_a_name_is_a_shipped_config_and_an_existing_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("mosi") == load_config(ROOT / "configs" / "mosi.yaml")
    (tmp_path / "mosei").mkdir()  # a folder is not a config
    assert load_config("mosei").tasks == ["mosei"]
    (tmp_path / "mosi").write_text("task: meld\n", encoding="utf-8")
    assert load_config("mosi").tasks == ["meld"]
    assert locate("suites/paper") == Path("suites/paper")  # names hold no folder
    assert locate("mosi.yaml") == Path("mosi.yaml")


def test_a_users_config_extends_a_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("extends: [cherma, tiny]\ntask: mosi\ntrain: {seed: 7}\n", encoding="utf-8")
    own = load_config(tmp_path / "own.yaml")
    assert (own.tasks, own.train.seed, own.model.backbone.name) == (["mosi"], 7, "tiny")
    assert own.train.epochs == load_config("base").train.epochs


def test_an_unknown_name_gets_the_nearest_and_where_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("extends: chermaa\n", encoding="utf-8")
    for name, words in (
        ("meldd", r"no config file meldd; did you mean meld\?; 'egmf config list' shows"),
        ("own.yaml", r"chermaa, extended by .*own\.yaml; did you mean cherma\?; 'egmf config list' shows"),
        ("configs/meld.yaml", r"no config file configs/meld\.yaml; 'meld' is a shipped config"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_config(name)


def test_the_list_is_printed_and_written_as_json() -> None:
    table = egmf("config", "list")
    listed = json.loads(egmf("config", "list", "--json").stdout)
    assert [one["name"] for one in listed["configs"]] == [one.name for one in list_configs()]
    assert [one["name"] for one in listed["suites"]] == [one.name for one in list_suites()]
    for one in (*listed["configs"], *listed["suites"]):
        assert one["name"] in table.stdout
        assert one["description"] in table.stdout
        assert Path(one["path"]).is_file()
