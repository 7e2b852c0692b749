"""The one list of metric names, with unit and help. Programs, reports and dashboards use no other names.

`base.X` is metric `eval.X` of the untouched model. What a running endpoint counts has Prometheus' form of a name.
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
    "prune.remaining": Metric("fraction", "Prunable weights under the masks of the step."),
    "prune.budget_loss": Metric("", "R: how far, in log ratio, what is kept is from the budget.", "min"),
    "prune.removed_norm": Metric("", "G: norms of the LoRA slices of removed units; 0 once masks are final.", "min"),
    "prune.search_loss": Metric("nats/token", "Mean loss over the search rows under soft masks, at first none.", "min"),
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

SERVE = {
    "lmray_serve_requests_total": Metric(
        "requests", "Requests by the status of their answer; 499: the client left, 5xx also where an answer broke off."
    ),
    "lmray_serve_running_requests": Metric("requests", "Requests being answered."),
    "lmray_serve_prompt_tokens_total": Metric("tokens", "Tokens of prompts, once a prompt."),
    "lmray_serve_generated_tokens_total": Metric("tokens", "Tokens of answers."),
    "lmray_serve_filtered_total": Metric("matches", "Matches of filters in prompts and answers, by their kind."),
    "lmray_serve_time_to_first_token_seconds": Metric("s", "From the whole request to an answer's first token.", "min"),
    "lmray_serve_queue_time_seconds": Metric("s", "Part of that before the engine began to read the prompt.", "min"),
    "lmray_serve_inter_token_latency_seconds": Metric("s", "From a token of an answer to its next.", "min"),
    "lmray_serve_replicas": Metric("replicas", "Engine replicas that told their numbers."),
    "lmray_serve_engine_failed": Metric("", "1 where a replica's engine has ended.", "min"),
    "lmray_serve_engine_running_requests": Metric("requests", "Requests in a replica's batch."),
    "lmray_serve_engine_waiting_requests": Metric("requests", "Requests that wait for a place in a replica's batch."),
    "lmray_serve_engine_waiting_tokens": Metric("tokens", "Tokens that a replica has taken on and not read yet."),
    "lmray_serve_engine_generated_tokens_total": Metric("tokens", "Tokens that a replica drew."),
    "lmray_serve_kv_blocks": Metric("blocks", "Blocks of a replica's key-value cache."),
    "lmray_serve_kv_blocks_used": Metric("blocks", "Blocks of it that running requests hold."),
    "lmray_serve_preemptions_total": Metric("requests", "Requests put back to wait because blocks ran out.", "min"),
    "lmray_serve_prefix_hit_tokens_total": Metric("tokens", "Tokens not read as blocks of others held them.", "max"),
    "lmray_serve_adapter_cache_adapters": Metric("adapters", "Adapters that a replica holds or loads."),
    "lmray_serve_adapter_cache_bytes": Metric("bytes", "Size of their files."),
    "lmray_serve_adapter_cache_hits_total": Metric("requests", "Requests whose adapter was loaded already.", "max"),
    "lmray_serve_adapter_cache_loads_total": Metric("adapters", "Adapters loaded."),
    "lmray_serve_adapter_cache_evictions_total": Metric("adapters", "Adapters dropped to make room.", "min"),
    "lmray_serve_adapter_cache_failures_total": Metric("adapters", "Adapters that could not be loaded.", "min"),
    "lmray_serve_speculation_proposed_tokens_total": Metric("tokens", "Tokens proposed ahead of the model."),
    "lmray_serve_speculation_accepted_tokens_total": Metric("tokens", "Those of them that the model took.", "max"),
    "lmray_serve_speculation_gain": Metric("", "How many times faster tokens came with proposals than without.", "max"),
    "lmray_serve_speculation_active": Metric("", "0 while proposals are switched off as they do not pay."),
    "lmray_serve_server_running_requests": Metric("requests", "Running at the engine's server, whoever asked."),
    "lmray_serve_server_waiting_requests": Metric("requests", "Waiting there."),
    "lmray_serve_server_kv_cache_fraction": Metric("", "Part of its key-value cache that is used."),
    "lmray_serve_server_preemptions_total": Metric("requests", "Put back to wait there as its cache was full.", "min"),
    "lmray_serve_server_prefix_hit_tokens_total": Metric("tokens", "Not read there as its cache held them.", "max"),
    "lmray_serve_server_prompt_tokens_total": Metric("tokens", "Tokens of prompts that it read."),
    "lmray_serve_server_generated_tokens_total": Metric("tokens", "Tokens that it drew."),
    "lmray_serve_drift_answers_total": Metric("answers", "Answers scored by the drift watch."),
    "lmray_serve_drift_missed_total": Metric("answers", "Sampled answers dropped unscored: the endpoint was busy."),
    "lmray_serve_drift_alerts_total": Metric("windows", "Windows of answers unlike the baseline.", "min"),
    "lmray_serve_drift_alert": Metric("", "1 while a version's last window of answers is unlike its baseline.", "min"),
    "lmray_serve_drift_distance": Metric("", "A measure's distance between window and baseline, over what is allowed."),
    "lmray_serve_evaluation_worse": Metric("metrics", "That got worse, at the last evaluation of a version.", "min"),
    "lmray_serve_evaluation_score": Metric("", "What was measured then."),
    "lmray_serve_evaluation_due": Metric("", "1 while a version has yet to be evaluated, for the first time or again."),
}
"""What a running endpoint counts, as `/metrics` tells it. A histogram adds `_bucket`, `_sum`, `_count` to its name."""

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
