"""`dynamic` NTK positions by example: frequencies follow each one's own length, however rows are batched and packed.

Peng et al., "YaRN", arXiv 2309.00071, appendix B.2: beyond the original length the frequencies are those of a base that
grows with the sequence. `transformers` takes the longest of all sequences it has seen since it went below the original
length; for one example alone, in a model that is new, it is the same.

Generation with a cache is `transformers`' own as well: a prompt's keys are turned by the prompt's length, those of each
token drawn after it by the length up to there.

Shapes: B rows, T tokens, N tokens of examples of one length, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch

from lmray.errors import ConfigError
from lmray.models.rope import DYNAMIC, follows_length


def example_lengths(position_ids_BT: torch.Tensor) -> torch.Tensor:
    """(B, T): of the example that each token is of, up to its last position in the row. An example ends where positions
    do not go on by one."""
    goes_on_BT = torch.zeros_like(position_ids_BT, dtype=torch.bool)
    goes_on_BT[:, 1:] = position_ids_BT[:, 1:] == position_ids_BT[:, :-1] + 1
    number_BT = (~goes_on_BT).cumsum(dim=-1) - 1
    lengths_BT = torch.zeros_like(position_ids_BT).scatter_reduce(-1, number_BT, position_ids_BT + 1, "amax")
    return lengths_BT.gather(-1, number_BT)


class _ByExample(torch.nn.Module):
    """Before a rotary embedding of `transformers`, whose forward runs once for each length."""

    original_inv_freq: torch.Tensor
    original_max_seq_len: int

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, (B, T, D) each, in the type of `x`."""
        lengths_BT = example_lengths(position_ids).clamp(min=self.original_max_seq_len)
        lengths = lengths_BT.unique().tolist()
        if len(lengths) == 1:
            return self._of_one_length(x, position_ids)
        picks_BT = [lengths_BT == length for length in lengths]
        parts_1ND = [self._of_one_length(x, position_ids[picked_BT][None]) for picked_BT in picks_BT]
        cos_BTD, sin_BTD = both = [x.new_empty(*position_ids.shape, one.shape[-1]) for one in parts_1ND[0]]
        for picked_BT, parts in zip(picks_BT, parts_1ND, strict=True):
            for whole_BTD, part_1ND in zip(both, parts, strict=True):
                whole_BTD[picked_BT] = part_1ND[0]
        return cos_BTD, sin_BTD

    def _of_one_length(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of a model that has seen nothing yet: it forgets the longest sequence so far only after a short one."""
        self.inv_freq, self.max_seq_len_cached = self.original_inv_freq, self.original_max_seq_len
        return super().forward(x, position_ids)  # type: ignore[misc]


def follow_examples(model: Any) -> None:
    """Has `model` take `dynamic` frequencies by example, if its config says `dynamic`. Raises ConfigError where its
    code has no rotary embedding that `transformers` knows to scale so."""
    if not follows_length(model.config):
        return
    found = [module for module in model.modules() if getattr(module, "rope_type", None) == DYNAMIC]
    if not found:
        what = f"the code of `{type(model).__name__}` computes `dynamic` positions in its own way, by the longest row"
        raise ConfigError("model.rope_scaling", what, hint="use `yarn` or `linear`")
    for module in found:
        kind = type(module)
        if not issubclass(kind, _ByExample):
            module.__class__ = type(kind.__name__, (_ByExample, kind), {})
