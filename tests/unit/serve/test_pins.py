"""The list of pinned adapters in the store."""

from __future__ import annotations

import pytest

from lmray.artifacts.file_store import FileStore
from lmray.errors import ArtifactError
from lmray.serve.pins import Pins


def test_pins_are_shared_and_last(tmp_path):
    ours, theirs = (Pins(FileStore(tmp_path), "endpoint") for _ in range(2))
    assert ours.names() == ()
    assert theirs.change("日本語", pinned=True) == ("日本語",)
    assert theirs.change("a", pinned=True) == ("a", "日本語")
    assert ours.names() == ("a", "日本語")
    assert ours.change("a", pinned=False) == theirs.names() == ("日本語",)
    assert Pins(FileStore(tmp_path), "other").names() == ()


def test_a_file_that_is_no_list_is_named(tmp_path):
    store = FileStore(tmp_path)
    for content in (b"{", b'{"a": 1}', b"[1]"):
        store.put("endpoints/endpoint/pins.json", content)
        with pytest.raises(ArtifactError, match="is no list of names"):
            Pins(store, "endpoint").names()
