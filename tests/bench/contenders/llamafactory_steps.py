"""The same steps by LLaMA-Factory; run in its environment as `python llamafactory_steps.py SETTINGS.json`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import types
from pathlib import Path

import torch
from clock import Clock

os.environ["DISABLE_VERSION_CHECK"] = "1"
# Imported for audio, which is not used here; only now, for transformers looks at what is there when it is imported.
sys.modules.setdefault("torchaudio", types.ModuleType("torchaudio"))

from llamafactory.train.tuner import run_exp  # noqa: E402


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    folder = Path(tempfile.mkdtemp())
    lines = Path(settings["data"]).read_text(encoding="utf-8").splitlines()
    (folder / "bench.json").write_text(json.dumps([json.loads(line) for line in lines]), encoding="utf-8")
    tags = {"role_tag": "role", "content_tag": "content", "system_tag": "system"}
    tags |= {"user_tag": "user", "assistant_tag": "assistant"}
    facts = {"file_name": "bench.json", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"bench": facts}), encoding="utf-8")
    clock = Clock()
    arguments = {
        "model_name_or_path": _for_transformers_4(Path(settings["model"]), folder / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "dataset_dir": str(folder),
        "dataset": "bench",
        "template": "chatml",
        "cutoff_len": 1024,
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": settings["batch_size"],
        "gradient_accumulation_steps": 1,
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_steps": settings["steps"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_shuffling": True,
        "use_cpu": True,
        "disable_tqdm": True,
        **settings["options"],
    }
    run_exp(arguments, callbacks=[clock])
    clock.print()


def _for_transformers_4(model: Path, folder: Path) -> str:
    """The model's folder with the class name that transformers 4 knows its tokenizer by."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").unlink()
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


if __name__ == "__main__":
    main()
