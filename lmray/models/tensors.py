"""Tensors on disk: safetensors, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from lmray.artifacts.files import fsync, temporary_beside


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
