"""Low-rank products of many adapters beside one frozen product: y += B A x, with another A and B for each row.

The adapters lie side by side in slots of `WIDTH` ranks. Many rows of one adapter are matrix products. Few rows of each
of many adapters are weighted sums of rows of the stacks, looked up as of an embedding: A x sums the rows of A^T with
the numbers of x as weights, B (A x) those of B^T. So all rows are two calls whoever their adapters are, each reads its
own adapter alone, and nothing is copied (what Chen et al., "Punica", arXiv 2310.18547, section 4 wrote kernels for).
B holds the adapter's scale.

Shapes: N rows, I inputs, O outputs of all parts, P parts (linear layers that share an input), S slots, R ranks of a
slot, W = P R, k slots of an adapter, R' = k R; n rows of a piece, m pairs of a row and one of its slots, C chunks of
`chunk` outputs, of which every part is a multiple.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from typing import NamedTuple

import torch

WIDTH = 16
"""Ranks of a slot; an adapter whose rank is no multiple of it is filled up with zeros."""
MAX_LOOKED_UP = 8
"""More rows of one adapter than this are matrix products: they read it once, sums would for every row."""
_SUM = 0
"""What `torch.embedding_bag` calls sums."""


def num_slots(rank: int) -> int:
    """How many slots an adapter takes."""
    return -(-rank // WIDTH)


class Layout(NamedTuple):
    """What lookups depend on besides rows and slots: the shape of a stack."""

    num_inputs: int
    chunk: int
    parts_C: tuple[int, ...]
    """The part that each chunk of outputs belongs to."""
    num_parts: int


class _Lookup(NamedTuple):
    """Where the rows of a piece find theirs in the stacks of one layout."""

    slots_m: torch.Tensor
    rows_m: torch.Tensor | None
    """None where every row has one slot."""
    inputs_mI: torch.Tensor
    input_starts_m: torch.Tensor
    order: torch.Tensor | None
    """Which of the m P sums A x each lookup of R ranks is weighted with; None where all follow each other."""
    ranks: torch.Tensor
    rank_starts_nC: torch.Tensor


class Product:
    """Rows behind each other of one adapter."""

    def __init__(self, rows: slice, slots: range):
        self.rows, self.slots = rows, slice(slots.start, slots.stop)
        self.num_slots = slots.stop


class Mixed:
    """Rows behind each other of any adapters. Its lookups are kept, as all layers of a step take the same ones."""

    def __init__(self, start: int, slots: Sequence[range], device: torch.device):
        self.rows = slice(start, start + len(slots))
        self.num_slots = max(run.stop for run in slots)
        self._slots, self._device = slots, device
        self._lookups: dict[Layout, _Lookup] = {}

    def lookup(self, layout: Layout) -> _Lookup:
        if layout not in self._lookups:
            self._lookups[layout] = self._make(layout)
        return self._lookups[layout]

    def _make(self, layout: Layout) -> _Lookup:
        firsts = [0, *accumulate(map(len, self._slots))]
        chunks = [  # slot, chunk, which sum A x
            (slot, chunk, place * layout.num_parts + part)
            for first, run in zip(firsts, self._slots, strict=False)
            for chunk, part in enumerate(layout.parts_C)
            for place, slot in enumerate(run, first)
        ]
        num_chunks = len(layout.parts_C)
        starts = accumulate((len(run) * WIDTH for run in self._slots for _ in layout.parts_C), initial=0)
        slot, chunk, order = self._tensor(list(zip(*chunks, strict=True)))
        ranks = (slot[:, None] * WIDTH + self._tensor(range(WIDTH))) * num_chunks + chunk[:, None]
        slots_m = self._tensor([slot for run in self._slots for slot in run])
        inputs_I = self._tensor(range(layout.num_inputs))
        rows = [row for row, run in enumerate(self._slots) for _ in run]
        is_ordered = order.tolist() == list(range(len(slots_m) * layout.num_parts))
        return _Lookup(
            slots_m=slots_m,
            rows_m=None if len(rows) == len(self._slots) else self._tensor(rows),
            inputs_mI=(slots_m[:, None] * layout.num_inputs + inputs_I).flatten(),
            input_starts_m=self._tensor(range(len(slots_m))) * layout.num_inputs,
            order=None if is_ordered else order,
            ranks=ranks.flatten(),
            rank_starts_nC=self._tensor(list(starts)[:-1]),
        )

    def _tensor(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
        """Half the size of what indices are by default, of which a step reads as many as numbers of A."""
        return torch.tensor(numbers, dtype=torch.int32, device=self._device)


Piece = Product | Mixed


@lru_cache(maxsize=8)  # from step to step the rows are mostly the same
def make_pieces(rows: tuple[tuple[range | None, int], ...], device: torch.device) -> tuple[Piece, ...]:
    """Cuts the rows of a step into products. `rows`: the slots of an adapter (None: the base model) and how many rows
    behind each other are its own."""
    pieces: list[Piece] = []
    waiting: list[range] = []
    start = 0

    def flush() -> None:
        if waiting:
            pieces.append(Mixed(start - len(waiting), tuple(waiting), device))
            waiting.clear()

    for slots, run in groupby(rows, key=lambda row: row[0]):
        count = sum(number for _, number in run)
        if slots is not None and count <= MAX_LOOKED_UP:
            waiting += [slots] * count
        else:
            flush()
            if slots is not None:
                pieces.append(Product(slice(start, start + count), slots))
        start += count
    flush()
    return tuple(pieces)


class LowRankStack:
    """The adapters of the linear layers that share an input; `sizes` are the layers' outputs."""

    def __init__(self, sizes: Sequence[int], num_inputs: int, like: torch.Tensor):
        self.sizes, chunk = tuple(sizes), math.gcd(*sizes)
        parts_C = tuple(part for part, size in enumerate(sizes) for _ in range(size // chunk))
        self._layout = Layout(num_inputs, chunk, parts_C, len(sizes))
        ends = accumulate(sizes)
        self._columns = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self.a_SIW = like.new_zeros(0, num_inputs, len(sizes) * WIDTH)
        self.b_SRO = like.new_zeros(0, WIDTH, sum(sizes))
        self._carries = [False] * len(sizes)
        """Whether an adapter has the part."""
        self.gathers_a = like.device.type != "cpu"
        """Whether A is copied for each row: sums so long and narrow would keep a GPU waiting."""

    def put(self, part: int, slots: range, a_RI: torch.Tensor, b_OR: torch.Tensor) -> None:
        """Puts one layer's adapter into its slots, the first ranks of them where it has fewer."""
        self._reserve(slots.stop)
        self._carries[part] = True
        for first, slot in zip(range(0, len(a_RI), WIDTH), slots, strict=False):
            some_RI, some_OR = a_RI[first : first + WIDTH], b_OR[:, first : first + WIDTH]
            self.a_SIW[slot, :, part * WIDTH : part * WIDTH + len(some_RI)] = some_RI.T
            self.b_SRO[slot, : len(some_RI), self._columns[part]] = some_OR.T

    def clear(self, slots: range) -> None:
        """Zeroes what an adapter leaves behind."""
        self.a_SIW[slots.start : slots.stop] = 0
        self.b_SRO[slots.start : slots.stop] = 0

    def _reserve(self, count: int) -> None:
        """Room for `count` slots; doubled, so that adapters that come one by one are seldom copied."""
        before = len(self.a_SIW)
        if count > before:
            more = max(count, 2 * before) - before
            with torch.inference_mode(False):  # else `put` could not write to them
                b_SRO = _with_zeros(self.b_SRO, more)
                self.a_SIW, self.b_SRO = _with_zeros(self.a_SIW, more), b_SRO  # both or, without memory for it, none

    def add(self, y_NO: torch.Tensor, x_NI: torch.Tensor, pieces: Sequence[Piece]) -> None:
        """Adds the adapters' products of `x_NI` to `y_NO`, in place."""
        for piece in pieces:
            self._reserve(piece.num_slots)  # the last may belong to an adapter of other layers
            y_nO, x_nI = y_NO[piece.rows], x_NI[piece.rows]
            if isinstance(piece, Product):
                self._multiply(y_nO, x_nI, piece.slots)
            else:
                self._look_up(y_nO, x_nI, piece.lookup(self._layout))

    def _multiply(self, y_nO: torch.Tensor, x_nI: torch.Tensor, slots: slice) -> None:
        a_kIW, b_RO = self.a_SIW[slots], self.b_SRO[slots].flatten(0, 1)
        # a batch of one took four times as long as the plain product of it, in bfloat16 on a CPU
        u_knW = torch.mm(x_nI, a_kIW[0])[None] if len(a_kIW) == 1 else torch.matmul(x_nI, a_kIW)
        for part, columns in enumerate(self._columns):
            if self._carries[part]:
                u_nR = u_knW[..., part * WIDTH : (part + 1) * WIDTH].transpose(0, 1).flatten(1)
                y_nO[:, columns].addmm_(u_nR, b_RO[:, columns])

    def _look_up(self, y_nO: torch.Tensor, x_nI: torch.Tensor, at: _Lookup) -> None:
        x_mI = x_nI if at.rows_m is None else x_nI.index_select(0, at.rows_m)
        if self.gathers_a:
            u_mW = torch.bmm(x_mI[:, None], self.a_SIW.index_select(0, at.slots_m))
        else:
            u_mW = _sums(self.a_SIW.flatten(0, 1), at.inputs_mI, at.input_starts_m, x_mI)
        u_R = u_mW.view(-1, WIDTH)
        if at.order is not None:
            u_R = u_R.index_select(0, at.order)
        chunk = self._layout.chunk
        y_nO.view(-1, chunk).add_(_sums(self.b_SRO.view(-1, chunk), at.ranks, at.rank_starts_nC, u_R))


def _sums(rows: torch.Tensor, places: torch.Tensor, starts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums of `rows` at `places`, one from each of `starts` to the next."""
    return torch.embedding_bag(rows, places, starts, False, _SUM, False, weights.flatten())[0]


def _with_zeros(stacked: torch.Tensor, count: int) -> torch.Tensor:
    """`stacked` with `count` more slots."""
    return torch.cat([stacked, stacked.new_zeros(count, *stacked.shape[1:])])
