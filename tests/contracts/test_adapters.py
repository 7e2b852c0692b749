"""What every adapter keeps to."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lmray.adapters.base import Adapter
from lmray.artifacts.store import run_folder
from lmray.errors import CheckpointError
from lmray.models.load import load_model
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
    return ADAPTERS.load(request.param)()


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
