"""Models out of the artifact store: whole ones as they are kept, adapters merged into their base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store
from lmray.errors import ArtifactError
from lmray.models.export import export
from lmray.models.source import FoundModel, find_model
from lmray.testing.kills import Killed, file_operations
from lmray.testing.tiny import tiny_adapter_folder, tiny_model_folder

IDS = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def base_of(found: FoundModel) -> dict[str, str | None]:
    return {"source": found.source, "revision": found.revision, "digest": found.digest}


@pytest.fixture
def kept(tiny_model, tmp_path) -> Artifacts:
    """`whole`, a model of its own, and `calls`, an adapter of the tiny model; both in production."""
    artifacts = Artifacts(open_store())
    base = base_of(find_model(str(tiny_model)))
    artifacts.keep("whole", tiny_model_folder(tmp_path / "whole", seed=5), base=base, kind="model")
    artifacts.keep("calls", tiny_adapter_folder(tiny_model, tmp_path / "calls", seed=1), base=base)
    for name in ("whole", "calls"):
        artifacts.promote(name, "production")
    return artifacts


def test_a_whole_model_is_the_one_that_was_kept(kept, tmp_path):
    found = find_model("artifact:whole@production")
    assert found.digest == find_model(str(tmp_path / "whole")).digest, "equal weights are the same base"
    assert found.parents == (kept.find("whole").ref,)
    assert found.source == f"artifact:{found.parents[0]}", "whatever the stage holds later"
    assert find_model(found.source) == found == find_model("artifact:whole")
    torch.testing.assert_close(logits(found.folder), logits(tmp_path / "whole"), atol=0, rtol=0)


def test_an_adapter_is_merged_into_its_base_once(kept, tiny_model, tmp_path, monkeypatch):
    found = find_model("artifact:calls@production")
    attached = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(tmp_path / "calls"))
    with torch.no_grad():
        torch.testing.assert_close(logits(found.folder), attached(IDS).logits, atol=1e-4, rtol=1e-4)
    assert (logits(found.folder) - logits(tiny_model)).abs().max() > 0.1, "the adapter must show"
    assert AutoTokenizer.from_pretrained(found.folder).chat_template
    assert found.parents == (kept.find("calls").ref,)
    monkeypatch.setattr("lmray.models.source.write_merged", lambda *_, **__: pytest.fail("merged again"))
    assert find_model("artifact:calls") == found


def test_the_digest_follows_the_version_that_a_stage_holds(kept, tiny_model, tmp_path):
    before = find_model("artifact:calls@production")
    other = tiny_adapter_folder(tiny_model, tmp_path / "other", seed=2)
    kept.promote(kept.keep("calls", other, base=kept.find("calls").base).ref, "production")
    after = find_model("artifact:calls@production")
    assert after.digest != before.digest and after.folder != before.folder
    assert find_model(before.source) == before


def test_adapters_are_merged_one_on_the_other(kept, tiny_model, tmp_path):
    first = find_model("artifact:calls")
    kept.keep("more", tiny_adapter_folder(first.folder, tmp_path / "more", seed=3), base=base_of(first))
    second = find_model("artifact:more")
    assert (logits(second.folder) - logits(first.folder)).abs().max() > 0.1
    assert second.parents == (kept.find("more").ref,)


def test_a_merge_that_is_killed_leaves_no_half_a_model(kept, tmp_path):
    operations = file_operations(tmp_path / "cache" / "models", lambda: find_model("artifact:calls"))
    (folder,) = (tmp_path / "cache" / "models").glob("*/[0-9a-f]*")
    whole = sorted(path.name for path in folder.iterdir())
    for kill in range(3, len(operations) + 1, 4):
        folder.rename(tmp_path / f"before{kill}")
        with pytest.raises(Killed):
            file_operations(tmp_path / "cache" / "models", lambda: find_model("artifact:calls"), kill_at=kill)
        found = find_model("artifact:calls").folder
        assert sorted(path.name for path in found.iterdir()) == whole, operations[kill - 1]
        assert {path.name for path in found.parent.iterdir()} == {found.name, f".{found.name}.lock"}, "nothing is left"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("artifact:cals", "did you mean `calls`"),
        ("artifact:calls@staging", "lmray artifacts promote calls staging"),
        ("artifact:calls@prodction", "did you mean `production`"),
        ("artifact:calls@00000000", "no version or stage `00000000`"),
        ("artifact:", "is no artifact reference"),
    ],
)
def test_what_is_not_kept_is_refused(kept, source, found):
    with pytest.raises(ArtifactError, match=found):
        find_model(source)


def test_an_adapter_whose_base_changed_is_refused(kept, tmp_path):
    base = kept.find("calls").base | {"digest": "0" * 64}
    kept.keep("calls", tmp_path / "calls", base=base)
    with pytest.raises(ArtifactError, match="the base of artifact `calls@"):
        find_model("artifact:calls")


def test_the_store_is_the_one_that_is_named(kept, tmp_path):
    elsewhere = Artifacts(open_store(str(tmp_path / "elsewhere")))
    elsewhere.keep("calls", tmp_path / "whole", base=kept.find("calls").base, kind="model")
    assert find_model("artifact:calls", storage=str(tmp_path / "elsewhere")).parents == (elsewhere.find("calls").ref,)
    assert find_model("artifact:calls").parents == (kept.find("calls").ref,)


def test_a_whole_model_is_exported_as_it_is_or_in_another_type(kept, tmp_path):
    whole = kept.find("whole")
    export(kept, whole, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }
    export(kept, whole, tmp_path / "half", dtype="bfloat16")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16 and AutoTokenizer.from_pretrained(tmp_path / "half").chat_template
    torch.testing.assert_close(half(IDS).logits.float(), logits(tmp_path / "whole"), atol=0.5, rtol=0.1)
    with pytest.raises(ArtifactError, match="is a whole model") as caught:
        export(kept, whole, tmp_path / "peft", "peft")
    assert caught.value.allowed == "--format hf" and not (tmp_path / "peft").exists()
