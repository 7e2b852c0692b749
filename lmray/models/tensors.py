"""Tensors on disk: safetensors, whole or not at all; and whether they are those that are expected."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from lmray.artifacts.files import fsync, temporary_beside
from lmray.errors import CheckpointError


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes `tensors` to `path` (CPU copies, contiguous) by temporary name, fsync and rename."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    temporary = temporary_beside(path)
    try:
        save_file(plain, temporary, metadata={"format": "pt"})
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_same_shapes(path: Path, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Raises CheckpointError where names or shapes of the tensors `found` in `path` are not those `expected`."""
    there, wanted = ({(name, tuple(one.shape)) for name, one in part.items()} for part in (found, expected))
    if odd := sorted(there ^ wanted):
        name, shape = odd[0]
        raise CheckpointError(str(path), f"does not fit the job's adapter, first at {name} {list(shape)}")
