"""Low-rank products of many adapters beside one frozen product: y += B A x, with another A and B for each row.

The adapters lie side by side, their ranks behind each other, so that a run of ranks is one product whoever owns them: a
row's ranks that are not its adapter's are set to 0 in between (the idea of Chen et al., "Punica", arXiv 2310.18547,
section 4, with a mask in place of a gather). B holds the adapter's scale.

Shapes: N rows, I inputs, O outputs of all parts, P parts (linear layers that share an input), C ranks in all, R of a
piece, n its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

MIN_MASKED = 3
"""Fewer adapters than this take one product each: that costs no more calls, and nothing is computed in vain."""
MAX_RANKS = 256
"""Ranks of a masked product: beyond, more is computed in vain than a call costs."""
MAX_CUTS = 64
"""Views that a stack keeps."""
MAX_WASTE = 2
"""A masked product takes at most so many times the ranks that are needed."""


@dataclass(frozen=True)
class Piece:
    """Rows of a step whose adapters lie in one run of ranks."""

    rows: slice
    ranks: slice
    others_nR: torch.Tensor | None
    """True where a rank is not of the row's adapter; None where all are."""


def make_pieces(rows: Sequence[tuple[range | None, int]], device: torch.device) -> list[Piece]:
    """Cuts the rows of a step into products. `rows`: the ranks of an adapter (None: the base model) and how many rows
    behind each other are its own. Best in the order of ranks, so that neighbours share a product."""
    pieces: list[Piece] = []
    waiting: list[tuple[range, int, int]] = []  # ranks, first row, end

    def flush() -> None:
        pieces.extend(_joined(waiting, device))
        waiting.clear()

    start = 0
    for ranks, count in rows:
        if ranks is None:
            flush()
        elif waiting and waiting[-1][0] == ranks:
            waiting[-1] = (ranks, waiting[-1][1], start + count)
        else:
            if waiting and not _fits([*waiting, (ranks, start, start + count)]):
                flush()
            waiting.append((ranks, start, start + count))
        start += count
    flush()
    return pieces


def _fits(runs: Sequence[tuple[range, int, int]]) -> bool:
    """Whether neighbours may share a product: few rows of each, and little between their ranks."""
    low, high = min(ranks.start for ranks, _, _ in runs), max(ranks.stop for ranks, _, _ in runs)
    needed = sum(len(ranks) for ranks, _, _ in runs)
    num_rows = runs[-1][2] - runs[0][1]
    return high - low <= min(MAX_RANKS, MAX_WASTE * needed) and num_rows <= 4 * len(runs)


def _joined(runs: Sequence[tuple[range, int, int]], device: torch.device) -> list[Piece]:
    if len(runs) < MIN_MASKED:
        return [Piece(slice(start, end), slice(ranks.start, ranks.stop), None) for ranks, start, end in runs]
    low, high = min(ranks.start for ranks, _, _ in runs), max(ranks.stop for ranks, _, _ in runs)
    bounds = [(ranks.start, ranks.stop) for ranks, start, end in runs for _ in range(end - start)]
    bounds_n2 = torch.tensor(bounds, device=device)
    ranks_R = torch.arange(low, high, device=device)
    others_nR = (ranks_R < bounds_n2[:, :1]) | (ranks_R >= bounds_n2[:, 1:])
    return [Piece(slice(runs[0][1], runs[-1][2]), slice(low, high), others_nR)]


class _Cut(NamedTuple):
    """A run of ranks, as views."""

    a_PIR: torch.Tensor
    b_PRO: torch.Tensor
    parts: list[tuple[int, slice, torch.Tensor]]
    """Of each part that an adapter has: its place, its columns of the output, its B [R, outputs]."""


class LowRankStack:
    """The adapters of the linear layers that share an input; `sizes` are the layers' outputs."""

    def __init__(self, sizes: Sequence[int], num_inputs: int, like: torch.Tensor):
        self.sizes = tuple(sizes)
        self.a_PCI = like.new_zeros(len(sizes), 0, num_inputs)
        self.b_PCO = like.new_zeros(len(sizes), 0, max(sizes))
        """Narrower parts are filled up with zeros, so that all parts are one product."""
        self._carries = [False] * len(sizes)
        """Whether an adapter has the part."""
        self._cuts: dict[tuple[int, int], _Cut] = {}

    def put(self, part: int, ranks: range, a_RI: torch.Tensor, b_OR: torch.Tensor) -> None:
        """Puts one layer's adapter into its ranks, the first of them where it has fewer."""
        self._reserve(ranks.stop)
        self._carries[part] = True
        own = slice(ranks.start, ranks.start + len(a_RI))
        self.a_PCI[part, own] = a_RI
        self.b_PCO[part, own, : self.sizes[part]] = b_OR.T
        self._cuts.clear()

    def clear(self, ranks: range) -> None:
        """Zeroes what an adapter leaves behind."""
        self.a_PCI[:, ranks.start : ranks.stop] = 0
        self.b_PCO[:, ranks.start : ranks.stop] = 0

    def _reserve(self, num_ranks: int) -> None:
        """Room for `num_ranks` ranks; doubled, so that adapters that come one by one are seldom copied."""
        before = self.a_PCI.shape[1]
        if num_ranks > before:
            more = max(num_ranks, 2 * before) - before
            b_PCO = _with_zeros(self.b_PCO, more)
            self.a_PCI, self.b_PCO = _with_zeros(self.a_PCI, more), b_PCO  # both or, without memory for it, none

    def add(self, y_NO: torch.Tensor, x_NI: torch.Tensor, pieces: Sequence[Piece]) -> None:
        """Adds the adapters' products of `x_NI` to `y_NO`, in place."""
        for piece in pieces:
            cut = self._cut(piece.ranks)
            x_nI, y_nO = x_NI[piece.rows], y_NO[piece.rows]
            # a batch of one took four times as long as the plain product of it, in bfloat16 on a CPU
            u_PnR = torch.mm(x_nI, cut.a_PIR[0])[None] if len(cut.a_PIR) == 1 else torch.matmul(x_nI, cut.a_PIR)
            if piece.others_nR is not None:  # filled, not multiplied: an adapter's inf must not reach its neighbours
                u_PnR.masked_fill_(piece.others_nR, 0)
            if piece.others_nR is None or len(cut.parts) == 1:
                for part, columns, b_RO in cut.parts:
                    y_nO[:, columns].addmm_(u_PnR[part], b_RO)
            else:  # few rows of many ranks: one product of all parts costs less than one each
                more_PnO = torch.bmm(u_PnR, cut.b_PRO)
                for part, columns, b_RO in cut.parts:
                    y_nO[:, columns] += more_PnO[part, :, : b_RO.shape[1]]

    def _cut(self, ranks: slice) -> _Cut:
        """A run of ranks. Kept, as the same rows mostly come again in the next step."""
        key = ranks.start, ranks.stop
        if key not in self._cuts:
            if len(self._cuts) >= MAX_CUTS:
                self._cuts.clear()
            b_PRO = self.b_PCO[:, ranks]
            ends = list(accumulate(self.sizes))
            parts = [
                (part, slice(end - size, end), b_PRO[part, :, :size])
                for part, (end, size) in enumerate(zip(ends, self.sizes, strict=True))
                if self._carries[part]
            ]
            self._cuts[key] = _Cut(self.a_PCI[:, ranks].transpose(1, 2), b_PRO, parts)
        return self._cuts[key]


def _with_zeros(stacked: torch.Tensor, count: int) -> torch.Tensor:
    """`stacked` with `count` more ranks, its last dimension but one."""
    return torch.cat([stacked, stacked.new_zeros(*stacked.shape[:-2], count, stacked.shape[-1])], dim=-2)
