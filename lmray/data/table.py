"""Tokenised examples side by side in a few flat arrays, in memory or on disk; an example is made when it is asked for.

Shapes: N tokens, M examples of one part, each with at least a token; S of what was tokenised.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from lmray.data.lazy import LazySequence
from lmray.data.places import NOWHERE, Places

IGNORED = -100
NONE = np.zeros(0, dtype=np.int64)


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
    """Examples one after the other, and what was tokenised with them and not kept as it is."""

    ids_N: np.ndarray
    """int32."""
    labels_N: np.ndarray
    """int32."""
    offsets_M: np.ndarray
    """int64, one more than there are examples: where each starts, and the end."""
    supervised_M: np.ndarray
    """int64: tokens a loss is taken on."""
    borders_M3: np.ndarray
    """int32: first id, second id (-1: none) and last label, so that no page of tokens is read for them."""
    sources_M: np.ndarray
    """int64, rising: the place, among what was tokenised, of what each example was made of."""
    dropped_S: np.ndarray
    """int64, such places too: of what was longer than `max_length` and left out,"""
    truncated_S: np.ndarray
    """of what was cut,"""
    empty_S: np.ndarray
    """and of what was left out for having no supervised token: no answer, or cut off before it."""

    @classmethod
    def of(
        cls,
        examples: Sequence[Tokenised],
        sources: Sequence[int],
        *,
        dropped: Sequence[int] = (),
        truncated: Sequence[int] = (),
        empty: Sequence[int] = (),
    ) -> Part:
        """`examples` copied into one part."""
        none = np.zeros(0, dtype=np.int32)
        offsets = np.cumsum([0, *map(len, examples)], dtype=np.int64)
        ids = np.concatenate([none, *(one.input_ids for one in examples)])
        labels = np.concatenate([none, *(one.labels for one in examples)])
        starts, ends = offsets[:-1], offsets[1:]
        has_loss = labels != IGNORED
        has_loss[starts] = False  # nothing stands before an example's first token
        before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(has_loss)])
        second = np.where(ends - starts > 1, ids[np.minimum(starts + 1, ends - 1)], -1)
        borders = np.stack([ids[starts], second, labels[ends - 1]], axis=1).astype(np.int32)
        places = (np.array(one, dtype=np.int64) for one in (sources, dropped, truncated, empty))
        return cls(ids, labels, offsets, np.diff(before[offsets]), borders, *places)

    @classmethod
    def joined(cls, parts: Sequence[Part]) -> Part:
        """All of `parts`, at least one, in one."""
        names = [field.name for field in fields(cls) if field.name != "offsets_M"]
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        lengths = np.concatenate([np.diff(part.offsets_M) for part in parts])
        return cls(**arrays, offsets_M=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]))

    def __len__(self) -> int:
        return len(self.offsets_M) - 1


class Table(LazySequence[Tokenised]):
    """The examples of all `parts` in order; with `chosen` those at its indices, which may repeat and leave out.

    `places` says where what was tokenised stood; where it is not given, no example knows."""

    def __init__(self, parts: Sequence[Part], places: Places = NOWHERE, chosen: np.ndarray | None = None):
        self.parts, self.places, self.chosen = tuple(parts), places, chosen
        self._starts = np.cumsum([0, *map(len, parts)]).tolist()

    @classmethod
    def of(cls, examples: Sequence[Tokenised]) -> Table:
        """`examples` as a table."""
        if isinstance(examples, cls):
            return examples
        return cls([Part.of(examples, range(len(examples)))], Places.of(one.where for one in examples))

    def only(self, wanted: np.ndarray) -> Table:
        """The examples for which `wanted` is true, in their order."""
        chosen = np.flatnonzero(wanted)
        return Table(self.parts, self.places, chosen if self.chosen is None else self.chosen[chosen])

    def __len__(self) -> int:
        return self._starts[-1] if self.chosen is None else len(self.chosen)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64."""
        return self.column(lambda part: np.diff(part.offsets_M))

    @cached_property
    def supervised(self) -> np.ndarray:
        """Tokens of each example that a loss is taken on, int64."""
        return self.column(lambda part: part.supervised_M)

    @property
    def sources(self) -> np.ndarray:
        """The place of each example among what was tokenised, int64."""
        return self.column(lambda part: part.sources_M)

    def column(self, of: Callable[[Part], np.ndarray]) -> np.ndarray:
        """One number for each example: what `of` says of a part's, one part at a time."""
        whole = np.concatenate([NONE, *map(of, self.parts)])
        return whole if self.chosen is None else whole[self.chosen]

    def item(self, index: int) -> Tokenised:
        place = index if self.chosen is None else int(self.chosen[index])
        which = bisect_right(self._starts, place) - 1
        part, row = self.parts[which], place - self._starts[which]
        start, stop = part.offsets_M[row : row + 2]
        where = self.places[int(part.sources_M[row])] if self.places else ""
        return Tokenised(part.ids_N[start:stop], part.labels_N[start:stop], where)
