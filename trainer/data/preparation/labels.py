"""Labels of a sample that are more than one word: the set of those that apply, and the shares of annotators that gave each.

Legend: C labels of the task.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.label_sets import split_set

Report = Callable[..., None]  # a fault of the sample: kind, detail, repair
Find = Callable[[Any, Report], int | None]  # the index of a label, or a fault


def label_set(given: Any, labels: Sequence[str], find: Find, fault: Report) -> list[int] | None:
    """The indices of the labels that apply; None where that cannot be told, which is reported.

    Args:
        given: a list of labels; their words with a comma, semicolon or bar between them, "none" where none applies; a mapping from
            label to 0 or 1; or a list of C zeros and ones in the task's order.
    """
    if (
        given is None
        or (isinstance(given, str) and not given.strip())
        or (isinstance(given, float) and math.isnan(given))
    ):
        fault("no label", "an empty set of labels is written [] or 'none'")
        return None
    if isinstance(given, Mapping):
        flags, names = list(given.values()), list(given)
    elif isinstance(given, (list, tuple)) and given and all(map(_is_number, given)):
        if len(given) != len(labels):
            fault(
                "wrong number of labels",
                f"{len(given)} numbers for {len(labels)} labels: one of 0 and 1 for each, in the task's order",
            )
            return None
        flags, names = list(given), list(labels)
    else:
        words = (
            split_set(given) if isinstance(given, str) else list(given) if isinstance(given, (list, tuple)) else [given]
        )
        flags, names = [1] * len(words), words
    if wrong := [flag for flag in flags if not _is_number(flag) or flag not in (0, 1)]:
        fault(
            "label that neither applies nor does not",
            f"{str(wrong[0])[:40]!r}: write 1 for a label that applies, 0 for others",
        )
        return None
    found = [find(name, fault) for name in names]
    if None in found:
        return None
    return [index for index, flag in zip(found, flags, strict=True) if index is not None and flag]


def label_shares(given: Any, labels: Sequence[str], find: Find, fault: Report) -> list[float] | None:
    """`[C]`: the share of annotators that gave each label, which sum to 1; None where they cannot be told, which is reported.

    Args:
        given: a mapping from label to a share or a number of annotators, labels that it does not have 0; or a list of C of them in
            the task's order.
    """
    if isinstance(given, Mapping):
        names, values = list(given), list(given.values())
    elif all(map(_is_number, given)) and len(given) == len(labels):
        names, values = list(labels), list(given)
    elif all(map(_is_number, given)):
        fault(
            "wrong number of labels", f"{len(given)} shares for {len(labels)} labels: one for each, in the task's order"
        )
        return None
    else:
        fault(
            "several labels",
            f"{str(given)[:60]}: for shares of annotators write {{label: share}}; a task whose samples have several labels is of "
            "kind: multilabel",
        )
        return None
    if wrong := [value for value in values if not _is_number(value) or not math.isfinite(value) or value < 0]:
        fault("share of a label that is no share", f"{str(wrong[0])[:40]!r}: shares are 0 or more")
        return None
    found = [find(name, fault) for name in names]
    if None in found:
        return None
    total = math.fsum(values)
    if not total > 0:
        fault("no label", "all shares are 0")
        return None
    share_C = [0.0] * len(labels)
    for index, value in zip(found, values, strict=True):
        assert index is not None
        share_C[index] += value / total
    return share_C


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, str)
