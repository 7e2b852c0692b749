"""The engine's synchronous core against `transformers`, request by request."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lmray.engines import native
from lmray.engines._adapter_folder import WEIGHTS, read_adapter_folder
from lmray.engines._core import Core
from lmray.engines._decoder import unfit
from lmray.engines._sampling import Chooser
from lmray.engines.base import Request, Sampling
from lmray.engines.native import Native, generate
from lmray.errors import ArtifactError, ConfigError, DataError, LmrayError
from lmray.models.load import load_model
from lmray.testing.tiny import tiny_adapter_folder
from tests.unit.engines.conftest import NUM_NEW, STOP, greedy

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
TOKENS = {"vocab_size": 264, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 128}
FAMILIES = {
    "llama": (transformers.LlamaConfig(**SIZES, **TOKENS), "eager"),
    "qwen3": (transformers.Qwen3Config(**SIZES, **TOKENS, head_dim=8), "sdpa"),
    "mistral": (transformers.MistralConfig(**SIZES, **TOKENS, sliding_window=128), "sdpa"),
    "qwen2": (transformers.Qwen2Config(**SIZES, **TOKENS), "sdpa"),
    "llama with biases": (transformers.LlamaConfig(**SIZES, **TOKENS, attention_bias=True, mlp_bias=True), "sdpa"),
    "gemma3": (transformers.Gemma3TextConfig(**SIZES, **TOKENS, **GEMMA), "sdpa"),
    "gpt2": (transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **TOKENS), "sdpa"),
}


def small_model(config, attention: str = "sdpa") -> transformers.PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for parameter in model.parameters():
            if parameter.dim() > 1 or parameter.abs().sum() == 0:  # biases too
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_stepper(model, **changes) -> Core:
    config = Native(**{"max_batch_size": 4, "max_length": 128, **changes})
    return config.make_stepper(model, stop_token_ids=STOP)


@pytest.fixture
def make(way):
    """`make_stepper`, each way."""
    return make_stepper


def step(stepper: Core, answers: dict[str, list[int]]) -> None:
    """One step, its tokens added to `answers` by request id. Raises what a request ended with."""
    for request_id, outcome in stepper.step():
        if isinstance(outcome, LmrayError):
            raise outcome
        if outcome.token_id is not None:
            answers[request_id].append(outcome.token_id)


def run(stepper: Core) -> dict[str, list[int]]:
    """Steps until nothing is left."""
    answers: dict[str, list[int]] = defaultdict(list)
    while stepper.busy:
        step(stepper, answers)
    return answers


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batches_of_other_architectures_give_their_own_greedy_tokens(family, prompts):
    model = small_model(*FAMILIES[family])
    assert (unfit(model) is None) == (family not in ("gemma3", "gpt2"))
    expected = [greedy(model, prompt) for prompt in prompts]
    answers = generate(model, prompts, stop_token_ids=STOP, max_new_tokens=NUM_NEW, batch_size=4, threads=1)
    assert answers == expected


@pytest.mark.parametrize("batch_size", [1, 3, 99])
def test_generate_gives_answers_in_order_and_tells_its_progress(way, model, prompts, expected, batch_size):
    told = []
    answers = generate(
        model,
        prompts,
        stop_token_ids=STOP,
        max_new_tokens=NUM_NEW,
        batch_size=batch_size,
        threads=1,
        progress=told.append,
    )
    assert answers == expected[None]
    assert told == sorted(told)
    assert told[-1] == len(prompts)
    assert generate(model, [], stop_token_ids=STOP, max_new_tokens=1, batch_size=1, threads=1) == []


def test_generate_runs_a_model_in_training_and_gives_it_back_as_it_came(way, model, adapter_folders, prompts, expected):
    trained = PeftModel.from_pretrained(model, adapter_folders["a"], is_trainable=True).train()
    before = {name: parameter.requires_grad for name, parameter in trained.named_parameters()}
    told = {"stop_token_ids": STOP, "max_new_tokens": NUM_NEW, "batch_size": 3, "threads": 1}
    assert generate(trained, prompts, **told, adapter="default") == expected["a"]
    assert generate(trained, prompts, **told) == expected[None]
    assert trained.training
    assert {name: parameter.requires_grad for name, parameter in trained.named_parameters()} == before
    assert any(before.values())
    assert [greedy(trained.eval(), prompt) for prompt in prompts] == expected["a"]


def test_generate_refuses_what_it_cannot_answer(model):
    told = {"stop_token_ids": STOP, "max_new_tokens": 1, "batch_size": 1, "threads": 1}
    with pytest.raises(DataError, match="the prompt is empty"):
        generate(model, [()], **told)
    with pytest.raises(ArtifactError, match="unknown adapter `default`"):
        generate(model, [(5,)], **told, adapter="default")


def test_many_requests_over_few_rows_and_all_adapters_are_exact(make, model, adapter_folders, prompts, expected):
    stepper = make(model, max_batch_size=3)
    for name, folder in adapter_folders.items():
        stepper.adapters.add(name, read_adapter_folder(folder, stepper.adapters.base))
    source = random.Random(1)
    wanted = [(place, adapter) for place in range(len(prompts)) for adapter in (None, "a", "b")]
    source.shuffle(wanted)
    answers: dict[str, list[int]] = defaultdict(list)
    for place, adapter in wanted:
        stepper.add(Request(f"{place} {adapter}", prompts[place], Sampling(NUM_NEW), adapter))
        for _ in range(source.randrange(9)):
            step(stepper, answers)
    while stepper.busy:
        step(stepper, answers)
    assert {key: answers[f"{key[0]} {key[1]}"] for key in wanted} == {key: expected[key[1]][key[0]] for key in wanted}


def test_adapters_of_other_rank_and_layers_share_a_batch(make, model, model_folder, adapter_folders, prompts, tmp_path):
    """A row must not feel which layers its neighbour's adapter has."""
    folder = tiny_adapter_folder(model_folder, tmp_path / "small", seed=3, r=2)
    kept = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if "layers.1.self_attn" in name}
    save_file(kept, folder / WEIGHTS)
    config = (folder / "adapter_config.json").read_text()
    modules = '"target_modules": ' + config.split('"target_modules": ')[1].split("]")[0] + "]"
    regex = '"target_modules": ".*layers\\\\.1\\\\.self_attn\\\\.._proj"'
    (folder / "adapter_config.json").write_text(config.replace(modules, regex))
    reference = PeftModel.from_pretrained(load_model(model_folder, "float32"), folder)
    stepper = make(model)
    stepper.adapters.add("small", read_adapter_folder(folder, stepper.adapters.base))
    stepper.adapters.add("a", read_adapter_folder(adapter_folders["a"], stepper.adapters.base))
    for place, adapter in ((0, "small"), (1, "a"), (2, None)):
        stepper.add(Request(str(place), prompts[place], Sampling(NUM_NEW), adapter))
    assert run(stepper)["0"] == greedy(reference, prompts[0])


def test_its_own_forward_reads_new_prompts_up_to_the_limit_in_a_step_but_always_one(model, monkeypatch):
    monkeypatch.setattr(native, "unfit", lambda model: "the test asks for it")
    stepper = make_stepper(model, max_prefill_tokens=10)
    for name, length in (("a", 30), ("b", 4), ("c", 4), ("d", 4)):
        stepper.add(Request(name, (5,) * length, Sampling(8)))
    assert [request_id for request_id, _ in stepper.step()] == ["a"]
    assert [request_id for request_id, _ in stepper.step()] == ["a", "b", "c", "d"]


def test_cancelling_frees_the_row_and_leaves_the_others_exact(make, model, prompts, expected):
    stepper = make(model, max_batch_size=2)
    for place in range(3):
        stepper.add(Request(str(place), prompts[place], Sampling(NUM_NEW)))
    first = stepper.step()
    assert [request_id for request_id, _ in first] == ["0", "1"]
    stepper.cancel("0")
    stepper.cancel("no such request")
    answers = run(stepper)
    assert "0" not in answers
    assert answers["2"] == expected[None][2]
    assert [outcome.token_id for _, outcome in first[1:]] + answers["1"] == expected[None][1]


def test_a_waiting_request_can_be_cancelled(make, model, prompts):
    stepper = make(model, max_batch_size=1)
    stepper.add(Request("runs", prompts[0], Sampling(2)))
    stepper.add(Request("waits", prompts[1], Sampling(2)))
    stepper.step()
    stepper.cancel("waits")
    assert "waits" not in run(stepper)


def test_an_answer_ends_where_the_row_is_full(make, model):
    stepper = make(model, max_length=16)
    stepper.add(Request("a", (5,) * 10, Sampling(99)))
    outcomes = [outcome for _ in range(6) for _, outcome in stepper.step()]
    assert len(outcomes) == 6
    assert outcomes[-1].finish_reason == "length"
    assert not stepper.busy


def test_equal_seeds_draw_equal_answers_whoever_shares_the_batch(make, model, prompts):
    def answer(*neighbours: int) -> list[int]:
        stepper = make(model)
        stepper.add(Request("me", prompts[0], Sampling(NUM_NEW, temperature=1.0, top_p=0.9, seed=7)))
        for place in neighbours:
            stepper.add(Request(str(place), prompts[place], Sampling(NUM_NEW, temperature=1.0)))
        return run(stepper)["me"]

    assert answer() == answer(1, 2) != greedy(model, prompts[0])


def test_a_broken_adapter_ends_its_own_request_only_and_leaves_no_nan_in_its_row(
    make, model, adapter_folders, prompts, expected, tmp_path
):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text((adapter_folders["a"] / "adapter_config.json").read_text())
    tensors = {name: tensor * 1e30 for name, tensor in load_file(adapter_folders["a"] / WEIGHTS).items()}
    save_file(tensors, Path(broken / WEIGHTS))
    stepper = make(model, max_batch_size=2)
    stepper.adapters.add("broken", read_adapter_folder(broken, stepper.adapters.base))
    stepper.add(Request("good", prompts[0], Sampling(NUM_NEW)))
    stepper.add(Request("bad", prompts[3], Sampling(NUM_NEW), "broken"))
    first = dict(stepper.step())
    assert isinstance(first["bad"], LmrayError)
    assert "adapter `broken` answered with NaN" in str(first["bad"])
    # a short request takes the row that held NaN while its neighbour is longer, so that masked places take part
    stepper.add(Request("next", prompts[5], Sampling(NUM_NEW)))
    answers = run(stepper)
    assert [first["good"].token_id, *answers["good"]] == expected[None][0]
    assert answers["next"] == expected[None][5]


def test_a_draw_that_fails_ends_its_own_request_alone(make, model, prompts, expected, monkeypatch):
    stepper, choose = make(model), Chooser.choose

    def fail(self, logits_V, greedy):
        if self._sampling.seed == 13:
            raise IndexError("no candidate")
        return choose(self, logits_V, greedy)

    monkeypatch.setattr(Chooser, "choose", fail)
    stepper.add(Request("good", prompts[0], Sampling(NUM_NEW)))
    stepper.add(Request("bad", prompts[3], Sampling(NUM_NEW, seed=13)))
    first = dict(stepper.step())
    assert isinstance(first["bad"], LmrayError) and "IndexError: no candidate" in str(first["bad"])
    assert [first["good"].token_id, *run(stepper)["good"]] == expected[None][0]


def test_the_last_adapter_leaves_the_model_as_it_was(make, model, adapter_folders):
    stepper = make(model)
    before = {name: type(module) for name, module in model.named_modules()}
    for name, folder in adapter_folders.items():
        stepper.adapters.add(name, read_adapter_folder(folder, stepper.adapters.base))
    for name in adapter_folders:
        stepper.adapters.remove(name)
    assert stepper.adapters.handles == ()
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, **TOKENS), "it takes no position_ids"),
        (
            transformers.FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True, **TOKENS),
            "its positions are in the attention mask",
        ),
        (
            transformers.Lfm2Config(**SIZES, **TOKENS, layer_types=["conv", "full_attention"]),
            "a layer keeps LinearAttentionLayer states",
        ),
        (
            transformers.MistralConfig(**SIZES, **TOKENS, sliding_window=100),
            "128 tokens are more than the attention window of MistralForCausalLM\n  allowed: up to 100",
        ),
        (
            transformers.LlamaConfig(**{**SIZES, "max_position_embeddings": 64}, **TOKENS),
            "128 tokens are more than LlamaForCausalLM has positions for\n  allowed: up to 64",
        ),
    ],
    ids=["bloom", "falcon-alibi", "lfm2", "window", "positions"],
)
def test_models_that_slots_would_answer_wrongly_for_are_refused(config, found):
    with pytest.raises(ConfigError) as caught:
        make_stepper(small_model(config, "eager"))
    assert found in str(caught.value)


def test_attention_that_takes_no_mask_is_refused(model):
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="cannot run attention `flash_attention_2`"):
        make_stepper(model)
