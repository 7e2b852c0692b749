"""Continuous batching, one step at a time: read new prompts, then draw one token for every running row.

Runs on one thread, whichever calls it. Requests join and leave between steps. Shapes: N running rows, P prompt tokens,
L longest row, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lmray.engines._adapters import AdapterBank
from lmray.engines._cache import SlotCache
from lmray.engines._core import Outcome, Sampler, is_last, is_token
from lmray.engines._slots import Row, Slots
from lmray.engines.base import Capabilities, Request, check_length
from lmray.errors import ConfigError, LmrayError

ATTENTIONS = ("sdpa", "eager")
"""Attention functions that take a mask of any shape."""


class Stepper:
    """Any model that `check_model` let pass, by its own forward; its slots and its adapters. See `Core`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        sampler: Sampler,
        capabilities: Capabilities,
        max_prefill_tokens: int,
        reason: str,
    ):
        """`reason`: why it is not run through blocks."""
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(base, PreTrainedModel)
        self.base = base
        self.adapters = AdapterBank(model)
        self.slots = Slots(capabilities.max_batch_size, capabilities.max_length)
        self.capabilities = capabilities
        self.num_generated = 0
        self._sampler = sampler
        self._max_prefill_tokens = max_prefill_tokens
        self._reason = reason
        num_layers = base.config.get_text_config(decoder=True).num_hidden_layers
        num_rows, max_length = capabilities.max_batch_size, capabilities.max_length
        self._cache = SlotCache(num_layers=num_layers, num_rows=num_rows, max_length=max_length)
        self._takes_limit = "logits_to_keep" in inspect.signature(base.forward).parameters

    @property
    def busy(self) -> bool:
        return self.slots.busy

    def adapters_in_use(self) -> set[str | None]:
        return self.slots.adapters_in_use()

    def clear(self) -> None:
        self.slots.clear()

    def stats(self) -> dict[str, Any]:
        waiting, running = len(self.slots.waiting), len(self.slots.running)
        return {"waiting": waiting, "running": running, "forward": f"transformers: {self._reason}"}

    def add(self, request: Request) -> None:
        self.slots.add(request)

    def cancel(self, request_id: str) -> None:
        if not self.slots.drop_waiting(request_id) and (index := self.slots.find(request_id)) is not None:
            self._release(index)

    @torch.no_grad()
    def step(self) -> list[tuple[str, Outcome]]:
        """One token for each running request, then the first token of new ones, as `(request id, outcome)`.

        New prompts are read one by one into free rows, up to `max_prefill_tokens` tokens of them but always one prompt.
        """
        outcomes = self._decode()
        num_read = 0
        while num_read < self._max_prefill_tokens and (row := self.slots.admit()) is not None:
            outcomes += self._prefill(row)
            num_read += len(row.request.prompt_ids)
        return outcomes

    def _prefill(self, row: Row) -> list[tuple[str, Outcome]]:
        index, prompt_ids = len(self.slots.running) - 1, row.request.prompt_ids
        num_tokens = len(prompt_ids)
        self._cache.at_prompt(index, num_tokens)
        visible_PP = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=self.base.device).tril()
        logits_1TV = self._forward(
            [row],
            torch.tensor([prompt_ids], device=self.base.device),
            torch.arange(num_tokens, device=self.base.device)[None],
            visible_PP[None, None],
            all_logits=row.tells_prompt,
        )
        row.length = num_tokens
        if row.tells_prompt:
            row.chooser.read(logits_1TV[0])
        return self._draw([index], logits_1TV[:, -1])

    def _decode(self) -> list[tuple[str, Outcome]]:
        rows = self.slots.running
        if not rows:
            return []
        positions_N = torch.tensor([row.length for row in rows], device=self.base.device)
        self._cache.at_positions(positions_N)
        places_L = torch.arange(max(row.length for row in rows) + 1, device=self.base.device)
        visible_NL = places_L[None] <= positions_N[:, None]
        tokens_N = torch.tensor([row.last_token for row in rows], device=self.base.device)
        logits_N1V = self._forward(rows, tokens_N[:, None], positions_N[:, None], visible_NL[:, None, None])
        for row in rows:
            row.length += 1
        return self._draw(range(len(rows)), logits_N1V[:, -1])

    def _forward(
        self,
        rows: Sequence[Row],
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        visible: torch.Tensor,
        *,
        all_logits: bool = False,
    ) -> torch.Tensor:
        """Logits after the last token of each row (the last of dimension 1), with `all_logits` after every token.
        `visible` is [N, 1, T, L], True where a token is seen."""
        mask = visible
        if self.base.config._attn_implementation == "eager":  # adds its mask to the scores
            mask = torch.zeros(visible.shape, dtype=self.base.dtype, device=visible.device)
            mask = mask.masked_fill(~visible, torch.finfo(self.base.dtype).min)
        return self.adapters.forward(
            [row.request.adapter for row in rows],
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            **({} if all_logits else self._last_only(input_ids)),
        )

    def _last_only(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Asks the model for the last token's logits alone, where it can be asked.

        By index, not by count: a count makes the model slice, and torch copies the whole output head to multiply it
        with a slice whose strides are odd, once the head is frozen. That took longer than the rest of the pass.
        """
        num_tokens = input_ids.shape[1]
        if not self._takes_limit or num_tokens == 1:
            return {}
        return {"logits_to_keep": torch.tensor([num_tokens - 1], device=input_ids.device)}

    def _draw(self, indices: Sequence[int], logits_NV: torch.Tensor) -> list[tuple[str, Outcome]]:
        """Draws a token for rows `indices`, whose logits are given in that order, and ends the rows that are done."""
        rows = [self.slots.running[index] for index in indices]
        outcomes = self._sampler.draw(rows, logits_NV)
        done = []
        for index, outcome in zip(indices, outcomes, strict=True):
            self.num_generated += is_token(outcome)
            if isinstance(outcome, LmrayError):
                self._cache.wipe(index)
            if is_last(outcome):
                done.append(index)
        for index in reversed(done):  # from the end, so that rows moved down are rows that go on
            self._release(index)
        return [(row.request.id, outcome) for row, outcome in zip(rows, outcomes, strict=True)]

    def _release(self, index: int) -> None:
        move = self.slots.release(index)
        if move is not None:
            self._cache.move(move.source, move.target, self.slots.running[move.target].length)


def check_model(model: PreTrainedModel, max_length: int) -> None:
    """Raises ConfigError where slots would give other answers than the model: unknown inputs, states besides keys and
    values, attention windows shorter than `max_length`, positions beyond the model's."""
    name = type(model).__name__
    inputs = inspect.signature(model.forward).parameters
    missing = [key for key in ("position_ids", "attention_mask", "past_key_values") if key not in inputs]
    if missing or getattr(model.config, "alibi", False):
        found = f"it takes no {', '.join(missing)}" if missing else "its positions are in the attention mask (ALiBi)"
        raise ConfigError("engine.name", f"`native` cannot run {name}: {found}")
    attention = model.config._attn_implementation
    if attention not in ATTENTIONS:
        allowed = ", ".join(ATTENTIONS)
        raise ConfigError("engine.name", f"`native` cannot run attention `{attention}`", allowed=allowed)
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            if layer.sliding_window < max_length:
                found = f"{max_length} tokens are more than the attention window of {name}"
                hint = f"set it to {layer.sliding_window} or less"
                raise ConfigError("engine.max_length", found, allowed=f"up to {layer.sliding_window}", hint=hint)
        elif type(layer) is not DynamicLayer:
            raise ConfigError("engine.name", f"`native` cannot run {name}: a layer keeps {type(layer).__name__} states")
    check_length(model, max_length)
