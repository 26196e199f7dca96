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
import deepspeed.runtime.zero.muon.muon_optimizer  # which building an engine imports
needless = {"mlflow", "torch._inductor.lowering", "torch._inductor.compile_fx", "sklearn", "scipy.optimize", "scipy.stats", "pandas",
            "matplotlib"} & set(sys.modules)
assert not needless, needless
import transformers.models
from transformers.utils import import_utils
structure = import_utils.spread_import_structure(import_utils.create_import_structure_from_path(transformers.models.__file__))
scanned = import_utils._LazyModule("transformers.models", transformers.models.__file__, structure)
assert set(dir(transformers.models)) >= set(dir(scanned)) and len(dir(scanned)) > 1000
assert {"models." + name for name in structure[frozenset()]} <= set(transformers._modules)
assert transformers.models._modules == scanned._modules
assert transformers.models._class_to_module.keys() == scanned._class_to_module.keys()
assert import_utils.is_scipy_available()
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


ENDS = """
import sys
sys.argv = ["egmf", "--help"]
from trainer import __main__, cli
{patch}
__main__.run()
"""


def ends(patch: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ENDS.format(patch=patch)], env=environment(), cwd=ROOT, capture_output=True, text=True
    )


def test_the_command_ends_as_python_does_but_leaves_its_objects_alone() -> None:
    report = (
        "import atexit, torch\nclass Freed:\n    def __del__(self): print('freed')\nkept = Freed()\nkept.own = kept"
    )
    quick = ends(f"{report}\ncli.main = lambda: atexit.register(print, 'last words') and sys.exit(85)")
    assert (quick.returncode, quick.stdout) == (85, "last words\n"), quick.stderr
    slow = ends(report.replace(", torch", "") + "\ncli.main = lambda: sys.exit(85)")
    assert (slow.returncode, slow.stdout) == (85, "freed\n"), slow.stderr
    thread = "import threading, time, torch\ndef work(): time.sleep(0.5); print('done')\nthreading.Thread(target=work).start()"
    waited = ends(f"{thread}\ncli.main = lambda: sys.exit()")
    assert (waited.returncode, waited.stdout) == (0, "done\n"), waited.stderr
    failed = ends("import torch\ndef main(): raise KeyError('lost')\ncli.main = main")
    assert failed.returncode == 1
    assert "KeyError: 'lost'" in failed.stderr
    assert ends("cli.main = lambda: sys.exit('a message')").returncode == 1


def test_a_rank_imports_neither_mlflow_nor_inductor_and_both_can_be_had_later() -> None:
    # not from the fork server, which has imported them
    done = subprocess.run([sys.executable, "-c", RANK], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr
