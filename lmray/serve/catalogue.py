"""Which adapters of the store may be asked for, and which version each name stands for now: an index in memory.

It follows the store by looking at stamps, at most once a second and only when somebody asks; what did not change is not
read again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from lmray.artifacts.artifact import STAGES, Artifact, ArtifactRef, Artifacts
from lmray.artifacts.served import Canary, ServedAdapter
from lmray.artifacts.store import Store
from lmray.config import is_name
from lmray.errors import ArtifactError
from lmray.serve.fit import Fit

EVERY_S = 1.0
"""Changes in the store show after so long."""
UNFIT_S = 60.0
"""After so long a version that replicas refused is tried once more: what kept it from loading may have passed."""
PATIENCE_S = 0.05
"""A store that takes longer to answer is not waited for: what was known before holds until it has."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """What stands under one name."""

    stamp: object
    current: Artifact | None
    refused: str | None = None
    """Why its version, or its next one, is not served."""
    canary: Artifact | None = None
    """The next version, for a share of the requests."""
    settings: Canary | None = None
    """Of that."""
    unfit: frozenset[str] = frozenset()
    """Versions that replicas refused since the line was read."""
    until_s: float = math.inf
    """When it is read again, though its stamp is the same."""


class Catalogue:
    """The adapters of `store` that `served` names and that fit, but for merged ones, which no pattern names either and
    of which the other names alone are here. `refresh` may run on another thread than the rest."""

    def __init__(
        self,
        store: Store,
        served: Sequence[ServedAdapter],
        fit: Fit,
        *,
        reserved: str = "",
        only: Callable[[], Iterable[str]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`reserved`: the base model's name, which no adapter may take; `only`: look after these names alone."""
        self._store, self._artifacts, self._fit = store, Artifacts(store), fit
        self._served = sorted(served, key=lambda one: one.is_pattern)  # a name comes before patterns it fits
        self._merged = tuple(one.artifact for one in served if one.merged)
        self._reserved, self._only, self._clock = reserved, only, clock
        self._lines: dict[str, Line] = {}
        self._names: tuple[str, ...] = ()
        self._aliases: dict[str, tuple[str, str]] = {}
        self._looked = float("-inf")
        self._looking: asyncio.Future[None] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names that are served, sorted."""
        return self._names

    @property
    def aliases(self) -> dict[str, tuple[str, str]]:
        """`NAME@STAGE` of names that are served from a stage, merged or not, or have a next version there; name and
        stage."""
        return self._aliases

    @property
    def refused(self) -> dict[str, str]:
        """Names whose version does not fit, with the reason."""
        return {name: line.refused for name, line in self._lines.items() if line.refused}

    def line(self, name: str) -> Line | None:
        """What stands under `name`, None where nothing is served."""
        line = self._lines.get(name)
        return line if line is not None and line.current is not None else None

    async def current(self, name: str) -> Artifact | None:
        """What `name` stands for in the store as it is now, not as it was at the last look."""
        served, before = self._served_as(name), self._lines.get(name)
        if served is None or before is None:
            return None
        line = await asyncio.to_thread(self._line, name, served)
        if self._lines.get(name) is before:
            self._lines[name] = line
        return line.current

    async def refuse(self, name: str, version: str, why: str) -> Artifact | None:
        """Takes `version` (`NAME@VERSION`), which replicas refuse, from under `name`, for `UNFIT_S` or until its stages
        change; what its stage held before serves meanwhile. Returns what does; None where nothing is left."""
        line = self._lines.get(name)
        if line is None or line.current is None or line.current.ref != version:
            return line.current if line is not None else None
        if line.current.id in line.unfit:
            return None
        unfit, until_s = line.unfit | {line.current.id}, self._clock() + UNFIT_S
        earlier = await asyncio.to_thread(self._earlier, name, unfit)
        if self._lines.get(name) is line:
            changed = replace(line, refused=why, unfit=unfit, until_s=until_s)
            self._lines[name] = changed if earlier is None else replace(changed, current=earlier)
            serves = f"`{earlier.ref}` serves this name" if earlier is not None else "nothing earlier serves"
            _LOG.warning("%s, for `%s` cannot be: %s", serves, version, why)
        return earlier

    def _earlier(self, name: str, unfit: frozenset[str]) -> Artifact | None:
        """The last version that `name` stood for, by its stage's log or by age, which fits and is none of `unfit`."""
        try:
            served = self._served_as(name)
            versions = {one.id: one for one in reversed(self._artifacts.versions(name))}
            if served is not None and served.stage in STAGES:
                log = [one["previous"] for one in self._artifacts.log(name) if one["stage"] == served.stage]
                versions = {one: versions[one] for one in reversed(log) if one in versions}
            return next((one for one in versions.values() if one.id not in unfit and self._fits(one)), None)
        except (ArtifactError, OSError, LookupError, TypeError, AttributeError, ValueError) as error:
            _LOG.warning("what `%s` stood for before cannot be read: %s", name, error)
            return None

    def _fits(self, artifact: Artifact) -> bool:
        try:
            self._fit.check(artifact)
        except ArtifactError:
            return False
        return True

    def refresh(self) -> None:
        """Brings the index up to date. Raises OSError where the store cannot be listed."""
        names = self._store.folders("artifacts") if self._only is None else sorted(set(self._only()))
        lines: dict[str, Line] = {}
        for name in names:
            served = self._served_as(name)
            if served is not None and not served.merged and name != self._reserved:
                lines[name] = self._line(name, served)
        self._lines = lines
        self._names = tuple(name for name, line in lines.items() if line.current is not None)
        answering = (*self._names, *self._merged)
        stages = [(name, served.stage) for name in answering if (served := self._served_as(name)) is not None]
        stages += [(name, line.settings.stage) for name, line in lines.items() if line.settings is not None]
        self._aliases = {f"{name}@{stage}": (name, stage) for name, stage in stages if stage in STAGES}

    async def look(self, *, now: bool = False) -> None:
        """Refreshes where the last look was `EVERY_S` ago or `now`, on a thread of its own, one at a time."""
        running = self._looking is not None and not self._looking.done()
        if not running and (now or self._clock() - self._looked >= EVERY_S):
            self._looked = self._clock()
            self._looking = asyncio.ensure_future(asyncio.to_thread(self._refresh_or_log))
        if self._looking is not None:
            await asyncio.wait({self._looking}, timeout=PATIENCE_S)

    def _refresh_or_log(self) -> None:
        try:
            self.refresh()
        except OSError as error:
            _LOG.warning("the store cannot be read, what was known of it holds: %s", error)

    def _line(self, name: str, served: ServedAdapter) -> Line:
        """The line of `name`, read again where its stamp changed. One that cannot be read is what it was, and is read
        again with the next look."""
        known = self._lines.get(name)
        try:
            stamp = self._stamp(name, served)
            holds = known is not None and known.stamp == stamp and self._clock() < known.until_s
            return known if known is not None and holds else self._read(name, served, stamp, known)
        except OSError as error:
            _LOG.warning("artifact `%s` cannot be read, what was known of it holds: %s", name, error)
            return known or Line(object(), None, f"artifact `{name}`: cannot be read: {error}")  # equals no stamp

    def _served_as(self, name: str) -> ServedAdapter | None:
        if not is_name(name):  # a folder that somebody made by hand
            return None
        return next((one for one in self._served if fnmatchcase(name, one.artifact)), None)

    def _stamp(self, name: str, served: ServedAdapter) -> object:
        stages = self._store.stamp(f"artifacts/{name}/stages.json")
        return stages if served.stage in STAGES else (stages, *self._store.list(f"artifacts/{name}/versions"))

    def _read(self, name: str, served: ServedAdapter, stamp: object, known: Line | None) -> Line:
        """The line of `name`. A version that does not fit leaves the one before it in place."""
        current, refused = self._version(name, served.stage)
        if refused is not None and known is not None and known.current is not None:
            current = known.current
            _LOG.warning("`%s` stays what serves this name: %s", current.ref, refused)
        line = Line(stamp, current, refused)
        if served.canary is None or current is None:
            return line
        canary, refused = self._version(name, served.canary.stage)
        if canary is None:
            return replace(line, refused=line.refused or refused)
        if canary.id == current.id:  # promoted; its stage's name goes on
            return replace(line, settings=served.canary)
        return replace(line, canary=canary, settings=served.canary)

    def _version(self, name: str, stage: str | None) -> tuple[Artifact | None, str | None]:
        """What `stage` of `name` holds, or why that is not served; neither where it holds nothing."""
        try:
            if stage in STAGES and stage not in self._artifacts.stages(name):
                return None, None
            artifact = self._artifacts.find(ArtifactRef(name, stage))
            self._fit.check(artifact)
        except ArtifactError as error:
            return None, str(error)
        except (LookupError, TypeError, AttributeError, ValueError) as error:  # of one record; the others are served
            return None, f"artifact `{name}`: its record cannot be read: {error}"
        return artifact, None
