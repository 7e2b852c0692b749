"""Attention over keys and values that lie in blocks: one token of many sequences, or a run of tokens of one.

Blocks of like long sequences are gathered side by side into one buffer, which stays in the processor's cache, and go
through the attention kernel of PyTorch. Kwon et al., "PagedAttention", arXiv 2309.06180, section 4.1.

Shapes: N tokens of a step, H query heads, K key and value heads, G = H / K, D head width, B blocks, S tokens a block,
n sequences of a group, L places of its longest, T tokens of a run, F = S 2K D numbers of a block, P = B S places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

MAX_VIEWS = 64
"""Views of the buffer that are kept, one for each size of a group."""
SPLIT_TOKENS = 512
"""Padding of at least this many tokens is worth a group of its own, whose calls cost about as much."""


@dataclass(frozen=True)
class Group:
    """Sequences of like length that read one token each."""

    rows_n: torch.Tensor
    """Where their tokens are among the N."""
    table_M: torch.Tensor
    """Their blocks, one sequence behind the other, each filled up to the longest with its own first."""
    mask_n11L: torch.Tensor
    """Added to the scores: 0 for what is seen, else -inf."""


@dataclass(frozen=True)
class Run:
    """Several tokens of one sequence."""

    rows: slice
    table_M: torch.Tensor | None
    """Its blocks; None where it begins with these tokens."""
    mask_TL: torch.Tensor | None
    """True where a token is seen; None: a token sees those before it in the run."""


def make_groups(
    lengths: Sequence[int], tables: Sequence[Sequence[int]], block_size: int, like: torch.Tensor
) -> list[Group]:
    """Groups the first rows of a step, one of each sequence: sequence i has `lengths[i]` tokens with the one that is
    read, in blocks `tables[i]`. `like` has the type and the device of the keys."""
    needed = [-(-length // block_size) for length in lengths]
    groups: list[list[int]] = []
    order = sorted(range(len(lengths)), key=lambda row: -needed[row])
    for place, row in enumerate(order):
        saved = (needed[groups[-1][0]] - needed[row]) * block_size * (len(order) - place) if groups else SPLIT_TOKENS
        if saved >= SPLIT_TOKENS and (not groups or 2 * needed[row] <= needed[groups[-1][0]]):
            groups.append([])
        groups[-1].append(row)
    found = []
    for rows in groups:
        rows.sort()
        longest = max(needed[row] for row in rows)
        table = [[*tables[row][: needed[row]], *[tables[row][0]] * (longest - needed[row])] for row in rows]
        places_L = torch.arange(longest * block_size, device=like.device)
        ends_n = torch.tensor([lengths[row] for row in rows], device=like.device)
        mask_nL = like.new_zeros(len(rows), len(places_L)).masked_fill_(places_L >= ends_n[:, None], -torch.inf)
        rows_n = torch.tensor(rows, device=like.device)
        found.append(Group(rows_n, torch.tensor(table, device=like.device).flatten(), mask_nL[:, None, None]))
    return found


def make_run(rows: slice, start: int, blocks: Sequence[int], block_size: int, device: torch.device) -> Run:
    """The tokens in `rows` of a sequence with `start` tokens before them, whose keys are in `blocks`."""
    if start == 0:
        return Run(rows, None, None)
    num_tokens = rows.stop - rows.start
    table = blocks[: -(-(start + num_tokens) // block_size)]
    places_L = torch.arange(len(table) * block_size, device=device)
    own_T = torch.arange(start, start + num_tokens, device=device)
    return Run(rows, torch.tensor(table, device=device), places_L[None] <= own_T[:, None])


class PagedAttention:
    """Room for the blocks of all layers, `blocks_2KBE` [2K of all layers, B, S D]; a layer's share lies in it as
    [B, S, 2K, D], a token's keys and then its values side by side, so that a block is one piece of memory.

    Blocks must hold finite numbers, also where nothing was written: what is masked still takes part, as 0 x value.
    """

    def __init__(self, blocks_2KBE: torch.Tensor, head_dim: int):
        self.head_dim = head_dim
        self.blocks_2KBE = blocks_2KBE
        self._layers: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._buffer = blocks_2KBE.new_empty(0)
        self._views: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def clear(self, layer: slice, blocks_M: torch.Tensor) -> None:
        """Zeroes blocks whose content may be anything."""
        blocks_BF, _ = self._layer(layer)
        blocks_BF.index_fill_(0, blocks_M, 0)

    def write(self, layer: slice, kv_N2KD: torch.Tensor, places_N: torch.Tensor) -> None:
        """Puts keys and values into their places, block x S + place in the block."""
        _, places_P2KD = self._layer(layer)
        places_P2KD.index_copy_(0, places_N, kv_N2KD)

    def one_each(self, q_NHD: torch.Tensor, layer: slice, group: Group, scale: float) -> torch.Tensor:
        """Attention [n, H D] of a group's tokens. Heads that share keys are the kernel's tokens."""
        num_rows = len(group.rows_n)
        q_nHD = q_NHD if num_rows == len(q_NHD) else q_NHD.index_select(0, group.rows_n)
        k_nKLD, v_nKLD = self._gather(layer, group.table_M, num_rows)
        q_nKGD = q_nHD.unflatten(1, (k_nKLD.shape[1], -1))
        return F.scaled_dot_product_attention(q_nKGD, k_nKLD, v_nKLD, group.mask_n11L, scale=scale).flatten(1)

    def run(self, qkv_TED: torch.Tensor, layer: slice, run: Run, scale: float) -> torch.Tensor:
        """Attention [T, H D] of a run's queries, keys and values, E = H + 2K; the latter are written already."""
        num_kv = (layer.stop - layer.start) // 2
        q, k, v = qkv_TED.transpose(0, 1)[None].split([qkv_TED.shape[1] - 2 * num_kv, num_kv, num_kv], dim=1)
        if run.table_M is not None:
            k, v = self._gather(layer, run.table_M, 1)
        causal = run.mask_TL is None
        mixed = F.scaled_dot_product_attention(q, k, v, run.mask_TL, is_causal=causal, scale=scale, enable_gqa=True)
        return mixed[0].transpose(0, 1).flatten(1)

    def _gather(self, layer: slice, table_M: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the blocks of `table_M`, each [n, K, L, D]; good until the next call."""
        blocks_BF, places_P2KD = self._layer(layer)
        key = places_P2KD.shape[1], len(table_M), num_rows
        if key not in self._views:
            self._views[key] = self._view(*key)
        out_MF, k_nKLD, v_nKLD = self._views[key]
        torch.index_select(blocks_BF, 0, table_M, out=out_MF)
        return k_nKLD, v_nKLD

    def _view(self, num_heads: int, num_blocks: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The buffer for that many blocks of so many heads of keys and values: as it is filled, its keys, its values.
        Every layer of a step takes the same ones."""
        width = num_heads * self.blocks_2KBE.shape[2]
        if self._buffer.numel() < num_blocks * width or len(self._views) >= MAX_VIEWS:
            self._views.clear()
        if self._buffer.numel() < num_blocks * width:
            self._buffer = self._buffer.new_empty(num_blocks * width)
        out_MF = self._buffer[: num_blocks * width].view(num_blocks, width)
        kv_n2KLD = out_MF.view(num_rows, -1, num_heads, self.head_dim).transpose(1, 2)
        k_nKLD, v_nKLD = kv_n2KLD.split(num_heads // 2, dim=1)
        return out_MF, k_nKLD, v_nKLD

    def _layer(self, layer: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's share by blocks, [B, S 2K D], and by the places in them, [B S, 2K, D]."""
        key = layer.start, layer.stop
        if key not in self._layers:
            share = self.blocks_2KBE[layer]
            by_blocks = share.view(share.shape[1], -1)
            self._layers[key] = by_blocks, by_blocks.view(-1, len(share), self.head_dim)
        return self._layers[key]
