"""Causal attention within each of several examples that lie one behind the other, with rotary positions.

No mask and no padding outside: examples of like length are laid side by side for one call of the fused attention
kernel, padded at their ends only, where causal attention never looks. Rotary embedding: Su et al., arXiv 2104.09864,
equation 34, in the half-split order of `transformers`.

Shapes: N tokens of all examples, H query heads, K key and value heads, D head width, T tokens of a group's longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

WASTE = 0.7
"""An example shorter than this share of its group's longest starts a new group."""

ROUNDED = 16
"""Lengths of groups are multiples of this, so that the kernel sees few sizes."""
SHORT = 384
"""Up to this many tokens the kernel's backward pass is faster in float32: six times at 74 tokens, even at about 400."""

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Block:
    """Examples of like length."""

    tokens_M: torch.Tensor
    """Where their tokens lie among the N."""
    places_M: torch.Tensor
    """Where those go among the `num_examples` x `length` places."""
    num_examples: int
    length: int


def make_blocks(lengths: Sequence[int], device: torch.device | str = "cpu") -> tuple[Block, ...]:
    """Groups examples of `lengths` tokens, given in the order they lie in, by like length."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not groups or lengths[index] < WASTE * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(index)
    blocks = []
    for group in groups:
        longest = -(-lengths[group[0]] // ROUNDED) * ROUNDED
        tokens = [torch.arange(starts[index], starts[index + 1]) for index in group]
        places = [torch.arange(row * longest, row * longest + lengths[index]) for row, index in enumerate(group)]
        blocks.append(Block(torch.cat(tokens).to(device), torch.cat(places).to(device), len(group), longest))
    return tuple(blocks)


@dataclass(frozen=True)
class Heads:
    """How a row of queries, keys and values is divided."""

    num_heads: int
    num_kv_heads: int
    scale: float
    """Of the scores, before the softmax."""


def packed_attention(
    qkv_NE: torch.Tensor, angles_ND: tuple[torch.Tensor, torch.Tensor], blocks: tuple[Block, ...], heads: Heads
) -> torch.Tensor:
    """Attention's output [N, H D] of queries, keys and values side by side in `qkv_NE`, E = (H + 2 K) D, not yet
    rotated. `angles_ND`: cosine and sine of every token's position."""
    return _PackedAttention.apply(qkv_NE, angles_ND, blocks, heads)  # type: ignore[return-value]


def _rotated(x_NHD: torch.Tensor, cos_N1C: torch.Tensor, sin_N1C: torch.Tensor, sign: int) -> torch.Tensor:
    """`x_NHD` turned by its positions' angles, back again for sign -1; C = D / 2."""
    one, two = x_NHD.chunk(2, dim=-1)
    out = torch.empty(x_NHD.shape, dtype=x_NHD.dtype, device=x_NHD.device)
    first, second = out.chunk(2, dim=-1)
    torch.mul(one, cos_N1C, out=first).addcmul_(two, sin_N1C, value=-sign)
    torch.mul(two, cos_N1C, out=second).addcmul_(one, sin_N1C, value=sign)
    return out


def _laid_out(x_NHD: torch.Tensor, block: Block) -> torch.Tensor:
    """The block's tokens as [examples, H, T, D], zeros behind each example."""
    if len(block.places_M) == block.num_examples * block.length == len(x_NHD):
        padded = x_NHD.contiguous()  # a copy of a part, so that the whole is not kept
    else:
        padded = x_NHD.new_zeros(block.num_examples * block.length, *x_NHD.shape[1:])
        padded.index_copy_(0, block.places_M, x_NHD.index_select(0, block.tokens_M))
    return padded.unflatten(0, (block.num_examples, block.length)).transpose(1, 2)


def _gather(out_NHD: torch.Tensor, x_BHTD: torch.Tensor, block: Block) -> None:
    """Writes the block's tokens of `x_BHTD` to their places among the N."""
    flat = x_BHTD.transpose(1, 2).flatten(0, 1)
    out_NHD.index_copy_(0, block.tokens_M, flat.index_select(0, block.places_M))


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_NE: torch.Tensor, angles_ND: Any, blocks: tuple[Block, ...], heads: Heads):
        cos, sin = (one[:, None, : one.shape[-1] // 2] for one in angles_ND)
        turning = heads.num_heads + heads.num_kv_heads
        heads_NHD = qkv_NE.unflatten(-1, (turning + heads.num_kv_heads, -1))
        turned, values = _rotated(heads_NHD[:, :turning], cos, sin, 1), heads_NHD[:, turning:]
        out_NHD = turned.new_empty(len(turned), heads.num_heads, turned.shape[-1])
        kept = []
        for block in blocks:
            q, k = _laid_out(turned, block).split([heads.num_heads, heads.num_kv_heads], dim=1)
            v = _laid_out(values, block)
            out, lse = _attend(q, k, v, 0.0, True, scale=heads.scale)
            _gather(out_NHD, out, block)
            kept += [q, k, v, out, lse]
        ctx.save_for_backward(cos, sin, *kept)
        ctx.blocks, ctx.heads = blocks, heads
        return out_NHD.flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, *kept = ctx.saved_tensors
        heads: Heads = ctx.heads
        dout_NHD = grads[0].unflatten(-1, (heads.num_heads, -1))
        turning = heads.num_heads + heads.num_kv_heads
        dqkv = dout_NHD.new_empty(len(dout_NHD), turning + heads.num_kv_heads, dout_NHD.shape[-1])
        for index, block in enumerate(ctx.blocks):
            *given, lse = kept[5 * index : 5 * index + 5]
            given.insert(0, _laid_out(dout_NHD, block))
            if block.length <= SHORT:
                given = [one.float() for one in given]
            found = _attend_backward(*given, lse, 0.0, True, scale=heads.scale)
            _gather(dqkv, torch.cat(found, dim=1).to(dqkv.dtype), block)
        dqkv[:, :turning] = _rotated(dqkv[:, :turning], cos, sin, -1)
        return dqkv.flatten(1), None, None, None
