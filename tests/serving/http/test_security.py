"""Who is answered: tokens, hosts, pages of other sites; and what every response tells a browser."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.http.conftest import SMALL
from tests.serving.http.servers import InThread, serving
from trainer.serving.http.security import check_host, is_loopback, read_token
from trainer.serving.http.server import serve
from trainer.serving.http.settings import ModelChoice, ServerSettings
from trainer.serving.predictor import Predictor

TOKEN = "0123456789abcdef0123456789abcdef"
ONE = [{"text": "one", "task": "meld"}]


@pytest.fixture(scope="module")
def guarded(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InThread]:
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    with serving(predictor, SMALL, token_file=file) as running:
        yield running


@pytest.mark.parametrize(
    "given", ["", "Bearer", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer \xe4"]
)
@pytest.mark.parametrize("path", ["/v1/tasks", "/metrics", "/openapi.json", "/nothing"])
def test_without_the_token_nothing_is_told(guarded: InThread, given: str, path: str) -> None:
    reply = guarded.get(path, **({"Authorization": given} if given else {}))
    assert (reply.status, reply.error["code"]) == (401, "no_token")
    assert reply.headers["www-authenticate"] == "Bearer"


def test_with_the_token_all_is_answered(guarded: InThread) -> None:
    right = {"Authorization": f"Bearer {TOKEN}"}
    assert guarded.predict(ONE).status == 401
    assert guarded.predict(ONE, right).status == 200
    assert guarded.get("/v1/tasks", **right).status == 200
    for path in ("/", "/page.css", "/page.js", "/healthz", "/readyz"):
        assert guarded.get(path).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:80", "192.168.0.1", "", "localhost.evil.example"]
)
def test_names_of_other_machines_are_refused(server: InThread, host: str) -> None:
    reply = server.get("/v1/tasks", Host=host)
    assert (reply.status, reply.error["code"]) == (421, "wrong_host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:8000", "127.8.9.1:1"])
def test_names_of_this_machine_are_not(server: InThread, host: str) -> None:
    assert server.get("/v1/tasks", Host=host).status == 200


def test_a_name_can_be_allowed(predictor: Predictor) -> None:
    with serving(predictor, SMALL, hosts=("model.example",)) as running:
        assert running.get("/healthz", Host="model.example").status == 200
        assert running.get("/healthz", Host="other.example").status == 421


def test_pages_of_other_sites_are_refused(server: InThread) -> None:
    for origin in ("http://evil.example", "null", f"http://localhost:{server.port}"):
        reply = server.predict(ONE, {"Origin": origin, "Host": f"127.0.0.1:{server.port}"})
        assert (reply.status, reply.error["code"]) == (403, "other_site")
        assert "access-control-allow-origin" not in reply.headers
    own = f"127.0.0.1:{server.port}"
    assert server.predict(ONE, {"Origin": f"http://{own}", "Host": own}).status == 200


@pytest.mark.parametrize("path", ["/", "/v1/tasks", "/nothing", "/v1/predict", "/../etc/passwd"])
def test_every_response_keeps_browsers_in(server: InThread, path: str) -> None:
    headers = server.get(path).headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "server" not in headers


def test_nothing_that_a_client_wrote_is_logged(server: InThread, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        server.predict([{"text": "a secret thing", "task": "meld", "id": "secretid"}])
        server.get("/secretpath?secretquery", Authorization="Bearer secrettoken")
        server.post(b'{"secretkey": 1', {"X-Secret": "secretheader"})
        server.post(b"\xff secretbytes", {"Content-Type": "multipart/form-data; boundary=secretmark"})
    assert "secret" not in caplog.text
    assert "POST /v1/predict 200" in caplog.text


def test_others_reach_no_server_without_a_token() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.2", "model.example"):
        with pytest.raises(ValueError, match="without a token everybody"):
            serve(ServerSettings(ModelChoice("/nowhere"), host=host))
        check_host(host, TOKEN)
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.9.9.9")))


def test_tokens_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "token"
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_token(file)
    for text, words in (
        ("short", "at least 16"),
        ("", "at least 16"),
        ("a b" * 9, "without spaces"),
        ("é" * 20, "ASCII"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_token(file)
    file.write_text(TOKEN)
    file.chmod(0o644)
    assert read_token(file) == (TOKEN, [f"{file} can be read by other users: chmod 600 {file}"])
    file.chmod(0o600)
    assert read_token(file) == (TOKEN, [])


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.serving.http.server.PACKAGES", {"json": "json", "no_such_module": "no-such-package"})
    with pytest.raises(ValueError, match=r"needs no-such-package: pip install 'egmf-trainer\[serve\]'"):
        serve(ServerSettings(ModelChoice("/nowhere")))
