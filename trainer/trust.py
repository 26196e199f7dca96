"""Python code that a saved run would bring along: a model's own modules, and plug-ins. It runs where its user has agreed to just that code.

Whoever trains with such code has agreed by doing so. The config in a run folder agrees to nothing, since the folder may be somebody
else's: opening it asks for ``--trust-code`` with the hash of the code. What was agreed to is kept by hash, in a file of the user's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from trainer.config import RunConfig
from trainer.files import load_json, write_json

SHOWN = 16  # hexadecimal digits of a hash that are shown and asked for


class UntrustedCodeError(ValueError):
    """A saved run would run code to which the user has not agreed; the message names it, and its hash."""


def trust_file() -> Path:
    """Where the hashes are kept that the user has agreed to: in ``EGMF_CONFIG_DIR``, else ``egmf`` where configuration belongs."""
    usual = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "egmf"
    return Path(os.environ.get("EGMF_CONFIG_DIR") or usual) / "trusted-code.json"


def check_trust(run: Path, config: RunConfig, agreed: str | None = None) -> None:
    """Refuse a saved run whose code its user has not agreed to; what is agreed to now is remembered.

    Args:
        config: of the run, with the overrides of the command line.
        agreed: the hash of the code, or its first digits as they are shown.

    Raises:
        UntrustedCodeError: there is such code, and neither `agreed` nor the user's file has its hash.
    """
    code = list(_code(config))
    if not code:
        return
    total = _hash(code)
    if total in _known():
        return
    listed = "".join(f"\n  {what}" for what, _ in code)
    if not all(digest for _, digest in code):
        raise UntrustedCodeError(
            f"{run} would run Python code of a model that is named without a commit, so that it can be another every time:{listed}\n"
            "Read the code, and give model.backbone.revision=<the commit that you read>; or model.backbone.trust_remote_code=false"
        )
    if agreed is not None and len(agreed) >= SHOWN and total.startswith(agreed.lower()):
        remember(config)
        return
    other = f" (--trust-code {agreed} is not the hash of this code)" if agreed is not None else ""
    raise UntrustedCodeError(
        f"{run} would run Python code that came with it or with its model{other}:{listed}\n"
        f"Read it. If you trust it, add --trust-code {total[:SHOWN]}; a model's own code is left out with "
        "model.backbone.trust_remote_code=false"
    )


def remember(config: RunConfig) -> None:
    """Note that the user has agreed to the code of a config, by training with it or by its hash."""
    code = list(_code(config))
    if not code or (total := _hash(code)) in (known := _known()):
        return
    path = trust_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**known, total: [what for what, _ in code]})


def _code(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What would run, in words, and a digest of it; "" where it is not decided what would run."""
    backbone = config.model.backbone
    if backbone.trust_remote_code:
        folder = Path(backbone.name).expanduser()
        if folder.is_dir():
            for path in sorted(folder.rglob("*.py")):
                yield f"{path}", _digest(path)
            for path in sorted(folder.glob("*.json")):
                yield from ((f"{path}: {name}", "") for name in _code_elsewhere(path))
        else:
            pinned = re.fullmatch(r"[0-9a-f]{40}", backbone.revision or "")
            yield (
                f"{backbone.name} at revision {backbone.revision or 'newest'}",
                backbone.revision or "" if pinned else "",
            )
    for name in config.model.fusion.plugins:
        if not name.endswith(".py"):
            yield name, f"module {name}"
        elif Path(name).is_file():  # one that is not there is refused where it would be imported
            yield name, _digest(Path(name))


def _code_elsewhere(path: Path) -> list[str]:
    """The modules of other repositories, ``org/name--module.Class``, that a model's JSON file names as its code."""
    try:
        found = load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    named = found.get("auto_map") if isinstance(found, dict) else None
    return sorted(set(re.findall(r"[^'\"\s,\[\]]+--[^'\"\s,\[\]]+", str(named)))) if named else []


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _hash(code: list[tuple[str, str]]) -> str:
    """Of all code together. A file counts by its name and content, wherever it lies."""
    parts = sorted((Path(what).name, digest) for what, digest in code)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _known() -> dict[str, list[str]]:
    try:
        found = load_json(trust_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
