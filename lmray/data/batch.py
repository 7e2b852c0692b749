"""Rows and batches: several examples may share a row, each with positions of its own, so that none sees another.

`transformers` builds the block-causal mask from `position_ids` that start again, for every attention implementation.
Shapes: B rows, T tokens of the longest row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
import torch

from lmray.data.lazy import LazySequence
from lmray.data.table import IGNORED, Table, Tokenised

Packed = tuple[Tokenised, ...]
"""Examples that share a row."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch."""

    input_ids_BT: torch.Tensor
    """int64; padded on the right."""
    position_ids_BT: torch.Tensor
    """int64; counts from 0 in every example."""
    labels_BT: torch.Tensor
    """int64; IGNORED where no loss is taken, so at every example's first token."""
    num_supervised: int
    num_tokens: int
    """Without padding."""
    lengths: tuple[tuple[int, ...], ...] = ()
    """Of the examples of every row, in their order."""

    @property
    def example_lengths(self) -> torch.Tensor:
        """(B, T) int64; tokens of the example that each token is of, 1 for padding."""
        lengths_BT = torch.ones_like(self.input_ids_BT)
        for row, lengths in enumerate(self.lengths):
            of_examples = torch.tensor(lengths)
            lengths_BT[row, : sum(lengths)] = of_examples.repeat_interleave(of_examples)
        return lengths_BT

    @property
    def real(self) -> torch.Tensor:
        """(B, T) bool; which tokens are not padding."""
        real_BT = torch.zeros_like(self.input_ids_BT, dtype=torch.bool)
        for row, lengths in enumerate(self.lengths):
            real_BT[row, : sum(lengths)] = True
        return real_BT

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model is called with."""
        return {"input_ids": self.input_ids_BT, "position_ids": self.position_ids_BT}

    def pin_memory(self) -> Batch:
        """In memory that a GPU copies from by itself."""
        return self._with(torch.Tensor.pin_memory)

    def to(self, device: str) -> Batch:
        """On `device`; from pinned memory the copy goes on beside what this thread does next."""
        return self._with(lambda one: one.to(device, non_blocking=one.is_pinned()))

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        ids, positions, labels = map(change, (self.input_ids_BT, self.position_ids_BT, self.labels_BT))
        return Batch(ids, positions, labels, self.num_supervised, self.num_tokens, self.lengths)


class Rows(LazySequence[Packed]):
    """R rows over the examples of `table`, made when they are asked for: row r holds those at `members`, from
    `starts_R[r]` up to but not including `starts_R[r + 1]`."""

    def __init__(self, table: Table, members: np.ndarray, starts_R: np.ndarray):
        self.table, self.members, self.starts_R = table, members, starts_R

    def __len__(self) -> int:
        return len(self.starts_R) - 1

    def item(self, index: int) -> Packed:
        start, stop = self.starts_R[index : index + 2]
        return tuple(self.table[one] for one in self.members[start:stop].tolist())

    @property
    def sizes(self) -> np.ndarray:
        """Examples of each row."""
        return np.diff(self.starts_R)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return self._sums(self.table.lengths)

    @property
    def supervised(self) -> np.ndarray:
        """Tokens of each row that a loss is taken on."""
        return self._sums(self.table.supervised)

    def _sums(self, column: np.ndarray) -> np.ndarray:
        """Of each row, the sum of `column`, which has a number for each example of the table."""
        before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(column[self.members])])
        return np.diff(before[self.starts_R])


def unpacked(examples: Sequence[Tokenised]) -> Rows:
    """A row for each of `examples`."""
    return Rows(Table.of(examples), np.arange(len(examples)), np.arange(len(examples) + 1))


def pack(examples: Sequence[Tokenised], *, max_length: int) -> Rows:
    """Rows of at most `max_length` tokens by best fit, longest first; deterministic, every example once."""
    table = Table.of(examples)
    longest_first = np.argsort(-table.lengths, kind="stable")
    row_of = np.empty(len(table), dtype=np.int64)  # of each of `longest_first`
    num_rows = 0
    rooms: list[int] = []  # tokens left in some row: sorted, each once
    rows_with: dict[int, list[int]] = {}  # tokens left -> heap of rows
    for number, length in enumerate(map(int, table.lengths[longest_first])):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, left = num_rows, max_length - length
            num_rows += 1
        else:
            room = rooms[place]
            row, left = heappop(rows_with[room]), room - length
            if not rows_with[room]:
                rooms.pop(place)
        row_of[number] = row
        if not rows_with.get(left):
            insort(rooms, left)
        heappush(rows_with.setdefault(left, []), row)
    members = longest_first[np.argsort(row_of, kind="stable")]
    return Rows(table, members, np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))]))


def collate(
    rows: Sequence[Packed],
    *,
    pad_token_id: int,
    padded: Callable[[int], int] = lambda longest: longest,
    padding_apart: bool = False,
) -> Batch:
    """`rows` side by side, padded to `padded(longest)` tokens. Padding counts positions on where no row is
    packed (causal attention suffices); else, or where it is to be `padding_apart`, for a model whose positions hang on
    an example's length, a row's padding is an example of its own, which nothing attends to."""
    lengths = [sum(map(len, row)) for row in rows]
    shape = (len(rows), padded(max(lengths)))
    packed = any(len(row) > 1 for row in rows) or (padding_apart and min(lengths) < shape[1])
    ids_BT = np.full(shape, pad_token_id, dtype=np.int64)
    labels_BT = np.full(shape, IGNORED, dtype=np.int64)
    positions_BT = np.zeros(shape, dtype=np.int64) if packed else np.tile(np.arange(shape[1]), (shape[0], 1))
    for number, row in enumerate(rows):
        start = 0
        for example in row:
            stop = start + len(example)
            ids_BT[number, start:stop] = example.input_ids
            labels_BT[number, start + 1 : stop] = example.labels[1:]
            positions_BT[number, start:stop] = np.arange(len(example))
            start = stop
        if packed:
            positions_BT[number, start:] = np.arange(shape[1] - start)
    return Batch(
        torch.from_numpy(ids_BT),
        torch.from_numpy(positions_BT),
        torch.from_numpy(labels_BT),
        num_supervised=sum(example.num_supervised for row in rows for example in row),
        num_tokens=sum(len(example) for row in rows for example in row),
        lengths=tuple(tuple(map(len, row)) for row in rows),
    )
