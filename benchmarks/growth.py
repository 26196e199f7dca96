"""How cost grows: with samples (1,000 to 1,000,000), frames (10 to 5,000), utterances of history, and tasks.

    python -m benchmarks.growth [--what samples frames history tasks] [--most 1000000] [--work DIR] [--out benchmarks/results/growth.json]

Every point is a process of its own, one thread; CPU seconds (user and system), and anonymous memory (RssAnon) beyond what the
process has with the package imported.

- *samples*: rows of text as MELD's. `egmf prepare` from JSON lines; opening the dataset; counting the tokens of all texts, the first
  time and from the dataset's folder; the order of an epoch with its first global batch; cutting 1,000 global batches into micro-batches.
- *frames*: a training step of eight samples with so many frames of audio and of video each, on the small backbone of
  `benchmarks.throughput`.
- *history*: positions a sample, and a training step, with so many earlier utterances in the prompt.
- *tasks*: a model with encoders for so many tasks: trained parameters, and the order of an epoch of 10,000 samples each.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, today
from benchmarks.throughput import anonymous

ROOT = Path(__file__).resolve().parent.parent
POINTS = {
    "samples": (1_000, 10_000, 100_000, 1_000_000),
    "frames": (10, 50, 250, 1_000, 5_000),
    "history": (0, 1, 2, 4, 8, 16),
    "tasks": (1, 2, 4, 8),
}
GLOBAL_BATCH, CUT = 32, 1_000
MIB = 2**20
Point = dict[str, float]


class Cost:
    """CPU seconds and anonymous memory since it was made."""

    def __init__(self) -> None:
        self.memory, self.began = anonymous(), time.process_time()

    def __call__(self) -> tuple[float, float]:
        return time.process_time() - self.began, (anonymous() - self.memory) / MIB


def samples(n: int, work: Path) -> Point:
    """Preparing, opening and ordering `n` rows of text."""
    from benchmarks.shapes import SHAPES, make_backbone
    from trainer.config import BackboneConfig, DataConfig
    from trainer.data.collate import Collator
    from trainer.data.dataset import open_dataset
    from trainer.data.sampling import GlobalBatchSampler, Limits, micro_batches
    from trainer.models.backbone.loading import load_tokenizer

    folder, point = work / f"rows-{n}", dict[str, float]()
    if not (folder / "data").is_dir():
        _write_rows(folder / "source", n)
        words = ["prepare", "meld", "--source", str(folder / "source"), "--out", str(folder / "data")]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "trainer", *words], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        point["prepare_s"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        point["prepare_peak_mib"] = after.ru_maxrss / 1024
    point["disk_mib"] = sum(p.stat().st_size for p in (folder / "data").rglob("*.arrow")) / MIB
    tokenizer = load_tokenizer(BackboneConfig(name=str(make_backbone(work / "backbone", 32768))))
    cost = Cost()
    view = open_dataset(folder / "data")["train"]
    assert view[0].text
    point["open_s"], point["open_mib"] = cost()
    for name in ("count_s", "count_again_s"):
        collate = Collator(
            SHAPES["meld"].task, tokenizer, DataConfig(), widths={}, rates={}, pseudo_tokens=4, modalities=("text",),
            dataset=folder / "data",
        )  # fmt: skip
        cost = Cost()
        sizes = collate.sizes(view)
        point[name], _ = cost()
    cost = Cost()
    order = GlobalBatchSampler({"meld": view.lengths()}, global_batch=GLOBAL_BATCH, seed=0)
    order.step(0)
    order.step(order.steps_per_epoch)  # two epochs are kept at a time
    point["order_s"], point["order_mib"] = cost()
    cost, limits = Cost(), Limits(2048, None, even=True)
    for step in range(CUT):
        micro_batches(order.step(step % order.steps_per_epoch).indices, sizes, limits, 0, 1)
    point["cut_1000_steps_s"], _ = cost()
    return point


def _write_rows(folder: Path, n: int) -> None:
    from benchmarks.shapes import SHAPES, make_samples

    folder.mkdir(parents=True)
    labels = SHAPES["meld"].task.labels
    made = make_samples(SHAPES["meld"], 1_000)
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as stream:
        for split, count in (("train", n), ("valid", 64), ("test", 64)):
            for i in range(count):
                sample = made[i % len(made)]
                row = {
                    "id": f"{split}-{i}",
                    "split": split,
                    "text": f"{sample.text} {i}",
                    "label": labels[int(sample.target)],
                }
                stream.write(json.dumps(row) + "\n")


def frames(n: int, work: Path) -> Point:
    """A training step of eight samples of `n` frames."""
    import numpy as np
    import torch

    from benchmarks.contenders import build_egmf
    from benchmarks.shapes import SHAPES, make_backbone, make_samples

    torch.set_num_threads(1)
    shape, rng = SHAPES["mosei"], np.random.default_rng(0)
    made = make_samples(shape, 8)
    for sample in made:
        for name, (width, _, _) in shape.streams.items():
            setattr(sample, f"{name}_TF", rng.standard_normal((n, width), dtype=np.float32))
    contender = build_egmf(shape, made, make_backbone(work / "backbone", 32768), "packed")
    return _steps(lambda: contender.step(0))


def history(n: int, work: Path) -> Point:
    """A training step of 32 samples with `n` earlier utterances each."""
    import torch

    from benchmarks.contenders import build_egmf, small
    from benchmarks.shapes import SHAPES, make_backbone, make_samples

    torch.set_num_threads(1)
    shape = SHAPES["meld"]
    made = make_samples(shape, 32)
    for i, sample in enumerate(made):
        sample.history = [("Ross", made[(i - k) % len(made)].text) for k in range(n, 0, -1)]
    config = small("packed")
    config.data.history = n
    backbone = make_backbone(work / "backbone", 32768)
    contender = build_egmf(shape, made, backbone, "packed", config)
    point = _steps(lambda: contender.step(0))
    before = contender.positions
    contender.step(0)
    return {"positions": (contender.positions - before) / len(made), **point}


def tasks(n: int, work: Path) -> Point:
    """The parameters of `n` tasks' encoders, and the order of an epoch."""
    import numpy as np

    from trainer.config import FusionConfig
    from trainer.data.sampling import GlobalBatchSampler
    from trainer.models.fusion.network import Fusion

    widths = {f"task{i}": {"audio": 74, "video": 35} for i in range(n)}
    fusion = Fusion(FusionConfig(), widths, 256, 256, 1.0, dict.fromkeys(widths, 7))
    cost = Cost()
    order = GlobalBatchSampler({name: np.full(10_000, 20) for name in widths}, global_batch=GLOBAL_BATCH, seed=0)
    order.step(0)
    seconds, memory = cost()
    trained = sum(p.numel() for p in fusion.parameters())
    return {"fusion_parameters_million": trained / 1e6, "order_s": seconds, "order_mib": memory}


def _steps(run: Any) -> Point:
    """The peak of anonymous memory in a first step, and the least seconds of three more."""
    from benchmarks.throughput import peak_memory

    base = anonymous()
    with peak_memory() as peak:
        run()
    seconds = []
    for _ in range(3):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return {"step_s": min(seconds), "step_mib": (peak[0] - base) / MIB}


MEASURES = {"samples": samples, "frames": frames, "history": history, "tasks": tasks}


def _points(what: str, most: int, work: Path) -> Iterator[tuple[int, Point]]:
    for n in POINTS[what]:
        if n > most:
            continue
        with tempfile.NamedTemporaryFile("r", suffix=".json") as output:
            command = [sys.executable, "-m", "benchmarks.growth", "--measure", what, str(n), str(work), output.name]
            env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            subprocess.run(command, env=env, cwd=ROOT, check=True)
            yield n, json.load(output)


def table(curves: dict[str, dict[str, Point]]) -> str:
    """Every curve as Markdown."""
    lines = []
    for what, curve in curves.items():
        columns = list(dict.fromkeys(key for point in curve.values() for key in point))
        lines += ["", "| " + " | ".join([what, *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
        for n, point in curve.items():
            cells = [f"{point[key]:,.3g}" if key in point else "" for key in columns]
            lines.append("| " + " | ".join([f"{int(n):,}", *cells]) + " |")
    return "\n".join(lines[1:])


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        what, n, work, output = sys.argv[2:]
        Path(output).write_text(json.dumps(MEASURES[what](int(n), Path(work))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=list(POINTS), default=list(POINTS))
    parser.add_argument("--most", type=int, default=1_000_000, help="the largest point that is measured")
    parser.add_argument(
        "--work", type=Path, help="datasets are made, and found again, there; default: a temporary folder"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        curves: dict[str, dict[str, Point]] = {}
        for what in args.what:
            curves[what] = {}
            for n, point in _points(what, args.most, work):
                curves[what][str(n)] = point
                print(what, n, {key: round(value, 4) for key, value in point.items()}, flush=True)
    report = {"date": today(), "machine": describe("torch", "pyarrow"), "curves": curves}
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(curves))


if __name__ == "__main__":
    main()
