"""The one list of metric names, with unit and help. Programs, reports and dashboards use no other names.

`base.X` is metric `eval.X` of the untouched model.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Metric:
    unit: str
    help: str
    better: str = ""
    """`min`, `max`, or empty where neither is better."""


METRICS = {
    "train.loss": Metric("nats/token", "Mean loss over the supervised tokens of one optimizer step.", "min"),
    "train.learning_rate": Metric("", "Learning rate of the step."),
    "train.grad_norm": Metric("", "Gradient norm before clipping."),
    "train.tokens_per_s": Metric("tokens/s", "Tokens processed per second, padding not counted.", "max"),
    "train.supervised_tokens": Metric("tokens", "Tokens the step's loss was taken over."),
    "train.tokens": Metric("tokens", "Tokens of the step, padding not counted."),
    "train.peak_memory_bytes": Metric("bytes", "Largest resident memory of a worker's process so far.", "min"),
    "train.peak_gpu_memory_bytes": Metric("bytes", "Most GPU memory that a worker's tensors took so far.", "min"),
    "train.compile_seconds": Metric("s", "First step of every attempt, in which layers are compiled.", "min"),
    "train.steps": Metric("steps", "Optimizer steps done."),
    "train.best_step": Metric("", "Optimizer step with the lowest held-out loss."),
    "train.samples": Metric("rows", "Rows of the training data seen so far."),
    "train.epoch": Metric("epochs", "Passes over the training data so far."),
    "eval.loss": Metric("nats/token", "Mean loss over the supervised tokens of the held-out data.", "min"),
    "eval.perplexity": Metric("", "exp(eval.loss).", "min"),
    "eval.seconds": Metric("s", "Time that taking the held-out loss took."),
    "eval.json_match": Metric("fraction", "Answers that are JSON with an accepted value everywhere.", "max"),
    "eval.json_name_match": Metric("fraction", "Answers that are JSON and name the right function.", "max"),
    "eval.exact_match": Metric("fraction", "Answers right but for case, punctuation, articles and spaces.", "max"),
    "eval.exact_match_strict": Metric("fraction", "Answers that are the expected text.", "max"),
    "eval.accuracy": Metric("fraction", "Answers that name the expected label before any other.", "max"),
    "eval.macro_f1": Metric("fraction", "F1 of each label, averaged over the labels.", "max"),
    "eval.f1": Metric("fraction", "Token F1 of answer and expected answer, as SQuAD takes it.", "max"),
    "eval.rouge1": Metric("fraction", "ROUGE-1 F-measure: common words.", "max"),
    "eval.rouge2": Metric("fraction", "ROUGE-2 F-measure: common pairs of words.", "max"),
    "eval.rougeL": Metric("fraction", "ROUGE-L F-measure: longest common sequence of words.", "max"),
    "eval.bleu": Metric("fraction", "Corpus BLEU by sacrebleu, over 100.", "max"),
    "eval.chrf": Metric("fraction", "Corpus chrF by sacrebleu, over 100.", "max"),
    "eval.multiple_choice": Metric("fraction", "Questions whose right choice is the likeliest.", "max"),
    "eval.multiple_choice_norm": Metric("fraction", "Questions whose right choice is the likeliest per byte.", "max"),
    "eval.human_win_rate": Metric("fraction", "Blind votes for this model against the other, ties half.", "max"),
    "generate.rows": Metric("rows", "Rows of the data set that were answered, or have an error in the place of it."),
    "generate.errors": Metric("rows", "Rows that could not be answered.", "min"),
    "generate.prompt_tokens": Metric("tokens", "Tokens of all prompts, each counted once."),
    "generate.completion_tokens": Metric("tokens", "Tokens of all answers."),
    "generate.tokens_per_s": Metric("tokens/s", "Tokens of answers a second, all workers together.", "max"),
    "model.parameters": Metric("parameters", "Parameters of the model, adapter included."),
    "model.trainable_parameters": Metric("parameters", "Parameters that are trained."),
    "model.bytes": Metric("bytes", "Size of the kept artifact.", "min"),
    "run.seconds": Metric("s", "Wall-clock time of the run.", "min"),
    "run.cost": Metric("", "Workers times hours times `resources.price_per_worker_hour`, in its currency.", "min"),
    "run.prepare_seconds": Metric("s", "Time before the first step: reading data, loading the model.", "min"),
    "run.train_seconds": Metric("s", "Time in optimizer steps, all attempts together.", "min"),
    "run.evaluate_seconds": Metric("s", "Time measuring: held-out losses and answers.", "min"),
}

FAMILIES = {
    "eval.lm_eval.*_stderr": Metric("", "Standard error of that metric of a benchmark."),
    "eval.lm_eval.*[._]perplexity*": Metric("", "Perplexity on a benchmark of the lm-evaluation-harness.", "min"),
    "eval.lm_eval.*.bits_per_byte*": Metric("bits/byte", "Of a benchmark of the lm-evaluation-harness.", "min"),
    "eval.lm_eval.*.brier_score*": Metric("", "Brier score on a benchmark of the lm-evaluation-harness.", "min"),
    "eval.lm_eval.*.ter*": Metric("", "Translation edit rate on a benchmark of the lm-evaluation-harness.", "min"),
    "eval.lm_eval.*.*": Metric("", "Metric of a benchmark of the lm-evaluation-harness.", "max"),
}
"""Names that are not ours to list, as patterns of which the first that fits holds: `eval.lm_eval.BENCHMARK.METRIC`."""


def metric(name: str) -> Metric:
    """The entry of `name`; `base.X` resolves to `eval.X`. Raises KeyError for a name that is neither in the list nor of
    a family."""
    listed = "eval." + name.removeprefix("base.") if name.startswith("base.") else name
    if listed in METRICS:
        return METRICS[listed]
    fitting = (found for pattern, found in FAMILIES.items() if fnmatchcase(listed, pattern))
    if (found := next(fitting, None)) is None:
        raise KeyError(name)
    return found
