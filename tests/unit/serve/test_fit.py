"""What of the store is never served: told by records, before a file is read."""

from __future__ import annotations

import dataclasses

import pytest

from lmray.artifacts.served import AdapterCache
from lmray.errors import ArtifactError
from lmray.serve.fit import StoredAdapters
from tests.unit.serve.stores import BASE, FIT, SmallStore, plan_of

DIGEST = "0" * 64


@pytest.fixture
def small(tmp_path) -> SmallStore:
    return SmallStore(tmp_path)


def test_an_adapter_of_the_base_fits_and_is_checked_out(small):
    artifact = small.keep("helper")
    FIT.check(artifact)
    found = StoredAdapters(small.store, FIT).find(artifact.ref)
    assert [path.name for path in found.folder.iterdir()] == ["adapter_config.json"]
    assert found.num_bytes == artifact.num_bytes


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"kind": "model"}, "is a model\n  allowed: adapter"),
        ({"base": {**BASE, "digest": DIGEST, "source": "other"}}, r"was trained on `other` \(000000000000\)"),
        ({"base": {**BASE, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}}, "positions scaled by"),
        ({"files": {"a.safetensors": {"sha256": DIGEST, "bytes": 10_001}}}, "has 9.8 KiB\n  allowed: up to 9.8 KiB"),
        ({"files": {"../a.json": {"sha256": DIGEST, "bytes": 1}}}, r"names a file `\.\./a\.json`"),
        ({"files": {"/etc/a.json": {"sha256": DIGEST, "bytes": 1}}}, "names a file `/etc/a.json`"),
        ({"files": {"..\\a.json": {"sha256": DIGEST, "bytes": 1}}}, "names a file"),
        ({"files": {"a.bin": {"sha256": DIGEST, "bytes": 1}}}, "names a file `a.bin`\n  allowed: relative names"),
        ({"files": {"a.json": {"sha256": "../../etc/passwd", "bytes": 1}}}, "SHA-256 digests"),
    ],
)
def test_what_does_not_fit_is_named(small, changes, found):
    artifact = dataclasses.replace(small.keep("helper"), **changes)
    with pytest.raises(ArtifactError, match=found):
        FIT.check(artifact)


def test_a_file_larger_than_its_record_says_is_not_copied(small):
    artifact = small.keep("helper")
    stored = small.store.root / "objects" / artifact.files["adapter_config.json"]["sha256"]
    stored.write_bytes(b"x" * 20_000)
    with pytest.raises(ArtifactError, match=r"has 19\.5 KiB"):
        StoredAdapters(small.store, FIT).find(artifact.ref)


def test_what_is_not_what_was_kept_is_refused(small):
    artifact = small.keep("helper")
    (small.store.root / "objects" / artifact.files["adapter_config.json"]["sha256"]).write_bytes(b"{}")
    with pytest.raises(ArtifactError, match="is missing or corrupted"):
        StoredAdapters(small.store, FIT).find(artifact.ref)


def test_an_adapter_that_no_cache_has_room_for_does_not_fit(small):
    cache = AdapterCache(max_bytes=100, max_adapter_bytes=10_000)
    plan = dataclasses.replace(plan_of(small), cache=cache)
    assert plan.fit.max_adapter_bytes == 100 and plan.merged_fit.max_adapter_bytes == 10_000
