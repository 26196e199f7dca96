"""What does tracking cost a training step, whatever state the server is in, and does everything arrive in the end?

    python -m benchmarks.tracking [--rounds 3] [--pairs 10] [--steps 50]

A step is real work on the CPU (forward, backward and AdamW of a small network: many short operations, the kind that a
second Python thread disturbs most), and 15 numbers are recorded at every step. Each round runs every case against a real
`mlflow server`; blocks of tracked and of untracked steps alternate within it. `ratio` is the median over all such pairs of
blocks of median tracked step / median untracked step, on the wall clock; `processor_ratio` is the same of the thread's own
processor time, which other programs disturb less. What the sending thread itself can have taken from the steps around it
is at most `sender_share`, its processor time as a share of the time that all blocks took. After a case the fault is taken away, `sync` sends
what is left, and the server's histories are compared with the journal, value by value.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import psutil
import torch

from benchmarks.machine import describe, today
from tests.tracking.mlflow_server import MlflowServer, Proxy, histories
from trainer.config import RunConfig, check_config, dump_config
from trainer.files import write_json
from trainer.tracking.journal import read_journal
from trainer.tracking.outbox import OutboxBusy, Synced, sync
from trainer.tracking.tracker import Tracker

RESULTS = Path(__file__).parent / "results"
NUMBERS = 15  # per step
SLOW = 5.0  # seconds until a slow server answers


class Work:
    """One optimizer step of a network of 24 small layers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [
            part for _ in range(24) for part in (torch.nn.Linear(96, 96), torch.nn.LayerNorm(96), torch.nn.GELU())
        ]
        self.net = torch.nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3)
        self.x = torch.randn(128, 96)

    def step(self) -> float:
        loss = (self.net(self.x) - self.x).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


@dataclass
class Block:
    """Seconds of each step, seconds of processor time of its thread, and seconds of its call of the tracker alone."""

    steps: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)


def run_block(work: Work, tracker: Tracker, first: int, steps: int) -> Block:
    """Train and record `steps` steps, numbered from `first` on."""
    block = Block()
    for step in range(first, first + steps):
        began, busy = time.perf_counter(), time.thread_time()
        loss = work.step()
        called = time.perf_counter()
        tracker.metrics({"train/loss": loss, **{f"train/number_{i}": loss * i for i in range(1, NUMBERS)}}, step)
        ended = time.perf_counter()
        block.steps.append(ended - began)
        block.processor.append(time.thread_time() - busy)
        block.calls.append(ended - called)
    return block


@dataclass
class Case:
    """A state of the server: `uri` to record to, what happens `before` the steps, in their `middle`, and the `cure`."""

    uri: str | None
    before: Callable[[], None] = lambda: None
    middle: Callable[[], None] = lambda: None
    cure: Callable[[], None] = lambda: None
    mlflow: bool = True
    connected: bool = True  # the run is there before the steps begin


def cases(server: MlflowServer, proxy: Proxy) -> dict[str, Case]:
    def slow(seconds: float | None) -> Callable[[], None]:
        return lambda: setattr(proxy, "fault", lambda method, path: seconds)

    def refuse() -> None:
        proxy.fault = lambda method, path: "refuse"

    return {
        "journal only (track.mlflow=false)": Case(None, mlflow=False),
        "server fine": Case(server.uri),
        "SQLite file (the default)": Case(None),
        f"server answers after {SLOW:g} s": Case(proxy.uri, before=slow(SLOW), cure=slow(None)),
        "server down from the start": Case(server.uri, before=server.stop, cure=server.start, connected=False),
        "server stopped in the middle": Case(server.uri, middle=server.stop, cure=server.start),
        "server frozen in the middle": Case(server.uri, middle=server.freeze, cure=server.thaw),
        "server's disk full": Case(server.uri, before=server.fill_disk, cure=lambda: server.fill_disk(False)),
        "server refuses (HTTP 500)": Case(proxy.uri, before=refuse, cure=slow(None)),
    }


def settings(case: Case) -> RunConfig:
    track = {"experiment": "benchmark", "uri": case.uri, "mlflow": case.mlflow, "flush_seconds": 2}
    return check_config({"task": "meld", "track": track})


class CaseResult(TypedDict):
    """One round of a case; `all_there` is None where nothing is sent."""

    ratios: list[float]
    processor_ratios: list[float]
    sender_share: float
    step_ms: float
    call_ms: float
    slowest_call_ms: float
    finish_s: float
    sent_by_sync: int | None
    all_there: bool | None


class CaseSummary(TypedDict):
    """A case over its rounds."""

    ratio: float
    ratio_quartiles: list[float]
    processor_ratio: float
    sender_share: float
    step_ms: float
    call_ms: float
    slowest_call_ms: float
    slowest_finish_s: float
    sent_by_sync: list[int | None]
    all_there: bool | None


def run_case(case: Case, work: Work, pairs: int, steps: int, out: Path) -> CaseResult:
    """One case: its measurements, and whether all arrived after the cure."""
    config = settings(case)
    nobody = Tracker(config, out, enabled=False)
    run_block(work, nobody, 1, 20)
    out.mkdir(parents=True)
    (out / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    if not case.connected:
        case.before()
    tracker = Tracker(config, out, enabled=True)
    tracker.start(config, {})
    if case.connected:
        while case.mlflow and tracker.run_id is None:
            time.sleep(0.05)
        case.before()
    tracked: list[Block] = []
    untracked: list[Block] = []
    before = sender_seconds(tracker)
    for pair in range(pairs):
        if pair == pairs // 2:
            case.middle()
        order = [(tracked, tracker), (untracked, nobody)]
        for blocks, who in order if pair % 2 else reversed(order):
            blocks.append(run_block(work, who, 1 + pair * steps, steps))
    sender = sender_seconds(tracker) - before
    began = time.perf_counter()
    tracker.finish("done")
    finish = time.perf_counter() - began
    case.cure()
    result = sync_when_free(out) if case.mlflow else None
    calls = [call for block in tracked for call in block.calls]
    return {
        "ratios": ratios([block.steps for block in tracked], [block.steps for block in untracked]),
        "processor_ratios": ratios([block.processor for block in tracked], [block.processor for block in untracked]),
        "sender_share": sender / sum(sum(block.steps) for block in [*tracked, *untracked]),
        "step_ms": 1e3 * statistics.median(step for block in untracked for step in block.steps),
        "call_ms": 1e3 * statistics.median(calls),
        "slowest_call_ms": 1e3 * max(calls),
        "finish_s": finish,
        "sent_by_sync": result.sent if result else None,
        "all_there": histories(result.uri, str(result.run_id)) == read_journal(out / "journal.jsonl")
        if result
        else None,
    }


def ratios(tracked: list[list[float]], untracked: list[list[float]]) -> list[float]:
    return [statistics.median(a) / statistics.median(b) for a, b in zip(tracked, untracked, strict=True)]


def sender_seconds(tracker: Tracker) -> float:
    """Processor time of the tracker's sending thread so far."""
    sender = tracker._sender
    threads = {thread.id: thread.user_time + thread.system_time for thread in psutil.Process().threads()}
    return 0.0 if sender is None or sender.native_id is None else threads.get(sender.native_id, 0.0)


def sync_when_free(out: Path) -> Synced:
    """`sync`, after the thread that was given up has ended: its process, this one, goes on."""
    while True:
        try:
            return sync(out)
        except ValueError as error:
            if not isinstance(error.__cause__, OutboxBusy):
                raise
            time.sleep(0.2)


def over_rounds(found: list[CaseResult]) -> CaseSummary:
    """Medians over all pairs of blocks or rounds, the slowest of all, and whether all arrived in every round."""
    wall = [ratio for r in found for ratio in r["ratios"]]
    quartiles = statistics.quantiles(wall, n=4)
    return {
        "ratio": statistics.median(wall),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "processor_ratio": statistics.median(ratio for r in found for ratio in r["processor_ratios"]),
        "sender_share": statistics.median(r["sender_share"] for r in found),
        "step_ms": statistics.median(r["step_ms"] for r in found),
        "call_ms": statistics.median(r["call_ms"] for r in found),
        "slowest_call_ms": max(r["slowest_call_ms"] for r in found),
        "slowest_finish_s": max(r["finish_s"] for r in found),
        "sent_by_sync": [r["sent_by_sync"] for r in found],
        "all_there": None if found[0]["all_there"] is None else all(r["all_there"] for r in found),
    }


def start_up(work: Work, out: Path, steps: int = 600) -> float:
    """Processor seconds of the first sender of a process: importing MLflow and creating the default store."""
    tracker = Tracker(check_config({"task": "meld"}), out, enabled=True)
    run_block(work, tracker, 1, steps)
    seconds = sender_seconds(tracker)
    tracker.finish("done")
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=10, help="of blocks, a case")
    parser.add_argument("--steps", type=int, default=50, help="of a block")
    parser.add_argument("--out", type=Path, default=RESULTS / "tracking.json")
    args = parser.parse_args()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    work = Work()
    found: dict[str, list[CaseResult]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "server").mkdir()
        start = start_up(work, folder / "first" / "run")
        server = MlflowServer(folder / "server")
        server.start()
        proxy = Proxy(server.uri)
        try:
            for number in range(args.rounds):
                for place, (label, case) in enumerate(cases(server, proxy).items()):
                    result = run_case(case, work, args.pairs, args.steps, folder / f"{number}-{place}")
                    found.setdefault(label, []).append(result)
                    print(number, label, json.dumps(over_rounds([result])), file=sys.stderr, flush=True)
        finally:
            proxy.close()
            server.stop()
    report = {
        "question": " ".join(str(__doc__).splitlines()[0].split()),
        "date": today(),
        "command": "python -m benchmarks.tracking " + " ".join(sys.argv[1:]),
        "machine": describe("mlflow", "torch", "SQLAlchemy"),
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 1) for value in psutil.getloadavg()],
        "rounds": args.rounds,
        "pairs": args.pairs,
        "steps": args.steps,
        "numbers_per_step": NUMBERS,
        "start_up_processor_s": start,
        "cases": {label: over_rounds(results) for label, results in found.items()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, report)
    print(json.dumps(report, indent=2))
    return 0 if all(case["all_there"] is not False for case in report["cases"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
