"""Loads a model folder with plain `transformers`, frozen in eval mode: safetensors only, and code that lies beside them
only where the job says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lmray.errors import ArtifactError, ConfigError
from lmray.models.hetero import HeteroConfig, is_hetero
from lmray.models.machine import is_out_of_memory
from lmray.models.quantised import check_unquantised, keep_layout, quantization_config
from lmray.models.quiet import quiet
from lmray.models.rope import RopeScaling
from lmray.models.rope_by_example import follow_examples


def load_model(
    folder: Path,
    dtype: str,
    *,
    quantization: str | None = None,
    device: str = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    rope_scaling: RopeScaling | None = None,
) -> PreTrainedModel:
    """The causal language model in `folder` with weights of `dtype` (`float32`, `bfloat16`), on the CPU, its positions
    scaled where asked for; with `quantization` (`nf4`, `int8`) its linear layers are quantised, on `device`.

    Raises ArtifactError for weights or a config that cannot be read, or that need code which is not trusted, and
    ConfigError for positions that cannot be scaled and weights that were saved quantised.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code, rope_scaling=rope_scaling)
    check_unquantised(config, folder)
    more: dict[str, Any] = {}
    if quantization:
        more = {"quantization_config": quantization_config(quantization, dtype), "device_map": {"": device}}
    with quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=getattr(torch, dtype),
                attn_implementation=attn_implementation,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                **more,
            ).eval()
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise unreadable(folder, error) from None
    keep_layout(model)
    follow_examples(model)
    return model


def load_config(folder: Path, *, trust_remote_code: bool = False, rope_scaling: RopeScaling | None = None) -> Any:
    """The model's config, its positions scaled where asked for. Raises ArtifactError where it cannot be read, or needs
    code that is not trusted, and ConfigError for positions that cannot be scaled."""
    how: Any = {"local_files_only": True}
    with quiet():
        try:
            if is_hetero(folder):
                config: Any = HeteroConfig.from_pretrained(folder, **how)
            else:
                config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **how)
        except Exception as error:  # whatever a spoilt file leads the library to
            raise unreadable(folder, error) from None
        if rope_scaling is not None:
            rope_scaling.apply(config)
    return config


def load_empty_model(
    folder: Path, *, dtype: str = "auto", trust_remote_code: bool = False, rope_scaling: RopeScaling | None = None
) -> PreTrainedModel:
    """The model in `folder` without its weights (device `meta`), of `dtype` or, for `auto`, of its config's, its
    positions scaled where asked for. Raises ArtifactError for a config that is none, ConfigError for positions that
    cannot be scaled."""
    more: Any = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    try:
        with quiet(), torch.device("meta"):
            config = load_config(folder, trust_remote_code=trust_remote_code, rope_scaling=rope_scaling)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **more)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"model folder {folder}", f"is no causal language model: {first[:200]}") from None
    if ends := stop_token_ids_in(folder):
        model.generation_config.eos_token_id = list(ends)
    return model


def make_model(
    config: Any, dtype: str, *, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> Any:
    """A model of `config` with weights of `dtype`, not read from anywhere. Raises ConfigError where it has no such
    attention, or positions that cannot be scaled."""
    try:
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    except (ValueError, ImportError) as error:
        if attn_implementation is None:
            raise
        found = f"`{attn_implementation}` cannot be used: {str(error).splitlines()[0][:200]}"
        raise ConfigError("model.attn_implementation", found, hint="`auto` takes what fits the model") from None
    follow_examples(model)
    return model


def load_tokenizer(folder: Path, *, chat: bool = True, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`. Raises ArtifactError where it is missing or, unless `chat` is off, has no chat
    template."""
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # whatever a spoilt file leads the library to
            raise unreadable(folder, error) from None
    if chat and not tokenizer.chat_template:
        hint = (
            "put a chat_template.jinja beside tokenizer.json, or take the model's instruction-tuned sibling; "
            "plain text needs none"
        )
        raise ArtifactError(f"tokenizer in {folder}", "has no chat template, as base models do", hint=hint)
    return tokenizer


def embedding_rows(folder: Path, *, trust_remote_code: bool = False) -> int:
    """Rows of the embedding of the model in `folder`, from its config: ids are below. Raises ArtifactError, also where
    it is no language model."""
    config = load_config(folder, trust_remote_code=trust_remote_code).get_text_config()
    if not hasattr(config, "vocab_size"):
        found = f"holds a `{config.model_type}`, which has no vocabulary"
        raise ArtifactError(f"model folder {folder}", found, allowed="a causal language model")
    return config.vocab_size


def stop_token_ids_in(folder: Path) -> tuple[int, ...]:
    """Ids that the generation config in `folder` says end an answer; none where there is none. Raises ArtifactError
    where it cannot be read: an answer might never end."""
    if not (folder / "generation_config.json").is_file():
        return ()
    try:
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise unreadable(folder, error) from None
    ids = config.eos_token_id
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end an answer: those of the generation config, and the tokenizer's end of turn."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [ids] if ids is not None else [])
    return tuple(sorted(found))


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows up; any will do where the tokenizer names none, for no loss is taken on it."""
    found = tokenizer.pad_token_id
    return found if isinstance(found, int) else 0


def unreadable(folder: Path, error: Exception) -> ArtifactError:
    """What is raised for a model in `folder` that cannot be read."""
    if "trust_remote_code" in str(error):
        hint = "`model.trust_remote_code: true` runs it on every worker; set it only where you trust its authors"
        return ArtifactError(f"model folder {folder}", "needs Python code that lies beside its weights", hint=hint)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ArtifactError(
        f"model folder {folder}", f"cannot be loaded: {lines[0][:200]}", hint="download or convert it again"
    )
