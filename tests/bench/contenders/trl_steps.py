"""The same steps by TRL's SFTTrainer; run in TRL's environment as `python trl_steps.py SETTINGS.json`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from clock import Clock
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    lines = Path(settings["data"]).read_text(encoding="utf-8").splitlines()
    messages = [json.loads(line)["messages"] for line in lines]
    rows = [{"prompt": one[:-1], "completion": one[-1:]} for one in messages]
    options = dict(settings["options"])
    if dtype := options.pop("dtype", None):
        options["model_init_kwargs"] = {"dtype": dtype}
    clock = Clock()
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        per_device_train_batch_size=settings["batch_size"],
        max_steps=settings["steps"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    dataset = Dataset.from_list(rows)
    SFTTrainer(settings["model"], args=config, train_dataset=dataset, peft_config=lora, callbacks=[clock]).train()
    clock.print()


if __name__ == "__main__":
    main()
