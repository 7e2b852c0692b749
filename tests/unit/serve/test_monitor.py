"""The whole watch over a real engine: answers that change raise an alert, and no text is left anywhere."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmray.artifacts.artifact import Artifact
from lmray.config.monitor import Monitor
from lmray.job import EndpointMonitor
from lmray.models.load import load_model
from lmray.serve import catalogue
from lmray.serve.admin import add_admin
from lmray.serve.canaries import Canaries
from lmray.serve.catalogue import Catalogue
from lmray.serve.fleet import Fleet
from lmray.serve.gateway import GatewaySettings, make_app
from lmray.serve.keys import ApiKey
from lmray.serve.live import LiveEngine
from lmray.serve.monitor import Monitoring
from lmray.serve.samples import Sample, Scorer
from tests.unit.serve.test_envelope import metrics as samples_of
from tests.unit.serve.test_live import Place

WINDOW, SECRET = 20, "the client's secret"
ADMIN = {"Authorization": "Bearer operator"}


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch) -> Place:
    monkeypatch.setattr(catalogue, "EVERY_S", 0.0)
    monkeypatch.setattr(catalogue, "PATIENCE_S", 10.0)
    return Place(tmp_path, tiny_model)


class Here:
    """One engine of this process as replicas."""

    def __init__(self, live: LiveEngine):
        self.live = live

    def stream(self, request):
        return self.live.stream(request)

    async def everywhere(self, method: str, *arguments):
        found = getattr(self.live, method)(*arguments)
        return [await found if asyncio.iscoroutine(found) else found]


class Endpoint:
    """A gateway with its watch over `live`."""

    def __init__(self, place: Place, live: LiveEngine, tokenizer, **settings):
        admin = ApiKey(name="admin", sha256=hashlib.sha256(b"operator").hexdigest())
        plan = replace(place.plan("*"), admin_keys=(admin,), monitor=EndpointMonitor(**settings))
        self.monitoring = Monitoring(Here(live), plan, tokenizer, place.store)
        adapters = Catalogue(place.store, plan.served, plan.fit, reserved="tiny")
        adapters.refresh()
        fleet = Fleet(self.monitoring.replicas, adapters, Canaries(place.store, "endpoint"))
        app = make_app(fleet, tokenizer, GatewaySettings("tiny", 64))
        self.monitoring.add_to(app, fleet)
        add_admin(app, fleet, plan, self.monitoring.drift)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://gateway")

    async def ask(self, count: int, model: str = "helper") -> None:
        for seed in range(count):
            told = {"model": model, "prompt": SECRET, "max_tokens": 24, "temperature": 1.0, "seed": seed}
            answer = await self.client.post("/v1/completions", json=told)
            assert answer.status_code == 200
            if self.monitoring.scoring is not None:
                await self.monitoring.scoring.settle()

    async def metrics(self) -> dict[str, float]:
        return samples_of((await self.client.get("/metrics")).text)


def keep_plain(place: Place) -> Artifact:
    """Promotes a version of `helper` that changes nothing of the base model."""
    folder = place.root / "plain"
    shutil.copytree(place.root / "adapter-1", folder)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: one * ("lora_A" in name) for name, one in weights.items()}, folder / "adapter_model.safetensors")
    artifact = place.artifacts.keep("helper", folder, base={"source": "tiny", "digest": place.digest})
    return place.artifacts.promote(artifact.ref, "production")


def test_a_promotion_that_changes_the_answers_raises_an_alert_everywhere(place, tokenizer, caplog):
    first = place.keep("helper", seed=1)

    async def main():
        live = place.start("*")
        await live.start()
        here = Endpoint(place, live, tokenizer, sample_fraction=1.0, window=WINDOW, baseline="adapter")
        await here.ask(2 * WINDOW)
        before = await here.metrics()
        second = keep_plain(place)
        await here.ask(WINDOW)
        after = await here.metrics()
        told = (await here.client.get("/admin/drift", headers=ADMIN)).json()["versions"]
        await live.engine.close()
        return second, before, after, told

    with caplog.at_level(logging.DEBUG):
        second, before, after, told = asyncio.run(main())
    old, new = (f'{{model="helper",version="{one.id[:12]}"}}' for one in (first, second))
    assert before[f"lmray_serve_drift_alert{old}"] == after[f"lmray_serve_drift_alert{old}"] == 0
    assert after[f"lmray_serve_drift_alert{new}"] == after[f"lmray_serve_drift_alerts_total{new}"] == 1
    assert before[f"lmray_serve_drift_answers_total{old}"] == 2 * WINDOW
    assert {one["version"]: one["outcome"] for one in told} == {first.ref: "ok", second.ref: "alert"}
    measures = next(one for one in told if one["version"] == second.ref)["measures"]
    assert measures["log_perplexity"]["now"] < measures["log_perplexity"]["before"]
    assert f"answers of `{second.ref}` are not what they were: " in caplog.text
    [event] = [json.loads(path.read_text()) for path in place.store.root.glob("endpoints/endpoint/events/*.json")]
    assert (event["version"], event["outcome"]) == (second.ref, "alert")
    assert after["lmray_serve_replicas"] == 1 and after['lmray_serve_kv_blocks_used{replica="0"}'] == 0
    assert after['lmray_serve_adapter_cache_loads_total{replica="0"}'] >= 1
    assert not text_in(place.store.root) and SECRET not in caplog.text


def text_in(root: Path) -> bool:
    """Whether what the watch left in a store holds any text but names of measures, versions and outcomes."""
    found = [path for path in (root / "endpoints").rglob("*.json") if SECRET in path.read_text(encoding="utf-8")]
    for path in (root / "endpoints" / "endpoint" / "drift").iterdir():
        values = json.loads(path.read_text())["values"]
        found += [path] if not all(isinstance(one, float) for values in values.values() for one in values) else []
    return bool(found) or (root / "endpoints" / "endpoint" / "samples").exists()


def test_the_score_is_the_perplexity_that_transformers_gives(place, tokenizer):
    prompt, answer = (10, 20, 30), (40, 50, 60, 70)

    async def main() -> dict[str, float]:
        live = place.start("*")
        await live.start()
        found = await Scorer(Here(live), tokenizer, Monitor()).score(Sample("helper@1", prompt, answer, True))
        await live.engine.close()
        return found

    scores = asyncio.run(main())
    model = load_model(place.model, "float32")
    with torch.no_grad():
        logits_TV = model(torch.tensor([(*prompt, *answer)])).logits[0].log_softmax(-1)  # type: ignore[operator]
    expected = -sum(float(logits_TV[len(prompt) - 1 + place, token]) for place, token in enumerate(answer)) / 4
    assert scores["log_perplexity"] == pytest.approx(expected, abs=1e-4) and math.isfinite(expected)
    assert scores["length"] == 4.0


def test_an_endpoint_that_samples_nothing_watches_nothing_and_still_tells_of_its_replicas(place, tokenizer):
    place.keep("helper", seed=1)

    async def main():
        live = place.start("*")
        await live.start()
        here = Endpoint(place, live, tokenizer)
        await here.ask(1)
        told = await here.client.get("/admin/drift", headers=ADMIN)
        reset = await here.client.post("/admin/drift/helper@aaaaaaaa/reset", headers=ADMIN)
        found = await here.metrics()
        await live.engine.close()
        return here, told, reset, found

    here, told, reset, found = asyncio.run(main())
    assert isinstance(here.monitoring.replicas, Here)
    assert told.json() == {"versions": None} and reset.status_code == 404
    assert "monitor.sample_fraction" in reset.json()["error"]["message"]
    assert found["lmray_serve_replicas"] == 1 and not any(name.startswith("lmray_serve_drift") for name in found)


def test_an_operator_resets_a_baseline_and_others_may_not_look(place, tokenizer):
    artifact = place.keep("helper", seed=1)

    async def main():
        live = place.start("*")
        await live.start()
        here = Endpoint(place, live, tokenizer, sample_fraction=1.0, window=WINDOW, perplexity=False)
        await here.ask(WINDOW)
        path = f"/admin/drift/{artifact.ref}/reset"
        found = [await here.client.get("/admin/drift"), await here.client.post(path)]
        found += [await here.client.post(path, headers=ADMIN)]
        found += [await here.client.post("/admin/drift/none@aaaaaaaa/reset", headers=ADMIN)]
        await live.engine.close()
        return found

    closed, refused, reset, unknown = asyncio.run(main())
    assert (closed.status_code, refused.status_code) == (401, 401)
    assert reset.json()["versions"][0]["baseline"] == 0
    assert unknown.status_code == 400 and "is not watched" in unknown.json()["error"]["message"]
