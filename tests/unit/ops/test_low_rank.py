"""Low-rank products of many adapters against one row at a time, in float64."""

from __future__ import annotations

import pytest
import torch

from lmray.ops.low_rank import MAX_LOOKED_UP, WIDTH, LowRankStack, Mixed, Product, make_pieces, num_slots

CPU = torch.device("cpu")
NUM_INPUTS = 4
SIZES = [(5, 3), (6, 2, 2), (4, 4), (7,)]
RANKS = {"a": 2, "b": WIDTH, "c": 1, "d": 2 * WIDTH + 3}
SLOTS = {"a": range(1), "b": range(1, 2), "c": range(2, 3), "d": range(5, 8)}


def filled(sizes: tuple[int, ...], parts: dict[str, tuple[int, ...]]):
    """A stack of random adapters, and their factors by name and part."""
    source = torch.Generator().manual_seed(0)
    stack = LowRankStack(sizes, NUM_INPUTS, torch.zeros(1, dtype=torch.float64))
    factors = {}
    for name, rank in RANKS.items():
        for part in parts.get(name, range(len(sizes))):
            a = torch.randn(rank, NUM_INPUTS, generator=source, dtype=torch.float64)
            b = torch.randn(sizes[part], rank, generator=source, dtype=torch.float64)
            stack.put(part, SLOTS[name], a, b)
            factors[name, part] = (a, b)
    return stack, factors


def slow(sizes, x, rows, factors):
    """y of zeros plus B A x, row by row."""
    y = torch.zeros(len(x), sum(sizes), dtype=torch.float64)
    for row, name in enumerate(name for name, count in rows for _ in range(count)):
        for part, size in enumerate(sizes):
            if (name, part) in factors:
                a, b = factors[name, part]
                y[row, sum(sizes[:part]) :][:size] = b @ (a @ x[row])
    return y


def pieces_of(rows):
    return make_pieces(tuple((SLOTS.get(name), count) for name, count in rows), CPU)


@pytest.mark.parametrize(
    "rows",
    [
        [("a", 1), ("b", 1), ("c", 1)],
        [(None, 2), ("a", 2), ("b", 1), ("c", 3)],
        [(None, 1), ("a", 1), ("a", 1), ("b", 2), ("c", 1), ("d", 1), ("b", 9), (None, 4), ("a", 17), ("d", 20)],
        [("d", 3), ("a", 1)],
        [("d", 9)],
        [(None, 3)],
    ],
)
@pytest.mark.parametrize("parts", [{}, {"a": (0,), "b": (-1,), "c": (0,)}])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("gathers_a", [False, True])
def test_every_row_gets_its_own_adapter_and_no_other(rows, parts, sizes, gathers_a):
    parts = {name: tuple(part % len(sizes) for part in some) for name, some in parts.items()}
    stack, factors = filled(sizes, parts)
    stack.gathers_a = gathers_a
    x = torch.randn(sum(count for _, count in rows), NUM_INPUTS, dtype=torch.float64)
    y = torch.zeros(len(x), sum(sizes), dtype=torch.float64)
    for _ in range(2):  # the second time by what was kept
        stack.add(y, x, pieces_of(rows))
    assert torch.allclose(y, 2 * slow(sizes, x, rows, factors))


def test_many_rows_of_an_adapter_are_a_product_and_neighbours_with_few_share_a_piece():
    def shapes(rows):
        return [(type(one), one.rows.start, one.rows.stop) for one in pieces_of(rows)]

    few, many = MAX_LOOKED_UP, MAX_LOOKED_UP + 1
    assert shapes([(None, 4), ("a", few), ("b", 2)]) == [(Mixed, 4, 6 + few)]
    assert shapes([("a", few), ("a", 1), ("b", 1)]) == [(Product, 0, many), (Mixed, many, many + 1)]
    assert shapes([("a", 1), ("b", many), ("c", 1)]) == [(Mixed, 0, 1), (Product, 1, 1 + many), (Mixed, 1 + many, 11)]
    assert shapes([("a", 1), (None, 1), ("c", 1)]) == [(Mixed, 0, 1), (Mixed, 2, 3)]
    assert [num_slots(rank) for rank in (1, WIDTH, WIDTH + 1)] == [1, 1, 2]


def test_an_adapter_of_other_layers_leaves_its_rows_alone_and_the_next_finds_room():
    stack = LowRankStack((2,), NUM_INPUTS, torch.zeros(1, dtype=torch.float64))
    ones = torch.ones(1, NUM_INPUTS, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    stack.put(0, range(1), *ones)
    x, y = torch.ones(12, NUM_INPUTS, dtype=torch.float64), torch.zeros(12, 2, dtype=torch.float64)
    with torch.inference_mode():
        stack.add(y, x, pieces_of([("a", 1), ("b", 1), ("d", 10)]))
    stack.put(0, SLOTS["d"], *ones)
    assert y.tolist() == [[4, 4], *[[0, 0]] * 11]


def test_an_adapter_that_overflows_leaves_its_neighbours_alone():
    stack, _ = filled(SIZES[0], {})
    a_RI, b_OR = (torch.full(shape, 1e300, dtype=torch.float64) for shape in ((5, NUM_INPUTS), (SIZES[0][0], 5)))
    stack.put(0, SLOTS["b"], a_RI, b_OR)
    x, y = torch.full((3, NUM_INPUTS), 1e300, dtype=torch.float64), torch.zeros(3, sum(SIZES[0]), dtype=torch.float64)
    stack.add(y, x, pieces_of([("a", 1), ("b", 1), ("c", 1)]))
    assert not y[1].isfinite().all()
    assert y[[0, 2]].isfinite().all()


def test_what_leaves_is_forgotten_and_its_place_taken_by_another():
    sizes = SIZES[0]
    stack, factors = filled(sizes, {})
    stack.clear(SLOTS["b"])
    new = torch.ones(2, NUM_INPUTS, dtype=torch.float64), torch.ones(sizes[1], 2, dtype=torch.float64)
    stack.put(1, SLOTS["b"], *new)
    x = torch.randn(2, NUM_INPUTS, dtype=torch.float64)
    y = torch.zeros(2, sum(sizes), dtype=torch.float64)
    stack.add(y, x, pieces_of([("a", 1), ("b", 1)]))
    kept = {key: value for key, value in factors.items() if key[0] == "a"} | {("b", 1): new}
    assert torch.allclose(y, slow(sizes, x, [("a", 1), ("b", 1)], kept))


@pytest.mark.parametrize("num_each", [1, MAX_LOOKED_UP + 1])
def test_products_of_bfloat16_are_as_close_as_its_numbers(num_each):
    torch.manual_seed(0)
    stack = LowRankStack((64, 32), 48, torch.zeros(1, dtype=torch.bfloat16))
    x, exact = torch.randn(3 * num_each, 48).bfloat16(), torch.zeros(3 * num_each, 96, dtype=torch.float64)
    for place, name in enumerate("abc"):
        for part, columns in enumerate((slice(64), slice(64, 96))):
            a, b = torch.randn(8, 48).bfloat16(), torch.randn(columns.stop - (columns.start or 0), 8).bfloat16()
            stack.put(part, SLOTS[name], a, b)
            own = slice(place * num_each, (place + 1) * num_each)
            exact[own, columns] = x[own].double() @ a.double().T @ b.double().T
    y = torch.zeros(3 * num_each, 96, dtype=torch.bfloat16)
    stack.add(y, x, pieces_of([(name, num_each) for name in "abc"]))
    assert torch.allclose(y.double(), exact, rtol=2**-6, atol=0.3)
