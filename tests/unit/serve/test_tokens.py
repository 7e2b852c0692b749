"""What single tokens say, in the ways that vocabularies write them."""

from __future__ import annotations

import math

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lmray.engines.base import TokenLogprob
from lmray.serve.tokens import Told, chat_logprobs, text_logprobs, token_bytes


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is `▁`, unknown characters are bytes, decoding strips the first space."""
    vocabulary = {token: place for place, token in enumerate(("<unk>", "<0xE6>", "\u2581hi", "a", "日", "\u2581"))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    ("token_id", "expected"), [(1, b"\xe6"), (2, b" hi"), (3, b"a"), (4, "日".encode()), (5, b" ")]
)
def test_bytes_of_sentencepieces_tokens(sentencepiece, token_id, expected):
    assert token_bytes(sentencepiece, token_id) == expected


def test_bytes_of_byte_level_tokens_and_of_none(tokenizer, ids):
    assert b"".join(token_bytes(tokenizer, token) for token in ids(" 日🙂\n")) == " 日🙂\n".encode()
    assert token_bytes(tokenizer, 2) == b"<|im_end|>"
    assert token_bytes(tokenizer, 263) == b""


def test_what_is_impossible_is_a_number_that_json_has(tokenizer, ids):
    [token] = ids("a")
    told = [Told(token, 0, TokenLogprob(token, -math.inf, ((token, -math.inf),)))]
    assert text_logprobs(tokenizer, told)["token_logprobs"] == [-9999.0]
    assert text_logprobs(tokenizer, told)["top_logprobs"] == [{"a": -9999.0}]
    assert chat_logprobs(tokenizer, told)["content"][0]["logprob"] == -9999.0


def test_of_tokens_that_are_written_alike_the_likeliest_is_told(tokenizer, ids):
    [token] = ids("a")
    told = [Told(token, 0, TokenLogprob(token, -1.0, ((262, -0.5), (263, -0.7))))]
    assert text_logprobs(tokenizer, told)["top_logprobs"] == [{"": -0.5, "a": -1.0}]
