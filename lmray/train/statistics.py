"""What the training data is like, for people: lengths, the share that is learned from, where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmray.data.tokenise import Tokenised
from lmray.train.prepare import Prepared

NUM_BINS = 20
MAX_FILES = 12
"""So many files are listed one by one; where there are more, their folders are."""


def data_statistics(prepared: Prepared) -> dict[str, Any]:
    """JSON types: `train` and `eval`, each with `examples`, `tokens`, `supervised_tokens`, `lengths` (a histogram's
    `edges` and `counts`) and the same numbers by file in `sources`."""
    parts = {"train": prepared.train.examples, "eval": prepared.eval.examples}
    return {name: _part(examples) for name, examples in parts.items() if examples}


def _part(examples: Sequence[Tokenised]) -> dict[str, Any]:
    files = {one.where.rpartition(":")[0] for one in examples}
    by_folder = len(files) > MAX_FILES
    sources: dict[str, list[Tokenised]] = {}
    for one in examples:
        file = one.where.rpartition(":")[0]
        sources.setdefault(str(Path(file).parent) if by_folder else file, []).append(one)
    counts = {name: _counts(those) for name, those in sorted(sources.items())}
    return _counts(examples) | {"lengths": histogram([len(one) for one in examples]), "sources": counts}


def _counts(examples: Sequence[Tokenised]) -> dict[str, int]:
    return {
        "examples": len(examples),
        "tokens": sum(map(len, examples)),
        "supervised_tokens": sum(one.num_supervised for one in examples),
    }


def histogram(lengths: Sequence[int]) -> dict[str, list[int]]:
    """`counts[i]` of `lengths` are from `edges[i]` up to but not including `edges[i + 1]`; at most NUM_BINS of equal
    width."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // NUM_BINS))
    counts = [0] * ((high - low) // width + 1)
    for length in lengths:
        counts[(length - low) // width] += 1
    return {"edges": [low + width * index for index in range(len(counts) + 1)], "counts": counts}
