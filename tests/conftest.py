"""What all tests share: the fork server of the processes that they start, and the order in which they run side by side."""

from __future__ import annotations

import atexit
import gc
import resource
import shutil
import tempfile
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.distributed import fork_server

# With `-n N --dist loadgroup` the tests of a group run one after the other in one process, and groups begin in this order: those
# that wait most come first, so that others compute beside them, then the longest. A group is all tests whose id begins so (the
# longest that fits counts); every other file is a group too.
GROUPS = (
    "tests/slurm/",
    "tests/multinode/",
    "tests/test_clean_clone.py",
    "tests/project/test_oldest.py",
    "tests/distributed/test_kill.py",
    "tests/distributed/test_zero.py::test_every_supported_combination",
    "tests/distributed/test_zero.py",
    "tests/launch/sweep/test_reproduce.py",
    "tests/launch/sweep/test_sweep.py",
    "tests/distributed/test_launch.py",
    "tests/distributed/test_worlds.py",
    "tests/distributed/test_stop.py",
    "tests/distributed/test_sharded.py",
    "tests/distributed/test_faults.py",
    "tests/launch/plan/test_plan.py",
    "tests/fake_gpu/",
    "tests/test_extending.py",
    "tests/launch/plan/test_plan_memory.py",
    "tests/launch/doctor/test_preflight.py",
    "tests/project/test_wheel.py",
    "tests/distributed/test_checkpoint.py",
    "tests/distributed/test_watch.py",
    "tests/run/test_guard.py",
    "tests/kernels/test_mutants.py",
    "tests/results/test_robustness.py",
    "tests/results/test_predict.py",
    "tests/golden/",
    "tests/run/test_prefetch.py",
    "tests/tracking/test_tracker.py",
    "tests/data/test_fuzz.py",
    "tests/test_cli.py",
    "tests/gpu/",
    "tests/results/report/",
)


USED = pytest.StashKey[float]()  # the seconds of CPU before what runs now


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu", action="store_true", help="print the seconds of CPU of each file and of the longest tests"
    )


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until all tests are imported: see trainer/distributed/light_imports.py
    if not hasattr(config, "workerinput"):  # the process that the workers of pytest-xdist belong to, or the only one
        folder = Path(tempfile.mkdtemp(prefix="egmf-fork-"))
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        fork_server.offer(folder)


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()
    atexit.register(gc.unfreeze)
    gc.enable()
    session.config.stash[USED] = cpu_seconds()


def cpu_seconds() -> float:
    """Of this process and of those that it waited for, forked ones among them."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used) + sum(fork_server.cpu_seconds)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """The seconds of CPU of set-up, test and tear-down, the fixtures that they need first and last included."""
    report = yield
    before, item.config.stash[USED] = item.config.stash[USED], cpu_seconds()
    report.cpu = item.config.stash[USED] - before
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("--cpu"):
        return
    files, tests = Counter[str](), Counter[str]()
    for report in (
        report for reports in terminalreporter.stats.values() for report in reports if hasattr(report, "cpu")
    ):
        files[report.nodeid.partition("::")[0]] += report.cpu
        tests[f"{report.when:8} {report.nodeid}"] += report.cpu
    terminalreporter.section(f"{files.total():.0f} seconds of CPU")
    for counted in (files, tests):
        for name, seconds in counted.most_common(40):
            terminalreporter.write_line(f"{seconds:7.1f}s {name}")


class GroupScheduling(LoadScopeScheduling):
    """Tests by their groups, in the order of the collection.

    pytest-xdist's own `xdist_group` writes the group into a test's id, which pytest 9.2 does not let it do.
    """

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling | None:
    return GroupScheduling(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {group: place for place, group in enumerate(GROUPS)}
    items.sort(key=lambda item: order.get(_group(item.nodeid), len(order)))


def _group(test: str) -> str:
    return max((group for group in GROUPS if test.startswith(group)), key=len, default=test.partition("::")[0])
