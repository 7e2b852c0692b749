"""Pictures of a pruning: what they are drawn from, and that they are drawn whatever of it is there."""

from __future__ import annotations

import random

import pytest

from lmray.metrics import pruning_plots as module
from lmray.metrics.pruning_plots import freeze_step, front, pareto, plot_kept, plot_search
from lmray.testing.pruned import made_up_events, made_up_masks

pytestmark = pytest.mark.draws

PNG = b"\x89PNG"


@pytest.fixture
def figures(monkeypatch):
    """What is drawn, before it becomes a PNG."""
    drawn = []
    png_of = module.png_of

    def kept(figure):
        drawn.append(figure)
        return png_of(figure)

    monkeypatch.setattr(module, "png_of", kept)
    return drawn


def test_masks_are_drawn_layer_by_layer_over_the_steps(figures, recwarn):
    masks = made_up_masks(layers=12, steps=40, every=4, frozen=24)
    assert plot_kept(masks, title="枝刈りの実験").startswith(PNG)
    (figure,) = figures
    groups, channels = figure.axes[:2]
    mesh = groups.collections[0]
    assert mesh.get_array().shape == (12, len(masks))
    assert mesh.get_array()[3, 5] == masks[5]["groups"][3]
    assert channels.collections[0].get_array()[11, -1] == masks[-1]["channels"][11]
    assert groups.get_xlim() == (masks[0]["step"], masks[-1]["step"] + 4)
    assert [line.get_xdata()[0] for line in groups.lines] == [24], "the step of the freeze is marked"
    assert figure.get_suptitle() == "枝刈りの実験"
    assert not [one for one in recwarn if "Glyph" in str(one.message)], "every character has a font"


def test_one_line_of_masks_is_a_picture_too():
    assert plot_kept(made_up_masks(layers=2, steps=1, every=1, frozen=9), title="one").startswith(PNG)


def test_the_step_of_the_freeze_is_the_first_that_is_final():
    assert freeze_step(made_up_masks(layers=2, steps=20, every=5, frozen=12)) == 15
    assert freeze_step(made_up_masks(layers=2, steps=20, every=5, frozen=99)) is None
    assert freeze_step([]) is None


def test_the_search_is_drawn_with_its_freeze(figures):
    events = made_up_events(steps=40, frozen=24)
    assert (plot_search(events, 24) or b"").startswith(PNG)
    kept, budget, norms = figures[0].axes
    assert list(kept.lines[0].get_ydata()) == [event["prune.remaining"] for event in events]
    assert list(budget.lines[0].get_ydata()) == [event["prune.budget_loss"] for event in events]
    assert list(norms.lines[0].get_ydata()) == [event["prune.removed_norm"] for event in events]
    assert kept.get_legend().get_texts()[0].get_text() == "final from step 24"
    plot_search(events, None)
    assert figures[1].axes[0].get_legend() is None


def test_events_without_a_pruning_are_no_picture():
    assert plot_search([{"step": 1, "train.loss": 2.0}], None) is None


ROWS = [
    {"method": "dense", "remaining": 1.0, "loss": 2.0, "prefill_1_tokens_per_s": 900.0, "decode_1_tokens_per_s": 20.0},
    {"method": "atp", "remaining": 0.6, "loss": 2.3, "prefill_1_tokens_per_s": 1500.0, "decode_1_tokens_per_s": 30.0},
    {
        "method": "二段階",
        "remaining": 0.6,
        "loss": 2.6,
        "prefill_1_tokens_per_s": 1400.0,
        "decode_1_tokens_per_s": 29.0,
    },
    {"method": "base", "remaining": 1.0, "loss": 3.0},
]


def test_quality_is_drawn_against_size_and_time(figures):
    assert pareto(ROWS, title="品質").startswith(PNG)
    size, prefill, decode = figures[0].axes
    assert [axis.get_xlabel() for axis in (size, prefill, decode)] == [
        "share of prunable weights kept",
        "prefill of one row, ms a token",
        "decode of one row, ms a token",
    ]
    assert list(size.lines[0].get_xdata()) == [0.6, 1.0] and list(size.lines[0].get_ydata()) == [2.3, 2.0]
    assert list(decode.lines[0].get_xdata()) == pytest.approx([1000 / 30, 1000 / 20])
    points = [line for line in decode.lines[1:] if len(line.get_xdata())]
    assert len(points) == 3, "the row without a time is not on that panel"


def test_eight_rows_are_drawn_below(figures):
    both = {"prefill_8_tokens_per_s": 7.0, "decode_8_tokens_per_s": 70.0}
    pareto([row | both for row in ROWS[:2]], title="five")
    places = [axis.get_subplotspec() for axis in figures[0].axes]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert figures[0].axes[4].lines[0].get_xdata()[0] == pytest.approx(1000 / 70)


def test_times_that_nobody_measured_have_no_panel(figures):
    pareto([ROWS[3]], title="one")
    assert len(figures[0].axes) == 1


def test_the_front_is_what_nothing_beats():
    draw = random.Random(0)
    points = [(draw.randint(0, 9) / 10, draw.randint(0, 9) / 10) for _ in range(30)]
    beaten = {(x, y) for x, y in points if any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)}
    assert front(points) == sorted(set(points) - beaten)
