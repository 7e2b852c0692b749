"""Tensors on disk: safetensors, whole or not at all, and whether they are those that are expected; trees of tensors and
plain values, with JSON beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lmray.artifacts.files import fsync, temporary_beside, write_json
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


def save_tree(tree: Any, stem: Path) -> None:
    """Writes `tree` as `STEM.safetensors` and `STEM.json`: dicts (of string and integer keys), lists and tuples of
    tensors, numbers, strings, booleans and None. A tensor that stands in it twice is written once. Raises
    CheckpointError for anything else in it."""
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}

    def plain(value: Any, where: str) -> Any:
        if isinstance(value, torch.Tensor):
            name = names.setdefault(id(value), where)
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, dict):
            return {"dict": [[key, plain(item, f"{where}.{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [plain(item, f"{where}.{index}") for index, item in enumerate(value)]}
        if value is None or isinstance(value, (str, int, float, bool)):
            return value
        found = f"holds a {type(value).__name__} at `{where}`"
        raise CheckpointError(str(stem), found, allowed="tensors, numbers, strings, lists and dicts")

    written = plain(tree, stem.name)
    save_tensors(tensors, stem.with_suffix(".safetensors"))
    write_json(stem.with_suffix(".json"), written)


def load_tree(stem: Path) -> Any:
    """What `save_tree` wrote, its tensors on the CPU."""
    tensors = load_file(stem.with_suffix(".safetensors"))

    def whole(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, held),) = value.items()
        if kind == "tensor":
            return tensors[held]
        if kind == "dict":
            return {key: whole(item) for key, item in held}
        return (list if kind == "list" else tuple)(map(whole, held))

    return whole(json.loads(stem.with_suffix(".json").read_text(encoding="utf-8")))
