"""Next versions on a share of an adapter's traffic: who gets them, what was seen of them, and which were taken back.

What was taken back is kept in the store, so that an endpoint that starts again does not try it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Literal

from lmray.artifacts.artifact import Artifact
from lmray.artifacts.served import Canary
from lmray.artifacts.store import Store
from lmray.errors import ArtifactError, DataError
from lmray.policies.canary import Rule, Tally, objection, takes_canary
from lmray.serve.catalogue import Line

Arm = Literal["current", "canary"]
REMEMBERED = 10_000
"""Answers that can still be given a score."""
APART_S = 10.0
"""What a replica's end costs a version counts once in such a time: a replica takes along all it has."""
_LOG = logging.getLogger(__name__)


@dataclass
class Comparison:
    """Two versions of one adapter side by side, from when they were first met."""

    current: str
    canary: str
    rule: Rule
    tallies: dict[Arm, Tally] = field(default_factory=lambda: {"current": Tally(), "canary": Tally()})
    taken_back: str | None = None
    """Why the new version gets no more requests."""
    counted_s: dict[str, float] = field(default_factory=dict)
    """Version -> when a replica's end was last counted."""


class Canaries:
    """All comparisons of one endpoint."""

    def __init__(self, store: Store, endpoint: str):
        self._store, self._key = store, f"endpoints/{endpoint}/canaries.json"
        self._taken_back: dict[str, str] = self._read()
        self._comparisons: dict[str, Comparison] = {}
        self._answers: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._writing: set[asyncio.Future[None]] = set()

    def choose(self, name: str, line: Line, keys: dict[str, str]) -> tuple[Artifact, Comparison | None]:
        """The version of `name` for a request, and what it is compared in. `keys`: by what requests may stick."""
        assert line.current is not None
        if line.canary is None or line.settings is None:
            return line.current, None
        compared = self._compare(name, line.current.ref, line.canary.ref, line.settings)
        picks = takes_canary(f"{line.canary.ref} {keys[line.settings.sticky]}", line.settings.share)
        if compared.taken_back is None and picks:
            return line.canary, compared
        return line.current, compared

    def answered(self, compared: Comparison, version: str, *, request_id: str, first_token_s: float) -> None:
        """Counts a request that got its first token."""
        self._answers[answer_of(request_id)] = (compared.current, version)
        if len(self._answers) > REMEMBERED:
            self._answers.popitem(last=False)
        self._count(compared, version, lambda tally: tally.answered(first_token_s))

    def failed(self, compared: Comparison, version: str, *, answered: bool) -> None:
        """Counts a request that failed, before its first token or after it was `answered`."""
        self._count(compared, version, lambda tally: tally.failed(answered=answered))

    def lost(self, compared: Comparison, *, now_s: float) -> None:
        """Counts a request to the next version that no replica answered, after the current version has."""
        if self._apart(compared, compared.canary, now_s):
            self._count(compared, compared.canary, lambda tally: tally.lost_one())

    def broke_off(self, compared: Comparison, version: str, *, now_s: float) -> None:
        """Counts an answer whose replica ended after its first token as one that failed."""
        if self._apart(compared, version, now_s):
            self.failed(compared, version, answered=True)

    def score(self, answer_id: str, score: float) -> None:
        """Counts a judgement of an answer, higher is better. Raises DataError for an answer that is not compared or is
        long gone."""
        current, version = self._answers.get(answer_of(answer_id), ("", ""))
        compared = next((one for one in self._comparisons.values() if one.current == current), None)
        if compared is None or version not in (compared.current, compared.canary):
            found = "is none of an adapter with a canary, or too old"
            raise DataError(f"answer `{answer_id}`", found, allowed="the `id` of a recent answer")
        self._count(compared, version, lambda tally: tally.scored(score))

    def report(self) -> list[dict[str, Any]]:
        """All comparisons; JSON types."""
        return [
            {
                "name": name,
                "current": {"version": one.current, **one.tallies["current"].summary()},
                "canary": {"version": one.canary, **one.tallies["canary"].summary()},
                "taken_back": one.taken_back,
            }
            for name, one in sorted(self._comparisons.items())
        ]

    def _compare(self, name: str, current: str, canary: str, settings: Canary) -> Comparison:
        known = self._comparisons.get(name)
        if known is None or (known.current, known.canary) != (current, canary):
            known = Comparison(current, canary, _rule(settings), taken_back=self._taken_back.get(canary))
            self._comparisons[name] = known
        return known

    def _apart(self, compared: Comparison, version: str, now_s: float) -> bool:
        if now_s - compared.counted_s.get(version, -math.inf) < APART_S:
            return False
        compared.counted_s[version] = now_s
        return True

    def _count(self, compared: Comparison, version: str, change: Any) -> None:
        arm: Arm = "canary" if version == compared.canary else "current"
        compared.tallies[arm] = change(compared.tallies[arm])
        if compared.taken_back is None:
            compared.taken_back = objection(compared.rule, compared.tallies["current"], compared.tallies["canary"])
            if compared.taken_back is not None:
                self._taken_back[compared.canary] = compared.taken_back
                _LOG.warning("`%s` is taken back: %s", compared.canary, compared.taken_back)
                writing = asyncio.ensure_future(asyncio.to_thread(self._write, compared.canary, compared.taken_back))
                self._writing.add(writing)
                writing.add_done_callback(self._writing.discard)

    def _read(self) -> dict[str, str]:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            return {version: facts["why"] for version, facts in json.loads(self._store.get(self._key) or b"{}").items()}
        raise ArtifactError(f"{self._store.root}/{self._key}", "is no record of canaries", hint="remove the file")

    def _write(self, version: str, why: str) -> None:
        while True:
            document = self._store.get(self._key)
            found = {**json.loads(document or b"{}"), version: {"why": why, "time": round(time.time(), 3)}}
            content = (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode()
            if self._store.compare_and_swap(self._key, document, content):
                return


def _rule(settings: Canary) -> Rule:
    return Rule(
        settings.min_requests, settings.max_error_increase, settings.max_latency_increase, settings.max_score_drop
    )


def answer_of(request_id: str) -> str:
    """An answer's id as clients see it: several answers to one request carry its id with a number behind."""
    return "-".join(request_id.split("-")[:2])
