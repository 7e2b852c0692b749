"""A pruned model in the native engine: the greedy text of plain transformers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lmray.engines.base import Request, Sampling
from lmray.engines.native import Native
from lmray.models.load import load_model
from lmray.pruning.shrink import save_pruned
from lmray.pruning.structure import structure_of
from lmray.testing.tiny import tiny_model_folder, tiny_tokenizer
from tests.unit.engines.conftest import NUM_NEW, STOP, greedy

KEPT = {
    "a llama": {"groups": [[0, 3], [1, 2]], "channels": [[0, 2], [1, 3]]},
    "a llama that became a mistral": {"groups": [[0, 1, 3], [1, 2, 3]], "channels": [[0, 2], [1, 3]]},
}
PROMPTS = [(5, 9, 200, 31), (17,), tuple(range(40, 73))]


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    return tiny_model_folder(folder, hidden_size=64, num_attention_heads=8, num_key_value_heads=4)


@pytest.mark.parametrize("name", KEPT)
def test_greedy_text_is_that_of_transformers(name, parent, tmp_path: Path):
    model = load_model(parent, "float32")
    base = {"source": str(parent), "revision": None, "digest": "d"}
    structure = structure_of(model, block=16)
    save_pruned(model, structure, KEPT[name], tmp_path, shape="uniform", asked=0.7, parent=base)
    tiny_tokenizer().save_pretrained(tmp_path)
    smaller = load_model(tmp_path, "float32")
    assert ("Mistral" in type(smaller).__name__) is ("mistral" in name)

    async def answer() -> list[list[int]]:
        engine = Native(max_batch_size=4, max_length=128).start(smaller, stop_token_ids=STOP, threads=1)
        try:
            asked = (Request(str(place), prompt, Sampling(NUM_NEW)) for place, prompt in enumerate(PROMPTS))
            return await asyncio.gather(*(tokens(engine, one) for one in asked))
        finally:
            await engine.close()

    async def tokens(engine, request) -> list[int]:
        return [event.token_id async for event in engine.submit(request) if event.token_id is not None]

    answers = asyncio.run(answer())
    assert answers == [greedy(load_model(tmp_path, "float32"), prompt) for prompt in PROMPTS]
    assert answers != [greedy(model, prompt) for prompt in PROMPTS], "what was removed must show"
