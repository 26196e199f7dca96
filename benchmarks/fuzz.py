"""Does anything in a damaged feature file get through? Thousands of them through `egmf prepare`'s own function.

    python -m benchmarks.fuzz [--cases 10000] [--seed 0] [--formats NAME ...] [--engine auto|atheris|random]

Each case damages one file of an honest source and prepares it (`tests/data/fuzzing.py` says what must hold) in a worker process
whose address space is limited. The worker writes the case down first, so one that crashes it or does not end is kept. An audit hook
notes what reading has no need of. With atheris (``pip install atheris``) mutation is guided by coverage of `trainer.data`.
Failures lie in ``benchmarks/failures``; run one again with ``--again FORMAT FILE``. Exit code 1 where there is any.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.data.fuzzing import Format

HERE = Path(__file__).parent
FAILURES = HERE / "failures"
ROOM = 1 << 30  # bytes of address space that a worker may take beyond what it has when it starts
LIMIT = 10.0  # seconds of a case
START = 60.0  # seconds more that a worker has for loading everything, before its first case
LONGEST = 1 << 16  # bytes of a damaged file


def main() -> int:
    arguments = _arguments()
    if arguments.worker:
        return _worker(arguments)
    from tests.data.fuzzing import formats

    known = formats()
    if arguments.again:
        return _again(known, *arguments.again)
    names = arguments.formats or list(known)
    guided = importlib.util.find_spec("atheris") is not None
    engine = {"auto": "atheris" if guided else "random"}.get(arguments.engine, arguments.engine)
    started, found = time.monotonic(), {}
    for i, name in enumerate(names):
        cases = arguments.cases * (i + 1) // len(names) - arguments.cases * i // len(names)
        found[name] = _fuzz(name, cases, engine, arguments.seed)
        print(f"{name}: {json.dumps(found[name], ensure_ascii=False)}", flush=True)
    from benchmarks.machine import describe, today

    packages = ("numpy", "pyarrow", "pydantic", "datasets", *(["atheris"] if engine == "atheris" else []))
    result = {
        "date": today(),
        "command": f"python -m benchmarks.fuzz --cases {arguments.cases} --seed {arguments.seed} --engine {engine}",
        "machine": describe(*packages),
        "engine": engine,
        "limits": {"seconds": LIMIT, "address_space_mib": ROOM >> 20, "file_bytes": LONGEST},
        "cases": sum(f["cases"] for f in found.values()),
        "failures": sum(f["failures"] for f in found.values()),
        "seconds": round(time.monotonic() - started, 1),
        "peak_growth_mib": max(f["peak_growth_mib"] for f in found.values()),
        "slowest_ms": max(f["slowest_ms"] for f in found.values()),
        "formats": found,
    }
    path = arguments.out or HERE / "results" / f"fuzz-{today()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{result['cases']} cases, {result['failures']} failures, {result['seconds']} s: {path}")
    return 1 if result["failures"] else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="+", default=[])
    parser.add_argument("--engine", choices=("auto", "atheris", "random"), default="auto")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--again", nargs=2, metavar=("FORMAT", "FILE"), help="run one kept case and show its faults")
    parser.add_argument("--worker", nargs=2, metavar=("FORMAT", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _again(known: dict[str, Format], name: str, file: str) -> int:
    from tests.data.fuzzing import Bench

    with tempfile.TemporaryDirectory() as folder:
        print(Bench(known[name], Path(folder)).run(Path(file).read_bytes()))
    return 0


# ── the watcher ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _fuzz(name: str, cases: int, engine: str, seed: int) -> dict[str, float]:
    """`cases` damaged files of one format; a worker that dies or hangs is a failure, and another goes on."""
    with tempfile.TemporaryDirectory(prefix="fuzz") as made:
        folder = Path(made)
        (folder / "log").touch()
        restarts = 0
        while (done := len(_log(folder))) < cases:
            command = [sys.executable, "-m", "benchmarks.fuzz", "--worker", name, made, "--engine", engine]
            command += ["--cases", str(cases - done), "--seed", str(seed + 1000 * restarts)]
            reason = _watch(command, folder)
            if reason and not (folder / "case").exists():
                raise SystemExit(f"{name}: the worker does not start: {reason}")
            if reason:
                _keep(name, (folder / "case").read_bytes(), reason)
                with (folder / "log").open("a") as log:
                    log.write(f"{reason.split(':')[0]} {LIMIT if 'hang' in reason else 0}\n")
            restarts += 1
            if restarts > 50:
                raise SystemExit(f"{name}: workers end without finishing, last: {reason}")
        rows = _log(folder)
        ends, seconds = Counter(end for end, _ in rows), [float(s) for _, s in rows]
        good = ends["written"] + ends["refused"]
        return {
            "cases": len(rows),
            **ends,
            "failures": len(rows) - good,
            "slowest_ms": round(1000 * max(seconds), 1),
            "peak_growth_mib": round(float((folder / "memory").read_text()) / 2**20, 1),
        }


def _log(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "log").read_text().splitlines()]


def _watch(command: list[str], folder: Path) -> str | None:
    """Run a worker; what was wrong with how it ended."""
    with (folder / "output").open("wb") as output:
        worker = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    first = before = (folder / "log").stat().st_size
    since = time.monotonic()
    while worker.poll() is None:
        time.sleep(0.2)
        size = (folder / "log").stat().st_size
        if size != before:
            before, since = size, time.monotonic()
        elif time.monotonic() - since > LIMIT + (START if size == first else 0):
            worker.kill()
            worker.wait()
            return f"hang: no answer after {LIMIT} s"
    if worker.returncode:
        tail = (folder / "output").read_text(errors="replace")[-2000:]
        return f"crash: exit code {worker.returncode}\n{tail}"
    return None


def _keep(name: str, data: bytes, reason: str) -> None:
    FAILURES.mkdir(exist_ok=True)
    stem = f"{name.replace(' ', '-').replace(',', '')}-{len(list(FAILURES.glob('*.txt'))):03d}"
    (FAILURES / f"{stem}.bin").write_bytes(data)
    (FAILURES / f"{stem}.txt").write_text(reason, encoding="utf-8")


# ── the worker ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _worker(arguments: argparse.Namespace) -> int:
    name, made = arguments.worker
    folder = Path(made)
    if arguments.engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["trainer.data"]):
            from tests.data import fuzzing
    else:
        from tests.data import fuzzing
    form = fuzzing.formats()[name]
    place = folder / "work"
    shutil.rmtree(place, ignore_errors=True)
    bench, watch = fuzzing.Bench(form, place), fuzzing.Watch()
    for seed in form.honest:  # loads what is loaded at first use
        bench.run(seed)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + ROOM,) * 2)
    start = _peak()
    log = (folder / "log").open("a", buffering=1)

    def case(data: bytes) -> None:
        data = data[:LONGEST]
        (folder / "case").write_bytes(data)
        began = time.monotonic()
        end = _outcome(name, bench, watch, place, data)
        log.write(f"{end} {time.monotonic() - began:.4f}\n")
        (folder / "memory").write_text(str(max(_peak() - start, 0)))

    if arguments.engine == "atheris":
        _guided(atheris, case, form.honest, folder, arguments)
    else:
        draw = random.Random(f"{name} {arguments.seed}")
        pool = list(form.honest)
        for _ in range(arguments.cases):
            case(fuzzing.mutate(draw.choice(pool), draw))
    return 0


def _guided(atheris: Any, case: Any, honest: tuple[bytes, ...], folder: Path, arguments: argparse.Namespace) -> None:
    """libFuzzer's loop; inputs that reach new code stay in the folder `corpus` for the next worker. Does not return."""
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for i, data in enumerate(honest):
        (corpus / f"honest{i}").write_bytes(data)
    limits = [
        f"-max_len={LONGEST}",
        "-timeout=3600",
        "-rss_limit_mb=0",
        "-len_control=0",
        "-verbosity=0",
    ]  # the limits of this script are stricter
    runs = [f"-runs={arguments.cases}", f"-seed={arguments.seed + 1}", f"-artifact_prefix={folder}/"]
    atheris.Setup(["fuzz", *limits, *runs, str(corpus)], case)
    atheris.Fuzz()


def _outcome(name: str, bench: Any, watch: Any, place: Path, data: bytes) -> str:
    """written, refused, or what went wrong, which is then kept."""
    try:
        with watch.over(place) as seen:
            end = str(bench.run(data))
    except Exception as error:  # noqa: BLE001 - whatever gets through is what is looked for
        _keep(name, data, "".join(traceback.format_exception(error)))
        bench.clear()
        return "memory" if isinstance(error, MemoryError) else "escaped"
    if seen:
        _keep(name, data, "\n".join(seen))
        return "acted"
    return end


def _peak() -> int:
    """Resident memory of this process, at most so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
