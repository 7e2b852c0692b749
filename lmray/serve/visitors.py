"""Who asks, for those who treat equal visitors equally: the name of the key that the gateway verified.

A context variable carries it past the layers that have no use for it.
"""

from __future__ import annotations

from contextvars import ContextVar

VISITOR: ContextVar[str] = ContextVar("visitor", default="")
"""Name of the request's key; empty where no key is asked for, whatever clients send."""
