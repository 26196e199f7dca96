"""A suite from nothing to its tables: data, runs, comparison; and before any of it, what it takes and what is missing."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.start.local import run_state
from launch.sweep.local import Say, run_sweep
from launch.sweep.pool import Budget
from launch.sweep.suites import Suite
from launch.sweep.sweep import Sweep, finished
from launch.units import GIB
from trainer.data.generated import diagnostic, synthetic_benchmark
from trainer.files import load_json, write_json, write_text
from trainer.results.printable import Table

if TYPE_CHECKING:
    from trainer.results.compare.evidence import SuiteTables

TABLE, VALUES = "reproduce.md", "reproduce.json"


@dataclass(frozen=True)
class Machine:
    """The GPUs that a run is planned for, without any of them: see :mod:`launch.plan.plan`. TFLOP/s are those that a GPU reaches."""

    gpus: int = 8
    memory: float = 80.0
    tflops: float | None = None


def make_sweep(suite: Suite, folder: Path, data: Path | None, seeds: Sequence[int], overrides: Sequence[str]) -> Sweep:
    """The runs of a suite, in `folder`. `data` holds a prepared dataset per task; what is generated lies in ``folder/data``.

    Raises:
        ValueError: every fault of every variant; or data for a suite that generates its own.
    """
    if data is not None and suite.generate:
        made = ", ".join(one.task for one in suite.generate)
        raise ValueError(f"this suite generates its data ({made}): leave --data out")
    place = folder / "data" / "{task}" if suite.generate else None if data is None else data / "{task}"
    here = [f"data.path={place}"] if place is not None else []
    return Sweep(folder, suite.configurations([*here, *overrides]), tuple(seeds))


def missing(sweep: Sweep, *, generated: bool) -> list[str]:
    """What the runs need and is not here: datasets, unless they are generated, and backbones."""
    from trainer.distributed.consistency import report
    from trainer.distributed.versions import ABSENT

    faults: dict[str, None] = {}
    for config in sweep.variants.values():
        about = report(config)
        tasks = set(about["data"])
        faults.update({what: None for name, what in about["faults"].items() if not (generated and name in tasks)})
        for name, mark in about["model"].items():
            if mark == ABSENT and name not in about["faults"]:
                faults[
                    f"the backbone {name} is not in the cache of the hub: it is downloaded when the first run starts"
                ] = None
    return list(faults)


def costs(sweep: Sweep, machine: Machine) -> tuple[Table | None, list[str]]:
    """Memory, steps and hours of a run of each variant on GPUs, as ``egmf plan`` estimates them, and on what that rests.

    None where all variants have the tiny backbone, which needs no plan.
    """
    from launch.plan.plan import Throughput, backbone_shape, make_plan

    columns = ["variant", "backbone", "GiB of a GPU", "fits", "steps", "hours of a run"]
    table = Table(f"One run on {machine.gpus} GPUs of {machine.memory:g} GiB, planned", columns)
    notes: dict[str, list[str]] = {}
    shapes: dict[str, str | None] = {}  # backbone -> what is wrong with it
    for name, config in sweep.variants.items():
        backbone = config.model.backbone.name
        if backbone == "tiny":
            continue
        if backbone not in shapes:
            shapes[backbone] = _fault(functools.partial(backbone_shape, config))
        if (fault := shapes[backbone]) is not None:
            notes.setdefault(f"no plan: {fault}", []).append(name)
            table.rows.append([name, backbone, *["?"] * 4])
            continue
        plan = make_plan(config, 1, machine.gpus, machine.memory, Throughput(tflops=machine.tflops))
        chosen = plan.recommended or plan.configured
        fits = "as configured" if chosen is plan.configured else "with " + " ".join(chosen.overrides())
        hours = "?" if plan.hours is None else f"{plan.hours:.2f}"
        fits = fits if plan.recommended is not None else "no"
        table.rows.append([name, backbone, f"{chosen.memory.total / GIB:.1f}", fits, str(plan.steps or "?"), hours])
        for note in plan.lengths.assumptions:
            notes.setdefault(note, []).append(name)
    lines = [f"{', '.join(names)}: {note}" for note, names in notes.items()]
    if table.rows and machine.tflops is None:
        lines.append("hours: say what a GPU reaches by --tflops, and have the data prepared")
    return table if table.rows else None, lines


def _fault(work: Callable[[], object]) -> str | None:
    try:
        work()
    except (ValueError, OSError) as error:
        return str(error).splitlines()[0]
    return None


def hours(suite: Suite, sweep: Sweep, budget: Budget) -> str:
    """How many runs are left, and how long they take by what is known: finished runs here, or the suite's measured minutes."""
    children = sweep.children()
    done = finished(children)
    took = [seconds for child in children if child.name in done if (seconds := _seconds(child.out)) is not None]
    left = len(children) - len(done)
    text = f"{len(children)} runs ({len(sweep.variants)} variants, {len(sweep.seeds)} seeds), {left} left"
    minutes = sum(took) / len(took) / 60 if took else suite.minutes
    if left == 0:
        return text
    if minutes is None:
        return f"{text}; how long they take is known after the first one"
    source = f"as the {len(took)} finished ones took" if took else "as measured for this suite"
    total = left * minutes / budget.parallel / 60
    return f"{text}: about {total:.1f} hours, {budget.parallel} at once, {minutes:.1f} minutes each {source}"


def reproduce(
    suite: Suite, sweep: Sweep, budget: Budget, say: Say, *, debug: bool = False
) -> tuple[int, SuiteTables | None]:
    """Make what is not there yet, and the tables of all that is done. Returns the exit code and the tables.

    Raises:
        ValueError: data or folder are of something else; nothing finished can be compared.
    """
    for one in suite.generate:
        make = synthetic_benchmark.generate if one.task in synthetic_benchmark.SHAPES else diagnostic.generate
        make(one.task, sweep.folder / "data" / one.task, seed=one.seed, sizes=one.sizes)
    say(hours(suite, sweep, budget))
    result = run_sweep(sweep, budget, say, debug=debug)
    return result.code, write_tables(suite, sweep)


def write_tables(suite: Suite, sweep: Sweep) -> SuiteTables | None:
    """The tables of the finished runs, also written into the suite's folder; None where there are none yet."""
    from trainer.results.compare.evidence import evidence_tables, multitask_tables, published_tables

    children = sweep.children()
    done = {
        name: [c.out for c in children if c.variant == name and run_state(c.out).state == "done"]
        for name in sweep.variants
    }
    done = {name: paths for name, paths in done.items() if paths}
    if not done or (suite.baseline is not None and suite.baseline not in done):
        return None
    if suite.together is not None:
        single = {task: (one.variant, one.metric) for task, one in suite.together.alone.items()}
        tables = multitask_tables(done, suite.together.variant, single, tolerance=suite.together.loses)
    elif suite.baseline is not None:
        pairs = {kind: (one.expert, one.without) for kind, one in suite.evidence.items()}
        tables = evidence_tables(done, suite.baseline, pairs)
    else:
        values = {
            name: (one.metric, one.value, one.called) for name, one in suite.published.items() if name in sweep.variants
        }
        tables = published_tables(done, values)
    absent = len(children) - sum(map(len, done.values()))
    if absent:
        tables.notes.insert(0, f"incomplete: {absent} of {len(children)} runs are not done")
    write_text(sweep.folder / TABLE, markdown(suite, sweep, tables))
    claims = [dataclasses.asdict(claim) for claim in tables.claims]
    write_json(sweep.folder / VALUES, {"suite": suite.title, "notes": tables.notes, "claims": claims, **tables.values})
    return tables


def markdown(suite: Suite, sweep: Sweep, tables: SuiteTables) -> str:
    """The tables as a page, with what made them."""
    about = _about([child.out for child in sweep.children()])
    parts = [f"# {suite.title}", "Made by:", f"    {command(sweep)}", "\n".join(f"- {line}" for line in about)]
    for table in tables.tables:
        parts += [f"## {table.title}", _markdown_table(table.columns, table.rows)]
        parts += [table.note] if table.note else []
    if tables.claims:
        rows = [[claim.expected, claim.found, verdict(claim.met)] for claim in tables.claims]
        parts += ["## Expected", _markdown_table(["expected", "found", ""], rows)]
    if tables.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in tables.notes)]
    return "\n\n".join(parts) + "\n"


def verdict(met: bool | None) -> str:
    return {True: "met", False: "not met", None: "undecided"}[met]


def command(sweep: Sweep) -> str:
    """The command line as it was given to this process."""
    import sys

    return shlex.join(["egmf", *sys.argv[1:]])


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _about(runs: Sequence[Path]) -> list[str]:
    """What the finished runs ran on, and how long."""
    records = [_record(run) for run in runs]
    done = [record for record in records if record.get("state") == "done"]
    took = [s for run in runs if (s := _seconds(run)) is not None]
    lines = [
        f"{len(done)} of {len(runs)} runs done, {sum(took) / 3600:.2f} hours of runs in all"
        if took
        else f"{len(done)} of {len(runs)} runs done"
    ]
    for what, key in (("device", "device"), ("processes of a run", "world"), ("platform", "platform")):
        lines.append(f"{what}: {_distinct(record.get(key) for record in done)}")
    lines.append(
        f"commit: {_distinct((r.get('git') or {}).get('commit', 'unknown') + (' with changes' if (r.get('git') or {}).get('changed') else '') for r in done)}"
    )
    lines.append(f"data: {_distinct(f'{task} {mark[:16]}' for r in done for task, mark in r.get('data', {}).items())}")
    return lines


def _distinct(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values))) or "none"


def _record(run: Path) -> Mapping[str, Any]:
    try:
        return dict(load_json((run / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _seconds(run: Path) -> float | None:
    """How long a finished run took; of one that was continued, its last part."""
    record = _record(run)
    try:
        ended, started = (datetime.datetime.fromisoformat(record[key]) for key in ("ended", "started"))
    except (KeyError, TypeError, ValueError):
        return None
    return (ended - started).total_seconds() if record.get("state") == "done" else None
