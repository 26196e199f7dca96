"""Does an extraction that is killed again and again end with the bytes of one that nothing interrupted? Generated clips of speech and faces.

    python -m benchmarks.extract_killtest [--clips 200] [--kills 20] [--workers 2] [--out benchmarks/results/extract-killtest.json]

`egmf extract` by the recipe basic is ended by SIGKILL, with all its processes, at random moments, and started anew, until it has
ended by itself; then every file of its folder is compared with those of an extraction in one go. Exit code 1 where one differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe, today
from benchmarks.ranks import ROOT
from trainer.data.generated.spoken import generate_clips


def start(manifest: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    """`egmf extract` in a process group of its own."""
    words = ["extract", str(manifest), "--recipe", "basic", "--out", str(out), "--workers", str(workers)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-m", "trainer", *words]
    return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, stdout=quiet, stderr=quiet)


def digests(folder: Path) -> dict[str, str]:
    """Path -> sha256 of every file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows_done(out: Path) -> int:
    return sum(not path.name.startswith(".") for path in out.glob("rows/*/*.json"))


def killed(manifest: Path, out: Path, workers: int, kills: int, clips: int, rng: random.Random) -> list[int]:
    """Extract, with so many kills at most; how many rows were done at each of them."""
    done: list[int] = []
    while len(done) < kills:
        aim = rows_done(out) + rng.randint(1, max(2, clips // kills))
        process = start(manifest, out, workers)
        while process.poll() is None and rows_done(out) < aim:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:
            return done
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done.append(rows_done(out))
    if (code := start(manifest, out, workers).wait()) != 0:
        raise SystemExit(f"the last extraction ended with exit code {code}")
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="extract-killtest-") as temporary:
        folder = Path(temporary)
        sizes = {"train": max(1, args.clips - 24), "valid": 12, "test": 12}
        manifest = generate_clips(folder / "clips", args.seed, sizes, args.workers)
        if (code := start(manifest, folder / "whole", args.workers).wait()) != 0:
            raise SystemExit(f"the extraction in one go ended with exit code {code}")
        kills = killed(manifest, folder / "parts", args.workers, args.kills, args.clips, random.Random(args.seed))
        whole, parts = digests(folder / "whole"), digests(folder / "parts")
        differing = sorted(name for name in {*whole, *parts} if whole.get(name) != parts.get(name))
    report = {
        "date": today(),
        "command": f"python -m benchmarks.extract_killtest --clips {args.clips} --kills {args.kills}",
        "machine": describe("av", "ai-edge-litert"),
        "clips": sum(sizes.values()),
        "kills": len(kills),
        "rows_done_at_kills": kills,
        "files": len(whole),
        "differing": differing,
    }
    print(json.dumps(report))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if differing or not kills else 0


if __name__ == "__main__":
    sys.exit(main())
