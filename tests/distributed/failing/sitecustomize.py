"""Plants faults into a training: found by Python because its folder is on PYTHONPATH.

EGMF_TEST_FAIL_RANK=R    rank R raises at its third micro-batch
EGMF_TEST_KILL_RANK=R    rank R is killed at its third micro-batch
EGMF_TEST_SLEEP_RANK=R   rank R sleeps for ever at its fifth micro-batch
EGMF_TEST_MEMORY=MIB     from the first micro-batch on, no more than so much memory can be had
"""

import os
import sys

RANK = os.environ.get("RANK", "0")
FAIL = "RANK" in os.environ and os.environ.get("EGMF_TEST_FAIL_RANK") == RANK
KILL = "RANK" in os.environ and os.environ.get("EGMF_TEST_KILL_RANK") == RANK
SLEEP = "RANK" in os.environ and os.environ.get("EGMF_TEST_SLEEP_RANK") == RANK
MEMORY = os.environ.get("EGMF_TEST_MEMORY")

if FAIL or KILL or SLEEP or MEMORY:
    import importlib.abc
    import importlib.machinery

    def plant(call: int) -> None:
        if call == 1 and MEMORY:
            import resource
            from pathlib import Path

            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (int(MEMORY) << 20),) * 2)
        if call == 3 and KILL:
            os.kill(os.getpid(), 9)
        if call == 5 and SLEEP:
            import time

            time.sleep(3600)
        if call == 3 and FAIL:
            raise RuntimeError("planted on rank " + RANK)

    class Planter(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):  # type: ignore[no-untyped-def]
            if name != "trainer.models.egmf":
                return None
            sys.meta_path.remove(self)
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            assert spec is not None
            assert spec.loader is not None
            load = spec.loader.exec_module

            def exec_module(module):  # type: ignore[no-untyped-def]
                load(module)
                calls = []
                forward = module.EGMF.forward

                def planted(self, *arguments):  # type: ignore[no-untyped-def]
                    calls.append(1)
                    plant(len(calls))
                    return forward(self, *arguments)

                module.EGMF.forward = planted

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec

    sys.meta_path.insert(0, Planter())
