"""LoRA: a frozen weight W gets a trained low-rank side path, W x + (alpha / r) B A x.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3, through the `peft`
library. Differs from the paper in: nothing; B starts at zero, A as `peft` starts it (Kaiming uniform).
"""

from __future__ import annotations

from typing import Annotated

from peft import LoraConfig
from pydantic import Field

from lmray.adapters._peft import PeftAdapter


class Lora(PeftAdapter):
    """Low-rank adaptation."""

    r: Annotated[int, Field(ge=1)] = 8
    """Rank of the update."""
    lora_alpha: Annotated[float, Field(gt=0.0)] = 16
    """Scale: the update is multiplied by `lora_alpha / r`."""
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get an update; `all-linear` means all but the output head."""

    def config(self) -> LoraConfig:
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        alpha = int(self.lora_alpha) if float(self.lora_alpha).is_integer() else self.lora_alpha
        return LoraConfig(
            r=self.r,
            lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides by r; a fraction is fine
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
