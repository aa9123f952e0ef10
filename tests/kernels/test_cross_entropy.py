"""The chunked head equals the readable one in losses and gradients, and C equals PyTorch."""

import pytest
import torch

from byrote.kernels import cross_entropy
from byrote.kernels.cross_entropy import IGNORE, cpu, linear_cross_entropy, product_cross_entropy, reference
from tests.tolerances import assert_close_bf16, assert_close_fp32


def inputs(
    tokens: int, dim: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, generator=generator).to(dtype)
    weight = torch.randn(vocab, dim, generator=generator).to(dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[::5] = IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def values_and_gradients(function, hidden, weight, targets, **more):
    mean, losses = function(hidden, weight, targets, **more)
    return losses, mean, *torch.autograd.grad(3.0 * mean, (hidden, weight))


@pytest.fixture(params=["native", "reference"])
def backend(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(cpu, "can_run", lambda *_: False)
    elif cpu.library() is None:
        pytest.skip("no compiler here: the reference serves")
    return request.param


@pytest.mark.parametrize(("tokens", "vocab", "chunk"), [(1, 7, 4), (7, 257, 3), (257, 64, 100), (33, 1000, 1024)])
def test_chunks_equal_the_whole_in_fp32(backend, tokens, vocab, chunk):
    hidden, weight, targets = inputs(tokens, 24, vocab)
    got = values_and_gradients(linear_cross_entropy, hidden, weight, targets, chunk=chunk)
    for one, other in zip(got, values_and_gradients(reference, hidden, weight, targets), strict=True):
        assert_close_fp32(one, other)


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (7, 3), (257, 100)])
def test_a_head_with_a_product_of_its_own_gives_the_same(tokens, chunk):
    hidden, weight, targets = inputs(tokens, 24, 64)

    def own(hidden, weight, targets):
        return product_cross_entropy(hidden, lambda part: part @ weight.t(), targets, chunk=chunk)

    got = values_and_gradients(own, hidden, weight, targets)
    for one, other in zip(got, values_and_gradients(reference, hidden, weight, targets), strict=True):
        assert_close_fp32(one, other)


def test_bf16_agrees_with_fp32_on_the_same_inputs(backend):
    """The logits are rounded to bf16 before the softmax, so losses are compared as a whole and gradients by the bf16 grade of their sum."""
    hidden, weight, targets = inputs(257, 32, 300, torch.bfloat16)
    wide = [part.detach().float().requires_grad_() for part in (hidden, weight)]
    _, mean, *gradients = values_and_gradients(linear_cross_entropy, hidden, weight, targets)
    _, mean_wide, *gradients_wide = values_and_gradients(reference, *wide, targets)
    assert abs(mean.item() - mean_wide.item()) <= 0.005 * mean_wide.item()
    for got, want in zip(gradients, gradients_wide, strict=True):
        assert (got.float() - want).norm() <= 0.02 * want.norm()


def test_native_slope_is_the_references_on_the_same_bf16_logits():
    if cpu.library() is None:
        pytest.skip("no compiler here: the reference serves")
    from byrote.kernels.cross_entropy.reference import score_and_slope

    logits = torch.randn(57, 301, generator=torch.Generator().manual_seed(1)).mul(4).bfloat16()
    targets = torch.randint(0, 301, (57,), generator=torch.Generator().manual_seed(2))
    targets[3] = IGNORE
    factor, losses, losses_native = torch.tensor(0.25), torch.empty(57), torch.empty(57)
    want = score_and_slope(logits.float(), targets, losses, factor)
    got = cpu.score_and_slope(logits.clone(), targets, losses_native, factor)
    assert_close_bf16(got, want)
    assert_close_fp32(losses_native, losses)
    assert not got[3].any()


def test_tokens_not_scored_have_no_loss_and_no_gradient(backend):
    hidden, weight, targets = inputs(9, 8, 11)
    losses, _, grad_hidden, _ = values_and_gradients(linear_cross_entropy, hidden, weight, targets)
    assert not losses[targets == IGNORE].any()
    assert not grad_hidden[targets == IGNORE].any()


def test_nothing_scored_is_a_loss_of_zero(backend):
    hidden, weight, targets = inputs(5, 8, 11)
    losses, mean, grad_hidden, grad_weight = values_and_gradients(linear_cross_entropy, hidden, weight, torch.full_like(targets, IGNORE))
    assert mean == 0
    assert not losses.any() and not grad_hidden.any() and not grad_weight.any()


def test_zero_tokens(backend):
    hidden, weight, targets = inputs(0, 8, 11)
    _, mean, grad_hidden, grad_weight = values_and_gradients(linear_cross_entropy, hidden, weight, targets)
    assert mean == 0 and grad_hidden.shape == (0, 8) and not grad_weight.any()


def test_without_gradients_the_losses_are_the_same(backend):
    hidden, weight, targets = inputs(40, 16, 99)
    with torch.no_grad():
        losses = linear_cross_entropy(hidden, weight, targets)[1]
    assert_close_fp32(losses, linear_cross_entropy(hidden, weight, targets)[1].detach())


def test_a_logit_that_is_not_finite_shows_in_the_loss(backend):
    hidden, weight, targets = inputs(4, 8, 20)
    with torch.no_grad():
        hidden[1, 0] = float("nan")
        assert not torch.isfinite(linear_cross_entropy(hidden, weight, targets)[0])


def test_evaluation_does_no_gradient_work(backend, monkeypatch):
    hidden, weight, targets = inputs(9, 8, 11)
    want = linear_cross_entropy(hidden, weight, targets)[1].detach()
    monkeypatch.setattr(cross_entropy, "_forward_backward", None)
    with torch.no_grad():
        assert_close_fp32(linear_cross_entropy(hidden, weight, targets)[1], want)


@pytest.mark.parametrize("target", [11, -1])
def test_a_target_outside_the_vocabulary_is_refused(backend, target):
    hidden, weight, targets = inputs(5, 8, 11)
    targets[2] = target
    with pytest.raises(IndexError, match=r"allowed: 0\.\.10"):
        linear_cross_entropy(hidden, weight, targets)
