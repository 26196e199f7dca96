"""Somebody else's run folder runs no code here, unless its user has agreed to just that code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import egmf
from tests.results.seeded import make_seeded
from trainer.config import RunConfig, check_config, dump_config
from trainer.run.guards.dump import ABOUT
from trainer.trust import UntrustedCodeError, check_trust, remember, trust_file

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def nothing_agreed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGMF_CONFIG_DIR", str(tmp_path / "settings"))


def config(backbone: dict[str, Any] | None = None, plugins: list[str] | None = None) -> RunConfig:
    fusion = {"plugins": plugins} if plugins else {}
    return check_config({"task": "meld", "model": {"backbone": backbone or {}, "fusion": fusion}})


def refusal(given: RunConfig, agreed: str | None = None) -> str:
    with pytest.raises(UntrustedCodeError) as raised:
        check_trust(Path("theirs"), given, agreed)
    return str(raised.value)


def asked(message: str) -> str:
    found = re.search(r"--trust-code (\w+);", message)
    assert found is not None, message
    return found[1]


def test_a_config_without_code_needs_no_consent() -> None:
    check_trust(Path("theirs"), config())
    check_trust(Path("theirs"), config({"name": "org/model"}))


@pytest.mark.parametrize("kind", ["plugin", "model"])
def test_consent_is_for_the_code_as_it_is(kind: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    code = model / "modeling_theirs.py"
    code.write_text("x = 1\n")
    given = config(plugins=[str(code)]) if kind == "plugin" else config({"name": str(model), "trust_remote_code": True})
    message = refusal(given)
    assert "modeling_theirs.py" in message
    assert "Read it" in message
    wanted = asked(message)
    for wrong in ("", "0" * 16, wanted[:8]):
        assert "is not the hash" in refusal(given, wrong)
    check_trust(Path("theirs"), given, wanted)
    check_trust(Path("theirs"), given)  # from then on
    code.write_text("x = 2\n")
    assert asked(refusal(given)) != wanted
    assert "is not the hash" in refusal(given, wanted)
    if kind == "model":
        code.write_text("x = 1\n")
        (model / "more.py").write_text("y = 1\n")
        assert "more.py" in refusal(given)
        check_trust(Path("theirs"), config({"name": str(model)}))  # without its code


def test_who_trains_with_code_has_agreed_to_it_wherever_it_lies(tmp_path: Path) -> None:
    for place in ("mine", "moved"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "expert.py").write_text("x = 1\n")
    remember(config(plugins=[str(tmp_path / "mine" / "expert.py")]))
    check_trust(Path("mine"), config(plugins=[str(tmp_path / "moved" / "expert.py")]))
    assert list(json.loads(trust_file().read_text()).values()) == [[str(tmp_path / "mine" / "expert.py")]]


def test_a_model_of_the_hub_is_agreed_to_by_its_commit() -> None:
    free = config({"name": "org/model", "trust_remote_code": True})
    assert "model.backbone.revision=<the commit that you read>" in refusal(free, "0" * 16)
    pinned = config({"name": "org/model", "trust_remote_code": True, "revision": REVISION})
    message = refusal(pinned)
    assert f"org/model at revision {REVISION}" in message
    check_trust(Path("theirs"), pinned, asked(message))
    other = config({"name": "org/model", "trust_remote_code": True, "revision": REVISION[::-1]})
    refusal(other)


def test_code_that_a_model_folder_names_in_another_repository_cannot_be_agreed_to(tmp_path: Path) -> None:
    """The folder has no code of its own, and transformers would fetch and run what is there by then."""
    auto_map = {"AutoModelForCausalLM": "evil/repo--modeling.Model", "AutoTokenizer": [None, "evil/repo--tok.Fast"]}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    given = config({"name": str(tmp_path), "trust_remote_code": True})
    message = refusal(given, "0" * 16)
    assert "evil/repo--modeling.Model" in message
    assert "evil/repo--tok.Fast" in message
    assert "--trust-code" not in message
    check_trust(Path("theirs"), config({"name": str(tmp_path)}))


def test_a_damaged_file_of_consents_agrees_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "expert.py").write_text("x = 1\n")
    given = config(plugins=[str(tmp_path / "expert.py")])
    remember(given)
    trust_file().write_text("{")
    refusal(given)


def test_no_command_runs_the_code_of_a_foreign_run(tmp_path: Path) -> None:
    run = make_seeded(tmp_path / "theirs", 1)
    marker = tmp_path / "it ran"
    (run / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (run / "model").mkdir()
    (run / "model" / "modeling.py").write_text(f"open({str(marker)!r}, 'w')\n")
    backbone = {"name": str(run / "model"), "trust_remote_code": True}
    (run / "config.yaml").write_text(dump_config(config(backbone, [str(run / "evil.py")])))
    (run / "nonfinite" / "step-1").mkdir(parents=True)
    (run / "nonfinite" / "step-1" / ABOUT).write_text("{}")
    (tmp_path / "new.jsonl").write_text('{"text": "hi"}\n')
    for command in (
        ("evaluate", str(run)),
        ("predict", str(run), "--input", str(tmp_path / "new.jsonl"), "--out", str(tmp_path / "answers.jsonl")),
        ("robustness", str(run)),
        ("replay", str(run / "nonfinite" / "step-1")),
    ):
        done = egmf(*command, EGMF_CONFIG_DIR=str(tmp_path / "settings"))
        assert done.returncode == 1, (command, done.stderr)
        assert "would run Python code" in done.stderr
        assert "evil.py" in done.stderr
        assert "modeling.py" in done.stderr
        assert not marker.exists()
    for command in (
        ("show", str(run)),
        ("runs", str(tmp_path)),
        ("report", str(run)),
        ("compare", str(run), "--no-log"),
    ):
        egmf(*command)
        assert not marker.exists()
