"""Plants a failure on one rank, at its third micro-batch: found by Python because its folder is on PYTHONPATH."""

import os
import sys

if os.environ.get("RANK") == os.environ.get("EGMF_TEST_FAIL_RANK") and "RANK" in os.environ:
    import importlib.abc
    import importlib.machinery

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

                def failing(self, *arguments):  # type: ignore[no-untyped-def]
                    calls.append(1)
                    if len(calls) == 3:
                        raise RuntimeError("planted on rank " + os.environ["RANK"])
                    return forward(self, *arguments)

                module.EGMF.forward = failing

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec

    sys.meta_path.insert(0, Planter())
