"""The transformer blocks of a model: what is divided, and gathered to be computed with, one by one."""

from __future__ import annotations

from typing import Any

import torch


def base_of(model: Any) -> torch.nn.Module:
    """The `transformers` model below an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of `model`; none where the architecture does not name them."""
    names = set(getattr(base_of(model), "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]
