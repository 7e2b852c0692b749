"""A version's record must be that of the place it stands at."""

from __future__ import annotations

import json

import pytest

from lmray.artifacts.artifact import Artifact, Artifacts
from lmray.artifacts.file_store import FileStore
from lmray.errors import ArtifactError


@pytest.fixture
def artifacts(tmp_path) -> Artifacts:
    return Artifacts(FileStore(tmp_path / "store"))


@pytest.fixture
def kept(artifacts, tmp_path) -> Artifact:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}', encoding="utf-8")
    return artifacts.keep("calls", folder, base={"source": "tiny", "revision": None, "digest": "d" * 64})


@pytest.mark.parametrize(
    ("field", "value"), [("id", "../../elsewhere"), ("id", "0" * 64), ("name", "other"), ("id", 7)]
)
def test_a_record_that_names_another_version_is_refused(artifacts, kept, field, value):
    path = artifacts.store.root / "artifacts" / "calls" / "versions" / f"{kept.id}.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {field: value}), encoding="utf-8")
    with pytest.raises(ArtifactError, match="is no record of the version it is named after"):
        artifacts.find("calls")


def test_a_record_under_no_id_is_refused(artifacts, kept):
    path = artifacts.store.root / "artifacts" / "calls" / "versions" / f"{kept.id}.json"
    record = json.loads(path.read_text(encoding="utf-8")) | {"id": "latest"}
    path.with_name("latest.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ArtifactError, match="is no record of the version it is named after"):
        artifacts.find("calls")
