"""What cannot be tuned and pruned, and what is warned of: found before anything starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    Olmo2Config,
    OlmoConfig,
)

from lmray.adapters.lora import Lora
from lmray.errors import ConfigError
from lmray.methods.atp import Atp
from lmray.pruning.masks import Budget
from lmray.pruning.structure import structure_of
from lmray.train.plan import make_plan

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a share above one": ({"method__remaining": 1.2}, "method.remaining", "than 0 and less than or equal to 1"),
    "none left": ({"method__remaining": 0.0}, "method.remaining", "greater than 0 and"),
    "less than a group": ({"method__remaining": 0.2}, "method.remaining", "0.2 is less than the narrowest model"),
    "no lora": ({"adapter": "full"}, "adapter.name", "adds no LoRA"),
    "ia3": ({"adapter": {"name": "ia3"}}, "adapter.name", "adds no LoRA"),
    "dora": ({"adapter": {"name": "lora", "use_dora": True}}, "adapter.target_modules", "has no plain LoRA"),
    "a start from the base": (
        {"adapter": {"name": "lora", "init_lora_weights": "pissa"}},
        "adapter.init_lora_weights",
        "begins with parts of the base's weights",
    ),
    "lora on few": ({"adapter__target_modules": ["q_proj"]}, "adapter.target_modules", "`self_attn.k_proj` has no"),
    "quantised": ({"model__quantization": "nf4"}, "model.quantization", "cannot be cut"),
    "compiled": ({"train__torch_compile": True}, "train.torch_compile", "would not see the masks"),
    "averages": ({"train__optim": "schedule_free_adamw"}, "train.optim", "would not be"),
    "fused": ({"model__kernels": "fused"}, "model.kernels", "masks lie between"),
    "an engine": (
        {"sharding": {"name": "deepspeed", "stage": 2}},
        "sharding.name",
        "through the engine of `deepspeed`",
    ),
    "devices": (
        {"method__tensor_parallel": 3, "method__multiple_of": 6},
        "method.tensor_parallel",
        "3 devices do not divide 2",
    ),
    "no step to search": ({"method__freeze_after": 0.09}, "method.freeze_after", "0.09 of 10 step(s) leaves none"),
    "one step": ({"train__max_steps": 1, "train__eval_steps": 1}, "method.freeze_after", "a run of at least 2 steps"),
    "more layers than there are": ({"method__layers": 3}, "method.layers", "the model has 2 layers, not 3"),
    "too few layers": ({"method__layers": 1}, "method.layers", "1 of 2 layers are less than the 0.6"),
    "wide steps": ({"method__multiple_of": 65}, "method.multiple_of", "is 65"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_anything_starts(job, name):
    changes, where, found = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        make_plan(job(**changes))
    assert where in str(caught.value) and found in str(caught.value)


def test_a_budget_that_is_too_small_is_told_the_least(job):
    with pytest.raises(ConfigError, match=r"allowed: 0\.\d+ to 1: 1 key-value head\(s\) and 8 MLP channel\(s\)"):
        make_plan(job(method__remaining=0.1))
    with pytest.raises(ConfigError, match=r"(?s)2 key-value head\(s\).*smaller .* or `method.tensor_parallel`"):
        make_plan(job(method__remaining=0.1, method__tensor_parallel=2))


@pytest.mark.parametrize("shape", ["padded", "hetero"])
def test_devices_and_layers_of_different_widths_do_not_go_together(job, shape):
    with pytest.raises(ConfigError, match="keeps different heads in every layer"):
        job(method__shape=shape, method__tensor_parallel=2)


def test_devices_divide_the_width_of_the_mlp(job):
    with pytest.raises(ConfigError, match=r"2 devices do not divide `multiple_of: 7`") as caught:
        job(method__tensor_parallel=2, method__multiple_of=7)
    assert "a `multiple_of` that `tensor_parallel` divides" in str(caught.value)


def test_more_than_a_third_at_once_is_warned_of(job):
    assert any("40% of the prunable weights go at once" in line for line in make_plan(job()).warnings)
    assert not any("at once" in line for line in make_plan(job(method__schedule="progressive")).warnings)
    assert not any("at once" in line for line in make_plan(job(method__remaining=0.67)).warnings)


def test_kernels_are_plain_and_the_plan_says_why(job):
    plan = make_plan(job())
    assert plan.kernels == "plain" and "masks lie between" in plan.reasons["kernels"]


def adapted_to(config: Any) -> Any:
    with torch.device("meta"):
        return Lora(r=2).attach(AutoModelForCausalLM.from_config(config), seed=0)


def sized(groups: int, hidden: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": groups,
        "num_key_value_heads": groups,
        "vocab_size": 50,
        "pad_token_id": 0,
    }


def test_a_tensor_that_goes_with_the_heads_undescribed_is_found_before_training():
    model = adapted_to(Olmo2Config(**sized(4, 64)))
    with pytest.raises(ConfigError, match=r"q_norm.weight` goes with the heads .*: \[64\] would be left") as caught:
        Atp(remaining=0.6, multiple_of=8).check(model, steps=10)
    assert caught.value.where == "method.name" and "LAYOUTS" in str(caught.value.hint)


def test_heads_that_no_config_is_written_for_are_never_kept():
    model = adapted_to(LlamaConfig(**sized(4, 64), attention_bias=True))
    structure = structure_of(model, block=1)
    budget = Atp(remaining=0.8, multiple_of=8).budget(model, structure)
    assert budget.group_counts == (1, 2, 4), "3 heads do not divide 64"
    scores: Any = {"groups": torch.tensor([[4.0, 4.0, 4.0, -9.0]] * 2), "channels": torch.zeros(2, 32)}
    assert budget.cut(scores)["groups"].sum(1).tolist() != [3, 3]
    free = Budget(structure.sizes, 0.8, "uniform")
    assert free.cut(scores)["groups"].sum(1).tolist() == [3, 3], "which is what they are worth"
    Atp(remaining=0.8, multiple_of=8).check(model, steps=10)
    with pytest.raises(ConfigError, match="configs of 1, 2, 4 of them only") as caught:
        Atp(remaining=0.8, multiple_of=8, shape="padded").check(model, steps=10)
    assert caught.value.where == "method.shape" and "uniform" in str(caught.value.hint)


def test_what_layers_add_is_known_only_of_architectures_that_are_described():
    model = adapted_to(OlmoConfig(**sized(4, 64)))
    Atp(remaining=0.4, multiple_of=8).check(model, steps=10)
    with pytest.raises(ConfigError, match="a layer of `olmo` of which nothing is kept may still change") as caught:
        Atp(remaining=0.4, multiple_of=8, layers=1).check(model, steps=10)
    assert caught.value.where == "method.layers"


def test_three_digits_say_that_layers_stay_whole():
    model = adapted_to(LlamaConfig(**{**sized(4, 64), "num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match="2 of 3 layers are less") as caught:
        Atp(remaining=0.7, multiple_of=8, layers=2).check(model, steps=10)
    assert "`remaining: 0.667`" in str(caught.value)
    Atp(remaining=0.667, multiple_of=8, layers=2).check(model, steps=10)


def test_what_is_read_by_few_is_warned_of(job):
    assert any(
        "plain `transformers` and vLLM do not read" in one for one in make_plan(job(method__shape="hetero")).warnings
    )


def test_a_layer_that_adds_something_of_its_own_cannot_go():
    config = {**sized(4, 64), "num_key_value_heads": 2}
    model = adapted_to(LlamaConfig(**config, mlp_bias=True))
    with pytest.raises(ConfigError, match=r"`mlp.down_proj` has a bias") as caught:
        Atp(remaining=0.4, multiple_of=8, layers=1).check(model, steps=10)
    assert caught.value.where == "method.layers"


@pytest.mark.parametrize("shape", ["uniform", "padded", "hetero"])
def test_a_llama_without_biases_may_keep_any_number_of_heads(shape):
    model = adapted_to(LlamaConfig(**sized(3, 48)))
    Atp(remaining=0.8, multiple_of=8, shape=shape).check(model, steps=10)


def test_a_model_of_which_no_part_has_a_config_is_refused():
    model = adapted_to(LlamaConfig(**{**sized(4, 64), "num_key_value_heads": 2}, attention_bias=True))
    model.get_base_model().config.hidden_size = 61
    with pytest.raises(ConfigError, match="no config can be written"):
        Atp(remaining=0.8, multiple_of=8).check(model, steps=10)


def test_a_model_of_more_than_language_is_refused_as_such():
    text = Gemma3TextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    sight = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=sight))
    with pytest.raises(ConfigError, match="`gemma3` holds more than a language model"):
        structure_of(model, block=1)
