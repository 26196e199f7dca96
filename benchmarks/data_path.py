"""Is the data path fast enough not to slow training down? Opening, reading and collating a prepared dataset of MOSEI's size.

    python -m benchmarks.data_path [--samples 16326] [--work DIR] [--out benchmarks/results/data-path.json]

Samples of MOSEI's shapes (:mod:`benchmarks.shapes`) are prepared once by `egmf prepare`'s own code. Then fresh
processes measure:

- *open*: seconds from the call to a dataset that answers, and anonymous memory (RssAnon) it takes, median of 5
  processes;
- *zero copy*: whether the arrays of every thousandth sample lie inside the memory-mapped files;
- *collate*: samples/s of making training batches of 32 in the training order, reading included (pages in the cache),
  and of whole training steps in the same process (collation included, packed rows).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from benchmarks.machine import describe, today
from benchmarks.throughput import anonymous

if TYPE_CHECKING:
    import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SPLITS = {"valid": 64, "test": 64}
AT_ONCE = 1024  # samples made at a time


def prepare(folder: Path, samples: int) -> None:
    """A prepared dataset of MOSEI's shapes in `folder`."""
    from benchmarks.shapes import SHAPES, make_samples
    from trainer.data.preparation.prepare import prepare_source
    from trainer.data.readers.raw import RawSample, Source

    shape, sizes = SHAPES["mosei"], {"train": samples, **SPLITS}

    def read(split: str) -> Iterator[RawSample]:
        for start in range(0, sizes[split], AT_ONCE):
            for i, made in enumerate(make_samples(shape, min(AT_ONCE, sizes[split] - start), seed=start + len(split))):
                yield RawSample(
                    id=f"{split}-{start + i:05d}",
                    split=split,
                    text=made.text,
                    label=made.target,
                    audio=made.audio_TF,
                    video=made.video_TF,
                    audio_length=None,
                    video_length=None,
                    dialogue=None,
                    turn=None,
                    speaker=None,
                )

    rates = {name: rate for name, (_, rate, _) in shape.streams.items()}
    widths = {name: width for name, (width, _, _) in shape.streams.items()}
    source = Source(name="generated", samples=read, splits=list(sizes), files=[], widths=widths, rates=rates, notes=[])
    prepare_source(shape.task, source, folder)


class Opened(TypedDict):
    """A dataset that was opened, and whether its arrays are views of the mapped file."""

    samples: int
    seconds: float
    anonymous_mib: float
    zero_copy: bool
    arrays_checked: int


def opened(folder: Path) -> Opened:
    """Opening, in this process, which has the package imported."""
    from trainer.data.dataset import open_dataset

    before, began = anonymous(), time.perf_counter()
    view = open_dataset(folder)["train"]
    first = view[0]
    seconds = time.perf_counter() - began
    assert first.audio_TF is not None
    inside = [_mapped(array) for i in range(0, len(view), 1000) for array in (view[i].audio_TF, view[i].video_TF)]
    return {
        "samples": len(view),
        "seconds": seconds,
        "anonymous_mib": (anonymous() - before) / 2**20,
        "zero_copy": all(inside),
        "arrays_checked": len(inside),
    }


def _mapped(array: np.ndarray) -> bool:
    """Whether an array's bytes lie in a file that this process has mapped."""
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, stop = line.split()[0].partition("-")
        if int(start, 16) <= address and address + array.nbytes <= int(stop, 16):
            return line.endswith(".arrow")
    return False


def collated(folder: Path, threads: int) -> dict[str, float]:
    """Samples/s of collation alone, and of training steps with it."""
    import torch

    from benchmarks.contenders import build_egmf
    from benchmarks.shapes import SHAPES, make_backbone
    from trainer.data.dataset import open_dataset

    torch.set_num_threads(threads)
    view = open_dataset(folder)["train"]
    with tempfile.TemporaryDirectory() as work:
        backbone = make_backbone(Path(work) / "backbone", 32768)
        actual = build_egmf(SHAPES["mosei"], view, backbone, "packed")
    measured: dict[str, float] = {"threads": threads}
    for name, call, steps in (
        ("collate", lambda index: sum(map(len, actual.rows(index))), 60),
        ("train", actual.step, 8),
    ):
        for index in range(2):
            call(index)
        began = time.perf_counter()
        n = sum(call(2 + index) for index in range(steps))
        measured[f"{name}_samples_per_second"] = n / (time.perf_counter() - began)
    measured["ratio"] = measured["collate_samples_per_second"] / measured["train_samples_per_second"]
    return measured


def _in_process(what: str, folder: Path, threads: int) -> dict[str, float]:
    """:func:`opened` or :func:`collated` in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    with tempfile.NamedTemporaryFile("r", suffix=".json") as output:
        command = [
            sys.executable,
            "-m",
            "benchmarks.data_path",
            "--measure",
            what,
            str(folder),
            str(threads),
            output.name,
        ]
        subprocess.run(command, env=env, cwd=ROOT, check=True)
        result: dict[str, float] = json.load(output)
    return result


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        what, folder, threads, output = sys.argv[2:]
        found = opened(Path(folder)) if what == "open" else collated(Path(folder), int(threads))
        Path(output).write_text(json.dumps(found))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16326)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="a folder to prepare in, or with a dataset prepared earlier")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = (args.work or Path(made)).resolve() / f"mosei-{args.samples}"
        if not folder.is_dir():
            prepare(folder, args.samples)
        opening = [_in_process("open", folder, args.threads) for _ in range(5)]
        disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        report = {
            "date": today(),
            "command": "python -m benchmarks.data_path " + " ".join(sys.argv[1:]),
            "machine": describe("torch", "pyarrow"),
            "load_average": [round(n, 1) for n in os.getloadavg()],
            "disk_mib": disk / 2**20,
            "open": {
                **opening[0],
                "seconds": statistics.median(o["seconds"] for o in opening),
                "anonymous_mib": statistics.median(o["anonymous_mib"] for o in opening),
                "zero_copy": all(o["zero_copy"] for o in opening),
            },
            "collation": _in_process("collate", folder, args.threads),
        }
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
