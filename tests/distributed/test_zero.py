"""Two real processes under ZeRO 0 to 3 against plain PyTorch on the same global batch."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from tests.distributed.cases import (
    CASES,
    LABEL_TASKS,
    OBJECTIVES,
    PLANTED,
    QUICK,
    STEPS,
    SUPPORTED,
    Case,
    backbone_of,
    config_of,
)
from tests.distributed.processes import run_ranks
from tests.toy import prepare_toy
from trainer.checkpoint.weights import trainable_tensors
from trainer.data.imbalance import training_sampler
from trainer.distributed.world import World
from trainer.models.optimizer_groups import parameter_groups
from trainer.run.assemble import RunComponents, assemble

pytestmark = pytest.mark.distributed

LOSS = {"fp32": 2e-6, "bf16": 6e-3}  # relative; bf16 ranks sum rounded gradients in another order
HOST_ADAM = 1e-5  # DeepSpeed's CPU Adam rounds otherwise than torch's AdamW
PROBABILITY = {"fp32": 2e-5, "bf16": 5e-2}
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    for name in ("meld", "simsv2"):
        prepare_toy(name, folder)
    for name, definition in LABEL_TASKS.items():
        (folder / f"{name}.yaml").write_text(definition)
        prepare_toy(str(folder / f"{name}.yaml"), folder)
    return folder


Results = dict[str, Any]


@pytest.fixture(scope="module")
def ranks(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], tuple[Results, Results]]:
    """What two processes found in a case, and what plain PyTorch finds, from the same offline backbones.

    The quick cases are computed in one launch and the others in another; the reference once for every computation, from what the
    quick launch left where one of its cases computes the same: `make test` needs no other.
    """

    @functools.cache
    def launched(which: str) -> tuple[Path, Results]:
        out = tmp_path_factory.mktemp(which)
        run_ranks("tests.distributed.zero_worker", str(data), str(out), which, timeout=800)
        torch.set_num_threads(1)
        return out, json.loads((out / "results.json").read_text())

    @functools.cache
    def plain(computed: object) -> Results:
        case = min((case for case in CASES if case.computed == computed), key=lambda case: case.name not in QUICK)
        return plain_training(case, data, launched(_launch_of(case))[0])

    return lambda case: (launched(_launch_of(case))[1][case.name], plain(case.computed))


def _launch_of(case: Case) -> str:
    return "quick" if case.name in QUICK else "rest"


def plain_training(case: Case, data: Path, backbones: Path) -> dict[str, Any]:
    """The same run in plain PyTorch: one process, sample by sample, torch's own AdamW, clipping and schedule."""
    config = config_of(case, data, engine=False)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    parts: RunComponents = assemble(config, backbone_of(config, backbones), ALONE, dtype)
    model = parts.model.train()
    rates = config.train.lr
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    master = {name: p.detach().float().clone().requires_grad_() for name, p in trained.items()}
    groups: dict[tuple[float, float], list[torch.Tensor]] = {}
    for group in parameter_groups(model, rates.fusion, rates.backbone, config.train.weight_decay):
        for p in group["params"]:
            name = next(n for n, q in trained.items() if q is p)
            groups.setdefault((group["lr"], group["weight_decay"]), []).append(master[name])
    optimizer = torch.optim.AdamW(
        [{"params": ps, "lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()],
        betas=config.train.betas,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, round(config.train.warmup * STEPS), STEPS)
    order = training_sampler(config, {name: opened["train"] for name, opened in parts.data.items()})
    losses, auxiliary_losses = [], []
    for step in range(STEPS):
        batch = order.step(step)
        view, collate = parts.data[batch.task]["train"], parts.collators[batch.task]
        loss = auxiliary_loss = 0.0
        weights = [float(collate([view[i]]).weight_B) for i in batch.indices]
        for i, weight in zip(batch.indices, np.array(weights) / sum(weights), strict=True):
            output = model(collate([view[i]], epoch=batch.epoch).to("cpu", dtype))
            share = float(weight) * (output.loss_B.sum() + output.auxiliary_B.sum()) + output.unused_param_zero
            share.backward()
            loss += float(output.loss_B.detach().sum()) * weight
            auxiliary_loss += float(output.auxiliary_B.detach().sum()) * weight
        losses.append(loss)
        auxiliary_losses.append(auxiliary_loss)
        if case.plant and step == PLANTED:  # nothing moves but the schedule
            for p in trained.values():
                p.grad = None
            schedule.step()
            if model.fusion is not None:
                model.fusion.gate.discard_usage()
            continue
        for name, p in trained.items():
            master[name].grad = p.grad.float()
            p.grad = None
        torch.nn.utils.clip_grad_norm_(master.values(), config.train.clip)
        optimizer.step()
        schedule.step()
        if model.fusion is not None:
            model.fusion.gate.update_usage()
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(master[name])
    state = {name: float(t.double().square().sum().sqrt()) for name, t in trainable_tensors(model).items()}
    return {
        "losses": losses,
        "auxiliary_loss": auxiliary_losses,
        "state": state,
        "probabilities": _probabilities(parts, dtype),
    }


@torch.no_grad()
def _probabilities(parts: RunComponents, dtype: torch.dtype) -> dict[str, list[float]]:
    out = {}
    model = parts.model.eval()
    for name, opened in parts.data.items():
        for sample in opened["valid"]:
            batch = parts.collators[name]([sample], answers=False).to("cpu", dtype)
            score = model(batch, parts.tries[name]).logprob_BC[0].double()
            if parts.tasks[name].kind == "multilabel":  # of each label's two answers
                out[sample.id + name] = torch.softmax(score.unflatten(0, (-1, 2)), 1)[:, 0].tolist()
            else:
                out[sample.id + name] = torch.softmax(score, 0).tolist()
    return out


every_case = pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=() if c.name in QUICK else pytest.mark.slow) for c in CASES],
)


@every_case
def test_two_processes_train_as_plain_pytorch_does(case: Case, ranks: Any) -> None:
    found, expected = ranks(case)
    kind = "bf16" if "bf16" in case.name else "fp32"
    seen = [step for step in range(STEPS) if case.plant != "loss" or step != PLANTED]
    for name, atol in (("losses", 0.0), ("auxiliary_loss", 1e-7)):
        one, other = (np.array(run[name])[seen] for run in (found, expected))
        np.testing.assert_allclose(one, other, rtol=LOSS[kind], atol=atol)
    assert len({round(found["losses"][step], 6) for step in seen}) == len(seen)  # it trains
    assert found["state"].keys() == expected["state"].keys()
    if kind == "fp32":
        for name, norm in expected["state"].items():
            # Adam divides by the gradient's size: where the true gradient is 0 (keys' biases) it amplifies rounding
            assert math.isclose(found["state"][name], norm, rel_tol=2e-4, abs_tol=2e-6), name


@every_case
def test_two_processes_score_each_sample_once_and_as_one_alone(case: Case, ranks: Any) -> None:
    found, expected = ranks(case)
    expected = expected["probabilities"]
    assert found["n"] == dict.fromkeys(found["n"], 13)
    assert found["probabilities"].keys() == expected.keys()
    kind = "bf16" if "bf16" in case.name else "fp32"
    for name, probabilities in expected.items():
        np.testing.assert_allclose(found["probabilities"][name], probabilities, atol=PROBABILITY[kind], err_msg=name)


@every_case
def test_ranks_agree_and_skip_just_the_steps_that_are_no_numbers(case: Case, ranks: Any) -> None:
    found, _ = ranks(case)
    result = found["ranks"]
    assert result[0] == result[1]
    assert result[0]["skipped"] == [bool(case.plant) and step == PLANTED for step in range(STEPS)]
    if case.plant == "loss":
        assert math.isnan(found["losses"][PLANTED])


def test_weighed_smoothed_and_regression_aware_losses_do_not_know_the_world(data: Path, tmp_path: Path) -> None:
    """Weights are shared out over the global batch, whatever rank has which of its samples."""
    run_ranks("tests.distributed.zero_worker", str(data), str(tmp_path), "objectives", timeout=600)
    result = json.loads((tmp_path / "results.json").read_text())
    torch.set_num_threads(1)
    for case in OBJECTIVES:
        found, expected = result[case.name], plain_training(case, data, tmp_path)
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=LOSS["fp32"], err_msg=case.name)
        for name, norm in expected["state"].items():
            assert math.isclose(found["state"][name], norm, rel_tol=2e-4, abs_tol=2e-6), (case.name, name)


@pytest.fixture(scope="module")
def supported(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[Any, dict[str, Any]]]:
    """Every supported combination on two processes, and the plain training of each different computation."""
    out = tmp_path_factory.mktemp("supported")
    run_ranks("tests.distributed.zero_worker", str(data), str(out), "supported", timeout=1500)
    torch.set_num_threads(1)
    plain = {computed: plain_training(case, data, out) for computed, case in {c.computed: c for c in SUPPORTED}.items()}
    return json.loads((out / "results.json").read_text()), plain


@pytest.mark.slow  # compiles DeepSpeed's CPU Adam once
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("case", SUPPORTED, ids=lambda case: case.name)
def test_every_supported_combination_trains_as_plain_pytorch_does(case: Case, supported: Any) -> None:
    found, expected = supported[0][case.name], supported[1][case.computed]
    loss = HOST_ADAM if "optimizer" in case.name else LOSS["fp32"]
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=loss)
    for name, probabilities in expected["probabilities"].items():
        np.testing.assert_allclose(found["probabilities"][name], probabilities, atol=PROBABILITY["fp32"], err_msg=name)
    assert found["ranks"][0] == found["ranks"][1]
