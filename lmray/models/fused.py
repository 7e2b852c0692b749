"""Faster training steps for models built like Llama: the same numbers by fewer passes over memory.

For the length of a step the linear layers with LoRA run by group, norms, SwiGLU and attention by the functions in
`lmray/ops`, and the examples of a micro-batch lie one behind the other without padding. Outside a step the model is
plain `transformers` and `peft`. Only classes whose parity is tested are replaced.

Shapes: N tokens of a micro-batch, I inputs, E outputs side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLayer

from lmray.ops.lora_linear import lora_linear, make_group
from lmray.ops.packed_attention import Block, Heads, make_blocks, packed_attention
from lmray.ops.rms_norm import rms_norm
from lmray.ops.swiglu import swiglu

FAMILIES = ("Llama", "Mistral", "Qwen2")
"""Architectures whose attention, MLP and norm classes are known, by the start of their names."""
MASKLESS = "lmray_packed"
"""An attention implementation that `transformers` has no mask for, so that it makes none; it is never called."""


def unfit(model: torch.nn.Module) -> str | None:
    """Why `model` with its adapter cannot run fused on a CPU, or None; needs no weights."""
    if not isinstance(model, PeftModel):
        return "weights of the model itself are trained"
    base = model.get_base_model()
    if any(parameter.requires_grad and ".lora_" not in name for name, parameter in base.named_parameters()):
        return "weights besides LoRA's are trained"
    layers = [module for module in base.modules() if isinstance(module, LoraLayer)]
    parts = [part for module in base.modules() if _kind(module) in ("Attention", "MLP") for part in module.children()]
    grouped = {layer for layer in parts if isinstance(layer, LoraLayer)}
    if not grouped or grouped != set(layers):
        return f"LoRA outside attention and MLP of {', '.join(FAMILIES)}"
    if any(isinstance(part, torch.nn.Linear) for part in parts):
        return "LoRA on some of the linear layers only"
    if any(not isinstance(one, torch.nn.Identity) for layer in layers for one in layer.lora_dropout.values()):
        return "LoRA dropout"
    if any(layer.lora_variant for layer in layers):
        return "a variant of LoRA"
    config: Any = base.config
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "sliding-window attention"
    if config.hidden_act != "silu" or getattr(config, "attention_dropout", 0.0):
        return "another activation, or attention dropout"
    return None


def _kind(module: torch.nn.Module) -> str | None:
    """`Attention`, `MLP` or `RMSNorm` of a known family."""
    name = type(module).__name__
    return next((name.removeprefix(family) for family in FAMILIES if name.startswith(family)), None)


class Fused:
    """A model, for which `unfit` said None, whose training steps run fused; placed on its device already."""

    def __init__(self, model: torch.nn.Module):
        self.base: Any = model.get_base_model()  # type: ignore[operator]
        self.blocks: tuple[Block, ...] = ()
        makers = {"Attention": self._attention, "MLP": _mlp, "RMSNorm": _norm}
        found = [(module, makers.get(_kind(module) or "")) for module in self.base.modules()]
        self.forwards = {module: make(module) for module, make in found if make is not None}

    @contextmanager
    def running(self, position_ids_1N: torch.Tensor) -> Iterator[None]:
        """Within the block the model runs fused on one row of examples, each of whose positions start at 0."""
        starts = torch.nonzero(position_ids_1N[0] == 0)[:, 0].tolist()
        ends = [*starts[1:], position_ids_1N.shape[1]]
        self.blocks = make_blocks([end - start for start, end in zip(starts, ends, strict=True)])
        before = self.base.config._attn_implementation
        self.base.config._attn_implementation = MASKLESS
        for module, forward in self.forwards.items():
            module.forward = forward
        try:
            yield
        finally:
            self.base.config._attn_implementation = before
            for module in self.forwards:
                del module.forward

    def _attention(self, module: Any) -> Callable[..., Any]:
        qkv, out = _group(module.q_proj, module.k_proj, module.v_proj), _group(module.o_proj)
        width = module.head_dim
        heads = Heads(module.q_proj.out_features // width, module.k_proj.out_features // width, module.scaling)

        def forward(hidden_states: torch.Tensor, position_embeddings: Any, **_: Any) -> tuple[torch.Tensor, None]:
            cos_1ND, sin_1ND = position_embeddings
            mixed_NE = packed_attention(qkv(hidden_states[0]), (cos_1ND[0], sin_1ND[0]), self.blocks, heads)
            return out(mixed_NE)[None], None

        return forward


def _mlp(module: Any) -> Callable[..., Any]:
    both, down = _group(module.gate_proj, module.up_proj), _group(module.down_proj)
    return lambda hidden: down(swiglu(both(hidden[0])))[None]


def _norm(module: Any) -> Callable[..., Any]:
    return lambda hidden: rms_norm(hidden, module.weight, module.variance_epsilon)


def _group(*layers: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """`layers`, which share an input, as one function of it. Their frozen weights become rows of the group's, so that
    nothing is held twice."""
    bases = [layer.base_layer for layer in layers]
    factors: Sequence[torch.Tensor] = [
        weight for layer in layers for weight in (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    ]
    group = make_group(
        [base.weight for base in bases],
        [base.bias for base in bases],
        ranks=[len(a_rI) for a_rI in factors[::2]],
        scales=[layer.scaling["default"] for layer in layers],
    )
    for base, rows in zip(bases, group.stacked_MI[: group.num_outputs].split(group.sizes), strict=True):
        base.weight.data = rows
    return partial(lora_linear, group=group, factors=factors)
