"""The tables of README.md and docs/performance.md about throughput, written from the benchmark's result.

    python -m benchmarks.speed_tables [--check] [benchmarks/results/throughput.json]

A table stands between two comments, ``<!-- benchmarks.speed_tables NAME -->`` and ``<!-- end -->``; nothing else of a page is touched.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "throughput.json"
PAGES = ("README.md", "docs/performance.md")
SHAPES = {"meld": "MELD", "mosei": "MOSEI, unaligned", "simsv2": "SIMS v2"}
Rows = Sequence[Mapping[str, Any]]


def faster(row: Mapping[str, Any], measure: str, other: str, spread: bool = False) -> str:
    """How many times as many samples a second as `other`: the median of the rounds, and the least and most."""
    ratio = row["ratios"][f"{measure}, {other}"]["samples_per_second"]
    around = f" ({ratio['least']:.1f} to {ratio['most']:.1f})" if spread else ""
    return f"{ratio['median']:.1f}{around}"


def summary(rows: Rows) -> str:
    """A line for each shape: training and evaluation against the padded baseline, by vocabulary."""
    of = {(row["shape"], row["vocabulary"]): row for row in rows}
    sizes = sorted({size for _, size in of})
    columns = [(measure, size) for measure in ("train", "evaluate") for size in sizes]
    words = {"train": "training", "evaluate": "evaluation"}
    head = ["", *(f"{words[measure]}, vocabulary of {size:,}" for measure, size in columns)]
    lines = [head, ["---"] * len(head)]
    for shape, name in SHAPES.items():
        lines.append([name, *(faster(of[shape, size], measure, "padded") for measure, size in columns)])
    return table(lines)


def full(rows: Rows) -> str:
    """A line for each shape and vocabulary: against both other columns, with the range over the rounds, and positions."""
    head = ["shape", "vocabulary", "training: than padded", "than ours padded", "evaluation: than padded", "than ours padded", "positions: ours, padded"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for row in sorted(rows, key=lambda row: (list(SHAPES).index(row["shape"]), row["vocabulary"])):
        ours, padded = (row["columns"][c]["train"]["positions_per_sample"] for c in ("ours", "padded"))
        lines.append(
            [
                SHAPES[row["shape"]],
                f"{row['vocabulary']:,}",
                *(
                    faster(row, measure, other, spread=True)
                    for measure in ("train", "evaluate")
                    for other in ("padded", "ours padded")
                ),
                f"{ours:.1f}, {padded:.0f}",
            ]
        )
    return table(lines)


def table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def written(page: str, rows: Rows) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: a name that no table has.
    """
    tables = {"summary": summary, "full": full}

    def fill(found: re.Match[str]) -> str:
        if found[2] not in tables:
            raise ValueError(f"no table {found[2]!r}; there are {', '.join(tables)}")
        return f"{found[1]}\n{tables[found[2]](rows)}\n{found[3]}"

    return re.sub(r"(<!-- benchmarks\.speed_tables (\w+) -->)\n.*?(<!-- end -->)", fill, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=RESULT)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page has another table")
    args = parser.parse_args()
    rows = json.loads(args.result.read_text(encoding="utf-8"))["rows"]
    for name in PAGES:
        page = (ROOT / name).read_text(encoding="utf-8")
        new = written(page, rows)
        if args.check and new != page:
            raise SystemExit(f"{name} has other tables: python -m benchmarks.speed_tables writes them")
        if not args.check:
            (ROOT / name).write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
