"""Who may ask, and what a browser may do with the answers: tokens, the Host and Origin headers, and headers of every response."""

from __future__ import annotations

import hmac
import ipaddress
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.serving.http.faults import RefusedError

SHORTEST_TOKEN = 16  # characters
OPEN = ("/", "/page.css", "/page.js", "/healthz", "/readyz")  # paths that need no token: they tell nothing of the model
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; media-src 'self' blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(self), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def read_token(path: Path) -> tuple[str, list[str]]:
    """The token in a file, and what its user should know.

    Raises:
        ValueError: no such file, or no token in it.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
        mode = stat.S_IMODE(path.stat().st_mode)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"--token-file {path} cannot be read: {why}") from error
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"--token-file {path}: a token is one line of ASCII characters without spaces")
    if len(text) < SHORTEST_TOKEN:
        raise ValueError(
            f"--token-file {path}: the token has {len(text)} characters, at least {SHORTEST_TOKEN} are needed: "
            f"openssl rand -hex 32 > {path}"
        )
    others = mode & (stat.S_IRGRP | stat.S_IROTH)
    return text, [f"{path} can be read by other users: chmod 600 {path}"] if others and os.name == "posix" else []


def is_loopback(host: str) -> bool:
    """Whether an address, or the name localhost, is that of this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_host(host: str, token: str | None) -> None:
    """Raises ValueError where others could reach a server that asks for no token."""
    if token is None and not is_loopback(host):
        raise ValueError(
            f"--host {host} can be reached by others, and without a token everybody who reaches it is answered: make one "
            "(openssl rand -hex 32 > token; chmod 600 token) and give --token-file token, or keep --host 127.0.0.1"
        )


class Gate:
    """Refuses requests that may not be answered.

    Args:
        token: which `Authorization: Bearer` must have; None: nobody is asked.
        hosts: names that the Host header may have beside those of the loopback; None: any.
    """

    def __init__(self, token: str | None, hosts: Sequence[str] | None) -> None:
        self._token = None if token is None else token.encode()
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Raises RefusedError: 421 for another host, 403 for a page of another site, 401 without the token."""
        host = headers.get("host", "")
        if self._hosts is not None and not self._is_ours(_without_port(host)):
            raise RefusedError(
                421, "wrong_host", "the Host header names another machine than this server answers for (--allow-host)"
            )
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise RefusedError(403, "other_site", "pages of other sites may not ask this server")
        if self._token is not None and path not in OPEN and not self._has_token(headers.get("authorization", "")):
            raise RefusedError(
                401,
                "no_token",
                "this server asks for a token: send the header Authorization: Bearer TOKEN",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _is_ours(self, host: str) -> bool:
        return is_loopback(host) or host.lower() in (self._hosts or ())

    def _has_token(self, given: str) -> bool:
        assert self._token is not None
        scheme, _, token = given.partition(" ")
        found = token.strip().encode("utf-8", "replace")
        return hmac.compare_digest(found, self._token) and scheme.lower() == "bearer"


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
