"""What is checked before anything is offloaded to a disk, and whose folder on it is whose."""

from __future__ import annotations

import os

import pytest

from lmray.errors import CheckpointError, ConfigError
from lmray.sharding._deepspeed_config import engine_config
from lmray.sharding._deepspeed_nvme import check_async_io, check_path, own_folder, remove_with
from lmray.sharding._deepspeed_placed import DeepspeedPlaced
from lmray.sharding.deepspeed import Deepspeed

TO_DISK = {"offload_optimizer": "nvme", "offload_param": "nvme"}


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"stage": 2, "offload_optimizer": "nvme", "nvme_path": "/disk"}, "`nvme` needs stage 3, found 2"),
        ({"stage": 3, "offload_param": "nvme"}, "`nvme_path` and offloading to `nvme` need each other"),
        ({"stage": 3, "offload_param": "cpu", "nvme_path": "/disk"}, "set both or neither"),
    ],
)
def test_a_disk_needs_stage_3_and_a_path_and_a_path_a_use(fields, found):
    with pytest.raises(ValueError, match=found):
        Deepspeed(**fields)


def test_a_path_that_can_be_made_is_taken_and_not_made(tmp_path):
    check_path(str(tmp_path / "new" / "folder"))
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is no folder"):
        check_path(str(tmp_path / "file" / "below"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match="cannot be written to"):
        check_path(str(tmp_path))


def test_a_relative_path_is_refused_before_a_start():
    with pytest.raises(ConfigError, match="`scratch` is relative"):
        Deepspeed(stage=3, nvme_path="scratch", **TO_DISK).check({}, workers=2, dtype="float32")


def test_without_a_compiler_or_libaio_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("lmray.sharding._deepspeed_nvme.find_spec", lambda name: None)
    for name, script in (("ninja", "exit 0"), ("c++", "echo 'cannot find -laio' >&2; exit 1")):
        with pytest.raises(ConfigError, match="is not in PATH") as caught:
            monkeypatch.setenv("PATH", str(tmp_path))
            monkeypatch.delenv("CXX", raising=False)
            check_async_io()
        assert "libaio-dev" in str(caught.value)
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(ConfigError, match="cannot find -laio") as caught:
        check_async_io()
    assert "libaio-dev" in str(caught.value)


def test_each_has_a_folder_of_its_own_that_goes_with_its_owner(tmp_path):
    class Owner:
        pass

    owner, mine = Owner(), own_folder(str(tmp_path / "disk"))
    remove_with(owner, mine)
    (mine / "state.swp").touch()
    other = own_folder(str(tmp_path / "disk"))
    assert mine.is_dir() and other.is_dir(), "one in use stays"
    del owner
    assert not mine.exists() and other.is_dir()


def test_what_a_dead_process_left_is_removed_and_nothing_else(tmp_path):
    dead = tmp_path / ".lmray-offload" / "rank-dead"
    for folder in (dead, tmp_path / "lmray-scratch", tmp_path / "rank-theirs"):
        folder.mkdir(parents=True)
    mine = own_folder(str(tmp_path))
    assert mine.is_dir() and not dead.exists()
    assert {path.name for path in tmp_path.iterdir()} == {".lmray-offload", "lmray-scratch", "rank-theirs"}


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written to"):
        own_folder(str(tmp_path / "file"))


def test_buffers_are_as_large_as_the_model_needs_and_nothing_stays_unless_the_file_says_so(tmp_path):
    zero = Deepspeed(stage=3, nvme_path="/disk", **TO_DISK)._zero(tmp_path)
    given = engine_config({}, zero, num_trained=1000, num_largest=300)["zero_optimization"]
    assert given["sub_group_size"] == 1000
    path = str(tmp_path)
    assert given["offload_param"] == {"device": "nvme", "nvme_path": path, "buffer_size": 1300, "max_in_cpu": 0}
    assert given["offload_optimizer"] == {"device": "nvme", "nvme_path": path}
    own = {"zero_optimization": {"sub_group_size": 7, "offload_param": {"max_in_cpu": 9}}}
    given = engine_config(own, zero, num_trained=1000, num_largest=300)["zero_optimization"]
    assert (given["sub_group_size"], given["offload_param"]["max_in_cpu"]) == (7, 9)


def test_nothing_is_gone_on_with_on_a_disk(tmp_path):
    placed = object.__new__(DeepspeedPlaced)
    placed._on_disk = True
    with pytest.raises(CheckpointError, match="lie on a disk"):
        placed.load(tmp_path)
