"""The split and the weights on arrays, beside the slow way of doing the same."""

import hashlib
import random

import numpy as np
import pytest

from lmray.data.base import Example
from lmray.data.spec import EvalData
from lmray.data.split import group_number, held_out


def slow_held_out(examples: list[Example], spec: EvalData) -> list[bool]:
    """Groups in the order of SHA-256 of seed and name, until there are enough; without a column each place is a
    group, named by its number in order of appearance."""
    assert spec.split is not None
    groups = [str(one.columns[spec.by]) if spec.by else one.where for one in examples]
    names = {group: group if spec.by else str(number) for number, group in enumerate(dict.fromkeys(groups))}
    chosen: list[str] = []
    for group in sorted(names, key=lambda group: hashlib.sha256(f"{spec.seed} {names[group]}".encode()).digest()):
        if sum(map(groups.count, chosen)) >= spec.split * len(examples):
            break
        chosen.append(group)
    return [group in chosen for group in groups]


@pytest.mark.parametrize("by", [None, "topic"])
@pytest.mark.parametrize("split", [0.01, 0.2, 0.5, 0.99])
def test_whole_groups_are_held_out_in_the_order_of_their_digests(split, by):
    chance = random.Random(f"{split} {by}")
    for seed in range(5):
        places = [f"file:{number}" for number in range(40)] + [f"file:{number}" for number in range(10)]  # some twice
        examples = [Example((), place, {"topic": chance.choice(("赤", "b", 3, None))}) for place in places]
        spec = EvalData(split=split, by=by, seed=seed)
        numbers = np.array([group_number(one, spec) for one in examples], dtype=np.uint64)
        assert held_out(numbers, spec).tolist() == slow_held_out(examples, spec)
