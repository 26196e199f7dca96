"""Feature files outside the folder of the file that names them: read as arrays, or refused by --contained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trainer.data.preparation.prepare import prepare
from trainer.data.readers.raw import ReaderError
from trainer.data.task_input import TaskInput
from trainer.data.unlabelled.inputs import open_input
from trainer.tasks import get_task

LINKS = ("out", "deep")


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Ways to name a file: inside the folder `in`, and out of it."""
    folder, outside = tmp_path / "in", tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    for place in (folder / "a.npy", folder / "sub" / "b.npy", outside / "c.npy", tmp_path / "in2.npy"):
        np.save(place, np.ones((3, 4), np.float32))
    (folder / "link.npy").symlink_to(outside / "c.npy")
    (folder / "linked").symlink_to(outside)
    (folder / "inner.npy").symlink_to(folder / "sub" / "b.npy")
    return {
        "plain": "a.npy",
        "below": "sub/b.npy",
        "winding": "sub/../a.npy",
        "absolute inside": str(folder / "a.npy"),
        "link inside": "inner.npy",
        "out": "../outside/c.npy",
        "out absolute": str(outside / "c.npy"),
        "out by a link": "link.npy",
        "out by a linked folder": "linked/c.npy",
        "out beside, with the same beginning": "../in2.npy",
        "out, absent": "../../nothing.npy",
    }


def write(tmp_path: Path, places: dict[str, str], labelled: bool) -> Path:
    more = {"label": "joy", "split": "train"} if labelled else {}
    lines = [{"id": name, "text": "x", "audio": place, **more} for name, place in places.items()]
    if labelled:
        lines += [{"id": split, "text": "x", "label": "joy", "split": split} for split in ("valid", "test")]
    path = tmp_path / "in" / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_refuses_what_leads_out(tmp_path: Path, places: dict[str, str], workers: int) -> None:
    path = write(tmp_path, places, labelled=True)
    with pytest.raises(ReaderError) as raised:
        prepare(get_task("meld"), [path], tmp_path / "data", contained=True, workers=workers)
    text = str(raised.value)
    for number, name in enumerate(places, 1):
        assert (f"line {number}: audio file {places[name]} leads out of" in text) == name.startswith("out"), name
    assert not (tmp_path / "data").exists()
    inside = {name: place for name, place in places.items() if not name.startswith("out")}
    done = prepare(
        get_task("meld"), [write(tmp_path, inside, labelled=True)], tmp_path / "data", contained=True, workers=workers
    )
    assert done.record["splits"]["train"]["n"] == len(inside)
    readable = {name: place for name, place in places.items() if "absent" not in name}
    done = prepare(get_task("meld"), [write(tmp_path, readable, labelled=True)], tmp_path / "all", workers=workers)
    assert done.record["splits"]["train"]["n"] == len(readable)


@pytest.mark.parametrize("stream", [False, True])
def test_predict_leaves_out_what_leads_out(tmp_path: Path, places: dict[str, str], stream: bool) -> None:
    path = write(tmp_path, places, labelled=False)
    tasks = {"meld": TaskInput(get_task("meld"), {"audio": 4}, {})}
    for contained in (False, True):
        source = path.open("rb") if stream else [path]
        with open_input(source, tasks, folder=path.parent, contained=contained) as given:  # type: ignore[arg-type]
            found = {}
            for sample in given.samples():
                faults: list[str] = []
                loaded = sample.load(faults)
                assert (loaded is None) == bool(faults)
                found[str(sample.raw and sample.raw.id)] = faults
        for name, faults in found.items():
            if contained and name.startswith("out"):
                assert len(faults) == 1
                assert "which --contained refuses" in faults[0]
            else:
                assert bool(faults) == ("absent" in name)
