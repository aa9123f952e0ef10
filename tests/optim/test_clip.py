"""One norm over parameters and table rows."""

import pytest
import torch
from torch import nn

from byrote.optim.clip import clip_gradients
from tests.tolerances import BF16, assert_bitwise, assert_close_fp32


def _gradients(scale: float = 1.0) -> tuple[list[nn.Parameter], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 5), (7,), (2, 3, 4))]
    for param in params[:2]:
        param.grad = scale * torch.randn(param.shape, generator=generator)
    return params, [scale * torch.randn(9, 4, generator=generator)]


def _norm(params: list[nn.Parameter], rows: list[torch.Tensor]) -> float:
    return torch.cat([x.flatten() for x in (params[0].grad, params[1].grad, *rows)]).norm().item()


def test_the_norm_counts_table_rows_and_is_that_before_clipping():
    params, rows = _gradients()
    expected = _norm(params, rows)
    assert clip_gradients(params, rows, 0.5).item() == pytest.approx(expected, rel=1e-6)
    assert _norm(params, rows) == pytest.approx(0.5, rel=1e-5)


def test_the_direction_stays():
    params, rows = _gradients()
    before = [params[0].grad.clone(), rows[0].clone()]
    clip_gradients(params, rows, 0.5)
    ratios = torch.cat([(now / then).flatten() for now, then in zip((params[0].grad, rows[0]), before, strict=True)])
    assert_close_fp32(ratios, ratios[0].expand_as(ratios))


@pytest.mark.parametrize("max_norm", [0.0, 1e6])
def test_gradients_within_the_norm_or_without_limit_are_bitwise_unchanged(max_norm):
    params, rows = _gradients()
    before = [params[0].grad.clone(), params[1].grad.clone(), rows[0].clone()]
    assert clip_gradients(params, rows, max_norm) > 0
    for now, then in zip((params[0].grad, params[1].grad, rows[0]), before, strict=True):
        assert_bitwise(now, then)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_does_not_spread(bad):
    params, rows = _gradients()
    rows[0][4, 2] = bad
    before = params[0].grad.clone()
    assert not clip_gradients(params, rows, 0.5).isfinite()
    assert_bitwise(params[0].grad, before)
    assert (~rows[0].isfinite()).sum() == 1


def test_gradients_of_two_dtypes_share_one_norm():
    params, rows = _gradients()
    rows = [rows[0].bfloat16()]
    clip_gradients(params, rows, 0.5)
    assert rows[0].dtype == torch.bfloat16
    assert _norm(params, [rows[0].float()]) == pytest.approx(0.5, rel=BF16)


def test_no_gradients_have_norm_zero():
    assert clip_gradients([nn.Parameter(torch.zeros(2))], [], 1.0).item() == 0
