"""Prefix tuning: keys and values of virtual tokens before every row are trained in all layers, the model is not.

Li & Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190, equation 3, through the
`peft` library. Differs from the paper in: keys and values are trained themselves, not a network that makes them.
"""

from __future__ import annotations

from peft import PrefixTuningConfig

from lmray.adapters._prompt import PromptAdapter


class PrefixTuning(PromptAdapter):
    """Learned keys and values before the prompt."""

    def config(self) -> PrefixTuningConfig:
        return PrefixTuningConfig(num_virtual_tokens=self.num_virtual_tokens, task_type="CAUSAL_LM")
