"""Adapters beside quantised weights: planned, refused, loaded, trained, resumed, exported into the base as it was.

What is planned and refused does not need the library, which most machines do not have.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store, run_folder
from lmray.errors import ConfigError
from lmray.models import quantised
from lmray.models.export import export
from lmray.models.load import load_model
from lmray.models.machine import this_machine
from lmray.models.shape import read_shape
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.train import plan_steps
from lmray.train.plan import make_plan

needs_library = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs bitsandbytes, which `make test-full` installs"
)
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def _as_if_installed(monkeypatch):
    monkeypatch.setattr(quantised, "find_spec", lambda name: name)


@pytest.fixture
def job(wide_model, tiny_data, tmp_path):
    def make(name="q", **changes):
        return tiny_job(
            wide_model, tiny_data, tmp_path / "store", **{"name": name, "model__quantization": "nf4"} | changes
        )

    return make


@needs_library
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_linear_layers_are_quantised_and_the_plan_knows_their_size(wide_model, quantization, caplog):
    model = load_model(wide_model, "bfloat16", quantization=quantization)
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
    planned = read_shape(wide_model, dtype="bfloat16", quantization=quantization).weights_bytes
    assert planned == actual < read_shape(wide_model, dtype="bfloat16").weights_bytes
    with caplog.at_level(logging.WARNING):
        model(IDS)
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


@needs_library
@pytest.mark.parametrize(("quantization", "dtype"), [("nf4", "bfloat16"), ("nf4", "float32"), ("int8", "float32")])
def test_a_quantised_run_learns_resumes_exactly_and_exports_into_the_base_as_it_was(
    job, tmp_path, wide_model, quantization, dtype
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
    base = AutoModelForCausalLM.from_pretrained(wide_model)
    attached = PeftModel.from_pretrained(base, str(folder))(IDS).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(merged(IDS).logits, attached, atol=1e-4, rtol=1e-4)


@needs_library
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_step_after_a_measurement_is_what_it_would_have_been(job, tmp_path, quantization):
    """In float32: on some CPUs `bitsandbytes` would measure in bfloat16, and pass no gradient on from then."""
    changes = {"model__quantization": quantization, "model__dtype": "float32", "train__max_steps": 3}
    plain, measured = job("plain", **changes), job("measured", **changes, train__eval_steps=1)
    for one in (plain, measured):
        run_here(one, tmp_path / "scratch")
    assert curve(measured) == curve(plain)
    assert len(curve(measured, "eval.loss")) == 3


@needs_library
@pytest.mark.parametrize("adapter", [{"name": "lora", "use_dora": True}, {"name": "adalora"}, {"name": "ia3"}])
def test_other_adapters_learn_beside_quantised_weights(job, tmp_path, adapter):
    result = run_here(job(adapter=adapter, evaluate={"tasks": ["loss"]}), tmp_path / "scratch")
    assert result.metrics["eval.loss"] < result.metrics["base.loss"] - 0.005


@pytest.mark.usefixtures("_as_if_installed")
def test_the_plan_says_what_is_quantised(job):
    plan, whole = make_plan(job()), make_plan(job(model__quantization=None))
    assert plan.memory_bytes["weights"] < 0.6 * whole.memory_bytes["weights"]
    assert "weights    nf4 with double quantisation" in "\n".join(plan.lines())
    assert plan.kernels == "plain" and plan.reasons["kernels"] == "the weights are quantised"
    assert "quantization" not in whole.reasons


@pytest.mark.usefixtures("_as_if_installed")
@pytest.mark.parametrize(
    "adapter", [{"name": "full"}, {"name": "partial"}, {"name": "lisa"}, {"name": "lora", "init_lora_weights": "pissa"}]
)
def test_what_changes_the_weights_themselves_is_refused(job, adapter):
    with pytest.raises(ConfigError, match="changes the model's own weights, which stay quantised"):
        make_plan(job(adapter=adapter))


@pytest.mark.usefixtures("_as_if_installed")
def test_widths_that_blocks_do_not_divide_are_refused(job, tiny_model):
    with pytest.raises(ConfigError, match="has 32 inputs") as caught:
        make_plan(job(model__source=str(tiny_model)))
    assert "int8" in str(caught.value)


@pytest.mark.usefixtures("_as_if_installed")
@pytest.mark.parametrize("sharding", ["fsdp2", {"name": "deepspeed", "stage": 3}, "auto"])
def test_weights_that_workers_would_share_are_refused(job, sharding, monkeypatch):
    small = replace(this_machine(), memory_bytes=2**20)  # so that `auto` would share them
    monkeypatch.setattr(plan_steps, "this_machine", lambda: small)
    with pytest.raises(ConfigError, match="divides weights, which quantised ones cannot be") as caught:
        make_plan(job(sharding=sharding, resources={"workers": 2}))
    assert "ddp" in caught.value.problems[0].allowed


def test_without_the_library_it_is_refused(job, monkeypatch):
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the library `bitsandbytes`") as caught:
        make_plan(job())
    assert "lmray[quant]" in str(caught.value)
