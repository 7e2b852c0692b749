from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

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


MAPPED_BLOCKS = """
import ctypes
from lmray.models.machine import map_large_tensors

class Mallinfo2(ctypes.Structure):
    # Of glibc's malloc.h.
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

facts = ctypes.CDLL(None).mallinfo2
facts.restype = Mallinfo2
size = 24 * 2**20
del (freed := [bytearray(30 * 2**20)])[:]  # from then on the library keeps blocks as large on its heap
before = facts().hblkhd
on_heap = bytearray(size)
beside = facts().hblkhd
map_large_tensors()
mapped = bytearray(size)
print(beside - before, facts().hblkhd - beside >= size)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc from 2.33 on says what is mapped")
def test_large_blocks_are_mapped_on_their_own_whatever_was_freed_before():
    # in a process of its own: a hole that other tests left on the heap would be used first
    done = subprocess.run([sys.executable, "-c", MAPPED_BLOCKS], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0", "True"], done.stderr


def test_few_products_are_kept_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    keep_few_products()
    assert int(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) < 1024
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "2048")
    keep_few_products()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "2048"
