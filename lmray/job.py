"""The job types: frozen descriptions of what to run. They compose the families' bases and nothing else.

`kind:` selects one. A job is picklable, comparable, and decodes from the tree that `dump` gives of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from lmray.adapters.base import Adapter
from lmray.artifacts.served import AdapterCache, ServedAdapter
from lmray.config import (
    Config,
    Document,
    Member,
    Name,
    decode,
    dump,
    read_document,
    set_value,
    with_overrides,
)
from lmray.config.endpoint import Autoscaling, Http
from lmray.config.generation import AnswerFiles, SamplingArgs
from lmray.config.monitor import Monitor
from lmray.config.search import Scheduler, Search, Seed, Space
from lmray.data.filters.base import TextFilter
from lmray.data.spec import DataSpec, PromptSpec
from lmray.engines.base import EngineConfig
from lmray.errors import ConfigError, did_you_mean
from lmray.methods.base import Method
from lmray.metrics.names import metric
from lmray.models.spec import ModelSpec
from lmray.models.workers import ONE, Workers
from lmray.optim.base import OptimizerConfig
from lmray.registry import ADAPTERS, ENGINES, FILTERS, METHODS, OPTIMIZERS, SCHEDULES, SHARDINGS, TASKS, TRACKERS
from lmray.schedules.base import Schedule
from lmray.sharding.base import Sharding
from lmray.tasks.base import Task
from lmray.trackers.base import Tracker

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class TrainArgs(Config):
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 8
    """Rows of one forward pass on one worker."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Forward passes per optimizer step. The curve depends on the product with the batch size only."""
    optim: Annotated[OptimizerConfig, Member(OPTIMIZERS)] = Field(
        default=cast(Any, "adamw_torch"), validate_default=True
    )
    """The optimizer, by the names of Hugging Face."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-4
    lr_scheduler_type: Annotated[Schedule, Member(SCHEDULES)] = Field(
        default=cast(Any, "cosine"), validate_default=True
    )
    """What the learning rate does after the warm-up."""
    warmup_ratio: Fraction = 0.05
    """Share of all steps over which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    gradient_checkpointing: bool = False
    """Keep the inputs of decoder layers only and run them again for their gradients: less memory, a third more time."""
    neftune_noise_alpha: Annotated[float, Field(gt=0.0)] | None = None
    """Noise on embeddings while training (NEFTune), 5 to 15 in its paper. Empty: none."""
    torch_compile: bool = False
    """Compile decoder layers when they first run: `train.compile_seconds` says how long that took."""
    num_train_epochs: Annotated[float, Field(gt=0.0)] = 1.0
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; overrides `num_train_epochs`."""
    eval_steps: Annotated[int, Field(ge=1)] | None = None
    """Held-out loss every this many steps, besides the end. Empty: at the end only."""
    save_steps: Annotated[int, Field(ge=1)] = 50
    """A checkpoint every this many steps, besides the end."""
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    """Ends the run after so many held-out evaluations without improvement. Empty: it goes to its last step."""
    early_stopping_threshold: Annotated[float, Field(ge=0.0)] = 0.0
    """Nats/token by which the best held-out loss so far must be beaten to count as an improvement."""
    load_best_model_at_end: bool = False
    """The result is the model of the lowest held-out loss instead of the last."""
    divergence_factor: Annotated[float, Field(gt=1.0)] | None = 3.0
    """The run fails once its loss was above this multiple of its running median for five steps in a row, and at least
    one nat/token above it. Empty: it goes on however high the loss. A loss that is not finite always ends it."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _watched(self):
        for name in ("early_stopping_patience", "load_best_model_at_end"):
            if getattr(self, name) and not self.eval_steps:
                raise ValueError(f"`{name}` needs held-out losses; hint: set `eval_steps`, like `eval_steps: 50`")
        return self


class EvaluateArgs(Config):
    tasks: tuple[Annotated[Task, Member(TASKS)], ...] = ()
    base: bool = True
    """Also measure the untouched model, as `base.*`."""
    max_examples: Annotated[int, Field(ge=1)] | None = None
    """Held-out examples that answers are generated for, drawn evenly. Empty: all. The loss always uses all."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Sequences that are generated side by side."""

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, value: tuple[Task, ...]):
        names = [task.name for task in value]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"lists `{twice[0]}` more than once; its metrics have one name")
        return value

    @property
    def needs_data(self) -> bool:
        """A task measures on held-out examples."""
        return any(task.needs != "model" for task in self.tasks)


class Resources(Config):
    workers: Workers = ONE
    """A number, or a range within which a training run follows the machines that there are."""
    gpus_per_worker: Annotated[int, Field(ge=0)] = 0
    cpus_per_worker: Annotated[int, Field(ge=1)] | None = None
    """CPU cores a worker reserves and computes with. Empty: the cores of the smallest node, shared evenly."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often a failed worker group starts again from the last checkpoint. Machines that are taken away with notice,
    and changes of the number of workers, are not counted."""
    on_oom: Literal["fail", "halve"] = "fail"
    """What a training run does that runs out of memory. `fail`: it ends and says what would fit. `halve`: it goes on
    from its last checkpoint with half the rows in a forward pass and as many in a step, so that its curve stays."""
    async_checkpoints: bool = False
    """Training: checkpoints are copied to the store beside the steps that follow; a worker's temporary folder then
    takes two of them."""
    step_timeout_s: Annotated[float, Field(gt=0)] | None = 1800.0
    """Time in which a worker that trains must get on by a micro-batch, a batch of held-out rows or a file of a
    checkpoint. One that does not writes the stacks of its threads to `stacks-RANK.txt` in the run folder and ends, and
    the group starts again. Waiting for a store and compiling do not count. Empty: never."""
    price_per_worker_hour: Annotated[float, Field(ge=0.0)] | None = None
    """What one worker costs an hour, in any currency: estimates say what a run may cost, `run.cost` what it did."""


class Output(Config):
    artifact: Name
    """The name under which the result is kept in the store."""


class Job(Config):
    """Base of all jobs. `name` is the run's: the same job under the same name goes on where it stopped."""

    kind: str
    name: Name
    storage: str | None = None
    """Folder of runs and artifacts. Empty: `$LMRAY_STORE`, else `~/.lmray/store`."""

    def changed(self, values: dict[str, Any]) -> Any:
        """This job with dotted keys set to other values, decoded afresh. Raises ConfigError as decoding does."""
        document = Document(f"job `{self.name}`", dump(self))
        for key, value in values.items():
            document = set_value(document, key.split("."), value, f"job `{self.name}`")
        return decode(type(self), document)


class TrainJob(Job):
    kind: Literal["train"] = "train"
    model: ModelSpec
    data: DataSpec
    method: Annotated[Method, Member(METHODS)]
    adapter: Annotated[Adapter, Member(ADAPTERS)]
    sharding: Annotated[Sharding, Member(SHARDINGS)]
    train: TrainArgs = Field(default_factory=lambda: TrainArgs())
    evaluate: EvaluateArgs = EvaluateArgs()
    resources: Resources = Resources()
    output: Output | None = None
    report_to: tuple[Annotated[Tracker, Member(TRACKERS)], ...] = ()
    """Trackers that are shown the run besides its own report."""

    @property
    def kept(self) -> Literal["adapter", "model"]:
        """What is kept: an adapter, or a whole model."""
        return "model" if self.method.prunes else self.adapter.kept

    @field_validator("report_to")
    @classmethod
    def _each_once(cls, value: tuple[Tracker, ...]):
        names = [tracker.name for tracker in value]
        if len(set(names)) < len(names):
            raise ValueError(f"names a tracker twice: {', '.join(names)}")
        return value

    @model_validator(mode="after")
    def _held_out(self):
        if self.data.eval is None and (self.evaluate.needs_data or self.train.eval_steps):
            raise ValueError("evaluates but holds no data out; hint: add `eval: {split: 0.1}` under `data`")
        return self


class Target(Config):
    """One model to measure: the job's or another, alone or with an adapter."""

    label: Name
    model: str | None = None
    """Another model than the job's, of the same tokenizer; written like `model.source`: `artifact:NAME@STAGE`, a
    folder, ... Empty: the job's."""
    adapter: str | None = None
    """`NAME`, `NAME@STAGE` or `NAME@VERSION` of an artifact, or an adapter's folder. Empty: the model alone."""
    num_fewshot: Annotated[int, Field(ge=0)] = 0
    """Solved examples of the training data put before each question."""


class EvaluateJob(Job):
    kind: Literal["evaluate"] = "evaluate"
    model: ModelSpec
    data: DataSpec | None = None
    """What to measure on. May be left out where every task brings its own."""
    targets: Annotated[tuple[Target, ...], Field(min_length=1)]
    evaluate: EvaluateArgs
    resources: Resources = Resources()
    tolerances: dict[str, Annotated[float, Field(ge=0.0)]] = Field(default_factory=dict)
    """By metric, how much worse an artifact may be than before, in the metric's unit. Its metrics are then kept in its
    record, and the run fails for one that got worse by more: something to run daily on what is in production."""

    @field_validator("tolerances")
    @classmethod
    def _comparable(cls, value: dict[str, float]):
        for name in value:
            try:
                better = metric(name).better
            except KeyError:
                better = ""
            if not better:
                raise ValueError(f"`{name}` is no metric of which more or less is better, like `eval.loss`")
        return value

    @field_validator("targets")
    @classmethod
    def _labels_differ(cls, value: tuple[Target, ...]):
        labels = [target.label for target in value]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"two targets are labelled `{twice[0]}`")
        return value

    @model_validator(mode="after")
    def _one_worker(self):
        if self.resources.workers.max != 1:
            raise ValueError(f"measures on one worker, not {self.resources.workers}; hint: set `resources.workers: 1`")
        return self

    @model_validator(mode="after")
    def _held_out(self):
        if self.data is None and (self.evaluate.needs_data or any(target.num_fewshot for target in self.targets)):
            raise ValueError("measures on data but has no `data`; hint: add `data: {train: ..., eval: ...}`")
        return self


class SweepJob(Job):
    kind: Literal["sweep"] = "sweep"
    job: TrainJob
    """The job that is varied; its `output.artifact` names what the best trial is kept as."""
    space: Annotated[dict[str, Space], Field(min_length=1)]
    """Dotted keys of the job, each with where its values come from."""
    objectives: Annotated[dict[str, Literal["min", "max"]], Field(min_length=1, max_length=1)]
    """The metric that decides, and its direction."""
    search: Search = Search()
    scheduler: Scheduler = Scheduler()
    max_concurrent_trials: Annotated[int, Field(ge=1)] = 2

    @field_validator("objectives")
    @classmethod
    def _measured(cls, value: dict[str, str]):
        if next(iter(value)) != "eval.loss":
            raise ValueError(f"`{next(iter(value))}` is not reported while training; hint: use `eval.loss: min`")
        return value

    @model_validator(mode="after")
    def _decodable(self):
        for key, space in self.space.items():
            bounds = space.uniform or space.loguniform or ()
            for value in space.choice if space.choice is not None else bounds:
                try:
                    self.job.changed({key: value})
                except ConfigError as error:
                    problem = error.problems[0]
                    hint = f"; hint: {problem.hint}" if problem.hint else ""
                    raise ValueError(f"`space` sets `{key}` to {value!r}: {problem.found}{hint}") from None
        return self


class ScheduledEvaluation(Config):
    """An evaluation of what is served, again and again."""

    job: EvaluateJob
    """Its targets name stages, like `function-calls@production`; its `tolerances` say what counts as worse. It computes
    on `cpus_per_worker` cores, one by default, that it does not reserve: replicas come first. GPUs must be free."""
    every_hours: Annotated[float, Field(gt=0.0)] = 24.0
    """Besides at once for a version that was not measured yet, as after a promotion. What another run measured of a
    version in the same way counts."""

    @model_validator(mode="after")
    def _can_be_worse(self):
        if not self.job.tolerances:
            raise ValueError("`job` says nothing of what is worse; hint: `tolerances: {eval.loss: 0.05}`")
        if self.job.storage is not None:
            raise ValueError("`job` has a store of its own, and runs in the endpoint's; hint: leave out its `storage`")
        return self

    def at(self, storage: str | None) -> ScheduledEvaluation:
        """As it is run in that store."""
        resources = self.job.resources.model_copy(update={"cpus_per_worker": self.job.resources.cpus_per_worker or 1})
        return self.model_copy(update={"job": self.job.model_copy(update={"storage": storage, "resources": resources})})


class EndpointMonitor(Monitor):
    evaluations: tuple[ScheduledEvaluation, ...] = ()
    """Run beside the replicas, one at a time."""

    @field_validator("evaluations")
    @classmethod
    def _names_differ(cls, value: tuple[ScheduledEvaluation, ...]):
        if len({one.job.name for one in value}) < len(value):
            raise ValueError("two evaluations have the same name, and would share a run folder")
        return value


class ServeJob(Job):
    kind: Literal["serve"] = "serve"
    model: ModelSpec
    adapters: tuple[ServedAdapter, ...] = ()
    adapter_cache: AdapterCache = AdapterCache()
    engine: Annotated[EngineConfig, Member(ENGINES)]
    http: Http = Http()
    filters: tuple[Annotated[TextFilter, Member(FILTERS)], ...] = ()
    """Of prompts and answers, one after the other; see `lmray show filters`."""
    autoscaling: Autoscaling = Autoscaling()
    resources: Resources = Resources()
    monitor: EndpointMonitor = EndpointMonitor()
    """Whether answers stay what they were."""

    @property
    def evaluations(self) -> tuple[ScheduledEvaluation, ...]:
        """Those of `monitor`, as they are run: in the endpoint's store, on one core where they name no number."""
        return tuple(one.at(self.storage) for one in self.monitor.evaluations)

    @model_validator(mode="after")
    def _read_elsewhere(self):
        self.engine.check_spec(self.model)
        if any(one.merged for one in self.adapters) and not self.engine.chooses_weights:
            raise ValueError(f"engine `{self.engine.name}` asks a server for its own model; hint: leave out `merged`")
        return self


class GenerateJob(Job):
    kind: Literal["generate"] = "generate"
    model: ModelSpec
    adapter: str | None = None
    """`NAME`, `NAME@STAGE` or `NAME@VERSION` of an artifact, or an adapter's folder. Empty: the model alone."""
    data: PromptSpec
    engine: Annotated[EngineConfig, Member(ENGINES)]
    sampling: SamplingArgs = SamplingArgs()
    output: AnswerFiles = AnswerFiles()
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _leaves_room(self):
        self.engine.check_spec(self.model)
        if self.sampling.max_tokens >= self.engine.max_length:
            found = f"`sampling.max_tokens` {self.sampling.max_tokens} leaves no room for a prompt"
            raise ValueError(f"{found}; hint: raise `engine.max_length`, which is {self.engine.max_length}")
        return self


KINDS: dict[str, type[Job]] = {
    "train": TrainJob,
    "evaluate": EvaluateJob,
    "sweep": SweepJob,
    "serve": ServeJob,
    "generate": GenerateJob,
}


def load(path: str | Path, *overrides: str) -> Any:
    """The job in file `path` with `a.b=value` overrides laid over it. Raises ConfigError with every problem."""
    return decode_job(with_overrides(read_document(path), overrides))


def decode_job(document: Document) -> Any:
    """The job that `document` describes; its `kind` selects the type."""
    kind = document.tree.get("kind")
    if kind is None:
        raise ConfigError(
            document.source, "has no `kind`", allowed=", ".join(KINDS), hint="start it with `kind: train`"
        )
    if not isinstance(kind, str) or kind not in KINDS:
        where = f"{document.where(('kind',))}: kind"
        raise ConfigError(
            where, f"unknown kind `{kind}`", allowed=", ".join(KINDS), hint=did_you_mean(str(kind), KINDS)
        )
    return decode(KINDS[kind], document)
