"""The model that an engine is started over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lmray.engines.base import EngineConfig
from lmray.models.load import load_empty_model, load_model
from lmray.models.rope import RopeScaling


def load_for(
    engine: EngineConfig,
    folder: Path,
    *,
    dtype: str,
    device: str,
    quantization: str | None = None,
    trust_remote_code: bool = False,
    rope_scaling: RopeScaling | None = None,
) -> PreTrainedModel:
    """The model in `folder` on `device`, quantised where asked for; without weights for an engine that needs none.
    Raises what `load_model` raises."""
    how: dict[str, Any] = {"trust_remote_code": trust_remote_code, "rope_scaling": rope_scaling}
    if not engine.needs_weights:
        return load_empty_model(folder, dtype=dtype, **how)
    model = load_model(folder, dtype, quantization=quantization, device=device, **how)
    if quantization is None:  # else it is there already
        model.to(device)  # type: ignore[arg-type]
    return model
