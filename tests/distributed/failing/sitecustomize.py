"""Plants faults into a training: found by Python because its folder is on PYTHONPATH.

EGMF_TEST_FAIL_RANK=R    rank R raises at its third micro-batch
EGMF_TEST_KILL_RANK=R    rank R is killed at its third micro-batch
EGMF_TEST_SLEEP_RANK=R   rank R sleeps for ever at its fifth micro-batch
EGMF_TEST_MEMORY=MIB     from the first micro-batch on, no more than so much memory can be had
EGMF_TEST_STOP=R:WHEN    rank R gets SIGUSR1 when the first evaluation or the first save begins, or at its third micro-batch
                         (WHEN is evaluation, save or step)
EGMF_TEST_SLOW=SECONDS   every micro-batch of training takes so much longer
"""

import os
import sys

RANK = os.environ.get("RANK", "0")
FAIL = "RANK" in os.environ and os.environ.get("EGMF_TEST_FAIL_RANK") == RANK
KILL = "RANK" in os.environ and os.environ.get("EGMF_TEST_KILL_RANK") == RANK
SLEEP = "RANK" in os.environ and os.environ.get("EGMF_TEST_SLEEP_RANK") == RANK
MEMORY = os.environ.get("EGMF_TEST_MEMORY")

SLOW = float(os.environ.get("EGMF_TEST_SLOW", "0"))
STOP = os.environ.get("EGMF_TEST_STOP", ":").removeprefix(RANK + ":") if "RANK" in os.environ else ""

if FAIL or KILL or SLEEP or MEMORY or SLOW or STOP in ("evaluation", "save", "step"):
    import importlib.abc
    import importlib.machinery
    import signal
    import time

    calls = {"any": 0, "step": 0, "evaluation": 0, "save": 0}

    def stop(when: str) -> None:
        calls[when] += 1
        if when == STOP and calls[when] == (3 if when == "step" else 1):
            os.kill(os.getpid(), signal.SIGUSR1)

    def plant(call: int) -> None:
        if call == 1 and MEMORY:
            import resource
            from pathlib import Path

            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (int(MEMORY) << 20),) * 2)
        if call == 3 and KILL:
            os.kill(os.getpid(), 9)
        if call == 5 and SLEEP:
            time.sleep(3600)
        if call == 3 and FAIL:
            raise RuntimeError("planted on rank " + RANK)

    def plant_forward(module):  # type: ignore[no-untyped-def]
        forward = module.EGMF.forward

        def planted(self, *arguments):  # type: ignore[no-untyped-def]
            calls["any"] += 1
            plant(calls["any"])
            stop("step" if self.training else "evaluation")
            time.sleep(SLOW if self.training else 0)
            return forward(self, *arguments)

        module.EGMF.forward = planted

    def plant_save(module):  # type: ignore[no-untyped-def]
        save = module.Checkpoints.save

        def planted(self, *arguments, **keywords):  # type: ignore[no-untyped-def]
            stop("save")
            return save(self, *arguments, **keywords)

        module.Checkpoints.save = planted

    PLANTS = {"trainer.models.egmf": plant_forward, "trainer.checkpoint.store": plant_save}

    class Planter(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):  # type: ignore[no-untyped-def]
            if name not in PLANTS:
                return None
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            assert spec is not None
            assert spec.loader is not None
            load = spec.loader.exec_module

            def exec_module(module):  # type: ignore[no-untyped-def]
                load(module)
                PLANTS[name](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec

    sys.meta_path.insert(0, Planter())
