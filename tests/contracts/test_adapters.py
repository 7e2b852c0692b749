"""What every adapter keeps to."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lmray.adapters.base import Adapter
from lmray.artifacts.store import run_folder
from lmray.errors import ArtifactError, CheckpointError
from lmray.models.deferred import Deferred
from lmray.models.load import load_model
from lmray.models.merge import write_merged
from lmray.registry import ADAPTERS
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.testing.tiny import tiny_model_folder

IDS = torch.tensor([[5, 6, 7, 8, 9]])
FILES = {
    "adapter": {"adapter_config.json", "adapter_model.safetensors"},
    "model": {"config.json", "generation_config.json", "model.safetensors"},
}


@pytest.fixture(params=ADAPTERS.names())
def adapter(request) -> Adapter:
    return ADAPTERS.load(request.param)().for_steps(6)


@pytest.fixture
def attach(adapter, tiny_model):
    return lambda seed=0: adapter.attach(load_model(tiny_model, "float32").requires_grad_(False), seed=seed)


def train_a_little(adapter, model) -> None:
    """Three steps, as the learner does them."""
    optimizer = torch.optim.AdamW(adapter.parameter_groups(model), lr=0.02)
    for step in (1, 2, 3):
        model(IDS).logits.square().mean().backward()
        optimizer.step()
        adapter.after_step(model, step)
        optimizer.zero_grad(set_to_none=True)


def plainly_loaded(adapter, folder, base) -> torch.nn.Module:
    """What is kept in `folder`, as one reads it who knows nothing of lmray."""
    if adapter.kept == "model":
        return AutoModelForCausalLM.from_pretrained(folder)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))


def test_fresh_it_changes_nothing_and_equal_seeds_are_equal(attach, adapter, tiny_model):
    if not adapter.virtual_tokens:
        plain = load_model(tiny_model, "float32")(IDS).logits
        torch.testing.assert_close(attach()(IDS).logits, plain, atol=1e-5, rtol=1e-5)
    one, same = (adapter.trained(attach(1)) for _ in range(2))
    assert one and all(torch.equal(one[name], same[name]) for name in one)


def test_seeding_it_leaves_the_global_generator_alone(attach):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    attach()
    assert torch.equal(torch.rand(1), expected)


def test_attached_to_weights_that_come_later_it_is_the_same(attach, adapter, tiny_model):
    if adapter.starts_from_base:
        return  # such a model is read whole
    deferred = Deferred(tiny_model, "float32")
    with deferred.standing_in() if adapter.kept == "adapter" else nullcontext():
        model = adapter.attach(deferred.model, seed=3)
    deferred.fill(model, "cpu")
    found, expected = (dict(one.named_parameters()) for one in (model, attach(3)))
    assert [*found] == [*expected]
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].requires_grad == tensor.requires_grad, name
    assert torch.equal(model(IDS).logits, attach(3)(IDS).logits)


def test_the_optimizer_gets_every_trained_weight_once(attach, adapter):
    model = attach()
    given = [id(one) for group in adapter.parameter_groups(model) for one in group["params"]]
    assert sorted(given) == sorted(map(id, adapter.trained(model).values()))


def test_trained_saved_and_loaded_it_is_the_same(attach, adapter, tmp_path, tiny_model):
    model = attach()
    before = model(IDS).logits
    train_a_little(adapter, model)
    expected = model.eval()(IDS).logits
    assert (expected - before).abs().max() > 1e-3
    adapter.save(model, tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == FILES[adapter.kept]
    again = attach(seed=5)
    adapter.load(again, tmp_path / "kept")
    torch.testing.assert_close(again(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    adapter.save(again, tmp_path / "twice")
    for name in FILES[adapter.kept]:
        one, two = (tmp_path / folder / name for folder in ("kept", "twice"))
        assert one.read_bytes() == two.read_bytes(), "equal state, equal files"
    plain = plainly_loaded(adapter, tmp_path / "kept", tiny_model)
    torch.testing.assert_close(plain(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_gathered_state_is_saved_as_the_models_own(attach, adapter, tmp_path):
    """As a sharded run saves: from a state dict, whatever the model's own weights are."""
    model = attach()
    train_a_little(adapter, model)
    adapter.save(model, tmp_path / "own")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in adapter.trained(model).values():
        parameter.data.zero_()
    adapter.save(model, tmp_path / "given", state=state)
    (name,) = (name for name in FILES[adapter.kept] if name.endswith(".safetensors"))
    one, two = (load_file(tmp_path / folder / name) for folder in ("own", "given"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_an_adapter_merges_or_says_why_not(attach, adapter, tmp_path, tiny_model):
    if adapter.kept == "model":
        return  # it is merged
    model = attach()
    train_a_little(adapter, model)
    adapter.save(model, tmp_path / "kept")
    if adapter.virtual_tokens:
        with pytest.raises(ArtifactError, match="cannot be merged: its virtual tokens are no weights"):
            write_merged(tiny_model, tmp_path / "kept", tmp_path / "merged")
        return
    write_merged(tiny_model, tmp_path / "kept", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(IDS).logits, model.eval()(IDS).logits, atol=1e-4, rtol=1e-4)


def test_weights_of_another_shape_are_refused(attach, adapter, tmp_path):
    other = load_model(tiny_model_folder(tmp_path / "wide", hidden_size=64), "float32").requires_grad_(False)
    adapter.save(adapter.attach(other, seed=0), tmp_path / "kept")
    with pytest.raises(CheckpointError, match="does not fit the job's adapter, first at"):
        adapter.load(attach(), tmp_path / "kept")


@pytest.fixture
def job(adapter, tiny_model, tiny_data, tmp_path):
    tree = adapter.model_dump(mode="json")
    return lambda name, **changes: tiny_job(
        tiny_model, tiny_data, tmp_path / "store", name=name, adapter=tree, **changes
    )


def test_a_resumed_run_is_the_uninterrupted_one(job, adapter, tmp_path, tiny_model):
    straight, broken = job("straight"), job("broken")
    result = run_here(straight, tmp_path / "scratch")
    assert run_here(broken, tmp_path / "scratch", stop_at=3).status == "stopped"
    assert run_here(broken, tmp_path / "scratch").status == "succeeded"
    assert curve(broken) == curve(straight) and len(curve(straight)) == 6
    assert result.details["kind"] == adapter.kept
    (name,) = (name for name in FILES[adapter.kept] if name.endswith(".safetensors"))
    one, two = (load_file(run_folder(run) / adapter.kept / name) for run in (straight, broken))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    plainly_loaded(adapter, run_folder(straight) / adapter.kept, tiny_model)(IDS)


def test_a_bfloat16_run_trains_in_float32_and_is_measured_with_answers(job, adapter, tmp_path):
    tasks = ["loss"] if adapter.virtual_tokens else ["loss", "exact_match"]
    one = job("low", model__dtype="bfloat16", evaluate={"tasks": tasks, "max_new_tokens": 4, "max_examples": 2})
    run_here(one, tmp_path / "scratch", stop_at=5)
    trained = load_file(run_folder(one) / "checkpoint-00000005" / "weights.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    result = run_here(one, tmp_path / "scratch")
    assert result.metrics["eval.loss"] != result.metrics["base.loss"]
    assert adapter.virtual_tokens or "eval.exact_match" in result.metrics
