"""Prompt tuning: embeddings of virtual tokens before every row are trained, the model is not.

Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691, section 2, through the
`peft` library. Differs from the paper in: the embeddings start random, not from words.
"""

from __future__ import annotations

from peft import PromptTuningConfig

from lmray.adapters._prompt import PromptAdapter


class PromptTuning(PromptAdapter):
    """Learned embeddings before the prompt."""

    def config(self) -> PromptTuningConfig:
        return PromptTuningConfig(num_virtual_tokens=self.num_virtual_tokens, task_type="CAUSAL_LM")
