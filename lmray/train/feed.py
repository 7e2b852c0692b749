"""What a step works on, made in a thread while the step before computes. Runs on every rank.

Nothing is drawn at random here and nothing is kept between steps but the next one's: the same things come in the same
order as if each were made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")


class Feed(Generic[S, T]):
    """`make(one)` for each of `asked`, in order; the next is begun as one is given out, in one thread, which ends with
    the block. What `make` raises is raised where what it makes is due. `device`: what the thread pins memory for."""

    def __init__(self, make: Callable[[S], T], asked: Iterable[S], *, device: str):
        self._make, self._asked = make, iter(asked)
        # A thread begins on GPU 0, and pinning would take memory there.
        on_gpu = partial(torch.cuda.set_device, device) if device.startswith("cuda") else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lmray-feed", initializer=on_gpu)
        self._next: Future[T] | None = None

    def __enter__(self) -> Feed[S, T]:
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._next is None:
            raise StopIteration
        made = self._next.result()
        self._begin()
        return made

    def _begin(self) -> None:
        self._next = next((self._thread.submit(self._make, one) for one in self._asked), None)
