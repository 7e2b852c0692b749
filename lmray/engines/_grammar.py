"""Guided decoding: which tokens may come next for the answer to match a grammar. `llguidance` reads grammars and masks
tokens; it is the extra `lmray[guided]`. V is the vocabulary, as wide as the model's logits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from lmray.errors import DataError

FLEXIBLE_SPACE = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\t]{0,20}"}
"""A model may indent, but not write spaces until its answer is cut."""


def json_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of answers that are JSON of `schema`, as `llguidance` reads it."""
    held = {**schema, "x-guidance": FLEXIBLE_SPACE}
    return json.dumps({"grammars": [{"name": "json_schema", "json_schema": held}]}, ensure_ascii=False)


def grammar_fault(grammar: str) -> str | None:
    """What answers cannot be held to in `grammar`; None where there is no such thing. A lenient schema is
    held to as far as possible. Takes a while for large ones."""
    from llguidance import LLMatcher  # type: ignore[import-not-found]

    failed, said = LLMatcher.validate_grammar_with_warnings(grammar)
    return said[0].splitlines()[0][:300] if failed else None


class Grammars:
    """What tokens say, for any number of answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, stop_token_ids: Sequence[int]):
        """Takes about a second for a vocabulary of 50,000. An answer may stop with any of `stop_token_ids`."""
        from llguidance.hf import from_tokenizer  # type: ignore[import-not-found]

        self._vocab_size = vocab_size
        self._tokens = from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(stop_token_ids))

    @classmethod
    def of(cls, tokenizer: Any, vocab_size: int, stop_token_ids: Sequence[int]) -> Grammars | None:
        """None where answers cannot be held to a grammar: no fast tokenizer, no stop token, or the extra is missing."""
        possible = isinstance(tokenizer, PreTrainedTokenizerFast) and stop_token_ids and find_spec("llguidance")
        return cls(tokenizer, vocab_size, stop_token_ids) if possible else None

    def start(self, grammar: str) -> Matching:
        """The start of one answer. A grammar that is none is told with its first mask."""
        from llguidance import LLMatcher  # type: ignore[import-not-found]

        return Matching(LLMatcher(self._tokens, grammar, log_level=0), self._vocab_size)


class Matching:
    """One answer on its way through a grammar."""

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> torch.Tensor:
        """[V], True for tokens that may come next; at the grammar's end these are the stop tokens.

        Raises DataError for a grammar that cannot be read or is too large.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            first = (self._matcher.get_error().splitlines() or ["unknown"])[0]
            raise DataError("grammar", f"cannot be followed: {first[:200]}", hint="ask for a simpler schema")
        return torch.from_numpy(np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(np.bool_))

    def take(self, token_id: int) -> None:
        """Goes on behind `token_id`, one of those allowed."""
        self._matcher.consume_token(token_id)
