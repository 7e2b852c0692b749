"""Low-rank products of many adapters against one row at a time, in float64."""

from __future__ import annotations

import pytest
import torch

from lmray.ops.low_rank import MAX_RANKS, LowRankStack, make_pieces

CPU = torch.device("cpu")
SIZES, NUM_INPUTS = (5, 3), 4


def filled(ranks: dict[str, range], parts: dict[str, tuple[int, ...]], seed: int = 0):
    """A stack of random adapters, and their factors by name and part."""
    source = torch.Generator().manual_seed(seed)
    stack = LowRankStack(SIZES, NUM_INPUTS, torch.zeros(1, dtype=torch.float64))
    factors = {}
    for name, run in ranks.items():
        for part in parts.get(name, (0, 1)):
            a = torch.randn(len(run), NUM_INPUTS, generator=source, dtype=torch.float64)
            b = torch.randn(SIZES[part], len(run), generator=source, dtype=torch.float64)
            stack.put(part, run, a, b)
            factors[name, part] = (a, b)
    return stack, factors


def slow(x, rows, factors):
    """y of zeros plus B A x, row by row."""
    y = torch.zeros(len(x), sum(SIZES), dtype=torch.float64)
    names = [name for name, count in rows for _ in range(count)]
    for row, name in enumerate(names):
        for part, start in enumerate((0, SIZES[0])):
            if (name, part) in factors:
                a, b = factors[name, part]
                y[row, start : start + SIZES[part]] = b @ (a @ x[row])
    return y


RANKS = {"a": range(2), "b": range(2, 7), "c": range(7, 8), "d": range(20, 24)}


@pytest.mark.parametrize(
    "rows",
    [
        [("a", 1), ("b", 1), ("c", 1)],
        [(None, 2), ("a", 2), ("b", 1), ("c", 3)],
        [(None, 1), ("a", 1), ("a", 1), ("b", 2), ("c", 1), ("d", 1), ("b", 9), (None, 4), ("a", 7)],
        [("d", 3), ("a", 1)],
        [(None, 3)],
    ],
)
@pytest.mark.parametrize("parts", [{}, {"a": (0,), "b": (1,), "c": (0,)}])
def test_every_row_gets_its_own_adapter_and_no_other(rows, parts):
    stack, factors = filled(RANKS, parts)
    x = torch.randn(sum(count for _, count in rows), NUM_INPUTS, dtype=torch.float64)
    y = torch.zeros(len(x), sum(SIZES), dtype=torch.float64)
    pieces = make_pieces([(RANKS.get(name), count) for name, count in rows], CPU)
    stack.add(y, x, pieces)
    assert torch.allclose(y, slow(x, rows, factors))


def test_few_adapters_take_a_product_each_and_many_share_one():
    def shapes(rows):
        found = make_pieces(rows, CPU)
        return [
            (one.rows.stop - one.rows.start, one.ranks.stop - one.ranks.start, one.others_nR is None) for one in found
        ]

    one, two, three, far = range(8), range(8, 16), range(16, 24), range(900, 908)
    assert shapes([(None, 4), (one, 1), (two, 2)]) == [(1, 8, True), (2, 8, True)]
    assert shapes([(one, 1), (two, 1), (three, 1)]) == [(3, 24, False)]
    assert shapes([(one, 1), (two, 1), (three, 1), (far, 1)]) == [(3, 24, False), (1, 8, True)]
    assert shapes([(one, 1), (two, 1), (three, 100)]) == [(1, 8, True), (1, 8, True), (100, 8, True)]
    many = [(range(8 * place, 8 * place + 8), 1) for place in range(MAX_RANKS // 4)]
    assert [ranks for _, ranks, _ in shapes(many)] == [MAX_RANKS, MAX_RANKS]


def test_an_adapter_that_overflows_leaves_its_neighbours_alone():
    stack, _ = filled(RANKS, {})
    a_RI, b_OR = (torch.full(shape, 1e300, dtype=torch.float64) for shape in ((5, NUM_INPUTS), (SIZES[0], 5)))
    stack.put(0, RANKS["b"], a_RI, b_OR)
    x, y = torch.full((3, NUM_INPUTS), 1e300, dtype=torch.float64), torch.zeros(3, sum(SIZES), dtype=torch.float64)
    stack.add(y, x, make_pieces([(RANKS[name], 1) for name in "abc"], CPU))
    assert not y[1].isfinite().all()
    assert y[[0, 2]].isfinite().all()


def test_what_leaves_is_forgotten_and_its_place_taken_by_another():
    stack, factors = filled(RANKS, {})
    stack.clear(RANKS["b"])
    new = torch.ones(2, NUM_INPUTS, dtype=torch.float64), torch.ones(SIZES[1], 2, dtype=torch.float64)
    stack.put(1, range(2, 5), *new)
    x = torch.randn(2, NUM_INPUTS, dtype=torch.float64)
    y = torch.zeros(2, sum(SIZES), dtype=torch.float64)
    stack.add(y, x, make_pieces([(RANKS["a"], 1), (range(2, 5), 1)], CPU))
    kept = {key: value for key, value in factors.items() if key[0] == "a"} | {("new", 1): new}
    assert torch.allclose(y, slow(x, [("a", 1), ("new", 1)], kept))
