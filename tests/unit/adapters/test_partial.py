"""Training some of the weights: which, what refuses, what stays."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from lmray.adapters._whole import decoder_layers
from lmray.adapters.partial import Partial
from lmray.errors import ConfigError
from lmray.models.load import load_model
from lmray.testing.jobs import run_here, tiny_job
from lmray.train.plan import make_plan


@pytest.fixture
def trained(tiny_model):
    def names(dtype="float32", **fields):
        model = Partial(**fields).attach(load_model(tiny_model, dtype).requires_grad_(False), seed=0)
        return {name: one for name, one in model.named_parameters() if one.requires_grad}

    return names


def test_the_last_layers_are_trained(trained):
    names = trained(last_n=1)
    assert len(names) == 9 and all(name.startswith("model.layers.1.") for name in names)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("lm_head",), {"model.embed_tokens.weight"}),  # tied
        (("model.layers.0.mlp",), {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}),
        (("model.norm.weight", "*.1.self_attn.q_*"), {"model.norm.weight", "model.layers.1.self_attn.q_proj.weight"}),
    ],
)
def test_weights_are_named_by_module_parameter_or_pattern(trained, patterns, expected):
    assert set(trained(train_layers=patterns)) == expected


def test_only_what_is_trained_has_masters(tiny_model):
    model = Partial(last_n=1).attach(load_model(tiny_model, "bfloat16").requires_grad_(False), seed=0)
    for parameter in model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)


def test_what_names_nothing_is_refused(trained, tiny_model):
    with pytest.raises(ConfigError, match=r"`model\.layer\.1` names no weight") as caught:
        trained(train_layers=("model.layer.1",))
    assert "did you mean `model.layers.1`" in str(caught.value)
    with pytest.raises(ConfigError, match="is 3") as caught:
        trained(last_n=3)
    assert "1 to 2" in str(caught.value)
    with pytest.raises(ValidationError, match="give one of them"):
        Partial(last_n=1, train_layers=("lm_head",))


def test_a_model_whose_layers_are_not_one_list_is_refused(tiny_model):
    model = load_model(tiny_model, "float32")
    model.model.layers = torch.nn.ModuleList(list(model.model.layers)[:1])
    with pytest.raises(ConfigError, match="does not hold its 2 layers in one list"):
        decoder_layers(model)


def test_a_run_changes_what_it_trains_and_plans_memory_for_that_alone(tiny_model, tiny_data, tmp_path):
    job = tiny_job(tiny_model, tiny_data, tmp_path / "store", adapter={"name": "partial", "last_n": 1})
    plan, result = make_plan(job), run_here(job, tmp_path / "scratch")
    before, after = (
        dict(load_model(path, "float32").named_parameters()) for path in (tiny_model, result.details["model"])
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("model.layers.1.")}
    count = sum(before[name].numel() for name in changed)
    assert plan.model["trainable_parameters"] == count and plan.memory_bytes["optimizer"] == 8 * count
    assert plan.memory_bytes["weights"] == 4 * plan.model["parameters"]
