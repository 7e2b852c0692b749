"""The one loop: steps, held-out loss, checkpoints, an early end when asked or when nothing improves any more. Runs on
every rank.

What a step's numbers mean for the run is `Watch`'s to say, before the step is committed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from lmray.artifacts.files import write_json
from lmray.context import RunContext
from lmray.data.batch import Batch, Rows, collate
from lmray.data.sampler import Sampler
from lmray.data.stream import Stream
from lmray.errors import DivergenceError
from lmray.evaluate.loss import held_out_loss
from lmray.job import TrainJob
from lmray.models.load import pad_token_id
from lmray.pulse import PULSE
from lmray.schedules.base import learning_rate
from lmray.train.checkpoint import Progress, Write, load_checkpoint, save_checkpoint, save_weights
from lmray.train.commits import Commits, Snapshot, best_folder
from lmray.train.feed import Feed
from lmray.train.learner import Learner, Share, StepReport
from lmray.train.memory import searched_at_once
from lmray.train.model import measures_base_again
from lmray.train.out_of_memory import noticing_shortage
from lmray.train.peak import peak_memory_bytes
from lmray.train.plan import Plan
from lmray.train.prepare import Prepared
from lmray.train.record import DIVERGED, add_line
from lmray.train.watch import Watch

SEARCH = 2**32
"""Above all seeds: search rows come in an order of their own."""

LOGGED = 100
"""Lines of a companion's log, enough for a picture."""


class Loop:
    """One training run from where it stands to its end."""

    def __init__(
        self, job: TrainJob, plan: Plan, prepared: Prepared, learner: Learner, ctx: RunContext, *, micro_batch: int
    ):
        self.job, self.plan, self.prepared, self.learner, self.ctx = job, plan, prepared, learner, ctx
        self.micro_batch = micro_batch
        """Rows of one forward pass: the job's, or fewer where those ran out of memory."""
        self.sampler = Sampler(len(prepared.rows), job.train.seed)
        self.search = Sampler(len(prepared.search_rows or ()), job.train.seed + SEARCH)
        self.progress = self._resumed()
        self.watch = Watch(**self.progress.watch)
        self.feed = Feed(self._made, range(self.progress.samples, plan.samples, plan.rows_per_step), device=ctx.device)
        self.commits = Commits(ctx, beside=job.resources.async_checkpoints)
        self._postponed, self._settled = False, learner.settled
        self._compiles = job.train.torch_compile
        self.final_loss: float | None = None
        """Held-out loss of the model as it is at the end, where it is known."""

    @property
    def done(self) -> bool:
        """True after the last step there will be."""
        return self.progress.step >= self.plan.steps or self.watch.ends(self.job.train)

    def run(self) -> bool:
        """Trains to the end; True when done, False when asked to stop; the last step is committed either way.

        Raises DivergenceError, the same on every rank, where a step's numbers say that the run is lost; that step is
        in no checkpoint. Raises RanOutError on a rank whose memory a step was too large for, and there alone."""
        with self.feed, self.commits:
            while not self.done:
                wish = self.ctx.wish()
                with noticing_shortage(self.progress.step + 1):
                    self._step(save=wish != "go on")
                if wish == "stop" and not self.done:
                    return False
        if self.best_folder is not None:
            if self.learner.placed.whole:
                self.job.adapter.load(self.learner.model, self.best_folder)
            self.final_loss = self.watch.best_loss
        return True

    @property
    def best_folder(self) -> Path | None:
        """Where the weights of the result are, where they are not those of the last step."""
        best = self.watch.best_step
        if not self.job.train.load_best_model_at_end or best in (None, self.progress.step):
            return None
        return best_folder(self.ctx.folder, best)

    def gathered(self) -> Path | None:
        """Where rank 0 finds the result's weights, saved by the adapter, where no rank holds the whole model, or the
        one that does is to make room for its base; called on all ranks together."""
        placed = self.learner.placed
        if placed.whole and not measures_base_again(self.job):
            return None
        if self.best_folder is not None:
            return self.best_folder
        folder = self.ctx.scratch / "result"
        save_weights(folder, placed, self.job.adapter, self.ctx, write=self._writing(folder))
        return folder

    def peaks_by_worker(self) -> list[float]:
        """Largest resident memory of every rank's process, in bytes; called on all ranks together."""
        mine = peak_memory_bytes(self.ctx.device)["train.peak_memory_bytes"]
        ranks = range(self.ctx.world_size)
        return [self.learner.placed.all_sum(mine if rank == self.ctx.rank else 0.0) for rank in ranks]

    def _step(self, *, save: bool) -> None:
        step, start = self.progress.step + 1, time.perf_counter()
        stop = self._end_of(self.progress.samples)
        args = self.job.train
        rate = learning_rate(
            args.lr_scheduler_type,
            step,
            steps=self.plan.steps,
            peak=args.learning_rate,
            warmup_ratio=args.warmup_ratio,
        )
        PULSE.beat("its batches", step=step)
        mine, search = (share.to(self.ctx.device) for share in next(self.feed))
        with PULSE.waiting("compiling") if self._compiles else nullcontext():
            try:
                report = self.learner.step(
                    mine.batches, learning_rate=rate, step=step, num_idle=mine.num_idle, search=search
                )
            except DivergenceError as error:  # of what is searched, on every rank alike
                assert self.prepared.search_rows is not None
                self._give_up(step, error.found, self.prepared.search_rows, self._searched_on(step - 1), {})
        seconds = time.perf_counter() - start
        rows = self.sampler.rows(self.progress.samples, stop)
        self.progress = Progress(self.plan.run_key, step, stop, self.progress.seconds + seconds)
        metrics = self._metrics(report, rate, seconds)
        if self._compiles:
            metrics["train.compile_seconds"], self._compiles = seconds, False
        self._sound(self.watch.step(metrics, args), rows, metrics)
        if not self.learner.settled:  # losses of one model after another: there is no median to compare with
            self.watch.losses.clear()
        if self.prepared.eval_rows and (step == self.plan.steps or (args.eval_steps and step % args.eval_steps == 0)):
            metrics |= self._measured(step)
            self._sound(
                self.watch.held_out(step, metrics["eval.loss"], args, counts=self.learner.settled), rows, metrics
            )
        self.progress = replace(self.progress, watch=self.watch.state())
        self.final_loss = metrics.get("eval.loss") if self.done else None
        self._log(step, "eval.loss" in metrics)
        self._report(step, metrics, save=save or self.done or self._save_is_due(step))

    def _save_is_due(self, step: int) -> bool:
        """A step whose loss is out of line is saved once it turned out to be an outlier only; a best one at once."""
        due = step % self.job.train.save_steps == 0 or self._postponed
        self._postponed = due and self.watch.streak > 0
        best = self.job.train.load_best_model_at_end and self.watch.best_step == step
        return best or (due and not self._postponed)

    def _sound(self, problem: str | None, rows: list[int], metrics: dict[str, float]) -> None:
        """Raises DivergenceError for a `problem`, after rank 0 wrote what the step was taken over."""
        if problem is None:
            return
        self._give_up(self.progress.step, problem, self.prepared.rows, rows, metrics)

    def _give_up(
        self, step: int, problem: str, source: Rows | Stream, rows: list[int], metrics: dict[str, float]
    ) -> NoReturn:
        path = self.ctx.folder / DIVERGED
        where = list(dict.fromkeys(one.where for row in rows for one in source[row]))
        if self.ctx.rank == 0:
            numbers = {name: repr(value) for name, value in metrics.items()}  # JSON has no NaN
            write_json(path, {"step": step, "found": problem, "metrics": numbers, "rows": where})
        shown = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        hint = "look at these rows, or lower `train.learning_rate` under another `name`"
        raise DivergenceError(f"run `{self.job.name}`, step {step}", f"{problem}; rows {shown}: see {path}", hint=hint)

    def _measured(self, step: int) -> dict[str, float]:
        start = time.perf_counter()
        loss = self.held_out_loss()
        return {"eval.loss": loss, "eval.seconds": time.perf_counter() - start}

    def held_out_loss(self) -> float:
        """Mean loss over the held-out tokens with the model as it is; every rank takes its share of the rows."""
        return held_out_loss(
            self.learner.model,
            self.prepared.eval_rows,
            batch_size=self.micro_batch,
            pad_token_id=pad_token_id(self.prepared.tokenizer),
            device=self.ctx.device,
            share=(self.ctx.rank, self.ctx.world_size),
            all_sum=self.learner.placed.all_sum,
        )

    def _end_of(self, start: int) -> int:
        """Where the samples end of the step whose samples begin at `start`."""
        return min(start + self.plan.rows_per_step, self.plan.samples)

    def _made(self, start: int) -> tuple[Share, Share]:
        """This rank's shares of the step whose samples begin at `start`, to train and to search on. Called in a thread:
        reads what no step changes."""
        rows = self.sampler.rows(start, self._end_of(start))
        companion, done = self.learner.companion, start // self.plan.rows_per_step
        if companion is None or done >= companion.search_steps or not self.prepared.search_rows:
            return self._share(self.prepared.rows, rows, self.micro_batch), Share()
        search = self._share(self.prepared.search_rows, self._searched_on(done), searched_at_once(self.micro_batch))
        return self._share(self.prepared.rows, rows, self.micro_batch), search

    def _searched_on(self, done: int) -> list[int]:
        """The search rows of the step that `done` steps were taken before."""
        size = min(self.plan.rows_per_step, len(self.prepared.search_rows or ()))
        return self.search.rows(done * size, (done + 1) * size)

    def _share(self, source: Rows | Stream, rows: list[int], size: int) -> Share:
        """This rank's part of `rows` in micro-batches of `size`, as many on every rank: what is only there for that is
        the first row again."""
        mine = rows[self.ctx.rank :: self.ctx.world_size]
        parts = [mine[first : first + size] for first in range(0, len(mine), size)]
        most = -(-len(rows) // self.ctx.world_size)  # rank 0's
        num_idle = -(-most // size) - len(parts)
        return Share([self._batch(source, part) for part in [*parts, *[rows[:1]] * num_idle]], num_idle)

    def _batch(self, source: Rows | Stream, rows: Sequence[int]) -> Batch:
        packed = self.learner.joined([source[row] for row in rows])
        pad = pad_token_id(self.prepared.tokenizer)
        how = {"padded": self.learner.padded, "padding_apart": self.learner.padding_apart}
        batch = collate(packed, pad_token_id=pad, **how)
        return batch.pin_memory() if self.ctx.device.startswith("cuda") else batch

    def _metrics(self, report: StepReport, rate: float, seconds: float) -> dict[str, float]:
        return {
            "train.loss": report.loss,
            "train.learning_rate": rate,
            "train.grad_norm": report.grad_norm,
            "train.tokens_per_s": report.num_tokens / seconds,
            "train.tokens": report.num_tokens,
            "train.supervised_tokens": report.num_supervised,
            "train.samples": self.progress.samples,
            "train.epoch": self.progress.samples / len(self.prepared.rows),
            **peak_memory_bytes(self.ctx.device),
            **(self.learner.companion.metrics() if self.learner.companion else {}),
        }

    def _log(self, step: int, measured: bool) -> None:
        """Adds to the companion's log, on rank 0, where the model was measured or has just settled, and about
        LOGGED times while it has not."""
        companion = self.learner.companion
        if companion is None or self.ctx.rank != 0:
            return
        settled, self._settled = self._settled, companion.settled
        searched = not companion.settled and step % max(1, companion.search_steps // LOGGED) == 0
        if measured or searched or settled != companion.settled:
            path, line = self.ctx.folder / companion.LOG, {"step": step, **companion.record()}
            self.ctx.patience(f"writing {path}", lambda: add_line(path, line), hint=f"{path} needs room")

    def _report(self, step: int, metrics: dict[str, float], *, save: bool) -> None:
        self.ctx.report(step, metrics)
        if not save:
            self.commits.look()
            return
        PULSE.beat("its checkpoint")
        snapshot = Snapshot(self.commits.next_folder(), self.progress)
        shutil.rmtree(snapshot.folder, ignore_errors=True)
        write, placed, adapter = self._writing(snapshot.folder), self.learner.placed, self.job.adapter
        companion = self.learner.companion
        with self.ctx.together():  # no rank waits for one whose disk stays full
            if self.job.train.load_best_model_at_end and self.watch.best_step == self.progress.step:
                save_weights(snapshot.best, placed, adapter, self.ctx, write=write)
            save_checkpoint(
                snapshot.checkpoint, self.progress, placed, adapter, self.ctx, write=write, companion=companion
            )
        self.commits.begin(snapshot)

    def _writing(self, folder: Path) -> Write:
        scratch = self.ctx.scratch
        hint = f"{scratch} needs room for one more checkpoint; the same command goes on from the last committed one"
        return lambda act: self.ctx.patience(f"writing {folder}", act, hint=hint)

    def _resumed(self) -> Progress:
        folder = self.ctx.resume_from()
        if folder is None:
            return Progress(self.plan.run_key, 0, 0, 0.0)
        learner = self.learner
        return load_checkpoint(
            folder, self.plan.run_key, learner.placed, self.job.adapter, self.ctx, companion=learner.companion
        )
