"""Speculation in the engine's steps: asks for proposals where they pay, and measures what comes of them."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from dataclasses import replace
from time import perf_counter
from typing import Any

from lmray.engines._payoff import Payoff
from lmray.engines._schedule import Chunk, Plan, Scheduler
from lmray.engines._speculation.base import Proposer


class Speculator:
    """Beside one scheduler. A step is `extended`, read, verified, `settle`d and `timed`, in this order."""

    def __init__(self, proposer: Proposer, scheduler: Scheduler, num_tokens: int):
        self.payoff = Payoff()
        self._proposer, self._scheduler, self._num_tokens = proposer, scheduler, num_tokens
        self._started_s = 0.0
        self._asked = self._all_generate = False

    def extended(self, plan: Plan) -> Plan:
        """`plan` with proposed tokens behind those that generate."""
        self._started_s = perf_counter()
        chunks = [chunk for chunk in plan.chunks if chunk.generates]
        counts = self.payoff.num_tokens(len(chunks), [one.sequence.chance for one in chunks], self._num_tokens)
        fresh, asked = list(plan.fresh), []
        for chunk, count in zip(chunks, counts, strict=True):
            room, taken = self._scheduler.make_room(chunk, count)
            fresh += taken
            if room > 0:
                asked.append((chunk, room))
        self._asked, self._all_generate = bool(asked), len(chunks) == len(plan.chunks)
        self._proposer.forget(fresh)
        found = self._proposer.propose([(chunk.sequence, room) for chunk, room in asked])
        proposed = {id(chunk): tuple(tokens) for (chunk, _), tokens in zip(asked, found, strict=True)}
        extended = tuple(replace(chunk, proposed=proposed.get(id(chunk), ())) for chunk in plan.chunks)
        return Plan(extended, tuple(fresh))

    def settle(self, chunk: Chunk) -> None:
        """`chunk` was verified: its sequence's `length` says how much was accepted."""
        self._scheduler.settle(chunk)
        if chunk.proposed:
            sequence = chunk.sequence
            self.payoff.verified(sequence.chance, len(chunk.proposed), sequence.length - chunk.end)

    def timed(self, chunks: Sequence_[Chunk], num_generated: int) -> None:
        """The step is over. Prompts beside it would make its time say nothing, and so would a draft that only read."""
        num_proposed = sum(len(chunk.proposed) for chunk in chunks)
        if self._all_generate and (num_proposed or not self._asked):
            seconds = perf_counter() - self._started_s
            self.payoff.took(len(chunks), seconds, num_proposed=num_proposed, num_generated=num_generated)

    def stats(self) -> dict[str, Any]:
        payoff = self.payoff
        return {
            "proposed": payoff.num_proposed,
            "accepted": payoff.num_accepted,
            "acceptance": payoff.num_accepted / payoff.num_proposed if payoff.num_proposed else None,
            "gain": payoff.gain,
            "active": payoff.active,
        }
