"""A real endpoint on Ray Serve, asked with OpenAI's own client: what Ray adds to the gateway and the engine."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest
import torch
from peft import PeftModel
from ray import serve as ray_serve
from ray.serve._private.logging_utils import get_serve_logs_dir

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.evaluations import Evaluations
from lmray.artifacts.store import open_store
from lmray.data.tokenise import prompt_ids
from lmray.errors import CapacityError
from lmray.job import ServeJob
from lmray.models.load import load_model, load_tokenizer
from lmray.models.source import find_model
from lmray.on_ray.serve import serve
from lmray.serve.client import chat_stream, list_models
from lmray.testing.jobs import tiny_rows, write_jsonl
from lmray.testing.listening import free_port, is_cut
from lmray.testing.tiny import tiny_adapter_folder, tiny_model_folder
from lmray.testing.waiting import wait_until

MESSAGES = [{"role": "user", "content": "日本語で答えてください 🙂"}]
MAX_TOKENS, MAX_LENGTH = 24, 8192
STOP = "2"
"""The tiny tokenizer's end of an answer; without it, one goes on to MAX_LENGTH."""
KEY = "a key"


@pytest.fixture(scope="module")
def job(ray_cluster, tmp_path_factory) -> ServeJob:
    """An endpoint over the tiny model, with a key and one adapter in production, which it evaluates again and again."""
    root = tmp_path_factory.mktemp("serve")
    model = tiny_model_folder(root / "tiny", max_position_embeddings=MAX_LENGTH)
    artifacts = Artifacts(open_store(str(root / "store")))
    base = {"source": str(model), "revision": None, "digest": find_model(str(model)).digest}
    artifacts.keep("helper", tiny_adapter_folder(model, root / "adapter", seed=1), base=base)
    artifacts.promote("helper", "production")
    (root / "keys").write_text(f"# the test's\n{KEY}\n")
    rows = write_jsonl(root / "rows.jsonl", tiny_rows())
    daily = {
        "name": "daily",
        "model": {"source": str(model), "dtype": "float32"},
        "data": {"train": [{"source": str(rows)}], "eval": {"split": 0.25}, "max_length": 256},
        "targets": [{"label": "production", "adapter": "helper@production"}],
        "evaluate": {"tasks": ["loss"], "base": False},
        "tolerances": {"eval.loss": 0.1},
    }
    return ServeJob.model_validate(
        {
            "name": "endpoint",
            "model": {"source": str(model), "dtype": "float32"},
            "adapters": [
                {"artifact": "helper", "stage": "production"},
                {"artifact": "late*", "stage": "production"},
            ],
            "engine": {"name": "native", "max_batch_size": 4, "max_length": MAX_LENGTH, "max_adapters": 2},
            "filters": [{"name": "regex", "label": "code-word", "pattern": "open sesame"}],
            "http": {"port": free_port(), "api_keys_file": str(root / "keys"), "limits": {"send_timeout_s": 3.0}},
            "monitor": {"evaluations": [{"job": daily}]},
            "resources": {"cpus_per_worker": 1},
            "storage": str(root / "store"),
        }
    )


@pytest.fixture(scope="module")
def service(job):
    with serve(job) as running:
        yield running


@pytest.fixture(scope="module")
def client(service):
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def texts(job) -> dict[str, str]:
    """What `transformers` answers, by model name."""
    folder = find_model(job.model.source).folder
    model, tokenizer = load_model(folder, "float32"), load_tokenizer(folder)
    artifacts = Artifacts(open_store(job.storage))
    adapted = PeftModel.from_pretrained(load_model(folder, "float32"), artifacts.checkout(artifacts.find("helper")))
    ids = torch.tensor([prompt_ids(tokenizer, MESSAGES)])

    def answer(model) -> str:
        told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": MAX_TOKENS, "do_sample": False}
        return tokenizer.decode(model.generate(ids, **told)[0, ids.shape[1] :], skip_special_tokens=True)

    found = {"tiny": answer(model), "helper": answer(adapted)}
    assert found["tiny"] != found["helper"], "the adapter does not show, so nothing below would tell them apart"
    return {**found, "tiny:helper": found["helper"]}


@pytest.mark.parametrize("name", ["tiny", "helper", "tiny:helper"])
def test_whole_and_streamed_answers_are_those_of_transformers(client, texts, name):
    told = {"model": name, "messages": MESSAGES, "temperature": 0, "max_tokens": MAX_TOKENS}
    whole = client.chat.completions.create(**told)
    assert whole.choices[0].message.content == texts[name]
    pieces = list(client.chat.completions.create(**told, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == texts[name]
    assert pieces[-1].usage == whole.usage


def test_the_clients_of_lmray_and_openai_see_the_same_models(service, client):
    assert list_models(service.url, api_key=KEY) == [model.id for model in client.models.list()]


def test_lmrays_own_client_streams_the_same_text(service, texts):
    pieces = chat_stream(service.url, "helper", MESSAGES, api_key=KEY, max_tokens=MAX_TOKENS)
    assert "".join(pieces) == texts["helper"]


def test_what_filters_and_requests_came_to_is_in_serves_logs(client):
    with pytest.raises(openai.BadRequestError, match="filter `code-word` lets no such text through") as refused:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "open sesame!"}])

    def lines() -> list[str]:
        paths = Path(get_serve_logs_dir()).glob("replica_*.log")
        return [line for path in paths for line in path.read_text().splitlines()]

    found = "filter=code-word on=prompts action=refuse code-word=1"
    told = f"request={refused.value.request_id} path=/v1/chat/completions model=tiny"
    wait_until(lambda: any(told in one for one in lines()), "the request's line, written once it is answered")
    assert [one for one in lines() if one.endswith(f"request={refused.value.request_id} {found}")]
    assert not [one for one in lines() if "sesame" in one]


def test_errors_come_back_through_serve_in_openais_shape(service, client):
    with pytest.raises(openai.NotFoundError, match="there are: tiny, helper, tiny:helper"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with (
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError, match="wrong API key"),
    ):
        stranger.models.list()


def test_a_full_batch_keeps_no_look_waiting_and_a_client_that_leaves_ends_its_request(service, client, job):
    told = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "logit_bias": {STOP: -100}}
    engine = ray_serve.get_deployment_handle("engine", job.name)
    before = engine.stats.remote().result()["generated_tokens"]
    rows = job.engine.max_batch_size
    streams = [client.chat.completions.create(**told, stream=True) for _ in range(rows)]
    for stream in streams:
        next(iter(stream))
    assert httpx.get(f"{service.url}/ready", timeout=60).status_code == 200
    [told_meanwhile] = engine.broadcast("stats").results(timeout_s=60)
    assert told_meanwhile["running"] == rows, "it waited for the end of an answer"
    for stream in streams:
        stream.close()
    wait_until(lambda: not engine.stats.remote().result()["running"], "the end of all")
    stats = engine.stats.remote().result()
    assert stats["generated_tokens"] - before < rows * MAX_LENGTH / 2, "they were generated to their end"


def test_requests_that_wait_for_their_adapter_keep_nobody_from_the_batch(service, client, job, tmp_path):
    artifacts, base = Artifacts(open_store(job.storage)), find_model(job.model.source)
    about = {"source": job.model.source, "revision": None, "digest": base.digest}
    for name, seed in (("late-runs", 5), ("late-waits", 6)):
        artifacts.keep(name, tiny_adapter_folder(base.folder, tmp_path / name, seed=seed), base=about)
        artifacts.promote(name, "production")
    wait_until(lambda: {one.id for one in client.models.list()} >= {"late-runs", "late-waits"}, "both names")
    told = {"messages": MESSAGES, "temperature": 0, "max_tokens": 4}
    endless = {**told, "max_tokens": MAX_LENGTH - 500, "logit_bias": {STOP: -100}}
    running = client.chat.completions.create(model="late-runs", **endless, stream=True)
    next(iter(running))  # it holds the room that `helper` leaves
    ends = threading.Event()

    def read() -> None:
        with running:
            for _ in running:
                if ends.is_set():
                    return

    waits = partial(client.chat.completions.create, model="late-waits", **told)
    with ThreadPoolExecutor(job.engine.max_batch_size + 1) as pool:
        pool.submit(read)
        waiting = [pool.submit(waits) for _ in range(job.engine.max_batch_size)]
        wait_until(lambda: leases(job).get("late-waits") == len(waiting), "all of them at the replica")
        assert client.chat.completions.create(model="tiny", **told).choices[0].message.content
        assert client.chat.completions.create(model="helper", **told).choices[0].message.content
        assert not any(one.done() for one in waiting) and leases(job)["late-runs"] == 1
        ends.set()
        assert len({one.result().choices[0].message.content for one in waiting}) == 1


def leases(job: ServeJob) -> dict[str, int]:
    """Adapters that the replica holds or is to load, with how many requests each has."""
    [told] = ray_serve.get_deployment_handle("engine", job.name).broadcast("stats").results(timeout_s=60)
    return {one["handle"].partition("@")[0]: one["leases"] for one in told["cache"]["held"]}


def test_a_client_that_does_not_read_is_cut_off_and_its_request_ends(service, job):
    engine = ray_serve.get_deployment_handle("engine", job.name)
    before = engine.stats.remote().result()["generated_tokens"]
    told = {"model": "tiny", "messages": MESSAGES, "logit_bias": {STOP: -100}, "stream": True}
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)  # little is held by the system on its way
        reader.connect(("127.0.0.1", job.http.port))
        body = json.dumps(told).encode()
        fields = ("Host: x", f"Authorization: Bearer {KEY}", "Content-Type: application/json")
        lines = ("POST /v1/chat/completions HTTP/1.1", *fields, f"Content-Length: {len(body)}", "", "")
        reader.sendall("\r\n".join(lines).encode() + body)
        assert reader.recv(100).startswith(b"HTTP/1.1 200")
        assert is_cut(reader, timeout_s=120)
    wait_until(lambda: not engine.stats.remote().result()["running"], "the end of the request")
    generated = engine.stats.remote().result()["generated_tokens"] - before
    assert generated < 0.9 * MAX_LENGTH, "it was answered to its end"


def test_an_adapter_promoted_while_the_endpoint_runs_is_served_and_rolled_back(client, job, texts, tmp_path):
    artifacts = Artifacts(open_store(job.storage))
    told = {"messages": MESSAGES, "temperature": 0, "max_tokens": MAX_TOKENS}

    def answer(model: str) -> str | None:
        return client.chat.completions.create(model=model, **told).choices[0].message.content

    folder = tiny_adapter_folder(find_model(job.model.source).folder, tmp_path / "late", seed=2)
    base = artifacts.find("helper").base
    artifacts.promote(artifacts.keep("late", folder, base=base).ref, "production")
    wait_until(lambda: "late" in [model.id for model in client.models.list()], "a new name")
    assert answer("late") not in texts.values()
    artifacts.promote(artifacts.keep("helper", folder, base=base).ref, "production")
    wait_until(lambda: answer("helper") != texts["helper"], "the new version")
    assert answer("helper") == answer("late")
    artifacts.rollback("helper", "production")
    wait_until(lambda: answer("helper") == texts["helper"], "the old version")


def test_what_is_in_production_is_evaluated_beside_it_and_the_page_tells_the_result(service, job):
    evaluations = Evaluations(open_store(job.storage))
    wait_until(lambda: evaluations.of("helper"), "an evaluation")
    first = evaluations.of("helper")[0]
    assert first.version.startswith("helper@") and first.run.endswith("runs/daily") and not first.worse

    def page() -> str:
        return httpx.get(f"{service.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text

    now = Artifacts(open_store(job.storage)).find("helper@production").ref.partition("@")[2]
    told = f'{{evaluation="daily",model="helper",target="production",version="{now}"}} 0.0'
    wait_until(lambda: f"lmray_serve_evaluation_worse{told}" in page(), "what is in production on the page")


def test_a_second_endpoint_is_refused_while_one_runs(service, job):
    with pytest.raises(CapacityError, match="cannot listen there"):
        serve(job)
    with pytest.raises(CapacityError, match="Ray Serve already runs `endpoint`"):
        serve(job.changed({"http.port": free_port()}))
