"""Kills a rank inside a function: found by Python because its folder is on PYTHONPATH.

EGMF_TEST_KILL_IN=MODULE:NAME   the function, such as trainer.run.evaluate:sample_answers
EGMF_TEST_KILL_RANK=R           the rank that is killed when it calls it
EGMF_TEST_KILL_MARK=FILE        gets the time of the kill, and the port at which the ranks meet
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time

MODULE, _, NAME = os.environ.get("EGMF_TEST_KILL_IN", "").partition(":")


def kill(*arguments: object, **keywords: object) -> None:
    with open(os.environ["EGMF_TEST_KILL_MARK"], "w") as mark:
        mark.write(f"{time.time()} {os.environ['MASTER_PORT']}")
    os.kill(os.getpid(), 9)


class Planter(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):  # type: ignore[no-untyped-def]
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module):  # type: ignore[no-untyped-def]
            load(module)
            assert callable(getattr(module, NAME))
            setattr(module, NAME, kill)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if MODULE and "RANK" in os.environ and os.environ.get("EGMF_TEST_KILL_RANK") == os.environ["RANK"]:
    sys.meta_path.insert(0, Planter())
