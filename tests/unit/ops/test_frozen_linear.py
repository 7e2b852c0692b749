"""Packed weights against the plain product."""

from __future__ import annotations

import pytest
import torch

from lmray.ops.frozen_linear import FrozenLinear, PackedLinear, can_pack

BFLOAT16 = FrozenLinear(torch.zeros(2, 3, dtype=torch.bfloat16), None)


@pytest.mark.skipif(not can_pack(BFLOAT16), reason="this processor has no faster layout")
@pytest.mark.parametrize("num_rows", [1, 5, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_weights_give_the_same_product(num_rows, has_bias):
    torch.manual_seed(0)
    weight, bias = torch.randn(24, 48), torch.randn(24)
    x = torch.randn(num_rows, 48).bfloat16()
    plain = FrozenLinear(weight.bfloat16(), bias.bfloat16() if has_bias else None)
    exact = x.double() @ plain.weight_OI.double().T + (plain.bias_O.double() if has_bias else 0)
    assert torch.allclose(PackedLinear(plain)(x).double(), exact, rtol=2**-7, atol=2**-5)


def test_what_is_packed_already_or_of_another_type_stays_as_it_is():
    assert not can_pack(FrozenLinear(torch.zeros(2, 3), None))
    assert not can_pack(FrozenLinear(BFLOAT16.weight_OI.to("meta"), None))
    if can_pack(BFLOAT16):
        assert not can_pack(PackedLinear(BFLOAT16))
