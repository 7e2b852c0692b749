"""Examples joined end to end and cut into rows of one length: how continual pre-training reads a corpus.

Row i holds the stream's tokens i (T - 1) to i (T - 1) + T. Neighbours share one token, so that every token but the
stream's first is predicted once, and no token is padding; the last row alone may be shorter. A row is found by its
number, so a place in the corpus is a number of rows and a run goes on in the middle of an epoch.

Shapes: T tokens of a row (`max_length`), N tokens of all examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from lmray.data.table import Table, Tokenised


class Stream(Sequence[tuple[Tokenised, ...]]):
    """Rows over `examples`, made when they are asked for. `apart`: the examples in a row stay examples, each with
    positions of its own; else a row is one sequence that runs through them. Rows without a supervised token are left
    out."""

    def __init__(self, examples: Sequence[Tokenised], *, max_length: int, apart: bool):
        self.examples, self.max_length, self.apart = examples, max_length, apart
        lengths = examples.lengths if isinstance(examples, Table) else np.array([len(one) for one in examples])
        self._ends = np.cumsum(lengths)
        count = -(-int(self._ends[-1] - 1) // (max_length - 1))
        facts = np.array([_facts(self._row(place)) for place in range(count)], dtype=np.int64)
        self._places = np.flatnonzero(facts[:, 2]).tolist()
        self.sizes, self.lengths, self.supervised = facts[self._places].T
        """Of each row: examples, tokens, and tokens a loss is taken on."""

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> tuple[Tokenised, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Tokenised, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Tokenised, ...] | list[tuple[Tokenised, ...]]:
        if isinstance(index, slice):
            return [self._row(place) for place in self._places[index]]
        return self._row(self._places[index])

    def _row(self, place: int) -> tuple[Tokenised, ...]:
        start = place * (self.max_length - 1)
        stop = min(start + self.max_length, int(self._ends[-1]))
        parts = []
        for index in range(int(np.searchsorted(self._ends, start, side="right")), len(self.examples)):
            one, end = self.examples[index], int(self._ends[index])
            begin = end - len(one)
            if begin >= stop:
                break
            cut = slice(max(start - begin, 0), stop - begin)
            parts.append(Tokenised(one.input_ids[cut], one.labels[cut], one.where))
        return tuple(parts) if self.apart else (_joined(parts),)


def _facts(row: tuple[Tokenised, ...]) -> tuple[int, int, int]:
    return len(row), sum(map(len, row)), sum(one.num_supervised for one in row)


def _joined(parts: Sequence[Tokenised]) -> Tokenised:
    if len(parts) == 1:
        return parts[0]
    ids, labels = (np.concatenate([getattr(one, name) for one in parts]) for name in ("input_ids", "labels"))
    return Tokenised(ids, labels, f"{parts[0].where} to {parts[-1].where}")
