"""The paged forward against `transformers`: chunks, shared beginnings, blocks that run out, neighbours that leave."""

from __future__ import annotations

import random

import pytest
import torch
from peft import PeftModel
from torch import nn

from lmray.engines._adapter_folder import read_adapter_folder
from lmray.engines._decoder import unfit
from lmray.engines._paged import PagedStepper
from lmray.engines.base import Request, Sampling, TokenEvent
from lmray.engines.native import Native
from lmray.errors import LmrayError
from lmray.models.load import load_model
from lmray.models.rope import RopeScaling
from lmray.ops.frozen_linear import FrozenLinear, can_pack
from tests.unit.engines.conftest import NUM_NEW, STOP, greedy
from tests.unit.engines.paged import in_company, make, run

BFLOAT16 = FrozenLinear(torch.zeros(2, 3, dtype=torch.bfloat16), None)
DYNAMIC = RopeScaling(rope_type="dynamic", factor=2.0)


@pytest.fixture
def prompts(prompts) -> list[tuple[int, ...]]:
    """The usual ones, and some that begin like the longest."""
    longest = prompts[3]
    return [*prompts, longest, longest[:32], (*longest[:20], 7, 8, 9)]


@pytest.fixture(scope="module")
def known(model_folder, adapter_folders):
    """Greedy answers of `transformers`, asked once for each prompt and adapter."""
    models = {None: load_model(model_folder, "float32")}
    for name, folder in adapter_folders.items():
        models[name] = PeftModel.from_pretrained(load_model(model_folder, "float32"), folder)
    answers: dict[tuple, list[int]] = {}

    def answer(adapter: str | None, prompt: tuple[int, ...]) -> list[int]:
        if (adapter, prompt) not in answers:
            answers[adapter, prompt] = greedy(models[adapter], prompt)
        return answers[adapter, prompt]

    return answer


@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize(
    ("rows", "prefill", "cache"), [(8, 512, None), (8, 7, 240), (3, 16, 80), (1, 5, None), (8, 33, 128)]
)
def test_greedy_text_is_the_same_in_every_company(model, adapter_folders, prompts, known, rows, prefill, cache, seed):
    """Batch sizes, chunk sizes, block sizes, caches that are too small, adapters, neighbours that are cancelled."""
    source = random.Random(f"{seed} {rows} {prefill}")
    stepper = make(model, adapter_folders, max_batch_size=rows, max_prefill_tokens=prefill, cache_tokens=cache)
    found = in_company(stepper, prompts, source, max_steps=6)
    assert found == [(key, known(*key)) for key, _ in found]
    assert stepper.stats()["free_blocks"] == stepper.stats()["num_blocks"]


def test_a_small_cache_makes_requests_give_way_and_a_common_beginning_is_read_once(model, prompts, known):
    stepper = make(model, cache_tokens=112, max_batch_size=8)
    for place in (3, 6, 8, 1):
        stepper.add(Request(str(place), prompts[place], Sampling(NUM_NEW)))
    answers = run(stepper)
    assert answers == {str(place): known(None, prompts[place]) for place in (3, 6, 8, 1)}
    assert stepper.stats()["preemptions"] > 0
    assert stepper.stats()["prefix_hit_tokens"] > 0


def test_neither_another_adapter_nor_another_salt_nor_a_reload_finds_a_beginning(
    model, adapter_folders, prompts, known
):
    stepper = make(model, adapter_folders)
    prompt = prompts[3]

    def ask(name: str, adapter: str | None, salt: str = "") -> int:
        """How many tokens it did not have to read."""
        before = stepper.stats()["prefix_hit_tokens"]
        stepper.add(Request(name, prompt, Sampling(NUM_NEW), adapter, cache_salt=salt))
        assert run(stepper)[name] == known(adapter, prompt)
        return stepper.stats()["prefix_hit_tokens"] - before

    assert [ask("1", None), ask("2", "a"), ask("3", "b"), ask("4", None, "tenant")] == [0, 0, 0, 0]
    assert [ask("5", None), ask("6", "a"), ask("7", None, "tenant")] == [32, 32, 32]
    stepper.adapters.remove("a")
    stepper.adapters.add("a", read_adapter_folder(adapter_folders["a"], stepper.adapters.base))
    assert ask("8", "a") == 0
    stepper.adapters.remove("a")
    stepper.adapters.add("a", read_adapter_folder(adapter_folders["b"], stepper.adapters.base))
    stepper.add(Request("9", prompt, Sampling(NUM_NEW), "a"))
    assert run(stepper)["9"] == known("b", prompt), "other weights under the same handle"


def test_a_prompt_whose_logprobs_are_told_is_read_whole_even_where_it_gave_way(model, prompts):
    """Beside one that grows until the other gives its blocks back, and again with blocks that hold its beginning."""

    def told(stepper: PagedStepper, *requests: Request) -> tuple:
        for request in requests:
            stepper.add(request)
        found, preemptions = None, 0
        while stepper.busy:
            for request_id, outcome in stepper.step():
                if isinstance(outcome, LmrayError):
                    raise outcome
                if request_id == "asks" and found is None:
                    found, preemptions = outcome.prompt_logprobs, stepper.stats()["preemptions"]
        assert found is not None
        return tuple(one and one.token_id for one in found), [one.logprob for one in found if one], preemptions

    asks = Request("asks", prompts[3], Sampling(30, prompt_logprobs=0))
    ids, alone, _ = told(make(model), asks)
    assert ids == (None, *prompts[3][1:])
    small = make(model, cache_tokens=112, max_prefill_tokens=1)
    grows = Request("grows", prompts[3][8:], Sampling(48, logit_bias=((STOP[0], -1e9),)))
    ids, crowded, preemptions = told(small, grows, asks)
    assert preemptions > 0
    assert ids == (None, *prompts[3][1:])
    assert crowded == pytest.approx(alone, abs=1e-4)
    before = small.stats()["prefix_hit_tokens"]
    ids, again, _ = told(small, asks)
    assert small.stats()["prefix_hit_tokens"] == before
    assert again == pytest.approx(alone, abs=1e-4)


def test_a_prompt_is_read_beside_tokens_that_are_generated(model, prompts):
    stepper = make(model, max_prefill_tokens=10)
    stepper.add(Request("short", prompts[5], Sampling(NUM_NEW)))
    stepper.add(Request("long", prompts[3], Sampling(NUM_NEW)))
    told = [[request_id for request_id, _ in stepper.step()] for _ in range(6)]
    assert told == [["short"]] * 4 + [["short", "long"]] * 2


def test_layers_of_different_widths_run_as_they_are(prompts, model_folder, adapter_folders):
    """As a pruned model has them: heads and inner widths cut from one layer."""
    model = load_model(model_folder, "float32")
    layer, width = model.model.layers[0], 8
    for name, heads in (("q_proj", 2), ("k_proj", 1), ("v_proj", 1)):
        _cut(layer.self_attn, name, rows=heads * width)
    _cut(layer.self_attn, "o_proj", columns=2 * width)
    for name in ("gate_proj", "up_proj"):
        _cut(layer.mlp, name, rows=24)
    _cut(layer.mlp, "down_proj", columns=24)
    expected = [greedy(model, prompt) for prompt in prompts]
    stepper = make(model, max_batch_size=4)
    for place, prompt in enumerate(prompts):
        stepper.add(Request(str(place), prompt, Sampling(NUM_NEW)))
    assert run(stepper) == {str(place): answer for place, answer in enumerate(expected) if answer}


def _cut(parent: nn.Module, name: str, rows: int | None = None, columns: int | None = None) -> None:
    weight = getattr(parent, name).weight.detach()[:rows, :columns].clone()
    cut = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    cut.weight = nn.Parameter(weight)
    setattr(parent, name, cut)


def test_frozen_weights_are_held_once_and_trained_ones_stay_where_they_are(model):
    attention = model.model.layers[0].self_attn
    before = attention.k_proj.weight.data_ptr()
    make(model)
    assert attention.k_proj.weight.data_ptr() == before
    model.requires_grad_(False)
    make(model)
    assert attention.k_proj.weight.data_ptr() == attention.q_proj.weight.data_ptr() + attention.q_proj.weight.nbytes
    moved = attention.q_proj.weight.data_ptr()
    make(model)
    assert attention.q_proj.weight.data_ptr() == moved, "they lie side by side already"


@pytest.mark.skipif(not can_pack(BFLOAT16), reason="this processor has no faster layout")
def test_packed_weights_say_the_same_and_are_held_once(model_folder, adapter_folders, prompts):
    def told(stepper: PagedStepper, adapter: str | None) -> list[float]:
        stepper.add(Request("asks", prompts[3], Sampling(1, prompt_logprobs=0), adapter))
        [(_, outcome)] = stepper.step()
        assert isinstance(outcome, TokenEvent)
        return [one.logprob for one in outcome.prompt_logprobs or () if one]

    plain = make(load_model(model_folder, "bfloat16").requires_grad_(False), adapter_folders)
    model = load_model(model_folder, "bfloat16").requires_grad_(False)
    packed = make(model)
    packed.pack()
    packed.pack()  # nothing is left to do
    assert (plain.stats()["weights"], packed.stats()["weights"]) == ("plain", "packed")
    assert all(model.get_submodule(name).weight.is_meta for one in packed._pass.decoder.linears() for name in one.names)
    assert not model.get_input_embeddings().weight.is_meta
    for name in "ab":
        packed.adapters.add(name, read_adapter_folder(adapter_folders[name], packed.adapters.base))
    for adapter in (None, "a", "b"):
        assert told(packed, adapter) == pytest.approx(told(plain, adapter), abs=0.05)


def test_weights_that_no_layout_is_faster_for_stay_in_the_model(model, prompts, known):
    stepper = make(model)
    stepper.pack()
    assert stepper.stats()["weights"] == "plain"
    stepper.add(Request("asks", prompts[1], Sampling(NUM_NEW)))
    assert run(stepper)["asks"] == known(None, prompts[1])
    assert model(torch.tensor([prompts[0]])).logits.isfinite().all()


def test_what_runs_the_model_is_told_with_its_reason(model, adapter_folders):
    assert make(model).stats()["forward"] == "paged"
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    stepper = Native(max_length=80).make_stepper(model, stop_token_ids=STOP)
    assert stepper.stats()["forward"] == "transformers: LlamaMLP has hooks or a forward of its own"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda model: setattr(model.model.layers[0].mlp, "up_proj", nn.Identity()), "its linear layers are Identity"),
        (lambda model: setattr(model.config, "dtype", torch.bfloat16), "it is kept in float32 and computes in"),
        (lambda model: DYNAMIC.apply(model.config), "its positions follow the length of each example"),
        (lambda model: model.lm_head.to(torch.bfloat16), "its weights are of several types"),
        (
            lambda model: setattr(model.model.layers[0].self_attn, "num_key_value_groups", 1),
            "a layer has 4 query heads over 2 key-value heads",
        ),
        (lambda model: setattr(model.model.layers[0].self_attn, "head_dim", 4), "the width of a head differs"),
    ],
)
def test_models_that_the_paged_forward_would_answer_wrongly_for_are_known(model, change, found):
    assert unfit(model) is None
    change(model)
    assert found in (unfit(model) or "")


def test_a_cache_that_no_request_fits_into_is_refused():
    with pytest.raises(ValueError, match="`cache_tokens` 64 is below `max_length` 80"):
        Native(max_length=80, cache_tokens=64)


def test_a_scale_that_overflows_the_number_format_is_refused(model, adapter_folders):
    stepper = make(model)
    found = read_adapter_folder(adapter_folders["a"], stepper.adapters.base)
    found.config.lora_alpha = 1e42
    with pytest.raises(LmrayError, match=r"is too large for torch\.float32"):
        stepper.adapters.add("a", found)
    assert stepper.adapters.handles == ()
