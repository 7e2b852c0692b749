"""Adapters that cannot be merged: whatever PEFT raises, the error names the adapter's folder."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmray.errors import ArtifactError
from lmray.models import merge as module
from lmray.models.merge import write_merged
from lmray.testing.tiny import tiny_adapter_folder

SPOILT = {
    "not a number": (lambda tensor: tensor * torch.nan, "NaN"),
    "another shape": (lambda tensor: torch.zeros(3, 5), "Error"),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=SPOILT)
def test_an_adapter_that_cannot_be_merged_is_named(tiny_model, tmp_path, spoil, said):
    adapter = tiny_adapter_folder(tiny_model, tmp_path / "adapter", seed=1)
    weights = adapter / "adapter_model.safetensors"
    save_file({name: spoil(tensor) for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ArtifactError, match=rf"adapter: cannot be merged: .*{said}"):
        write_merged(tiny_model, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_too_little_memory_is_no_fault_of_the_adapter(tiny_model, tmp_path, monkeypatch):
    adapter = tiny_adapter_folder(tiny_model, tmp_path / "adapter", seed=1)

    def full(*told):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(module.PeftModel, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        write_merged(tiny_model, adapter, tmp_path / "merged")
