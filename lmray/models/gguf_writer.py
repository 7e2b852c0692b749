"""A model folder becomes one GGUF file, for llama.cpp and what is built on it.

Keys and tensor names are those of the GGUF specification, through the `gguf` package. Files of architecture `llama`
hold the rows of queries and keys in the order of the original Llama, whose rotation pairs neighbours, where
`transformers` pairs the halves of a head. A Mistral is a `llama` there too; where its heads do not divide its width,
as after pruning, `transformers` cannot read the file back without being told, for it takes it for a Llama. Shapes: H
heads, P pairs of a head.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape, quantize

from lmray.errors import ArtifactError
from lmray.models.gguf_vocabulary import add_vocabulary
from lmray.models.load import load_model
from lmray.models.quiet import quiet
from lmray.pulse import PULSE

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""GGUF's name of what `model_type` says."""
ROTATIONS = ("default", "linear", "llama3")
"""Of positions, by `rope_type`."""


@dataclass(frozen=True)
class Type:
    """How a file holds matrices; whatever has one dimension is float32."""

    matrix: GGMLQuantizationType
    file: LlamaFileType
    narrow: GGMLQuantizationType
    """For matrices whose rows are no multiple of a block."""


_F16 = GGMLQuantizationType.F16
TYPES = {
    "f32": Type(GGMLQuantizationType.F32, LlamaFileType.ALL_F32, GGMLQuantizationType.F32),
    "f16": Type(_F16, LlamaFileType.MOSTLY_F16, _F16),
    "bf16": Type(GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16, GGMLQuantizationType.BF16),
    "q8_0": Type(GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0, _F16),
}
OWN = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def write_gguf(folder: Path, target: Path, *, type: str, name: str) -> None:
    """Writes the model in `folder`, called `name`, to file `target`, its matrices as `type` (`auto`: in the type they
    have). Raises ArtifactError for an architecture, a scaling of positions or a tokenizer that it cannot write."""
    model_type = check_architecture(folder)
    with quiet():
        model: Any = load_model(folder, dtype_of(folder))
    writer = GGUFWriter(target, ARCHITECTURES[model_type])
    how = TYPES[OWN[model.dtype] if type == "auto" else type]
    writer.add_name(name)
    _add_sizes(writer, model.config, folder)
    writer.add_file_type(how.file)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, folder, rows=model.config.vocab_size)
    _write_tensors(writer, model, how)


def check_architecture(folder: Path) -> str:
    """The `model_type` of the model in `folder`. Raises ArtifactError for one that cannot be written."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ArtifactError(f"model folder {folder}", "holds no config.json that can be read") from None
    if found not in ARCHITECTURES:
        hint = "`--format hf` exports it"
        if found == "nemotron-nas":
            hint = "prune it to `shape: uniform` or `padded`: layers of different widths have no GGUF that others read"
        what = f"is a `{found}`, which cannot be written as GGUF"
        raise ArtifactError(f"model folder {folder}", what, allowed=", ".join(ARCHITECTURES), hint=hint)
    return found


def dtype_of(folder: Path) -> str:
    """The type that the weights in `folder` have, as `load_model` names it."""
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = str(written.get("dtype") or written.get("torch_dtype") or "float32")
    return found if found in ("float32", "float16", "bfloat16") else "float32"


def _add_sizes(writer: GGUFWriter, config: Any, folder: Path) -> None:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_context_length(min(config.max_position_embeddings, window))  # within which a window changes nothing
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] not in ROTATIONS:
        found = f"has positions scaled by `{rope['rope_type']}`, which cannot be written as GGUF"
        hint = "`--format hf` exports it"
        raise ArtifactError(f"model folder {folder}", found, allowed=", ".join(ROTATIONS), hint=hint)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _write_tensors(writer: GGUFWriter, model: Any, how: Type) -> None:
    """One after the other, so that one at a time is converted."""
    tensors = list(_named(model, writer.arch))
    for name, tensor in tensors:
        stored = _stored(tensor, how)
        shape = quant_shape_to_byte_shape(tuple(tensor.shape), stored)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), prod(shape), raw_dtype=stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors:
            PULSE.beat(f"writing {name}")
            writer.write_tensor_data(quantize(tensor.float().numpy(), _stored(tensor, how)))
    finally:
        writer.close()


def _stored(tensor: torch.Tensor, how: Type) -> GGMLQuantizationType:
    if tensor.dim() == 1:
        return GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[how.matrix]
    return how.matrix if tensor.shape[-1] % block == 0 else how.narrow


def _named(model: Any, architecture: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights under GGUF's names, in the order of its layers; a tied head is not written."""
    config = model.config
    (known,) = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    if config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", _slowed(model)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        layer = name.split(".")[-2]
        if architecture == "llama" and layer in heads:
            tensor = neighbours_paired(tensor, heads[layer])
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ArtifactError(f"weights `{name}`", f"have no name in GGUF's `{architecture}`")
        yield found, tensor.detach().contiguous()


def neighbours_paired(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of `heads` heads, of which the first half of a head is rotated with the second, in the order in which
    neighbours are."""
    paired_HDP = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2)
    return paired_HDP.reshape(tensor.shape)


def _slowed(model: Any) -> torch.Tensor:
    """By how much every frequency is divided."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    powers = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return config.rope_parameters["rope_theta"] ** -powers / model.model.rotary_emb.inv_freq.float().cpu()
