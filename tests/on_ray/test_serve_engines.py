"""A replica with engines of every kind: what it loads for each. It runs here without a cluster."""

from __future__ import annotations

import asyncio

import pytest

from lmray.engines.base import Request, Sampling
from lmray.job import ServeJob
from lmray.models.load import load_model, load_tokenizer, stop_token_ids
from lmray.on_ray.replicas import EngineReplica
from lmray.serve.prepare import prepare
from lmray.testing.listening import listening
from tests.unit.engines.vllm_server import NAME, VllmServer

PROMPT, NUM_NEW = (5, 6, 7, 8, 9), 12


def answer(root, source, engine, **model) -> tuple[list[int], str]:
    """What a replica answers, and what runs its model."""
    fields = {"name": "endpoint", "model": {"source": str(source), "dtype": "float32", **model}}
    job = ServeJob.model_validate({**fields, "engine": engine, "http": {"port": 20219}, "storage": str(root)})

    async def main():
        replica = EngineReplica.__new__(EngineReplica)
        await replica.__init__(prepare(job), job.engine, job.model.dtype, 1, 0)
        try:
            asked = Request("request", PROMPT, Sampling(NUM_NEW))
            events = [event async for several in replica.stream(asked) for event in several]
            ids = [event.token_id for event in events if event.token_id is not None]
            return ids, replica._live.stats()["forward"]
        finally:
            await replica._live.engine.close()

    return asyncio.run(main())


def test_a_server_answers_for_a_replica_without_weights(tiny_model, tmp_path):
    stops = stop_token_ids(load_model(tiny_model, "float32"), load_tokenizer(tiny_model))
    with listening(VllmServer(tiny_model, stops).app()) as url:
        engine = {"name": "openai", "url": url, "model": NAME, "max_length": 128, "max_batch_size": 2}
        found, forward = answer(tmp_path, tiny_model, engine)
    assert forward == f"openai: {NAME} at {url}"
    assert found == answer(tmp_path, tiny_model, {"name": "native", "max_length": 128})[0]


@pytest.mark.parametrize(("quantization", "layer"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_a_replica_loads_quantised_weights(wide_model, tmp_path, quantization, layer):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which `make test-full` installs")
    engine = {"name": "native", "max_length": 128}
    found, forward = answer(tmp_path, wide_model, engine, quantization=quantization)
    assert layer in forward
    assert len(found) > 1
