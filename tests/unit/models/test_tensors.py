"""Trees of tensors and plain values come back as they were."""

from __future__ import annotations

import pytest
import torch

from lmray.errors import CheckpointError
from lmray.models.tensors import load_tree, save_tree


def test_a_tree_comes_back_as_it_was(tmp_path):
    table = torch.arange(4, dtype=torch.uint8)
    tree = {
        "state": {0: {"step": 3, "inner": {"table": table}}, 7: {"step": torch.tensor(2.0), "inner": {"table": table}}},
        "groups": [
            {"betas": (0.9, 0.999), "foreach": None, "fused": True, "名": "赤", "seed": 2**62, "params": [0, 7]}
        ],
    }
    save_tree(tree, tmp_path / "kept")
    found = load_tree(tmp_path / "kept")
    assert found["groups"] == tree["groups"] and isinstance(found["groups"][0]["betas"], tuple)
    assert list(found["state"]) == [0, 7] and found["state"][0]["step"] == 3
    assert torch.equal(found["state"][7]["step"], torch.tensor(2.0))
    tables = [facts["inner"]["table"] for facts in found["state"].values()]
    assert torch.equal(tables[0], table) and tables[0].dtype == torch.uint8 and tables[0] is tables[1]


def test_what_is_neither_a_tensor_nor_json_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds a object at `kept\.state\.1`"):
        save_tree({"state": [1, object()]}, tmp_path / "kept")
    assert not list(tmp_path.iterdir())
