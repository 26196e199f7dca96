"""Real corpora through the whole way: egmf prepare, baseline, train (egmf sweep), evaluate, compare; baselines and the tiny backbone on the same split.

- `meld` (declare-lab/MELD): English text, seven emotions, the published splits.
- `mosi`, `mosi-audio` (CMU-MOSI as in MERBench): English text, or one vector of audio an utterance; the official split. Its
  published video was made by a network that had seen most of the test utterances' labels, and is not used.
- `simsv2` (CH-SIMS v2): Chinese text, the official split.
- `cped` (scutcyr/CPED): Chinese text, three sentiments; of the published files one, whose five television series are folds.
- `youtube`, `pom9` (pliang279/MFN): audio and video features, no words; see `benchmarks/standardisation.py`.

The backbone is `tiny`, trained from random weights, so its figures say that the way works and learns, not what EGMF can do.
Nothing is downloaded; the data lie in a folder `DATA` with `meld/`, `mosi/`, `sims/`, `cped/`, `mfn/`.

    python -m benchmarks.real_corpora DATA --data meld mosi --out benchmarks/results/real-corpora.json
    python -m benchmarks.real_corpora --table benchmarks/results/real-corpora.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import describe, today
from benchmarks.standardisation import TASKS, write_source
from trainer.distributed.versions import git_state
from trainer.shipped import shipped_folder

EGMF = [sys.executable, "-m", "trainer"]
CPED = {
    "name": "cped",
    "kind": "classification",
    "labels": ["negative", "neutral", "positive"],
    "language": "zh",
    "label_column": "Sentiment",
    "prompts": {"zh": {"instruction": "判断说话人的情感倾向：{answers}。", "cue": "情感：", "close": "</>"}},
}
RATES_OF_TEXT = {"fusion": 1e-3, "backbone": 5e-4}
MFN = ("youtube", "pom9")


@dataclass(frozen=True)
class Corpus:
    """How a corpus is prepared and trained. `metrics`: those of the table, the selecting one first."""

    task: str | dict[str, Any]  # a built-in one, or what its file says
    modalities: tuple[str, ...]
    metrics: tuple[str, ...]
    steps: int
    place: str | None = None  # of the published files, below DATA; None: written by benchmarks.standardisation
    prepare: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()  # as of egmf baseline --modalities; default: its own
    folds: bool = False

    @property
    def name(self) -> str:
        """Of the task."""
        return self.task if isinstance(self.task, str) else str(self.task["name"])


NUMBERS = ("mae", "corr")
SIGNALS = ("constant", "audio", "video", "audio,video")
CORPORA = {
    "meld": Corpus("meld", ("text",), ("wf1", "acc", "macro_f1"), 400, "meld"),
    "mosi": Corpus("mosi", ("text",), ("non0_f1", *NUMBERS), 200),
    "mosi-audio": Corpus("mosi", ("audio",), ("non0_f1", *NUMBERS), 120),
    "simsv2": Corpus("simsv2", ("text",), ("acc2", *NUMBERS), 200, "sims/simsv2.jsonl"),
    "cped": Corpus(
        CPED, ("text",), ("wf1", "acc", "macro_f1"), 150, "cped/valid_split.csv", ("--fold-column", "TV_ID"), folds=True
    ),
    "youtube": Corpus(TASKS["youtube"], ("audio", "video"), ("wf1", "acc", "macro_f1"), 120, baselines=SIGNALS),
    "pom9": Corpus(TASKS["pom9"], ("audio", "video"), ("ccc", *NUMBERS), 120, baselines=SIGNALS),
}  # fmt: skip


class Way:
    """The commands of one corpus, run one after the other in a folder of its own, and remembered as a reader would type them."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.commands: list[str] = []

    def without_paths(self, text: str) -> str:
        """The text with the names of the two folders in place of where they lie."""
        return text.replace(str(self.folder), "WORK").replace(str(self.data), "DATA")

    def egmf(self, *words: str | Path) -> str:
        """Run a command; its stdout.

        Raises:
            RuntimeError: it failed; with the end of what it said.
        """
        line = " ".join(["egmf", *map(str, words)])
        self.commands.append(self.without_paths(line))
        print(self.commands[-1], flush=True)
        done = subprocess.run([*EGMF, *map(str, words)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{line}: {done.stderr[-3000:]}")
        return done.stdout


def measure(name: str, data: Path, folder: Path, seeds: int, parallel: int, share: float) -> dict[str, Any]:
    """Take a corpus the whole way; what the results file says of it. `share`: of the corpus's steps."""
    corpus, way = CORPORA[name], Way(folder, data)
    folder.mkdir(parents=True, exist_ok=True)
    task = corpus.name
    if not isinstance(corpus.task, str):
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(corpus.task, allow_unicode=True), encoding="utf-8")
        task = str(folder / f"{task}.yaml")
    source = data / corpus.place if corpus.place else _written(name, corpus, data, folder / "source")
    as_task = [corpus.name, *(["--task", task] if task != corpus.name else [])]
    way.egmf("prepare", *as_task, "--source", source, *corpus.prepare, "--out", folder / "data", "--force")
    shown = json.loads(way.egmf("data", "show", folder / "data", "--json"))
    runs = folder / "runs"
    asked = [word for modalities in corpus.baselines for word in ("--modalities", modalities)]
    way.egmf("baseline", folder / "data", *asked, "--runs", runs, "--force")
    steps = max(2, round(corpus.steps * share))
    (folder / "run.yaml").write_text(yaml.safe_dump(run_config(corpus, task, steps)), encoding="utf-8")
    folds = ["--folds"] if corpus.folds else []
    chosen = ["--seeds", ",".join(str(seed) for seed in range(seeds)), *folds, "--parallel", str(parallel)]
    way.egmf("sweep", folder / "run.yaml", f"data.path={folder / 'data'}", *chosen, "--out", runs / "tiny")
    evaluated = _evaluated_again(way, runs / "tiny", corpus)
    metrics = [word for metric in corpus.metrics for word in ("--metric", metric)]
    compared = json.loads(way.egmf("compare", runs, *metrics, "--no-log", "--json"))
    return {
        "date": today(),
        "commit": git_state().get("commit"),
        "machine": describe("torch", "transformers", "deepspeed", "scikit-learn"),
        "task": corpus.name,
        "modalities": list(corpus.modalities),
        "samples": {split: values["n"] for split, values in shown.items()},
        "folds": next(iter(shown.values())).get("folds"),
        "steps": steps,
        "batch": run_config(corpus, task, steps)["train"]["global_batch"],
        "seeds": seeds,
        "commands": way.commands,
        "evaluated_again": evaluated,
        **_figures(compared, corpus),
        "notes": [way.without_paths(note) for note in compared["notes"]],
    }


def _written(name: str, corpus: Corpus, data: Path, folder: Path) -> Path:
    """Own samples with the modalities of the corpus, from the published arrays."""
    published = write_source(data, name.removesuffix("-audio"), folder)
    lines = [json.loads(line) for line in published.read_text(encoding="utf-8").splitlines()]
    dropped = {"text", "audio", "video"} - set(corpus.modalities) - ({"text"} if name in MFN else set())
    kept = [{key: value for key, value in line.items() if key not in dropped} for line in lines]
    published.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return published


def run_config(corpus: Corpus, task: str, steps: int) -> dict[str, Any]:
    """A run's config: text trains the whole backbone, features an adapter, as configs/meld-text-tiny.yaml and tiny.yaml do."""
    text = corpus.modalities == ("text",)
    fusion: dict[str, Any] = {"dropout": 0.1, "modalities": list(corpus.modalities)}
    model: dict[str, Any] = {"fusion": fusion, "backbone": {"gradient_checkpointing": False}}
    train: dict[str, Any] = {"global_batch": 32, "micro_batch": 32, "probe": False, "steps": steps}
    if text:
        model["backbone"]["tiny"] = {"vocab_size": 8000}
        model["adapter"] = {"kind": "full"}
        train["lr"] = RATES_OF_TEXT
    return {
        "extends": str(shipped_folder() / "tiny.yaml"),
        "task": task,
        "data": {"modality_dropout": 0.0},
        "model": model,
        "train": {**train, "eval_every": max(1, steps // 2), "regression_loss": float("mae" in corpus.metrics)},
        "eval": {"splits": ["valid", "test"]},
        "track": {"mlflow": False, "report": False, "system_metrics": False},
    }


def _evaluated_again(way: Way, sweep: Path, corpus: Corpus) -> bool:
    """Whether egmf evaluate gives a run's own metrics again."""
    run = min(path.parent for path in sweep.glob("*/metrics.json"))
    before = json.loads((run / "metrics.json").read_text())["test"][corpus.name]
    again = json.loads(way.egmf("evaluate", run, "--json"))
    return all(abs(before[metric] - again[metric]) < 1e-6 for metric in corpus.metrics)


def _figures(compared: dict[str, Any], corpus: Corpus) -> dict[str, Any]:
    """Scores by group and metric, and the differences of the selecting metric."""
    scores: dict[str, dict[str, Any]] = {}
    for score in compared["scores"]:
        if score["kind"] == "all" and score["metric"] in corpus.metrics:
            kept = {key: score[key] for key in ("n", "mean", "sd", "values")}
            if score["folds"]:
                kept["folds"] = {key: score["folds"][key] for key in ("names", "values", "mean", "sd")}
            scores.setdefault(score["group"], {})[score["metric"]] = kept
    keys = ("group", "baseline", "metric", "value", "low", "high", "p_corrected")
    differences = [
        {key: d.get(key) for key in keys}
        for d in compared["differences"]
        if d["metric"] == corpus.metrics[0] and d["kind"] == "all"
    ]
    return {"scores": scores, "differences": differences}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: a row for each corpus and group, with the mean (± deviation over seeds) of each metric.

    Behind the backbone stands its difference from the baseline that reads the same modalities, with its interval.
    """
    lines = [
        "| corpus | modalities | train / valid / test | | test split | minus the baseline of the same modalities |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in results.items():
        sizes = " / ".join(f"{n:,}" for n in one["samples"].values())
        if one["folds"]:
            sizes += f" in {len(one['folds'])} folds"
        head = [name, ", ".join(one["modalities"]), sizes]
        for group, scores in sorted(one["scores"].items(), key=lambda item: not item[0].startswith("baseline")):
            label, difference = group, ""
            if not group.startswith("baseline"):
                label = f"tiny backbone, {one['steps']} steps, {one['seeds']} seed{'s' if one['seeds'] > 1 else ''}"
                difference = _difference(one)
            listed = sorted(scores, key=lambda metric: CORPORA[name].metrics.index(metric))
            cells = [*head, label, ", ".join(f"{metric} {_cell(scores[metric])}" for metric in listed), difference]
            lines.append(f"| {' | '.join(cells)} |")
            head = ["", "", ""]
    return "\n".join(lines)


def _difference(one: dict[str, Any]) -> str:
    """The backbone minus the baseline of the same modalities; nothing where it was not tested."""
    same = f"baseline {'+'.join(one['modalities'])}"
    for d in one["differences"]:
        if d["baseline"] == same and d["value"] is not None and d["low"] is not None:
            return f"{d['metric']} {d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
    return ""


def _cell(score: dict[str, Any]) -> str:
    if score["mean"] is None:
        return "undefined"
    return f"{score['mean']:.3f}" + (f" ± {score['sd']:.3f}" if score["sd"] is not None else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("real", type=Path, nargs="?", help="the folder of the published files", metavar="DATA")
    parser.add_argument("--data", nargs="+", choices=CORPORA, default=list(CORPORA))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps of each corpus")
    parser.add_argument("--parallel", type=int, default=1, help="runs at once")
    parser.add_argument("--work", type=Path, help="keep data and runs there; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="results; those of other corpora in the file stay")
    parser.add_argument(
        "--table", type=Path, help="print the table of a results file, and measure nothing", metavar="FILE"
    )
    args = parser.parse_args()
    if args.table is not None:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))))
        return
    if args.real is None:
        parser.error("DATA is missing: the folder of the published files")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.data:
            work = (args.work or Path(temporary)).resolve() / name
            found[name] = measure(name, args.real.resolve(), work, args.seeds, args.parallel, args.share)
            if args.out is not None:  # read again each time: another process may add other corpora to it
                known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
                known[name] = found[name]
                ordered = {key: known[key] for key in CORPORA if key in known}
                args.out.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
