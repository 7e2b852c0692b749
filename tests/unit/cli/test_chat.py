"""`lmray chat`, to an endpoint and in this process."""

from __future__ import annotations

import io
import sys

import pytest

import lmray.serve.client
from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store
from lmray.config import dump
from lmray.models import load
from lmray.models.rope import RopeScaling
from lmray.models.source import find_model
from lmray.testing.tiny import tiny_adapter_folder


@pytest.fixture
def endpoint(monkeypatch):
    """Stands for an endpoint that repeats the last message; gives what it was asked."""
    asked = []

    def chat_stream(url, model, messages, **options):
        asked.append({"url": url, "model": model, "messages": [dict(one) for one in messages], **options})
        yield from (messages[-1]["content"], "！")

    monkeypatch.setattr(lmray.serve.client, "chat_stream", chat_stream)
    monkeypatch.setattr(lmray.serve.client, "list_models", lambda url, api_key=None: ["first", "second"])
    return asked


def test_one_question_to_an_endpoint(cli, endpoint, tmp_path):
    key = tmp_path / "key"
    key.write_text("secret\n")
    said = cli("chat", "http://here", "こんにちは", "--api-key-file", key, "--system", "be kind", "--max-tokens", 5)
    assert (said.code, said.out) == (0, "こんにちは！\n")
    assert "secret" not in said.err
    (asked,) = endpoint
    assert asked["model"] == "first" and asked["api_key"] == "secret" and asked["max_tokens"] == 5
    assert asked["messages"][0] == {"role": "system", "content": "be kind"}


def test_a_conversation_remembers_what_was_said(cli, endpoint, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    said = cli("chat", "http://here", "--model", "second")
    assert said.out == "one！\ntwo！\n"
    assert [one["content"] for one in endpoint[1]["messages"]] == ["one", "one！", "two"]
    assert endpoint[1]["model"] == "second"


def test_an_endpoint_that_is_not_there(cli):
    said = cli("chat", "http://127.0.0.1:9", "hello")
    assert said.code == 1 and "does not answer" in said.err


@pytest.mark.parametrize(("content", "found"), [(None, "cannot be read"), (b" \n", "is empty"), (b"\xff", "not UTF-8")])
def test_a_key_file_that_holds_no_key(cli, tmp_path, content, found):
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    said = cli("chat", "http://here", "hello", "--api-key-file", path)
    assert said.code == 2 and found in said.err


def test_a_model_in_this_process(cli, tiny_model):
    said = cli("chat", tiny_model, "hello", "--max-tokens", "4")
    assert said.code == 0 and said.out != "\n"
    assert cli("chat", tiny_model, "hello", "--max-tokens", "4").out == said.out


def test_a_model_with_an_adapter_answers_differently(cli, tiny_model, tmp_path):
    base = find_model(str(tiny_model))
    folder = tiny_adapter_folder(tiny_model, tmp_path / "adapter", seed=3)
    Artifacts(open_store()).keep("関数", folder, base={"source": str(tiny_model), "digest": base.digest})
    plain = cli("chat", tiny_model, "hello", "--max-tokens", "8")
    adapted = cli("chat", f"{tiny_model}:関数", "hello", "--max-tokens", "8")
    assert adapted.code == 0 and adapted.out != plain.out


def test_a_kept_model_with_and_without_an_adapter(cli, tiny_model, tmp_path):
    kept, found = Artifacts(open_store()), find_model(str(tiny_model))
    base = {"source": str(tiny_model), "digest": found.digest}
    kept.keep("whole", tiny_model, base=base, kind="model")
    kept.keep("関数", tiny_adapter_folder(tiny_model, tmp_path / "adapter", seed=3), base=base)
    for kept_model, folder in (("artifact:whole", tiny_model), ("artifact:whole:関数", f"{tiny_model}:関数")):
        expected = cli("chat", folder, "hello", "--max-tokens", "6")
        said = cli("chat", kept_model, "hello", "--max-tokens", "6")
        assert said.code == 0 and said.out == expected.out
    said = cli("chat", f"{tiny_model}:whole", "hello")
    assert said.code == 2 and "hint: lmray chat artifact:whole" in said.err


def test_an_adapter_that_was_trained_on_scaled_positions_answers_on_them(cli, tiny_model, tmp_path, monkeypatch):
    folder, base = tiny_adapter_folder(tiny_model, tmp_path / "adapter", seed=3), find_model(str(tiny_model))
    scaling = RopeScaling(rope_type="yarn", factor=2.0)
    entry = {"source": str(tiny_model), "digest": base.digest, "rope_scaling": dump(scaling)}
    Artifacts(open_store()).keep("long", folder, base=entry)
    asked, load_model = [], load.load_model
    monkeypatch.setattr(load, "load_model", lambda *args, **more: asked.append(more) or load_model(*args, **more))
    assert cli("chat", f"{tiny_model}:long", "hello", "--max-tokens", "8").code == 0
    assert cli("chat", tiny_model, "hello", "--max-tokens", "8").code == 0
    assert [one["rope_scaling"] for one in asked] == [scaling, None]


def test_an_adapter_of_another_model_is_refused(cli, tiny_model, tmp_path):
    folder = tiny_adapter_folder(tiny_model, tmp_path / "adapter", seed=3)
    Artifacts(open_store()).keep("other", folder, base={"source": "smollm2-135m", "digest": "d"})
    said = cli("chat", f"{tiny_model}:other", "hello")
    assert said.code == 2 and "was trained on `smollm2-135m`" in said.err


def test_options_for_endpoints_need_a_url(cli, tiny_model):
    said = cli("chat", tiny_model, "hello", "--model", "x")
    assert said.code == 2 and "give a URL" in said.err
