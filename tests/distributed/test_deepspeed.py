"""ZeRO gives the curve of one process, at every stage, offloaded or not, interrupted or not: float32, tiny model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from lmray.errors import CheckpointError, ConfigError
from lmray.models.deferred import Deferred
from lmray.models.load import load_model
from lmray.optim.adamw_torch import AdamwTorch
from lmray.sharding._deepspeed_nvme import check_async_io, load_async_io
from lmray.sharding.base import Placed, Sharding
from lmray.sharding.deepspeed import Deepspeed
from lmray.sharding.single import Single
from lmray.testing.ranks import run_ranks
from lmray.testing.tiny import tiny_model_folder
from lmray.train.group import torchrun_context

STEPS, SAVED_AT, ROWS = 4, 2, 8
DATA = torch.randint(3, 250, (ROWS, 12), generator=torch.Generator().manual_seed(1))
SHARDED = {
    "stage 1": Deepspeed(stage=1),
    "stage 2": Deepspeed(stage=2),
    "stage 3": Deepspeed(stage=3),
    "stage 2, optimizer on the CPU": Deepspeed(stage=2, offload_optimizer="cpu"),
    "stage 3, all on the CPU": Deepspeed(stage=3, offload_optimizer="cpu", offload_param="cpu"),
}
ON_DISK = {"stage 3, all on a disk": Deepspeed(stage=3, offload_optimizer="nvme", offload_param="nvme", nvme_path="/")}


def strategy(name: str, folder: Path) -> Sharding:
    """By its name; what goes to a disk goes to one in `folder`."""
    if name in SHARDED:
        return SHARDED[name]
    return ON_DISK[name].model_copy(update={"nvme_path": str(folder / "disk")})


@pytest.fixture(autouse=True)
def linear_as_it_was(monkeypatch):
    """Stage 3 replaces the function for the whole process, and leaves it so."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)


def groups(model: torch.nn.Module) -> list[dict]:
    return [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]


def placed(chosen: Sharding, model_folder: Path, what: str) -> Placed:
    """Read by part where the strategy divides weights."""
    deferred = Deferred(model_folder, "float32") if "weights" in chosen.divides else None
    model: Any = deferred.model if deferred else load_model(model_folder, "float32")
    if what == "lora":
        torch.manual_seed(0)
        model.requires_grad_(False)
        with deferred.standing_in() if deferred else nullcontext():
            model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    else:
        model.requires_grad_(True)
    fill: Any = {"fill": deferred.fill} if deferred else {}
    return chosen.place(
        model, lambda one: AdamwTorch().make_optimizer(groups(one), learning_rate=1.0, weight_decay=0.1), "cpu", **fill
    )


def trained(one: Placed, first: int, last: int, *, rank: int = 0, ranks: int = 1) -> list[tuple[float, float]]:
    """Loss and gradient norm of steps `first` to `last`: the rows dealt out to the ranks, a forward pass for each."""
    steps = []
    for step in range(first, last):
        for group in one.optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        mine = DATA.roll(step, 0)[rank::ranks]
        idle = -(-ROWS // ranks) - len(mine)
        total = 0.0
        parts = [*mine, *DATA[:idle]]
        for number, row_T in enumerate(parts, 1):
            logits_TV = one.model(input_ids=row_T[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits_TV, row_T[1:], reduction="sum") * (number <= len(mine))
            one.backward(loss / DATA[:, 1:].numel(), last=number == len(parts))
            total += loss.item()
        norm = one.clip_grad_norm(0.3)
        one.apply()
        steps.append((one.all_sum(total) / DATA[:, 1:].numel(), norm))
    return steps


def in_a_group(act: Callable[..., Any], folder: Path, rank: int, ranks: int, *args: Any) -> Any:
    with torchrun_context(folder):
        return act(rank, ranks, *args)


def from_the_start(rank: int, folder: Path, ranks: int, model: Path, cases: list[tuple[str, str]]) -> dict:
    """Curves and weights of all `cases`; each is saved on its way."""
    return in_a_group(_from_the_start, folder, rank, ranks, folder, model, cases)


def _from_the_start(rank: int, ranks: int, folder: Path, model: Path, cases: list[tuple[str, str]]) -> dict:
    found = {}
    for name, what in cases:
        one = placed(strategy(name, folder), model, what)
        steps = trained(one, 0, SAVED_AT, rank=rank, ranks=ranks)
        (folder / name / what).mkdir(parents=True, exist_ok=True)
        one.save(folder / name / what)
        steps += trained(one, SAVED_AT, STEPS, rank=rank, ranks=ranks)
        state = one.gathered_state(trained_only=False)
        assert (state is None) == (rank > 0)
        for part in ("float32params", "optimizer") if name in ON_DISK else ():
            assert list(folder.glob(f"disk/.lmray-offload/rank-*/zero_stage_3/{part}/rank{rank}/*.swp")), part
        found[name, what] = steps, {key: tensor.numpy() for key, tensor in (state or {}).items()}
    return found


def resumed(rank: int, folder: Path, ranks: int, model: Path, cases: list[tuple[str, str, str]]) -> dict:
    """Curves of what was saved under a name by a strategy, gone on with under another."""
    return in_a_group(_resumed, folder, rank, ranks, folder, model, cases)


def _resumed(rank: int, ranks: int, folder: Path, model: Path, cases: list[tuple[str, str, str]]) -> dict:
    found = {}
    for saved_as, name, what in cases:
        one = placed(strategy(name, folder), model, what)
        one.load(folder / saved_as / what)
        found[saved_as, name, what] = trained(one, SAVED_AT, STEPS, rank=rank, ranks=ranks), {}
    return found


@pytest.fixture(scope="module")
def alone(tiny_model) -> dict[str, tuple]:
    """Curve and weights of one process, for `lora` and `full`."""
    found = {}
    for what in ("lora", "full"):
        one = placed(Single(), tiny_model, what)
        found[what] = trained(one, 0, STEPS), one.gathered_state(trained_only=False)
        losses = [loss for loss, _ in found[what][0]]
        assert losses[-1] < losses[0] - 0.2, "the curve must move, else equality says nothing"
        assert found[what][0][0][1] > 0.3, "gradients must be clipped"
    return found


def assert_same(found: dict, alone: dict, *, first: int = 0) -> None:
    for case, (steps, state) in found.items():
        expected_steps, expected_state = alone[case[-1]]
        for mine, expected in zip(steps, expected_steps[first:], strict=True):
            assert mine == pytest.approx(expected, abs=1e-5), case
        assert set(state) in (set(), set(expected_state))
        for name, array in state.items():
            assert abs(array - expected_state[name].numpy()).max() < 1e-4, (case, name)


CASES = [("stage 2", "lora"), ("stage 3", "full"), ("stage 2, optimizer on the CPU", "full")]
REST = [(name, what) for name in SHARDED for what in ("lora", "full") if (name, what) not in CASES]


def test_two_ranks_learn_what_one_does_and_go_on_at_three(tiny_model, alone, tmp_path):
    """At three ranks the tensors do not divide evenly, nor do the rows."""
    found, _ = run_ranks(2, from_the_start, tmp_path, 2, tiny_model, CASES)
    assert_same(found, alone)
    again = [("stage 2", "stage 2", "lora"), ("stage 3", "stage 3", "full"), ("stage 3", "stage 2", "full")]
    found, *_ = run_ranks(3, resumed, tmp_path, 3, tiny_model, again)
    assert_same(found, alone, first=SAVED_AT)


@pytest.mark.slow
def test_every_stage_trained_in_every_way_at_every_number_of_ranks(tiny_model, alone, tmp_path):
    found, _ = run_ranks(2, from_the_start, tmp_path, 2, tiny_model, CASES + REST)
    assert_same(found, alone)
    again = [(name, name, what) for name, what in CASES + REST]
    again += [("stage 1", "stage 3", "full"), ("stage 3, all on the CPU", "stage 1", "full")]
    for ranks in (1, 2, 4):
        found, *_ = run_ranks(ranks, resumed, tmp_path, ranks, tiny_model, again)
        assert_same(found, alone, first=SAVED_AT)


@pytest.fixture
def async_io(monkeypatch) -> None:
    """DeepSpeed's operation, compiled here unless it has been: no rank waits for it."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    try:
        check_async_io()
        load_async_io()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_what_lies_on_a_disk_is_learnt_as_in_memory(async_io, tmp_path):
    """Of a model with weights of which a rank's part is large enough to go to the disk: over a megabyte."""
    model = tiny_model_folder(tmp_path / "model", hidden_size=256, intermediate_size=2304)
    (name,) = ON_DISK
    found, _ = run_ranks(2, from_the_start, tmp_path, 2, model, [("stage 3", "full"), (name, "full")])
    expected_steps, expected_state = found["stage 3", "full"]
    steps, state = found[name, "full"]
    assert_like(steps, expected_steps)
    assert all(abs(state[key] - array).max() < 1e-4 for key, array in expected_state.items())
    assert not list((tmp_path / "disk" / ".lmray-offload").iterdir()), "it goes with the run"
    assert_same_checkpoint(*(tmp_path / one / "full" for one in (name, "stage 3")))


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """So that what is shown of going on from the one holds for the other."""
    found, expected = ({path.name: load_file(path) for path in folder.iterdir()} for folder in (one, other))
    assert {name: set(state) for name, state in found.items()} == {name: set(state) for name, state in expected.items()}
    for name, state in expected.items():
        assert all((found[name][key] - tensor).abs().max() < 1e-5 for key, tensor in state.items()), name


def assert_like(steps: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    """Norms also in proportion: they are large, and how gradients are summed shows in them first."""
    assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in expected], abs=1e-5, rel=0)
    assert [norm for _, norm in steps] == pytest.approx([norm for _, norm in expected], abs=1e-5, rel=1e-5)


def timeouts(rank: int, folder: Path, model: Path) -> float:
    """Of the group that the engine has made for itself, in seconds."""
    with torchrun_context(folder, step_timeout_s=5000.0):
        engine: Any = placed(Deepspeed(stage=2), model, "lora").optimizer
        group = engine.dp_process_group
        return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def test_its_own_groups_wait_as_long_as_those_of_the_job(tiny_model, tmp_path):
    (found,) = run_ranks(1, timeouts, tmp_path, tiny_model)
    assert found == 5060.0


def test_a_checkpoint_of_another_strategy_is_refused(tiny_model, tmp_path):
    single = placed(Single(), tiny_model, "lora")
    trained(single, 0, 1)
    single.save(tmp_path)
    with pytest.raises(CheckpointError, match="another strategy than `deepspeed`"):
        placed(Deepspeed(), tiny_model, "lora").load(tmp_path)


def test_a_gradient_that_is_not_finite_shows_in_the_norm(tiny_model):
    for stage in (2, 3):
        one = placed(Deepspeed(stage=stage), tiny_model, "lora")
        one.backward(one.model(input_ids=DATA[:1]).logits.sum() * float("inf"), last=True)
        assert not torch.isfinite(torch.tensor(one.clip_grad_norm(1.0)))
    assert torch.distributed.get_world_size() == 1


def test_nothing_is_written_to_stdout(tiny_model, capfd):
    one = placed(Deepspeed(stage=3), tiny_model, "lora")
    trained(one, 0, 1)
    assert capfd.readouterr().out == ""
