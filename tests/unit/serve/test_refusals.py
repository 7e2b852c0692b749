"""What is taken for a refusal."""

from __future__ import annotations

import pytest

from lmray.serve.refusals import LOOKED_AT, Refusals


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but that is not possible.",
        "I’m very sorry.",
        "i am afraid I must decline",
        "  I cannot help with that.",
        "I can't assist you there",
        "Sadly I am unable to do so.",
        "As an AI, I have no opinion.",
        "申し訳ありませんが、その質問には答えられません。",
        "申し訳ございません。",
        "そのご質問にはお答えできません。",
        "お手伝いすることはできません",
        "その件については回答いたしかねます。",
        "わかりかねます",
    ],
)
def test_refusals_are_found(text):
    assert Refusals().match(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The answer is 4.",
        '{"name": "say_sorry"}',
        "I can help with that.",
        "An AI is a program.",
        "答えは四です。",
        "回答します。",
        "x" * LOOKED_AT + "I'm sorry",
    ],
)
def test_answers_are_not(text):
    assert not Refusals().match(text)


def test_the_list_can_be_extended():
    assert not Refusals().match("No puedo ayudar.")
    assert Refusals((r"no puedo",)).match("No puedo ayudar.")
