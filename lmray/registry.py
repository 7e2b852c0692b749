"""Families: a folder where one file is one member, and the file's name is its name in YAML.

`lmray/adapters/lora.py` holds `class Lora` and is written `adapter: {name: lora}`. Listing a family reads file names
only; a member's module is imported when a job names it.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from lmray.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Family:
    """A folder of members: `package` is its dotted name, `word` what one member is called in messages."""

    package: str
    word: str

    def names(self) -> tuple[str, ...]:
        """Names of all members, sorted; imports none of them."""
        return _names(self.package)

    def load(self, name: str) -> type:
        """The class of member `name`. Raises ConfigError naming the members there are."""
        if name not in self.names():
            allowed = ", ".join(self.names())
            raise ConfigError(
                self.word, f"unknown {self.word} `{name}`", allowed=allowed, hint=did_you_mean(name, self.names())
            )
        module = importlib.import_module(f"{self.package}.{name}")
        return getattr(module, class_name(name))


@cache
def _names(package: str) -> tuple[str, ...]:
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None, package
    found = pkgutil.iter_modules(spec.submodule_search_locations)
    return tuple(sorted(module.name for module in found if module.name != "base" and not module.name.startswith("_")))


def class_name(member: str) -> str:
    """`json_match` -> `JsonMatch`."""
    return "".join(part.capitalize() for part in member.split("_"))


METHODS = Family("lmray.methods", "method")
ADAPTERS = Family("lmray.adapters", "adapter")
SHARDINGS = Family("lmray.sharding", "sharding strategy")
TASKS = Family("lmray.tasks", "evaluation task")
TRACKERS = Family("lmray.trackers", "tracker")
ENGINES = Family("lmray.engines", "engine")
SPECULATIONS = Family("lmray.engines._speculation", "speculation")
OPTIMIZERS = Family("lmray.optim", "optimizer")
SCHEDULES = Family("lmray.schedules", "learning-rate schedule")
MAPPINGS = Family("lmray.data.mappings", "data mapping")
FILTERS = Family("lmray.data.filters", "filter of texts")
FAMILIES = {
    "methods": METHODS,
    "adapters": ADAPTERS,
    "sharding": SHARDINGS,
    "tasks": TASKS,
    "trackers": TRACKERS,
    "engines": ENGINES,
    "speculation": SPECULATIONS,
    "optim": OPTIMIZERS,
    "schedules": SCHEDULES,
    "mappings": MAPPINGS,
    "filters": FILTERS,
}
