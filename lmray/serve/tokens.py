"""What single tokens say, and log probabilities as OpenAI's clients read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lmray.engines.base import TokenLogprob

_LEAST = -9999.0
"""OpenAI's word for impossible; JSON has no infinity."""
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
"""Byte-level vocabularies write every byte as one printable character."""
_ONE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte in the vocabularies of SentencePiece."""


@dataclass(frozen=True)
class Told:
    """A token of a text and what the model thought of it."""

    token_id: int
    offset: int
    """Characters of the text before it."""
    logprob: TokenLogprob | None
    """None for the first token of a prompt."""


@lru_cache(maxsize=2**18)  # a prompt with its alternatives asks for the same few thousand tokens over and over
def token_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bytes:
    """The bytes of one token, be they whole characters or not; none for an id without a token."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if not isinstance(piece, str):
        return b""
    text = str(tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if all(character in _BYTES for character in piece):
        raw = bytes(_BYTES[character] for character in piece)
        if raw.decode(errors="replace") == text:  # else it is no byte-level vocabulary
            return raw
    if (byte := _ONE_BYTE.fullmatch(piece)) is not None:
        return bytes.fromhex(byte[1])
    space = " " if piece.startswith("\u2581") and not text.startswith(" ") else ""  # decoders strip a text's first
    return (space + text).encode()


def chat_logprobs(tokenizer: PreTrainedTokenizerBase, told: Iterable[Told]) -> dict[str, Any]:
    """`logprobs` of a chat answer."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(tokenizer, token_id)
        return {"token": raw.decode(errors="replace"), "logprob": max(logprob, _LEAST), "bytes": list(raw)}

    found = [one.logprob for one in told if one.logprob is not None]
    content = [
        {**entry(one.token_id, one.logprob), "top_logprobs": [entry(*other) for other in one.top]} for one in found
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokenizer: PreTrainedTokenizerBase, told: Sequence[Told]) -> dict[str, Any]:
    """`logprobs` of a completion: four lists, an entry a token. Of the likeliest tokens that are written alike, the
    likeliest is told."""
    tops: list[dict[str, float] | None] = []
    for one in told:
        if one.logprob is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for token_id, logprob in (*one.logprob.top, (one.token_id, one.logprob.logprob)):
            top.setdefault(_written(tokenizer, token_id), max(logprob, _LEAST))
        tops.append(top)
    return {
        "tokens": [_written(tokenizer, one.token_id) for one in told],
        "token_logprobs": [None if one.logprob is None else max(one.logprob.logprob, _LEAST) for one in told],
        "top_logprobs": tops,
        "text_offset": [one.offset for one in told],
    }


def prompt_logprobs(
    tokenizer: PreTrainedTokenizerBase, read: Iterable[TokenLogprob | None]
) -> list[dict[str, Any] | None]:
    """A prompt's tokens by id with what else could have stood there, as vLLM sends it."""

    def entries(one: TokenLogprob) -> dict[str, Any]:
        values = {**dict(one.top), one.token_id: one.logprob}
        return {
            str(token_id): {"logprob": max(logprob, _LEAST), "decoded_token": _written(tokenizer, token_id)}
            for token_id, logprob in values.items()
        }

    return [None if one is None else entries(one) for one in read]


def _written(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A token as a text; the start or the end of a character as `bytes:` and its bytes, as OpenAI has it."""
    raw = token_bytes(tokenizer, token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
