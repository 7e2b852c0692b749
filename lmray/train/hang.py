"""Ends a rank that makes no progress, and leaves the stacks of its threads: a hung collective is an error, no stall.

Every rank has a watchdog, a thread that looks at the process's pulse (`lmray/pulse.py`). It runs while the rank waits
in a collective or for a GPU, for both let go of Python's lock. Code that never does would stop the watchdog too: for
that there is `faulthandler`'s timer, which needs no lock and is wound up again at every look.

Where one rank hangs, the others soon wait for it. So the first to write its stacks is followed by the others, and only
then do their processes end: whoever started them (Ray Train, torchrun) starts them again.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lmray.artifacts.files import write_atomic
from lmray.context import RunContext
from lmray.errors import HangError
from lmray.pulse import PULSE, Pulse
from lmray.units import human_seconds

HUNG = 75
"""Exit status, `EX_TEMPFAIL`: another attempt may succeed."""
LONGEST_LOOK_S = 5.0
"""Between two looks; shorter where the timeout is."""
GRACE_S = 30.0
"""How long the first rank waits for the stacks of the others."""
PAUSE_S = 0.1
NUM_SHOWN = 4
"""So many ranks an error tells of."""
PREFIX = "stacks-"


class Watchdog:
    """One rank's, for the length of a `with` block; the thread that enters it is the one that trains. `clock`, `sleep`
    and `end` are for tests."""

    def __init__(
        self,
        ctx: RunContext,
        timeout_s: float,
        *,
        pulse: Pulse = PULSE,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        end: Callable[[int], object] = os._exit,
    ):
        self.ctx, self.timeout_s, self.pulse = ctx, timeout_s, pulse
        self._clock, self._sleep, self._end = clock, sleep, end
        self.look_s = min(timeout_s / 4, LONGEST_LOOK_S)
        self._beats, self._idle_s, self._looked = pulse.beats, 0.0, clock()
        self._trains, self._over = threading.get_ident(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="lmray-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._wind_up()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()  # where it is ending the process, this is where the block ends
        faulthandler.cancel_dump_traceback_later()

    def _work(self) -> None:
        while not self._over.wait(self.look_s):
            self._wind_up()
            why = self.look()
            if why is not None:
                self.leave(why)

    def _wind_up(self) -> None:
        faulthandler.dump_traceback_later(self.timeout_s + 2 * GRACE_S, exit=True, file=2)

    def look(self) -> str | None:
        """Why this process is to end, or None. Counts the time since the last look where the pulse stood still in it;
        what is longer than a look should take is time in which the whole process was stopped."""
        now, before = self._clock(), self._looked
        self._looked = now
        if self.pulse.waits or self.pulse.beats != self._beats:
            self._beats, self._idle_s = self.pulse.beats, 0.0
        else:
            self._idle_s += min(now - before, 2 * self.look_s)
        if not self._idle_s and not self.pulse.waits:
            return None
        silent = human_seconds(self._idle_s)
        with suppress(OSError):  # a store that is away tells of nobody
            if others := stacks(self.ctx.folder):
                return f"followed rank {next(iter(others))}, after {silent} without progress"
        return f"no progress for {silent}" if self._idle_s >= self.timeout_s else None

    def leave(self, why: str) -> None:
        """Writes the stacks, says so, waits for the other ranks to have written theirs, and ends the process."""
        faulthandler.dump_traceback_later(2 * GRACE_S, exit=True, file=2)  # a store may hang, too
        try:
            self._leave(why)
        finally:
            self._end(HUNG)

    def _leave(self, why: str) -> None:
        ctx, path = self.ctx, self.ctx.folder / f"{PREFIX}{self.ctx.rank}.txt"
        place = f"rank {ctx.rank} of {ctx.world_size} at step {self.pulse.step}, {self.pulse.doing}"
        text = "\n".join([f"{place}: {why}", "", *self._stacks()])
        try:
            write_atomic(path, text)
        except OSError as error:
            print(f"{path} cannot be written: {error}\n{text}", file=sys.stderr, flush=True)
        if not why.startswith("followed"):
            ctx.patience.say(f"{place}: {why}; its stacks are in {path}, the process ends")
        until = self._clock() + GRACE_S
        while self._clock() < until and len(stacks(ctx.folder)) < ctx.world_size:
            self._sleep(PAUSE_S)

    def _stacks(self) -> Iterator[str]:
        """Of all threads but this one, that of the training first."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != self._trains)
        for number, frame in frames:
            if number == threading.get_ident():
                continue
            trains = ", which trains" if number == self._trains else ""
            yield f"Thread {names.get(number, number)}{trains}:"
            yield "".join(traceback.format_stack(frame))


@contextmanager
def watched(ctx: RunContext, timeout_s: float | None) -> Iterator[None]:
    """Ends this process where it makes no progress for `timeout_s` within the block; never where that is None."""
    if timeout_s is None:
        yield
        return
    with Watchdog(ctx, timeout_s):
        yield


def stacks(folder: Path) -> dict[int, Path]:
    """The files that the ranks of the last attempt of the run in `folder` left, by rank."""
    found = {path.stem.removeprefix(PREFIX): path for path in folder.glob(f"{PREFIX}*.txt")}
    return {int(rank): found[rank] for rank in sorted(filter(str.isdecimal, found), key=int)}


def set_aside(folder: Path) -> None:
    """Gives the stacks of an earlier attempt another name; to be called by rank 0 when an attempt begins."""
    for path in stacks(folder).values():
        os.replace(path, path.with_name(f"earlier-{path.name}"))


def hang_error(name: str, folder: Path) -> HangError | None:
    """How the last attempt of run `name` ended, where that was a hang."""
    left = stacks(folder)
    if not left:
        return None
    heads = [path.read_text(encoding="utf-8").partition("\n")[0] for path in left.values()]
    more = [f"and {len(heads) - NUM_SHOWN} more ranks"] if len(heads) > NUM_SHOWN else []
    files = ", ".join(map(str, list(left.values())[:NUM_SHOWN]))
    hint = (
        f"see where they hang in {files}; `resources.step_timeout_s` allows more time, and the same command goes on "
        "from the last checkpoint"
    )
    return HangError(f"run `{name}`", "; ".join([*heads[:NUM_SHOWN], *more]), hint=hint)
