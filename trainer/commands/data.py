"""Published files to datasets, and what stands in them: prepare, data show, score."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.commands.arity import command_class
from trainer.commands.extract import DEFAULT_CLIPS, ClipOptions, noted_manifest, run_extraction, tell
from trainer.commands.options import Contained, Json, Plugins, option_groups
from trainer.commands.output import print_json, print_metrics, progress_bar, say, wide

if TYPE_CHECKING:
    from trainer.data.preparation.prepare import Summary
    from trainer.questions import Definition

app = typer.Typer()


@dataclass(frozen=True)
class ClipSource:
    """Clips in place of published files."""

    clips: Annotated[
        Path | None, typer.Option(help="a manifest of clips in place of --source; see egmf extract", metavar="MANIFEST")
    ] = None
    recipe: Annotated[
        str | None, typer.Option(help="of --clips: a recipe's YAML file, or a name of egmf config list")
    ] = None
    arrays: Annotated[
        Path | None,
        typer.Option(help="of --clips: where own data and arrays go, which stay; default: DIR-clips", metavar="DIR"),
    ] = None

    @property
    def given(self) -> bool:
        """Whether any of them is."""
        return any(value is not None for value in (self.clips, self.recipe, self.arrays))


SAMPLES = "samples.jsonl"  # trainer.features.extraction_folder.SAMPLES
NO_CLIPS = ClipSource()
data_app = typer.Typer(help="Look at prepared datasets.", no_args_is_help=True)


@app.command(cls=command_class(several=["--source", "--rate"], optional={"--drop-bad": "train"}))
@option_groups
def prepare(
    name: Annotated[
        str, typer.Argument(help="a task, or a YAML file that defines one or several questions", metavar="TASK")
    ],
    out: Annotated[Path, typer.Option(help="where the prepared dataset goes", metavar="DIR")],
    source: Annotated[
        list[Path] | None, typer.Option(help="published files, or folders of them", metavar="PATH...")
    ] = None,
    task_file: Annotated[Path | None, typer.Option("--task", help="YAML file that defines TASK, for own data")] = None,
    strict: Annotated[bool, typer.Option(help="refuse every fault, also those with one right repair")] = False,
    drop_bad: Annotated[
        str, typer.Option(help="leave faulty samples out: of train (--drop-bad), of every split (--drop-bad=all)")
    ] = "none",
    zero_frames: Annotated[
        str, typer.Option(help="frames of zeros inside a clip: mask (as if missing) or keep", metavar="mask|keep")
    ] = "mask",
    label_column: Annotated[
        str | None,
        typer.Option(help="of annotations and own samples: the column or key of the labels", metavar="NAME"),
    ] = None,
    fold_column: Annotated[
        str | None,
        typer.Option(
            help="of own data: the key or column that names each sample's fold, such as session; default: fold, where no sample has a split",
            metavar="NAME",
        ),
    ] = None,
    standardise: Annotated[
        str, typer.Option(help="features by mean and deviation (mean), median and quartiles (robust), or not (none)")
    ] = "mean",
    max_rate: Annotated[
        float | None,
        typer.Option(help="audio and video of more frames a second become means over windows", metavar="N"),
    ] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(help="frames a second that published files do not say: audio=N, video=N", metavar="STREAM=N"),
    ] = None,
    force: Annotated[bool, typer.Option(help="replace another prepared dataset in DIR")] = False,
    workers: Annotated[int, typer.Option(min=1, help="processes")] = 1,
    synthetic: Annotated[
        bool, typer.Option("--stand-in", help="generate a synthetic benchmark of the task's shape, no source")
    ] = False,
    seed: Annotated[int, typer.Option(help="of generated data")] = 0,
    size: Annotated[
        list[str] | None,
        typer.Option(help="of generated data: SPLIT=N, such as train=4000"),
    ] = None,
    clips: ClipSource = NO_CLIPS,
    asked: ClipOptions = DEFAULT_CLIPS,
    contained: Contained = False,
    plugin: Plugins = None,
) -> int:
    """Read published files, or clips, once, check them, and write a memory-mapped dataset.

    The diagnostic tasks are generated and take no --source; --stand-in generates a synthetic benchmark, to try a training on.
    Of task spoken, without --source and --clips, media files are generated into DIR-clips and extracted, by the recipe basic.
    """
    from trainer.data.preparation.arguments import check_arguments
    from trainer.data.preparation.prepare import prepare as prepare_files
    from trainer.data.preparation.summary import summary_table
    from trainer.questions import Questions, is_built_in

    _check_words(drop_bad, standardise, zero_frames)
    task = _defined(name, task_file)
    if label_column is not None:
        task = _with_label_column(task, label_column)
    options: dict[str, Any] = {
        "standardise": standardise,
        "max_rate": max_rate,
        "strict": strict,
        "drop_bad": drop_bad,
        "force": force,
        "workers": workers,
    }
    generated = task.name.startswith("diagnostic") and not isinstance(task, Questions) and is_built_in(task)
    if synthetic or generated:
        if source or fold_column or rate or clips.given:
            raise ValueError(f"{task.name} is generated: it takes no --source, --clips, --rate or --fold-column")
        summary = _generate(task, out, seed, size, options, synthetic=synthetic)
        left_out = 0
    else:
        own = isinstance(task, Questions) or not is_built_in(task)
        if task.name == "spoken" and not own and not source and clips.clips is None:
            clips = _spoken(out, clips, seed, size, workers)
        _check_clips(name, source, clips, asked, zero_frames)
        options["zero_frames"] = zero_frames
        check_arguments(task, out, **options)
        source, left_out = _extracted(source, clips, asked, out, workers, force, task, drop_bad)
        with _splits_bar() as progress:
            summary = prepare_files(
                task, source, out, plugins=plugin or (), fold_column=fold_column, contained=contained, progress=progress,
                rates=_rates(rate), **options,
            )  # fmt: skip
    wide().print(summary_table(summary.record))
    say(f"{'unchanged' if summary.unchanged else 'written'}: {out}")
    return 1 if left_out else 0


def _with_label_column(task: Definition, column: str) -> Definition:
    from trainer.questions import Questions

    if isinstance(task, Questions):
        raise ValueError(
            f"--label-column is for one question, and {task.name} has {len(task.questions)}: write label_column in each question of "
            "the YAML file"
        )
    return task.model_copy(update={"label_column": column})


def _spoken(out: Path, clips: ClipSource, seed: int, size: list[str] | None, workers: int) -> ClipSource:
    """Generate the clips of the task spoken beside `out`, to be extracted there."""
    from trainer.data.generated.spoken import SIZES, generate_clips

    folder = out.with_name(f"{out.name}-clips")
    with _splits_bar() as progress:
        manifest = generate_clips(folder, seed, {**SIZES, **(_sizes(size) or {})}, workers, progress)
    return ClipSource(manifest, clips.recipe or "basic", clips.arrays or folder / "arrays")


def _generate(
    task: Definition, out: Path, seed: int, size: list[str] | None, options: dict[str, Any], *, synthetic: bool
) -> Summary:
    from trainer.data.generated import diagnostic, synthetic_benchmark
    from trainer.questions import Questions

    if isinstance(task, Questions):
        raise ValueError(f"--stand-in generates data for one task, and {task.name} asks several questions")
    generate = synthetic_benchmark.generate if synthetic else diagnostic.generate
    with _splits_bar() as progress:
        return generate(
            task.name,
            out,
            seed=seed,
            sizes=_sizes(size),
            standardise=options["standardise"],
            max_rate=options["max_rate"],
            force=options["force"],
            progress=progress,
        )


def _check_clips(name: str, source: list[Path] | None, clips: ClipSource, asked: ClipOptions, zero_frames: str) -> None:
    """Refuse options that do not go together, before a clip is read."""
    if clips.clips is None:
        if clips.given or asked != DEFAULT_CLIPS:
            raise ValueError("--recipe, --arrays, --device and --time-limit belong to --clips MANIFEST")
        if not source:
            raise ValueError(
                f"egmf prepare {name} needs --source (the published files, or a folder of them), or --clips MANIFEST and --recipe"
            )
        return
    if source:
        raise ValueError("--source and --clips are two kinds of source: give one of them")
    if clips.recipe is None:
        raise ValueError(
            "--clips needs --recipe: egmf config list shows those that come with the package, such as basic"
        )
    if zero_frames == "keep":
        raise ValueError(
            "--zero-frames keep: an extraction writes zeros where it saw or heard nothing, which are masked"
        )


def _extracted(
    source: list[Path] | None,
    clips: ClipSource,
    asked: ClipOptions,
    out: Path,
    workers: int,
    force: bool,
    task: Definition,
    drop_bad: str,
) -> tuple[list[Path], int]:
    """The source to be prepared, extracted first where clips are given; and how many clips were left out."""
    if clips.clips is None or clips.recipe is None:
        return source or [], 0
    arrays = clips.arrays or out.with_name(f"{out.name}-clips")
    if arrays.resolve() == out.resolve():
        raise ValueError("--arrays is the folder of the dataset itself: choose another")
    from trainer.data.preparation.manifest_labels import check_labels

    manifest = noted_manifest(clips.clips)
    check_labels(task, manifest, drop_bad)
    found = run_extraction(manifest, clips.recipe, arrays, workers, asked, force=force)
    tell(found)
    return [arrays / SAMPLES], len(found.report["left_out"])


def _check_words(drop_bad: str, standardise: str, zero_frames: str) -> None:
    if drop_bad not in ("none", "train", "all"):
        raise ValueError(f"--drop-bad is 'train' or 'all', not {drop_bad!r}")
    if standardise not in ("none", "mean", "robust"):
        raise ValueError(f"--standardise is 'mean', 'robust' or 'none', not {standardise!r}")
    if zero_frames not in ("mask", "keep"):
        raise ValueError(f"--zero-frames is 'mask' or 'keep', not {zero_frames!r}")


@data_app.command("show")
def data_show(
    folder: Annotated[Path, typer.Argument(help="a prepared dataset", metavar="DIR")], as_json: Json = False
) -> None:
    """Samples, labels, lengths and missing modalities of a prepared dataset."""
    from trainer.data.dataset import open_dataset
    from trainer.data.preparation.summary import summary_json, summary_table

    record = open_dataset(folder).record
    if as_json:
        print_json(summary_json(record))
    else:
        wide().print(summary_table(record))


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(help="CSV with the columns id, label, prediction", metavar="FILE")],
    task: Annotated[str, typer.Option(help="the task, or a YAML file that defines one")],
    as_json: Json = False,
) -> None:
    """Score any system's predictions with the benchmark's own metrics."""
    from trainer.answers.score_file import score_predictions
    from trainer.tasks import get_task

    chosen = get_task(task)
    metrics = score_predictions(chosen, predictions)
    if as_json:
        print_json(metrics)
    else:
        print_metrics({predictions.name: {chosen.name: metrics}})


def _defined(name: str, task_file: Path | None) -> Definition:
    from trainer.questions import get_definition

    if task_file is None:
        return get_definition(name)
    task = get_definition(str(task_file))
    if task.name != name:
        raise ValueError(f"{task_file} defines the task {task.name!r}, not {name!r}")
    return task


def _sizes(given: list[str] | None) -> dict[str, int] | None:
    if not given:
        return None
    bad = [text for text in given if not re.fullmatch(r"(train|valid|test)=[1-9]\d*", text)]
    if bad:
        raise ValueError(f"--size is SPLIT=N with a split of train, valid, test; not {', '.join(bad)}")
    return {split: int(n) for split, _, n in (text.partition("=") for text in given)}


def _rates(given: list[str] | None) -> dict[str, float]:
    bad = [text for text in given or () if not re.fullmatch(r"(audio|video)=\d+(\.\d+)?", text)]
    if bad:
        raise ValueError(f"--rate is audio=N or video=N, N frames a second; not {', '.join(bad)}")
    return {name: float(n) for name, _, n in (text.partition("=") for text in given or ())}


@contextlib.contextmanager
def _splits_bar() -> Iterator[Callable[[str, int, int | None], None]]:
    with progress_bar() as bar:
        rows: dict[str, Any] = {}

        def progress(split: str, done: int, total: int | None) -> None:
            if split not in rows:
                rows[split] = bar.add_task(split, total=total)
            bar.update(rows[split], completed=done, total=total)

        yield progress
