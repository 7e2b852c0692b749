"""The smaller model: what was removed is cut out of the weights, and a config says the sizes of what is left.

`uniform`: every layer is as wide, and the model is one of its own architecture. `padded`: layers are filled up with
zeros to the widest, which changes no number. `hetero`: every MLP has its own width; heads are filled up. A Llama whose
heads do not divide its hidden width is written as a Mistral without a window, which has the same tensors and the same
forward pass: Llama's config refuses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from transformers import AutoModelForCausalLM, MistralConfig

from lmray.errors import ConfigError
from lmray.models.hetero import MODEL_TYPE, HeteroConfig, blocks_of
from lmray.pruning.depth import shallower
from lmray.pruning.masks import Shape
from lmray.pruning.record import Kept, kept_layers
from lmray.pruning.structure import KINDS, Part, Structure, linear_in

LLAMA_ALONE = ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp")
"""What Llama's config says and Mistral's does not."""


@dataclass(frozen=True)
class Outline:
    """Sizes of a smaller model as it is written, zeros included."""

    groups: int
    """Key-value heads of every layer."""
    channels: tuple[int, ...]
    """Of the MLP, by layer."""
    shape: Shape


def outline(structure: Structure, kept: Kept, shape: Shape, *, multiple_of: int = 1) -> Outline:
    """How units `kept` are written, the MLP a multiple of `multiple_of` channels wide where the model's is wider."""
    of_units, widest = structure.sizes.widths("channels"), structure.sizes.channels
    found = [max(1, sum(of_units[unit] for unit in units)) for units in kept["channels"]]
    widths = [min(widest, -(-width // multiple_of) * multiple_of) for width in found]
    if shape != "hetero":
        widths = [max(widths)] * len(widths)
    return Outline(max(map(len, kept["groups"])), tuple(widths), shape)


def num_parameters(model: Any) -> int:
    """Of the whole model; what is tied is counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def shrunk(model: Any, structure: Structure, kept: Kept, shape: Shape, *, multiple_of: int = 1) -> Any:
    """A new model on the CPU of what is left of `model`, whose adapters are merged; what nothing was cut from, the two
    share. Layers that keep nothing are left out.

    `kept`: by kind and layer, the units that are kept (`kept_units`). `multiple_of`: of the MLP's width, to which zeros
    fill up. Raises ConfigError for quantised weights, and for a model that no class holds.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        hint = "merge the adapter into the unquantised weights it was trained from, and cut those"
        raise ConfigError("model.quantization", "units cannot be cut out of quantised weights", hint=hint)
    if len(there := kept_layers(kept)) < structure.sizes.layers:
        model = shallower(model, there)
        kept = {kind: [kept[kind][number] for number in there] for kind in KINDS}
    sizes = outline(structure, kept, shape, multiple_of=multiple_of)
    config = smaller_config(model.config, structure, sizes)
    with torch.device("meta"):
        smaller = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    smaller.load_state_dict(_cut_state(model, structure, kept, sizes), assign=True)
    copy_buffers(model, smaller)
    smaller.tie_weights()
    smaller.generation_config = deepcopy(model.generation_config)
    return smaller.eval()


def _cut_state(model: Any, structure: Structure, kept: Kept, sizes: Outline) -> dict[str, torch.Tensor]:
    """The state of `model` without what was removed, on the CPU, filled up with zeros to `sizes`."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    names = {id(module): name for name, module in model.named_modules()}
    for number, layer in enumerate(structure.layers(model)):
        for kind in KINDS:
            for part in structure.layout[kind].parts:
                cut = _Cut(part, structure, kept[kind][number], _total(part, structure, sizes, number))
                for tensor in ("weight", "bias"):
                    name = f"{names[id(linear_in(layer, part.linear))]}.{tensor}"
                    if name in state:
                        state[name] = cut(state[name])
    return state


def _total(part: Part, structure: Structure, sizes: Outline, number: int) -> int:
    """Places along the side that `part` names, in layer `number` of what is written."""
    if part.per == "channel":
        return sizes.channels[number]
    return len(structure.sizes.places(part, range(sizes.groups)))


class _Cut:
    """One side of a tensor without what was removed, filled up with zeros to `total` places."""

    def __init__(self, part: Part, structure: Structure, kept: Sequence[int], total: int):
        self.axis = 0 if part.side == "rows" else 1
        self.places = structure.sizes.places(part, kept)
        self.total = total

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.axis == 1 and tensor.dim() == 1:  # the bias of outputs, of which none is removed
            return tensor
        cut = tensor.index_select(self.axis, self.places)
        missing = self.total - len(self.places)
        if missing:
            shape = list(cut.shape)
            shape[self.axis] = missing
            cut = torch.cat([cut, cut.new_zeros(shape)], dim=self.axis)
        return cut.contiguous()


def smaller_config(config: Any, structure: Structure, sizes: Outline) -> Any:
    """The config of what is left."""
    heads = sizes.groups * structure.sizes.heads_per_group
    changes = {
        "num_key_value_heads": sizes.groups,
        "num_attention_heads": heads,
        "head_dim": structure.sizes.head_dim,
        "intermediate_size": max(sizes.channels),
    }
    facts = {**config.to_dict(), **changes}
    alone = {name: value for name, value in facts.items() if name not in (*LLAMA_ALONE, "sliding_window")}
    if sizes.shape == "hetero" or config.model_type == MODEL_TYPE:
        _check_hetero(config)
        blocks = blocks_of(sizes.channels, structure.sizes.heads_per_group)
        return HeteroConfig(**{**alone, "block_configs": blocks})
    if config.model_type != "llama" or structure.sizes.hidden % heads == 0:
        return type(config)(**facts)
    if config.attention_bias or config.mlp_bias:
        found = f"leaves {heads} heads, which do not divide the hidden width {structure.sizes.hidden}"
        raise ConfigError(
            "method.remaining",
            f"{found}: no class of transformers has such a model with biases",
            hint="keep as many key-value heads as divide it: another `method.remaining`, or `method.shape: uniform`",
        )
    return MistralConfig(**alone, sliding_window=None, architectures=["MistralForCausalLM"])


def _check_hetero(config: Any) -> None:
    plain = config.model_type in ("llama", "mistral", MODEL_TYPE) and getattr(config, "sliding_window", None) is None
    if not plain or getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        found = f"this `{config.model_type}` cannot have layers of different widths: no form is known"
        allowed = "llama and mistral, without biases and windows"
        raise ConfigError("method.shape", found, allowed=allowed, hint="`shape: padded` or `uniform`")


def group_counts(model: Any, structure: Structure, shape: Shape) -> tuple[int, ...]:
    """How many key-value heads a layer of `model`, plain or with an adapter, may keep, rising: those for which there is
    a config. Raises ConfigError where the architecture has none of this `shape`."""
    config = _base(model).config
    if shape == "hetero":
        _check_hetero(config)
    return tuple(count for count in range(1, structure.sizes.groups + 1) if _has_config(config, structure, count))


def check_writable(model: Any, structure: Structure, groups: int) -> None:
    """Raises ConfigError where the config of what is left of `model`, plain or with an adapter, with `groups` key-value
    heads and the narrowest MLP in each layer, is not that of the tensors that are cut; needs no weights."""
    base = _base(model)
    sizes = _alike(structure, groups, structure.sizes.widths("channels")[0])
    with torch.device("meta"):
        smaller = AutoModelForCausalLM.from_config(smaller_config(base.config, structure, sizes), dtype=torch.float32)
    left = {name.replace(".base_layer.", "."): list(one.shape) for name, one in base.named_parameters()}
    names = {id(module): name for name, module in base.named_modules()}
    for number, layer in enumerate(structure.layers(base)):
        for part in (part for kind in KINDS for part in structure.layout[kind].parts):
            total = _total(part, structure, sizes, number)
            name = names[id(linear_in(layer, part.linear))]
            left[f"{name}.weight"][0 if part.side == "rows" else 1] = total
            if part.side == "rows" and f"{name}.bias" in left:
                left[f"{name}.bias"][0] = total
    for name, one in smaller.named_parameters():
        if name in left and left[name] != list(one.shape):
            raise ConfigError(
                "method.name",
                f"`{name}` goes with the heads or the MLP's channels and is not described: {left[name]} would be left, "
                f"and the smaller `{base.config.model_type}` has {list(one.shape)}",
                hint="describe the architecture in LAYOUTS in lmray/pruning/structure.py",
            )


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _alike(structure: Structure, groups: int, channels: int) -> Outline:
    return Outline(groups, (channels,) * structure.sizes.layers, "uniform")


def _has_config(config: Any, structure: Structure, groups: int) -> bool:
    try:
        smaller_config(config, structure, _alike(structure, groups, structure.sizes.channels))
    except (ConfigError, StrictDataclassError, ValueError):  # the last two: transformers' own checks
        return False
    return True


def copy_buffers(model: Any, smaller: Any) -> None:
    """What is in no state dict, like rotary frequencies."""
    for name, buffer in model.named_buffers():
        owner, _, last = name.rpartition(".")
        module = smaller.get_submodule(owner)
        copied = buffer.detach().cpu().clone()
        module.register_buffer(last, copied, persistent=last not in module._non_persistent_buffers_set)
