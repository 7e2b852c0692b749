"""What one forward pass reads, from lists of tokens and blocks to tensors. Shapes as in `lmray/engines/_decoder.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lmray.engines._decoder import Batch, Decoder
from lmray.engines._schedule import Limits
from lmray.ops.paged_attention import PagedAttention, make_groups, make_run


class Read(NamedTuple):
    """Tokens of one sequence that follow each other."""

    tokens: Sequence[int]
    start: int
    """How many stand before them."""
    blocks: Sequence[int]
    num_logits: int
    """So many of them, at the end, need their logits."""


class Pass:
    """A decoder and its blocks of keys and values."""

    def __init__(self, decoder: Decoder, limits: Limits):
        self.decoder, self._size = decoder, limits.block_size
        shape = (decoder.num_kv, limits.num_blocks, limits.block_size * decoder.head_dim)
        blocks_2KBE = torch.empty(shape, dtype=decoder.dtype, device=decoder.device)  # memory as it is written to
        self._attention = PagedAttention(blocks_2KBE, decoder.head_dim)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [n, V] of the rows that `batch` names."""
        with torch.inference_mode(), torch.autocast(self.decoder.device.type, enabled=False):
            return self.decoder.forward(batch, self._attention)

    def clear(self, blocks: Sequence[int]) -> None:
        """`blocks` are handed out anew: what was there before may be NaN, which is seen through a mask as well."""
        if blocks:
            with torch.inference_mode():
                self.decoder.clear(torch.tensor(blocks, device=self.decoder.device), self._attention)

    def batch(self, reads: Sequence[Read]) -> Batch:
        """`reads` of the base model: first those of one token, then the longer ones."""
        size, device = self._size, self.decoder.device
        ids, positions, places, drawn, runs = [], [], [], [], []
        for tokens, start, blocks, num_logits in reads:
            own = range(start, start + len(tokens))
            if len(own) > 1:
                runs.append(make_run(slice(len(ids), len(ids) + len(own)), start, blocks, size, device))
            ids += tokens
            positions += own
            places += [blocks[position // size] * size + position % size for position in own]
            drawn += range(len(ids) - num_logits, len(ids))
        single = [read for read in reads if len(read.tokens) == 1]
        lengths, tables = [read.start + 1 for read in single], [read.blocks for read in single]
        return Batch(
            ids_N=torch.tensor(ids, device=device),
            positions_N=torch.tensor(positions, device=device),
            places_N=torch.tensor(places, device=device),
            groups=make_groups(lengths, tables, size, self._attention.blocks_2KBE),
            runs=runs,
            drawn_n=torch.tensor(drawn, dtype=torch.long, device=device),
        )
