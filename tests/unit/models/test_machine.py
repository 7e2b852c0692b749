from __future__ import annotations

import psutil

from lmray.models.machine import measure_flops, this_machine


def test_a_containers_limit_is_the_memory_there_is(tmp_path):
    (tmp_path / "limit").write_text("1048576\n")
    (tmp_path / "none").write_text("max\n")
    limits = [str(tmp_path / name) for name in ("limit", "none", "missing")]
    assert this_machine(limits).memory_bytes == 2**20
    assert this_machine(limits[1:]).memory_bytes == psutil.virtual_memory().total
    assert this_machine(()).cpus >= 1


def test_speed_is_measured_in_operations_a_second():
    assert measure_flops("float32", seconds=0.01, size=64) > 1e5
