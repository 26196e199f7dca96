"""What the documents name is there: files, links, modules, commands, options, config keys."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from tests.distributed.processes import ROOT
from trainer.cli import app
from trainer.config import RunConfig

DOCUMENTS = [
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/**/*.md", ".github/**/*.md", ".github/**/*.yml")
    for path in sorted(ROOT.glob(pattern))
]
FOLDERS = ("trainer", "launch", "configs", "tests", "docs", "benchmarks", r"\.github", r"\.ci")
PATH = re.compile(rf"(?<![\w./<-])(?:{'|'.join(FOLDERS)})/[\w./*-]*(?:::\w+)?")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?<![\w/.-])(?<!that )egmf((?:[ ]+(?:\\\n\s*)?[^\s`|#;&)]+)+)")
MODULE = re.compile(r"(?:python3? -m|--module) ((?:trainer|launch|benchmarks|tests)(?:\.\w+)*)")
KEY = re.compile(r"`((?:data|model|train|eval|track)(?:\.\w+)+)(?==|`)")
names = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@names
def test_paths_and_links_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    missing = []
    for found in PATH.findall(text):
        name, _, function = found.rstrip(".").partition("::")
        paths = list(ROOT.glob(name.rstrip("/")))
        if not paths or (function and f"def {function}(" not in paths[0].read_text(encoding="utf-8")):
            missing.append(found)
    for link in LINK.findall(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
        if not re.match(r"\w+:", link):
            name, _, section = link.partition("#")
            target = document.parent / name if name else document
            if not target.exists() or (section and section not in sections(target)):
                missing.append(link)
    assert not missing


def sections(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@names
def test_modules_exist(document: Path) -> None:
    found = MODULE.findall(document.read_text(encoding="utf-8"))
    assert [name for name in found if importlib.util.find_spec(name) is None] == []


@names
def test_commands_and_their_options_exist(document: Path) -> None:
    wrong = [
        fault for words in commands(document.read_text(encoding="utf-8")) if (fault := command_fault(words)) is not None
    ]
    assert not wrong


def commands(text: str) -> Iterator[list[str]]:
    """The words after every `egmf`, on command lines and in sentences; a sentence goes on after the command."""
    for match in COMMAND.finditer(text):
        yield [word.rstrip(".,:?\"'") for word in match[1].replace("\\\n", " ").split()]


def command_fault(words: list[str]) -> str | None:
    """Why these are not a command and options of it; None where they are, or where no command is named."""
    command: Any = typer.main.get_command(app)
    place = "egmf"
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        if not re.fullmatch(r"[a-z]+", words[0]):
            return None
        if words[0] not in command.commands:
            return f"{place} {words[0]}"
        place, command, words = f"{place} {words[0]}", command.commands[words[0]], words[1:]
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help", "-h"}
    unknown = [word for word in words if re.match(r"--\w", word) and word.partition("=")[0] not in known]
    return f"{place} {' '.join(unknown)}" if unknown else None


def test_faults_of_commands_are_found() -> None:
    assert command_fault(["trian", "meld"]) == "egmf trian"
    assert command_fault(["launch", "lokal"]) == "egmf launch lokal"
    assert command_fault(["train", "meld", "--otu", "x"]) == "egmf train --otu"
    assert command_fault(["launch", "slurm", "meld", "--no-requeue", "--out=x"]) is None
    assert list(commands("see `egmf plan --gpu-memory`: and `egmf runs`.")) == [["plan", "--gpu-memory"], ["runs"]]
    assert list(commands("egmf train meld \\\n    --force\n")) == [["train", "meld", "--force"]]


@names
def test_config_keys_exist(document: Path) -> None:
    keys = KEY.findall(document.read_text(encoding="utf-8"))
    assert [key for key in keys if not key.endswith((".jsonl", ".yaml")) and not is_key(key)] == []


def is_key(key: str) -> bool:
    model: object = RunConfig
    for part in key.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return "dict" in str(model)  # of free keys, such as a task's name
        if part not in model.model_fields:
            return False
        model = model.model_fields[part].annotation
    return True


def test_config_keys_are_distinguished_from_other_dotted_names() -> None:
    assert is_key("model.fusion.gate.kernel")
    assert is_key("data.weights.meld")
    assert not is_key("train.learning_rate")
    assert not is_key("train.zero.stage")


def test_every_document_is_reached_from_the_readme() -> None:
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        document = todo.pop()
        if document in reached or document.suffix != ".md":
            continue
        reached.add(document)
        todo += [(document.parent / link.partition("#")[0]).resolve() for link in LINK.findall(document.read_text())]
    assert set(ROOT.glob("docs/*.md")) | {ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"} <= reached


def test_the_version_of_the_citation_is_the_packages() -> None:
    from trainer import __version__

    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in citation
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == __version__
    assert all(a != b for a, b in pairwise(headings))
