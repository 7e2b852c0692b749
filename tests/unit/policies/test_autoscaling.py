"""The presets as numbers, and as what Ray Serve takes."""

from __future__ import annotations

import subprocess
import sys
import typing

import pytest

from lmray.job import Autoscaling
from lmray.policies.autoscaling import PRESETS, autoscaling_arguments

ARGUMENTS = {"min_replicas": 1, "max_replicas": 4, "max_batch_size": 32}


def test_a_job_knows_exactly_the_presets_there_are():
    assert set(typing.get_args(Autoscaling.model_fields["preset"].annotation)) == set(PRESETS)


def test_faster_presets_ask_sooner_and_let_go_later():
    cheap, balanced, fast = (PRESETS[name] for name in ("cheap", "balanced", "fast"))
    assert cheap.upscale_delay_s > balanced.upscale_delay_s > fast.upscale_delay_s
    assert cheap.load_fraction > balanced.load_fraction > fast.load_fraction
    assert cheap.downscale_delay_s < balanced.downscale_delay_s < fast.downscale_delay_s


@pytest.mark.parametrize("preset", PRESETS)
def test_arguments_keep_the_bounds_and_scale_with_the_batch(preset):
    found = autoscaling_arguments(preset, **ARGUMENTS)
    assert (found["min_replicas"], found["initial_replicas"], found["max_replicas"]) == (1, 1, 4)
    assert found["target_ongoing_requests"] == 32 * PRESETS[preset].load_fraction
    single = autoscaling_arguments(preset, min_replicas=1, max_replicas=1, max_batch_size=1)
    assert single["target_ongoing_requests"] == 1


def test_an_unknown_preset_is_a_key_error():
    with pytest.raises(KeyError):
        autoscaling_arguments("instant", **ARGUMENTS)


def test_the_module_needs_the_standard_library_only():
    """Ray Serve pickles policies by value, so what they import must be everywhere."""
    code = (
        "import sys; before = set(sys.modules); import lmray.policies.autoscaling\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - {'lmray'}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
