"""Chat templates of every kind: what of a conversation is learned, and what is refused."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmray.data import tokenise as module
from lmray.data.base import Example
from lmray.data.tokenise import IGNORED, prompt_ids, tokenise, tokenise_all
from lmray.errors import DataError
from lmray.testing.tiny import tiny_tokenizer

LOOP = "{% for m in messages %}"
ASK = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    + LOOP
    + "<|im_start|>{{ m['role'] }}\n{% if m['tool_calls'] %}CALL {{ m['tool_calls'][0]['function'] | tojson }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n" + ASK
)
THINKING = (
    LOOP + "<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}[thought]{% endif %}{{ m['content'] }}<|im_end|>\n" + ASK
)
TOOL = {"type": "function", "function": {"name": "天気", "parameters": {"type": "object", "properties": {}}}}
LONG = {"max_length": 1000, "over_long": "error"}


def conversation(*turns: tuple[str, str], **fields) -> Example:
    return Example(tuple({"role": role, "content": content} for role, content in turns), "file:1", **fields)


TWO = conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))


def tokenizer_with(template: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def learned(tokenizer, tokens) -> str:
    return tokenizer.decode([label for label in tokens.labels if label != IGNORED])


def test_tools_are_shown_and_calls_are_learned_but_results_are_not():
    tokenizer = tokenizer_with(WITH_TOOLS)
    call = {"function": {"name": "天気", "arguments": {"都市": "東京"}}}
    example = Example(
        (
            {"role": "user", "content": "天気は?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "晴れ"},
            {"role": "assistant", "content": "晴れです"},
        ),
        "file:1",
        tools=(TOOL,),
    )
    tokens = tokenise(tokenizer, example)
    calls, answer = learned(tokenizer, tokens).removesuffix("<|im_end|>").split("<|im_end|>")
    assert calls.startswith("CALL {") and "東京" in calls and answer == "晴れです"
    asked = prompt_ids(tokenizer, example.messages[:1], example.tools)
    assert "天気" in tokenizer.decode(asked).split("<|im_end|>")[0]
    assert tuple(tokens.input_ids[: len(asked)]) == asked


def test_examples_with_and_without_tools_keep_their_order():
    tokenizer = tokenizer_with(WITH_TOOLS)
    plain, tooled = conversation(("user", "p"), ("assistant", "q")), conversation(("user", "r"), ("assistant", "s"))
    tooled = Example(tooled.messages, "file:2", tools=(TOOL,))
    examples = [plain, tooled, plain, tooled]
    found = tokenise_all(tokenizer, examples, **LONG).examples
    assert [learned(tokenizer, one)[0] for one in found] == ["q", "s", "q", "s"]
    assert found[0] == found[2] and found[1] == found[3] == tokenise(tokenizer, tooled)


def test_many_are_tokenised_as_one_is(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 3)
    tokenizer = tiny_tokenizer()
    examples = [conversation(("user", "q" * n), ("assistant", "答" * n)) for n in range(1, 9)]
    found = tokenise_all(tokenizer, examples, **LONG).examples
    assert list(found) == [tokenise(tokenizer, example) for example in examples]


def test_where_earlier_turns_are_rendered_anew_each_turn_is_learned_as_it_is_asked():
    tokenizer = tokenizer_with(THINKING)
    found = tokenise_all(tokenizer, [TWO], **LONG).examples
    assert [learned(tokenizer, one) for one in found] == ["[thought]b<|im_end|>", "[thought]d<|im_end|>"]
    for tokens, end in zip(found, (1, 3), strict=True):
        asked = prompt_ids(tokenizer, TWO.messages[:end])
        assert tuple(tokens.input_ids[: len(asked)]) == asked
    with pytest.raises(DataError, match="becomes 2 sequences"):
        tokenise(tokenizer, TWO)


def test_mask_history_learns_the_last_answer_alone():
    tokenizer = tiny_tokenizer()
    found = tokenise_all(tokenizer, [TWO], **LONG, mask_history=True).examples
    assert [learned(tokenizer, one) for one in found] == ["d<|im_end|>"]
    assert list(found[0].input_ids) == list(tokenise(tokenizer, TWO).input_ids)
    thinking = tokenizer_with(THINKING)
    found = tokenise_all(thinking, [TWO], **LONG, mask_history=True).examples
    assert [learned(thinking, one) for one in found] == ["[thought]d<|im_end|>"]


def test_an_assistant_turn_that_opens_a_conversation_is_read_only():
    tokenizer = tiny_tokenizer()
    example = conversation(("assistant", "hello"), ("user", "a"), ("assistant", "b"))
    tokens = tokenise(tokenizer, example)
    assert learned(tokenizer, tokens) == "b<|im_end|>"
    assert "hello" in tokenizer.decode(tokens.input_ids)


def test_a_stop_token_of_the_model_counts_besides_the_tokenizers_own():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(DataError, match=r"without the stop token '<\|endoftext\|>'"):
        tokenise_all(tokenizer, [TWO], **LONG)
    found = tokenise_all(tokenizer, [TWO], **LONG, stop_token_ids=(2,)).examples
    assert learned(tokenizer, found[0]) == "b<|im_end|>d<|im_end|>"


def test_a_template_that_leaves_the_assistant_out_is_refused():
    tokenizer = tokenizer_with(LOOP + "{% if m['role'] == 'user' %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}")
    with pytest.raises(DataError, match="leaves the assistant's turn out") as caught:
        tokenise_all(tokenizer, [TWO], **LONG)
    assert "file:1, turn 2" in caught.value.where


def test_what_a_template_refuses_is_named():
    tokenizer = tokenizer_with(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + THINKING
    )
    bad = Example(conversation(("system", "s"), ("user", "a"), ("assistant", "b")).messages, "file:7")
    with pytest.raises(DataError, match="refuses the conversation: no system") as caught:
        tokenise_all(tokenizer, [TWO, bad], **LONG)
    assert caught.value.where == "file:7, turn 2"


def test_a_template_that_breaks_down_is_told_by_the_row():
    with pytest.raises(DataError, match="refuses the conversation: division by zero") as caught:
        tokenise_all(tokenizer_with("{{ 1 / 0 }}"), [TWO], **LONG)
    assert caught.value.where == "file:1, turn 1"


def test_no_second_start_token_is_written():
    tokenizer = tokenizer_with("<|endoftext|>" * 2 + THINKING)
    tokenizer.bos_token = "<|endoftext|>"
    with pytest.raises(DataError, match="two start tokens"):
        tokenise_all(tokenizer, [TWO], **LONG)


def test_ids_beyond_the_embedding_are_refused_with_their_row():
    tokenizer = tiny_tokenizer()
    fine, odd = conversation(("user", "a"), ("assistant", "b")), Example(TWO.messages, "file:2")
    most = max(max(tokenise(tokenizer, one).input_ids) for one in (fine, odd))
    assert tokenise_all(tokenizer, [fine, odd], **LONG, vocab_size=int(most) + 1).examples
    tokenizer.add_tokens(["<new>"])
    odd = Example(conversation(("user", "<new>"), ("assistant", "b")).messages, "file:2")
    with pytest.raises(DataError, match=f"token id {len(tokenizer) - 1}") as caught:
        tokenise_all(tokenizer, [fine, odd], **LONG, vocab_size=len(tokenizer) - 1)
    assert caught.value.where == "file:2"


def test_truncation_that_leaves_no_answer_is_counted_and_named():
    long = Example(conversation(("user", "q" * 100), ("assistant", "b")).messages, "file:9")
    data = tokenise_all(tiny_tokenizer(), [TWO, long], max_length=80, over_long="truncate")
    assert (len(data.examples), data.num_truncated, data.num_empty, data.empty_rows) == (1, 1, 1, ("file:9",))


def test_an_example_without_an_answer_is_counted_as_empty():
    data = tokenise_all(tiny_tokenizer(), [TWO, Example((TWO.messages[0],), "file:3")], **LONG)
    assert (len(data.examples), data.num_empty, data.empty_rows) == (1, 1, ("file:3",))


def spaced_tokenizer(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """One that puts a space before every text, as sentencepiece does."""
    merged = ["".join(pair) for pair in merges]
    vocabulary = {token: id for id, token in enumerate(["<s>", "</s>", "[I]", *"▁abcx\n:[/]", *merged])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "<s>" + LOOP + "{% if m['role'] == 'user' %}a:{{ m['content'] }}b:{% else %}{{ m['content'] }}</s>{% endif %}"
        "{% endfor %}"
    )
    return tokenizer


def test_no_space_is_put_into_the_middle_by_tokenizers_that_start_a_text_with_one():
    tokenizer = spaced_tokenizer()
    tokens = tokenise(tokenizer, TWO)
    whole = tokenizer.apply_chat_template(list(TWO.messages), return_dict=True)["input_ids"]
    names = tokenizer.convert_ids_to_tokens(list(map(int, tokens.input_ids)))
    assert names == tokenizer.convert_ids_to_tokens(whole)


def test_an_answer_that_cannot_be_told_from_what_is_before_it_is_refused():
    with pytest.raises(DataError, match="in the middle of a token"):
        tokenise(spaced_tokenizer(("\n", "x")), conversation(("user", "a"), ("assistant", "x")))
