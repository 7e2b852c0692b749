"""Which tokens of which requests the model reads in the next step: a state machine without tensors.

Every running sequence that is past its prompt reads one token a step, and beside it prompts are read in chunks, up to a
budget of tokens (Agrawal et al., "Sarathi-Serve", arXiv 2403.02310, section 4). Requests start in the order they came.
Where blocks run out, the sequence that came last gives its blocks back and reads all its tokens again later. A sequence
that generates may read tokens with its own that somebody proposes to follow: it keeps those that are drawn after all.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from lmray.engines._blocks import BlockPool, block_key
from lmray.engines._payoff import Chance
from lmray.engines._slots import Row
from lmray.engines.base import Request, TokenEvent, TokenLogprob


@dataclass(eq=False)
class Sequence(Row):
    """A request and what was generated for it. Its `blocks` hold the first `length` of its `tokens`."""

    root: bytes = b""
    """What its blocks depend on besides its tokens: sequences of another root share none."""
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    chance: Chance = field(default_factory=Chance)
    """How often what was proposed for it was right."""

    @property
    def num_unread(self) -> int:
        return len(self.tokens) - self.length

    def take(self, token_id: int, stop_token_ids: frozenset[int], logprob: TokenLogprob | None = None) -> TokenEvent:
        event = super().take(token_id, stop_token_ids, logprob)
        if event.token_id is not None:
            self.tokens.append(token_id)
        return event

    def first_keys(self, count: int, block_size: int) -> list[bytes]:
        """The keys of its first `count` blocks, all of whose tokens are known."""
        for index in range(len(self.keys), count):
            parent = self.keys[-1] if self.keys else self.root
            self.keys.append(block_key(parent, self.tokens[index * block_size : (index + 1) * block_size]))
        return self.keys[:count]


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `end` of a sequence, and tokens that are proposed to follow them, read in one step."""

    sequence: Sequence
    start: int
    end: int
    proposed: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        return [*self.sequence.tokens[self.start : self.end], *self.proposed]

    @property
    def stop(self) -> int:
        """The end of what is read."""
        return self.end + len(self.proposed)

    @property
    def is_last(self) -> bool:
        """Whether the next token can be drawn after it."""
        return self.end == len(self.sequence.tokens)

    @property
    def generates(self) -> bool:
        """Whether it is the one token of a sequence that is past its prompt, after which others may be proposed."""
        return self.is_last and self.end - self.start == 1 and not self.sequence.tells_prompt

    @property
    def num_logits(self) -> int:
        """Tokens at its end whose logits are needed."""
        if self.sequence.tells_prompt:
            return self.end - self.start
        return 1 + len(self.proposed) if self.is_last else 0


@dataclass(frozen=True)
class Plan:
    """One step."""

    chunks: tuple[Chunk, ...]
    fresh: tuple[int, ...]
    """Blocks that were handed out for it, whose content is anything."""


@dataclass(frozen=True)
class Limits:
    """What a scheduler keeps to."""

    max_rows: int
    """Sequences that run side by side."""
    max_length: int
    """Tokens of a sequence."""
    num_blocks: int
    block_size: int
    max_prefill_tokens: int
    """Tokens of prompts in a step, besides one of each sequence that generates."""


class Scheduler:
    """Requests that run and wait, and their blocks. One sequence of `max_length` must fit into all blocks."""

    def __init__(self, limits: Limits):
        assert limits.num_blocks * limits.block_size >= limits.max_length
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks)
        self.running: list[Sequence] = []
        """In the order they came."""
        self.waiting: deque[Sequence] = deque()
        self.num_preempted = 0
        self.num_hit_tokens = 0
        """Tokens that were not read, as blocks of others held them."""

    def add(self, request: Request, root: bytes = b"") -> None:
        """Queues `request`."""
        self.waiting.append(Sequence(request, self.limits.max_length, root=root, tokens=list(request.prompt_ids)))

    def plan(self) -> Plan:
        """The next step; `done` tells what became of it."""
        chunks: list[Chunk] = []
        fresh: list[int] = []
        budget = self.limits.max_prefill_tokens
        index = 0
        while index < len(self.running):  # the last ones may go meanwhile
            sequence = self.running[index]
            index += 1
            if not self._has_room(sequence, fresh):
                continue
            count = 1 if sequence.num_unread == 1 else min(sequence.num_unread, budget)
            budget -= count if sequence.num_unread > 1 else 0
            if count:
                chunks.append(Chunk(sequence, sequence.length, sequence.length + count))
        while budget > 0 and (admitted := self._admit(fresh)) is not None:
            count = min(admitted.num_unread, budget)
            budget -= count
            chunks.append(Chunk(admitted, admitted.length, admitted.length + count))
        return Plan(tuple(chunks), tuple(fresh))

    def done(self, chunk: Chunk) -> None:
        """The model has read `chunk`: its keys and values are in their blocks."""
        chunk.sequence.length = chunk.end
        self._keep(chunk.sequence, chunk.start)

    def make_room(self, chunk: Chunk, count: int) -> tuple[int, list[int]]:
        """For how many of `count` tokens proposed after `chunk` there is room, and the blocks that were handed out for
        it. Only free ones: nobody gives way for a guess. `settle` takes back what is not needed."""
        sequence, size = chunk.sequence, self.limits.block_size
        sampling = sequence.request.sampling
        left = sampling.max_tokens - sequence.num_generated, self.limits.max_length - len(sequence.tokens)
        count = max(0, min(count, *(one - 1 for one in left)))
        missing = max(0, -(-(len(sequence.tokens) + count) // size) - len(sequence.blocks))
        fresh = self.pool.take(min(missing, self.pool.num_free)) or []
        sequence.blocks += fresh
        return min(count, len(sequence.blocks) * size - len(sequence.tokens)), fresh

    def settle(self, chunk: Chunk) -> None:
        """What was proposed after `chunk` was drawn or not: the sequence's `length` says how much of it holds."""
        sequence, needed = chunk.sequence, self._num_blocks(chunk.sequence)
        self._keep(sequence, chunk.end)
        self.pool.release(sequence.blocks[needed:])
        del sequence.blocks[needed:]

    def end(self, sequence: Sequence, *, spoiled: bool = False) -> None:
        """`sequence` is done. `spoiled`: nobody may share what its blocks hold."""
        self.running.remove(sequence)
        if spoiled:
            self.pool.forget(sequence.blocks)
        self._give_back(sequence)

    def cancel(self, request_id: str) -> None:
        """Ends a request wherever it is; unknown ids are those that ended by themselves."""
        for kept in (self.running, self.waiting):
            for sequence in kept:
                if sequence.request.id == request_id:
                    kept.remove(sequence)
                    self._give_back(sequence)
                    return

    def clear(self) -> None:
        """Ends everything."""
        for sequence in (*self.running, *self.waiting):
            self._give_back(sequence)
        self.running.clear()
        self.waiting.clear()

    def _has_room(self, sequence: Sequence, fresh: list[int]) -> bool:
        """Sees to blocks for all tokens of a running sequence; False where it had to give back its own."""
        while (missing := self._num_blocks(sequence) - len(sequence.blocks)) > 0:
            taken = self.pool.take(missing)
            if taken is not None:
                sequence.blocks += taken
                fresh += taken
                return True
            last = self.running.pop()
            self._give_back(last)
            self.waiting.appendleft(last)
            self.num_preempted += 1
            if last is sequence:
                return False
        return True

    def _admit(self, fresh: list[int]) -> Sequence | None:
        """Starts the sequence that waits longest, with blocks for all its tokens; None where none waits or fits.

        One block for each running sequence is left over, or what one gives back would be taken from it again at once.
        """
        if not self.waiting or len(self.running) >= self.limits.max_rows:
            return None
        sequence, size = self.waiting[0], self.limits.block_size
        # tokens whose logits are needed are always read: the last, or all of a prompt
        num_shared = 0 if sequence.tells_prompt else (len(sequence.tokens) - 1) // size
        held = self.pool.find(sequence.first_keys(num_shared, size))
        missing = self._num_blocks(sequence) - len(held)
        taken = self.pool.take(missing) if self.pool.num_free >= missing + len(self.running) else None
        if taken is None:
            self.pool.release(held)
            return None
        self.running.append(self.waiting.popleft())
        sequence.start()
        sequence.blocks, sequence.length = held + taken, len(held) * size
        self.num_hit_tokens += sequence.length
        fresh += taken
        return sequence

    def _keep(self, sequence: Sequence, start: int) -> None:
        """Blocks that were filled since the sequence was read up to `start` can be shared."""
        size = self.limits.block_size
        num_full = sequence.length // size
        keys = sequence.first_keys(num_full, size)
        for index in range(start // size, num_full):
            self.pool.keep(sequence.blocks[index], keys[index])

    def _num_blocks(self, sequence: Sequence) -> int:
        return -(-len(sequence.tokens) // self.limits.block_size)

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.length = [], 0
