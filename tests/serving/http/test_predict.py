"""Answers over HTTP are those of the predictor, whatever form the request has and whatever else is in the batch."""

from __future__ import annotations

import base64
import io
import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from tests.serving.http.servers import InThread, form, serving
from trainer.serving.predictor import Predictor

TOLERANCE = 1e-5  # of fp32, as stated for batches


def samples(n: int, seed: int = 0, task: str = "meld") -> list[dict[str, Any]]:
    """With ragged features, or without."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        one: dict[str, Any] = {"id": f"s{i}", "task": task, "text": "so " * int(rng.integers(1, 30)) + f"number {i}"}
        if i % 3:
            one["audio"] = rng.normal(size=(int(rng.integers(1, 30)), 6)).astype(np.float32)
        if i % 4:
            one["video"] = rng.normal(size=(int(rng.integers(1, 12)), 5)).astype(np.float32)
        found.append(one)
    return found


def as_lists(one: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in one.items()}


def packed(array: np.ndarray, kind: str, name: str = "audio") -> bytes:
    out = io.BytesIO()
    if kind == "npy":
        np.save(out, array, allow_pickle=False)
    else:
        (np.savez_compressed if kind == "compressed" else np.savez)(out, **{name: array})
    return out.getvalue()


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float = TOLERANCE) -> None:
    assert [(one["id"], one["task"]) for one in found] == [(one["id"], one["task"]) for one in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key in ("probabilities", "gate_expert"):
            assert a[key].keys() == b[key].keys()
            assert all(math.isclose(a[key][name], b[key][name], abs_tol=tolerance) for name in a[key])
        if isinstance(a["prediction"], float):
            assert math.isclose(a["prediction"], b["prediction"], abs_tol=tolerance)
        for expert, weights in a["gate_modality"].items():
            assert all(math.isclose(weights[m], b["gate_modality"][expert][m], abs_tol=tolerance) for m in weights)


def plain(predictor: Predictor, given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one.plain() for one in predictor.predict(given)]


@pytest.mark.parametrize("task", ["meld", "simsv2"])
def test_answers_are_those_of_the_predictor(server: InThread, predictor: Predictor, task: str) -> None:
    given = samples(9, task=task)
    reply = server.predict([as_lists(one) for one in given], probabilities=True, gates=True)
    assert reply.status == 200, reply.body
    assert_close(reply.json["predictions"], plain(predictor, given))


@pytest.mark.parametrize("kind", ["npz", "compressed", "npy"])
def test_arrays_as_bytes_are_those_of_lists(server: InThread, kind: str) -> None:
    [one] = samples(2)[1:]
    key = "npy" if kind == "npy" else "npz"
    coded = {name: {key: base64.b64encode(packed(one[name], kind, name)).decode()} for name in ("audio", "video")}
    by_bytes = server.predict([{**one, **coded}], probabilities=True)
    by_lists = server.predict([as_lists(one)], probabilities=True)
    assert by_bytes.status == by_lists.status == 200, by_bytes.body
    assert by_bytes.json == by_lists.json


def test_a_form_is_the_same_request(server: InThread) -> None:
    [one] = samples(2)[1:]
    expected = server.predict([{**as_lists(one), "rate": {"audio": 10}}], probabilities=True, gates=True).json
    both = io.BytesIO()
    np.savez(both, audio=one["audio"], video=one["video"])
    fields = {
        "id": one["id"],
        "text": one["text"],
        "task": "meld",
        "probabilities": "true",
        "gates": "true",
        "audio_rate": "10",
    }
    for files in (
        {"features": both.getvalue()},
        {"audio": packed(one["audio"], "npy"), "video": packed(one["video"], "npz", "video")},
    ):
        reply = server.ask("POST", "/v1/predict", *form(fields, files))
        assert reply.status == 200, reply.body
        assert reply.json == expected


def test_only_what_is_asked_for_is_answered(server: InThread) -> None:
    [short] = server.predict([{"text": "hello", "task": "meld"}]).json["predictions"]
    assert set(short) == {"id", "task", "prediction", "valid", "answer"}
    assert short["id"] == "0"
    [full] = server.predict([{"text": "hello", "task": "meld"}], probabilities=True).json["predictions"]
    assert math.isclose(sum(full["probabilities"].values()), 1, abs_tol=1e-5)
    assert "gate_expert" not in full


def test_a_dialogue_in_one_request_is_a_history(server: InThread, predictor: Predictor) -> None:
    told = [
        {"id": f"d-{i}", "task": "meld", "text": f"utterance {i}", "dialogue": "d", "turn": i, "speaker": "Ann"}
        for i in range(3)
    ]
    together = server.predict(told, probabilities=True, gates=True).json["predictions"]
    assert_close(together, plain(predictor, told))
    alone = server.predict(told[2:], probabilities=True, gates=True).json["predictions"]
    assert together[2]["probabilities"] != alone[0]["probabilities"]


def test_what_is_repaired_is_noted(server: InThread) -> None:
    reply = server.predict([{"id": "n", "task": "meld", "text": "x", "audio": [[0.0] * 6, [0.0] * 6]}])
    assert reply.status == 200
    assert reply.json["notes"] == [{"id": "n", "notes": ["nothing but zeros in audio: counted as missing"]}]


def test_answers_do_not_depend_on_the_batch(predictor: Predictor) -> None:
    """32 clients at once, whose samples share batches, against one sample at a time."""
    given = samples(32, seed=1)
    with serving(predictor, unbatched=True) as alone:
        expected = [
            alone.predict([as_lists(one)], probabilities=True, gates=True).json["predictions"][0] for one in given
        ]
    with serving(predictor) as together, ThreadPoolExecutor(32) as clients:
        replies = list(
            clients.map(lambda one: together.predict([as_lists(one)], probabilities=True, gates=True), given)
        )
        figures = together.get("/metrics").body.decode()
    assert_close([reply.json["predictions"][0] for reply in replies], expected)
    batches = float(figures.split("egmf_batch_samples_count ")[1].split()[0])
    assert batches < 32  # they did share


def test_tasks_say_what_the_model_reads(server: InThread) -> None:
    told = server.get("/v1/tasks").json
    assert set(told["tasks"]) == {"meld", "simsv2"}
    assert told["tasks"]["meld"]["labels"][0] == "neutral"
    assert told["tasks"]["simsv2"]["grid"] == {"low": -1.0, "high": 1.0, "step": 0.1}
    assert told["tasks"]["meld"]["inputs"] == {"audio": {"width": 6, "rate": 10.0}, "video": {"width": 5, "rate": 5.0}}
    assert told["tasks"]["simsv2"]["language"] == "zh"
    assert told["clips"] == {"taken": False, "why_not": "the server was started without (--clip-workers 0)"}
    assert told["limits"]["max_samples"] == 16
    assert "/" not in json.dumps(told["tasks"]["meld"]["inputs"])


def test_the_openapi_examples_are_answered(server: InThread) -> None:
    told = server.get("/openapi.json").json
    content = told["paths"]["/v1/predict"]["post"]["requestBody"]["content"]["application/json"]
    assert len(content["examples"]) >= 3
    for example in content["examples"].values():
        value = example["value"]
        value["samples"] = [{**one, "task": "meld"} for one in value["samples"]]
        reply = server.post(json.dumps(value).encode())
        assert reply.status == 200, reply.body
        assert len(reply.json["predictions"]) == len(value["samples"])
    for path in ("/docs", "/redoc"):
        assert server.get(path).status == 404


def test_figures_are_those_of_what_happened(server: InThread) -> None:
    def figure(name: str) -> float:
        lines = [line for line in server.get("/metrics").body.decode().splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    before = figure('egmf_predictions_total{task="simsv2"}'), figure('egmf_refused_total{code="bad_json"}')
    server.predict([{"text": "a", "task": "simsv2"}, {"id": "b", "text": "b", "task": "simsv2"}])
    server.post(b"{")
    after = figure('egmf_predictions_total{task="simsv2"}'), figure('egmf_refused_total{code="bad_json"}')
    assert (after[0] - before[0], after[1] - before[1]) == (2, 1)
    assert figure("egmf_ready") == 1
    assert figure("egmf_queue_samples") == figure("egmf_held_bytes") == 0
