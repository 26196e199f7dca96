"""The runs of earlier versions that are kept in ``tests/fixtures``, copied to where they can be continued."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

FIXTURES = Path(__file__).parents[1] / "fixtures"
V01 = FIXTURES / "v0.1"
Edit = Callable[[dict[str, Any]], None]  # of a flat dictionary of settings, in place


def stopped_run(name: str, folder: Path) -> Path:
    """A copy of the stopped run `name` (zero2, zero3) of version 0.1.0, its datasets beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(V01 / "data", folder / "data", dirs_exist_ok=True)
    run = Path(shutil.copytree(V01 / f"{name}-stopped", folder / name))
    shutil.copytree(V01 / "backbone", run / "backbone")
    return run


def edit_settings(run: Path, edit: Edit) -> None:
    """Have the run's checkpoints, and its config, as a version with other settings would have written them."""
    for checkpoint in (run / "checkpoints").glob("step-*"):
        edit_state(checkpoint, lambda state: edit(state["settings"]))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    flat = _flat(config)
    edit(flat)
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *above, last = key.split(".")
        holder = nested
        for part in above:
            holder = holder.setdefault(part, {})
        holder[last] = value
    (run / "config.yaml").write_text(yaml.safe_dump(nested), encoding="utf-8")


def edit_state(checkpoint: Path, edit: Edit) -> None:
    """Change ``state.json``, and the manifest with it."""
    path, manifest = checkpoint / "state.json", checkpoint / "manifest.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    edit(state)
    path.write_text(json.dumps(state), encoding="utf-8")
    listed = json.loads(manifest.read_text(encoding="utf-8"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    listed["files"]["state.json"] = {"bytes": path.stat().st_size, "sha256": digest}
    manifest.write_text(json.dumps(listed), encoding="utf-8")


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            out |= _flat(inner, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = inner
    return out
