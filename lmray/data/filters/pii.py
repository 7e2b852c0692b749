"""What tells who somebody is, as the recognisers of `presidio-analyzer` (Microsoft) find it; the extra `lmray[pii]`.

Its recognisers of patterns and checksums only: no model of a language is loaded, so names and places of people are not
found. Text in scripts without spaces is read as in `lmray.data.filters._segments`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from lmray.data.filters._segments import Segments, Span
from lmray.data.filters.base import Action, Passage, TextFilter
from lmray.errors import ConfigError

Kind = Literal["EMAIL_ADDRESS", "PHONE_NUMBER", "CREDIT_CARD", "IBAN_CODE", "CRYPTO", "IP_ADDRESS", "US_SSN", "URL"]
MIN_SCORE = 0.4
"""Of 1; what a recogniser is less sure of is a number like any other."""
_COULD_BE = re.compile(r"[\d@.:]")
"""Some of these is in everything that is found."""


class Pii(TextFilter):
    """E-mail addresses, telephone numbers, payment cards, bank accounts, wallets, IP addresses, social security numbers
    and addresses of pages."""

    package: ClassVar[str] = "presidio_analyzer"

    kinds: Annotated[tuple[Kind, ...], Field(min_length=1)] = (
        "EMAIL_ADDRESS",
        "PHONE_NUMBER",
        "CREDIT_CARD",
        "IBAN_CODE",
        "CRYPTO",
        "IP_ADDRESS",
        "US_SSN",
    )
    """Cards, accounts and wallets count only with the right check digits. `URL` begins with
    `http`."""
    action: Action = "redact"
    """`redact`: puts `<EMAIL_ADDRESS>` and the like in its place; where a number stood, JSON is none any more.
    `refuse`: ends an answer, and refuses a request for its prompt."""
    regions: Annotated[tuple[str, ...], Field(min_length=1, max_length=20)] = ("US", "GB", "DE", "FR", "JP")
    """Countries (ISO 3166) whose telephone numbers are known without `+`. Each takes its time of every number."""

    @field_validator("regions")
    @classmethod
    def _are_countries(cls, regions: tuple[str, ...]) -> tuple[str, ...]:
        odd = [region for region in regions if not re.fullmatch("[A-Z]{2}", region)]
        if odd:
            raise ValueError(f"`{odd[0]}` is no country of two capital letters")
        return regions

    def check(self) -> None:
        super().check()
        from phonenumbers import SUPPORTED_REGIONS

        unknown = [region for region in self.regions if region not in SUPPORTED_REGIONS]
        if unknown:
            hint = "ISO 3166, such as `GB` for the United Kingdom"
            raise ConfigError("filters", f"`{unknown[0]}` is no country with telephone numbers", hint=hint)

    @property
    def takes(self) -> Action:
        return self.action

    def open(self) -> Passage:
        replace = "<{}>".format if self.action == "redact" else None
        return Segments(partial(search, self.kinds, self.regions), replace)


def search(kinds: tuple[Kind, ...], regions: tuple[str, ...], text: str) -> list[Span]:
    """What is found in `text`; of matches that overlap, all of it under the name of the surest."""
    if not _COULD_BE.search(text):
        return []
    found = [
        (one.score, Span(one.start, one.end, one.entity_type))
        for recogniser in _recognisers(kinds, regions)
        for one in recogniser.analyze(text, recogniser.supported_entities, None)
        if one.score >= MIN_SCORE
    ]
    return joined(found)


def joined(found: Sequence[tuple[float, Span]]) -> list[Span]:
    """Matches with how sure they are, in order, those that overlap as one."""
    spans: list[tuple[float, Span]] = []
    for score, span in sorted(found, key=lambda one: (one[1].start, -one[1].end)):
        if spans and span.start < spans[-1][1].end:
            before, first = spans.pop()
            kind = span.kind if score > before else first.kind
            spans.append((max(score, before), Span(first.start, max(first.end, span.end), kind)))
        else:
            spans.append((score, span))
    return [span for _, span in spans]


@lru_cache(maxsize=16)
def _recognisers(kinds: tuple[Kind, ...], regions: tuple[str, ...]) -> list[Any]:
    from presidio_analyzer import predefined_recognizers as known
    from tldextract import TLDExtract

    logging.getLogger("presidio-analyzer").disabled = True  # it quotes what it cannot check
    suffixes = TLDExtract(suffix_list_urls=(), cache_dir=None)  # as they came with the library: nothing is fetched

    class Email(known.EmailRecognizer):
        def validate_result(self, pattern_text: str) -> bool:
            return suffixes(pattern_text).fqdn != ""

    makers = {
        "EMAIL_ADDRESS": Email,
        "PHONE_NUMBER": partial(known.PhoneRecognizer, supported_regions=regions),
        "CREDIT_CARD": known.CreditCardRecognizer,
        "IBAN_CODE": known.IbanRecognizer,
        "CRYPTO": known.CryptoRecognizer,
        "IP_ADDRESS": known.IpRecognizer,
        "US_SSN": known.UsSsnRecognizer,
        "URL": partial(known.UrlRecognizer, patterns=known.UrlRecognizer.PATTERNS[:1]),
    }
    return [makers[kind]() for kind in kinds]
