"""One forward pass over tokens of many requests, for models built like Llama: no padding, blocks of keys and values,
adapters of every row in the same pass.

It reads the model's modules and calls none but its rotary positions and its activation. Layers may differ in width.

Shapes: N tokens of a step, I hidden width, H query heads, K key and value heads, E = H + 2K, D head width, V
vocabulary, n rows whose logits are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, PeftType
from peft.tuners.lora.layer import Linear as LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lmray.models.hetero import DeciLMForCausalLM
from lmray.models.rope import follows_length
from lmray.ops.frozen_linear import FrozenLinear, PackedLinear, can_pack
from lmray.ops.low_rank import LowRankStack, Piece
from lmray.ops.paged_attention import Group, PagedAttention, Run
from lmray.ops.pointwise import Pointwise

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Architectures whose classes are known, by the start of their names."""
ATTENTION = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class Batch:
    """What one step reads: first one token of each sequence in `groups`, then `runs`."""

    ids_N: torch.Tensor
    positions_N: torch.Tensor
    places_N: torch.Tensor
    """Where keys and values go, see `PagedAttention.write`."""
    groups: Sequence[Group]
    runs: Sequence[Run]
    drawn_n: torch.Tensor
    """Rows whose logits are needed."""
    pieces: Sequence[Piece] = ()
    drawn_pieces: Sequence[Piece] = ()
    """The same of the n rows."""
    adapters: frozenset[str] = frozenset()
    """Handles of the adapters that `pieces` are of."""


def linear_of(module: Any) -> Any:
    """A linear layer itself, where PEFT wraps it too."""
    return module.base_layer if isinstance(module, LoraLayer) else module


class Linears:
    """Linear layers that share an input, as one product, with their adapters."""

    def __init__(self, parent: str, module: Any, names: Sequence[str]):
        self.names = tuple(f"{parent}.{name}" if parent else name for name in names)
        layers = [linear_of(getattr(module, name)) for name in names]
        self.sizes = [layer.out_features for layer in layers]
        self.num_inputs: int = layers[0].in_features
        weights = _side_by_side([layer.weight for layer in layers])
        biases: list[Any] = [layer.bias for layer in layers]
        if len(weights) == 1 and any(bias is not None for bias in biases):
            filled = [
                layer.weight.new_zeros(size) if layer.bias is None else layer.bias.detach()
                for layer, size in zip(layers, self.sizes, strict=True)
            ]
            biases = [torch.cat(filled)]
        self.products: Sequence[FrozenLinear | PackedLinear] = [
            FrozenLinear(weight, bias) for weight, bias in zip(weights, biases, strict=False)
        ]
        self._layers, self._like = layers, weights[0].new_empty(0)
        self.stack: LowRankStack | None = None
        self.adapters: set[str] = set()

    def __call__(self, x_NI: torch.Tensor, pieces: Sequence[Piece], adapters: frozenset[str]) -> torch.Tensor:
        """The outputs side by side."""
        found = [product(x_NI) for product in self.products]
        y_NO = found[0] if len(found) == 1 else torch.cat(found, dim=-1)
        if self.stack is not None and not adapters.isdisjoint(self.adapters):
            self.stack.add(y_NO, x_NI, pieces)
        return y_NO

    def pack(self) -> None:
        """Keeps the weights packed alone, where that is faster; the model's layers are left without them."""
        plain = [product for product in self.products if isinstance(product, FrozenLinear) and can_pack(product)]
        if len(plain) == len(self.products):
            self.products = [PackedLinear(product) for product in plain]
            for layer in self._layers:
                layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)

    def put(self, handle: str, part: int, slots: range, factors: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Adds adapter `handle` to layer `part`: A [r, inputs] and B [outputs, r] with its scale."""
        if self.stack is None:
            self.stack = LowRankStack(self.sizes, self.num_inputs, self._like)
        self.adapters.add(handle)  # first, so that `drop` clears what a failure leaves
        self.stack.put(part, slots, *factors)

    def drop(self, handle: str, slots: range) -> None:
        if handle in self.adapters:
            assert self.stack is not None
            self.stack.clear(slots)
            self.adapters.discard(handle)
        if not self.adapters:
            self.stack = None


def _side_by_side(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`weights` as rows of one matrix, of which they become views, so that nothing is held twice.

    Weights that are trained stay where their optimizer knows them, and are multiplied one by one.
    """
    first = weights[0].detach()
    if len(weights) == 1 or any(weight.requires_grad for weight in weights):
        return [weight.detach() for weight in weights]
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    total = sum(len(weight) for weight in weights)
    adjacent = all(end == weight.data_ptr() for end, weight in zip(ends, weights[1:], strict=False))
    room = first.untyped_storage().nbytes() // first.itemsize - first.storage_offset()
    if adjacent and room >= total * first.shape[1] and all(weight.is_contiguous() for weight in weights):
        return [first.as_strided((total, first.shape[1]), (first.shape[1], 1))]
    stacked = torch.cat([weight.detach() for weight in weights])
    for weight, rows in zip(weights, stacked.split([len(weight) for weight in weights]), strict=True):
        weight.data = rows
    return [stacked]


@dataclass
class _Layer:
    """One decoder layer: its weights and where its keys and values are."""

    name: str
    module: Any
    kv: slice
    ops: Pointwise
    qkv: Linears = field(init=False)
    out: Linears = field(init=False)
    both: Linears = field(init=False)
    down: Linears = field(init=False)

    def __post_init__(self) -> None:
        attention, mlp = self.module.self_attn, self.module.mlp
        self.qkv = Linears(f"{self.name}.self_attn", attention, ATTENTION)
        self.out = Linears(f"{self.name}.self_attn", attention, ["o_proj"])
        self.both = Linears(f"{self.name}.mlp", mlp, MLP)
        self.down = Linears(f"{self.name}.mlp", mlp, ["down_proj"])
        self.scale: float = attention.scaling
        self.num_heads = self.qkv.sizes[0] // attention.head_dim
        self.head_dim: int = attention.head_dim
        self.head_norms = [_norm(attention.q_norm), _norm(attention.k_norm)] if hasattr(attention, "q_norm") else []
        self.norm, self.mlp_norm = _norm(self.module.input_layernorm), _norm(self.module.post_attention_layernorm)
        self.activation = mlp.act_fn

    def forward(self, x_NI: torch.Tensor, angles: Any, batch: Batch, attention: PagedAttention) -> torch.Tensor:
        told, ops = (batch.pieces, batch.adapters), self.ops
        qkv_NED = self.qkv(ops.rms_norm(x_NI, *self.norm), *told).unflatten(-1, (-1, self.head_dim))
        self._turn(qkv_NED, angles)
        attention.write(self.kv, qkv_NED[:, self.num_heads :], batch.places_N)
        mixed_NI = self.out(self._attend(qkv_NED, batch, attention), *told)
        x_NI, normed_NI = ops.add_rms_norm(x_NI, mixed_NI, *self.mlp_norm)
        gate_NF, up_NF = self.both(normed_NI, *told).split(self.both.sizes, dim=-1)
        return x_NI + self.down(ops.gate(gate_NF, up_NF, self.activation), *told)

    def _turn(self, qkv_NED: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Norms of heads, where the model has them, and rotary positions, in place."""
        num_kv = (qkv_NED.shape[1] - self.num_heads) // 2
        for norm, part_NHD in zip(self.head_norms, qkv_NED.split([self.num_heads, num_kv, num_kv], 1), strict=False):
            part_NHD.copy_(self.ops.rms_norm(part_NHD, *norm))
        self.ops.rotate(qkv_NED[:, : self.num_heads + num_kv], *angles)

    def _attend(self, qkv_NED: torch.Tensor, batch: Batch, attention: PagedAttention) -> torch.Tensor:
        num_single = sum(len(group.rows_n) for group in batch.groups)
        if len(batch.groups) == 1 and not batch.runs:
            return attention.one_each(qkv_NED[:, : self.num_heads], self.kv, batch.groups[0], self.scale)
        mixed_NI = qkv_NED.new_empty(len(qkv_NED), self.num_heads * self.head_dim)
        for group in batch.groups:
            one = attention.one_each(qkv_NED[:num_single, : self.num_heads], self.kv, group, self.scale)
            mixed_NI.index_copy_(0, group.rows_n, one)
        for run in batch.runs:
            mixed_NI[run.rows] = attention.run(qkv_NED[run.rows], self.kv, run, self.scale)
        return mixed_NI


def _norm(module: Any) -> tuple[torch.Tensor, float]:
    """Weight and epsilon of a root-mean-square norm."""
    return module.weight.detach(), module.variance_epsilon


class Decoder:
    """A model for which `unfit` said None."""

    def __init__(self, model: nn.Module, *, compiled: bool = False):
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        inner = base.model
        self._embedding = inner.embed_tokens.weight.detach()
        self._rotary, self._norm = inner.rotary_emb, _norm(inner.norm)
        self._ops = Pointwise().compiled() if compiled else Pointwise()
        self.layers: list[_Layer] = []
        end = 0
        for index, module in enumerate(inner.layers):
            start, end = end, end + 2 * linear_of(module.self_attn.k_proj).out_features // module.self_attn.head_dim
            self.layers.append(_Layer(f"model.layers.{index}", module, slice(start, end), self._ops))
        self.head = Linears("", base, ["lm_head"])
        self.num_kv = end
        """Heads of keys and of values, of all layers together."""
        self.head_dim = self.layers[0].head_dim

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def weights(self) -> str:
        """How the linear layers' weights are kept: `plain` or `packed`."""
        return "packed" if isinstance(self.layers[0].qkv.products[0], PackedLinear) else "plain"

    def pack(self) -> None:
        """Keeps the weights of linear layers in the layout that multiplies fastest, where there is another one, and
        takes them out of the model, which this runs from now on and nothing else can."""
        for one in self.linears():
            one.pack()

    def clear(self, blocks_M: torch.Tensor, attention: PagedAttention) -> None:
        """Zeroes blocks of all layers."""
        for layer in self.layers:
            attention.clear(layer.kv, blocks_M)

    def linears(self) -> list[Linears]:
        """All that can carry an adapter."""
        return [self.head, *(one for layer in self.layers for one in (layer.qkv, layer.out, layer.both, layer.down))]

    def forward(self, batch: Batch, attention: PagedAttention) -> torch.Tensor:
        """Logits [n, V] after the rows that `batch` names."""
        x_NI = F.embedding(batch.ids_N, self._embedding)
        cos, sin = self._rotary(x_NI[None], batch.positions_N[None])
        half = self.head_dim // 2
        signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        angles = cos[0][:, None], signed[0][:, None]
        for layer in self.layers:
            x_NI = layer.forward(x_NI, angles, batch, attention)
        drawn_nI = self._ops.rms_norm(x_NI.index_select(0, batch.drawn_n), *self._norm)
        return self.head(drawn_nI, batch.drawn_pieces, batch.adapters)


def unfit(model: nn.Module) -> str | None:
    """Why `model`, plain or with PEFT adapters, cannot run through `Decoder`, or None."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    name = type(base).__name__
    family = next((one for one in FAMILIES if name == f"{one}ForCausalLM"), None)
    if type(base) is DeciLMForCausalLM:
        family = "Mistral"
    elif family is None or not type(base).__module__.startswith("transformers.models."):
        return f"{name} is none of {', '.join(f'{one}ForCausalLM' for one in FAMILIES)}"
    if isinstance(model, PeftModel) and any(one.peft_type != PeftType.LORA for one in model.peft_config.values()):
        return "an adapter of another kind than LoRA is attached"
    if follows_length(base.config):
        return "its positions follow the length of each example"
    return _unfit_modules(base, family) or _unfit_weights(base)


def _unfit_modules(base: Any, family: str) -> str | None:
    for module in base.modules():
        if isinstance(module, BaseTunerLayer) and (type(module) is not LoraLayer or module.lora_variant):
            return f"PEFT attached a {type(module).__name__} of a kind of its own"
        if isinstance(module, LoraLayer) and (module.merged or any(module.lora_bias.values())):
            return "an attached adapter is merged, or has biases"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{type(module).__name__} has hooks or a forward of its own"
    dims = set()
    for layer in base.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        if type(attention).__name__ != f"{family}Attention" or type(mlp).__name__ != f"{family}MLP":
            return f"its layers have {type(attention).__name__} and {type(mlp).__name__}"
        parts = [getattr(attention, one) for one in (*ATTENTION, "o_proj")] + [getattr(mlp, one) for one in MLP]
        for part in map(linear_of, [*parts, mlp.down_proj, base.lm_head]):
            if type(part) is not nn.Linear:
                return f"its linear layers are {type(part).__name__}"
        num_heads, num_kv = (linear_of(one).out_features // attention.head_dim for one in parts[:2])
        if num_heads != num_kv * attention.num_key_value_groups:
            return f"a layer has {num_heads} query heads over {num_kv} key-value heads"
        dims.add(attention.head_dim)
    return None if len(dims) == 1 else "the width of a head differs between layers"


def _unfit_weights(base: Any) -> str | None:
    weights = [one for name, one in base.named_parameters() if ".lora_" not in name]
    if any(type(one.data) is not torch.Tensor or not one.numel() for one in weights):
        return "its weights are spread over processes"
    if len({(one.dtype, one.device) for one in weights}) > 1:
        return "its weights are of several types, or on several devices"
    stated = base.config.dtype
    if weights[0].dtype == torch.float32 and stated not in (None, torch.float32):
        return f"it is kept in float32 and computes in {stated}"
    return None
