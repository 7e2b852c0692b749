"""What every way to speculate must do: leave greedy text as `transformers` has it, for every adapter, and measure."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from peft import PeftModel

from lmray.engines.base import Request, Sampling
from lmray.engines.native import Native
from lmray.models.load import load_model, load_tokenizer, stop_token_ids
from lmray.registry import SPECULATIONS
from lmray.testing.tiny import tiny_adapter_folder, tiny_model_folder

NUM_NEW = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("speculation") / "model")


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    return tiny_adapter_folder(folder, tmp_path_factory.mktemp("speculation") / "adapter", seed=1)


@pytest.mark.parametrize("name", SPECULATIONS.names())
def test_text_is_what_transformers_says_and_proposals_are_counted(folder, adapter, name):
    cls = SPECULATIONS.load(name)
    config = Native(max_batch_size=4, max_length=128, speculation=cls(model=str(folder)) if name == "draft" else cls())
    model, tokenizer = load_model(folder, "float32"), load_tokenizer(folder)
    stops, source = stop_token_ids(model, tokenizer), random.Random(2)
    once = [tuple(source.randrange(3, 259) for _ in range(length)) for length in (7, 20, 3)]
    prompts = [prompt * 3 for prompt in once]

    async def answer(engine, place: int, handle: str | None) -> list[int]:
        request = Request(f"{place} {handle}", prompts[place], Sampling(NUM_NEW), handle)
        return [event.token_id async for event in engine.submit(request) if event.token_id is not None]

    async def main():
        engine = config.start(model, stop_token_ids=stops, threads=1, tokenizer=tokenizer)
        try:
            await engine.add_adapter("a", adapter)
            asked = [(place, handle) for place in range(3) for handle in (None, "a")]
            return asked, await asyncio.gather(*(answer(engine, *one) for one in asked)), engine.stats()
        finally:
            await engine.close()

    asked, answers, stats = asyncio.run(main())
    base = load_model(folder, "float32")
    models = {None: base, "a": PeftModel.from_pretrained(load_model(folder, "float32"), adapter)}
    for (place, handle), found in zip(asked, answers, strict=True):
        assert found == _greedy(models[handle], prompts[place], stops)
    told = stats["speculation"]
    assert 0 <= told["accepted"] <= told["proposed"]
    assert {"proposed", "accepted", "acceptance", "gain", "active"} == told.keys()


def _greedy(model, prompt: tuple[int, ...], stops: tuple[int, ...]) -> list[int]:
    ids = torch.tensor([prompt])
    told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NUM_NEW, "do_sample": False}
    answer = model.generate(ids, **told, eos_token_id=list(stops), pad_token_id=0)[0, len(prompt) :].tolist()
    return answer[:-1] if answer[-1] in stops else answer
