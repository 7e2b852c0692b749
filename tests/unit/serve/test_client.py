"""The client against a gateway in this process, and against servers that are something else."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from lmray.errors import RemoteError
from lmray.serve.client import Said, chat_events, chat_stream, list_models

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def server():
    """A server on loopback that answers every request with what `says` holds: status and body."""
    says: dict = {}
    heard: list[tuple[str, str | None, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers.get("content-length") or 0)
            heard.append((self.path, self.headers.get("authorization"), self.rfile.read(length)))
            self.send_response(says["status"])
            self.end_headers()
            self.wfile.write(says["body"].encode())

        do_GET = do_POST

        def log_message(self, *args):
            pass

    running = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", says, heard
    running.shutdown()
    thread.join()
    running.server_close()


def stream(text: str) -> str:
    pieces = "".join(f'data: {{"choices": [{{"delta": {{"content": "{letter}"}}}}]}}\n\n' for letter in text)
    return pieces + 'data: {"choices": []}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_a_turn_is_streamed_piece_by_piece(server, suffix):
    url, says, heard = server
    says |= {"status": 200, "body": stream("日本")}
    assert list(chat_stream(url + suffix, "tiny", MESSAGES, api_key="k", max_tokens=5)) == ["日", "本", ""]
    path, key, body = heard[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer k")
    assert b'"max_tokens":5' in body


def test_models_are_listed(server):
    url, says, _ = server
    says |= {"status": 200, "body": '{"data": [{"id": "a"}, {"id": "b"}]}'}
    assert list_models(url) == ["a", "b"]


@pytest.mark.parametrize(
    ("status", "body", "found"),
    [
        (404, '{"error": {"message": "unknown model; there are: a"}}', "HTTP 404: unknown model; there are: a"),
        (
            401,
            '{"error": {"message": "wrong API key"}}',
            "HTTP 401: wrong API key\n  hint: put an API key into LMRAY_API_KEY",
        ),
        (429, '{"error": {"message": "come back"}}', "HTTP 429: come back"),
        (502, "<html>bad gateway</html>", "HTTP 502: <html>bad gateway</html>"),
        (500, "", "HTTP 500: nothing"),
        (200, 'data: {"error": {"message": "broke"}}\n\n', "the answer broke off: broke"),
        (200, "data: <html>\n\n", "answers something else than OpenAI's protocol"),
    ],
)
def test_what_the_server_said_is_the_error(server, status, body, found):
    url, says, _ = server
    says |= {"status": status, "body": body}
    with pytest.raises(RemoteError) as caught:
        list(chat_stream(url, "tiny", MESSAGES))
    assert found in str(caught.value)
    assert caught.value.exit_code == (2 if status in (401, 404) else 1)


def test_the_end_of_an_answer_tells_its_reason_and_usage(server):
    url, says, heard = server
    pieces = (
        'data:{"choices": [{"delta": {"content": null}}]}',
        'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}',
        ": a comment",
        'data: {"choices": [], "usage": {"completion_tokens": 3}}',
        "data: [DONE]",
    )
    says |= {"status": 200, "body": "\n\n".join(pieces) + "\n\n"}
    said = list(chat_events(url, "tiny", MESSAGES))
    assert said == [Said(), Said(finish_reason="length"), Said(usage={"completion_tokens": 3})]
    assert json.loads(heard[0][2])["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://"])
def test_a_server_that_is_not_there_is_named(url):
    for ask in (lambda: list(chat_stream(url, "tiny", MESSAGES)), lambda: list_models(url)):
        with pytest.raises(RemoteError, match="does not answer"):
            ask()
