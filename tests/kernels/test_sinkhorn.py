"""Sinkhorn-Knopp: published vectors, the paper's own form, and the properties mHC rests on."""

import pytest
import torch

from byrote.kernels.sinkhorn import cpu, reference, sinkhorn
from tests.kernels.twins import SIZES, assert_twins, need, random
from tests.tolerances import assert_close_fp32

EPS = 1e-6
LOGITS = torch.tensor([[[0.5, -1, 2, 0], [1, 0.3, -0.7, 0.2], [-2, 1.5, 0.1, 0.9], [0, 0, 3, -1]]])
VECTORS = {  # iterations → result of the released V4's form for LOGITS
    1: [
        [0.229858, 0.041065, 0.388980, 0.153961],
        [0.681532, 0.270972, 0.047013, 0.338180],
        [0.023998, 0.636232, 0.073993, 0.481607],
        [0.064611, 0.051731, 0.490014, 0.026250],
    ],
    2: [
        [0.309076, 0.058801, 0.354414, 0.215069],
        [0.557552, 0.236067, 0.026061, 0.287415],
        [0.021600, 0.609833, 0.045129, 0.450339],
        [0.111771, 0.095298, 0.574395, 0.047175],
    ],
    20: [
        [0.346006, 0.073247, 0.319667, 0.261079],
        [0.483613, 0.227841, 0.018213, 0.270332],
        [0.017635, 0.553998, 0.029685, 0.398682],
        [0.152745, 0.144913, 0.632434, 0.069907],
    ],
}
PAPER_LOGITS = torch.tensor([[[0.0, 1, 2, 3], [3, 0, 1, 2], [-1, 2, 0, 1], [1, 1, -2, 0]]])
PAPER_RESULT = [
    [0.021592, 0.055878, 0.484256, 0.438274],
    [0.546459, 0.025902, 0.224477, 0.203162],
    [0.027901, 0.533543, 0.230208, 0.208348],
    [0.404048, 0.384677, 0.061059, 0.150216],
]


def paper_form(logits_NRR, iters):
    """arXiv 2512.24880 §4.2: exp, then columns and rows in turn, without eps."""
    mixes = logits_NRR.exp()
    for _ in range(iters):
        mixes = mixes / mixes.sum(-2, keepdim=True)
        mixes = mixes / mixes.sum(-1, keepdim=True)
    return mixes


@pytest.mark.parametrize("iters", VECTORS)
@pytest.mark.parametrize("backend", [sinkhorn, reference.sinkhorn])
def test_the_released_form_gives_the_published_numbers(backend, iters):
    assert (backend(LOGITS, iters=iters, eps=EPS) - torch.tensor(VECTORS[iters])).abs().max() < 1e-6


def test_the_papers_form_transposed_is_ours():
    paper = paper_form(PAPER_LOGITS.double(), 20)
    assert (paper - torch.tensor(PAPER_RESULT)).abs().max() < 1e-6
    same, moved = (reference.sinkhorn(PAPER_LOGITS.double().mT, iters=20, eps=eps).mT for eps in (0.0, EPS))
    assert (same - paper).abs().max() < 1e-12
    assert (moved - paper).abs().max() < 3.5e-6  # what eps does to this matrix is 3.48e-6


def test_columns_sum_to_one_and_rows_ever_more_nearly():
    results = [sinkhorn(random(257, 4, 4), iters=iters, eps=EPS) for iters in (1, 5, 20, 200)]
    assert all((mixes > 0).all() for mixes in results)
    assert_close_fp32(results[2].sum(1), torch.ones(257, 4))
    gaps = [(mixes.sum(2) - 1).abs().max() for mixes in results]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-5


def test_sixty_mixes_in_a_row_keep_all_sums():
    product = torch.eye(4)
    for layer in range(60):
        product = product @ sinkhorn(random(1, 4, 4, seed=layer), iters=20, eps=EPS)[0]
    assert (product.sum(0) - 1).abs().max() < 60 * 2 * EPS  # each column step leaves sums eps below one
    assert (product.sum(1) - 1).abs().max() < 1e-3  # rows converge, token by token


def test_equal_logits_mix_evenly_and_a_strong_diagonal_stays():
    assert_close_fp32(sinkhorn(torch.zeros(3, 4, 4), iters=20, eps=EPS), torch.full((3, 4, 4), 0.25))
    stay = sinkhorn(30 * torch.eye(4)[None], iters=20, eps=EPS)[0]
    assert (stay - torch.eye(4)).abs().max() < 1e-5


@pytest.mark.parametrize("iters", [1, 2, 20])
def test_the_reference_has_the_gradient_of_its_values(iters):
    logits = random(3, 4, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference.sinkhorn(x, iters=iters, eps=EPS), logits)


def test_recomputing_gives_the_gradient_of_stored_iterations():
    def stored(logits_NRR):
        mixes = torch.softmax(logits_NRR, -1) + EPS
        for axis in [-2] + [-1, -2] * 19:
            mixes = mixes / (mixes.sum(axis, keepdim=True) + EPS)
        return mixes

    leaves = [(2 * random(7, 4, 4)).double().requires_grad_() for _ in range(2)]
    cotangent = random(7, 4, 4, seed=1).double()
    stored(leaves[0]).backward(cotangent)
    reference.sinkhorn(leaves[1], iters=20, eps=EPS).backward(cotangent)
    assert (leaves[0].grad - leaves[1].grad).abs().max() < 1e-12


@pytest.mark.parametrize("iters", [1, 2, 20])
@pytest.mark.parametrize("streams", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tokens", SIZES)
def test_native_is_reference(tokens, streams, iters):
    need(cpu.library)
    inputs = [2 * random(tokens, streams, streams)]
    assert_twins(lambda x: cpu.sinkhorn(x, iters=iters, eps=EPS), lambda x: reference.sinkhorn(x, iters=iters, eps=EPS), inputs)


@pytest.mark.parametrize("backend", [sinkhorn, reference.sinkhorn])
def test_logits_far_apart_stay_finite_and_a_bad_one_spoils_its_own_token_only(backend):
    logits = 100 * random(5, 4, 4)
    logits[2, 1, 3] = float("nan")
    mixes = backend(logits, iters=20, eps=EPS)
    assert mixes[2].isnan().any()
    assert mixes[[0, 1, 3, 4]].isfinite().all()


def test_what_does_not_fit_is_refused_with_the_shape_that_does():
    with pytest.raises(ValueError, match=r"takes \[N, R, R\]"):
        sinkhorn(torch.zeros(2, 3, 4), iters=20, eps=EPS)
    with pytest.raises(ValueError, match="at least 1"):
        sinkhorn(torch.zeros(2, 4, 4), iters=0, eps=EPS)
