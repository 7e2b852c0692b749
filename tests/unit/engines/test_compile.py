"""A compiled forward says what the plain one does."""

from __future__ import annotations

import shutil

import pytest
from torch._dynamo.utils import counters

from lmray.engines import native
from lmray.engines._adapter_folder import read_adapter_folder
from lmray.engines._paged import PagedStepper
from lmray.engines.base import Request, Sampling, TokenEvent
from lmray.engines.native import Native
from lmray.errors import ConfigError
from tests.unit.engines.conftest import NUM_NEW, STOP

COMPILED = Native(max_batch_size=4, max_length=80, max_prefill_tokens=16, torch_compile=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_compiled_greedy_text_is_that_of_transformers(model, adapter_folders, prompts, expected):
    counters.clear()
    stepper = COMPILED.make_stepper(model, stop_token_ids=STOP)
    assert isinstance(stepper, PagedStepper)
    asked: dict[str, tuple[str | None, int]] = {}
    for name, folder in adapter_folders.items():
        stepper.adapters.add(name, read_adapter_folder(folder, stepper.adapters.base))
    for place, prompt in enumerate(prompts):
        adapter = (None, "a", "b")[place % 3]
        asked[str(place)] = adapter, place
        stepper.add(Request(str(place), prompt, Sampling(NUM_NEW), adapter))
    answers: dict[str, list[int]] = {name: [] for name in asked}
    while stepper.busy:
        for name, outcome in stepper.step():
            assert isinstance(outcome, TokenEvent)
            answers[name] += [] if outcome.token_id is None else [outcome.token_id]
    assert answers == {name: expected[adapter][place] for name, (adapter, place) in asked.items()}
    assert counters["stats"]["unique_graphs"] >= 4, "something was compiled"
    assert not counters["graph_break"], "and none of it in pieces"


def test_without_a_compiler_it_is_refused(model, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="there is no `no-such-compiler` to compile with") as caught:
        COMPILED.make_stepper(model, stop_token_ids=STOP)
    assert "engine.torch_compile" in str(caught.value)
    with pytest.raises(ConfigError, match="no-such-compiler"):
        COMPILED.check(model, {})
    monkeypatch.setattr(native, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="there is no `triton` to compile with"):
        COMPILED._check_compiler("cuda")


def test_a_model_that_runs_through_its_own_forward_is_not_compiled(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="`native` cannot compile this model: LlamaMLP has hooks") as caught:
        COMPILED.make_stepper(model, stop_token_ids=STOP)
    assert "engine.torch_compile" in str(caught.value)
