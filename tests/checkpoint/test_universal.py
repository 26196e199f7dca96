"""What a converted checkpoint leaves in the optimizer."""

from __future__ import annotations

import pytest
import torch

from trainer.checkpoint.universal import own_steps


@pytest.mark.parametrize(("setting", "beside"), [({"fused": True}, True), ({"capturable": True}, True), ({}, False)])
@pytest.mark.parametrize("emptied", [False, True])
def test_steps_are_the_parameters_own_and_where_the_optimizer_wants_them(
    setting: dict[str, bool], beside: bool, emptied: bool
) -> None:
    """The device `meta` stands for a GPU; ZeRO-3 empties its groups between steps."""
    parameters = [torch.nn.Parameter(torch.zeros(3, device="meta")) for _ in range(2)]
    optimizer = torch.optim.AdamW(parameters)
    for group in optimizer.param_groups:
        group.update(setting)
        group["params"] = [] if emptied else group["params"]
    shared = torch.tensor(7.0)
    for parameter in parameters:
        optimizer.state[parameter] = {"step": shared, "exp_avg": torch.zeros(3, device="meta")}
    own_steps(optimizer)
    steps = [optimizer.state[parameter]["step"] for parameter in parameters]
    assert steps[0] is not steps[1]
    assert {step.device.type for step in steps} == {"meta" if beside else "cpu"}
    assert {step.dtype for step in steps} == {torch.float32}
    if not beside:
        assert [step.item() for step in steps] == [7.0, 7.0]
        steps[0] += 1
        assert (steps[1].item(), shared.item()) == (7.0, 7.0)


def test_counts_that_are_plain_numbers_stay() -> None:
    """DeepSpeed's optimizer in host memory counts with an int."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.state[parameter] = {"step": 7}
    own_steps(optimizer)
    assert optimizer.state[parameter]["step"] == 7
