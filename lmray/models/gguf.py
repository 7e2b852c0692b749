"""A GGUF file becomes a plain safetensors folder, once."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmray.artifacts.files import replace_folder
from lmray.models.quiet import quiet


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes the model in file `gguf` as a folder that plain `transformers` loads: dequantised to bfloat16 weights,
    tokenizer, chat template. The folder appears whole or not at all.

    `transformers` refuses to save a model it read from GGUF (its config says it is quantised), so the weights move
    into a fresh model whose config drops `quantization_config`.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gguf-") as scratch, quiet():
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        config_fields = read.config.to_dict()
        config_fields.pop("quantization_config", None)
        config_fields.pop("_name_or_path", None)
        config = type(read.config).from_dict(config_fields)
        with torch.device("meta"):
            model = type(read)(config)
        model.load_state_dict(read.state_dict(), assign=True)
        model.tie_weights()
        target = Path(scratch) / "model"
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        replace_folder(target, folder)
        shutil.rmtree(target)
