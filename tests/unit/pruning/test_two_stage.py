"""A model cut before it is tuned: what is written loads in plain transformers and trains as any other."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmray.artifacts.store import run_folder
from lmray.errors import ConfigError
from lmray.models.load import load_model
from lmray.pruning.structure import structure_of
from lmray.pruning.two_stage import IMPORTANCE, WAYS, smaller_model, write_pruned
from lmray.testing.jobs import curve, run_here, tiny_job, tiny_rows, write_jsonl
from lmray.testing.tiny import tiny_model_folder

IDS = torch.randint(3, 264, (2, 11), generator=torch.Generator().manual_seed(0))
ROWS = [(IDS, IDS)]


@pytest.fixture
def folder(tmp_path):
    return tiny_model_folder(tmp_path / "model", num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_is_what_was_cut_and_keeps_the_budget(way, folder, tmp_path):
    before = load_model(folder, "float32")
    write_pruned(folder, tmp_path / "smaller", way, ROWS, remaining=0.6, multiple_of=8)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    wanted = smaller_model(before, way, ROWS, remaining=0.6, multiple_of=8)
    with torch.no_grad():
        assert torch.allclose(again(IDS).logits, wanted(IDS).logits, atol=1e-6)
    whole, left = (structure_of(model, block=1).sizes.prunable for model in (before, again))
    assert 0.45 < left / whole <= 0.6
    assert AutoTokenizer.from_pretrained(tmp_path / "smaller").chat_template
    assert again.dtype == before.config.dtype


def test_weights_are_written_in_the_type_they_had(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    write_pruned(folder, tmp_path / "smaller", "magnitude", (), remaining=0.6, multiple_of=8)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "smaller", dtype="auto").dtype == torch.bfloat16


def test_the_smaller_model_is_tuned_by_an_ordinary_job(folder, tmp_path):
    write_pruned(folder, tmp_path / "smaller", "taylor", ROWS, remaining=0.6, multiple_of=8)
    data = write_jsonl(tmp_path / "data.jsonl", tiny_rows())
    job = tiny_job(tmp_path / "smaller", data, tmp_path / "store")
    assert run_here(job, tmp_path / "scratch").status == "succeeded"
    losses = curve(job)
    assert losses[-1] < losses[0] and (run_folder(job) / "adapter" / "adapter_model.safetensors").is_file()


def test_an_unknown_way_is_named_with_those_there_are(folder):
    with pytest.raises(ConfigError, match="`wanda` is not known") as caught:
        smaller_model(load_model(folder, "float32"), "wanda", ROWS, remaining=0.6)
    assert "wanda_sp" in str(caught.value) and all(name in str(caught.value) for name in IMPORTANCE)


def test_a_budget_below_the_narrowest_model_is_refused(folder):
    with pytest.raises(ConfigError, match=r"0.05 is less than one key-value group"):
        smaller_model(load_model(folder, "float32"), "magnitude", ROWS, remaining=0.05)
