"""Which examples are held out and which an epoch sees, decided on a few bytes an example.

Shapes: M examples in the order they were read.
"""

from __future__ import annotations

import hashlib
import json
from decimal import ROUND_HALF_UP, Decimal

import numpy as np

from lmray.data.base import Example
from lmray.data.spec import DataSource, EvalData
from lmray.errors import ConfigError, DataError


def group_number(example: Example, spec: EvalData) -> int:
    """The group of `example`, as 64 bits of a digest: examples of one group go to the same side. Raises ConfigError
    where it has no column `spec.by`."""
    if spec.by is None:
        return _number(example.where)
    if spec.by not in example.columns:
        raise ConfigError(
            "data.eval.by", f"no column `{spec.by}` in {example.where}", allowed=", ".join(example.columns)
        )
    return _number(f"{spec.seed} {example.columns[spec.by]}")


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8])


def held_out(groups_M: np.ndarray, spec: EvalData) -> np.ndarray:
    """Whether each example is held out: whole groups (uint64), in an order fixed by their names and the seed, until
    `split` of all examples are."""
    assert spec.split is not None
    numbers, first, group_M, sizes = np.unique(groups_M, return_index=True, return_inverse=True, return_counts=True)
    if spec.by is None:  # a path is no stable name: a group's name is its number in order of appearance
        names = np.empty(len(first), dtype=np.int64)
        names[np.argsort(first)] = np.arange(len(first))
        numbers = np.fromiter((_number(f"{spec.seed} {name}") for name in names), np.uint64, len(names))
    order = np.argsort(numbers, kind="stable")
    enough = np.searchsorted(np.cumsum(sizes[order]), spec.split * len(groups_M)) + 1
    chosen = np.zeros(len(sizes), dtype=bool)
    chosen[order[:enough]] = True
    return chosen[group_M]


def question_group(example: Example, by: str | None) -> int:
    """The group of `example`, as 64 bits of a digest: of its column `by`, or of all that stands before its last answer;
    of plain text, of the text."""
    if by is not None:
        return _number(str(example.columns[by]))
    asked = [example.text] if example.text is not None else [*example.prompt, example.tools]
    return _number(json.dumps(asked, ensure_ascii=False, sort_keys=True))


def set_aside(sources_M: np.ndarray, groups_R: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Whether each example is set aside: whole groups, in an order fixed by the seed, as near as they come to
    `fraction` of all rows, at least one. `sources_M`: the row, below R, that each example was made of; `groups_R`
    (uint64): the group of each row. Raises DataError where no other group would be left."""
    rows = np.unique(sources_M)
    numbers, group_of_row, sizes = np.unique(groups_R[rows], return_inverse=True, return_counts=True)
    if len(numbers) < 2:
        found = f"has {len(rows)} row(s) of one group, and none would be left to train on beside those to search on"
        raise DataError("data.train", found, hint="add data: rows with one prompt, or one `data.eval.by`, are a group")
    order = np.argsort(np.fromiter((_number(f"{seed} search {one}") for one in numbers), np.uint64, len(numbers)))
    count = 1 + np.abs(np.cumsum(sizes[order])[:-1] - fraction * len(rows)).argmin()
    chosen = np.zeros(len(numbers), dtype=bool)
    chosen[order[:count]] = True
    return np.isin(sources_M, rows[chosen[group_of_row]])


def weighted(indices: np.ndarray, source: DataSource) -> np.ndarray:
    """What an epoch sees of the examples at `indices`: `weight` times their number, rounded half up.

    Each is there as often as the whole part of the weight says; of the fraction, examples at even distances once more.
    Nothing is drawn by chance. Raises DataError where a small weight leaves none of them.
    """
    total = (Decimal(str(source.weight)) * len(indices)).to_integral_value(ROUND_HALF_UP)
    if len(indices) and not total:
        found = f"`weight: {source.weight}` of {len(indices)} example(s) leaves none"
        raise DataError(f"data source `{source.source}`", found, hint="raise the weight, or leave the source out")
    whole, count = divmod(int(total), max(1, len(indices)))
    return np.concatenate([*[indices] * whole, indices[np.arange(count) * len(indices) // max(1, count)]])
