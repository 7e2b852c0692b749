"""lmray: fine-tune, sweep, keep and serve language models on a Ray cluster, through one job API.

The names below are bound on first use, so that `import lmray` brings in neither torch nor Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmray.job import load as load
    from lmray.on_ray.jobs import submit as submit
    from lmray.on_ray.run import run as run

__version__ = "0.1.0"
__all__ = ["__version__", "load", "run", "submit"]

_HOME = {"load": "lmray.job", "run": "lmray.on_ray.run", "submit": "lmray.on_ray.jobs"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'lmray' has no attribute {name!r}")
