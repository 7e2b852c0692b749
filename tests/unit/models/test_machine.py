from __future__ import annotations

import os
import platform

import psutil
import pytest

from lmray.models.machine import keep_few_products, measure_flops, release_heap, this_machine


def test_a_containers_limit_is_the_memory_there_is(tmp_path):
    (tmp_path / "limit").write_text("1048576\n")
    (tmp_path / "none").write_text("max\n")
    limits = [str(tmp_path / name) for name in ("limit", "none", "missing")]
    assert this_machine(limits).memory_bytes == 2**20
    assert this_machine(limits[1:]).memory_bytes == psutil.virtual_memory().total
    assert this_machine(()).cpus >= 1


def test_speed_is_measured_in_operations_a_second():
    assert measure_flops("float32", seconds=0.01, size=64) > 1e5


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory so")
def test_released_memory_is_the_systems_again():
    process = psutil.Process()
    blocks = [bytearray(64 * 1024) for _ in range(4096)]  # small enough for the heap: 256 MiB
    kept = blocks[-1]  # the heap's end stays in use, so nothing below it is given back by itself
    held = process.memory_info().rss
    del blocks
    release_heap()
    assert process.memory_info().rss < held - 128 * 2**20 and len(kept)


def test_few_products_are_kept_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    keep_few_products()
    assert int(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) < 1024
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "2048")
    keep_few_products()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "2048"
