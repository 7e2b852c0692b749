"""A pruned model in the native engine: the greedy text of plain transformers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lmray.engines._decoder import unfit
from lmray.engines.base import Request, Sampling
from lmray.engines.native import Native
from lmray.models.load import load_model
from lmray.pruning.masks import Shape
from lmray.pruning.record import Kept
from lmray.pruning.structure import structure_of
from lmray.testing.tiny import tiny_model_folder, tiny_tokenizer
from tests.unit.engines.conftest import NUM_NEW, STOP, greedy
from tests.unit.pruning.models import save

CUTS: dict[str, tuple[Shape, str, Kept]] = {
    "a llama": ("uniform", "Llama", {"groups": [[0, 3], [1, 2]], "channels": [[0, 2], [1, 3]]}),
    "a llama that became a mistral": (
        "uniform",
        "Mistral",
        {"groups": [[0, 1, 3], [1, 2, 3]], "channels": [[0, 2], [1, 3]]},
    ),
    "layers of different widths": ("hetero", "DeciLM", {"groups": [[0, 1, 3], [1]], "channels": [[0], [1, 2, 3]]}),
}
PROMPTS = [(5, 9, 200, 31), (17,), tuple(range(40, 73))]


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    return tiny_model_folder(folder, hidden_size=64, num_attention_heads=8, num_key_value_heads=4)


@pytest.mark.parametrize("name", CUTS)
def test_greedy_text_is_that_of_transformers(name, parent, tmp_path: Path):
    shape, family, kept = CUTS[name]
    model = load_model(parent, "float32")
    structure = structure_of(model, block=16)
    save(model, structure, kept, tmp_path, shape=shape)
    tiny_tokenizer().save_pretrained(tmp_path)
    smaller = load_model(tmp_path, "float32")
    assert type(smaller).__name__ == f"{family}ForCausalLM"

    async def answer() -> list[list[int]]:
        assert unfit(smaller) is None, "not through transformers' own forward"
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
