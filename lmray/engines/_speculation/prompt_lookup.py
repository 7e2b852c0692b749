"""Prompt lookup: what followed the last tokens where they stood before is proposed to follow again.

Saxena, "Prompt Lookup Decoding" (2023, github.com/apoorvumang/prompt-lookup-decoding), and Yang et al., "Inference with
Reference", arXiv 2304.04487. Costs next to nothing; of use where an answer repeats its prompt or itself: summaries,
corrections, code, extraction.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from typing import Annotated, Any
from weakref import WeakKeyDictionary

from pydantic import Field

from lmray.engines._schedule import Limits, Sequence
from lmray.engines._speculation.base import Proposer, Speculation

_MIN_NGRAM_SIZE = 2
"""A single token has too many places."""


class PromptLookup(Speculation):
    """Proposes from the sequence's own tokens.

    Differs from its sources in: the last place counts, not the first; and a proposal may run on into itself, so that a
    loop is continued.
    """

    num_tokens: Annotated[int, Field(ge=1, le=16)] = 8
    """Tokens that are proposed at most to a sequence in a step; fewer, or none, where that pays better."""
    max_matching_ngram_size: Annotated[int, Field(ge=1, le=16)] = 3
    """Tokens that must have stood there before; where they did not, one less, down to 2."""

    def start(self, model: Any, limits: Limits) -> Proposer:
        return _Lookup(range(self.max_matching_ngram_size, min(self.max_matching_ngram_size, _MIN_NGRAM_SIZE) - 1, -1))


class _Lookup:
    def __init__(self, sizes: range):
        """`sizes` of n-grams, the best first."""
        self._sizes = sizes
        self._places: WeakKeyDictionary[Sequence, _Places] = WeakKeyDictionary()

    def propose(self, asked: Sequence_[tuple[Sequence, int]]) -> list[list[int]]:
        return [self._of(sequence).after(sequence.tokens, count) for sequence, count in asked]

    def forget(self, blocks: Sequence_[int]) -> None:
        """Nothing: it keeps nothing in blocks."""

    def _of(self, sequence: Sequence) -> _Places:
        if sequence not in self._places:
            self._places[sequence] = _Places(self._sizes)
        return self._places[sequence]


class _Places:
    """Where each n-gram of one sequence ended last."""

    def __init__(self, sizes: range):
        self._ends: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in sizes}
        self._num_known = 0

    def after(self, tokens: list[int], count: int) -> list[int]:
        """Up to `count` tokens that followed the end of `tokens` before. `tokens` only grow."""
        for size, ends in self._ends.items():
            for end in range(max(size, self._num_known), len(tokens)):  # the last n-gram has nothing behind it yet
                ends[tuple(tokens[end - size : end])] = end
        self._num_known = len(tokens)
        for size, ends in self._ends.items():
            end = ends.get(tuple(tokens[-size:]))
            if end is not None:
                return _copy(tokens, end, count)
        return []


def _copy(tokens: list[int], start: int, count: int) -> list[int]:
    """`count` tokens from `start` on, where they run out those that were copied already."""
    known = tokens[start : start + count]
    while len(known) < count:
        known += known[: count - len(known)]
    return known[:count]
