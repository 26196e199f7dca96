"""What a rank imports, and that nothing is missing afterwards."""

from __future__ import annotations

import subprocess
import sys

from tests.distributed.processes import ROOT, environment

RANK = """
import sys
from trainer.distributed.process_group import quiet_deepspeed
quiet_deepspeed()
from trainer.distributed.light_imports import import_libraries
import torch
compile_now = torch.compile
import_libraries()
import_libraries()
import trainer.run.loop
assert torch.compile is compile_now
needless = {"mlflow", "torch._inductor.lowering", "torch._inductor.compile_fx"} & set(sys.modules)
assert not needless, needless
import mlflow
from trainer.distributed import light_imports
calls = []
torch.compile = lambda function, **options: calls.append(options) or compile_now(function, **options)
with light_imports._compiled_at_first_call():
    @torch.compile(backend="eager", dynamic=False)
    def double(x):
        return 2 * x
    triple = torch.compile(lambda x: 3 * x, backend="eager")
    assert not calls
assert (double(torch.ones(2)) == 2).all() and double(torch.ones(2)).sum() == 4
assert calls == [{"backend": "eager", "dynamic": False}], calls
assert triple(torch.ones(1)) == 3
"""


def test_a_rank_imports_neither_mlflow_nor_inductor_and_both_can_be_had_later() -> None:
    # not from the fork server, which has imported them
    done = subprocess.run([sys.executable, "-c", RANK], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr
