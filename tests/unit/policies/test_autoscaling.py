"""How many replicas a demand needs, and what Ray Serve is told."""

from __future__ import annotations

import ast
import subprocess
import sys
import typing
from pathlib import Path

import cloudpickle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmray import policies
from lmray.config.endpoint import Autoscaling
from lmray.policies import autoscaling
from lmray.policies.autoscaling import (
    PRESETS,
    Demand,
    TokenPolicy,
    autoscaling_arguments,
    demand_of,
    replicas_for,
    shutdown_s,
)

BALANCED = PRESETS["balanced"]


@pytest.mark.parametrize(
    ("demand", "wanted"),
    [
        (Demand(replicas=3, requests=0), 0),
        (Demand(replicas=0, requests=1), 1),
        (Demand(replicas=1, requests=24), 1),
        (Demand(replicas=1, requests=25), 2),
        (Demand(replicas=1, requests=9, waiting_tokens=10_000, tokens_per_s=1000), 5),
        (Demand(replicas=1, requests=1, waiting_tokens=10_000, tokens_per_s=1000, first_token_s=2.5), 1),
        (Demand(replicas=1, requests=4, waiting_tokens=10_000), 1),
        (Demand(replicas=2, requests=4, waiting_tokens=100, tokens_per_s=1000, first_token_s=2.5), 3),
        (Demand(replicas=2, requests=4, first_token_s=2.5), 1),
    ],
)
def test_rows_tokens_and_the_time_to_the_first_token_each_ask_for_replicas(demand, wanted):
    assert replicas_for(demand, BALANCED, max_batch_size=32) == wanted


@given(
    st.builds(Demand, replicas=st.integers(0, 9), requests=st.floats(0, 1e3), waiting_tokens=st.floats(0, 1e6)),
    st.floats(1, 1e3),
    st.floats(1, 1e6),
)
def test_more_to_do_never_asks_for_fewer(demand, requests, tokens):
    more = Demand(demand.replicas, demand.requests + requests, demand.waiting_tokens + tokens, demand.tokens_per_s)
    assert replicas_for(more, BALANCED, max_batch_size=8) >= replicas_for(demand, BALANCED, max_batch_size=8)


def test_faster_presets_ask_for_more_and_sooner():
    demand = Demand(replicas=1, requests=40, waiting_tokens=4000, tokens_per_s=1000)
    wanted = [replicas_for(demand, PRESETS[name], max_batch_size=32) for name in ("cheap", "balanced", "fast")]
    assert wanted == [2, 2, 8]
    presets = [PRESETS[name] for name in ("cheap", "balanced", "fast")]
    for field in ("upscale_delay_s", "look_back_period_s", "load_fraction", "first_token_s"):
        values = [getattr(preset, field) for preset in presets]
        assert values == sorted(values, reverse=True), field


def test_requests_without_a_replica_count_with_the_tokens_that_requests_have():
    reported = {
        "waiting_tokens": {"a": 100.0, "b": 50.0},
        "tokens_per_s": {"a": 1000.0, "b": 0.0},
        "tokens_per_request": {"a": 200.0, "b": 0.0},
        "first_token_s": {"a": 0.1, "b": 3.0},
    }
    demand = demand_of(reported, replicas=2, requests=9.0, unassigned=4.0)
    assert demand == Demand(2, 9.0, waiting_tokens=950.0, tokens_per_s=1000.0, first_token_s=3.0)
    assert demand_of({}, replicas=0, requests=1.0, unassigned=1.0) == Demand(0, 1.0)


def test_looks_at_replicas_are_no_requests():
    idle = {"requests": {"a": 0.0, "b": 0.0}}
    assert demand_of(idle, replicas=2, requests=1.5, unassigned=0.0).requests == 0.0
    assert demand_of(idle, replicas=2, requests=3.5, unassigned=2.0).requests == 2.0
    assert demand_of({"requests": {"a": 4.0, "b": 1.0}}, replicas=2, requests=7.0, unassigned=1.0).requests == 6.0


def test_the_policy_travels_by_value_and_needs_nothing_but_python(tmp_path):
    cloudpickle.register_pickle_by_value(autoscaling)
    try:
        (tmp_path / "policy").write_bytes(cloudpickle.dumps(TokenPolicy))
    finally:
        cloudpickle.unregister_pickle_by_value(autoscaling)
    program = """
import pickle, sys, types
sys.modules["lmray"] = None
policy = pickle.load(open(sys.argv[1], "rb"))(preset="balanced", max_batch_size=32)
context = types.SimpleNamespace(
    aggregated_metrics=None, current_num_replicas=1, total_num_requests=25.0, total_queued_requests=None
)
print(policy(context))
"""
    found = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "policy")], capture_output=True, text=True, check=False
    )
    assert (found.stdout, found.stderr) == ("(2, {})\n", "")


def test_a_job_knows_exactly_the_presets_there_are():
    assert set(typing.get_args(Autoscaling.model_fields["preset"].annotation)) == set(PRESETS)


@pytest.mark.parametrize("path", sorted(Path(policies.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_policies_import_the_standard_library_only(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert all(name.split(".")[0] in sys.stdlib_module_names for name in names), names


def test_an_endpoint_that_may_have_no_replica_starts_with_one():
    told = autoscaling_arguments("fast", min_replicas=0, max_replicas=3)
    assert (told["min_replicas"], told["initial_replicas"], told["max_replicas"]) == (0, 1, 3)
    with pytest.raises(KeyError):
        autoscaling_arguments("slow", min_replicas=1, max_replicas=1)


def test_answers_have_the_time_to_end():
    assert shutdown_s(600.0) == 610.0
