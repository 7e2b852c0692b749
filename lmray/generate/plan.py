"""All that is known of a batch of prompts before a worker starts: model, adapters, rows, and what makes it this run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lmray.artifacts.files import check_writable, read_json, sha256_json
from lmray.artifacts.same_plan import check_same_plan
from lmray.artifacts.store import run_folder
from lmray.config import dump
from lmray.data.prompts import Questions, read_questions
from lmray.engines._grammar import grammar_fault, json_grammar
from lmray.engines.base import Sampling
from lmray.errors import ArtifactError, ConfigError
from lmray.job import GenerateJob
from lmray.models.adapters import FoundAdapter, find_adapter
from lmray.models.load import load_empty_model, load_tokenizer
from lmray.models.quantised import check_quantised, check_unquantised
from lmray.models.source import FoundModel, model_of

PLAN = "plan.json"
OWNER = "run.json"
"""Beside the answers, before the first of them: whose they are."""


@dataclass(frozen=True)
class Ready:
    """What was found of a job on this machine."""

    model: FoundModel
    tokenizer: Any
    questions: Questions
    adapters: Mapping[str, FoundAdapter]
    """By how the job and its rows name them."""


@dataclass(frozen=True)
class GeneratePlan:
    """What a batch of prompts becomes; a worker finds the same again on its node, or refuses."""

    name: str
    run_key: str
    fields: Mapping[str, Any]
    """The job's fields that decide the answers, by dotted path."""
    model: Mapping[str, Any]
    """`source` (of an artifact with its version), `digest`."""
    adapters: Mapping[str, Mapping[str, str]]
    """By how the job and its rows name them: `name` (of an artifact with its version), `digest`."""
    data: Mapping[str, Any]
    """`digest`, `rows`, `formats`."""
    num_shards: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def owner(self) -> dict[str, str]:
        """What the folder of the answers says of whose they are."""
        return {"run": self.name, "run_key": self.run_key}

    def lines(self) -> list[str]:
        """For people: one fact a line."""
        adapters = ", ".join(dict.fromkeys(one["name"] for one in self.adapters.values())) or "none"
        size = self.fields["output.shard_size"]
        return [
            f"run        {self.name}, key {self.run_key[:12]}",
            f"model      {self.model['source']}, digest {self.model['digest'][:12]}",
            f"adapters   {adapters}",
            *(f"data       {line}" for line in self.data["formats"]),
            f"rows       {self.data['rows']} in {self.num_shards} shard(s) of {size}",
        ]


def answers_folder(job: GenerateJob) -> Path:
    """Where the answers to `job` are."""
    return Path(job.output.folder).expanduser() if job.output.folder else run_folder(job) / "answers"


def prepare(job: GenerateJob, plan: GeneratePlan | None = None) -> Ready:
    """Finds the model and the adapters and reads the prompts; with `plan`, those that it names. Raises ArtifactError,
    ConfigError, DataError or CapacityError for whatever cannot be answered with."""
    if plan is not None:
        job = job.model_copy(update={"model": job.model.model_copy(update={"source": plan.model["source"]})})
    found = model_of(job)
    questions = read_questions(job.data)
    tokenizer = load_tokenizer(found.folder, chat=questions.has_chats, trust_remote_code=job.model.trust_remote_code)
    pinned = {text: one["name"] for text, one in plan.adapters.items()} if plan else {}
    adapters = _adapters(job, found, questions, pinned)
    empty = load_empty_model(
        found.folder, trust_remote_code=job.model.trust_remote_code, rope_scaling=job.model.rope_scaling
    )
    if job.engine.needs_weights:
        check_unquantised(empty.config, found.folder)
    if job.model.quantization:
        check_quantised(empty, job.model.quantization)
    job.engine.check(empty, {one.name: one.folder for one in adapters.values()})
    make_sampling(job, 0, 0)
    _check_schema(job, tokenizer)
    return Ready(found, tokenizer, questions, adapters)


def make_plan(job: GenerateJob, ready: Ready) -> GeneratePlan:
    """The plan of `job`, for which `ready` was found."""
    fields = _fields(job)
    model = {"source": ready.model.source, "digest": ready.model.digest}
    adapters = {text: {"name": one.name, "digest": one.digest} for text, one in sorted(ready.adapters.items())}
    digests = {text: one["digest"] for text, one in adapters.items()}
    data = {"digest": ready.questions.digest, "rows": len(ready.questions), "formats": list(ready.questions.formats)}
    return GeneratePlan(
        name=job.name,
        run_key=sha256_json([fields, model["digest"], data["digest"], digests]),
        fields=fields,
        model=model,
        adapters=adapters,
        data=data,
        num_shards=-(-len(ready.questions) // job.output.shard_size),
    )


def _fields(job: GenerateJob) -> dict[str, Any]:
    """Batch sizes, placement and where things lie decide no answer."""
    tree = dump(job)
    found = {"adapter": tree["adapter"]}
    found |= {f"{part}.{name}": value for part in ("model", "data", "sampling") for name, value in tree[part].items()}
    engine = {name: value for name, value in tree["engine"].items() if name not in job.engine.decides_nothing}
    found |= {f"engine.{name}": value for name, value in engine.items()}
    return found | {f"output.{name}": tree["output"][name] for name in ("format", "shard_size")}


def check_same(plan: GeneratePlan, here: GeneratePlan) -> None:
    """Raises ArtifactError where a worker's node does not hold what was planned."""
    if here.run_key == plan.run_key:
        return
    parts = {"model": "model", "adapters": "adapters", "data": "data"}
    other = [name for name, part in parts.items() if getattr(here, part) != getattr(plan, part)]
    hint = "put model, adapters and data where every node reads the same"
    raise ArtifactError(f"run `{plan.name}`", f"finds another {', '.join(other) or 'job'} on this node", hint=hint)


def check_begin(job: GenerateJob, plan: GeneratePlan) -> None:
    """Raises ConfigError where the run folder holds another run under this name, or the folder for the answers
    something else; CapacityError where one cannot be written."""
    check_writable(run_folder(job))
    check_writable(answers_folder(job))
    _check_run(run_folder(job), plan)
    answers = answers_folder(job)
    there = sorted(one.name for one in answers.glob("[!.]*"))[:3]  # what killed writers left is hidden
    hint = "set `output.folder` to one that is empty or not there yet"
    owned = (answers / OWNER).is_file() and read_json(answers / OWNER, hint=hint) == plan.owner
    if there and not owned:
        raise ConfigError("output.folder", f"{answers} holds {', '.join(there)} already", hint=hint)


def _check_run(folder: Path, plan: GeneratePlan) -> None:
    """Raises ConfigError where `folder` holds another run than `plan` is of."""
    path = folder / PLAN
    if not path.is_file():
        return
    hint = f"give the job another `name`, or remove {folder} to start over"
    before = read_json(path, hint=hint)
    if not isinstance(before, dict) or not {"run_key", "fields", "model", "adapters", "data"} <= before.keys():
        raise ArtifactError(str(path), "is no plan of batch inference", hint=hint)
    check_same_plan(before, plan.to_json(), folder, others=["adapters"])


def make_sampling(job: GenerateJob, row: int, place: int) -> Sampling:
    """How answer `place` to row `row` is drawn: by a seed of its own. Raises DataError for a value out of range."""
    args = job.sampling
    return Sampling(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        frequency_penalty=args.frequency_penalty,
        presence_penalty=args.presence_penalty,
        seed=int(sha256_json([args.seed, row, place])[:12], 16),
        grammar=None if args.json_schema is None else json_grammar(args.json_schema),
    )


def _adapters(
    job: GenerateJob, base: FoundModel, questions: Questions, pinned: Mapping[str, str]
) -> dict[str, FoundAdapter]:
    named = {text: f"{where}: column `{job.data.adapter}`" for text, where in questions.adapters.items()}
    named |= {job.adapter: "adapter"} if job.adapter else {}
    found: dict[str, FoundAdapter] = {}
    for text, where in named.items():
        about = {"storage": job.storage, "rope_scaling": job.model.rope_scaling}
        try:
            found[text] = find_adapter(pinned.get(text, text), base, **about)
        except ArtifactError as error:
            said = f"{error.where}: {error.found}"
            raise ArtifactError(where, said, allowed=error.allowed, hint=error.hint) from None
    count = len({one.name for one in found.values()})
    if count > job.engine.max_adapters:
        hint = f"set `engine.max_adapters` to {count}, or give them to several jobs"
        raise ConfigError("engine.max_adapters", f"{count} adapters are more than the engine holds", hint=hint)
    return found


def _check_schema(job: GenerateJob, tokenizer: Any) -> None:
    """Raises ConfigError for a schema that answers cannot be held to."""
    where = "sampling.json_schema"
    if job.sampling.json_schema is None:
        return
    if not job.engine.has_grammars:
        found = f"engine `{job.engine.name}` holds answers to none, as it is set up"
        raise ConfigError(where, found, hint="set `engine.tokens: ids`, or `engine: {name: native}`")
    if find_spec("llguidance") is None:
        raise ConfigError(where, "answers are held to none here", hint="install `lmray[guided]`")
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(where, "needs a fast tokenizer, and this model has none", hint="take another model")
    fault = grammar_fault(json_grammar(job.sampling.json_schema))
    if fault is not None:
        raise ConfigError(where, fault, hint="ask for a simpler schema")
