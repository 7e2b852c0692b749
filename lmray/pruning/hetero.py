"""Experimental: a pruned model whose layers have MLPs of different widths, written as DeciLM (Nemotron-NAS) says them.

`config.json` has `block_configs`, one a layer: `attention.n_heads_in_group` and `ffn.intermediate_size`, as
`DeciLMForCausalLM` of vLLM reads them. That class has one number of query heads for all layers, so that a key-value
group, which goes with its query heads, is filled up with zeros where another layer keeps more; MLPs are cut to size.

The form was checked against what vLLM's class says of it, not by running vLLM, which asks for the config's code from
the Hub too. Plain `transformers` refuses the folder, for it would build every layer as wide; `load_hetero` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from lmray.artifacts.files import read_json, write_json
from lmray.errors import ArtifactError, ConfigError
from lmray.pruning.record import Counts, Kept, Pruning, record_of
from lmray.pruning.shrink import LLAMA_ALONE, cut_state, num_parameters, smaller_config
from lmray.pruning.structure import Structure

MODEL_TYPE, ARCHITECTURE = "nemotron-nas", "DeciLMForCausalLM"
HINT = "prune it to another `shape`, such as `padded`"


def save_hetero(
    model: Any, structure: Structure, kept: Kept, folder: Path, *, asked: float, parent: Mapping[str, Any]
) -> Pruning:
    """Writes what is left of `model`, a Llama or a Mistral without a window whose adapters are merged, to `folder`, and
    its record last; no tokenizer. Returns the record. `asked` and `parent` as for `save_pruned`.

    Raises ConfigError for another architecture, biases, and a layer that keeps nothing.
    """
    _check(model.config, kept)
    counts = [sum(structure.sizes.widths("channels")[unit] for unit in units) for units in kept["channels"]]
    facts = {**smaller_config(model.config, structure, kept).to_dict(), "block_configs": _blocks(structure, counts)}
    facts = {name: value for name, value in facts.items() if name not in (*LLAMA_ALONE, "sliding_window")}
    smaller = _build(facts, cut_state(model, structure, kept, padded=("groups",)))
    smaller.generation_config = deepcopy(model.generation_config)
    sizes = Counts(before=num_parameters(model), after=num_parameters(smaller))
    record = record_of(structure.sizes, kept, shape="hetero", asked=asked, parent=parent, parameters=sizes)
    smaller.save_pretrained(folder)
    write_json(folder / "config.json", {**facts, "model_type": MODEL_TYPE, "architectures": [ARCHITECTURE]})
    record.save(folder)
    return record


def load_hetero(folder: Path) -> Any:
    """The model that `save_hetero` wrote to `folder`, on the CPU in the type it has there, to be measured. Raises
    ArtifactError where there is none, or one that is not whole."""
    path = folder / "config.json"
    if not path.is_file():
        raise ArtifactError(str(folder), "holds no config.json", hint="give the folder of a pruned model")
    facts = read_json(path, hint="copy the model again")
    if facts.get("model_type") != MODEL_TYPE or "block_configs" not in facts:
        found = f"is of type `{facts.get('model_type')}`, whose layers are alike"
        raise ArtifactError(str(folder), found, allowed=MODEL_TYPE, hint="plain `from_pretrained` loads it")
    state = {}
    for weights in sorted(folder.glob("*.safetensors")):
        state |= load_file(weights)
    facts = {name: value for name, value in facts.items() if name not in ("model_type", "architectures")}
    try:
        model = _build(facts, state)
    except (RuntimeError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise ArtifactError(str(folder), f"is no whole model: {first[:200]}", hint="copy the model again") from None
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _check(config: Any, kept: Kept) -> None:
    plain = config.model_type == "llama" or (config.model_type == "mistral" and config.sliding_window is None)
    if not plain or getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        found = f"a `{config.model_type}` with its biases and windows cannot have layers of different widths"
        raise ConfigError("method.shape", found, allowed="llama, mistral: without biases and windows", hint=HINT)
    for kind, layers in kept.items():
        if [] in layers:
            raise ConfigError("method.shape", f"layer {list(layers).index([])} keeps no {kind}", hint=HINT)


def _blocks(structure: Structure, channels: list[int]) -> list[dict[str, Any]]:
    attention = {"n_heads_in_group": structure.sizes.heads_per_group, "no_op": False, "replace_with_linear": False}
    return [
        {
            "attention": attention,
            "ffn": {"intermediate_size": width, "no_op": False, "replace_with_linear": False},
        }
        for width in channels
    ]


def _build(facts: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> Any:
    """A model with MLPs as `block_configs` say, and weights `state`. Mistral's classes without a window are Llama's,
    and take any number of heads."""
    blocks = facts["block_configs"]
    config = MistralConfig(
        **{name: value for name, value in facts.items() if name not in ("block_configs", "architectures")},
        sliding_window=None,
    )
    embedding = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model: Any = MistralForCausalLM(config)
        model.to(embedding.dtype)
        for layer, block in zip(model.model.layers, blocks, strict=True):
            narrow = deepcopy(config)
            narrow.intermediate_size = block["ffn"]["intermediate_size"]
            layer.mlp = type(layer.mlp)(narrow).to(embedding.dtype)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    head = {} if "lm_head.weight" in state else {"lm_head.weight": embedding}  # tied ones are written once
    model.load_state_dict({**state, **head}, assign=True)
    model.tie_weights()
    return model.eval()
