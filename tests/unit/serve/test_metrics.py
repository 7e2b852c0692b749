"""The page of metrics: every name is in the list, and however many adapters and keys there are it stays bounded."""

from __future__ import annotations

import asyncio

import pytest

from lmray.engines.base import TokenEvent
from lmray.metrics.names import SERVE
from lmray.serve.account import Account
from lmray.serve.metrics import MAX_MODELS, MAX_PAIRS, OTHER, Metrics
from tests.unit.serve.test_envelope import metrics as samples_of

PATH = "/v1/chat/completions"


def answer(metrics: Metrics, model: str, key: str, *, status: int = 200) -> None:
    """One request with an answer of two tokens."""

    async def main():
        account = Account(metrics, "id", path=PATH, model=model, key=key)
        account.ask(7)
        before_s = account.take(TokenEvent("r", 5, prefill_s=0.0), None)
        account.take(TokenEvent("r", 6, "length"), before_s)
        account.status = status
        await account.close()

    asyncio.run(main())


def page(metrics: Metrics) -> dict[str, float]:
    return samples_of(asyncio.run(metrics.page()).decode())


def total(found: dict[str, float], name: str, label: str = "") -> float:
    return sum(value for one, value in found.items() if one.startswith(name + "{") and label in one)


def test_a_thousand_adapters_and_ten_keys_make_no_ten_thousand_series():
    metrics = Metrics()
    for place in range(2000):
        answer(metrics, f"a{place % 1000}", f"k{place % 7}")
    found = page(metrics)
    assert len(found) < 5000
    models = {one.partition('model="')[2].partition('"')[0] for one in found if "model=" in one}
    assert len(models) == MAX_MODELS + 1 and OTHER in models
    pairs = [one for one in found if one.startswith("lmray_serve_prompt_tokens_total")]
    assert len(pairs) <= MAX_PAIRS + MAX_MODELS + 1
    assert total(found, "lmray_serve_requests_total") == 2000
    assert total(found, "lmray_serve_prompt_tokens_total") == 2000 * 7
    assert total(found, "lmray_serve_time_to_first_token_seconds_count") == 2000
    assert found[f'lmray_serve_running_requests{{model="{OTHER}"}}'] == 0


def test_an_adapter_that_is_asked_much_gets_a_series_of_its_own_and_the_rest_never_falls():
    metrics = Metrics()
    for place in range(MAX_MODELS + 10):
        answer(metrics, f"a{place}", "k")
    before = page(metrics)
    for _ in range(5):
        answer(metrics, "late", "k")
    found = page(metrics)
    assert 'lmray_serve_running_requests{model="late"}' in found
    other = f'lmray_serve_generated_tokens_total{{key="k",model="{OTHER}"}}'
    assert found[other] >= before[other] > 0
    assert total(found, "lmray_serve_time_to_first_token_seconds_count", 'model="late"') == 3  # after it was let in


@pytest.mark.parametrize("taken", ["model", "pair"])
def test_what_lost_its_place_while_a_request_ran_has_no_series_again(taken):
    metrics = Metrics()

    async def main():
        account = Account(metrics, "id", path=PATH, model="lost", key="lost-key", status=200)
        account.ask(7)
        for place in range(MAX_MODELS if taken == "model" else MAX_PAIRS):
            for _ in range(3):
                other = Account(
                    metrics, "id", path=PATH, model=f"a{place}" if taken == "model" else "lost", key=f"k{place}"
                )
                other.ask(7)
                await other.close()
        between_s = account.take(TokenEvent("r", 5, prefill_s=0.0), None)
        account.take(TokenEvent("r", 6, "length"), between_s)
        await account.close()

    asyncio.run(main())
    found = page(metrics)
    lost = 'model="lost"' if taken == "model" else 'key="lost-key"'
    assert not [one for one in found if lost in one]
    model = OTHER if taken == "model" else "lost"
    assert found[f'lmray_serve_generated_tokens_total{{key="{OTHER}",model="{model}"}}'] == 2
    assert all(value == 0 for one, value in found.items() if one.startswith("lmray_serve_running_requests"))


def test_many_keys_leave_a_models_sums_right():
    metrics = Metrics()
    for place in range(MAX_PAIRS + 50):
        answer(metrics, "busy", f"k{place}")
    found = page(metrics)
    assert total(found, "lmray_serve_generated_tokens_total", 'model="busy"') == 2 * (MAX_PAIRS + 50)
    assert found[f'lmray_serve_generated_tokens_total{{key="{OTHER}",model="busy"}}'] == 2 * 50


def test_errors_are_told_by_model_and_key():
    metrics = Metrics()
    answer(metrics, "helper", "team", status=500)
    name = f'lmray_serve_requests_total{{key="team",model="helper",path="{PATH}",status="500"}}'
    assert page(metrics)[name] == 1


def test_every_series_is_of_a_metric_of_the_list():
    metrics = Metrics()
    answer(metrics, "helper", "team")
    metrics.filtered.labels("secrets", "answers", "secrets", "refuse").inc()
    found = {one.partition("{")[0] for one in page(metrics)}
    ends = ("", "_bucket", "_sum", "_count")
    assert found and all(any(one.removesuffix(end) in SERVE for end in ends) for one in found)
