"""Fewer layers: those are dropped that change what flows through them least.

Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv 2403.03853, equation
1: the block influence of a layer is 1 - cos(its input, its output), on average over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lmray.errors import ConfigError
from lmray.models.layers import decoder_layers
from lmray.pruning.importance.base import Rows, hooked, read_rows

PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types", "block_configs")
"""Fields of configs that say something of each layer."""


@torch.no_grad()
def block_influence(model: Any, rows: Rows) -> list[float]:
    """Of each decoder layer, on calibration `rows`: 0 where it only scales what comes in, 2 where it turns it round."""
    sums_L = no_influence(model)
    with adding_influence(model, sums_L):
        read_rows(model, rows)
    tokens = sum(ids_BT.numel() for ids_BT, _ in rows)
    return (sums_L / tokens).tolist()


def no_influence(model: Any) -> torch.Tensor:
    """Of no tokens: [L] float64."""
    return torch.zeros(len(decoder_layers(model)), dtype=torch.float64)


@contextmanager
def adding_influence(
    model: Any, sums_L: torch.Tensor, tokens: Callable[[], torch.Tensor | None] | None = None
) -> Iterator[None]:
    """Within the block, the influence of every layer on each token that `model` reads is added to `sums_L`. `tokens`
    as for `adding_inputs` of Wanda-sp."""

    def add(number: int) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            before_BTE = (inputs[0] if inputs else named["hidden_states"]).detach()
            after_BTE = (output[0] if isinstance(output, tuple) else output).detach()
            chosen_BT = tokens() if tokens else torch.ones(before_BTE.shape[:2], dtype=torch.bool)
            if chosen_BT is not None:
                type = torch.promote_types(before_BTE.dtype, torch.float32)
                before_NE, after_NE = (one[chosen_BT.to(one.device)].to(type) for one in (before_BTE, after_BTE))
                sums_L[number] += (1 - torch.cosine_similarity(before_NE, after_NE, dim=-1)).sum().cpu()

        return hook

    layers = decoder_layers(model)
    handles = [layer.register_forward_hook(add(number), with_kwargs=True) for number, layer in enumerate(layers)]
    with hooked(handles):
        yield


def layers_to_keep(influence: Sequence[float], remaining: float) -> list[int]:
    """The layers of most influence, in order: at most `remaining` of all, which are alike.

    Raises ConfigError where that is not one layer.
    """
    count = int(remaining * len(influence) + 1e-9)
    if not 1 <= count <= len(influence):
        allowed = f"{1 / len(influence):.3f} to 1"
        raise ConfigError("remaining", f"{remaining:g} of {len(influence)} layers is none of them", allowed=allowed)
    return most_influential(influence, count)


def most_influential(influence: Sequence[float], count: int) -> list[int]:
    """The `count` layers of most influence, in order."""
    return sorted(sorted(range(len(influence)), key=lambda layer: -influence[layer])[:count])


def shallower(model: Any, kept: Sequence[int]) -> Any:
    """A new model of layers `kept` of `model`, whose own weights stay as they are."""
    layers = decoder_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    prefixes = {names[id(layer)] + ".": place for place, layer in enumerate(layers)}
    with torch.device("meta"):
        smaller = AutoModelForCausalLM.from_config(_config(model.config, kept), dtype=model.dtype)
    smaller = smaller.to_empty(device="cpu")

    def renamed(name: str) -> str | None:
        prefix = next((one for one in prefixes if name.startswith(one)), None)
        if prefix is None:
            return name
        if prefixes[prefix] not in kept:
            return None
        stem = prefix.removesuffix(f"{prefixes[prefix]}.")
        return f"{stem}{list(kept).index(prefixes[prefix])}.{name.removeprefix(prefix)}"

    state = {renamed(name): tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    smaller.load_state_dict({name: tensor for name, tensor in state.items() if name is not None}, assign=True)
    own = dict(smaller.named_buffers())
    for name, buffer in model.named_buffers():  # among them what is in no state dict, like rotary frequencies
        if (target := own.get(renamed(name) or "")) is not None:  # not there where no layer of its type is left
            target.data = buffer.detach().cpu().clone()
    smaller.tie_weights()
    smaller.generation_config = deepcopy(model.generation_config)
    return smaller.eval()


def _config(config: Any, kept: Sequence[int]) -> Any:
    facts = config.to_dict() | {"num_hidden_layers": len(kept)}
    for name in PER_LAYER:
        if facts.get(name):
            facts[name] = [facts[name][layer] for layer in kept]
    return type(config)(**facts)
