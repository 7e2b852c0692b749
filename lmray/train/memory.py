"""How much memory one training worker takes, by part, from what the backward pass keeps.

Of every layer and token autograd keeps (D hidden, Q queries, K keys, I MLP, w bytes a number, T tokens a row):
the inputs of the adapters' first matrices (layers that share an input keep it once) and their r outputs; queries,
keys, values and the output of attention, with one float32 a head; the float32 inputs of two norms; of the gated MLP
gate, activated gate and up. A row that several examples share also needs a mask of T numbers a token, and on a CPU
keys and values repeated for every query head. A search of masks needs values, gate and up as they were before the
masks as well. Norms whose weight is trained also keep what they multiply it with; frozen matrices keep nothing but
themselves. Fused steps keep what `_fused_bytes` lists.
`tests/unit/train/test_memory.py` holds this sum to what `saved_tensors_hooks` counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import psutil

from lmray.data import batch
from lmray.data.stream import Stream
from lmray.models.shape import WIDTH, AdaptedLinear, ModelShape
from lmray.ops.linear_cross_entropy import chunk_rows
from lmray.sharding.base import Sharding

HEAP_SHARE = 0.5
"""What the C library's heap adds to kept tensors on a CPU: temporaries freed between them leave holes that later
tensors do not fill. `tests/bench/memory.py` found 0.3 to 0.9 of them, half on average."""
FUSED_SHARE = {4: 0.0, 2: 0.35}
"""The same where steps run fused, by the bytes of a number: they free little in between."""
FUSED_BYTES = 140 * 2**20
"""Code and buffers of the products that fused steps are made of, in all."""
CUDA_SHARE = 0.1
"""The same for PyTorch's CUDA allocator, which keeps blocks of similar sizes."""
CUDA_PROCESS_BYTES = 512 * 2**20
"""Context and kernels that a process keeps on a GPU."""
USABLE = 0.9
"""Share of a machine's memory that a micro-batch is fitted into."""


@dataclass(frozen=True)
class Rows:
    """The micro-batch to plan for: as many rows of the longest length, with the most supervised tokens there are."""

    count: int
    tokens: int
    """Of the longest row."""
    supervised: int
    """Of the rows with most, on average over `count`."""
    packed: bool
    """Whether any row holds several examples."""
    fused: bool = False
    """Whether steps run by `lmray.models.fused`."""
    eager: bool = False
    """Whether attention keeps its weights, T numbers a token and head."""
    again: bool = False
    """Whether layers keep their inputs only, and all else of one at a time."""
    searched: bool = False
    """Whether masks learn from them, by what they are laid on."""
    distilled: bool = False
    """Whether the model is also held to itself without masks, by all logits of both."""
    search: Rows | None = None
    """One row to search masks on, the one that takes most; a search takes `searched_at_once` of them."""


def worst_rows(rows: batch.Rows | Stream, count: int, *, fused: bool = False) -> Rows:
    """The micro-batch of `count` out of `rows` that takes most memory."""
    supervised = np.sort(rows.supervised)[-count:]
    tokens = int(rows.lengths.max())
    return Rows(count, tokens, -(-int(supervised.sum()) // len(supervised)), bool((rows.sizes > 1).any()), fused)


def searched_at_once(micro_batch: int) -> int:
    """Rows of one forward pass where masks are searched. They keep up to four tenths more each than rows to train on,
    and leave larger holes on a CPU's heap, where half as many took no more time."""
    return max(1, micro_batch // 2)


def kept_bytes(shape: ModelShape, rows: Rows, dtype: str, *, device: str = "cpu") -> int:
    """What autograd keeps of all layers for one micro-batch; the module docstring says of which tensors."""
    if rows.again:
        inputs = rows.count * rows.tokens * shape.hidden * WIDTH[dtype]
        one_layer = kept_bytes(shape, replace(rows, again=False), dtype, device=device) // shape.layers
        return shape.layers * inputs + one_layer
    if rows.fused:
        return rows.count * rows.tokens * shape.layers * _fused_bytes(shape, WIDTH[dtype])
    width, repeated = WIDTH[dtype], rows.packed and device == "cpu"
    keys = shape.query_width if repeated else shape.key_value_width
    layer = width * (2 * shape.query_width + 2 * keys + 3 * shape.intermediate) + 4 * shape.heads
    layer += 2 * (4 * shape.hidden + 4)
    if rows.packed:
        layer += width * rows.tokens
    if rows.searched:
        layer += width * (shape.key_value_width + 2 * shape.intermediate)
    if rows.eager:
        layer += shape.heads * rows.tokens * (4 + (width if width < 4 else 0))
    return rows.count * rows.tokens * (shape.layers * layer + 4 * shape.trained_norms + _adapter_bytes(shape, width))


def _fused_bytes(shape: ModelShape, width: int) -> int:
    """A token's share of what one layer keeps where it runs fused: norms' inputs and outputs, with one float32 each;
    queries, keys, values and attention's output, which is kept again as the next layer's input; gate, up and their
    product; the adapters' r outputs, those of gate and up twice, for they share the memory of these."""
    kept = 4 * shape.hidden + 3 * shape.query_width + 2 * shape.key_value_width + 3 * shape.intermediate
    kept += sum(one.r * (1 + (one.out_features == shape.intermediate)) for one in shape.adapted) // shape.layers
    return width * kept + 4 * (shape.heads + 2)


def _adapter_bytes(shape: ModelShape, width: int) -> int:
    """A token's inputs and low-rank outputs of all adapted layers. With dropout each layer has an input and a mask of
    its own. The output of attention is also the input of what follows it: counted there."""
    inner = sum(one.r for one in shape.adapted) * width
    if any(one.dropout for one in shape.adapted):
        return inner + 2 * width * sum(one.in_features for one in shape.adapted)
    if shape.trained_norms and width < 4:  # norms give float32 then, of which every layer makes a copy of its own
        return inner + width * (sum(one.in_features for one in shape.adapted) - shape.layers * shape.query_width)
    shared = {(one.parent, one.in_features) for one in shape.adapted if not _follows_attention(one, shape)}
    return inner + width * sum(in_features for _, in_features in shared)


def _follows_attention(one: AdaptedLinear, shape: ModelShape) -> bool:
    is_output = one.in_features == shape.query_width and one.out_features == shape.hidden
    return is_output and shape.query_width != shape.hidden


def memory_parts(
    shape: ModelShape,
    rows: Rows,
    dtype: str,
    *,
    optimizer_bytes: int,
    device: str,
    process_bytes: int,
    workers: int = 1,
    sharding: Sharding | None = None,
    reads_whole: bool = False,
) -> dict[str, int]:
    """Bytes by part and in `total`. `sharding`: what the `workers` share of weights, gradients and optimizer state, and
    what they hold for it: `masters`, `buffers`, and who has a part of the weights those it computes with, `gathered`.
    `reads_whole`: all weights were there before they were divided, and what that took beyond the rest is `loading`.
    Bfloat16 models also multiply with bfloat16 copies of weights that are trained in float32."""
    divides = sharding.divides if sharding else frozenset()
    copies = shape.trained * WIDTH[dtype] if shape.trained_bytes > shape.trained * WIDTH[dtype] else 0
    sizes = {"weights": shape.weights_bytes, "gradients": shape.trained_bytes, "optimizer": optimizer_bytes}
    parts = {part: -(-size // (workers if part in divides else 1)) for part, size in sizes.items()}
    if sharding and sharding.keeps_masters:
        parts["masters"] = -(-4 * shape.trained // workers)
        parts["buffers"] = sharding.buffer_bytes(shape.trained)
    shares_weights = workers > 1 and "weights" in divides
    if sharding and shares_weights:
        casts = bool(copies) and sharding.gathers_masters
        parts["gathered"] = _gathered(shape, "float32" if casts else dtype)
        copies = copies if casts else 0  # each product keeps its own for the backward pass
    parts |= {
        "activations": _activations(shape, rows, dtype, device) + copies,
        "logits": _logits(shape, rows, dtype, device),
        **({"search": _beyond_a_step(shape, rows, dtype, device)} if rows.search else {}),
        "process": CUDA_PROCESS_BYTES if device == "cuda" else process_bytes,
    }
    if shares_weights and reads_whole:
        parts["loading"] = max(0, shape.weights_bytes + parts["process"] - sum(parts.values()))
    return parts | {"total": sum(parts.values())}


def _gathered(shape: ModelShape, dtype: str) -> int:
    """Embedding and head, and two blocks, the one that is computed with and the next, in the type that is multiplied
    in."""
    blocks = (shape.base - shape.embedding) // shape.layers * 2
    return (shape.embedding + blocks) * WIDTH[dtype]


def bytes_per_row(shape: ModelShape, rows: Rows, dtype: str, *, device: str) -> int:
    """What one more row in the micro-batch takes, or every second of a search; a row after that takes no more."""
    own = _row(shape, rows, dtype, device)
    return own if rows.search is None else max(own, -(-_row(shape, rows.search, dtype, device) // 2))


def _beyond_a_step(shape: ModelShape, rows: Rows, dtype: str, device: str) -> int:
    """What a search may take more than a step. With m rows a step takes m s bytes, a search max(1, m // 2) t: both are
    at most m r + max(0, t - r), r = max(s, t / 2), which is what is planned for any m."""
    assert rows.search is not None
    own, searched = _row(shape, rows, dtype, device), _row(shape, rows.search, dtype, device)
    each = bytes_per_row(shape, rows, dtype, device=device)
    return rows.count * (each - own) + max(0, searched - each)


def _row(shape: ModelShape, rows: Rows, dtype: str, device: str) -> int:
    more = replace(rows, count=rows.count + 1)
    activations = _activations(shape, more, dtype, device) - _activations(shape, rows, dtype, device)
    return activations + _logits(shape, more, dtype, device) - _logits(shape, rows, dtype, device)


def _activations(shape: ModelShape, rows: Rows, dtype: str, device: str) -> int:
    kept = kept_bytes(shape, rows, dtype, device=device)
    if rows.fused:
        return int(kept * (1 + FUSED_SHARE[WIDTH[dtype]])) + FUSED_BYTES
    return int(kept * (1 + (CUDA_SHARE if device == "cuda" else HEAP_SHARE)))


def _logits(shape: ModelShape, rows: Rows, dtype: str, device: str) -> int:
    """Of supervised tokens only. Of a plain head: a chunk's logits as they leave it and in float32, every token's input
    and gradient, and of a head that is trained the float32 gradient and what a chunk adds to it. Else all logits as
    they leave the head, and in float32 with their gradient."""
    width, tokens = WIDTH[dtype], rows.count * rows.supervised
    low = width if width < 4 else 0
    if rows.distilled:  # two models' logits; in float32 their logarithms, a probability, and two gradients
        return tokens * shape.vocabulary * (2 * width + 5 * 4)
    if not shape.plain_head:
        return tokens * shape.vocabulary * (2 * 4 + low)
    held = min(tokens, chunk_rows(shape.vocabulary, device))
    return held * shape.vocabulary * (4 + low) + tokens * shape.hidden * 2 * width + shape.trained_head * (4 + width)


def largest_micro_batch(total_bytes: int, *, rows: int, row_bytes: int, memory_bytes: int) -> int:
    """The most rows of one forward pass that fit into `memory_bytes`, where `rows` of `row_bytes` each make the worker
    take `total_bytes`; 0 where none does."""
    fixed = total_bytes - rows * row_bytes
    return max(0, int((USABLE * memory_bytes - fixed) // row_bytes))


def process_bytes() -> int:
    """What this process takes now. Called where libraries and data are loaded and no weight is: a worker holds the
    same."""
    return psutil.Process().memory_info().rss
