"""What a replica tells of its work."""

from __future__ import annotations

from contextlib import ExitStack

from lmray.serve.demand import RECENT_S, Demand


def test_prompts_wait_until_their_first_token():
    now = 0.0
    demand = Demand(lambda: now)
    assert demand.report() == dict.fromkeys(
        ("requests", "waiting_tokens", "tokens_per_s", "tokens_per_request", "first_token_s"), 0.0
    )
    with ExitStack() as running:
        one, two = (running.enter_context(demand.request(tokens)) for tokens in (100, 300))
        now = 1.0
        one()
        one()
        assert demand.report() == {
            "requests": 2.0,
            "waiting_tokens": 300.0,
            "tokens_per_s": 100.0,
            "tokens_per_request": 100.0,
            "first_token_s": 1.0,
        }
        now = 4.0
        assert demand.report()["first_token_s"] == 4.0, "a wait that goes on shows"
        two()
        report = demand.report()
        assert (report["tokens_per_s"], report["first_token_s"]) == (100.0, 2.5)


def test_a_request_that_gave_up_waits_no_longer_and_idle_time_slows_nothing():
    now = 0.0
    demand = Demand(lambda: now)
    with demand.request(50):
        pass
    assert demand.report()["waiting_tokens"] == 0.0
    for began in (0.0, 10.0):
        now = began
        with demand.request(50) as first_token:
            now = began + 0.5
            first_token()
    assert demand.report()["tokens_per_s"] == 100.0
    now += RECENT_S + 1
    assert demand.report()["first_token_s"] == 0.0 and demand.report()["tokens_per_s"] == 100.0


def test_requests_count_from_their_start_to_their_last_token_however_short_they_are():
    now = 0.0
    demand = Demand(lambda: now)
    with demand.request(50) as first_token:
        first_token()
        now = 0.1
    now = 1.0
    assert demand.report()["requests"] == 0.1
    with demand.request(50) as first_token:
        first_token()
        now = 2.0
        assert demand.report()["requests"] == 1.0, "it goes on after its first token"
    now = 3.0
    assert demand.report()["requests"] == 0.0
