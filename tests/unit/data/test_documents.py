"""Plain text: every token is learned, nothing is lost."""

import pytest
from tokenizers import processors

from lmray.data.base import Example
from lmray.data.tokenise import tokenise, tokenise_all
from lmray.errors import DataError
from lmray.testing.tiny import tiny_tokenizer


def document(text: str) -> Example:
    return Example((), "corpus.txt:1", text=text)


def base_tokenizer(*, starts: bool = False):
    """Of a model that was never taught to chat; `starts`: it puts a start token before every text."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.bos_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    if starts:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    return tokenizer


@pytest.mark.parametrize("text", ["色は匂へど", "色は匂へど<|im_end|>"])
def test_all_of_a_document_is_learned_and_one_stop_token_after_it(text):
    tokenizer = base_tokenizer()
    tokens = tokenise(tokenizer, document(text))
    assert tokenizer.decode(tokens.input_ids) == "色は匂へど<|im_end|>"
    assert tokens.labels.tolist() == tokens.input_ids.tolist()


@pytest.mark.parametrize("text", ["abc", "<|endoftext|>abc"])
def test_it_starts_as_the_tokenizer_starts_a_text_and_once(text):
    tokens = tokenise(base_tokenizer(starts=True), document(text))
    assert tokens.input_ids[0] == 0 and tokens.input_ids.tolist().count(0) == 1
    assert 0 not in tokenise(base_tokenizer(), document("abc")).input_ids


@pytest.mark.parametrize("num_chars", [9, 10, 18, 19, 100])
def test_a_long_one_is_cut_into_chunks_that_predict_each_token_once(num_chars):
    tokenizer = base_tokenizer()
    whole = tokenise(tokenizer, document("x" * num_chars))
    data = tokenise_all(tokenizer, [document("x" * num_chars)], max_length=10, over_long="drop")
    predicted = [token for chunk in data.examples for token in chunk.labels[1:].tolist()]
    assert predicted == whole.input_ids[1:].tolist()
    assert all(len(chunk) <= 10 for chunk in data.examples)
    assert (data.num_dropped, data.num_truncated, data.num_empty) == (0, 0, 0)


def test_a_tokenizer_that_cannot_end_a_document_is_refused():
    tokenizer = base_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no token that ends a document"):
        tokenise_all(tokenizer, [document("abc")], max_length=10, over_long="drop")


def test_an_empty_document_is_left_out_and_counted():
    data = tokenise_all(base_tokenizer(), [document("abc"), document("")], max_length=10, over_long="drop")
    assert (len(data.examples), data.num_empty) == (1, 1)
