"""Continuous batching over blocks of keys and values: prompts in chunks beside tokens that are generated, one pass a
step for all adapters.

Runs on one thread, whichever calls it. Shapes as in `lmray/engines/_decoder.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lmray.engines._batch import Pass, Read
from lmray.engines._core import Outcome, Sampler, is_last, is_token
from lmray.engines._decoder import Batch, Decoder
from lmray.engines._lora_bank import LoraBank
from lmray.engines._schedule import Chunk, Limits, Scheduler
from lmray.engines._speculation.base import Proposer
from lmray.engines._speculator import Speculator
from lmray.engines.base import Capabilities, Request
from lmray.errors import LmrayError
from lmray.ops.low_rank import Piece, make_pieces

BLOCK_SIZE = 16
"""Tokens of a block."""


class PagedStepper:
    """A model for which `_decoder.unfit` said None, its blocks and its adapters; see `Core`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        sampler: Sampler,
        capabilities: Capabilities,
        limits: Limits,
        compiled: bool = False,
    ):
        self.capabilities = capabilities
        self.scheduler = Scheduler(limits)
        self.num_generated = 0
        decoder = Decoder(model, compiled=compiled)
        self.adapters = LoraBank(model, decoder)
        self._pass = Pass(decoder, limits)
        self._sampler = sampler
        self._speculator: Speculator | None = None

    def speculate(self, proposer: Proposer, num_tokens: int) -> None:
        """From now on `proposer` proposes up to `num_tokens` tokens to each sequence in a step, where that pays."""
        self._speculator = Speculator(proposer, self.scheduler, num_tokens)

    def pack(self) -> None:
        """Takes the model's weights over, see `Decoder.pack`."""
        self._pass.decoder.pack()

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
            "weights": self._pass.decoder.weights,
            "waiting_tokens": sum(one.num_unread for one in (*scheduler.waiting, *scheduler.running)),
            "free_blocks": scheduler.pool.num_free,
            "num_blocks": scheduler.pool.num_blocks,
            "preemptions": scheduler.num_preempted,
            "prefix_hit_tokens": scheduler.num_hit_tokens,
            **({"speculation": self._speculator.stats()} if self._speculator is not None else {}),
        }

    def step(self) -> list[tuple[str, Outcome]]:
        """Tokens for each sequence that generates, and chunks of prompts beside them; the outcomes of those that are
        read to their end, in their order."""
        plan = self.scheduler.plan()
        if not plan.chunks:
            return []
        if self._speculator is not None:
            plan = self._speculator.extended(plan)
        chunks = sorted(plan.chunks, key=self._place)
        self._pass.clear(plan.fresh)
        logits_nV = self._forward(chunks)
        for chunk in chunks:
            self.scheduler.done(chunk)
        outcomes = self._draw([chunk for chunk in chunks if chunk.num_logits], logits_nV)
        if self._speculator is not None:
            self._speculator.timed(chunks, len(outcomes))
        return outcomes

    def _place(self, chunk: Chunk) -> tuple[bool, int]:
        """Single tokens first, neighbours in the stacked adapters beside each other; then the longer chunks."""
        slots = self.adapters.slots(chunk.sequence.request.adapter)
        return chunk.stop - chunk.start > 1, -1 if slots is None else slots.start

    def _forward(self, chunks: list[Chunk]) -> torch.Tensor:
        """Logits [n, V], `num_logits` of each chunk."""
        return self._pass.forward(self._batch(chunks))

    def _batch(self, chunks: list[Chunk]) -> Batch:
        reads = [Read(one.tokens, one.start, one.sequence.blocks, one.num_logits) for one in chunks]
        batch = self._pass.batch(reads)
        used = frozenset(one for chunk in chunks if (one := chunk.sequence.request.adapter) is not None)
        if not used:
            return batch
        drawn = [(chunk, chunk.num_logits) for chunk in chunks if chunk.num_logits]
        return replace(
            batch,
            pieces=self._pieces([(chunk, chunk.stop - chunk.start) for chunk in chunks]),
            drawn_pieces=self._pieces(drawn) if self.adapters.reaches_head else (),
            adapters=used,
        )

    def _pieces(self, rows: list[tuple[Chunk, int]]) -> Sequence[Piece]:
        slots = tuple((self.adapters.slots(chunk.sequence.request.adapter), count) for chunk, count in rows)
        return make_pieces(slots, self._pass.decoder.device)

    def _draw(self, chunks: list[Chunk], logits_nV: torch.Tensor) -> list[tuple[str, Outcome]]:
        """Notes what prompts tell, draws tokens for the sequences that are read to their end, and ends those that are
        done. `chunks`, whose logits are given, in their order."""
        last: list[Chunk] = []
        places: list[int] = []
        end = 0
        for chunk in chunks:
            start, end = end, end + chunk.num_logits
            if chunk.sequence.tells_prompt:
                chunk.sequence.chooser.read(logits_nV[start:end], chunk.start)
            if chunk.is_last:
                last.append(chunk)
                places += range(end - 1 - len(chunk.proposed), end)
        if not last:
            return []
        rows = [(chunk.sequence, chunk.proposed) for chunk in last]
        drawn = self._sampler.verify(rows, logits_nV if len(places) == end else logits_nV[places])
        for chunk, outcomes in zip(last, drawn, strict=True):
            self.num_generated += sum(map(is_token, outcomes))
            if self._speculator is not None:
                self._speculator.settle(chunk)
            if is_last(outcomes[-1]):
                self.scheduler.end(chunk.sequence, spoiled=isinstance(outcomes[-1], LmrayError))
        return [(chunk.sequence.request.id, one) for chunk, found in zip(last, drawn, strict=True) for one in found]
