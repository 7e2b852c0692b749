"""Serving quantised weights: the embedded engine answers as `transformers` does on the same quantised model."""

from __future__ import annotations

import asyncio

import pytest
from peft import PeftModel

from lmray.engines.base import Request, Sampling
from lmray.engines.native import Native
from lmray.models.load import load_model
from lmray.testing.tiny import tiny_adapter_folder
from tests.unit.engines.conftest import NUM_NEW, STOP, greedy

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which `make test-full` installs")


@pytest.fixture(scope="module")
def adapters(wide_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {name: tiny_adapter_folder(wide_model, root / name, seed=seed) for seed, name in enumerate("ab", 1)}


def quantised(folder, quantization):
    return load_model(folder, "float32", quantization=quantization)


def answers(model, adapters, wanted, *, batch_size: int) -> tuple[list[list[int]], str]:
    """The engine's answers to `(prompt, adapter)` pairs, asked all at once, and what ran the model."""

    async def ask(engine, place, prompt, adapter):
        request = Request(str(place), prompt, Sampling(NUM_NEW), adapter)
        return [event.token_id async for event in engine.submit(request) if event.token_id is not None]

    async def main():
        config = Native(max_batch_size=batch_size, max_length=128, max_adapters=2)
        engine = config.start(model, stop_token_ids=STOP, threads=1)
        try:
            for name, folder in adapters.items():
                await engine.add_adapter(name, folder)
            asked = (ask(engine, place, prompt, adapter) for place, (prompt, adapter) in enumerate(wanted))
            return await asyncio.gather(*asked), engine.stats()["forward"]
        finally:
            await engine.close()

    return asyncio.run(main())


@pytest.fixture(scope="module")
def expected(wide_model, adapters, prompts):
    """What `transformers` answers, by kind and adapter."""
    found = {}
    for quantization in ("nf4", "int8"):
        for name in (None, *adapters):
            model = quantised(wide_model, quantization)
            alone = model if name is None else PeftModel.from_pretrained(model, adapters[name])
            found[quantization, name] = [greedy(alone, prompt) for prompt in prompts]
    plain = load_model(wide_model, "float32")
    assert found["nf4", None] != [greedy(plain, prompt) for prompt in prompts], "weights that are not changed"
    assert len({str(one) for one in found.values()}) == len(found), "adapters that do not show prove nothing"
    return found


def test_four_bit_weights_answer_the_same_in_any_company(wide_model, adapters, prompts, expected):
    wanted = [(prompt, name) for prompt in prompts for name in (None, *adapters)]
    found, forward = answers(quantised(wide_model, "nf4"), adapters, wanted, batch_size=4)
    assert found == [expected["nf4", name][prompts.index(prompt)] for prompt, name in wanted]
    assert forward == "transformers: its linear layers are Linear4bit"


def test_eight_bit_weights_answer_the_same_alone(wide_model, adapters, prompts, expected):
    """Alone: LLM.int8() looks for outliers over all rows of a batch (arXiv 2208.07339, section 3.2)."""
    wanted = [(prompt, name) for prompt in prompts for name in (None, *adapters)]
    found, forward = answers(quantised(wide_model, "int8"), adapters, wanted, batch_size=1)
    assert found == [expected["int8", name][prompts.index(prompt)] for prompt, name in wanted]
    assert forward == "transformers: its linear layers are Linear8bitLt"
