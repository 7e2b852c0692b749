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


class LowRankStack:
    """The adapters of the linear layers that share an input; `sizes` are the layers' outputs."""

    def __init__(self, sizes: Sequence[int], num_inputs: int, like: torch.Tensor):
        self.sizes = tuple(sizes)
        self.a_PCI = like.new_zeros(len(sizes), 0, num_inputs)
        self.b: list[torch.Tensor | None] = [None] * len(sizes)
        """[C, outputs] of each part; None where no adapter has it."""
        self._cuts: dict[tuple[int, int], tuple[torch.Tensor, list[tuple[int, slice, torch.Tensor]]]] = {}

    def put(self, part: int, ranks: range, a_RI: torch.Tensor, b_OR: torch.Tensor) -> None:
        """Puts one layer's adapter into its ranks, the first of them where it has fewer."""
        self._reserve(ranks.stop)
        if self.b[part] is None:
            self.b[part] = self.a_PCI.new_zeros(self.a_PCI.shape[1], self.sizes[part])
        b_CO = self.b[part]
        assert b_CO is not None
        self.a_PCI[part, ranks.start : ranks.start + len(a_RI)] = a_RI
        b_CO[ranks.start : ranks.start + len(a_RI)] = b_OR.T
        self._cuts.clear()

    def clear(self, ranks: range) -> None:
        """Zeroes what an adapter leaves behind."""
        self.a_PCI[:, ranks.start : ranks.stop] = 0
        for b_CO in self.b:
            if b_CO is not None:
                b_CO[ranks.start : ranks.stop] = 0

    def _reserve(self, num_ranks: int) -> None:
        """Room for `num_ranks` ranks; doubled, so that adapters that come one by one are seldom copied."""
        before = self.a_PCI.shape[1]
        if num_ranks > before:
            more = max(num_ranks, 2 * before) - before
            b = [None if b_CO is None else _with_zeros(b_CO, more) for b_CO in self.b]
            self.a_PCI, self.b = _with_zeros(self.a_PCI, more), b  # both or, without memory for it, none

    def add(self, y_NO: torch.Tensor, x_NI: torch.Tensor, pieces: Sequence[Piece]) -> None:
        """Adds the adapters' products of `x_NI` to `y_NO`, in place."""
        for piece in pieces:
            a_PIR, parts = self._cut(piece.ranks)
            x_nI = x_NI[piece.rows]
            # a batch of one took four times as long as the plain product of it, in bfloat16 on a CPU
            u_PnR = torch.mm(x_nI, a_PIR[0])[None] if len(a_PIR) == 1 else torch.matmul(x_nI, a_PIR)
            if piece.others_nR is not None:  # filled, not multiplied: an adapter's inf must not reach its neighbours
                u_PnR.masked_fill_(piece.others_nR, 0)
            y_nO = y_NO[piece.rows]
            for part, columns, b_RO in parts:
                y_nO[:, columns].addmm_(u_PnR[part], b_RO)

    def _cut(self, ranks: slice) -> tuple[torch.Tensor, list[tuple[int, slice, torch.Tensor]]]:
        """A run of ranks as views: A [P, I, R], and part, columns of the output and B [R, outputs] of each layer that
        has one. Kept, as the same rows mostly come again in the next step."""
        key = ranks.start, ranks.stop
        if key not in self._cuts:
            if len(self._cuts) >= MAX_CUTS:
                self._cuts.clear()
            ends = list(accumulate(self.sizes))
            parts = [
                (part, slice(end - b_CO.shape[1], end), b_CO[ranks])
                for part, (end, b_CO) in enumerate(zip(ends, self.b, strict=True))
                if b_CO is not None
            ]
            self._cuts[key] = self.a_PCI[:, ranks].transpose(1, 2), parts
        return self._cuts[key]


def _with_zeros(stacked: torch.Tensor, count: int) -> torch.Tensor:
    """`stacked` with `count` more ranks, its last dimension but one."""
    return torch.cat([stacked, stacked.new_zeros(*stacked.shape[:-2], count, stacked.shape[-1])], dim=-2)
