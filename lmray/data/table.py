"""Tokenised examples side by side in a few flat arrays, in memory or on disk; an example is made when it is asked for.

Shapes: N tokens, M examples of one part.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np

from lmray.data.base import Example

IGNORED = -100


@dataclass(frozen=True, eq=False)
class Tokenised:
    """One example: `labels[t]` is `input_ids[t]` where it is supervised, else IGNORED."""

    input_ids: np.ndarray
    """int32; any sequence of ints will do."""
    labels: np.ndarray
    where: str = ""
    """`file:row` of what it was made of; no part of equality."""

    def __post_init__(self):
        for name in ("input_ids", "labels"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.int32))

    def __len__(self) -> int:
        return len(self.input_ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokenised):
            return NotImplemented
        return np.array_equal(self.input_ids, other.input_ids) and np.array_equal(self.labels, other.labels)

    __hash__ = None  # type: ignore[assignment]

    @property
    def num_supervised(self) -> int:
        """Tokens a loss is taken on; the first has nothing before it to predict it from."""
        return int(np.count_nonzero(self.labels[1:] != IGNORED))


@dataclass(frozen=True, eq=False)
class Part:
    """Examples one after the other."""

    ids_N: np.ndarray
    """int32."""
    labels_N: np.ndarray
    """int32."""
    offsets_M: np.ndarray
    """int64, one more than there are examples: where each starts, and the end."""
    sources_M: np.ndarray
    """int64: the place, among what was tokenised, of what each example was made of."""

    @classmethod
    def of(cls, examples: Sequence[Tokenised], sources: Sequence[int]) -> Part:
        """`examples` copied into one part."""
        none = np.zeros(0, dtype=np.int32)
        offsets = np.cumsum([0, *map(len, examples)], dtype=np.int64)
        ids = np.concatenate([none, *(one.input_ids for one in examples)])
        labels = np.concatenate([none, *(one.labels for one in examples)])
        return cls(ids, labels, offsets, np.array(sources, dtype=np.int64))

    @classmethod
    def joined(cls, parts: Sequence[Part]) -> Part:
        """All of `parts`, at least one, in one."""
        lengths = np.concatenate([np.diff(part.offsets_M) for part in parts])
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        ids, labels, sources = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("ids_N", "labels_N", "sources_M")
        )
        return cls(ids, labels, offsets, sources)

    def __len__(self) -> int:
        return len(self.offsets_M) - 1


class Table(Sequence[Tokenised]):
    """The examples of all `parts`, in order. `made_of` is what was tokenised; where it is not given, no example says
    where it stood."""

    def __init__(self, parts: Sequence[Part], made_of: Sequence[Example] = ()):
        self.parts, self.made_of = tuple(parts), made_of
        self._starts = np.cumsum([0, *map(len, parts)]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *(np.diff(part.offsets_M) for part in self.parts)])

    @cached_property
    def sources(self) -> np.ndarray:
        """The place, among what was tokenised, of what each example was made of, int64."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *(part.sources_M for part in self.parts)])

    @overload
    def __getitem__(self, index: int) -> Tokenised: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tokenised]: ...
    def __getitem__(self, index: int | slice) -> Tokenised | list[Tokenised]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        which = bisect_right(self._starts, place) - 1
        part, row = self.parts[which], place - self._starts[which]
        start, stop = part.offsets_M[row : row + 2]
        where = self.made_of[int(part.sources_M[row])].where if self.made_of else ""
        return Tokenised(part.ids_N[start:stop], part.labels_N[start:stop], where)
