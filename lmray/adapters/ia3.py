"""IA3: keys, values and the inner activations of the MLP are multiplied by learned vectors, one number a channel.

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", arXiv 2205.05638,
section 3.3, through the `peft` library.
Differs from the paper in: nothing; its losses besides the likelihood are not part of the adapter.
"""

from __future__ import annotations

from peft import IA3Config
from pydantic import model_validator

from lmray.adapters._peft import PeftAdapter


class Ia3(PeftAdapter):
    """Learned scales of activations."""

    target_modules: tuple[str, ...] = ()
    """Names of the linear layers whose output, or input, is scaled. Empty: those of the paper, where `peft` knows the
    architecture."""
    feedforward_modules: tuple[str, ...] = ()
    """Those of `target_modules` whose input is scaled, like `down_proj`."""

    @model_validator(mode="after")
    def _together(self):
        if odd := sorted(set(self.feedforward_modules) - set(self.target_modules)):
            raise ValueError(f"scales the input of `{odd[0]}`; hint: name it in `target_modules` as well")
        return self

    def config(self) -> IA3Config:
        if not self.target_modules:
            return IA3Config(task_type="CAUSAL_LM")
        return IA3Config(
            target_modules=list(self.target_modules),
            feedforward_modules=list(self.feedforward_modules),
            task_type="CAUSAL_LM",
        )
