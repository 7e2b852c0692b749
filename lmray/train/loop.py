"""The one loop: steps, held-out loss, checkpoints, an early end when asked. Runs on every rank."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from lmray.context import RunContext
from lmray.data.batch import Batch, collate
from lmray.data.sampler import Sampler
from lmray.evaluate.loss import held_out_loss
from lmray.job import TrainJob
from lmray.models.load import pad_token_id
from lmray.optim.schedule import learning_rate
from lmray.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from lmray.train.learner import Learner, StepReport
from lmray.train.plan import Plan
from lmray.train.prepare import Prepared


class Loop:
    """One training run from where it stands to its end."""

    def __init__(self, job: TrainJob, plan: Plan, prepared: Prepared, learner: Learner, ctx: RunContext):
        self.job, self.plan, self.prepared, self.learner, self.ctx = job, plan, prepared, learner, ctx
        self.sampler = Sampler(len(prepared.rows), job.train.seed)
        self.progress = self._resumed()
        self.final_loss: float | None = None
        """Held-out loss after the last step, where this attempt took it."""

    def run(self) -> bool:
        """Trains to the last step; True when done, False when asked to stop; the last step is committed either way."""
        while self.progress.step < self.plan.steps:
            stopping = self.ctx.should_stop()
            self._step(save=stopping)
            if stopping and self.progress.step < self.plan.steps:
                return False
        return True

    def _step(self, *, save: bool) -> None:
        step, start = self.progress.step + 1, time.perf_counter()
        stop = min(self.progress.samples + self.plan.rows_per_step, self.plan.samples)
        args = self.job.train
        rate = learning_rate(
            step,
            steps=self.plan.steps,
            peak=args.learning_rate,
            warmup_ratio=args.warmup_ratio,
            shape=args.lr_scheduler_type,
        )
        report = self.learner.step(list(self._batches(stop)), learning_rate=rate)
        seconds = time.perf_counter() - start
        self.progress = Progress(self.plan.run_key, step, stop, self.progress.seconds + seconds)
        metrics = self._metrics(report, rate, seconds)
        last = step == self.plan.steps
        if self.prepared.eval_rows and (last or (args.eval_steps and step % args.eval_steps == 0)):
            metrics["eval.loss"] = self.held_out_loss()
            self.final_loss = metrics["eval.loss"] if last else None
        self._report(step, metrics, save=save or last or step % args.save_steps == 0)

    def held_out_loss(self) -> float:
        """Mean loss over the held-out tokens with the model as it is."""
        return held_out_loss(
            self.learner.model,
            self.prepared.eval_rows,
            batch_size=self.job.train.per_device_train_batch_size,
            pad_token_id=pad_token_id(self.prepared.tokenizer),
            device=self.ctx.device,
        )

    def _batches(self, stop: int) -> Iterator[Batch]:
        """This rank's micro-batches of the samples up to `stop`."""
        rows = self.sampler.rows(self.progress.samples, stop)
        mine = rows[self.ctx.rank :: self.ctx.world_size]
        size = self.job.train.per_device_train_batch_size
        pad = pad_token_id(self.prepared.tokenizer)
        for first in range(0, len(mine), size):
            packed = [self.prepared.rows[row] for row in mine[first : first + size]]
            yield collate(packed, pad_token_id=pad).to(self.ctx.device)

    def _metrics(self, report: StepReport, rate: float, seconds: float) -> dict[str, float]:
        return {
            "train.loss": report.loss,
            "train.learning_rate": rate,
            "train.grad_norm": report.grad_norm,
            "train.tokens_per_s": report.num_tokens / seconds,
            "train.supervised_tokens": report.num_supervised,
            "train.epoch": self.progress.samples / len(self.prepared.rows),
        }

    def _report(self, step: int, metrics: dict[str, float], *, save: bool) -> None:
        if not save:
            self.ctx.report(step, metrics)
            return
        folder = self.ctx.scratch / "checkpoint"
        hint = f"{self.ctx.scratch} needs room for one checkpoint; the same command goes on from the last committed one"
        self.ctx.patience(f"writing {folder}", lambda: self._save(folder), hint=hint)
        self.ctx.report(step, metrics, folder)

    def _save(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if self.ctx.rank == 0:
            save_checkpoint(folder, self.progress, self.learner.model, self.job.adapter, self.learner.placed.optimizer)

    def _resumed(self) -> Progress:
        folder = self.ctx.resume_from()
        if folder is None:
            return Progress(self.plan.run_key, 0, 0, 0.0)
        return load_checkpoint(
            folder, self.plan.run_key, self.learner.model, self.job.adapter, self.learner.placed.optimizer
        )
