"""A tiny model with two adapters, and what `transformers` answers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from lmray.engines import native
from lmray.models.load import load_empty_model, load_model
from lmray.testing.listening import listening
from lmray.testing.tiny import tiny_adapter_folder, tiny_model_folder
from tests.unit.engines.vllm_server import VllmServer

STOP = (2,)
NUM_NEW = 24


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def adapter_folders(model_folder, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: tiny_adapter_folder(model_folder, root / name, seed=seed) for seed, name in enumerate("ab", 1)}


@pytest.fixture
def model(model_folder):
    return load_model(model_folder, "float32")


@pytest.fixture
def empty(model_folder):
    """The model without weights."""
    return load_empty_model(model_folder, dtype="float32")


@pytest.fixture(scope="module")
def vllm(model_folder):
    """A server in vLLM's manner, and its address."""
    server = VllmServer(model_folder, STOP)
    with listening(server.app()) as url:
        yield server, url


@pytest.fixture(params=["paged", "transformers"])
def way(request, monkeypatch) -> str:
    """Which forward runs the model: its own is taken where the other cannot be."""
    if request.param == "transformers":
        monkeypatch.setattr(native, "unfit", lambda model: "the test asks for it")
    return request.param


@pytest.fixture(scope="session")
def prompts() -> list[tuple[int, ...]]:
    source = random.Random(0)
    return [tuple(source.randrange(3, 259) for _ in range(length)) for length in (5, 17, 1, 40, 9, 3)]


@pytest.fixture(scope="session")
def expected(model_folder, adapter_folders, prompts) -> dict[str | None, list[list[int]]]:
    """Greedy answers of `transformers` to `prompts`, by adapter; None is the base model."""
    answers = {None: [greedy(load_model(model_folder, "float32"), prompt) for prompt in prompts]}
    for name, folder in adapter_folders.items():
        adapted = PeftModel.from_pretrained(load_model(model_folder, "float32"), folder)
        answers[name] = [greedy(adapted, prompt) for prompt in prompts]
    assert answers[None] != answers["a"] != answers["b"] != answers[None], "adapters that do not show prove nothing"
    return answers


def greedy(model, prompt: tuple[int, ...], num_new: int = NUM_NEW) -> list[int]:
    """What `transformers` generates alone, without the stop token."""
    ids = torch.tensor([prompt])
    told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": num_new, "do_sample": False}
    answer = model.generate(ids, **told, eos_token_id=list(STOP), pad_token_id=0)[0, len(prompt) :].tolist()
    return answer[:-1] if answer[-1] in STOP else answer
