"""A model whose weights come later: read where they will lie, of each tensor only the rows that this worker keeps.

Until then weights are on the meta device, where they have a shape and no storage. Buffers are real from the start: they
are in no file, and what the model's own code makes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils import swap_tensors
from transformers import GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from lmray.models.load import load_config, make_model, unreadable
from lmray.models.quiet import quiet
from lmray.models.rope import RopeScaling

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16")
"""Types that are cast to the model's; others are a quantised model's."""


def reads_whole(model: Any, folder: Path) -> str | None:
    """Why the weights of `model`, which is on the meta device, cannot be read one by one as they lie in `folder`, or
    None. `transformers` may join, split, rename, leave out or keep in another type what it reads."""
    try:
        files = open_weights(folder)
        stored = {name: file.get_slice(name) for name, file in files.items()}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        return f"its files say nothing of single weights: {error}".splitlines()[0]
    if any(isinstance(one, WeightConverter) for one in get_model_conversion_mapping(model)):
        return "`transformers` converts its weights as it reads them"
    if model._get_dtype_plan(model.dtype):
        return "some of its weights are kept in float32"
    if persistent := set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)}:
        return f"`{min(persistent)}` is read as well and no weight"
    tied, named = _tied(model), dict(model.named_parameters(remove_duplicate=False))
    for name, weight in named.items():
        if name in tied:
            if name in stored:
                return f"`{name}` is in its files and tied to `{tied[name]}`"
        elif name not in stored:
            return f"`{name}` is not in its files by this name"
        elif tuple(stored[name].get_shape()) != tuple(weight.shape) or stored[name].get_dtype() not in FLOATS:
            return f"`{name}` is not in its files as the model has it"
    return None


def open_weights(folder: Path) -> dict[str, Any]:
    """By the name of each tensor in `folder` the open file that holds it. Bytes are read when they are asked for, and
    not mapped: mapped ones would count as this process's memory as long as the file is open."""
    if (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    else:
        files = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    opened = [safe_open(folder / name, framework="pt", backend="pread") for name in files]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118


class Deferred:
    """`model` is that of `load_model`, in eval mode and frozen, its weights on the meta device. Raises what that
    raises, and ArtifactError for weights that `reads_whole` speaks of."""

    def __init__(
        self,
        folder: Path,
        dtype: str,
        *,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        rope_scaling: RopeScaling | None = None,
    ):
        self.folder, self.dtype = folder, getattr(torch, dtype)
        config = load_config(folder, trust_remote_code=trust_remote_code, rope_scaling=rope_scaling)
        with quiet(), _weights_on_meta():
            self.model = make_model(
                config, dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
            )
        self.model.eval().requires_grad_(False)
        if (folder / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        if reason := reads_whole(self.model, folder):
            raise unreadable(folder, ValueError(reason))
        self._files, self._names = open_weights(folder), _names(self.model)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Inside, every weight is on the CPU, one zero seen in the weight's shape: what is built beside it gets its
        type and device, and values of its own."""
        swapped = [(weight, _one_zero(weight)) for weight in self.model.parameters()]
        for weight, other in swapped:
            swap_tensors(weight, other)
        try:
            yield
        finally:
            for weight, other in swapped:
                swap_tensors(weight, other)

    @torch.no_grad()
    def fill(self, module: torch.nn.Module, device: str) -> None:
        """Reads the weights in `module` that have no storage, onto `device`: all of one that lies whole, and this
        rank's rows of one that is divided. Weights stay the objects they are, tied ones tied. Raises ArtifactError
        where they cannot be read."""
        for part in module.modules():
            for key, name in self._names.get(part, {}).items():
                weight = part.get_parameter(key)
                if not weight.is_meta:
                    continue
                try:
                    values = _read(self._files[name], name, weight)
                except (SafetensorError, OSError) as error:
                    raise unreadable(self.folder, error) from None
                values = values.to(self.dtype).to(device, weight.dtype)
                swap_tensors(weight, torch.nn.Parameter(_laid_out(values, weight), weight.requires_grad))


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Inside, a module's weights lose their storage the moment it gets them, before anything is written to it."""

    def moved(module: torch.nn.Module, name: str, weight: torch.nn.Parameter) -> torch.nn.Parameter | None:
        return None if weight.is_meta else torch.nn.Parameter(weight.to("meta"), weight.requires_grad)

    handle = register_module_parameter_registration_hook(moved)  # type: ignore[arg-type]  # what it returns is taken
    try:
        yield
    finally:
        handle.remove()


def _tied(model: Any) -> Mapping[str, str]:
    """By name, weights that are another one, and which."""
    return getattr(model, "all_tied_weights_keys", {})


def _names(model: Any) -> dict[torch.nn.Module, dict[str, str]]:
    """By module, and its own name of a weight, what that is called in the files. An adapter puts modules around those
    that are there, a strategy replaces their weights: the modules stay."""
    names: dict[torch.nn.Module, dict[str, str]] = {}
    for path, module in model.named_modules():
        for key, _ in module.named_parameters(recurse=False):
            name = f"{path}.{key}" if path else key
            names.setdefault(module, {})[key] = _tied(model).get(name, name)
    return names


def _one_zero(weight: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros((), dtype=weight.dtype).expand(weight.shape), requires_grad=False)


def _read(file: Any, name: str, weight: torch.Tensor) -> torch.Tensor:
    """The values of `weight`, or those of this rank's rows: as many as of every other, the last ranks' fewer."""
    if not isinstance(weight, DTensor):
        return file.get_tensor(name)
    mesh, length = weight.device_mesh, len(weight.to_local())
    if not length:
        return torch.empty(weight.to_local().shape)
    first = mesh.get_local_rank() * -(-len(weight) // mesh.size())
    return file.get_slice(name)[first : first + length]


def _laid_out(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return values
    return DTensor.from_local(
        values, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
