"""What adapters of virtual tokens share: they lie before every row, and are no weights of the model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field

from lmray.adapters._peft import HANDLE, PeftAdapter

KEPT = "prompt_embeddings"
"""PEFT's name on disk."""


class PromptAdapter(PeftAdapter):
    """Learned virtual tokens before every row; the model itself stays as it is, so there is nothing to merge."""

    num_virtual_tokens: Annotated[int, Field(ge=1)] = 20

    @property
    def virtual_tokens(self) -> int:
        return self.num_virtual_tokens

    def attach(self, model: torch.nn.Module, *, seed: int) -> torch.nn.Module:
        # Rows are never packed, so their positions are those that the model counts by itself.
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        return super().attach(model, seed=seed)

    def _state(self, model: Any, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        given = model.state_dict() if state is None else state
        return {KEPT: given[f"prompt_encoder.{HANDLE}.embedding.weight"]}
