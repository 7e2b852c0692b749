"""Filters of prompts: what they replace is replaced in the texts that were sent, before the model's template; what they
refuse is looked for in the whole prompt as the model would read it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from lmray.data.filters.base import TextFilter
from lmray.serve.account import Account
from lmray.serve.answer import Question
from lmray.serve.failures import AnswerError, RequestError, error_body
from lmray.serve.filters import FilteredText, of_answers, of_prompts
from lmray.serve.forms import Form


class PromptFilters:
    """Those of one endpoint."""

    def __init__(self, filters: Sequence[TextFilter], tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._hides_answers = bool(of_answers(filters))
        self._replacing = [one for one in of_prompts(filters) if one.takes == "redact"]
        self._refusing = [one for one in of_prompts(filters) if one.takes == "refuse"]

    def replace(self, form: Form, account: Account) -> bool:
        """Whether the prompts of `form` are others now."""
        return bool(self._replacing) and form.rewrite(lambda text: self._replaced(text, account))

    def _replaced(self, text: str, account: Account) -> str:
        passed, found = FilteredText(self._replacing).push(text, last=True)
        account.find("prompts", found)
        return passed

    def check(self, form: Form, questions: Iterable[Question], account: Account) -> None:
        """Raises AnswerError (400) for a prompt that a filter refuses, and RequestError for log probabilities of
        filtered answers: they would tell what the filter takes out."""
        if form.asked.num_logprobs is not None and self._hides_answers:
            raise RequestError("logprobs", "are not told where answers are filtered")
        for question in questions if self._refusing else ():
            options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
            prompt = str(self._tokenizer.decode(list(question.ids), **options))
            _, found = FilteredText(self._refusing).push(prompt, last=True)
            if found:
                account.find("prompts", found[:1])
                told = f"filter `{found[0].label}` lets no such text through"
                raise AnswerError(400, error_body(told, code="content_filter", param=form.param))
