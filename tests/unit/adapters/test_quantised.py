"""Adapters beside quantised weights: loaded, planned, trained, resumed, and exported into the weights as they were."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store, run_folder
from lmray.errors import ConfigError
from lmray.job import ServeJob
from lmray.models import quantised
from lmray.models.export import export
from lmray.models.load import load_model
from lmray.models.shape import read_shape
from lmray.sharding.fsdp2 import Fsdp2
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.testing.tiny import tiny_model_folder
from lmray.train.plan import make_plan
from lmray.train.plan_steps import check_quantization

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which `make test-full` installs")
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Widths that NF4's blocks divide."""
    return tiny_model_folder(tmp_path_factory.mktemp("wide") / "model", hidden_size=64, intermediate_size=128)


@pytest.fixture
def job(wide, tiny_data, tmp_path):
    def make(name="q", **changes):
        return tiny_job(wide, tiny_data, tmp_path / "store", **{"name": name, "model__quantization": "nf4"} | changes)

    return make


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_linear_layers_are_quantised_and_the_plan_knows_their_size(wide, quantization, caplog):
    model = load_model(wide, "bfloat16", quantization=quantization)
    kinds = {"nf4": torch.uint8, "int8": torch.int8}
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == kinds[quantization] and model.model.norm.weight.dtype == torch.bfloat16
    actual = 0
    for parameter in model.parameters():
        actual += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        actual += 0 if state is None else state.absmax.nbytes + state.state2.absmax.nbytes
        scales = getattr(parameter, "SCB", None)
        actual += 0 if scales is None else scales.nbytes
    planned = read_shape(wide, dtype="bfloat16", quantization=quantization).weights_bytes
    assert planned == actual < read_shape(wide, dtype="bfloat16").weights_bytes
    with caplog.at_level(logging.WARNING):
        model(IDS)
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


@pytest.mark.parametrize(("quantization", "dtype"), [("nf4", "bfloat16"), ("nf4", "float32"), ("int8", "float32")])
def test_a_quantised_run_learns_resumes_exactly_and_exports_into_the_base_as_it_was(
    job, tmp_path, wide, quantization, dtype
):
    changes = {
        "model__quantization": quantization,
        "model__dtype": dtype,
        "evaluate": {"tasks": ["loss", "json_match"], "max_new_tokens": 4},
    }
    straight, broken = job("straight", **changes, output={"artifact": "q"}), job("broken", **changes)
    result = run_here(straight, tmp_path / "scratch")
    run_here(broken, tmp_path / "scratch", stop_at=3)
    run_here(broken, tmp_path / "scratch")
    assert curve(broken) == curve(straight) and curve(straight)[-1] < curve(straight)[0] - 0.1
    assert result.metrics["eval.loss"] < result.metrics["base.loss"]
    kept = Artifacts(open_store(straight.storage))
    folder = run_folder(straight) / "adapter"
    export(kept, kept.find("q"), tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(wide)
    attached = PeftModel.from_pretrained(base, str(folder))(IDS).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(merged(IDS).logits, attached, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("adapter", [{"name": "lora", "use_dora": True}, {"name": "adalora"}, {"name": "ia3"}])
def test_other_adapters_learn_beside_quantised_weights(job, tmp_path, adapter):
    result = run_here(job(adapter=adapter, evaluate={"tasks": ["loss"]}), tmp_path / "scratch")
    assert result.metrics["eval.loss"] < result.metrics["base.loss"] - 0.005


def test_the_plan_says_what_is_quantised(job):
    plan, whole = make_plan(job()), make_plan(job(model__quantization=None))
    assert plan.memory_bytes["weights"] < 0.6 * whole.memory_bytes["weights"]
    assert "weights    nf4 with double quantisation" in "\n".join(plan.lines())
    assert plan.kernels == "plain" and plan.reasons["kernels"] == "the weights are quantised"
    assert "quantization" not in whole.reasons


@pytest.mark.parametrize(
    "adapter", [{"name": "full"}, {"name": "partial"}, {"name": "lisa"}, {"name": "lora", "init_lora_weights": "pissa"}]
)
def test_what_changes_the_weights_themselves_is_refused(job, adapter):
    with pytest.raises(ConfigError, match="changes the model's own weights, which stay quantised"):
        make_plan(job(adapter=adapter))


def test_what_cannot_be_quantised_here_is_refused(job, tiny_model, monkeypatch):
    with pytest.raises(ConfigError, match="has 32 inputs") as caught:
        make_plan(job(model__source=str(tiny_model)))
    assert "int8" in str(caught.value)
    with pytest.raises(ConfigError, match="`fsdp2` divides weights"):
        check_quantization(job(), Fsdp2())
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the library `bitsandbytes`") as caught:
        make_plan(job())
    assert "lmray[quant]" in str(caught.value)


def test_a_quantised_model_is_not_served(wide):
    with pytest.raises(ValidationError, match="serves a quantised model"):
        ServeJob.model_validate(
            {"name": "s", "model": {"source": str(wide), "quantization": "nf4"}, "engine": {"name": "native"}}
        )
