"""What the engine's ways to run a model have in common: requests in, outcomes out, one step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from lmray.engines._adapter_folder import AdapterFolder
from lmray.engines._sampling import draw
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


def draw_tokens(rows: Sequence[Row], logits_NV: torch.Tensor, stop_token_ids: frozenset[int]) -> list[Outcome]:
    """The next token of each row from its logits, recorded in the row; an error for a row whose logits are NaN."""
    highest_N, greedy_N = logits_NV.max(dim=-1)
    broken, greedy = highest_N.isnan().tolist(), greedy_N.tolist()
    outcomes: list[Outcome] = []
    for place, row in enumerate(rows):
        if broken[place]:
            outcomes.append(_not_a_number(row.request))
            continue
        sampling = row.request.sampling
        warm = sampling.temperature > 0
        token = draw(logits_NV[place].float().cpu(), sampling, row.random.random()) if warm else greedy[place]
        outcomes.append(row.take(token, stop_token_ids))
    return outcomes


def is_last(outcome: Outcome) -> bool:
    """Whether a request ends with `outcome`."""
    return isinstance(outcome, LmrayError) or outcome.finish_reason is not None


def is_token(outcome: Outcome) -> bool:
    return isinstance(outcome, TokenEvent) and outcome.token_id is not None


def _not_a_number(request: Request) -> LmrayError:
    what = f"adapter `{request.adapter}`" if request.adapter else "the model"
    return LmrayError(f"request {request.id}", f"{what} answered with NaN", hint="its weights are too large")
