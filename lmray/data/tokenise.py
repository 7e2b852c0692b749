"""Conversations and documents to token ids with an exact loss mask: supervised are the assistant's tokens and the stop
token after them, and all of a document.

Prompt and answer are encoded apart, as they are when the model is asked later, so that no token straddles the border.
Special tokens come from the template alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from lmray.data.base import Example
from lmray.data.pieces import Conventions, Document, Messages, Tools, documents, encode, render, rendered_turns
from lmray.data.places import Places
from lmray.data.rules import Rules
from lmray.data.table import IGNORED, NONE, Part, Table, Tokenised
from lmray.errors import DataError
from lmray.metrics.counter import Counter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "Tokenised", "TokenisedData", "encode", "prompt_ids", "render", "tokenise", "tokenise_all"]

CHUNK = 1000
"""Examples that are rendered and encoded together."""
CHUNK_CHARS = 4_000_000
"""Fewer of them where they have so many characters: encoding takes a hundred times as many bytes for a moment."""


@dataclass(frozen=True)
class TokenisedData:
    """Examples that fit, and what became of those that did not."""

    examples: Table
    num_dropped: int = 0
    """Longer than `max_length`."""
    num_truncated: int = 0
    num_empty: int = 0
    """Left out for having no supervised token: no answer, or cut off before it."""
    empty_rows: tuple[str, ...] = ()
    """Where the first of these stand."""

    @classmethod
    def of(
        cls, parts: Sequence[Part], places: Places, *, max_length: int | None, order: np.ndarray | None = None
    ) -> TokenisedData:
        """What became of the examples at `places`, which are `parts` now; with `order`, of those at these indices,
        which may repeat. Raises DataError where nothing supervised is left."""
        num = len(places)
        times = np.ones(num, np.int64) if order is None else np.bincount(order, minlength=num)
        table = Table(parts, places)
        if order is not None:
            table = Table(parts, places, _spread(table.sources, order, num))
        dropped, truncated, empty = (
            np.concatenate([NONE, *(getattr(part, name) for part in parts)])
            for name in ("dropped_S", "truncated_S", "empty_S")
        )
        empty_rows = tuple(places[int(index)] for index in empty[:NAMED])
        if not table.supervised.sum():
            rows = ", ".join(empty_rows or places[:NAMED])
            found = f"no supervised token in {times.sum()} example(s), {times[dropped].sum()} too long"
            limit = "" if max_length is None else f"`max_length` is {max_length}; "
            hint = f"{limit}see whether the answers are empty"
            raise DataError(f"{rows} and after", found, allowed="at least one answer token", hint=hint)
        counts = [int(times[one].sum()) for one in (dropped, truncated, empty)]
        return cls(table, counts[0], counts[1], counts[2], empty_rows)


NAMED = 3
"""So many rows are named in a message."""


def _spread(sources: np.ndarray, order: np.ndarray, num: int) -> np.ndarray:
    """The places, in `sources` (rising, below `num`), of all that was made of each of `order`, one after the other."""
    starts = np.searchsorted(sources, np.arange(num + 1))
    counts = np.diff(starts)[order]
    skipped = np.repeat(starts[order] - np.cumsum(counts) + counts, counts)
    return skipped + np.arange(len(skipped))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools = None) -> tuple[int, ...]:
    """Ids that ask the assistant to answer `messages`."""
    return tuple(encode(tokenizer, render(tokenizer, messages, ask=True, tools=tools)))


def tokenise(tokenizer: PreTrainedTokenizerBase, example: Example) -> Tokenised:
    """`example`, which the template renders in one go, as ids and labels. Raises DataError where it does not."""
    found = [tokens for _, tokens in _tokenised(tokenizer, [example], Conventions.of(tokenizer), mask_history=False)]
    if len(found) != 1:
        hint = "the chat template changes earlier turns; keep one assistant turn an example"
        raise DataError(example.where, f"becomes {len(found)} sequences of tokens", hint=hint)
    return replace(found[0], where=example.where)


def tokenise_all(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, max_length: int, over_long: str, **rules: Any
) -> TokenisedData:
    """All `examples` in memory, longer ones dropped, cut at the end, or refused; documents are cut into several.
    `rules` are further fields of `Rules`. Raises DataError where nothing supervised is left."""
    parts = list(tokenised_parts(tokenizer, examples, Rules(max_length, over_long, **rules)))
    return TokenisedData.of(parts, Places.of(example.where for example in examples), max_length=max_length)


def tokenised_parts(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], rules: Rules) -> Iterator[Part]:
    """`examples` chunk by chunk. Raises DataError for one that cannot be tokenised exactly or as the rules say."""
    conventions = Conventions.of(tokenizer, rules.stop_token_ids)
    with Counter("tokenise", len(examples), unit="examples") as counter:
        for first, chunk in _chunks(examples):
            tally = _Tally()
            for index, tokens in _tokenised(tokenizer, chunk, conventions, mask_history=rules.mask_history):
                _check(tokens, chunk[index], tokenizer.bos_token_id, rules.vocab_size)
                for one in _fitted(tokens, chunk[index], rules, first + index, tally):
                    if one.num_supervised:
                        tally.kept.append(one)
                        tally.sources.append(first + index)
                    else:
                        tally.empty.append(first + index)
            yield Part.of(
                tally.kept, tally.sources, dropped=tally.dropped, truncated=tally.truncated, empty=tally.empty
            )
            counter.at(first + len(chunk))


def _chunks(examples: Sequence[Example]) -> Iterator[tuple[int, list[Example]]]:
    """`examples` in pieces, each with the place of its first."""
    chunk: list[Example] = []
    first = size = 0
    for example in examples:
        chunk.append(example)
        size += example.num_chars
        if len(chunk) >= CHUNK or size >= CHUNK_CHARS:
            yield first, chunk
            chunk, first, size = [], first + len(chunk), 0
    if chunk:
        yield first, chunk


@dataclass
class _Tally:
    """What became of a chunk: sequences of tokens, and by their place the examples they or none were made of."""

    kept: list[Tokenised] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)


def _tokenised(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], conventions: Conventions, *, mask_history: bool
) -> Iterator[tuple[int, Tokenised]]:
    """The sequences of tokens that `examples` become, each with its example's place."""
    turns = rendered_turns(tokenizer, examples, mask_history=mask_history)
    found = [
        (index, document)
        for index, its_turns in enumerate(turns)
        for document in documents(examples[index], its_turns, conventions)
    ]
    pieces = [piece for _, document in found for piece in document]
    try:
        ids = iter(_encoded(tokenizer, [piece.context + piece.text for piece in pieces]))
    except TypeError:
        odd = [examples[index].where for index, document in found if not all(_is_text(one.text) for one in document)]
        if not odd:
            raise
        hint = "`\\ud800` to `\\udfff` stand in pairs only; write the data again as UTF-8"
        raise DataError(odd[0], "holds half of a surrogate pair, which is no text", hint=hint) from None
    contexts = {context: encode(tokenizer, context) for context in {piece.context for piece in pieces}}
    for index, document in found:
        whole = [(next(ids), contexts[piece.context]) for piece in document]
        if any(one[: len(context)] != context for one, context in whole):
            hint = "start the answer with a letter or a digit, or leave the example out"
            raise DataError(examples[index].where, "an answer starts in the middle of a token", hint=hint)
        yield index, _joined(document, [one[len(context) :] for one, context in whole])


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text; one call, for the tokenizer encodes on all cores."""
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(texts, **options)["input_ids"] if texts else []  # type: ignore[return-value]


def _joined(document: Document, ids: Sequence[list[int]]) -> Tokenised:
    joined = np.fromiter(chain.from_iterable(ids), dtype=np.int32)
    marks = np.array([piece.supervised for piece in document], dtype=bool)
    supervised = np.repeat(marks, np.array([len(piece) for piece in ids], dtype=np.int64))
    return Tokenised(joined, np.where(supervised, joined, np.int32(IGNORED)))


def _check(tokens: Tokenised, example: Example, bos: Any, vocab_size: int | None) -> None:
    ids = tokens.input_ids
    if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        hint = "write it once: in the chat template or in the data, not in both"
        raise DataError(example.where, f"starts with two start tokens (id {bos})", hint=hint)
    if vocab_size is not None and len(ids) and ids.max() >= vocab_size:
        hint = "the tokenizer is another model's, or tokens were added to it and the model was not resized"
        allowed = f"0 to {vocab_size - 1}, the rows of the model's embedding"
        raise DataError(example.where, f"holds token id {ids.max()}", allowed=allowed, hint=hint)


def _fitted(tokens: Tokenised, example: Example, rules: Rules, index: int, tally: _Tally) -> Iterator[Tokenised]:
    """What of `tokens` has at most `max_length` tokens. A document's chunks overlap by one token, so that each of its
    tokens but the first is predicted once."""
    length = rules.max_length
    if length is None or len(tokens) <= length:
        yield tokens
    elif example.text is not None:
        for start in range(0, len(tokens) - 1, length - 1):
            yield Tokenised(tokens.input_ids[start : start + length], tokens.labels[start : start + length])
    elif rules.over_long == "truncate":
        tally.truncated.append(index)
        yield Tokenised(tokens.input_ids[:length], tokens.labels[:length])
    elif rules.over_long == "drop":
        tally.dropped.append(index)
    else:
        hint = "raise `max_length`, or `over_long: drop`"
        raise DataError(example.where, f"is {len(tokens)} tokens long", allowed=f"at most {length}", hint=hint)
