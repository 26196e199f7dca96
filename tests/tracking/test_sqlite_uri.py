"""Paths with any characters as MLflow stores: the file that is written is the one that was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy
from mlflow import MlflowClient

from trainer.results.compare.sources.from_mlflow import connect, default_uri
from trainer.tracking.sqlite_uri import sqlite_file, sqlite_uri

NAMES = [
    "plain",
    "我的 实验#1 50%?x::y",
    "a?b=c&uri=true",
    "100%",
    "a%20b",
    "%3F?",
    "#",
    "file:x?",
    "a;b@c:d",
    "'\"\\",
    "?mode=memory",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_uri_opens_just_this_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "mlflow.db"
    path.parent.mkdir()
    uri = sqlite_uri(path)
    engine = sqlalchemy.create_engine(uri)
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("create table t (x int)"))
        connection.commit()
    engine.dispose()
    assert [p.relative_to(tmp_path) for p in tmp_path.rglob("*")] == [Path(name), Path(name, "mlflow.db")]
    assert sqlite_file(uri) == path
    assert (uri == f"sqlite:///{path}") == (not set(name) & set("?#%")), "others are as they were"


def test_mlflow_writes_into_it_and_compare_finds_it(tmp_path: Path) -> None:
    folder = tmp_path / NAMES[1]
    folder.mkdir()
    client = MlflowClient(sqlite_uri(folder / "mlflow.db"))
    run = client.create_run(client.create_experiment("实验", (folder / "mlartifacts").as_uri())).info.run_id
    client.log_metric(run, "x", 1.5)
    client.log_text(run, "text", "a.txt")
    assert sorted(p.name for p in folder.iterdir()) == ["mlartifacts", "mlflow.db"]
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    found = connect(default_uri(["x"], [folder / "run"]))
    assert found.get_run(run).data.metrics == {"x": 1.5}
    assert (folder / "mlartifacts" / run / "artifacts" / "a.txt").read_text() == "text"


def test_other_stores_have_no_file() -> None:
    assert sqlite_file("http://host:5000") is None
    assert sqlite_file("sqlite:///:memory:") is None
    assert sqlite_file("postgresql://u:p@h/db") is None


@pytest.mark.parametrize("spelling", ["once", "file", "twice"])
def test_other_versions_of_sqlalchemy_read_other_spellings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    """One that decodes nothing, and one that decodes once: for each a spelling is found."""
    import trainer.tracking.sqlite_uri as module

    path = tmp_path / "a?b"
    seen: list[str] = []

    def reads(uri: str) -> Path | None:
        seen.append(uri)
        return path if len(seen) == ["once", "file", "twice"].index(spelling) + 1 else None

    monkeypatch.setattr(module, "sqlite_file", reads)
    assert sqlite_uri(path) == seen[-1]
    monkeypatch.setattr(module, "sqlite_file", lambda uri: None)
    with pytest.raises(ValueError, match=r"choose a run folder whose path has no"):
        sqlite_uri(path)
