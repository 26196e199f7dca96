"""One rank of the checkpoint test: a real engine, its checkpoints damaged in many ways, results as one JSON file."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.distributed.process_group import quiet_deepspeed, start_world, stop_world

quiet_deepspeed()


class Marker:
    """Unpickled without restriction it would leave a file."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {os.environ['EGMF_TEST_MARK']}",)


def last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a changed byte": lambda folder: last_byte(next((folder / "engine").glob("*optim*"))),
    "a short file": lambda folder: truncate(folder / "model.safetensors"),
    "a missing file": lambda folder: (folder / "random.rank1.safetensors").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "a broken manifest": lambda folder: truncate(folder / "manifest.json"),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text("{}"),
}


def main(data: Path, out: Path) -> None:
    from tests.distributed.cases import NF4, Case, config_of, state_at
    from trainer.checkpoint.store import Checkpoints, resume_engine
    from trainer.checkpoint.weights import load_weights, trainable_state
    from trainer.logs import set_up_logging
    from trainer.run.assemble import assemble
    from trainer.run.engine import build_engine

    world = start_world()
    set_up_logging(None, world.rank)
    config = config_of(Case("", NF4, ("train.zero=2",)), data, engine=True)
    parts = assemble(config, out / "run", world, torch.float32, partition=True)
    engine = build_engine(parts.model, config)
    results: dict[str, Any] = {}
    output: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: output.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("trainer.checkpoint.store").addHandler(handler)

    def attempt(work: Callable[[], Any]) -> str:
        try:
            return str(work())
        except Exception as error:  # noqa: BLE001
            return f"{type(error).__name__}: {error}"

    def fill(folder: Path, steps: tuple[int, ...], keep: int = 9, best: str | None = None) -> Checkpoints:
        world.barrier()
        checkpoints = Checkpoints(folder, world, keep)
        checkpoints.open()
        for step in steps:
            checkpoints.save(engine, state_at(step, best))
        return checkpoints

    def on_first(work: Callable[[], Any]) -> None:
        if world.is_rank_zero:
            work()
        world.barrier()

    checkpoints = fill(out / "kept", (1, 2, 3, 4), keep=2, best="step-00000001")
    results["kept"] = checkpoints.names()
    results["best"] = str(checkpoints.best())
    template = fill(out / "template", (1, 2)).folder
    before = {name: t.clone() for name, t in trainable_state(parts.model, world).items()}
    for name, damage in DAMAGES.items():
        folder = out / name.replace(" ", "-")
        on_first(lambda folder=folder: shutil.copytree(template, folder))  # type: ignore[misc]
        on_first(lambda folder=folder, damage=damage: damage(folder / "step-00000002"))  # type: ignore[misc]
        output.clear()
        damaged = Checkpoints(folder, world)
        seen = damaged.newest()
        names = damaged.names()
        repaired = damaged.newest(repair=True)
        results[name] = {
            "newest": seen.name if seen else None, "names": names, "after": damaged.names(), "logged": list(output),
            "aside": sorted(path.name for path in folder.glob("damaged-*")), "repaired": repaired == seen,
        }  # fmt: skip
        on_first(lambda folder=folder, damage=damage: damage(folder / "step-00000001"))  # type: ignore[misc]
        results[name]["none left"] = attempt(damaged.newest)
    # a newer format is no damage: it is refused, and stays as it is
    newer = out / "newer"

    def as_format_two() -> None:
        shutil.copytree(template, newer)
        path = newer / "step-00000002" / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))

    on_first(as_format_two)
    results["newer"] = attempt(lambda: Checkpoints(newer, world).newest(repair=True))
    results["newer stays"] = Checkpoints(newer, world).names()
    # weights come back, on every rank
    with torch.no_grad():
        for p in parts.model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    load_weights(parts.model, template / "step-00000001")
    after = trainable_state(parts.model, world)
    results["weights"] = all(torch.equal(before[name], after[name]) for name in before)
    # a checkpoint with code in it
    code = out / "code"
    on_first(lambda: shutil.copytree(template, code))
    for path in sorted((code / "step-00000002" / "engine").glob("*optim*")):
        on_first(lambda path=path: torch.save({"optimizer_state_dict": Marker()}, path, pickle_module=pickle))  # type: ignore[misc]
    results["code"] = attempt(lambda: resume_engine(engine, code / "step-00000002", world))
    results["code ran"] = Path(os.environ["EGMF_TEST_MARK"]).exists()
    # nowhere to write
    removed = fill(out / "gone", (1,))
    on_first(lambda: shutil.rmtree(removed.folder))
    results["gone"] = attempt(lambda: removed.save(engine, state_at(2)))
    if world.is_rank_zero:
        results["gone stays gone"] = not removed.folder.exists()
        (out / "results.json").write_text(json.dumps(results))
    stop = time.monotonic() + 30
    while not (out / "results.json").exists() and time.monotonic() < stop:
        time.sleep(0.05)
    stop_world()


def full_disk(data: Path, out: Path) -> None:
    """On a file system with room for one checkpoint the second fails, and leaves the first."""
    from tests.distributed.cases import Case, config_of, state_at
    from trainer.checkpoint.store import Checkpoints
    from trainer.logs import set_up_logging
    from trainer.run.assemble import assemble
    from trainer.run.engine import build_engine

    world = start_world()
    set_up_logging(None, world.rank)
    config = config_of(Case("", (), ("train.zero=1",)), data, engine=True)
    engine = build_engine(assemble(config, out.parent / "run", world, torch.float32, partition=True).model, config)
    checkpoints = Checkpoints(out / "checkpoints", world, 9)
    checkpoints.open()
    checkpoints.save(engine, state_at(1))
    used = sum(path.stat().st_size for path in checkpoints.folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(out).free
    (out / "ballast").write_bytes(b"\0" * max(0, free - used // 2))
    try:
        checkpoints.save(engine, state_at(2))
    except ValueError as error:
        print(f"REFUSED {error}", flush=True)
    assert checkpoints.names() == ["step-00000001"]
    assert checkpoints.verify(checkpoints.folder / "step-00000001") == []
    (out / "ballast").unlink()
    checkpoints.open()
    checkpoints.save(engine, state_at(2))
    print("SAVED once there was room", flush=True)
    stop_world()


if __name__ == "__main__":
    (full_disk if sys.argv[3:] == ["full"] else main)(Path(sys.argv[1]), Path(sys.argv[2]))
