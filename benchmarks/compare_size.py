"""How long does a comparison of 500 runs take: 100 groups of five seeds, 2,610 predictions each, against a baseline?

    python -m benchmarks.compare_size [--groups 100] [--seeds 5] [--samples 2610] [--folder DIR]

The runs are made, not trained: MELD's labels, predictions with probabilities and gate weights as `egmf train` writes them,
in run folders, in an MLflow store in an SQLite file, and in a real `mlflow server`. Timed is the whole command in a process of
its own, from its start to its end: all metrics of all groups, intervals and tests of the differences of weighted F1 and
accuracy, all files written, and (from MLflow) kept in MLflow again. `processor_seconds` are those of its own threads, which other work on the machine disturbs less; `peak_MiB`
is its largest resident memory. `--folder` keeps what was made, for another timing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import psutil

from benchmarks.machine import describe, today
from tests.results.seeded import predictions
from tests.tracking.mlflow_server import MlflowServer
from trainer.answers.prediction_table import write_predictions
from trainer.config import check_config, dump_config, flatten
from trainer.files import write_json
from trainer.tracking.journal import MEDIAN_SPEED, SPEED

RESULTS = Path(__file__).parent / "results"
EXPERIMENT = "size"
STEPS = 100  # of the recorded speed
METRICS = 25  # names of other metrics in MLflow
STARTED = 1_772_359_200  # seconds since the epoch


def make_folders(folder: Path, groups: int, seeds: int, samples: int) -> list[Path]:
    """Finished run folders; the groups differ in a learning rate and a little in quality."""
    made = []
    for group in range(groups):
        for seed in range(1, seeds + 1):
            run = folder / f"g{group:03d}-s{seed}"
            (run / "predictions").mkdir(parents=True)
            config = check_config(
                {
                    "task": "meld",
                    "train": {"seed": seed, "lr": {"fusion": 1e-4 * (group + 1)}},
                    "track": {"experiment": EXPERIMENT},
                }
            )
            (run / "config.yaml").write_text(dump_config(config), encoding="utf-8")
            rng = np.random.default_rng([group, seed])
            table = predictions("meld", 0.7 + 0.001 * group, 1000 * group + seed, samples)
            table["probabilities"] = rng.dirichlet(np.ones(7), samples).tolist()
            table["answer"] = table["prediction"]
            table["gate_expert"] = rng.dirichlet(np.ones(3), samples).tolist()
            table["gate_modality"] = rng.dirichlet(np.ones(3), (samples, 3)).tolist()
            write_predictions(table, run / "predictions" / "test.parquet")
            record = {
                "state": "done", "started": "2026-03-01T10:00:00+00:00", "ended": "2026-03-01T11:00:00+00:00", "world": 1,
                "device": "cpu x 2 threads", "tasks": ["meld"], "data": {"meld": "f" * 64}, "git": {"commit": "0123abc"},
            }  # fmt: skip
            write_json(run / "run.json", record)
            lines = [{"step": s, "time": 0.0, "metrics": {SPEED: 100.0 + s}} for s in range(STEPS)]
            (run / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            made.append(run)
    return made


def put_into_mlflow(runs: list[Path], uri: str, artifacts: str | None) -> None:
    """The runs in a store, with as many parameters, metrics and tags as training records."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

    client = MlflowClient(uri)
    experiment = client.create_experiment(EXPERIMENT, artifacts)
    for run in runs:
        record = json.loads((run / "run.json").read_text())
        config = check_config(_yaml(run / "config.yaml"))
        made = client.create_run(experiment, start_time=STARTED * 1000, run_name=run.name).info.run_id
        params = [Param(key, str(value)) for key, value in flatten(config).items()]
        tags = {
            "data.meld": record["data"]["meld"],
            "world_size": "1",
            "device": record["device"],
            "git.commit": "0123abc",
        }
        speeds = [Metric(SPEED, 100.0 + s, STARTED, s) for s in range(STEPS)]
        speeds.append(Metric(MEDIAN_SPEED, 100.0 + (STEPS - 1) / 2, STARTED, STEPS))
        others = [Metric(f"valid/number_{i}", 0.5, STARTED, STEPS) for i in range(METRICS)]
        client.log_batch(
            made, params=params[:100], tags=[RunTag(*tag) for tag in tags.items()], metrics=speeds + others
        )
        if params[100:]:
            client.log_batch(made, params=params[100:])
        client.log_artifact(made, str(run / "predictions" / "test.parquet"), "predictions")
        client.set_terminated(made, end_time=(STARTED + 3600) * 1000)


def _yaml(path: Path) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(path))


class Timing(TypedDict):
    """What one command took, and what it did."""

    seconds: float
    processor_seconds: float
    load_average: float
    priority: int
    peak_MiB: int
    runs: int
    kept_in_mlflow: bool


def timed(*words: str) -> Timing:
    """Seconds of the command, of the processor too, and its peak memory; it must succeed and have tested every group."""
    command = [
        sys.executable,
        "-m",
        "trainer",
        "compare",
        *words,
        "--baseline",
        "g000",
        "--metric",
        "wf1",
        "--metric",
        "acc",
        "--json",
    ]
    began = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True)
        peak, busy = 0, resource.getrusage(resource.RUSAGE_CHILDREN)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak = max(peak, watched.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.05)
        seconds = time.perf_counter() - began
        stderr = process.stderr.read() if process.stderr else ""
        assert process.wait() == 0, stderr
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        out.seek(0)
        comparison = json.loads(out.read())
    assert sum(d["p"] is not None for d in comparison["differences"]) == 2 * (len(comparison["groups"]) - 1)
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime - busy.ru_utime - busy.ru_stime, 1),
        "load_average": round(psutil.getloadavg()[0], 1),
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "peak_MiB": round(peak / 2**20),
        "runs": sum(len(group["runs"]) for group in comparison["groups"]),
        "kept_in_mlflow": "logged to MLflow" in stderr,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=2610)
    parser.add_argument("--out", type=Path, default=RESULTS / "compare-size.json")
    parser.add_argument("--folder", type=Path, help="where the runs are made, and found again")
    args = parser.parse_args()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        out = str(folder / "out")
        runs = sorted((folder / "runs").glob("*"))
        runs = runs or make_folders(folder / "runs", args.groups, args.seeds, args.samples)
        store = f"sqlite:///{folder / 'mlflow.db'}"
        if not (folder / "mlflow.db").exists():
            put_into_mlflow(runs, store, (folder / "mlartifacts").as_uri())
        (folder / "server").mkdir(exist_ok=True)
        server = MlflowServer(folder / "server")
        fresh = not server.store.exists()
        server.start()
        try:
            if fresh:
                put_into_mlflow(runs, server.uri, None)
            found = {
                "SQLite store": timed(EXPERIMENT, "--uri", store, "--out", out),
                "run folders": timed(str(folder / "runs"), "--out", out),
                "server (HTTP, predictions downloaded)": timed(EXPERIMENT, "--uri", server.uri, "--out", out),
            }
        finally:
            server.stop()
        page = (folder / "out" / "compare.html").stat().st_size
    report = {
        "question": " ".join(str(__doc__).splitlines()[0].split()),
        "date": today(),
        "command": "python -m benchmarks.compare_size",
        "machine": describe("mlflow", "numpy", "scipy", "pyarrow"),
        "groups": args.groups,
        "seeds": args.seeds,
        "samples": args.samples,
        "page_KiB": round(page / 1024),
        "found": found,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, report)
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
