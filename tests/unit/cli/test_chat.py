"""`lmray chat`, to an endpoint and in this process, from a terminal and in a pipe."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import sys
import threading
from collections.abc import Iterator

import pytest

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store
from lmray.config import dump
from lmray.engines._worker import NativeEngine
from lmray.engines.base import Request
from lmray.errors import CapacityError
from lmray.models import load
from lmray.models.rope import RopeScaling
from lmray.models.source import find_model
from lmray.serve import client
from lmray.serve.client import Said
from lmray.serve.gateway import GatewaySettings, make_app
from lmray.serve.keys import ApiKey
from lmray.testing.listening import listening
from lmray.testing.tiny import tiny_adapter_folder, tiny_tokenizer
from tests.unit.serve.fakes import FakeBackend

KEY = ApiKey(name="mine", sha256=hashlib.sha256(b"secret").hexdigest())


class Backend(FakeBackend):
    """A backend that tells a thread when it was closed."""

    def __init__(self, text: str):
        super().__init__(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"], adapters=("helper", "関数"))
        self.closing = threading.Event()

    async def stream(self, request: Request):
        try:
            async for event in super().stream(request):
                yield event
        finally:
            self.closing.set()

    @property
    def asked(self) -> list[str]:
        """The prompts that came, as text."""
        return [tiny_tokenizer().decode(list(one.prompt_ids)) for one in self.requests]


class Terminal(io.StringIO):
    """What somebody types, or what they see: there Ctrl-C is pressed once `interrupts_at` is shown."""

    interrupts_at = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.interrupts_at and self.interrupts_at in self.getvalue():
            self.interrupts_at = ""
            signal.raise_signal(signal.SIGINT)
        return written


@pytest.fixture
def backend() -> Backend:
    return Backend("はい！")


@pytest.fixture
def url(backend) -> Iterator[str]:
    with listening(make_app(backend, tiny_tokenizer(), GatewaySettings("tiny", 1024)), path="/v1") as url:
        yield url


@pytest.fixture
def locked_url(backend) -> Iterator[str]:
    """An endpoint that asks for a key."""
    with listening(make_app(backend, tiny_tokenizer(), GatewaySettings("tiny", 1024, keys=(KEY,))), path="/v1") as url:
        yield url


@pytest.fixture
def type_in(monkeypatch):
    """Types lines into a terminal, for the next command."""

    def typed(*lines: str) -> None:
        monkeypatch.setattr(sys, "stdin", Terminal("".join(f"{line}\n" for line in lines)))

    return typed


def test_one_question_to_an_endpoint(cli, url, backend):
    said = cli("chat", url, "こんにちは", "--system", "be kind", "--max-tokens", 5)
    assert (said.code, said.out) == (0, "はい！\n")
    [request] = backend.requests
    assert request.adapter is None and request.sampling.max_tokens == 5 and request.sampling.temperature == 0.0
    assert backend.asked[0].startswith("<|im_start|>system\nbe kind<|im_end|>")


def test_what_is_piped_in_is_one_question(cli, url, backend, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("一行目\n\n二行目\n"))
    said = cli("chat", url, "--model", "関数")
    assert (said.code, said.out) == (0, "はい！\n")
    assert "user\n一行目\n\n二行目<|im_end|>" in backend.asked[0]
    assert backend.requests[0].adapter == "関数"


@pytest.mark.parametrize("words", [(" ",), ()])
def test_an_empty_question_is_refused(cli, monkeypatch, words):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    said = cli("chat", "http://127.0.0.1:9", *words)
    assert said.code == 2 and "the message is empty" in said.err


def test_an_answer_as_json(cli, url):
    told = json.loads(cli("chat", url, "hi", "--json", "--max-tokens", 100).out)
    assert told["usage"].pop("prompt_tokens") > 0
    assert told["usage"].pop("total_tokens") > 9
    assert told == {
        "status": "succeeded",
        "model": "tiny",
        "answer": "はい！",
        "finish_reason": "stop",
        "usage": {"completion_tokens": 9},
    }


def test_a_conversation_is_not_one_json_object(cli, url, type_in):
    type_in("hi")
    said = cli("chat", url, "--json")
    assert said.code == 2 and json.loads(said.out)["status"] == "failed" and "is for one question" in said.err


def test_a_conversation_remembers_what_was_said(cli, url, backend, type_in):
    type_in("one", "", "two", "/quit", "three")
    said = cli("chat", url)
    assert (said.code, said.out) == (0, "はい！\nはい！\n")
    assert "one<|im_end|>" in backend.asked[1] and "assistant\nはい！<|im_end|>" in backend.asked[1]
    assert len(backend.requests) == 2


def test_what_can_be_typed_beside_messages(cli, url, backend, type_in):
    type_in("one", "/reset", "/system 親切に", "/model helper", "two", "/system", "//three", "/model", "/help")
    said = cli("chat", url)
    assert said.code == 0
    assert [request.adapter for request in backend.requests] == [None, "helper", "helper"]
    assert "one" not in backend.asked[1] and backend.asked[1].startswith("<|im_start|>system\n親切に<|im_end|>")
    assert "system" not in backend.asked[2] and "two" in backend.asked[2] and "user\n/three<" in backend.asked[2]
    assert "* helper\n" in said.err and "  関数\n" in said.err
    assert all(command in said.err for command in ("/model", "/system", "/reset", "/quit"))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("/modle x", "did you mean `/model`?"),
        ("/1 + 1", "// in front sends"),
        ("/model helpr", "did you mean `helper`?"),
    ],
)
def test_a_mistyped_command_is_told_and_not_sent(cli, url, backend, type_in, line, found):
    type_in(line, "one")
    said = cli("chat", url)
    assert said.code == 0 and found in said.err
    assert len(backend.requests) == 1 and backend.requests[0].adapter is None


def test_a_question_that_fails_is_told_and_not_remembered(cli, url, backend, type_in, monkeypatch):
    failures = [CapacityError("endpoint", "too many requests are waiting"), None]

    async def trouble(place: int) -> None:
        if place == 0 and (failure := failures.pop(0)):
            raise failure

    monkeypatch.setattr(backend, "_trouble", trouble)
    type_in("one", "two")
    said = cli("chat", url)
    assert (said.code, said.out) == (0, "はい！\n")
    assert "too many requests are waiting" in said.err and "one" not in backend.asked[1]


def test_ctrl_c_stops_the_answer_and_not_the_program(cli, url, type_in, monkeypatch, backend):
    backend.hangs_after = 6
    seen = Terminal()
    seen.interrupts_at = "はい"
    monkeypatch.setattr(sys, "stdout", seen)
    type_in("one", "/quit")
    said = cli("chat", url)
    assert said.code == 0 and "(stopped)" in said.err
    assert seen.getvalue() == "> はい\n> "
    assert backend.closing.wait(60)


def test_what_was_said_before_ctrl_c_is_remembered(cli, url, type_in, monkeypatch, backend):
    seen = Terminal()
    seen.interrupts_at = "は"
    monkeypatch.setattr(sys, "stdout", seen)
    type_in("one", "two")
    assert cli("chat", url).code == 0
    assert "assistant\nは<|im_end|>" in backend.asked[1]


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_ends_a_single_question(cli, url, backend, monkeypatch, as_json):
    def answer(*args, **options):
        yield Said("は")
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "chat_events", answer)
    said = cli("chat", url, "one", *(["--json"] if as_json else []))
    assert said.code == 130
    if as_json:
        assert (json.loads(said.out)["status"], json.loads(said.out)["answer"]) == ("stopped", "は")


def test_ctrl_c_at_the_prompt_begins_a_new_line(cli, url, backend, type_in, monkeypatch):
    lines = iter(["one"])

    def typed(prompt: str) -> str:
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    interrupted: list[bool] = []
    type_in()
    monkeypatch.setattr("builtins.input", typed)
    assert cli("chat", url).out == "はい！\n"
    assert interrupted and len(backend.requests) == 1


@pytest.mark.parametrize("place", ["file", "environment", "both"])
def test_a_key_comes_from_a_file_or_the_environment(cli, locked_url, tmp_path, monkeypatch, place):
    path = tmp_path / "key"
    path.write_text("secret\n")
    if place != "file":
        monkeypatch.setenv("LMRAY_API_KEY", "secret" if place == "environment" else "of another endpoint")
    said = cli("chat", locked_url, "hi", *(["--api-key-file", path] if place != "environment" else []))
    assert (said.code, said.out) == (0, "はい！\n")
    assert "secret" not in said.err


@pytest.mark.parametrize("key", [None, "wrong"])
def test_without_the_right_key_the_hint_says_where_to_put_it(cli, locked_url, monkeypatch, key):
    if key:
        monkeypatch.setenv("LMRAY_API_KEY", key)
    said = cli("chat", locked_url, "hi")
    assert said.code == 2 and "HTTP 401" in said.err and "hint: put an API key into LMRAY_API_KEY" in said.err


def test_an_unknown_model_of_an_endpoint(cli, url):
    said = cli("chat", url, "hi", "--model", "helpr")
    assert said.code == 2 and "unknown model `helpr`" in said.err


def test_an_endpoint_without_models(cli, monkeypatch):
    monkeypatch.setattr(client, "list_models", lambda url, api_key=None: [])
    said = cli("chat", "http://here", "hi")
    assert said.code == 1 and "serves no model" in said.err


def test_an_endpoint_that_is_not_there(cli):
    said = cli("chat", "http://127.0.0.1:9", "hello")
    assert said.code == 1 and "does not answer" in said.err


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "cannot be read"),
        (b" \n", "is empty"),
        (b"\xff", "not UTF-8"),
        ("鍵".encode(), "holds no API key"),
    ],
)
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


def test_a_conversation_in_this_process_turns_from_the_adapter_to_the_model(cli, tiny_model, tmp_path, type_in):
    base = find_model(str(tiny_model))
    folder = tiny_adapter_folder(tiny_model, tmp_path / "adapter", seed=3)
    Artifacts(open_store()).keep("関数", folder, base={"source": str(tiny_model), "digest": base.digest})
    alone = [cli("chat", one, "hello", "--max-tokens", 8, "--json").out for one in (f"{tiny_model}:関数", tiny_model)]
    type_in("hello", "/reset", f"/model {tiny_model}", "hello")
    said = cli("chat", f"{tiny_model}:関数", "--max-tokens", 8)
    answers = [json.loads(one)["answer"] for one in alone]
    assert (said.code, said.out) == (0, "".join(f"{answer}\n" for answer in answers))
    assert answers[0] != answers[1]
    assert json.loads(alone[0])["usage"]["completion_tokens"] == 8
    assert json.loads(alone[0])["finish_reason"] == "length"


def test_ctrl_c_while_this_process_makes_an_answer_frees_its_place(cli, tiny_model, type_in, monkeypatch):
    submit, presses = NativeEngine.submit, [True]

    async def interrupted(self, request):
        async for event in submit(self, request):
            yield event
            if presses:
                presses.pop()
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(NativeEngine, "submit", interrupted)
    type_in("hello", "again")
    said = cli("chat", tiny_model, "--max-tokens", 8)
    assert said.code == 0 and said.err.count("(stopped)") == 1
    assert len(said.out) > 2


@pytest.mark.parametrize("options", [("--temperature", 0.00001), ("--system", "x" * 5000)])
def test_what_this_process_cannot_answer_is_wrong_input(cli, tiny_model, options):
    assert cli("chat", tiny_model, "hello", *options).code == 2
