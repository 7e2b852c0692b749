"""What every adapter keeps to."""

from __future__ import annotations

import pytest
import torch

from lmray.adapters.base import Adapter
from lmray.models.load import load_model
from lmray.registry import ADAPTERS

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(params=ADAPTERS.names())
def adapter(request) -> Adapter:
    return ADAPTERS.load(request.param)()


@pytest.fixture
def attach(adapter, tiny_model):
    return lambda seed=0: adapter.attach(load_model(tiny_model, "float32").requires_grad_(False), seed=seed)


def randomise(model) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_fresh_it_changes_nothing_and_equal_seeds_are_equal(attach, tiny_model):
    plain = load_model(tiny_model, "float32")(IDS).logits
    torch.testing.assert_close(attach()(IDS).logits, plain, atol=1e-5, rtol=1e-5)
    one, same, other = (dict(attach(seed).named_parameters()) for seed in (1, 1, 2))
    trained = [name for name, parameter in one.items() if parameter.requires_grad]
    assert trained and all(torch.equal(one[name], same[name]) for name in trained)
    assert any(not torch.equal(one[name], other[name]) for name in trained)


def test_seeding_it_leaves_the_global_generator_alone(attach):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    attach()
    assert torch.equal(torch.rand(1), expected)


def test_saved_and_loaded_it_is_the_same(attach, adapter, tmp_path):
    model = attach()
    randomise(model)
    expected = model(IDS).logits
    adapter.save(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again = attach(seed=5)
    adapter.load(again, tmp_path)
    torch.testing.assert_close(again(IDS).logits, expected, atol=1e-6, rtol=1e-6)
    adapter.save(again, tmp_path / "twice")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "twice" / name).read_bytes(), "equal state, equal files"
