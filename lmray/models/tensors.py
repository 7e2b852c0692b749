"""Tensors on disk: safetensors, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes `tensors` to `path` (CPU copies, contiguous) by temporary name, fsync and rename."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(plain, temporary, metadata={"format": "pt"})
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
