"""The layers of a config: YAML files that extend each other, and overrides on top, merged before they are checked.

``extends: other.yaml`` (a path or a list of paths, relative to the file) is merged underneath a file, and dotted overrides
(``train.lr.fusion=1e-3``) on top. A config that comes with the package goes by its name, ``meld``, on the command line and behind
``extends``.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trainer.files import check_nesting, load_yaml
from trainer.schema import dotted
from trainer.shipped import locate, nearest_config

Layer = DictConfig | Mapping[str, Any]


class ConfigError(ValueError):
    """A config that cannot be run; the message lists every fault with its dotted key."""


def read_mapping(path: Path, expected: str) -> DictConfig:
    """A YAML file that holds a mapping.

    Raises:
        ConfigError: it cannot be read, or holds something else than `expected`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        check_nesting(text)
        node = OmegaConf.load(io.StringIO(text))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{path} must hold {expected}")
    return node


def read_plain(path: Path) -> dict[str, Any]:
    """The config in a run folder, which has its values written out. The folder may be somebody else's, so nothing that it refers to
    is read: neither other files nor the environment.

    Raises:
        ConfigError: it cannot be read, is not a mapping, or refers to something.
    """
    plain = cast(dict[str, Any], OmegaConf.to_container(read_mapping(path, "the config of a run"), resolve=False))
    refers = ["extends"] if "extends" in plain else []
    refers += [f"{key} ({value})" for key, value in dotted(plain).items() if "${" in str(value)]
    if refers:
        raise ConfigError(
            f"{path} refers to other files or to the environment: {', '.join(refers)}. A run's config has every value written out, as "
            "egmf train leaves it: write the values"
        )
    return plain


def read_layers(path: Path, chain: tuple[Path, ...] = ()) -> DictConfig:
    """A file with what it extends underneath.

    Raises:
        ConfigError: a file that is absent, is not a mapping in YAML, or extends itself; `chain` are those that extend it.
    """
    here = path.resolve()
    if here in chain:
        loop = " -> ".join(str(p) for p in (*chain, here))
        raise ConfigError(f"{path}: extends itself: {loop}")
    if not here.is_file():
        by = f", extended by {chain[-1]}" if chain else ""
        raise ConfigError(f"no config file {path}{by}{nearest_config(path)}")
    node = read_mapping(path, "a mapping of sections, such as 'task: meld'")
    bases = node.pop("extends", None)
    bases = [] if bases is None else [bases] if isinstance(bases, str) else list(bases)
    found = [locate(base, here.parent) for base in bases]
    if other := [
        str(base) for base, at in zip(bases, found, strict=True) if at.is_file() and at.suffix not in (".yaml", ".yml")
    ]:
        raise ConfigError(
            f"{path}: extends names {', '.join(other)}: a YAML file, or a shipped config by its name, was expected"
        )
    parents = [read_layers(at, (*chain, here)) for at in found]
    return cast(DictConfig, _merged([*parents, node], str(path)))


def parse_overrides(overrides: Sequence[str], is_text: Callable[[str], bool] = lambda key: False) -> DictConfig:
    """``dotted.key=value`` words as one layer; values are YAML, those of keys that hold text are taken as they are written.

    So a path may hold ``#``, ``:`` or any other sign that means something in YAML. Text that is quoted as a whole, ``null``,
    and text with a reference (``${…}``) are YAML for every key.

    Raises:
        ConfigError: what is not of this form, or no value in YAML.
    """
    bad = [o for o in overrides if "=" not in o or o.startswith("=")]
    if bad:
        raise ConfigError(f"overrides are written key=value, such as train.zero=3; not: {', '.join(bad)}")
    try:
        return OmegaConf.from_dotlist([_quoted(one) if is_text(one.partition("=")[0]) else one for one in overrides])
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"overrides {' '.join(overrides)}: {error}") from error


def _quoted(override: str) -> str:
    """``key=text`` with the text as YAML's quoted text, unless it is YAML as it stands."""
    key, _, text = override.partition("=")
    if text in ("", "~", "null") or "${" in text:
        return override
    if text[0] in "\"'" and text[-1] == text[0] and len(text) > 1:
        with contextlib.suppress(YAMLError):
            if isinstance(load_yaml(text), str):
                return override
    return f"{key}={json.dumps(text, ensure_ascii=False)}"


def merge(base: Layer, over: Layer, where: str) -> dict[str, Any]:
    """One layer over another, as plain values.

    Raises:
        ConfigError: the layers do not fit, or a reference in them leads nowhere; `where` begins the message.
    """
    merged = _merged([base, over], where)
    try:
        return cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {error}") from error


def _merged(layers: Sequence[Layer], where: str) -> Any:
    """The layers one over another; OmegaConf refuses a list over a section, or a section over a list, without saying where."""
    for under, over in itertools.pairwise(layers):
        if clashes := list(_clashes(under, over)):
            raise ConfigError(
                "\n  ".join([f"{where}: {len(clashes)} fault{'s' if len(clashes) > 1 else ''}", *clashes])
            )
    try:
        return OmegaConf.merge(*layers)
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _clashes(under: Any, over: Any, key: str = "") -> Iterator[str]:
    """Where one of two layers has a section and the other a list."""
    plain = OmegaConf.to_container
    under, over = (plain(layer) if isinstance(layer, DictConfig) else layer for layer in (under, over))
    if isinstance(under, Mapping) and isinstance(over, list):
        yield f"{key}: must be a section with keys such as {', '.join(map(str, list(under)[:3]))}, not a list"
    elif isinstance(under, list) and isinstance(over, Mapping):
        yield f"{key}: must be a list, not a section"
    elif isinstance(under, Mapping) and isinstance(over, Mapping):
        for name in over:
            if name in under:
                yield from _clashes(under[name], over[name], f"{key}.{name}" if key else str(name))
