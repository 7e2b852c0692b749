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

import torch
import torch.nn.functional as F

MIN_MASKED = 3
"""Fewer adapters than this take one product each: that costs no more calls, and nothing is computed in vain."""
MAX_RANKS = 256
"""Ranks of a masked product: beyond, more is computed in vain than a call costs."""
MAX_WASTE = 2
"""A masked product takes at most so many times the ranks that are needed."""


@dataclass(frozen=True)
class Piece:
    """Rows of a step whose adapters lie in one run of ranks."""

    rows: slice
    ranks: slice
    owned_nR: torch.Tensor | None
    """True where a rank is of the row's adapter; None where all are."""


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
    owned_nR = (ranks_R >= bounds_n2[:, :1]) & (ranks_R < bounds_n2[:, 1:])
    return [Piece(slice(runs[0][1], runs[-1][2]), slice(low, high), owned_nR)]


class LowRankStack:
    """The adapters of the linear layers that share an input; `sizes` are the layers' outputs."""

    def __init__(self, sizes: Sequence[int], num_inputs: int, like: torch.Tensor):
        self.sizes = tuple(sizes)
        self.a_CPI = like.new_zeros(0, len(sizes), num_inputs)
        self.b: list[torch.Tensor | None] = [None] * len(sizes)
        """[C, outputs] of each part; None where no adapter has it."""

    @property
    def nbytes(self) -> int:
        return self.a_CPI.nbytes + sum(0 if b_CO is None else b_CO.nbytes for b_CO in self.b)

    def put(self, part: int, ranks: range, a_RI: torch.Tensor, b_OR: torch.Tensor) -> None:
        """Puts one layer's adapter into its ranks, the first of them where it has fewer."""
        self._reserve(ranks.stop)
        if self.b[part] is None:
            self.b[part] = self.a_CPI.new_zeros(len(self.a_CPI), self.sizes[part])
        b_CO = self.b[part]
        assert b_CO is not None
        self.a_CPI[ranks.start : ranks.start + len(a_RI), part] = a_RI
        b_CO[ranks.start : ranks.start + len(a_RI)] = b_OR.T

    def clear(self, ranks: range) -> None:
        """Zeroes what an adapter leaves behind."""
        for stacked in (self.a_CPI, *self.b):
            if stacked is not None:
                stacked[ranks.start : ranks.stop] = 0

    def _reserve(self, num_ranks: int) -> None:
        """Room for `num_ranks` ranks; doubled, so that adapters that come one by one are seldom copied."""
        before = len(self.a_CPI)
        if num_ranks <= before:
            return
        more = max(num_ranks, 2 * before) - before
        grown = [stacked if stacked is None else _with_zeros(stacked, more) for stacked in (self.a_CPI, *self.b)]
        assert grown[0] is not None
        self.a_CPI, self.b = grown[0], grown[1:]

    def add(self, y_NO: torch.Tensor, x_NI: torch.Tensor, pieces: Sequence[Piece]) -> None:
        """Adds the adapters' products of `x_NI` to `y_NO`, in place."""
        for piece in pieces:
            u_PnR = self._down(x_NI[piece.rows], piece)
            y_nO, end = y_NO[piece.rows], 0
            for part, (size, b_CO) in enumerate(zip(self.sizes, self.b, strict=True)):
                end += size
                if b_CO is not None:
                    y_nO[:, end - size : end].addmm_(u_PnR[part], b_CO[piece.ranks])

    def _down(self, x_nI: torch.Tensor, piece: Piece) -> torch.Tensor:
        a_RPI = self.a_CPI[piece.ranks]
        u_PnR = F.linear(x_nI, a_RPI.flatten(0, 1)).unflatten(1, a_RPI.shape[:2]).permute(2, 0, 1)
        if piece.owned_nR is None:
            return u_PnR.contiguous()
        # chosen, not multiplied: an adapter whose numbers overflow must not reach its neighbours as inf x 0
        out = u_PnR.new_empty(u_PnR.shape)
        return torch.where(piece.owned_nR, u_PnR, u_PnR.new_zeros(()), out=out)


def _with_zeros(stacked: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([stacked, stacked.new_zeros(count, *stacked.shape[1:])])
