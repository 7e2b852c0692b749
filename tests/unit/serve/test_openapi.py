"""The OpenAPI document is true: schemathesis asks what it allows and what it forbids, and compares what comes."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, settings

from lmray.serve.gateway import GatewaySettings, make_app
from lmray.serve.openapi import openapi_document
from lmray.testing.tiny import tiny_tokenizer
from tests.unit.serve.conftest import MAX_LENGTH
from tests.unit.serve.fakes import FakeBackend
from tests.unit.serve.servers import key

schemathesis = pytest.importorskip("schemathesis")
NUM_EXAMPLES = 40
UNKNOWABLE = ("positive_data_acceptance",)
"""Which models are served, and which fields contradict each other, no schema tells."""


def app_with(keys=()):
    tokenizer = tiny_tokenizer()
    backend = FakeBackend(tokenizer("日本🙂", add_special_tokens=False)["input_ids"])
    return make_app(backend, tokenizer, GatewaySettings("tiny", MAX_LENGTH, keys=keys))


OPEN, LOCKED = app_with(), app_with((key("mine", metrics=True),))
schema = schemathesis.openapi.from_asgi("/openapi.json", OPEN)
locked = schemathesis.openapi.from_asgi("/openapi.json", LOCKED)
few = settings(
    max_examples=NUM_EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


def excluded() -> list[Any]:
    return [check for check in schemathesis.checks.CHECKS.get_all() if check.__name__ in UNKNOWABLE]


@schema.parametrize()
@few
def test_an_endpoint_without_keys_does_what_its_document_says(case):
    case.call_and_validate(excluded_checks=excluded())


@locked.parametrize()
@few
def test_an_endpoint_with_keys_does_what_its_document_says(case):
    case.call_and_validate(headers={"Authorization": "Bearer mine"}, excluded_checks=excluded())


def document(app) -> dict[str, Any]:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            return await client.get("/openapi.json")

    return asyncio.run(ask()).json()


def test_every_route_of_the_protocol_is_in_the_document():
    told = document(OPEN)
    routes = [route for route in OPEN.routes if isinstance(route, APIRoute) and route.include_in_schema]
    assert set(told["paths"]) == {route.path.replace(":path", "") for route in routes} - {"/openapi.json"}


def test_the_document_says_whether_a_key_is_asked_for():
    assert "security" not in document(OPEN)["paths"]["/v1/models"]["get"]
    told = document(LOCKED)
    assert told["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
    assert told["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    assert "security" not in told["paths"]["/health"]["get"]


def test_nothing_in_the_document_is_fetched_from_elsewhere():
    assert "http://" not in str(openapi_document(version="0", has_keys=True))
    assert "https://" not in str(openapi_document(version="0", has_keys=True))
