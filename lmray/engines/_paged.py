"""Continuous batching over blocks of keys and values: prompts in chunks beside tokens that are generated, one pass a
step for all adapters.

Runs on one thread, whichever calls it. Shapes as in `lmray/engines/_decoder.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lmray.engines._core import Outcome, Sampler, is_last, is_token
from lmray.engines._decoder import Batch, Decoder
from lmray.engines._lora_bank import LoraBank
from lmray.engines._schedule import Chunk, Limits, Plan, Scheduler
from lmray.engines.base import Capabilities, Request
from lmray.errors import LmrayError
from lmray.ops.low_rank import Piece, make_pieces
from lmray.ops.paged_attention import PagedAttention, make_groups, make_run

BLOCK_SIZE = 16
"""Tokens of a block."""


class PagedStepper:
    """A model for which `_decoder.unfit` said None, its blocks and its adapters; see `Core`."""

    def __init__(self, model: nn.Module, *, sampler: Sampler, capabilities: Capabilities, limits: Limits):
        self.capabilities = capabilities
        self.scheduler = Scheduler(limits)
        self.num_generated = 0
        self._decoder = Decoder(model)
        self.adapters = LoraBank(model, self._decoder)
        self._sampler = sampler
        head_dim, device = self._decoder.head_dim, self._decoder.device
        shape = (self._decoder.num_kv, limits.num_blocks, limits.block_size * head_dim)
        blocks_2KBE = torch.empty(shape, dtype=self._decoder.dtype, device=device)  # takes memory as it is written to
        self._attention = PagedAttention(blocks_2KBE, head_dim)

    def pack(self) -> None:
        """Takes the model's weights over, see `Decoder.pack`."""
        self._decoder.pack()

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def add(self, request: Request) -> None:
        self.scheduler.add(request, root=self.adapters.root(request.adapter) + b"/" + request.cache_salt.encode())

    def cancel(self, request_id: str) -> None:
        self.scheduler.cancel(request_id)

    def adapters_in_use(self) -> set[str | None]:
        return {one.request.adapter for one in (*self.scheduler.running, *self.scheduler.waiting)}

    def clear(self) -> None:
        self.scheduler.clear()

    def stats(self) -> dict[str, Any]:
        scheduler = self.scheduler
        return {
            "waiting": len(scheduler.waiting),
            "running": len(scheduler.running),
            "forward": "paged",
            "weights": self._decoder.weights,
            "waiting_tokens": sum(one.num_unread for one in (*scheduler.waiting, *scheduler.running)),
            "free_blocks": scheduler.pool.num_free,
            "num_blocks": scheduler.pool.num_blocks,
            "preemptions": scheduler.num_preempted,
            "prefix_hit_tokens": scheduler.num_hit_tokens,
        }

    def step(self) -> list[tuple[str, Outcome]]:
        """One token for each sequence that generates, and chunks of prompts beside them; the outcomes of those that
        are read to their end."""
        plan = self.scheduler.plan()
        if not plan.chunks:
            return []
        chunks = self._ordered(plan)
        logits_nV = self._forward(plan, chunks)
        for chunk in chunks:
            self.scheduler.done(chunk)
        return self._draw([chunk for chunk in chunks if chunk.num_logits], logits_nV)

    def _ordered(self, plan: Plan) -> list[Chunk]:
        """Single tokens first, neighbours in the stacked adapters beside each other; then the longer chunks."""

        def place(chunk: Chunk) -> tuple[bool, int]:
            ranks = self.adapters.ranks(chunk.sequence.request.adapter)
            return chunk.end - chunk.start > 1, -1 if ranks is None else ranks.start

        return sorted(plan.chunks, key=place)

    def _forward(self, plan: Plan, chunks: list[Chunk]) -> torch.Tensor:
        """Logits [n, V], `num_logits` of each chunk."""
        with torch.inference_mode(), torch.autocast(self._decoder.device.type, enabled=False):
            if plan.fresh:  # what was there before may be NaN, which is seen through a mask as well
                fresh = torch.tensor(plan.fresh, device=self._decoder.device)
                self._decoder.clear(fresh, self._attention)
            return self._decoder.forward(self._batch(chunks), self._attention)

    def _batch(self, chunks: list[Chunk]) -> Batch:
        size, device = self.scheduler.limits.block_size, self._decoder.device
        ids, positions, places, drawn, runs = [], [], [], [], []
        single = [chunk for chunk in chunks if chunk.end - chunk.start == 1]
        for chunk in chunks:
            blocks, own = chunk.sequence.blocks, range(chunk.start, chunk.end)
            if len(own) > 1:
                rows = slice(len(ids), len(ids) + len(own))
                runs.append(make_run(rows, chunk.start, blocks, size, device))
            ids += chunk.sequence.tokens[chunk.start : chunk.end]
            positions += own
            places += [blocks[position // size] * size + position % size for position in own]
            drawn += range(len(ids) - chunk.num_logits, len(ids))
        tables = [chunk.sequence.blocks for chunk in single]
        drawn_rows = [(chunk, chunk.num_logits) for chunk in chunks if chunk.num_logits]
        used = frozenset(one for chunk in chunks if (one := chunk.sequence.request.adapter) is not None)
        return Batch(
            ids_N=torch.tensor(ids, device=device),
            positions_N=torch.tensor(positions, device=device),
            places_N=torch.tensor(places, device=device),
            groups=make_groups([chunk.end for chunk in single], tables, size, self._attention.blocks_2KBE),
            runs=runs,
            drawn_n=torch.tensor(drawn, dtype=torch.long, device=device),
            pieces=self._pieces([(chunk, chunk.end - chunk.start) for chunk in chunks]) if used else (),
            drawn_pieces=self._pieces(drawn_rows) if used and self.adapters.reaches_head else (),
            adapters=used,
        )

    def _pieces(self, rows: list[tuple[Chunk, int]]) -> list[Piece]:
        ranks = [(self.adapters.ranks(chunk.sequence.request.adapter), count) for chunk, count in rows]
        return make_pieces(ranks, self._decoder.device)

    def _draw(self, chunks: list[Chunk], logits_nV: torch.Tensor) -> list[tuple[str, Outcome]]:
        """Notes what prompts tell, draws tokens for the sequences that are read to their end, and ends those that are
        done. `chunks`, whose logits are given, in their order."""
        last, places, end = [], [], 0
        for chunk in chunks:
            start, end = end, end + chunk.num_logits
            if chunk.sequence.tells_prompt:
                chunk.sequence.chooser.read(logits_nV[start:end], chunk.start)
            if chunk.is_last:
                last.append(chunk.sequence)
                places.append(end - 1)
        if not last:
            return []
        outcomes = self._sampler.draw(last, logits_nV if len(places) == end else logits_nV[places])
        for sequence, outcome in zip(last, outcomes, strict=True):
            self.num_generated += is_token(outcome)
            if is_last(outcome):
                self.scheduler.end(sequence, spoiled=isinstance(outcome, LmrayError))
        return [(sequence.request.id, outcome) for sequence, outcome in zip(last, outcomes, strict=True)]
