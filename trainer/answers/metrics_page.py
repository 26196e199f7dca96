"""The tables of docs/metrics.md, made from `trainer/metric_table.py` and the built-in tasks.

    python -m trainer.answers.metrics_page docs/metrics.md

A table stands between ``<!-- metrics NAME -->`` and ``<!-- end -->``; everything else on the page stays as it is.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from trainer.metric_table import FAMILIES, Family, Metric
from trainer.tasks import BUILT_IN

_TABLE = re.compile(r"(<!-- metrics (\S+) -->\n).*?(<!-- end -->)", re.S)


def render(page: str) -> str:
    """The page with every table made anew; KeyError for a table that is none of the families and not ``selection``."""
    tables = {name: _family(family) for name, family in FAMILIES.items()} | {"selection": _selection()}
    return _TABLE.sub(lambda found: f"{found[1]}\n{tables[found[2]]}\n{found[3]}", page)


def _family(family: Family) -> str:
    rows = ["| key | metric | better | definition |", "|---|---|---|---|"]
    rows += [
        f"| `{metric.key}` | {metric.name} | {_better(metric.greater_is_better)} | {metric.definition}{_aliases(metric)} |"
        for metric in family.metrics
    ]
    sources = dict.fromkeys(metric.source for metric in family.metrics)
    return "\n".join([*rows, "", f"Source: {'; '.join(sources)}.", ""])


def _aliases(metric: Metric) -> str:
    return f"; other name: `{'`, `'.join(metric.aliases)}`" if metric.aliases else ""


def _selection() -> str:
    rows = ["| task | metric | better |", "|---|---|---|"]
    rows += [f"| {task.name} | `{task.select}` | {_better(task.greater_is_better)} |" for task in BUILT_IN.values()]
    return "\n".join([*rows, ""])


def _better(greater_is_better: bool) -> str:
    return "higher" if greater_is_better else "lower"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
