"""The model that a replica's engine is given."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from lmray.engines.base import EngineConfig
from lmray.models.load import load_empty_model, load_model
from lmray.serve.prepare import ServePlan


def load_served(folder: Path, plan: ServePlan, config: EngineConfig, *, dtype: str, device: str) -> PreTrainedModel:
    """The model of `plan`, which is in `folder`, on `device`, quantised where planned; without weights for an engine
    that needs none. Raises what `load_model` raises."""
    if not config.needs_weights:
        return load_empty_model(folder, dtype=dtype)
    model = load_model(folder, dtype, quantization=plan.quantization, device=device, rope_scaling=plan.rope_scaling)
    if plan.quantization is None:  # else it is there already
        model.to(device)  # type: ignore[arg-type]
    return model
