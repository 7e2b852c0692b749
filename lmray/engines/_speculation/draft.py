"""A draft model: a smaller one of the same vocabulary says what it would go on with (Leviathan et al., arXiv
2211.17192, section 2.1). A pruned copy of the model that was trained again is one too; one that was not is of no use.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lmray.engines._batch import Pass, Read
from lmray.engines._decoder import Decoder, unfit
from lmray.engines._schedule import Limits, Sequence
from lmray.engines._speculation.base import Proposer, Speculation
from lmray.errors import ConfigError
from lmray.models.load import load_config, load_model, load_tokenizer, make_model
from lmray.models.quantised import check_unquantised

_WHERE = "engine.speculation.model"
_AT_ONCE = 32
"""Tokens that a draft catches up with on its way. Where more are new to it, it reads them and drafts in the next step,
so that steps with proposals take what they will take."""


class Draft(Speculation):
    """Proposes the greedy continuation of a smaller model, which knows of no adapters."""

    model: str
    """Written like `model.source`."""

    @property
    def source(self) -> str | None:
        return self.model

    def with_source(self, folder: Path) -> Draft:
        return self.model_copy(update={"model": str(folder)})

    def check(self, model: Any) -> None:
        small, hint = self._without_weights(), "take a smaller model of the same family"
        if (reason := unfit(small)) is not None:
            raise ConfigError(_WHERE, f"`{self.model}` cannot draft: {reason}")
        size, own = (int(one.get_input_embeddings().weight.shape[0]) for one in (model, small))
        if own != size:
            raise ConfigError(_WHERE, f"`{self.model}` has a vocabulary of {own}", allowed=str(size), hint=hint)
        folder = Path(model.name_or_path or self.model)  # a model that was made in memory says nothing of its tokens
        if folder.is_dir() and _tokens(folder) != _tokens(Path(self.model)):
            raise ConfigError(_WHERE, f"`{self.model}` has other tokens than the model it drafts for", hint=hint)

    def start(self, model: Any, limits: Limits) -> Proposer:
        self.check(model)
        weight = model.get_input_embeddings().weight
        small: Any = load_model(Path(self.model), str(weight.dtype).removeprefix("torch."))
        return _Drafts(small.to(weight.device).requires_grad_(False), limits)

    def _without_weights(self) -> Any:
        if not Path(self.model).is_dir():
            hint = "leave `speculation` out, or set it to `prompt_lookup`"
            raise ConfigError(_WHERE, f"`{self.model}` was not looked up: drafts run in endpoints", hint=hint)
        try:
            config = load_config(Path(self.model))
            check_unquantised(config, Path(self.model), where=_WHERE)
            with torch.device("meta"):
                return make_model(config, "float32")
        except ValueError as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(_WHERE, f"`{self.model}` is no causal language model: {first[:200]}") from None


def _tokens(folder: Path) -> dict[str, int]:
    return load_tokenizer(folder, chat=False).get_vocab()


class _Drafts:
    """The draft's keys and values lie in blocks of the same numbers as the model's, so that they come, go and are
    shared with them. What of a block it has not read yet, it reads when it is next asked."""

    def __init__(self, model: PreTrainedModel, limits: Limits):
        self._pass = Pass(Decoder(model), limits)
        self._limits = limits
        self._filled = [0] * limits.num_blocks
        """How many tokens of each block it has read, of those that are there for good."""

    def forget(self, blocks: Sequence_[int]) -> None:
        self._pass.clear(blocks)
        for block in blocks:
            self._filled[block] = 0

    def propose(self, asked: Sequence_[tuple[Sequence, int]]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in asked]
        reads = self._catch_up([sequence for sequence, _ in asked])
        while reads:
            for place, token_id in self._greedy(reads):
                found[place].append(token_id)
            going_on = [place for place, (_, count) in enumerate(asked) if 0 < len(found[place]) < count]
            reads = {place: _behind(asked[place][0], found[place]) for place in going_on}
        return found

    def _catch_up(self, sequences: Sequence_[Sequence]) -> dict[int, Read]:
        """What of each sequence is new to it, by place; where that is much, a part, after which it cannot draft."""
        budget, reads = self._limits.max_prefill_tokens, {}
        for place, sequence in enumerate(sequences):
            start, end = self._num_read(sequence), len(sequence.tokens)
            drafts = end - start <= _AT_ONCE
            if not drafts:
                end = min(end - 1, start + budget)
                budget -= end - start
            if start < end:
                reads[place] = Read(sequence.tokens[start:end], start, sequence.blocks, int(drafts))
                self._note(sequence, start, end)
        return reads

    def _greedy(self, reads: dict[int, Read]) -> list[tuple[int, int]]:
        """Reads them, and says what token is likeliest to follow, for each place that asks for logits."""
        ordered = sorted(reads.items(), key=lambda one: len(one[1].tokens) > 1)
        logits_nV = self._pass.forward(self._pass.batch([read for _, read in ordered]))
        places = [place for place, read in ordered if read.num_logits]
        return list(zip(places, logits_nV.argmax(-1).tolist(), strict=True))

    def _num_read(self, sequence: Sequence) -> int:
        """Tokens of a sequence that it has read, at most all but the last."""
        count = 0
        for block in sequence.blocks:
            count += self._filled[block]
            if self._filled[block] < self._limits.block_size:
                break
        return min(count, len(sequence.tokens) - 1)

    def _note(self, sequence: Sequence, start: int, end: int) -> None:
        size = self._limits.block_size
        for index in range(start // size, -(-end // size)):
            self._filled[sequence.blocks[index]] = min(size, end - index * size)


def _behind(sequence: Sequence, found: list[int]) -> Read:
    """The last token of a draft."""
    return Read(found[-1:], len(sequence.tokens) + len(found) - 1, sequence.blocks, 1)
