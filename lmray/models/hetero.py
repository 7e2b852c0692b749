"""Experimental: models whose layers have MLPs of different widths, written as DeciLM (Nemotron-NAS) says them.

`config.json` has `block_configs`, one a layer: `attention.n_heads_in_group` and `ffn.intermediate_size`, as
`DeciLMForCausalLM` of vLLM reads them. That class has one number of query heads for all layers, and so has this one.
The form was checked against what vLLM's class says of it, not by running vLLM, which asks for the config's code from
the Hub too.

`transformers` refuses such a folder, for it would build every layer as wide; `lmray.models.load` reads it. Nemotron-NAS
models that bring their own code are left to that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

MODEL_TYPE = "nemotron-nas"
ONLY = "MLPs of different widths"


@strict
class HeteroConfig(MistralConfig):
    """Mistral's without a window, which is Llama's with any number of heads; `intermediate_size` is the widest."""

    model_type = MODEL_TYPE

    sliding_window: int | None = None
    block_configs: list | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.block_configs is not None:  # the library makes one without, to compare with
            _check(self)

    @property
    def mlp_widths(self) -> list[int]:
        """Of every layer."""
        return [block["ffn"]["intermediate_size"] for block in self.block_configs or ()]


class DeciLMForCausalLM(MistralForCausalLM):
    """Mistral's, each layer with an MLP of its own width."""

    config_class = HeteroConfig

    def __init__(self, config: HeteroConfig):
        if config.block_configs is None:
            raise ValueError("its config has no `block_configs`")
        super().__init__(config)
        for layer, width in zip(self.model.layers, config.mlp_widths, strict=True):
            narrow = deepcopy(config)
            narrow.intermediate_size = width
            layer.mlp = type(layer.mlp)(narrow)  # type: ignore[operator]


AutoModelForCausalLM.register(HeteroConfig, DeciLMForCausalLM)


def is_hetero(folder: Path) -> bool:
    """Whether the model in `folder` is one of these."""
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return facts["model_type"] == MODEL_TYPE and "auto_map" not in facts
    except (OSError, ValueError, KeyError, TypeError):  # whoever reads it next says what is wrong
        return False


def blocks_of(widths: Sequence[int], heads_per_group: int) -> list[dict[str, Any]]:
    """`block_configs` of layers with MLPs of these widths, and so many query heads to a key-value head."""
    attention = {"n_heads_in_group": heads_per_group, "no_op": False, "replace_with_linear": False}
    return [
        {"attention": attention, "ffn": {"intermediate_size": width, "no_op": False, "replace_with_linear": False}}
        for width in widths
    ]


def _check(config: Any) -> None:
    """Raises ValueError for a form of DeciLM that is not read here."""
    blocks = config.block_configs
    if len(blocks) != config.num_hidden_layers:
        raise ValueError(f"`block_configs` says {len(blocks)} layers of {config.num_hidden_layers}")
    heads = config.num_attention_heads // config.num_key_value_heads
    for number, block in enumerate(blocks):
        attention, ffn = (block.get(name) or {} for name in ("attention", "ffn"))
        width = ffn.get("intermediate_size")
        if attention.get("n_heads_in_group") != heads or not isinstance(width, int) or width < 1:
            raise ValueError(f"`block_configs` of layer {number} is none of {ONLY}")
        if any(part.get(name) for part in (attention, ffn) for name in ("no_op", "replace_with_linear")):
            raise ValueError(f"`block_configs` of layer {number} has no attention or no MLP: read are {ONLY}")
