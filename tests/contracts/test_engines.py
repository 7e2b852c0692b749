"""What every engine must do: give `transformers`' greedy tokens, however requests share it."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from lmray.engines.base import EngineConfig, Request, Sampling
from lmray.errors import ArtifactError, ConfigError, DataError
from lmray.models.load import load_empty_model, load_model, load_tokenizer, stop_token_ids
from lmray.registry import ENGINES
from lmray.testing.listening import listening
from lmray.testing.tiny import tiny_adapter_folder, tiny_config, tiny_model_folder
from tests.unit.engines import vllm_command
from tests.unit.engines.vllm_server import NAME, VllmServer

VLLM_COMMAND = Path(vllm_command.__file__)
NUM_NEW = 16
LENGTHS = (7, 1, 33, 12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("engines")
    model = tiny_model_folder(root / "model")
    adapters = {name: tiny_adapter_folder(model, root / name, seed=seed) for seed, name in enumerate("ab", 1)}
    return {None: model, **adapters}


@pytest.fixture(scope="module")
def stops(folders) -> tuple[int, ...]:
    return stop_token_ids(load_model(folders[None], "float32"), load_tokenizer(folders[None]))


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    source = random.Random(4)
    return [tuple(source.randrange(3, 259) for _ in range(length)) for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(folders, prompts, stops) -> dict[str | None, list[list[int]]]:
    def greedy(model, prompt: tuple[int, ...]) -> list[int]:
        ids = torch.tensor([prompt])
        told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NUM_NEW, "do_sample": False}
        answer = model.generate(ids, **told, eos_token_id=list(stops), pad_token_id=0)[0, len(prompt) :].tolist()
        return answer[:-1] if answer[-1] in stops else answer

    answers = {}
    for name, folder in folders.items():
        base = load_model(folders[None], "float32")
        model = base if name is None else PeftModel.from_pretrained(base, folder)
        answers[name] = [greedy(model, prompt) for prompt in prompts]
    assert answers["a"] != answers["b"] != answers[None] != answers["a"], "adapters that do not show prove nothing"
    return answers


@pytest.fixture(scope="module")
def server(folders, stops):
    """Address of a server for engines that ask one, and for a command that would be one."""
    with listening(VllmServer(folders[None], stops, max_length=64).app()) as url:
        yield url


@pytest.fixture
def told(request, tmp_path, monkeypatch) -> dict[str, Callable[[], dict[str, Any]]]:
    """What an engine must be told besides its sizes."""

    def ask_server() -> dict[str, Any]:
        return {"url": request.getfixturevalue("server"), "model": NAME}

    def be_server() -> dict[str, Any]:
        command = tmp_path / "vllm"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{VLLM_COMMAND}" "$@"\n')
        command.chmod(0o755)
        monkeypatch.setenv("FAKE_VLLM_UPSTREAM", request.getfixturevalue("server"))
        monkeypatch.setenv("FAKE_VLLM_NOTES", str(tmp_path / "notes.json"))
        return {"python": str(command)}

    return {"openai": ask_server, "vllm": be_server}


@pytest.fixture(params=ENGINES.names())
def config(request, told) -> EngineConfig:
    own = told[request.param]() if request.param in told else {}
    return ENGINES.load(request.param)(max_batch_size=4, max_adapters=2, max_length=64, **own)


def with_engine(config, folders, stops, ask):
    """Runs `ask(engine)` on a fresh engine that holds both adapters, and gives them back at the end."""

    async def main():
        engine = config.start(load_for(config, folders[None]), stop_token_ids=stops, threads=1)
        try:
            for name in ("a", "b"):
                await engine.add_adapter(name, folders[name])
            answer = await ask(engine)
            for name in ("a", "b"):
                await engine.remove_adapter(name)
            return answer
        finally:
            await engine.close()

    return asyncio.run(main())


def load_for(config, folder):
    return load_model(folder, "float32") if config.needs_weights else load_empty_model(folder, dtype="float32")


async def answer(engine, prompt: tuple[int, ...], adapter: str | None, name: str = "request") -> list[int]:
    request = Request(name, prompt, Sampling(NUM_NEW), adapter)
    return [event.token_id async for event in engine.submit(request) if event.token_id is not None]


def test_alone(config, folders, stops, prompts, expected):
    async def ask(engine):
        return {name: [await answer(engine, prompt, name) for prompt in prompts] for name in folders}

    assert with_engine(config, folders, stops, ask) == expected


@pytest.mark.parametrize("adapter", [None, "a"])
def test_a_ragged_batch_of_one_adapter(config, folders, stops, prompts, expected, adapter):
    async def ask(engine):
        asked = (answer(engine, prompt, adapter, str(place)) for place, prompt in enumerate(prompts))
        return await asyncio.gather(*asked)

    assert with_engine(config, folders, stops, ask) == expected[adapter]


def test_mixed_adapters_in_one_batch_that_is_larger_than_the_rows(config, folders, stops, prompts, expected):
    wanted = [(place, name) for place in range(len(prompts)) for name in folders]

    async def ask(engine):
        asked = (answer(engine, prompts[place], name, f"{place} {name}") for place, name in wanted)
        return await asyncio.gather(*asked)

    answers = with_engine(config, folders, stops, ask)
    assert answers == [expected[name][place] for place, name in wanted]


def test_requests_that_cannot_be_run_are_refused_and_the_engine_goes_on(config, folders, stops, prompts, expected):
    async def ask(engine):
        with pytest.raises(DataError):
            await answer(engine, (5,) * 64, None)
        with pytest.raises(ArtifactError):
            await answer(engine, prompts[0], "c")
        return await answer(engine, prompts[0], "b")

    assert with_engine(config, folders, stops, ask) == expected["b"][0]


def test_a_model_without_weights_is_enough_to_check_a_job(config, folders):
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config())
    config.check(model, {name: folder for name, folder in folders.items() if name is not None})
    with pytest.raises(ArtifactError):
        config.check(model, {"model": folders[None]})
    with pytest.raises(ConfigError):
        config.model_copy(update={"max_length": 10**6}).check(model, {})


def test_the_engine_tells_what_it_can_and_what_it_does(config, folders, stops):
    async def ask(engine):
        return engine.capabilities, engine.stats()

    capabilities, stats = with_engine(config, folders, stops, ask)
    assert (capabilities.max_batch_size, capabilities.max_adapters, capabilities.max_length) == (4, 2, 64)
    assert capabilities.vocab_size == 264
    promised = {"waiting": 0, "running": 0, "adapters": ["a", "b"], "generated_tokens": 0, "failure": None}
    assert promised.items() <= stats.items()
    assert isinstance(stats["forward"], str)
    json.dumps(stats)
