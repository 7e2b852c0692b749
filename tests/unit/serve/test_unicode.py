"""Texts of every kind, both ways, through OpenAI's own client and ours: nothing broken, nothing lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from lmray.data.filters.regex import Regex
from lmray.serve.client import chat_stream
from lmray.serve.gateway import GatewaySettings, make_app
from lmray.testing.listening import listening
from tests.unit.serve.conftest import MAX_LENGTH
from tests.unit.serve.fakes import FakeBackend

TEXTS = {
    "japanese": "日本語の「テスト」です。𠮷野家、ｶﾀｶﾅ、〜",
    "emoji with joiners": "👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇯🇵 1️⃣",
    "combining": "e\u0301 n\u0303 か\u3099 ก\u0e33 Z\u0351\u036b\u0343",
    "right to left": "שלום עולם \u202eمرحبا\u202c بالعالم",
    "ends of lines": "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\r\nh\ti",
    "private and last": "\ue000 \U0010ffff \ufffe \u200b \ufeff",
    "devanagari": "नमस्ते दुनिया",
    "what looks like the protocol": 'data: [DONE]\n\ndata: {"x": 1}\n\n: \\u0041 \\ "',
    "nul": "a\x00b",
}


class Echo(FakeBackend):
    """Says what stands between bars in the prompt."""

    def __init__(self, bar: int):
        super().__init__()
        self._bar = bar

    async def stream(self, request):
        first = request.prompt_ids.index(self._bar)
        last = len(request.prompt_ids) - 1 - request.prompt_ids[::-1].index(self._bar)
        self.ids = request.prompt_ids[first + 1 : last]
        async for event in super().stream(request):
            yield event


@pytest.fixture(scope="module")
def url(tokenizer) -> Iterator[str]:
    [bar] = tokenizer("|", add_special_tokens=False)["input_ids"]
    hidden = Regex(label="never", pattern="zzzz", on="answers", replacement="")
    settings = GatewaySettings("tiny", 2 * MAX_LENGTH, filters=(hidden,))
    with listening(make_app(Echo(bar), tokenizer, settings), path="/v1") as url:
        yield url


@pytest.fixture(scope="module")
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_comes_back_as_it_was_whole_and_streamed(client, url, text):
    messages: Any = [{"role": "user", "content": f"|{text}|"}]
    told: Any = {"model": "tiny", "messages": messages, "stop": ["never said 終"]}
    assert client.chat.completions.create(**told).choices[0].message.content == text
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**told, stream=True)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(chat_stream(url, "tiny", messages)) == text
    assert client.completions.create(model="tiny", prompt=f"|{text}|").choices[0].text == text


@pytest.mark.parametrize("stop", ["🏳️‍🌈", "語", "\u0301", "\u2028"])
def test_a_stop_string_is_found_among_characters_of_many_bytes(client, stop):
    messages: Any = [{"role": "user", "content": f"|前の{stop}後|"}]
    told: Any = {"model": "tiny", "messages": messages, "stop": stop}
    assert client.chat.completions.create(**told).choices[0].message.content == "前の"
    chunks = client.chat.completions.create(**told, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "前の"
