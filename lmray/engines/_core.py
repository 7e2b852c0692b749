"""What the engine's ways to run a model have in common: requests in, outcomes out, one step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from lmray.engines._adapter_folder import AdapterFolder
from lmray.engines._grammar import Grammars
from lmray.engines._slots import Row
from lmray.engines.base import Capabilities, Request, TokenEvent
from lmray.errors import LmrayError

Outcome = TokenEvent | LmrayError
"""What a step has for a request: a token, or why it ended without one."""


class Adapters(Protocol):
    """The adapters on one model. Weights are kept in the model's own number format."""

    base: nn.Module

    @property
    def handles(self) -> tuple[str, ...]: ...

    def add(self, handle: str, found: AdapterFolder) -> None:
        """Loads a checked adapter. Raises ArtifactError where its weights are not those its config calls for."""
        ...

    def remove(self, handle: str) -> None: ...

    def restore(self) -> None:
        """Gives the model back as it came."""
        ...


class Core(Protocol):
    """A model with its adapters and requests. Not thread-safe."""

    capabilities: Capabilities
    num_generated: int

    @property
    def adapters(self) -> Adapters: ...

    @property
    def busy(self) -> bool:
        """Whether a request runs or waits."""
        ...

    def add(self, request: Request) -> None:
        """Queues a request that `check_request` let pass."""
        ...

    def cancel(self, request_id: str) -> None:
        """Ends a request and frees its place; unknown ids are those that ended by themselves."""
        ...

    def step(self) -> list[tuple[str, Outcome]]:
        """Some of what is to be read is read; `(request id, outcome)` for each request that it drew a token for."""
        ...

    def adapters_in_use(self) -> set[str | None]:
        """Adapter handles of everything running or waiting."""
        ...

    def clear(self) -> None:
        """Forgets every request."""
        ...

    def stats(self) -> dict[str, Any]:
        """`waiting`, `running`, `forward` (what runs the model, and why), and more; JSON types."""
        ...


@dataclass(frozen=True)
class Sampler:
    """Draws tokens for the rows of a step; the same for every way to run a model."""

    stop_token_ids: frozenset[int]
    grammars: Grammars | None = None

    def draw(self, rows: Sequence[Row], logits_NV: torch.Tensor) -> list[Outcome]:
        """The next token of each row from its logits, recorded in the row; an error for a row whose logits are NaN,
        whose grammar cannot be followed, or whose draw fails otherwise: one request never ends the others."""
        return [outcome for [outcome] in self.verify([(row, ()) for row in rows], logits_NV)]

    def verify(self, rows: Sequence[tuple[Row, Sequence[int]]], logits_NV: torch.Tensor) -> list[list[Outcome]]:
        """The same where tokens were proposed: the next tokens of each row, from logits of its last token and of those
        proposed after it. A row's `length` grows by each proposed token that was drawn.

        Draws as if nothing had been proposed, place after place, as long as the draw is what was proposed. That is
        speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1) for a draft that is certain: a token is
        accepted with its probability p(x), and otherwise drawn from p without it, so that the draw is always one of p.
        """
        highest_N, greedy_N = logits_NV.max(dim=-1)
        broken, greedy = highest_N.isnan().tolist(), greedy_N.tolist()
        outcomes: list[list[Outcome]] = []
        start = 0
        for row, proposed in rows:
            found = [self._draw(row, logits_NV[start], None if broken[start] else greedy[start])]
            for place, token_id in enumerate(proposed, start + 1):
                if is_last(found[-1]) or not is_token(found[-1], token_id):
                    break
                row.length += 1
                found.append(self._draw(row, logits_NV[place], None if broken[place] else greedy[place]))
            outcomes.append(found)
            start += 1 + len(proposed)
        return outcomes

    def _draw(self, row: Row, logits_V: torch.Tensor, greedy: int | None) -> Outcome:
        """`greedy`: where the logits are highest, None where they are NaN."""
        try:
            if greedy is None:
                raise _not_a_number(row.request)
            return self._choose(row, logits_V, greedy)
        except LmrayError as error:
            return error
        except Exception as error:
            found = f"its next token could not be drawn: {type(error).__name__}: {error}"
            return LmrayError(f"request {row.request.id}", found)

    def _choose(self, row: Row, logits_V: torch.Tensor, greedy: int) -> TokenEvent:
        sampling, is_first = row.request.sampling, row.num_generated == 0
        if sampling.max_tokens == 0:
            event = TokenEvent(row.request.id, None, "length")
        else:
            if sampling.grammar is not None and is_first:
                assert self.grammars is not None  # `check_request` saw to it
                row.chooser.matching = self.grammars.start(sampling.grammar)
            token_id, logprob = row.chooser.choose(logits_V, greedy)
            event = row.take(token_id, self.stop_token_ids, logprob)
        if not is_first:
            return event
        return replace(event, prompt_logprobs=row.chooser.prompt_logprobs(), prefill_s=row.prefill_s())


def is_last(outcome: Outcome) -> bool:
    """Whether a request ends with `outcome`."""
    return isinstance(outcome, LmrayError) or outcome.finish_reason is not None


def is_token(outcome: Outcome, token_id: int | None = None) -> bool:
    """Whether `outcome` is a token; with `token_id`, whether it is that one."""
    if not isinstance(outcome, TokenEvent) or outcome.token_id is None:
        return False
    return token_id is None or outcome.token_id == token_id


def _not_a_number(request: Request) -> LmrayError:
    what = f"adapter `{request.adapter}`" if request.adapter else "the model"
    return LmrayError(f"request {request.id}", f"{what} answered with NaN", hint="its weights are too large")
