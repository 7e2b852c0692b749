"""Keys and values of all rows in one preallocated block per layer; a row is a slot.

Shapes: R rows of the block, N running rows, H key-value heads, S slots for tokens in a row, D size of a head,
P tokens of a prompt, L longest running row.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

CLEAN_TOKENS = 64
"""Rows are prepared for use in strides of this many tokens."""


class _Place:
    """Where the coming forward pass reads and writes; shared by all layers.

    Prefill: `row` is the prompt's row, from token 0 on. Decode: row i of the batch writes at `positions_N[i]`. No row
    holds more than `longest` tokens after the pass.
    """

    def __init__(self) -> None:
        self.row: int | None = None
        self.rows_N = self.positions_N = torch.empty(0, dtype=torch.long)
        self.longest = 0


class _SlotLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, num_rows: int, max_length: int, place: _Place):
        super().__init__()
        self.num_rows, self.max_length, self.place = num_rows, max_length, place
        self.num_clean = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Reserves [R, H, S, D]; on a CPU it takes memory only as far as `_clean` has come."""
        self.dtype, self.device = key_states.dtype, key_states.device

        def block(like: torch.Tensor) -> torch.Tensor:
            return like.new_empty(self.num_rows, like.shape[1], self.max_length, like.shape[3])

        self.keys, self.values = block(key_states), block(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prefill: [1, H, P, D] in and out. Decode: [N, H, 1, D] in, [N, H, L, D] out, a view."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        place = self.place
        self._clean(place.longest)
        if place.row is not None:
            self.keys[place.row, :, : key_states.shape[2]] = key_states[0]
            self.values[place.row, :, : value_states.shape[2]] = value_states[0]
            return key_states, value_states
        self.keys[place.rows_N, :, place.positions_N] = key_states[:, :, 0]
        self.values[place.rows_N, :, place.positions_N] = value_states[:, :, 0]
        num_rows = len(place.rows_N)
        return self.keys[:num_rows, :, : place.longest], self.values[:num_rows, :, : place.longest]

    def _clean(self, length: int) -> None:
        """Zeroes the first `length` tokens of all rows, once: a masked value still takes part as 0 x value, and that
        is NaN for what memory happens to hold."""
        if length > self.num_clean:
            assert self.keys is not None and self.values is not None
            end = min(-(-length // CLEAN_TOKENS) * CLEAN_TOKENS, self.max_length)
            self.keys[:, :, self.num_clean : end] = 0
            self.values[:, :, self.num_clean : end] = 0
            self.num_clean = end

    def wipe(self, row: int) -> None:
        """Zeroes a row that held NaN, for the sake of the next request in it."""
        assert self.keys is not None and self.values is not None
        self.keys[row, :, : self.num_clean] = 0
        self.values[row, :, : self.num_clean] = 0

    def move(self, source: int, target: int, length: int) -> None:
        assert self.keys is not None and self.values is not None
        self.keys[target, :, :length] = self.keys[source, :, :length]
        self.values[target, :, :length] = self.values[source, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.longest, 0

    def get_seq_length(self) -> int:
        return 0 if self.place.row is not None else self.place.longest - 1

    def get_max_length(self) -> int:
        return self.max_length


class SlotCache(Cache):
    """A `transformers` cache whose batch rows are requests of different lengths."""

    def __init__(self, *, num_layers: int, num_rows: int, max_length: int):
        self.place = _Place()
        super().__init__(layers=[_SlotLayer(num_rows, max_length, self.place) for _ in range(num_layers)])

    def at_prompt(self, row: int, num_tokens: int) -> None:
        """The coming pass reads a whole prompt of `num_tokens` into `row`."""
        self.place.row, self.place.longest = row, num_tokens

    def at_positions(self, positions_N: torch.Tensor) -> None:
        """The coming pass reads one token a row; row i stands at `positions_N[i]`, the number of tokens before it."""
        self.place.row, self.place.positions_N = None, positions_N
        self.place.rows_N = torch.arange(len(positions_N), device=positions_N.device)
        self.place.longest = int(positions_N.max()) + 1

    def wipe(self, row: int) -> None:
        """Forgets what `row` held; needed only where it may be NaN."""
        for layer in self.layers:
            layer.wipe(row)  # type: ignore[union-attr]

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of row `source` over row `target`."""
        for layer in self.layers:
            layer.move(source, target, length)  # type: ignore[union-attr]  # all are slot layers
