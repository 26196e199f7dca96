"""Which registered version gets an alias such as `champion`: that of the group of runs which validation shows to be better.

The rule, in full in docs/mlflow.md: a comparison on validation must hold exactly one group that is better than every rival with
significance, on every metric that was tested; the alias's present version must be of a compared run. Nothing else moves an alias.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainer.results.compare.differences import number_of_tests
from trainer.results.compare.groups import Group
from trainer.results.compare.result import EVERY, Comparison, Difference
from trainer.results.compare.sources.compared_run import ComparedRun
from trainer.results.compare.sources.from_mlflow import connect
from trainer.serving.mlflow_model.tags import STEP, validation_tag

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

SPLIT = "valid"  # the only split on which a version is promoted
SAME_SCORE = 1e-6  # a version's score as it was registered, and as its run's predictions give it now
CORRECTIONS = {
    "holm": "corrected by Holm's method",
    "bh": "corrected by Benjamini and Hochberg's method",
    "none": "not corrected",
}
_ALIAS = re.compile(r"""([^@:/"'%]+)@([A-Za-z0-9_.-]+)""")


class PromotionError(ValueError):
    """A promotion that is refused; the message has the numbers."""


@dataclass(frozen=True)
class Target:
    """A registered model and the alias to be set."""

    name: str
    alias: str

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}"


@dataclass(frozen=True)
class Promotion:
    """What became of an alias. `version` has it now, `previous` had it before (None: nobody); `lines` say why, for people."""

    target: Target
    group: str
    version: str
    previous: str | None
    lines: list[str] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        return self.version != self.previous

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.target.name,
            "alias": self.target.alias,
            "group": self.group,
            "version": self.version,
            "previous": self.previous,
            "changed": self.changed,
            "why": self.lines,
        }


def parse_target(text: str) -> Target:
    """``NAME@ALIAS`` as it is typed.

    Raises:
        PromotionError: it is something else, or an alias that MLflow keeps for itself (`latest`, `v1`).
    """
    match = _ALIAS.fullmatch(text)
    if match is None:
        raise PromotionError(f"--promote {text!r}: write NAME@ALIAS, such as meld@champion")
    if match[2].lower() == "latest" or re.fullmatch(r"v\d+", match[2], re.IGNORECASE):
        raise PromotionError(f"--promote {text!r}: MLflow keeps the alias {match[2]} for itself, choose another")
    return Target(match[1], match[2])


def check_request(text: str, *, split: str | None, force: bool, correction: str, kinds: bool) -> Target:
    """Before anything is read: whether a comparison with these options may promote at all.

    Raises:
        PromotionError: every reason against it.
    """
    target = parse_target(text)
    faults = []
    if split not in (None, SPLIT):
        faults.append(
            f"--split {split}: a version that is chosen on {split} has no honest {split} score any more; promotion looks at "
            "validation only (--split valid, the default beside --promote)"
        )
    if force:
        faults.append("--force: runs on other data or of other tasks say nothing about which one is better")
    if correction == "none":
        faults.append(
            "--correction none: every further group would be one more chance to be promoted by luck; use holm or bh"
        )
    if kinds:
        faults.append("--kinds: the decision is about all samples, and tests by kind would only weaken it")
    if faults:
        raise PromotionError("\n  ".join([f"--promote {target} does not go with:", *faults]))
    return target


def promote(comparison: Comparison, target: Target, uri: str) -> Promotion:
    """Set the alias to the best version of the group that is better with significance; the comparison must be on validation.

    Args:
        uri: the MLflow store with the registry; run ids of the comparison are looked up there and nowhere else.

    Raises:
        PromotionError: nothing may be promoted, with the numbers and what to do; nothing was changed.
        ValueError: the store cannot be read or written.
    """
    if comparison.split != SPLIT:
        raise PromotionError(f"a comparison on {comparison.split} promotes nothing: compare on {SPLIT}")
    from mlflow.exceptions import MlflowException

    client = connect(uri)
    try:
        versions = _versions(client, target, uri)
        present = _present(client, target)
        holder = None if present is None else _group_of(comparison, present, target)
        winner, reasons = _winner(comparison, holder)
        if present is not None and holder is winner:
            lines = [f"{target} stays version {present.version}: its group is better", *reasons]
            return Promotion(target, winner.name, str(present.version), str(present.version), lines)
        chosen, why = _best_version(comparison, winner, versions, target)
        previous = None if present is None else str(present.version)
        lines = [
            f"{target} is now version {chosen.version}, {'for the first time' if previous is None else f'before it was version {previous}'}",
            *why,
            *reasons,
        ]
        client.set_model_version_tag(target.name, chosen.version, f"egmf.promoted.{target.alias}", _record(lines))
        client.set_registered_model_alias(target.name, target.alias, chosen.version)
    except MlflowException as error:
        raise ValueError(f"MLflow at {uri} refuses: {str(error).splitlines()[0]}") from error
    return Promotion(target, winner.name, str(chosen.version), previous, lines)


def _record(lines: Sequence[str]) -> str:
    """What the version says of its promotion; MLflow takes up to 100,000 characters of a tag."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return f"{now}: {'; '.join(lines)}"[:5000]


def _versions(client: MlflowClient, target: Target, uri: str) -> list[ModelVersion]:
    """All versions of the model, newest first."""
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{target.name}'", max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            break
    if not found:
        raise PromotionError(
            f"MLflow at {uri} has no registered model {target.name}: egmf export RUN --mlflow {target.name} registers a version"
        )
    return sorted(found, key=lambda version: int(version.version), reverse=True)


def _present(client: MlflowClient, target: Target) -> ModelVersion | None:
    """The version that has the alias now."""
    aliases: dict[str, Any] = client.get_registered_model(target.name).aliases
    if target.alias not in aliases:
        return None
    return client.get_model_version_by_alias(target.name, target.alias)


def _group_of(comparison: Comparison, present: ModelVersion, target: Target) -> Group:
    """The compared group to which the run of the alias's version belongs."""
    for group in comparison.groups:
        for run in group.runs:
            if run.mlflow is not None and present.run_id == run.mlflow[1]:
                return group
    raise PromotionError(
        f"{target} is version {present.version}, of the MLflow run {present.run_id}, which is not among the compared runs: nothing says "
        "that another is better than it. Compare with its run too (its folder, or this id). To leave it out of account, take the alias "
        f"away first: MlflowClient().delete_registered_model_alias({target.name!r}, {target.alias!r})"
    )


def _winner(comparison: Comparison, holder: Group | None) -> tuple[Group, list[str]]:
    """The only group that is better than every rival, with the numbers; `holder` is that of the alias's present version.

    Rivals are all other groups, baselines of scikit-learn too; with ``--baseline`` that group alone.
    """
    named = {group.name: group for group in comparison.groups}
    tested = [d for d in comparison.differences if d.kind == EVERY]
    numbers = [_numbers(comparison, d) for d in tested]
    about = _about(comparison)
    if len(comparison.groups) < 2:
        raise PromotionError(
            f"there is one group, {comparison.groups[0].name}, and nothing to compare it with: give another group's runs, or baselines"
        )
    if holder is not None and comparison.baseline not in (None, holder.name):
        raise PromotionError(
            f"--baseline {comparison.baseline}: all groups are compared with it, and none with {holder.name}, which has the alias now; "
            "leave --baseline out, or name that group"
        )
    if not tested:
        raise PromotionError("\n  ".join(["no differences were tested, so nothing is promoted", *comparison.notes]))
    rivals = named.keys() if comparison.baseline is None else [comparison.baseline]
    better = [
        group
        for name, group in named.items()
        if any(rival != name for rival in rivals)
        and all(_beats(comparison, name, rival) for rival in rivals if rival != name)
    ]
    if holder is not None and comparison.baseline is not None and not better:
        better = [holder] if all(_beats(comparison, holder.name, name) for name in named if name != holder.name) else []
    if len(better) != 1:
        what = (
            f"{' and '.join(group.name for group in better)} are better than {comparison.baseline}, and were not compared with each other "
            "(leave --baseline out)"
            if better
            else "no group is better than "
            + (f"{comparison.baseline}" if comparison.baseline is not None else "every other")
            + f" with significance on {SPLIT}"
        )
        if holder is not None and comparison.baseline is None and len(comparison.groups) > 2:
            what += f" (--baseline {holder.name!r} compares with the group that has the alias alone)"
        raise PromotionError("\n  ".join([f"nothing is promoted: {what}", *numbers, about]))
    winner = better[0]
    if winner.baseline is not None:
        raise PromotionError(
            "\n  ".join(
                [
                    f"nothing is promoted: {winner.name}, which no training made, is better than the runs",
                    *numbers,
                    about,
                ]
            )
        )
    own = [text for d, text in zip(tested, numbers, strict=True) if winner.name in (d.group, d.baseline)]
    return winner, [*own, about]


def _beats(comparison: Comparison, group: str, rival: str) -> bool:
    """Whether every difference that was tested between the two is significant, and in favour of `group`."""
    found = [d for d in comparison.differences if d.kind == EVERY and {d.group, d.baseline} == {group, rival}]
    return bool(found) and all(d.significant and _in_favour(comparison, d, group) for d in found)


def _in_favour(comparison: Comparison, d: Difference, group: str) -> bool:
    assert d.value is not None
    sign = (1 if d.group == group else -1) * (-1 if d.metric in comparison.less_is_better else 1)
    return sign * d.value > 0


def _numbers(comparison: Comparison, d: Difference) -> str:
    """One difference in words: value, interval, p."""
    what = f"{f'{d.task}, ' if len(comparison.tasks) > 1 else ''}{d.metric}, {d.group} − {d.baseline}"
    if d.value is None or d.p is None or d.p_corrected is None:
        return f"{what}: no test was possible ({len(d.seeds)} common seeds, {d.n} samples)"
    interval = "" if d.low is None or d.high is None else f" [{d.low:+.4f}, {d.high:+.4f}]"
    seeds = f"{len(d.seeds)} seed{'s' if len(d.seeds) != 1 else ''}"
    verdict = "significant" if d.significant else "not significant"
    text = f"{what}: {d.value:+.4f}{interval}, p {d.p:.3g}, corrected {d.p_corrected:.3g}: {verdict} ({seeds}, {d.n} samples)"
    return text.replace("-0.", "−0.")


def _about(comparison: Comparison) -> str:
    tests = number_of_tests(comparison)
    corrected = CORRECTIONS[comparison.correction]
    return f"on {comparison.split}, level {1 - comparison.level:.2g}, p {corrected} for {tests} test{'s' if tests != 1 else ''}"


def _best_version(
    comparison: Comparison, group: Group, versions: Sequence[ModelVersion], target: Target
) -> tuple[ModelVersion, list[str]]:
    """Of the group's registered versions that of the run which is best on validation, and how it was chosen.

    A run's newest version counts. Of equal runs that of the smaller seed is taken.
    """
    if any(run.fold is not None for run in group.runs):
        raise PromotionError(
            f"{group.name} is a cross-validation: each of its models lacks a fold, and they answered different samples. Train on all "
            "data, and promote that"
        )
    task, metrics = next(iter(comparison.tested.items()))
    metric = metrics[0]
    score = comparison.score(task, group.name, metric)
    by_seed = dict(zip(score.seeds, score.values, strict=True))
    newest: dict[str, ModelVersion] = {}
    for version in versions:
        newest.setdefault(str(version.run_id), version)
    registered = [
        (run, newest[run.mlflow[1]]) for run in group.runs if run.mlflow is not None and run.mlflow[1] in newest
    ]
    missing = [run.name for run in group.runs if run.mlflow is None or run.mlflow[1] not in newest]
    if not registered:
        raise PromotionError(
            f"{group.name} is better, but none of its runs is registered as {target.name} ({', '.join(missing)}): "
            f"egmf export RUN --mlflow {target.name}"
        )
    _check_states(registered, by_seed, task, metric, target)
    less = metric in comparison.less_is_better

    def order(one: tuple[ComparedRun, ModelVersion]) -> tuple[bool, float, int]:
        value = by_seed[one[0].seed]
        return value is None, 0.0 if value is None else value if less else -value, one[0].seed

    run, version = min(registered, key=order)
    value = by_seed[run.seed]
    shown = "undefined" if value is None else f"{value:.4f}"
    why = [
        f"version {version.version} is that of {run.name} (seed {run.seed}, {metric} {shown} on {SPLIT}), the best on {SPLIT} of the group's "
        f"{len(registered)} registered run{'s' if len(registered) != 1 else ''}"
    ]
    if missing:
        why.append(f"not registered, so not a choice: {', '.join(missing)}")
    return version, why


def _check_states(
    registered: Sequence[tuple[ComparedRun, ModelVersion]],
    by_seed: dict[int, float | None],
    task: str,
    metric: str,
    target: Target,
) -> None:
    """Refuse versions whose score on validation was another when they were registered: the run was trained on since then."""
    faults = []
    for run, version in registered:
        then, now = version.tags.get(validation_tag(task, metric)), by_seed[run.seed]
        if then is None or now is None:
            continue
        if abs(float(then) - now) > SAME_SCORE:
            step = version.tags.get(STEP, "?")
            faults.append(
                f"{run.name}: version {version.version} was registered at step {step} with {metric} {float(then):.4f} on {SPLIT}, the run's "
                f"predictions have {now:.4f} now"
            )
    if faults:
        cure = f"register these runs as they are now (egmf export RUN --mlflow {target.name})"
        raise PromotionError("\n  ".join([f"versions that are not what was compared: {cure}", *faults]))
