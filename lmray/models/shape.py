"""The sizes of a causal language model that memory and time follow from, read from its config and a storage-less copy.

T tokens of a row, D hidden width, Q width of all query heads, K width of all key-value heads, I width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lmray.errors import ArtifactError
from lmray.models.deferred import reads_whole
from lmray.models.fused import unfit
from lmray.models.head import plain_head
from lmray.models.layers import decoder_layers
from lmray.models.load import load_config, make_model
from lmray.models.quantised import saved_bytes
from lmray.models.quiet import quiet
from lmray.models.rope import RopeScaling

WIDTH = {"float32": 4, "bfloat16": 2}
"""Bytes of one number."""


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer with a trained side path of rank `r`, or whose own weight is trained (`r` 0)."""

    parent: str
    """Dotted path of the block it belongs to: layers of one block that are as wide share their input."""
    in_features: int
    out_features: int
    r: int
    dropout: bool


@dataclass(frozen=True)
class ModelShape:
    """Widths are of one layer; `base` parameters are loaded, `added` ones come with the adapter, `trained` ones
    learn."""

    base: int
    added: int
    trained: int
    trained_bytes: int
    """Of the trained parameters, in the type they are trained in."""
    weights_bytes: int
    """Of all parameters."""
    embedding: int
    """Parameters of token embedding and head; once where they are tied."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    query_width: int
    key_value_width: int
    vocabulary: int
    attention: str
    """How it computes attention: the name that `transformers` has for it."""
    layers_again: int
    """Decoder layers that can be run again, or compiled, one by one."""
    plain_head: bool
    """Whether the logits are what a linear head returns, so that their loss is taken chunk by chunk."""
    trained_shapes: tuple[tuple[int, ...], ...] = ()
    """Of every parameter that learns."""
    trained_head: int = 0
    """Parameters of a plain head that learn."""
    adapted: tuple[AdaptedLinear, ...] = ()
    trained_norms: int = 0
    """Widths of all norms whose own weight is trained, summed."""
    unfit: str | None = None
    """Why its training steps cannot run fused; see `lmray.models.fused`."""
    reads_whole: str | None = None
    """Why a worker that keeps a part of the weights cannot read that part alone; see `lmray.models.deferred`."""

    @property
    def total(self) -> int:
        """Parameters with those of the adapter."""
        return self.base + self.added

    @property
    def trained_fraction(self) -> float:
        """Of the base."""
        return (self.trained - self.added) / self.base

    def cache_bytes(self, dtype: str, *, rows: int, tokens: int) -> int:
        """Keys and values of `rows` sequences of `tokens` tokens."""
        return 2 * self.layers * self.key_value_width * WIDTH[dtype] * rows * tokens


def read_shape(
    folder: Path,
    attach: Callable[[torch.nn.Module], torch.nn.Module] | None = None,
    *,
    dtype: str = "float32",
    quantization: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    rope_scaling: RopeScaling | None = None,
) -> ModelShape:
    """The shape of the model in `folder` as loaded in `dtype`, with the adapter that `attach` gives it; no weight is
    read. Raises what `attach` raises, ArtifactError where the weights' shapes are not the config's, and ConfigError for
    what cannot be quantised or scaled and where the model has no such attention."""
    with quiet():
        config = load_config(folder, trust_remote_code=trust_remote_code, rope_scaling=rope_scaling)
        with torch.device("meta"):
            model: Any = make_model(
                config, dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
            ).requires_grad_(False)
            _check_weights(folder, model)
            whole = reads_whole(model, folder)
            base = sum(parameter.numel() for parameter in model.parameters())
            ends = {id(end.weight): end.weight.numel() for end in _ends(model)}
            saved = saved_bytes(model, quantization, ends) if quantization else 0
            if attach is not None:
                model = attach(model)
            head = plain_head(model)
    facts = config.get_text_config()
    heads = facts.num_attention_heads
    size = getattr(facts, "head_dim", None) or facts.hidden_size // heads
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return ModelShape(
        base=base,
        added=sum(parameter.numel() for parameter in model.parameters()) - base,
        trained=sum(parameter.numel() for parameter in trained),
        trained_bytes=sum(parameter.nbytes for parameter in trained),
        weights_bytes=sum(parameter.nbytes for parameter in model.parameters()) - saved,
        embedding=sum(ends.values()),
        layers=facts.num_hidden_layers,
        hidden=facts.hidden_size,
        intermediate=_mlp_width(facts),
        heads=heads,
        query_width=heads * size,
        key_value_width=(getattr(facts, "num_key_value_heads", None) or heads) * size,
        vocabulary=facts.vocab_size,
        attention=model.config._attn_implementation or "eager",
        layers_again=len(decoder_layers(model)),
        plain_head=head is not None,
        trained_shapes=tuple(tuple(one.shape) for one in model.parameters() if one.requires_grad),
        trained_head=sum(one.numel() for one in head.parameters() if one.requires_grad) if head is not None else 0,
        adapted=_adapted(model, ends),
        trained_norms=sum(one.numel() for name, one in model.named_parameters() if _is_trained_norm(name, one)),
        unfit="the weights are quantised" if quantization else unfit(model),
        reads_whole=whole,
    )


def _mlp_width(facts: Any) -> int:
    """Of a layer; of different ones on average."""
    if widths := getattr(facts, "mlp_widths", None):
        return -(-sum(widths) // len(widths))
    return getattr(facts, "intermediate_size", None) or 4 * facts.hidden_size


def _check_weights(folder: Path, model: Any) -> None:
    """Raises ArtifactError where a tensor on disk has another shape than the config gives it. Weights that were
    quantised before they were saved have shapes of their own."""
    if getattr(model.config, "quantization_config", None) is not None:
        return
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(wanted.keys() & set(file.keys())):
                found = tuple(file.get_slice(name).get_shape())
                if found != wanted[name]:
                    what = f"holds `{name}` as {list(found)}, and config.json asks for {list(wanted[name])}"
                    raise ArtifactError(str(path), what, hint="one of them is another model's: download both again")


def _ends(model: Any) -> list[Any]:
    """Token embedding and head."""
    return [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]


def _is_trained_norm(name: str, parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.dim() == 1 and name.endswith("norm.weight")


def _adapted(model: torch.nn.Module, ends: Container[int]) -> tuple[AdaptedLinear, ...]:
    """The layers that carry a low-rank side path, as `peft` builds it, and those whose weight is trained. `ends`: by
    id, the weights of embedding and head, which keep nothing of every token."""
    found = []
    for name, module in model.named_modules():
        parent, _, _ = name.rpartition(".")
        if (
            isinstance(module, torch.nn.Linear)
            and module.weight.requires_grad
            and id(module.weight) not in ends
            and "lora_" not in name
        ):
            found.append(AdaptedLinear(parent, module.in_features, module.out_features, r=0, dropout=False))
        for side in getattr(module, "lora_A", {}).values():
            dropouts = getattr(module, "lora_dropout", {}).values()
            dropout = any(not isinstance(one, torch.nn.Identity) for one in dropouts)
            linear: Any = module
            rank = getattr(side, "out_features", len(side) if isinstance(side, torch.nn.Parameter) else 0)
            found.append(AdaptedLinear(parent, linear.in_features, linear.out_features, r=rank, dropout=dropout))
    return tuple(found)
