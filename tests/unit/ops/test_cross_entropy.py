import torch

from lmray.ops.cross_entropy import cross_entropy_per_token, cross_entropy_sum


def test_equals_the_naive_sum_in_float64():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 13, generator=generator) * 5
    targets = torch.randint(0, 13, (7,), generator=generator)
    naive = 0.0
    for row, target in zip(logits.double(), targets, strict=True):
        naive -= (row[target] - row.exp().sum().log()).item()
    assert abs(cross_entropy_sum(logits, targets).item() - naive) < 1e-4


def test_bfloat16_logits_are_summed_in_float32():
    logits = torch.zeros(1000, 4, dtype=torch.bfloat16)
    loss = cross_entropy_sum(logits, torch.zeros(1000, dtype=torch.long))
    assert loss.dtype == torch.float32
    assert abs(loss.item() - 1000 * torch.tensor(4.0).log().item()) < 1e-2


def test_per_token_adds_up_to_the_sum():
    generator = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(7, 13, generator=generator), torch.randint(0, 13, (7,), generator=generator)
    each = cross_entropy_per_token(logits, targets)
    assert each.shape == (7,)
    for row, target, loss in zip(logits.double(), targets, each, strict=True):
        assert abs(loss.item() + (row[target] - row.exp().sum().log()).item()) < 1e-5
