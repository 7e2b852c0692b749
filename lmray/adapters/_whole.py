"""What adapters that train the model's own weights share: master weights, and whole models on disk.

A folder holds `config.json`, `generation_config.json` and `model.safetensors` (in several parts where it is large), as
`from_pretrained` reads them, in the type that the model was loaded in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from lmray.adapters.base import Adapter
from lmray.errors import ArtifactError, CheckpointError, ConfigError
from lmray.models.load import load_model
from lmray.models.precision import compute_dtype, keep_masters
from lmray.models.quiet import quiet
from lmray.models.tensors import check_same_shapes


class WholeModel(Adapter):
    """An adapter that changes weights of the model itself."""

    kept: ClassVar[Literal["adapter", "model"]] = "model"

    master_weights: Literal["auto", "never"] = "auto"
    """`auto`: weights of a bfloat16 model are trained in float32 and multiplied in bfloat16, so that small steps are
    not rounded away (Micikevicius et al., arXiv 1710.03740). `never`: they are trained in the model's own type, in half
    the memory."""

    def _open(self, model: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> torch.nn.Module:
        """Lets `parameters` of `model` learn."""
        if self.master_weights == "auto":
            keep_masters(parameters)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return model

    def save(self, model: torch.nn.Module, folder: Path, *, state: Mapping[str, torch.Tensor] | None = None) -> None:
        whole: Any = model
        dtype = compute_dtype(model)
        tied = getattr(model, "all_tied_weights_keys", {})
        tensors = {**model.state_dict(), **(state or {})}
        tensors = {name: _rounded(tensor, dtype) for name, tensor in tensors.items() if name not in tied}
        with quiet():
            whole.save_pretrained(folder, state_dict=tensors)
            whole.config.dtype = dtype  # which saving set to that of the training weights
            whole.config.save_pretrained(folder)

    def load(self, model: torch.nn.Module, folder: Path) -> None:
        try:
            found = load_model(folder, "float32").state_dict()
        except ArtifactError as error:
            raise CheckpointError(error.where, error.found) from None
        state = model.state_dict()
        check_same_shapes(folder, found, state)
        for name, tensor in state.items():
            tensor.copy_(found[name])


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """The model's layers, from the input to the output. Raises ConfigError where they are not one list."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [one for one in model.modules() if isinstance(one, torch.nn.ModuleList) and len(one) == count]
    if not lists:
        raise ConfigError("adapter.name", f"{type(model).__name__} does not hold its {count} layers in one list")
    return lists[0]


def _rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
