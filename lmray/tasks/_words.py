"""Words of a text in any script, as scores compare them.

A word is a run of letters, digits and their marks; in scripts written without spaces (Han, kana, Thai, Lao, Khmer,
Burmese) every letter is one, as multilingual question answering does it (MLQA, Lewis et al. 2020,
arXiv:1910.07475).
"""

from __future__ import annotations

import re
import string
import unicodedata

UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    r"\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
"""Letters that are words of their own."""


def words(text: str) -> list[str]:
    """The words of `text`, without case."""
    found: list[str] = []
    previous = " "
    for letter in unicodedata.normalize("NFKC", text).lower():
        kind = unicodedata.category(letter)[0]
        if kind not in "LNM":
            previous = " "
            continue
        joined = kind == "M" or not (UNSPACED.match(letter) or UNSPACED.match(previous))
        if found and previous != " " and joined:
            found[-1] += letter
        else:
            found.append(letter)
        previous = previous if kind == "M" and previous != " " else letter
    return found


def squad_normalised(text: str) -> str:
    """`text` as SQuAD's official script compares it: lower case, no punctuation, no English articles, single spaces
    (Rajpurkar et al. 2016, arXiv:1606.05250). Differs from it in: full-width forms are their usual ones (NFKC), and
    punctuation is that of all scripts."""
    folded = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(
        letter for letter in folded if letter not in string.punctuation and unicodedata.category(letter)[0] != "P"
    )
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def squad_words(text: str) -> list[str]:
    """SQuAD's tokens of `text`: what stands between spaces; in scripts without them, every letter."""
    return UNSPACED.sub(lambda letter: f" {letter.group()} ", squad_normalised(text)).split()
