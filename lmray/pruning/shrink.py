"""The smaller model: what was removed is cut out of the weights, and a config says the sizes of what is left.

`uniform`: every layer is as wide, and the model is one of its own architecture. `padded`: layers are filled up with
zeros to the widest, which changes no number. A Llama whose heads do not divide its hidden width is written as a
Mistral without a window, which has the same tensors and the same forward pass: Llama's config refuses it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from transformers import AutoModelForCausalLM, MistralConfig

from lmray.errors import ConfigError
from lmray.pruning.record import Counts, Kept, Pruning, record_of
from lmray.pruning.structure import KINDS, Kind, Part, Structure, linear_in

LLAMA_ALONE = ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp")
"""What Llama's config says and Mistral's does not."""


def save_pruned(
    model: Any, structure: Structure, kept: Kept, folder: Path, *, shape: str, asked: float, parent: Mapping[str, Any]
) -> Pruning:
    """Writes what is left of `model`, whose adapters are merged, to `folder` for plain `from_pretrained`, and its
    record last; no tokenizer. Returns the record.

    `kept`: by kind and layer, the units that are kept (`kept_units`). `shape`: `uniform` or `padded`. `asked`: the
    share of prunable weights that was to remain. `parent`: `source`, `revision`, `digest` of the model that is pruned.
    Raises ConfigError for layers that keep different numbers of units under `uniform`, for quantised weights, and for
    a model that no class of transformers holds.
    """
    smaller = shrunk(model, structure, kept)
    counts = Counts(before=num_parameters(model), after=num_parameters(smaller))
    record = record_of(structure.sizes, kept, shape=shape, asked=asked, parent=parent, parameters=counts)
    smaller.save_pretrained(folder)
    record.save(folder)
    return record


def num_parameters(model: Any) -> int:
    """Of the whole model; what is tied is counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def shrunk(model: Any, structure: Structure, kept: Kept) -> Any:
    """A new model on the CPU of what is left of `model`, whose adapters are merged; what nothing was cut from, the two
    share. Raises ConfigError for quantised weights, and for a model that no class of transformers holds."""
    if getattr(model.config, "quantization_config", None) is not None:
        hint = "merge the adapter into the unquantised weights it was trained from, and cut those"
        raise ConfigError("model.quantization", "units cannot be cut out of quantised weights", hint=hint)
    config = smaller_config(model.config, structure, kept)
    with torch.device("meta"):
        smaller = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    smaller.load_state_dict(cut_state(model, structure, kept, padded=KINDS), assign=True)
    copy_buffers(model, smaller)
    smaller.tie_weights()
    smaller.generation_config = deepcopy(model.generation_config)
    return smaller.eval()


def cut_state(model: Any, structure: Structure, kept: Kept, *, padded: Container[Kind]) -> dict[str, torch.Tensor]:
    """The state of `model` without what was removed, on the CPU; every layer filled up with zeros to the widest, of the
    kinds in `padded`."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    names = {id(module): name for name, module in model.named_modules()}
    for number, layer in enumerate(structure.layers(model)):
        for kind in KINDS:
            units = kept[kind][number]
            room = range(max(map(len, kept[kind]))) if kind in padded else units
            for part in structure.layout[kind].parts:
                cut = _Cut(part, structure, units, len(structure.sizes.places(part, room)))
                for tensor in ("weight", "bias"):
                    name = f"{names[id(linear_in(layer, part.linear))]}.{tensor}"
                    if name in state:
                        state[name] = cut(state[name])
    return state


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


def smaller_config(config: Any, structure: Structure, kept: Kept) -> Any:
    """The config of what is left, every layer as wide as the widest."""
    sizes = structure.sizes
    groups, blocks = (max(map(len, kept[kind])) for kind in KINDS)
    heads = groups * sizes.heads_per_group
    changes = {
        "num_key_value_heads": groups,
        "num_attention_heads": heads,
        "head_dim": sizes.head_dim,
        "intermediate_size": sum(sizes.widths("channels")[:blocks]),
    }
    facts = {**config.to_dict(), **changes}
    if config.model_type != "llama" or sizes.hidden % heads == 0:
        return type(config)(**facts)
    if config.attention_bias or config.mlp_bias:
        found = f"leaves {heads} heads, which do not divide the hidden width {sizes.hidden}"
        raise ConfigError(
            "method.remaining",
            f"{found}: no class of transformers has such a model with biases",
            hint="keep as many key-value heads as divide it: another `method.remaining`, or `method.shape: uniform`",
        )
    facts = {name: value for name, value in facts.items() if name not in LLAMA_ALONE}
    return MistralConfig(**facts, sliding_window=None, architectures=["MistralForCausalLM"])


def group_counts(model: Any, structure: Structure) -> tuple[int, ...]:
    """How many key-value heads a layer of `model`, plain or with an adapter, may keep, rising: those for which there is
    a config."""
    config = _base(model).config
    return tuple(count for count in range(1, structure.sizes.groups + 1) if _has_config(config, structure, count))


def check_writable(model: Any, structure: Structure, groups: int) -> None:
    """Raises ConfigError where the config of what is left of `model`, plain or with an adapter, with `groups` key-value
    heads and one block of the MLP in each layer, is not that of the tensors that are cut; needs no weights."""
    base = _base(model)
    kept = _first_units(structure, groups, 1)
    with torch.device("meta"):
        smaller = AutoModelForCausalLM.from_config(smaller_config(base.config, structure, kept), dtype=torch.float32)
    left = {name.replace(".base_layer.", "."): list(one.shape) for name, one in base.named_parameters()}
    names = {id(module): name for name, module in base.named_modules()}
    for layer in structure.layers(base):
        for part in (part for kind in KINDS for part in structure.layout[kind].parts):
            total = len(structure.sizes.places(part, range(groups if part.per != "channel" else 1)))
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


def _first_units(structure: Structure, groups: int, blocks: int) -> Kept:
    layers = structure.sizes.layers
    return {"groups": [list(range(groups))] * layers, "channels": [list(range(blocks))] * layers}


def _has_config(config: Any, structure: Structure, groups: int) -> bool:
    try:
        smaller_config(config, structure, _first_units(structure, groups, structure.sizes.blocks))
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
