"""What an operator may do to the adapters of a running endpoint: list, load, unload, pin, compare. With keys of its
own; without such keys these routes are not there.

Adapters go by `NAME` (the version served now), `NAME@STAGE` or `NAME@VERSION`; nothing here takes a path.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, ValidationError

from lmray.artifacts.artifact import ArtifactRef, Artifacts
from lmray.artifacts.store import open_store
from lmray.errors import ArtifactError, did_you_mean
from lmray.serve.account import Account
from lmray.serve.drift import Drift
from lmray.serve.fleet import Fleet
from lmray.serve.keys import find_key
from lmray.serve.pins import Pins
from lmray.serve.plan import ServePlan


class Judged(BaseModel):
    """How good an answer was."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    id: str
    score: float


ON_REPLICAS, ON_PINS = ("load", "prewarm", "unload"), ("pin", "unpin")


def add_admin(app: FastAPI, fleet: Fleet, plan: ServePlan, drift: Drift | None = None) -> None:
    """Adds `/admin/adapters` to `app`, one of `make_app`, where the plan has keys for it."""
    if plan.admin_keys:
        admin = _Admin(fleet, plan, drift)
        app.add_api_route("/admin/drift", admin.drift, methods=["GET"])
        app.add_api_route("/admin/drift/{version}/reset", admin.reset_drift, methods=["POST"])
        app.add_api_route("/admin/adapters", admin.list, methods=["GET"])
        app.add_api_route("/admin/canaries", admin.canaries, methods=["GET"])
        app.add_api_route("/admin/canaries/scores", admin.score, methods=["POST"])
        app.add_api_route("/admin/adapters/{reference}/{action}", admin.act, methods=["POST"])


class _Admin:
    """The routes, over all replicas of one endpoint."""

    def __init__(self, fleet: Fleet, plan: ServePlan, drift: Drift | None):
        store = open_store(plan.store)
        self._fleet, self._plan, self._drift = fleet, plan, drift
        self._artifacts, self._pins = Artifacts(store), Pins(store, plan.endpoint)

    async def list(self, http: Request) -> Response:
        """Every adapter that is served or refused, and what each replica holds. A merged one is told of once for each
        version that its replicas answer with."""
        if (refused := self._refused(http)) is not None:
            return refused
        await self._fleet.catalogue.look(now=True)
        catalogue, pinned = self._fleet.catalogue, await asyncio.to_thread(self._pins.names)
        adapters = [
            _entry(name, line.current.ref, pinned=name in pinned, refused=line.refused)
            for name in catalogue.names
            if (line := catalogue.line(name)) is not None and line.current is not None
        ]
        served = {entry["name"] for entry in adapters}
        adapters += [
            _entry(name, None, pinned=name in pinned, refused=why)
            for name, why in catalogue.refused.items()
            if name not in served
        ]
        for name, versions in (await self._fleet.merged()).items():
            adapters += [_entry(name, version, merged=True) for version in versions or [None]]
        return JSONResponse({"adapters": adapters, "replicas": await self._everywhere("list", "")})

    async def act(self, http: Request, reference: str, action: str) -> Response:
        """Does `action` on every replica. 404 for an unknown adapter, 409 where no replica could do it, and for a
        merged one."""
        if (refused := self._refused(http)) is not None:
            return refused
        if action not in ON_REPLICAS + ON_PINS:
            known = ON_REPLICAS + ON_PINS
            found = f"unknown action `{action}`; there are: {', '.join(known)}"
            hint = did_you_mean(action, known)
            return _error(404, f"{found}; {hint}" if hint else found, code="unknown_action")
        if (name := reference.partition("@")[0]) in self._plan.merged and action != "unpin":
            found = f"`{name}` is merged: its replicas serve nothing else; promote the version that they are to serve"
            return _error(409, found, code="not_done")
        if action in ON_PINS:
            return await self._pin(reference, pinned=action == "pin")
        artifact = await asyncio.to_thread(self._find, reference)
        outcomes = await self._everywhere(action, artifact)
        if not outcomes:
            return _error(409, "no replica runs", code="not_done")
        errors = [outcome["error"] for outcome in outcomes if outcome["error"]]
        if errors and len(errors) == len(outcomes):
            return _error(409, errors[0], code="not_done")
        return JSONResponse({"version": artifact, "replicas": outcomes})

    async def canaries(self, http: Request) -> Response:
        """What was seen of next versions beside current ones, and which were taken back, with the reason."""
        return self._refused(http) or JSONResponse({"canaries": self._fleet.canaries.report()})

    async def score(self, http: Request) -> Response:
        """Takes a judge's `{"id": ID OF AN ANSWER, "score": NUMBER}`, higher is better."""
        if (refused := self._refused(http)) is not None:
            return refused
        try:
            judged = Judged.model_validate_json(await http.body())
        except ValidationError as error:
            return _error(400, str(error.errors(include_url=False)[0]["msg"]), code="invalid_score")
        self._fleet.canaries.score(judged.id, judged.score)
        return JSONResponse({"canaries": self._fleet.canaries.report()})

    async def drift(self, http: Request) -> Response:
        """What is known of the answers of each version; `versions` is null where none are sampled."""
        return self._refused(http) or JSONResponse({"versions": self._drift and self._drift.report()})

    async def reset_drift(self, http: Request, version: str) -> Response:
        """What a version answers from now on is its baseline."""
        if (refused := self._refused(http)) is not None:
            return refused
        if self._drift is None:
            return _error(404, "no answers are sampled; set `monitor.sample_fraction`", code="not_watched")
        await self._drift.reset(version)
        return JSONResponse({"versions": self._drift.report()})

    async def _pin(self, name: str, *, pinned: bool) -> Response:
        await self._fleet.catalogue.look(now=True)
        catalogue = self._fleet.catalogue
        if pinned and catalogue.line(name) is None:
            hint = did_you_mean(name, catalogue.names)
            raise ArtifactError(f"adapter `{name}`", catalogue.refused.get(name, "is not served"), hint=hint)
        names = await asyncio.to_thread(lambda: self._pins.change(name, pinned=pinned))
        return JSONResponse({"pinned": list(names), "replicas": await self._everywhere("follow", "")})

    async def _everywhere(self, action: str, handle: str) -> list[dict[str, Any]]:
        return await self._fleet.replicas.everywhere("manage", action, handle)

    def _find(self, reference: str) -> str:
        """The handle of what `reference` names. Raises ArtifactError for what is unknown, or does not fit."""
        ref = ArtifactRef.parse(reference)
        line = self._fleet.catalogue.line(ref.name)
        if line is None or line.current is None:
            hint = did_you_mean(ref.name, self._fleet.catalogue.names)
            raise ArtifactError(f"adapter `{ref.name}`", "is not served", hint=hint)
        if ref.at is None:
            return line.current.ref
        artifact = self._artifacts.find(ref)
        self._plan.fit.check(artifact)
        return artifact.ref

    def _refused(self, http: Request) -> Response | None:
        """The answer to whom has no right to be here."""
        scheme, _, key = http.headers.get("authorization", "").partition(" ")
        account: Account = http.state.account
        account.path = http.scope["route"].path
        known = find_key(key.strip(), self._plan.admin_keys) if scheme.lower() == "bearer" else None
        if known is not None:
            account.key = known.name
            return None
        found = "wrong admin key" if key else "no admin key; send `Authorization: Bearer KEY`"
        return _error(401, found, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _entry(
    name: str, version: str | None, *, pinned: bool = False, refused: str | None = None, merged: bool = False
) -> dict[str, Any]:
    return {"name": name, "version": version, "pinned": pinned, "refused": refused, "merged": merged}


def _error(status: int, message: str, *, code: str, headers: dict[str, str] | None = None) -> Response:
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": body}, status, headers=headers)
