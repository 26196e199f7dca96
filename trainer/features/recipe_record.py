"""The identity of a recipe as it is written down: beside arrays, in a dataset's record, in a run; and how two of them are compared.

Light to import: whoever only reads a record loads no library of the extraction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from trainer.features.recipe import Recipe, check_recipe, read_recipe
from trainer.files import load_json, write_json
from trainer.shipped import list_recipes

RECIPE = "recipe.json"  # beside arrays: the identity of the recipe that made them
SHOWN = 16  # hex digits of a hash in messages


class RecipeRecord(TypedDict):
    """What :class:`trainer.features.identity.Identity` holds, as JSON: the recipe's values, hashes of weights, versions, and a hash of all."""

    hash: str
    values: dict[str, Any]
    weights: dict[str, str]
    versions: dict[str, str]
    code: int


def record_of(recipe: Recipe) -> RecipeRecord:
    """The identity that a recipe has on this machine.

    Raises:
        ValueError: weights or packages that are not there.
    """
    from trainer.features.identity import identify  # it reads weights

    return cast(RecipeRecord, identify(recipe).plain())


def read_recipe_record(path: Path) -> RecipeRecord | None:
    """The record in a file; None where there is no file.

    Raises:
        ValueError: a file that is no such record.
    """
    try:
        found = load_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as the record of a recipe: {error}") from error
    from trainer.features.identity import check_identity

    check_identity(found, str(path))
    return cast(RecipeRecord, found)


def write_recipe_record(path: Path, record: RecipeRecord) -> None:
    """Whole or not at all."""
    write_json(path, record)


def recipe_beside(source: Path) -> RecipeRecord | None:
    """The record beside a file of own data, or in a folder of it; None where its arrays are of no recipe that is known."""
    return read_recipe_record((source if source.is_dir() else source.parent) / RECIPE)


def recipe_in(record: RecipeRecord, where: str, folders: Mapping[str, str] | None = None) -> Recipe:
    """The recipe whose values a record has.

    Args:
        folders: name of an encoder, as the recipe has it -> where its files are on this machine.

    Raises:
        ValueError: `folders` names an encoder that the recipe does not have.
    """
    values: dict[str, Any] = {
        key: dict(one) if isinstance(one, Mapping) else one for key, one in record["values"].items()
    }
    named = [one for one in values.values() if isinstance(one, dict) and "name" in one]
    if unknown := sorted(set(folders or ()) - {str(one["name"]) for one in named}):
        known = ", ".join(str(one["name"]) for one in named) or "none"
        raise ValueError(f"{where} has no encoder {', '.join(unknown)}; it has {known}")
    for section in named:
        if (folder := (folders or {}).get(section["name"])) is not None:
            section |= {"name": folder, "revision": None}
    return check_recipe(values, where)


def kinds_of(record: RecipeRecord) -> dict[str, str]:
    """Modality -> the kind of its features, with the encoder's name where it has one: `{"audio": "encoder microsoft/wavlm-base-plus"}`."""
    sections = {name: record["values"].get(name) for name in ("audio", "video", "text")}
    return {
        name: " ".join([str(section.get("kind")), *([str(section["name"])] if "name" in section else [])])
        for name, section in sections.items()
        if isinstance(section, Mapping)
    }


def name_of(record: RecipeRecord | None) -> str:
    """How messages call a recipe: by its name where it is one of the package's, else by its kinds; and its hash."""
    if record is None:
        return "no recipe"
    kinds = ", ".join(f"{name} {kind}" for name, kind in kinds_of(record).items() if kind != "given")
    return f"recipe {shipped_name(record) or kinds} ({record['hash'][:SHOWN]})"


def shipped_name(record: RecipeRecord) -> str | None:
    """The name of the shipped recipe that has these values; None where none has."""
    return next(
        (one.name for one in list_recipes() if read_recipe(one.path).model_dump(mode="json") == record["values"]), None
    )


def differences_of(saved: RecipeRecord, here: RecipeRecord) -> list[str]:
    """One readable line for each difference; empty where both are one recipe."""
    if saved["hash"] == here["hash"]:
        return []
    from trainer.features.identity import differences

    return list(differences(saved, here)) or [f"hash: {saved['hash'][:SHOWN]} there, {here['hash'][:SHOWN]} here"]


def several_recipes(found: Mapping[str, RecipeRecord | None]) -> list[str]:
    """A fault, with the differences, for every place whose recipe is not that of the first; empty where all have one, or none has."""
    places = list(found)
    faults = []
    for place in places[1:]:
        first, other = found[places[0]], found[place]
        if first is None or other is None:
            if first is not other:
                names = f"{places[0]} has {name_of(first)}, {place} has {name_of(other)}"
                faults.append(f"{names}: features of one dataset come from one recipe")
        elif lines := differences_of(first, other):
            faults.append(described(f"{place} was extracted by another recipe than {places[0]}", lines))
    return faults


def described(head: str, lines: Sequence[str]) -> str:
    """A fault and the differences under it."""
    return "\n".join([f"{head}:", *(f"  {line}" for line in lines)])
