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

from lmray.artifacts.files import replace_folder, write_json
from lmray.context import RunContext
from lmray.data.batch import Batch, collate
from lmray.data.sampler import Sampler
from lmray.errors import DivergenceError
from lmray.evaluate.loss import held_out_loss
from lmray.job import TrainJob
from lmray.models.load import pad_token_id
from lmray.pulse import PULSE
from lmray.schedules.base import learning_rate
from lmray.train.checkpoint import Progress, load_checkpoint, save_checkpoint, save_weights
from lmray.train.learner import Learner, StepReport
from lmray.train.peak import peak_memory_bytes
from lmray.train.plan import Plan
from lmray.train.prepare import Prepared
from lmray.train.record import DIVERGED
from lmray.train.watch import Watch


class Loop:
    """One training run from where it stands to its end."""

    def __init__(self, job: TrainJob, plan: Plan, prepared: Prepared, learner: Learner, ctx: RunContext):
        self.job, self.plan, self.prepared, self.learner, self.ctx = job, plan, prepared, learner, ctx
        self.sampler = Sampler(len(prepared.rows), job.train.seed)
        self.progress = self._resumed()
        self.watch = Watch(**self.progress.watch)
        self._postponed = False
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
        in no checkpoint."""
        while not self.done:
            stopping = self.ctx.should_stop()
            self._step(save=stopping)
            if stopping and not self.done:
                return False
        if self.best_folder is not None:
            if self.learner.placed.whole:
                self.job.adapter.load(self.learner.model, self.best_folder)
            self.final_loss = self.watch.best_loss
        return True

    @property
    def best_folder(self) -> Path | None:
        """Where the weights of the result are, where they are not those of the last step."""
        earlier = self.watch.best_step not in (None, self.progress.step)
        return self._best_folder() if self.job.train.load_best_model_at_end and earlier else None

    def gathered(self) -> Path | None:
        """Where rank 0 finds the result's weights, saved by the adapter, where no rank holds the whole model; called on
        all ranks together."""
        placed = self.learner.placed
        if placed.whole:
            return None
        if self.best_folder is not None:
            return self.best_folder
        folder = self.ctx.scratch / "result"
        save_weights(folder, placed, self.job.adapter, self.ctx.rank)
        return folder

    def peaks_by_worker(self) -> list[float]:
        """Largest resident memory of every rank's process, in bytes; called on all ranks together."""
        mine = peak_memory_bytes(self.ctx.device)["train.peak_memory_bytes"]
        ranks = range(self.ctx.world_size)
        return [self.learner.placed.all_sum(mine if rank == self.ctx.rank else 0.0) for rank in ranks]

    def _step(self, *, save: bool) -> None:
        step, start = self.progress.step + 1, time.perf_counter()
        stop = min(self.progress.samples + self.plan.rows_per_step, self.plan.samples)
        args = self.job.train
        rate = learning_rate(
            args.lr_scheduler_type,
            step,
            steps=self.plan.steps,
            peak=args.learning_rate,
            warmup_ratio=args.warmup_ratio,
        )
        PULSE.beat("its batches", step=step)
        batches, num_idle = self._batches(stop)
        with PULSE.waiting("compiling") if self._compiles else nullcontext():
            report = self.learner.step(batches, learning_rate=rate, step=step, num_idle=num_idle)
        seconds = time.perf_counter() - start
        rows = self.sampler.rows(self.progress.samples, stop)
        self.progress = Progress(self.plan.run_key, step, stop, self.progress.seconds + seconds)
        metrics = self._metrics(report, rate, seconds)
        if self._compiles:
            metrics["train.compile_seconds"], self._compiles = seconds, False
        self._sound(self.watch.step(metrics, args), rows, metrics)
        if self.prepared.eval_rows and (step == self.plan.steps or (args.eval_steps and step % args.eval_steps == 0)):
            metrics |= self._measured(step)
            self._sound(self.watch.held_out(step, metrics["eval.loss"], args), rows, metrics)
        self.progress = replace(self.progress, watch=self.watch.state())
        self.final_loss = metrics.get("eval.loss") if self.done else None
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
        step, path = self.progress.step, self.ctx.folder / DIVERGED
        where = list(dict.fromkeys(one.where for row in rows for one in self.prepared.rows[row]))
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
            batch_size=self.job.train.per_device_train_batch_size,
            pad_token_id=pad_token_id(self.prepared.tokenizer),
            device=self.ctx.device,
            share=(self.ctx.rank, self.ctx.world_size),
            all_sum=self.learner.placed.all_sum,
        )

    def _batches(self, stop: int) -> tuple[list[Batch], int]:
        """This rank's micro-batches of the samples up to `stop`, as many on every rank; and how many at the end are
        only there for that: the first row again."""
        rows = self.sampler.rows(self.progress.samples, stop)
        mine = rows[self.ctx.rank :: self.ctx.world_size]
        size = self.job.train.per_device_train_batch_size
        parts = [mine[first : first + size] for first in range(0, len(mine), size)]
        most = -(-len(rows) // self.ctx.world_size)  # rank 0's
        num_idle = -(-most // size) - len(parts)
        return [self._batch(part) for part in [*parts, *[rows[:1]] * num_idle]], num_idle

    def _batch(self, rows: Sequence[int]) -> Batch:
        packed = self.learner.joined([self.prepared.rows[row] for row in rows])
        pad = pad_token_id(self.prepared.tokenizer)
        return collate(packed, pad_token_id=pad, multiple_of=self.learner.multiple_of).to(self.ctx.device)

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
        }

    def _report(self, step: int, metrics: dict[str, float], *, save: bool) -> None:
        if not save:
            self.ctx.report(step, metrics)
            return
        folder = self.ctx.scratch / "checkpoint"
        PULSE.beat("its checkpoint")
        hint = f"{self.ctx.scratch} needs room for one checkpoint; the same command goes on from the last committed one"
        self.ctx.patience(f"writing {folder}", lambda: self._save(folder), hint=hint)
        self.ctx.report(step, metrics, folder)
        self._forget_older_bests()

    def _save(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        placed, adapter = self.learner.placed, self.job.adapter
        if self.job.train.load_best_model_at_end and self.watch.best_step == self.progress.step:
            # Before the checkpoint that names it: what a committed checkpoint calls the best is always there.
            best = self.ctx.scratch / "best"
            shutil.rmtree(best, ignore_errors=True)
            if save_weights(best, placed, adapter, self.ctx.rank):
                replace_folder(best, self._best_folder())
        save_checkpoint(folder, self.progress, placed, adapter, self.ctx.rank)

    def _best_folder(self) -> Path:
        return self.ctx.folder / f"best-{self.watch.best_step:08d}"

    def _forget_older_bests(self) -> None:
        """Only after a commit: until then a resume may go back to where an older one was the best."""
        if self.ctx.rank == 0 and self.job.train.load_best_model_at_end and self.watch.best_step is not None:
            for old in self.ctx.folder.glob("best-*"):
                if old != self._best_folder():
                    shutil.rmtree(old)

    def _resumed(self) -> Progress:
        folder = self.ctx.resume_from()
        if folder is None:
            return Progress(self.plan.run_key, 0, 0, 0.0)
        return load_checkpoint(folder, self.plan.run_key, self.learner.placed, self.job.adapter, self.ctx)
