"""Rows and batches: several examples may share a row, each with positions of its own, so that none sees another.

`transformers` builds the block-causal mask from `position_ids` that start again, for every attention implementation.
Shapes: B rows, T tokens of the longest row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lmray.data.tokenise import IGNORED, Tokenised

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

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model is called with."""
        return {"input_ids": self.input_ids_BT, "position_ids": self.position_ids_BT}

    def to(self, device: str) -> Batch:
        ids, positions, labels = (one.to(device) for one in (self.input_ids_BT, self.position_ids_BT, self.labels_BT))
        return Batch(ids, positions, labels, self.num_supervised, self.num_tokens)


def pack(examples: Sequence[Tokenised], *, max_length: int) -> tuple[Packed, ...]:
    """Rows of at most `max_length` tokens by best fit, longest first; deterministic, every example once."""
    order = sorted(range(len(examples)), key=lambda index: (-len(examples[index]), index))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in order:
        length = len(examples[index])
        place = bisect_left(room, (length, -1))
        if place == len(room):
            rows.append([index])
            left, row = max_length - length, len(rows) - 1
        else:
            left, row = room.pop(place)
            rows[row].append(index)
            left -= length
        insort(room, (left, row))
    return tuple(tuple(examples[index] for index in row) for row in rows)


def collate(rows: Sequence[Packed], *, pad_token_id: int) -> Batch:
    """`rows` side by side. Padding counts positions on where no row is packed (causal attention suffices); else every
    padding token is an example of its own, which nothing attends to."""
    packed = any(len(row) > 1 for row in rows)
    width = max(sum(map(len, row)) for row in rows)
    ids, positions, labels = [], [], []
    for row in rows:
        tokens = [token for example in row for token in example.input_ids]
        places = [place for example in row for place in range(len(example))]
        marks = [mark for example in row for mark in (IGNORED, *example.labels[1:])]
        padding = width - len(tokens)
        ids.append(tokens + [pad_token_id] * padding)
        positions.append(places + ([0] * padding if packed else list(range(len(tokens), width))))
        labels.append(marks + [IGNORED] * padding)
    return Batch(
        torch.tensor(ids),
        torch.tensor(positions),
        torch.tensor(labels),
        num_supervised=sum(example.num_supervised for row in rows for example in row),
        num_tokens=sum(len(example) for row in rows for example in row),
    )
