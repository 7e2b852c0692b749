"""The options of `fsdp2` change where numbers lie and not what they are."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lmray.adapters.full import Full
from lmray.adapters.lora import Lora
from lmray.adapters.partial import Partial
from lmray.models import deferred as reading
from lmray.models.deferred import Deferred
from lmray.models.layers import checkpoint_layers
from lmray.models.load import load_model
from lmray.models.precision import computing
from lmray.sharding.fsdp2 import Fsdp2
from lmray.sharding.single import Single
from lmray.testing.ranks import run_ranks

IDS = torch.randint(3, 250, (4, 12), generator=torch.Generator().manual_seed(0))


def _placed(sharding, folder: Path, adapter, dtype: str, *, by_part: bool):
    def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(adapter.trained(model).values(), lr=1e-2)

    if not by_part:
        model = adapter.attach(load_model(folder, dtype).requires_grad_(False), seed=0)
        return sharding.place(model, optimizer, "cpu", dtype=dtype)
    deferred = Deferred(folder, dtype)
    with deferred.standing_in() if adapter.kept == "adapter" else nullcontext():
        model = adapter.attach(deferred.model, seed=0)
    placed = sharding.place(model, optimizer, "cpu", dtype=dtype, fill=deferred.fill)
    assert not any(one.is_meta for one in (*placed.model.parameters(), *placed.model.buffers()))
    return placed


def _steps(placed, ids: torch.Tensor, *, again: bool = False) -> list[float]:
    """Losses of three steps over `ids`, which are this rank's share, and the norms of their gradients."""
    placed.model.train()
    if again:
        checkpoint_layers(placed.model, partial(computing, placed.model))
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


def _shared(rank: int, folder: Path, cases: list) -> list[list[list[float]]]:
    """Of each case read whole, and read by part; then with the layers run again."""
    dist.init_process_group("gloo")
    found = []
    for case, adapter, dtype in cases:
        ways = ((False, False), (True, False), (True, True))
        made = [(_placed(case, folder, adapter, dtype, by_part=by_part), again) for by_part, again in ways]
        found.append([_steps(placed, IDS[rank::2], again=again) for placed, again in made])
    dist.destroy_process_group()
    return found


CASES = [
    (Fsdp2(cpu_offload=True), Full(), "float32"),
    (Fsdp2(), Partial(last_n=1), "float32"),
    (Fsdp2(reshard_after_forward=False), Lora(r=4), "float32"),
    (Fsdp2(), Full(), "bfloat16"),
    (Fsdp2(), Full(master_weights="never"), "bfloat16"),
    (Fsdp2(), Lora(r=4), "bfloat16"),
]


def test_options_change_no_number(tiny_model):
    first, second = run_ranks(2, _shared, tiny_model, CASES)
    assert first == second
    for (sharding, adapter, dtype), (whole, by_part, again) in zip(CASES, first, strict=True):
        alone = _steps(_placed(Single(), tiny_model, adapter, dtype, by_part=False), IDS)
        assert alone[2] < alone[0] - 1e-2, "the curve must move, else equality says nothing"
        exact = dtype == "float32"
        until, limit = (6, {"rel": 1e-5, "abs": 1e-5}) if exact else (4, {"rel": 0.02})  # norms drift apart by rounding
        assert whole[:until] == pytest.approx(alone[:until], **limit), (sharding, adapter, dtype)
        assert by_part == whole, (sharding, adapter, dtype)
        assert again[:until] == pytest.approx(whole[:until], **limit), (sharding, adapter, dtype)


def test_at_three_ranks_rows_do_not_divide_evenly(tiny_model):
    for whole, by_part in run_ranks(3, _uneven, tiny_model):
        assert by_part == whole


def _uneven(rank: int, folder: Path) -> list[list[float]]:
    dist.init_process_group("gloo")
    placed = [_placed(Fsdp2(), folder, Full(), "float32", by_part=by_part) for by_part in (False, True)]
    found = [_steps(one, IDS[rank : rank + 1]) for one in placed]
    dist.destroy_process_group()
    return found


def test_no_rank_reads_or_holds_the_weights_whole(tiny_model):
    for read, held, whole in run_ranks(2, _held, tiny_model):
        assert held <= whole * 0.6 and read <= whole * 0.6


def _held(rank: int, folder: Path) -> tuple[int, int, int]:
    assert os.environ["WORLD_SIZE"] == "2"
    dist.init_process_group("gloo")
    read, reads = [], reading._read

    def counted(*args) -> torch.Tensor:
        read.append(reads(*args))
        return read[-1]

    reading._read = counted
    placed = _placed(Fsdp2(), folder, Full(), "float32", by_part=True)
    placed.backward(placed.model(IDS).logits.sum(), last=True)
    placed.apply()
    held = [sum(one.to_local().numel() for one in part) for part in (placed.model.parameters(), _moments(placed))]
    whole = sum(one.numel() for one in placed.model.parameters())
    dist.destroy_process_group()
    return sum(one.numel() for one in read), max(held), whole


def _moments(placed) -> list:
    return [facts["exp_avg"] for facts in placed.optimizer.state.values()]
