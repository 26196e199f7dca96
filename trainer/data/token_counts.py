"""How many tokens the texts of a prepared dataset have: counted once, in memory and in the dataset's folder for later runs.

Whatever a count depends on is in its file's name: the texts themselves, the tokenizer with all its rules, how pieces are joined, and the
versions of the libraries that tokenise. So a file is never wrong because something else changed; it is only no longer found.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import secrets
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from trainer.text import Pieces

log = logging.getLogger(__name__)

FOLDER = ".token-counts"  # in that of the dataset
FORMAT = 1  # of the files, and of what is counted: to be raised with any change to :meth:`trainer.text.Pieces.count`
LEAST = 1000  # texts; fewer are sooner counted than looked for
DTYPE = np.dtype("<i4")


class TokenCounts:
    """Counts tokens as :meth:`trainer.text.Pieces.count` does, the same texts once.

    Files appear whole or not at all, so any number of processes may use a folder at once. A folder that cannot be written, and
    a file that is damaged, cost only the time of counting.

    Args:
        dataset: the folder of the prepared dataset; None: nothing is kept on disk.
    """

    def __init__(self, pieces: Pieces, dataset: Path | None = None) -> None:
        self.pieces = pieces
        self.folder = None if dataset is None else dataset / FOLDER
        self._known: dict[str, np.ndarray] = {}

    def of(self, texts: Sequence[str]) -> np.ndarray:
        """`[N]`: the tokens of each text; not to be written to."""
        digest = _digest(texts)
        if digest not in self._known:
            counts_N = self._counted(texts, digest)
            counts_N.flags.writeable = False
            self._known[digest] = counts_N
        return self._known[digest]

    def _counted(self, texts: Sequence[str], digest: str) -> np.ndarray:
        if self.folder is None or len(texts) < LEAST or self._tokenizer is None:
            return self.pieces.count(texts)
        path = self.folder / f"{_digest([self._tokenizer, digest])}.npy"
        counts_N = _read(path, len(texts))
        if counts_N is None:
            counts_N = self.pieces.count(texts)
            _write(path, counts_N)
        return counts_N

    @cached_property
    def _tokenizer(self) -> str | None:
        """All that the counts depend on but the texts; None for a tokenizer in Python, which cannot be written out whole."""
        tokenizer = self.pieces.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not hasattr(backend, "to_str"):
            return None
        versions = [importlib.metadata.version(name) for name in ("tokenizers", "transformers")]
        added = repr(sorted(tokenizer.added_tokens_decoder.items()))
        words = [str(FORMAT), type(tokenizer).__qualname__, self.pieces.joining, *versions, added, backend.to_str()]
        return _digest(words)


def _digest(texts: Iterable[str]) -> str:
    """SHA-256 of texts, their borders included."""
    total = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", errors="surrogatepass")
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def _read(path: Path, n: int) -> np.ndarray | None:
    """The counts in a file; None where it is absent, cannot be read or is not what :func:`_write` wrote."""
    try:
        counts_N = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        log.debug("%s is left out: %s", path, error)
        return None
    if not isinstance(counts_N, np.ndarray) or counts_N.dtype != DTYPE or counts_N.shape != (n,) or counts_N.min() < 0:
        log.debug("%s is left out: it does not hold the counts of %d texts", path, n)
        return None
    return counts_N.astype(np.int64)


def _write(path: Path, counts_N: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(exist_ok=True)
        with temporary.open("xb") as stream:
            np.save(stream, counts_N.astype(DTYPE), allow_pickle=False)
        os.replace(temporary, path)
    except OSError as error:
        log.debug("%s is not kept: %s", path, error)
        with contextlib.suppress(OSError):
            temporary.unlink()
