"""A model as a GGUF file: read back by plain transformers, with equal logits, tokens and template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store
from lmray.errors import ArtifactError
from lmray.models.export import export
from lmray.models.gguf_writer import neighbours_paired, write_gguf
from lmray.models.source import find_model
from lmray.pruning.structure import structure_of
from lmray.testing.tiny import CHATML, tiny_adapter_folder
from tests.unit.pruning.models import save

TEXTS = [
    "関数を呼ぶ前に、引数を1234個 数えます。",
    "def call(x):\n    return  x + 42  # it's\n\n",
    " The  theory of 3.14",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def byte_level(**more):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **more)


def after(regex: str):
    split = pre_tokenizers.Split(Regex(regex), behavior="isolated")
    return pre_tokenizers.Sequence([split, byte_level(use_regex=False)])


def make_tokenizer(splitting=None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, two control tokens and an added word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitting or byte_level()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>")
    fast.add_tokens(["<think>"])
    fast.chat_template = CHATML
    return fast


TOKENIZER = make_tokenizer()
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": len(TOKENIZER) + 5,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
}
CONFIGS = {
    "llama, tied": lambda: LlamaConfig(**COMMON, tie_word_embeddings=True),
    "llama, wide heads": lambda: LlamaConfig(**COMMON, head_dim=16),
    "llama with biases": lambda: LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=128),
}
IDS = torch.randint(3, 250, (2, 21), generator=torch.Generator().manual_seed(0))


def make_folder(folder: Path, config, dtype=torch.float32, tokenizer=TOKENIZER) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(folder: Path, **more) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()(IDS).logits


def written(tmp_path: Path, config, type: str = "auto", **more) -> tuple[Path, Path]:
    """A model folder, and the GGUF file of it."""
    folder = make_folder(tmp_path / "模型", config, **more)
    write_gguf(folder, tmp_path / "関数.gguf", type=type, name="関数")
    return folder, tmp_path / "関数.gguf"


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_the_same_model_back(name, tmp_path: Path):
    folder, file = written(tmp_path, CONFIGS[name]())
    more = {"config": CONFIGS[name]()} if "biases" in name else {}  # of which a GGUF's keys say nothing
    again = logits(tmp_path, gguf_file=file.name, **more)
    assert torch.allclose(again, logits(folder), atol=1e-4)


def test_heads_that_do_not_divide_the_width_are_written_too(tmp_path: Path):
    """As after pruning. Transformers takes the file for a Llama's, and has to be told what a Llama may not be."""
    config = MistralConfig(
        **{**COMMON, "num_attention_heads": 6, "num_key_value_heads": 3}, head_dim=8, sliding_window=None
    )
    folder, file = written(tmp_path, config)
    told = LlamaConfig(**COMMON, head_dim=8)
    told.num_attention_heads, told.num_key_value_heads = 6, 3
    assert torch.allclose(logits(tmp_path, gguf_file=file.name, config=told), logits(folder), atol=1e-4)


def test_the_keys_say_what_the_config_says(tmp_path: Path):
    config = LlamaConfig(**COMMON, head_dim=16)
    _, file = written(tmp_path, config)
    fields = {name: field.contents() for name, field in GGUFReader(file).fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.name": "関数",
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 4,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 5000.0,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": TOKENIZER.bos_token_id,
        "tokenizer.ggml.eos_token_id": TOKENIZER.eos_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }
    assert {name: fields.get(name) for name in expected} == expected
    types = fields["tokenizer.ggml.token_type"]
    kinds = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED, gguf.TokenType.NORMAL
    places = TOKENIZER.eos_token_id, TOKENIZER.convert_tokens_to_ids("<think>"), config.vocab_size - 1, 5
    assert tuple(types[place] for place in places) == kinds


SPLITTINGS = {
    "gpt-2": lambda: byte_level(),
    "llama3": lambda: after(LLAMA3),
    "qwen2": lambda: after(QWEN2),
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()]),
}


@pytest.mark.parametrize("name", SPLITTINGS)
def test_text_is_read_as_the_same_tokens(name, tmp_path: Path):
    tokenizer = make_tokenizer(SPLITTINGS[name]())
    config = LlamaConfig(**{**COMMON, "vocab_size": len(tokenizer)})
    folder, file = written(tmp_path, config, tokenizer=tokenizer)
    assert GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == name
    plain, again = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert again.chat_template == plain.chat_template
    if name != "smollm":  # which transformers takes for gpt-2
        asked = [*TEXTS, "<|im_start|>user\n<think>はい<|im_end|>"]
        assert again(asked)["input_ids"] == plain(asked)["input_ids"]


def test_a_begin_token_that_the_tokenizer_adds_is_told(tmp_path: Path):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    _, file = written(tmp_path, LlamaConfig(**COMMON), tokenizer=tokenizer)
    assert GGUFReader(file).fields["tokenizer.ggml.add_bos_token"].contents() is True


TYPES = {
    "f32": (GGMLQuantizationType.F32, GGMLQuantizationType.F32, 0.0),
    "f16": (GGMLQuantizationType.F16, GGMLQuantizationType.F16, 1e-3),
    "bf16": (GGMLQuantizationType.BF16, GGMLQuantizationType.BF16, 8e-3),
    "q8_0": (GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16, 2e-2),
}


@pytest.mark.parametrize("type", TYPES)
def test_matrices_have_the_type_that_was_asked_for(type, tmp_path: Path):
    wide, narrow, error = TYPES[type]
    config = MistralConfig(**{**COMMON, "intermediate_size": 100}, sliding_window=None)  # 100: no multiple of a block
    folder, file = written(tmp_path, config, type)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    tensors = {one.name: one for one in GGUFReader(file).tensors}
    up, down, norm = (tensors[f"blk.1.{name}.weight"] for name in ("ffn_up", "ffn_down", "ffn_norm"))
    assert (up.tensor_type, down.tensor_type, norm.tensor_type) == (wide, narrow, GGMLQuantizationType.F32)
    found = torch.from_numpy(np.copy(dequantize(up.data, up.tensor_type)))
    assert torch.allclose(found, state["model.layers.1.mlp.up_proj.weight"], atol=error, rtol=error)


def test_auto_is_the_type_of_the_weights(tmp_path: Path):
    folder, file = written(tmp_path, LlamaConfig(**COMMON), dtype=torch.bfloat16)
    up = next(one for one in GGUFReader(file).tensors if one.name == "blk.0.ffn_up.weight")
    assert up.tensor_type == GGMLQuantizationType.BF16
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    found = torch.from_numpy(np.copy(dequantize(up.data, up.tensor_type)))
    assert torch.equal(found, state["model.layers.0.mlp.up_proj.weight"].float())


def test_rows_of_a_head_are_paired_as_neighbours():
    rows = torch.arange(2 * 6)  # two heads of six: 0 is rotated with 3, 1 with 4, 2 with 5
    assert neighbours_paired(rows, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_scaled_positions_are_told(tmp_path: Path):
    config = LlamaConfig(**{**COMMON, "hidden_size": 128}, rope_parameters=LLAMA3_ROPE)
    folder, file = written(tmp_path, config)
    (factors,) = [one.data for one in GGUFReader(file).tensors if one.name == "rope_freqs.weight"]
    assert factors[0] == pytest.approx(1.0) and factors[-1] == pytest.approx(8.0)
    assert (np.diff(factors) > -1e-4).all(), "low frequencies are slowed, high ones are not"
    assert torch.allclose(logits(tmp_path, gguf_file=file.name, config=config), logits(folder), atol=1e-4), (
        "with the rotation that the config says, the rest is the same"
    )


def test_positions_that_are_all_slowed_alike_are_told_in_keys(tmp_path: Path):
    linear = LlamaConfig(**COMMON, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0})
    _, file = written(tmp_path, linear)
    fields = GGUFReader(file).fields
    assert fields["llama.rope.scaling.type"].contents() == "linear"
    assert fields["llama.rope.scaling.factor"].contents() == 3.0


def test_the_context_of_a_window_is_the_window(tmp_path: Path):
    _, file = written(tmp_path, MistralConfig(**COMMON, sliding_window=32))
    assert GGUFReader(file).fields["llama.context_length"].contents() == 32


def test_positions_that_gguf_does_not_say_are_refused(tmp_path: Path):
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    with pytest.raises(ArtifactError, match=r"has positions scaled by `yarn`, which cannot be written as GGUF"):
        written(tmp_path, LlamaConfig(**COMMON, rope_parameters=rope))


def test_an_architecture_that_is_not_known_is_refused(tmp_path: Path):
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=len(TOKENIZER))
    with pytest.raises(ArtifactError, match=r"is a `gpt2`, which cannot be written as GGUF") as said:
        written(tmp_path, config)
    assert "allowed: llama, mistral, qwen2, qwen3" in str(said.value)


def test_layers_of_different_widths_are_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nemotron-nas"}))
    with pytest.raises(ArtifactError, match=r"is a `nemotron-nas`") as said:
        write_gguf(tmp_path, tmp_path / "x.gguf", type="auto", name="x")
    assert "`shape: uniform` or `padded`" in str(said.value)


def test_a_folder_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"holds no config.json that can be read"):
        write_gguf(tmp_path, tmp_path / "x.gguf", type="auto", name="x")


def unnamed_split(tokenizer):
    tokenizer.pre_tokenizer = after(r"\p{L}+")


def no_split(tokenizer):
    tokenizer.pre_tokenizer = None


def space_before(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def unnamed_normalizer(tokenizer):
    tokenizer.normalizer = normalizers.Lowercase()


def sentence_pieces(tokenizer):
    tokenizer.decoder = decoders.Metaspace()


REFUSED = {
    "a split": (unnamed_split, "splits text by Split and ByteLevel in a way that GGUF has no name for"),
    "no split": (no_split, "splits text by nothing in a way that GGUF has no name for"),
    "a space before": (space_before, "puts a space before text in a way that GGUF has no name for"),
    "a normalizer": (unnamed_normalizer, "normalises text by Lowercase that GGUF has no name for"),
    "another kind": (sentence_pieces, "is BPE over characters, which cannot be written as GGUF"),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
def test_a_tokenizer_that_gguf_cannot_say_is_refused(change, said, tmp_path: Path):
    tokenizer = make_tokenizer()
    change(tokenizer.backend_tokenizer)
    with pytest.raises(ArtifactError, match=said):
        written(tmp_path, LlamaConfig(**COMMON), tokenizer=tokenizer)


@pytest.fixture
def kept(tmp_path: Path) -> Artifacts:
    """`切った`, a pruned model, and `合わせた`, an adapter of its parent."""
    parent = make_folder(tmp_path / "parent", LlamaConfig(**COMMON))
    found = find_model(str(parent))
    base = {"source": found.source, "revision": None, "digest": found.digest}
    model = AutoModelForCausalLM.from_pretrained(parent)
    units = {"groups": [[0, 3], [1, 2]], "channels": [[0, 2], [1, 2]]}
    structure = structure_of(model, block=32)
    save(model, structure, units, tmp_path / "小", shape="uniform")
    TOKENIZER.save_pretrained(tmp_path / "小")
    artifacts = Artifacts(open_store())
    artifacts.keep("切った", tmp_path / "小", base=base, kind="model")
    adapter = tiny_adapter_folder(parent, tmp_path / "adapter", seed=1)
    TOKENIZER.save_pretrained(adapter)
    artifacts.keep("合わせた", adapter, base=base)
    return artifacts


def test_a_pruned_model_is_exported_with_its_record(kept, tmp_path: Path):
    for format, dtype in (("hf", "auto"), ("hf", "bfloat16"), ("gguf", "auto")):
        target = tmp_path / f"{format}-{dtype}"
        export(kept, kept.find("切った"), target, format, dtype=dtype)
        assert (target / "pruning.json").read_bytes() == (tmp_path / "小" / "pruning.json").read_bytes()
    again = logits(tmp_path / "gguf-auto", gguf_file="切った.gguf")
    assert torch.allclose(again, logits(tmp_path / "小"), atol=1e-4)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf-auto", gguf_file="切った.gguf").config
    assert (config.num_attention_heads, config.head_dim, config.intermediate_size) == (4, 8, 64)


def test_an_adapter_is_exported_merged(kept, tmp_path: Path):
    export(kept, kept.find("合わせた"), tmp_path / "gguf", "gguf", gguf_type="f32")
    export(kept, kept.find("合わせた"), tmp_path / "hf")
    again = logits(tmp_path / "gguf", gguf_file="合わせた.gguf")
    assert torch.allclose(again, logits(tmp_path / "hf"), atol=1e-4)
    assert (again - logits(tmp_path / "parent")).abs().max() > 0.1, "the adapter must show"
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == ["合わせた.gguf"]


def test_words_that_do_not_go_together_are_refused(kept, tmp_path: Path):
    one = kept.find("切った")
    with pytest.raises(ArtifactError, match=r"type `q4_k`: unknown"):
        export(kept, one, tmp_path / "x", "gguf", gguf_type="q4_k")
    with pytest.raises(ArtifactError, match=r"dtype `bfloat16`: is of `hf` alone") as said:
        export(kept, one, tmp_path / "x", "gguf", dtype="bfloat16")
    assert "`--gguf-type` says it" in str(said.value)
    with pytest.raises(ArtifactError, match=r"type `f16`: is of `gguf` alone, and the format is `hf`"):
        export(kept, one, tmp_path / "x", gguf_type="f16")
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_written_leaves_nothing(kept, tmp_path: Path):
    (tmp_path / "小" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    base = dict(kept.find("切った").base)
    other = kept.keep("別", tmp_path / "小", base=base, kind="model")
    with pytest.raises(ArtifactError, match="is a `gpt2`"):
        export(kept, other, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".export-*"))
