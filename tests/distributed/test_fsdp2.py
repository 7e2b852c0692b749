"""The options of `fsdp2` change where numbers lie and not what they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lmray.adapters.full import Full
from lmray.adapters.lora import Lora
from lmray.models.load import load_model
from lmray.models.precision import computing
from lmray.sharding.fsdp2 import Fsdp2
from lmray.sharding.single import Single
from lmray.testing.ranks import run_ranks

IDS = torch.randint(3, 250, (4, 12), generator=torch.Generator().manual_seed(0))


def _steps(sharding, folder: Path, adapter, dtype: str, ids: torch.Tensor) -> list[float]:
    """Losses of three steps over `ids`, which are this rank's share, and the norms of their gradients."""
    model = adapter.attach(load_model(folder, dtype).requires_grad_(False), seed=0)
    placed = sharding.place(
        model, lambda it: torch.optim.AdamW(adapter.trained(it).values(), lr=1e-2), "cpu", dtype=dtype
    )
    placed.model.train()
    losses, norms = [], []
    for _ in range(3):
        total = 0.0
        for number, part in enumerate(ids.split(1), 1):
            with computing(placed.model):
                logits = placed.model(part).logits.float()
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], part[0, 1:], reduction="sum")
            placed.backward(loss / IDS.numel(), last=number == len(ids))
            total += loss.item() / IDS.numel()
        norms.append(placed.clip_grad_norm(1.0))
        placed.apply()
        losses.append(placed.all_sum(total))
    return [*losses, *norms]


def _shared(rank: int, folder: Path, cases: list) -> list[list[float]]:
    dist.init_process_group("gloo")
    found = [_steps(sharding, folder, adapter, dtype, IDS[rank::2]) for sharding, adapter, dtype in cases]
    dist.destroy_process_group()
    return found


CASES = [
    (Fsdp2(cpu_offload=True), Full(), "float32"),
    (Fsdp2(activation_checkpointing=True), Full(), "float32"),
    (Fsdp2(activation_checkpointing=True), Lora(r=4), "float32"),
    (Fsdp2(reshard_after_forward=False), Lora(r=4), "float32"),
    (Fsdp2(), Full(), "bfloat16"),
    (Fsdp2(), Full(master_weights="never"), "bfloat16"),
    (Fsdp2(), Lora(r=4), "bfloat16"),
]


def test_options_change_no_number(tiny_model):
    first, second = run_ranks(2, _shared, tiny_model, CASES)
    assert first == second
    for (sharding, adapter, dtype), losses in zip(CASES, first, strict=True):
        alone = _steps(Single(), tiny_model, adapter, dtype, IDS)
        assert alone[2] < alone[0] - 1e-2, "the curve must move, else equality says nothing"
        exact = dtype == "float32"
        until, limit = (6, {"rel": 1e-5, "abs": 1e-5}) if exact else (4, {"rel": 0.02})  # norms drift apart by rounding
        assert losses[:until] == pytest.approx(alone[:until], **limit), (sharding, adapter, dtype)


def test_no_rank_holds_the_trained_weights_whole(tiny_model):
    for held, whole in run_ranks(2, _held, tiny_model):
        assert held <= whole * 0.6


def _held(rank: int, folder: Path) -> tuple[int, int]:
    assert os.environ["WORLD_SIZE"] == "2"
    dist.init_process_group("gloo")
    model = Full().attach(load_model(folder, "float32"), seed=0)
    whole = sum(one.numel() for one in model.parameters())
    placed = Fsdp2().place(model, lambda it: torch.optim.AdamW(it.parameters(), lr=1e-2), "cpu")
    placed.backward(placed.model(IDS).logits.sum(), last=True)
    placed.apply()
    held = [sum(one.to_local().numel() for one in part) for part in (placed.model.parameters(), _moments(placed))]
    dist.destroy_process_group()
    return max(held), whole


def _moments(placed) -> list:
    return [facts["exp_avg"] for facts in placed.optimizer.state.values()]
