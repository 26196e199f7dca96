"""Kills one rank at a moment: found by Python because its folder is on PYTHONPATH.

EGMF_TEST_KILL=R:MODULE:FUNCTION:N   rank R is killed when it calls that function for the N-th time
"""

import os
import sys

rank, _, place = os.environ.get("EGMF_TEST_KILL", "").partition(":")

if place and os.environ.get("RANK") == rank:
    import importlib.abc
    import importlib.machinery

    module_name, function_name, at = place.split(":")

    class Planter(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):  # type: ignore[no-untyped-def]
            if name != module_name:
                return None
            sys.meta_path.remove(self)
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            assert spec is not None
            assert spec.loader is not None
            load = spec.loader.exec_module

            def exec_module(module):  # type: ignore[no-untyped-def]
                load(module)
                calls = []
                function = getattr(module, function_name)

                def deadly(*arguments, **keywords):  # type: ignore[no-untyped-def]
                    calls.append(1)
                    if len(calls) == int(at):
                        os.kill(os.getpid(), 9)
                    return function(*arguments, **keywords)

                setattr(module, function_name, deadly)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec

    sys.meta_path.insert(0, Planter())
