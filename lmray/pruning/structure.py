"""What can be removed from a decoder layer in one piece, as data: key-value groups with their query heads, and MLP
channels, one by one or in blocks.

A unit is the smallest thing that is kept or removed. Removing a key-value group takes its rows of `k_proj` and
`v_proj`, the rows of `q_proj` of the heads that read it, and their columns of `o_proj`; a block of MLP channels takes
rows of `gate_proj` and `up_proj` and columns of `down_proj`. Both leave the residual stream as wide as it was, and what
is left is a model of the same architecture.

Differs from the paper (arXiv 2412.14426) in: its units are dimensions of every head of a layer. Those rotate in pairs
(arXiv 2104.09864), so that what is masked before the rotation leaks into what is not, and no stock class loads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel

from lmray.errors import ConfigError
from lmray.models.layers import decoder_layers

Kind = Literal["groups", "channels"]
KINDS: tuple[Kind, ...] = ("groups", "channels")


@dataclass(frozen=True)
class Part:
    """One side of a linear layer that a unit goes through."""

    linear: str
    """Dotted path within the decoder layer."""
    side: Literal["rows", "columns"]
    """Rows: of its outputs. Columns: of its inputs."""
    per: Literal["group", "head", "channel"]
    """What the side is made of: key-value heads, query heads, or single channels."""


@dataclass(frozen=True)
class Layout:
    """Where the units of one kind lie in a decoder layer."""

    parts: tuple[Part, ...]
    gated: tuple[str, ...]
    """The linear layers whose outputs are multiplied by the mask. Where they are zero, so is all that the unit adds to
    the residual stream."""


PATTERN: Mapping[Kind, Layout] = {
    "groups": Layout(
        (
            Part("self_attn.q_proj", "rows", "head"),
            Part("self_attn.k_proj", "rows", "group"),
            Part("self_attn.v_proj", "rows", "group"),
            Part("self_attn.o_proj", "columns", "head"),
        ),
        gated=("self_attn.v_proj",),
    ),
    "channels": Layout(
        (
            Part("mlp.gate_proj", "rows", "channel"),
            Part("mlp.up_proj", "rows", "channel"),
            Part("mlp.down_proj", "columns", "channel"),
        ),
        gated=("mlp.gate_proj", "mlp.up_proj"),
    ),
}
"""Llama's, which most decoders share."""
LAYOUTS: Mapping[str, Mapping[Kind, Layout]] = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), PATTERN
)
"""By `model_type`. Of another architecture, whose layers have linear layers of the same names, nothing needs saying."""


@dataclass(frozen=True)
class Sizes:
    """Of every decoder layer alike."""

    layers: int
    hidden: int
    groups: int
    """Key-value heads."""
    heads_per_group: int
    head_dim: int
    channels: int
    block: int
    """MLP channels of one unit; the last unit has what is left."""

    @property
    def blocks(self) -> int:
        return -(-self.channels // self.block)

    def units(self, kind: Kind) -> int:
        """Units of `kind` in a layer."""
        return self.groups if kind == "groups" else self.blocks

    def widths(self, kind: Kind) -> list[int]:
        """Of every unit: its places in the layers whose outputs are masked."""
        if kind == "groups":
            return [self.head_dim] * self.groups
        return [min(self.block, self.channels - start) for start in range(0, self.channels, self.block)]

    def costs(self, kind: Kind) -> list[int]:
        """Of every unit: weights that go with it."""
        if kind == "groups":
            return [2 * (1 + self.heads_per_group) * self.head_dim * self.hidden] * self.groups
        return [3 * width * self.hidden for width in self.widths("channels")]

    @property
    def prunable(self) -> int:
        """Weights that all units have together."""
        return self.layers * sum(sum(self.costs(kind)) for kind in KINDS)

    def places(self, part: Part, kept: Sequence[int]) -> torch.Tensor:
        """The indices of units `kept` along the side that `part` names."""
        if part.per == "channel":
            spans = [range(unit * self.block, min((unit + 1) * self.block, self.channels)) for unit in kept]
        else:
            width = self.head_dim * (self.heads_per_group if part.per == "head" else 1)
            spans = [range(unit * width, (unit + 1) * width) for unit in kept]
        return torch.tensor([place for span in spans for place in span], dtype=torch.long)

    def unit_of(self, part: Part) -> torch.Tensor:
        """The unit of every place along the side that `part` names."""
        if part.per == "channel":
            return torch.arange(self.channels) // self.block
        width = self.head_dim * (self.heads_per_group if part.per == "head" else 1)
        return torch.arange(self.groups * width) // width


@dataclass(frozen=True)
class Structure:
    """What can be removed from a model."""

    sizes: Sizes
    layout: Mapping[Kind, Layout]
    model_type: str

    def layers(self, model: Any) -> list[Any]:
        """The decoder layers of `model`, plain or with a PEFT adapter."""
        return decoder_layers(model)


def structure_of(model: Any, *, block: int) -> Structure:
    """What can be removed from `model`, MLP channels by `block`; needs no weights.

    Raises ConfigError for an architecture that is not described, and for layers that are not alike.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = base.config.get_text_config()
    if config is not base.config:
        found = f"`{base.config.model_type}` holds more than a language model, of which parts cannot be cut out"
        raise ConfigError("method.name", found, allowed=", ".join(LAYOUTS), hint="save its language model by itself")
    layers = decoder_layers(model)
    layout = LAYOUTS.get(config.model_type, PATTERN)
    found = [_widths(layer, layout) for layer in layers]
    if not found or None in found:
        missing = next((_missing(layer, layout) for layer in layers if _missing(layer, layout)), "decoder layers")
        raise ConfigError(
            "method.name",
            f"`{config.model_type}` is not described for pruning: it has no {missing}",
            allowed=", ".join(LAYOUTS),
            hint="add its linear layers to LAYOUTS in lmray/pruning/structure.py; fused ones and experts cannot be",
        )
    if len(set(found)) > 1:
        raise ConfigError("method.name", "the layers of this model have different widths, as pruned ones do already")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    (query, key, channels) = found[0]  # type: ignore[misc]
    sizes = Sizes(len(layers), config.hidden_size, key // head_dim, query // key, head_dim, channels, block)
    if not 1 <= block <= channels:
        raise ValueError(f"blocks of {block} channels in an MLP of {channels}")
    return Structure(sizes, layout, config.model_type)


def adds_alone(model: Any, structure: Structure) -> str | None:
    """The first linear layer that adds to the residual stream though nothing comes in, by its bias; None: no one."""
    parts = [part for layout in structure.layout.values() for part in layout.parts if part.side == "columns"]
    for layer in structure.layers(model):
        for part in parts:
            if getattr(linear_in(layer, part.linear), "bias", None) is not None:
                return part.linear
    return None


def linear_in(layer: Any, path: str) -> Any:
    """The module at `path` of a decoder layer; None where there is none."""
    found: Any = layer
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _missing(layer: Any, layout: Mapping[Kind, Layout]) -> str:
    names = [part.linear for kind in layout.values() for part in kind.parts]
    return ", ".join(name for name in names if getattr(linear_in(layer, name), "in_features", None) is None)


def _widths(layer: Any, layout: Mapping[Kind, Layout]) -> tuple[int, int, int] | None:
    """Of queries, keys and MLP; None where a linear layer is missing."""
    if _missing(layer, layout):
        return None
    query, key = (linear_in(layer, layout["groups"].parts[place].linear).out_features for place in (0, 1))
    return query, key, linear_in(layer, layout["channels"].parts[0].linear).out_features
