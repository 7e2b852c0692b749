import pytest

from lmray.data.base import Example
from lmray.data.rules import Rules
from lmray.data.tokenise import IGNORED, prompt_ids, tokenise, tokenise_all, tokenised_parts
from lmray.errors import DataError
from lmray.testing.tiny import tiny_tokenizer


def conversation(*turns: tuple[str, str]) -> Example:
    return Example(tuple({"role": role, "content": content} for role, content in turns), "file:1")


ONE = conversation(("user", "色は?"), ("assistant", "赤 red"))
TWO = conversation(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))


def supervised(tokenizer, tokens) -> str:
    return tokenizer.decode([label for label in tokens.labels if label != IGNORED])


def test_half_a_surrogate_pair_is_no_text_and_its_row_is_named():
    odd = Example(({"role": "user", "content": "a"}, {"role": "assistant", "content": "\udfff"}), "file:7")
    with pytest.raises(DataError, match="half of a surrogate pair") as caught:
        tokenise_all(tiny_tokenizer(), [ONE, odd], max_length=100, over_long="error")
    assert caught.value.where == "file:7" and "UTF-8" in str(caught.value.hint)


def test_exactly_the_answers_and_their_stop_tokens_are_supervised():
    tokenizer = tiny_tokenizer()
    assert supervised(tokenizer, tokenise(tokenizer, ONE)) == "赤 red<|im_end|>"
    assert supervised(tokenizer, tokenise(tokenizer, TWO)) == "b<|im_end|>d<|im_end|>"


def test_ids_are_the_templates_own_without_a_second_start_token():
    tokenizer = tiny_tokenizer()
    whole = tokenizer.apply_chat_template(list(TWO.messages), return_dict=True)["input_ids"]
    tokens = tokenise(tokenizer, TWO)
    assert list(tokens.input_ids) == whole[:-1], "all but the newline after the last stop token"
    assert list(tokens.input_ids).count(tokenizer.bos_token_id) == len(TWO.messages)


def test_an_example_starts_with_the_ids_it_is_asked_with():
    tokenizer = tiny_tokenizer()
    asked = prompt_ids(tokenizer, ONE.prompt)
    tokens = tokenise(tokenizer, ONE)
    assert tuple(tokens.input_ids[: len(asked)]) == asked
    assert tokens.num_supervised == len(tokens) - len(asked)


def test_a_template_without_a_stop_token_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(DataError, match="without the stop token"):
        tokenise(tokenizer, ONE)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + str(tokenizer.chat_template)
    with pytest.raises(DataError, match="cannot be told exactly"):
        tokenise(tokenizer, ONE)


@pytest.mark.parametrize(("policy", "kept", "dropped", "truncated"), [("drop", 1, 1, 0), ("truncate", 2, 0, 1)])
def test_over_long_examples_are_counted(policy, kept, dropped, truncated):
    tokenizer = tiny_tokenizer()
    long = conversation(("user", "q"), ("assistant", "x" * 100))
    data = tokenise_all(tokenizer, [ONE, long], max_length=60, over_long=policy)
    assert (len(data.examples), data.num_dropped, data.num_truncated) == (kept, dropped, truncated)
    assert all(len(tokens) <= 60 for tokens in data.examples)


def test_over_long_examples_can_be_refused():
    with pytest.raises(DataError, match="tokens long"):
        tokenise_all(tiny_tokenizer(), [ONE], max_length=20, over_long="error")


def test_nothing_to_learn_from_is_an_error_with_rows():
    long_question = conversation(("user", "q" * 100), ("assistant", "a"))
    with pytest.raises(DataError, match="no supervised token in 1 example") as caught:
        tokenise_all(tiny_tokenizer(), [long_question], max_length=50, over_long="truncate")
    assert "file:1" in caught.value.where


def test_long_examples_are_encoded_fewer_at_a_time(monkeypatch):
    monkeypatch.setattr("lmray.data.tokenise.CHUNK_CHARS", 100)
    texts = [Example((), f"file:{number}", text="x" * length) for number, length in enumerate((10, 89, 1, 300, 5), 1)]
    parts = list(tokenised_parts(tiny_tokenizer(), texts, Rules(max_length=1000)))
    assert [part.sources_M.tolist() for part in parts] == [[0, 1, 2], [3], [4]]
