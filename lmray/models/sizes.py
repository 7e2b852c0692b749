"""How long the rows of a batch are made: on a CPU a product of a size not seen before takes time and memory, since
oneDNN makes code for every size and keeps it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lmray.models.rope import num_positions


def row_sizes(model: torch.nn.Module, device: str) -> Callable[[int], int]:
    """What to pad rows to on `device`, by the longest of them: never beyond the positions `model` has."""
    if device != "cpu":
        return _as_it_is
    positions = num_positions(model.config)
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)
    most = None if positions is None else positions - virtual

    def size(longest: int) -> int:
        wanted = eighths(longest)
        return wanted if most is None else max(longest, min(wanted, most))

    return size


def eighths(length: int) -> int:
    """`length` rounded up to one of the four to eight sizes that each octave has."""
    step = max(1, 1 << (length - 1).bit_length() >> 3)
    return -(-length // step) * step


def _as_it_is(longest: int) -> int:
    return longest
