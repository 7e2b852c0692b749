"""optipfair's width pruning of the MLP, weighed by weights and activations. Run as `python optipfair_cut.py FILE.json`,
with the package on the path: `model` and `target` folders, `width` of the MLP, and calibration rows as lists of ids."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import optipfair
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype="auto")
    stored, before = model.dtype, model.config.intermediate_size
    rows = [torch.tensor([ids]) for ids in settings["rows"]]
    smaller = optipfair.prune_model(
        model.float(),
        pruning_type="MLP_GLU",
        neuron_selection_method="MAW",
        pruning_percentage=100 * (before - settings["width"] + 0.5) / before,
        dataloader=[{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows],
        show_progress=False,
    )
    assert smaller.config.intermediate_size == settings["width"], smaller.config.intermediate_size
    smaller.to(stored).save_pretrained(settings["target"])
    AutoTokenizer.from_pretrained(settings["model"]).save_pretrained(settings["target"])


if __name__ == "__main__":
    main()
