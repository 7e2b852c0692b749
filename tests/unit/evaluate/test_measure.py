"""What is measured on a loaded model, against naive twins."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lmray.data.base import Example
from lmray.data.batch import pack
from lmray.data.tokenise import IGNORED, encode, prompt_ids, tokenise
from lmray.errors import ConfigError, DataError
from lmray.evaluate.answers import Answer, answers_path, read_answers, save_answers
from lmray.evaluate.choices import choice_log_likelihoods
from lmray.evaluate.loss import example_losses, held_out_loss
from lmray.evaluate.measure import HeldOut, check_tasks, measure


def naive_log_likelihood(model, prompt, answer) -> float:
    """Of `answer` after `prompt` (ids), one token at a time, in float64."""
    ids, total = list(prompt), 0.0
    for token in answer:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        total += float(logits[token] - logits.logsumexp(0))
        ids.append(token)
    return total


@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_likelihoods_of_choices_are_those_of_one_token_at_a_time(loaded, examples, batch_size):
    asked = [(example, example.columns["choices"]) for example in examples]
    seen: list[int] = []
    found = choice_log_likelihoods(
        loaded.model, loaded.tokenizer, asked, shots=examples[:1], batch_size=batch_size, progress=seen.append
    )
    assert seen[-1] == 8 and seen == sorted(seen)
    for (example, choices), values in zip(asked, found, strict=True):
        prompt = prompt_ids(loaded.tokenizer, [*examples[0].messages, *example.prompt])
        for choice, value in zip(choices, values, strict=True):
            expected = naive_log_likelihood(loaded.model, prompt, encode(loaded.tokenizer, choice))
            assert value == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("max_length", [64, 512])
def test_losses_of_packed_examples_are_each_examples_own(loaded, examples, max_length):
    rows = pack([tokenise(loaded.tokenizer, example) for example in examples], max_length=max_length)
    found = example_losses(loaded.model, rows, batch_size=2, pad_token_id=0, device="cpu")
    packed = [example for row in rows for example in row]
    assert len(packed) == len(examples) and any(len(row) > 1 for row in rows) == (max_length == 512)
    for (loss, count), tokens in zip(found, packed, strict=True):
        start = next(place for place, label in enumerate(tokens.labels) if label != IGNORED)
        expected = -naive_log_likelihood(loaded.model, tokens.input_ids[:start], tokens.input_ids[start:])
        assert (loss, count) == (pytest.approx(expected, abs=1e-3), len(tokens) - start)
    mean = sum(loss for loss, _ in found) / sum(count for _, count in found)
    assert held_out_loss(loaded.model, rows, batch_size=3, pad_token_id=0, device="cpu") == pytest.approx(mean)


def test_every_kind_of_task_on_one_model(loaded, examples, args, tmp_path):
    rows = pack([tokenise(loaded.tokenizer, example) for example in examples], max_length=512)
    told = []
    found = measure(
        loaded.model,
        loaded.tokenizer,
        HeldOut(examples, rows),
        args("loss", "multiple_choice", "f1", "bleu", max_examples=2),
        adapter=None,
        prefix="base",
        progress=lambda *state: told.append(state),
    )
    assert set(found.metrics) == {
        *("base.loss", "base.perplexity", "base.multiple_choice", "base.multiple_choice_norm"),
        *("base.f1", "base.bleu"),
    }
    assert found.metrics["base.perplexity"] == pytest.approx(math.exp(found.metrics["base.loss"]))
    assert {("loss", 1, 1), ("answers", 2, 2), ("choices", 4, 4)} <= set(told)
    assert [task.name for task, _ in found.evidence] == ["loss", "multiple_choice", "f1", "bleu"]
    assert [answer.expected for answer in found.answers] == ["red", "one"], "spread evenly"
    assert set(found.answers[0].scores) == {"multiple_choice", "multiple_choice_norm", "f1", "bleu"}
    assert set(found.answers[0].log_likelihoods) == {"red", "blue"}


def test_answers_are_read_as_they_were_kept_whatever_a_text_holds(tmp_path):
    """Line separators of other kinds stand in JSON as they are."""
    separated = Answer("one\u2028two", "three\x85", "four\x0bfive\n", {"f1": 0.5})
    answers = [separated, Answer("六", "七", "", {}, {"七": -1.5})]
    save_answers(answers, answers_path(tmp_path, "base"))
    save_answers([], answers_path(tmp_path, "tuned"))
    assert read_answers(tmp_path) == {"base": answers, "tuned": []}


def test_choices_alone_generate_nothing_and_the_likeliest_is_the_answer(loaded, examples, args):
    told = []
    found = measure(
        loaded.model,
        loaded.tokenizer,
        HeldOut(examples, ()),
        args("multiple_choice"),
        adapter=None,
        progress=lambda *state: told.append(state[0]),
    )
    assert set(told) == {"choices"}
    for answer in found.answers:
        assert answer.answer == max(answer.log_likelihoods, key=lambda choice: answer.log_likelihoods[choice])


def test_a_loss_known_already_is_taken_as_it_is(loaded, examples, args):
    rows = pack([tokenise(loaded.tokenizer, example) for example in examples], max_length=512)
    found = measure(loaded.model, loaded.tokenizer, HeldOut(examples, rows), args("loss"), adapter=None, loss=1.5)
    assert found.metrics == {"eval.loss": 1.5, "eval.perplexity": pytest.approx(math.exp(1.5))}


def test_tasks_that_the_data_does_not_fit_are_found_before_a_model_is_loaded(examples, args):
    check_tasks(args("loss", "accuracy", "multiple_choice").tasks, examples)
    with pytest.raises(DataError, match="`options`: is missing"):
        check_tasks(args({"name": "multiple_choice", "column": "options"}).tasks, examples)
    with pytest.raises(DataError, match="is no label"):
        check_tasks(args({"name": "accuracy", "labels": ["red"]}).tasks, examples)


def test_a_task_listed_twice_is_refused(args):
    with pytest.raises(ConfigError, match="lists `bleu` more than once"):
        args("bleu", {"name": "bleu", "tokenize": "char"})


def test_models_are_asked_with_the_tools_they_were_trained_with(loaded, examples, args, monkeypatch):
    asked = []
    monkeypatch.setattr("lmray.evaluate.answers.generate", lambda model, prompts, **_: asked.extend(prompts) or [[0]])
    loaded.tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}ask"
    tools = ({"type": "function", "function": {"name": "send_mail", "parameters": {}}},)
    measure(
        loaded.model,
        loaded.tokenizer,
        HeldOut([replace(examples[0], tools=tools)], []),
        args("exact_match"),
        adapter=None,
    )
    assert loaded.tokenizer.decode(asked[0]) == "send_mail;ask"


def test_plain_text_has_a_loss_and_no_answers(args):
    text = Example((), "corpus.txt:1", text="once")
    check_tasks(args("loss").tasks, [text])
    with pytest.raises(DataError, match=r"corpus\.txt:1: holds no answer for the task `exact_match`"):
        check_tasks(args("loss", "exact_match").tasks, [text])
