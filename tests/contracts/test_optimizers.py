"""What every optimizer keeps to: it learns, its state survives a checkpoint, its size is known."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lmray.adapters.full import Full
from lmray.data.batch import collate
from lmray.data.tokenise import Tokenised
from lmray.errors import CheckpointError, ConfigError
from lmray.methods.sft import Sft
from lmray.models.load import load_model
from lmray.optim.base import OptimizerConfig, load_optimizer, save_optimizer
from lmray.registry import OPTIMIZERS
from lmray.sharding.single import Single
from lmray.testing.tiny import tiny_model_folder
from lmray.train.learner import Learner

RATES = {"sgd": 0.5, "lion": 3e-3, "schedule_free_adamw": 3e-2}
"""Learning rates, where 1e-2 is not fit."""
ROW = (Tokenised(tuple(range(10, 40)), (-100, *range(11, 40))),)


def member(name: str) -> OptimizerConfig:
    cls = OPTIMIZERS.load(name)
    small = {"rank": 4, "update_proj_gap": 2}  # so that matrices of a tiny model are projected, and again
    return cls(**{field: value for field, value in small.items() if field in cls.model_fields})


@pytest.fixture(params=OPTIMIZERS.names())
def optimizer(request) -> OptimizerConfig:
    made = member(request.param)
    if made.needs_gpu and not torch.cuda.is_available():
        pytest.skip(f"runs on GPUs only: {made.needs_gpu}")
    if missing := [package for package in made.packages if find_spec(package) is None]:
        pytest.skip(f"needs {missing[0]}, which `make test-full` installs")
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model all of which is trained; its largest matrices are beyond what eight-bit optimizers keep in float32."""
    return tiny_model_folder(tmp_path_factory.mktemp("wide") / "model", hidden_size=64, intermediate_size=80)


def learner(folder: Path, optimizer: OptimizerConfig) -> Learner:
    def make(model):
        return optimizer.make_optimizer(Full().parameter_groups(model), learning_rate=1.0, weight_decay=0.01)

    (objective,) = Sft().objectives()
    return Learner(Single().place(load_model(folder, "float32"), make, "cpu"), objective, max_grad_norm=1.0)


def steps(learner: Learner, optimizer: OptimizerConfig, count: int) -> list[float]:
    batch = collate([ROW], pad_token_id=0)
    rate = RATES.get(optimizer.name, 1e-2)
    return [learner.step([batch], learning_rate=rate).loss for _ in range(count)]


def test_the_loss_falls(folder, optimizer):
    losses = steps(learner(folder, optimizer), optimizer, 8)
    assert losses[-1] < losses[0] - 0.5


def test_resumed_it_is_the_uninterrupted_one(folder, optimizer, tmp_path):
    straight = learner(folder, optimizer)
    expected = steps(straight, optimizer, 7)
    broken = learner(folder, optimizer)
    steps(broken, optimizer, 3)
    save_optimizer(broken.placed.optimizer, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["optimizer.json", "optimizer.safetensors"]
    resumed = learner(folder, optimizer)
    resumed.model.load_state_dict(broken.model.state_dict())
    load_optimizer(resumed.placed.optimizer, tmp_path)
    assert steps(resumed, optimizer, 4) == expected[3:]
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_its_state_is_as_large_as_it_says(folder, optimizer, tmp_path):
    made = learner(folder, optimizer)
    steps(made, optimizer, 1)
    save_optimizer(made.placed.optimizer, tmp_path)
    shapes = [tuple(parameter.shape) for parameter in made.model.parameters()]
    optimizer.check(shapes, device="cpu")
    found = (tmp_path / "optimizer.safetensors").stat().st_size  # with a header, counters and tables
    assert -100 <= found - optimizer.state_bytes(shapes) <= 0.1 * found + 13_000


def test_what_is_held_is_what_is_saved(folder, optimizer):
    """No views of larger tensors."""
    made = learner(folder, optimizer)
    steps(made, optimizer, 1)
    states = made.placed.optimizer.state.values()
    values = [one for state in states for one in state.values()]
    values += [part for one in values if not isinstance(one, torch.Tensor | int | float) for part in vars(one).values()]
    tensors = [one for one in values if isinstance(one, torch.Tensor)]
    assert tensors or optimizer.name == "sgd"
    for one in tensors:
        assert one.untyped_storage().nbytes() <= one.nbytes + 64


def test_biases_and_norms_are_not_decayed(folder, optimizer):
    for group in learner(folder, optimizer).placed.optimizer.param_groups:
        decays = {parameter.dim() > 1 for parameter in group["params"]}
        assert decays == {group["weight_decay"] > 0}


def test_a_groups_learning_rate_may_be_scaled(folder, optimizer):
    made = learner(folder, optimizer)
    made.placed.optimizer.param_groups[0]["lr_scale"] = 0.5
    steps(made, optimizer, 1)
    first, *others = (group["lr"] for group in made.placed.optimizer.param_groups)
    assert others and all(first == pytest.approx(0.5 * rate) for rate in others)


def test_another_optimizers_state_is_refused(folder, tmp_path):
    save_optimizer(learner(folder, member("adamw_torch")).placed.optimizer, tmp_path)
    with pytest.raises(CheckpointError, match="of another optimizer"):
        load_optimizer(learner(folder, member("muon")).placed.optimizer, tmp_path)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS.names() if OPTIMIZERS.load(name).needs_gpu])
def test_what_needs_a_gpu_says_so(name, monkeypatch):
    with pytest.raises(ConfigError, match=rf"(?s)`{name}` runs on GPUs only: .+gpus_per_worker"):
        member(name).check([(8, 8)], device="cpu")
    monkeypatch.setattr("lmray.optim.base.find_spec", lambda package: package)
    member(name).check([(8, 8)], device="cuda")


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS.names() if OPTIMIZERS.load(name).packages])
def test_a_package_that_is_missing_is_named(name, monkeypatch):
    monkeypatch.setattr("lmray.optim.base.find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=r"(?s)needs the package `\w+`.+lmray\[optimizers\]"):
        member(name).check([(8, 8)], device="cuda")


@pytest.mark.parametrize("name", ["galore_adamw", "apollo_adamw"])
def test_nothing_to_project_is_refused(name):
    with pytest.raises(ConfigError, match="wider than its rank, 4, and none is trained"):
        member(name).check([(4, 500), (32,)], device="cpu")
