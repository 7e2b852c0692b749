"""Whatever is sent, the answer is one of OpenAI's: never a failure of ours, never another shape."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmray.serve.gateway import GatewaySettings, make_app
from lmray.serve.openai import ChatRequest, CompletionRequest
from tests.unit.serve.conftest import MAX_LENGTH
from tests.unit.serve.fakes import FakeBackend

MESSAGE = {"role": "user", "content": "hi"}
VALID: dict[str, Any] = {"messages": [MESSAGE], "prompt": "hi", "model": "tiny"}
TEXT = st.text(max_size=8)
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(["text", "json_object", "auto"])
ANY = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
NEAR = {
    "messages": st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": ANY}), max_size=2),
    "prompt": TEXT | st.lists(st.integers(-1, 300), max_size=4) | st.lists(TEXT, max_size=3),
    "logit_bias": st.dictionaries(st.integers(-1, 300).map(str), st.floats(-101, 101), max_size=3),
    "n": st.integers(-1, 4),
    "stop": TEXT | st.lists(TEXT, max_size=5),
    "max_tokens": st.integers(-1, 300),
    "seed": st.integers(),
}


def bodies(kind) -> st.SearchStrategy:
    """Requests of `kind` with some fields of any value, most near to what is right."""
    names = st.sampled_from([*sorted(kind.model_fields), "metadata", "unknown"])
    changes = st.lists(names, max_size=4).flatmap(
        lambda chosen: st.fixed_dictionaries({name: NEAR.get(name, ANY) | ANY for name in chosen})
    )
    valid = {name: value for name, value in VALID.items() if name in kind.model_fields}
    return changes.map(lambda changed: {**valid, **changed})


@pytest.mark.parametrize(
    ("path", "kind"), [("/v1/chat/completions", ChatRequest), ("/v1/completions", CompletionRequest)]
)
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_body_makes_it_fail(tokenizer, ids, path, kind, data):
    body = json.dumps(data.draw(bodies(kind)))
    app = make_app(FakeBackend(ids("日a")), tokenizer, GatewaySettings("tiny", MAX_LENGTH))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.post(path, content=body)

    response = asyncio.run(ask())
    assert response.status_code in (200, 400, 404), (body, response.text)
    if response.status_code == 200:
        assert "choices" in response.text
    else:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
