"""Held-out loss, the same arithmetic as in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lmray.data.batch import Packed, collate
from lmray.models.precision import computing
from lmray.models.rope import follows_length
from lmray.models.sizes import row_sizes
from lmray.models.supervised import supervised_losses
from lmray.pulse import PULSE


@torch.no_grad()
def example_losses(
    model: torch.nn.Module,
    rows: Sequence[Packed],
    *,
    batch_size: int,
    pad_token_id: int,
    device: str,
    progress: Callable[[int], None] = lambda num_rows: None,
) -> list[tuple[float, int]]:
    """Of every example in `rows`, in their order: the summed loss in nats and the number of supervised tokens.
    `progress` is told how many rows are done. `model` is given back in the mode it came in."""
    was_training = model.training
    sizes, apart = row_sizes(model, device), follows_length(model.config)
    model.eval()
    found: list[tuple[float, int]] = []
    for first in range(0, len(rows), batch_size):
        chosen = rows[first : first + batch_size]
        PULSE.beat(f"held-out row {first + 1} of {len(rows)}")
        batch = collate(chosen, pad_token_id=pad_token_id, padded=sizes, padding_apart=apart).to(device)
        with computing(model):
            losses_N = supervised_losses(model, batch.inputs, batch.labels_BT)
        counts = [example.num_supervised for row in chosen for example in row]
        sums = [float(one.sum(dtype=torch.float64)) for one in losses_N.cpu().split(counts)]
        found += zip(sums, counts, strict=True)
        progress(len(chosen) + first)
    model.train(was_training)
    return found


def held_out_loss(
    model: torch.nn.Module,
    rows: Sequence[Packed],
    *,
    batch_size: int,
    pad_token_id: int,
    device: str,
    share: tuple[int, int] = (0, 1),
    all_sum: Callable[[float], float] = lambda value: value,
) -> float:
    """Mean loss in nats over the supervised tokens of `rows`, which must hold at least one. `share`: this rank and how
    many there are; each takes its part of the rows in as many forward passes as the others, and `all_sum` adds up."""
    rank, ranks = share
    mine = rows[rank::ranks]
    filler = rows[: -(-len(rows) // ranks) - len(mine)]
    found = example_losses(model, [*mine, *filler], batch_size=batch_size, pad_token_id=pad_token_id, device=device)[
        : sum(map(len, mine))
    ]
    return all_sum(sum(loss for loss, _ in found)) / all_sum(sum(count for _, count in found))
