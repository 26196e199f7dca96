"""SQLite files as the URIs of MLflow's stores: whatever characters a path has, SQLAlchemy opens just this file."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote, unquote

PREFIX = "sqlite:///"
DRIVER = "sqlite+pysqlite:///"  # the same to SQLAlchemy; MLflow makes a folder of what follows the shorter one, as it is written
_PLAIN = re.compile(r"[^?#%]*")  # characters that every version of SQLAlchemy takes as they are


def sqlite_uri(path: Path) -> str:
    """The URI of an SQLite file at an absolute path.

    ``?`` begins a query in a URI, and versions of SQLAlchemy differ in whether they decode ``%3F``: the first spelling that
    the installed one reads as this path is taken.

    Raises:
        ValueError: no spelling is.
    """
    plain = f"{PREFIX}{path}"
    if _PLAIN.fullmatch(str(path)):
        return plain
    once = quote(str(path))
    for uri in (f"{DRIVER}{once}", f"{DRIVER}file:{once}?uri=true", f"{DRIVER}file:{quote(once)}?uri=true"):
        if sqlite_file(uri) == path:
            return uri
    raise ValueError(f"SQLAlchemy cannot open {path}: choose a run folder whose path has no ?, # and %")


def sqlite_file(uri: str) -> Path | None:
    """The file that a URI of SQLite names; None for another store, and for one in memory.

    Raises:
        ValueError: it begins like one and is none.
    """
    if not uri.startswith((PREFIX, DRIVER)):
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
        (name,), options = url.get_dialect()().create_connect_args(url)
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"{uri} does not name an SQLite file: {error}") from error
    if options.get("uri"):
        name = unquote(name.partition("?")[0].removeprefix("file:"))
    return None if name == ":memory:" else Path(name)
