"""What the training data is like, for people: lengths, the share that is learned from, where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmray.artifacts.files import sha256_json
from lmray.data.places import NO_ROW
from lmray.data.table import Table
from lmray.train.prepare import Prepared

NUM_BINS = 20
MAX_NAMED = 100_000
"""Rows of a part beyond which only their digest is told."""
MAX_FILES = 12
"""So many files are listed one by one; where there are more, their folders are."""


def data_statistics(prepared: Prepared) -> dict[str, Any]:
    """JSON types: `train` and `eval`, each with `examples`, `tokens`, `supervised_tokens`, `lengths` (a histogram's
    `edges` and `counts`) and the same numbers by file in `sources`. Where rows were set aside, `search` too, and of
    each `rows`, `rows_digest` and `rows_in`: they have no row in common."""
    parts = {"train": prepared.train.examples, "search": prepared.search.examples, "eval": prepared.eval.examples}
    found = {name: _part(examples) for name, examples in parts.items() if examples}
    if prepared.search_rows:
        for name in found:
            found[name] |= _rows_of(parts[name])
    return found


def _rows_of(examples: Table) -> dict[str, Any]:
    """How many different rows `examples` were made of, a digest of where these stand, and, unless there are very many,
    their numbers by file; none of a file that is one row."""
    chosen = np.unique(examples.sources)
    places = sorted({examples.places[int(row)] for row in chosen})
    found: dict[str, Any] = {"rows": len(places), "rows_digest": sha256_json(places)}
    if len(places) <= MAX_NAMED:
        files, rows = examples.places.files_M[chosen], examples.places.rows_M[chosen]
        order = np.lexsort((rows, files))
        used, firsts = np.unique(files[order], return_index=True)
        parts = np.split(rows[order], firsts[1:])
        names = examples.places.names
        found["rows_in"] = {names[file]: spans(part) for file, part in zip(used.tolist(), parts, strict=True)}
    return found


def spans(numbers: np.ndarray) -> str:
    """`1-3, 7` of 1, 2, 3 and 7, in any order; nothing of a place without a row."""
    rising = np.unique(numbers[numbers != NO_ROW])
    if not len(rising):
        return ""
    runs = np.split(rising, np.flatnonzero(np.diff(rising) > 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _part(examples: Table) -> dict[str, Any]:
    whole = {"examples": np.ones(len(examples), np.int64), "tokens": examples.lengths}
    whole["supervised_tokens"] = examples.supervised
    file_of = examples.places.files_M[examples.sources]
    names = examples.places.names
    used = np.unique(file_of).tolist()
    by_folder = len(used) > MAX_FILES
    sources: dict[str, dict[str, int]] = {}
    by_file = {name: np.bincount(file_of, column, len(names)) for name, column in whole.items()}
    for index in used:
        source = str(Path(names[index]).parent) if by_folder else names[index]
        counts = sources.setdefault(source, dict.fromkeys(whole, 0))
        for name, sums in by_file.items():
            counts[name] += int(sums[index])
    totals = {name: int(column.sum()) for name, column in whole.items()}
    return totals | {"lengths": histogram(examples.lengths), "sources": dict(sorted(sources.items()))}


def histogram(lengths: Sequence[int] | np.ndarray) -> dict[str, list[int]]:
    """`counts[i]` of `lengths` are from `edges[i]` up to but not including `edges[i + 1]`; at most NUM_BINS of equal
    width."""
    low, high = int(np.min(lengths)), int(np.max(lengths))
    width = max(1, -(-(high - low + 1) // NUM_BINS))
    counts = np.bincount((np.asarray(lengths) - low) // width).tolist()
    return {"edges": [low + width * index for index in range(len(counts) + 1)], "counts": counts}
