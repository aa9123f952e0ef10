"""The residual streams: three kinds behind one interface, all of which begin as the plain residual."""

from dataclasses import replace

import pytest
import torch

from byrote.errors import ConfigError
from byrote.kernels.sinkhorn import sinkhorn
from byrote.model.config import ResidualConfig
from byrote.model.hyper_connection import FreeSite, ManifoldSite, make_read_out, make_site
from byrote.model.transformer import Model
from tests.model.tiny_models import RESIDUALS, bare, build, text, whole
from tests.tolerances import assert_bitwise, assert_close_fp32

DIM, EPS = 16, 1e-6


def with_weights_of(model: Model, source: Model) -> Model:
    """Every weight the two share; what mixes streams keeps its initial value."""
    shared = dict(source.named_parameters())
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name in shared and shared[name].shape == param.shape:
                param.copy_(shared[name])
    return model.eval()


@pytest.mark.parametrize("streams", [2, 4])
@pytest.mark.parametrize("kind", ["mhc", "hc"])
@pytest.mark.parametrize("parts", [bare, lambda **changes: whole(**({"engram": None} | changes))], ids=["bare", "experts and MTP"])
def test_at_step_0_the_logits_are_those_of_the_plain_residual(kind, streams, parts):
    plain = Model(parts(residual=RESIDUALS["plain"])).eval()
    mixed = with_weights_of(Model(parts(residual=ResidualConfig(kind=kind, num_streams=streams))), plain)
    with torch.no_grad():
        got, want = (model(text(2, 9)).logits for model in (mixed, plain))
    assert (got - want).abs().max() < 1e-4 * max(1.0, want.abs().max().item())


def test_at_step_0_a_manifold_site_reads_the_mean_writes_to_all_and_mixes_nothing():
    site = make_site(DIM, ResidualConfig(num_streams=4), EPS)
    site.reset(torch.Generator().manual_seed(0))
    streams_BTRD = torch.randn(2, 3, 4, DIM)
    x_BTD, (post_NR, comb_NRR) = site.enter(streams_BTRD)
    assert (x_BTD - streams_BTRD.mean(2)).abs().max() < 1e-3
    assert (post_NR - 1).abs().max() < 1e-3
    assert (comb_NRR - torch.eye(4)).abs().max() < 0.025


def test_scales_and_bases_of_zero_give_the_published_constants():
    site = make_site(DIM, ResidualConfig(num_streams=4), EPS)
    for param in site.parameters():
        param.data.zero_()
    streams_BTRD = torch.randn(1, 5, 4, DIM)
    x_BTD, (post_NR, comb_NRR) = site.enter(streams_BTRD)
    assert_close_fp32(x_BTD, (0.5 + EPS) * streams_BTRD.sum(2))
    assert_bitwise(post_NR, torch.ones(5, 4))
    assert_close_fp32(comb_NRR, torch.full((5, 4, 4), 0.25))


@pytest.mark.parametrize("kind", ["mhc", "hc", "plain"])
def test_a_site_that_mixes_nothing_adds_what_the_layer_said_to_every_stream(kind):
    config = RESIDUALS[kind]
    site, streams_BTRD, y_BTD = make_site(DIM, config, EPS), torch.randn(2, 3, config.streams, DIM), torch.randn(2, 3, DIM)
    identity = torch.eye(config.streams).expand(6, -1, -1)
    carry = (torch.ones(6, config.streams), identity) if kind == "mhc" else None
    if kind == "hc":
        carry = (torch.ones(2, 3, config.streams), identity.unflatten(0, (2, 3)))
    assert_close_fp32(site.leave(streams_BTRD, y_BTD, carry), streams_BTRD + y_BTD[:, :, None])


def test_streams_flow_along_the_rows_of_the_mixing_matrix():
    """comb[j, k] is how much of stream j goes to stream k: applied transposed."""
    site = make_site(DIM, ResidualConfig(num_streams=3), EPS)
    streams_BTRD = torch.randn(1, 1, 3, DIM)
    comb = torch.zeros(1, 3, 3)
    comb[0, 0, 2] = 1.0
    left = site.leave(streams_BTRD, torch.zeros(1, 1, DIM), (torch.zeros(1, 3), comb))[0, 0]
    assert_bitwise(left[2], streams_BTRD[0, 0, 0])
    assert not left[:2].any()


def test_sixty_mixes_after_one_another_keep_their_row_and_column_sums():
    mixes = sinkhorn(torch.randn(60 * 7, 4, 4), iters=20, eps=EPS).view(60, 7, 4, 4)
    composite = torch.eye(4).expand(7, -1, -1)
    for mix in mixes:
        composite = mix.transpose(1, 2) @ composite
    assert (composite.sum(2) - 1).abs().max() < 1e-3
    assert (composite.sum(1) - 1).abs().max() < 1e-3
    assert torch.linalg.matrix_norm(composite, 2).max() <= 1 + 1e-3  # no stream grows over depth


def test_a_free_site_follows_its_equations():
    site = make_site(DIM, RESIDUALS["hc"], EPS)
    for param in site.parameters():
        param.data.normal_()
    streams_BTRD = torch.randn(1, 1, 2, DIM)
    h_RD = streams_BTRD[0, 0]
    tilde_RD = h_RD / (h_RD.square().mean(-1, keepdim=True) + EPS).sqrt()
    pre = site.scale[0] * torch.tanh(tilde_RD @ site.theta_pre) + site.base_pre
    post = site.scale[1] * torch.tanh(tilde_RD @ site.theta_post) + site.base_post
    res = site.scale[2] * torch.tanh(tilde_RD @ site.theta_res.T) + site.base_res  # [from stream, to stream]
    x_BTD, carry = site.enter(streams_BTRD)
    assert_close_fp32(x_BTD[0, 0], pre @ h_RD)
    y_D = torch.randn(DIM)
    assert_close_fp32(site.leave(streams_BTRD, y_D[None, None], carry)[0, 0], res.T @ h_RD + post[:, None] * y_D)


def test_streams_permuted_with_their_weights_give_the_same_read_out():
    read, streams_BTRD, order = make_read_out(DIM, ResidualConfig(num_streams=3), EPS), torch.randn(2, 5, 3, DIM), torch.tensor([2, 0, 1])
    for param in read.parameters():
        param.data.normal_()
    before = read(streams_BTRD)
    read.fn.data = read.fn.data.view(3, 3, DIM)[order][:, order].reshape(3, -1)
    read.base.data = read.base.data[order]
    assert_close_fp32(read(streams_BTRD[:, :, order]), before)


@pytest.mark.parametrize("kind", ["mhc", "hc"])
def test_every_mixing_weight_learns(kind):
    model = build(bare(residual=RESIDUALS[kind]))
    model(text(2, 9)).logits.square().sum().backward()
    for module in model.modules():
        if isinstance(module, ManifoldSite | FreeSite):
            assert all(param.grad.abs().max() > 0 for param in module.parameters())


def test_a_model_with_streams_of_one_kind_is_not_that_of_another():
    logits = {kind: build(bare(residual=residual))(text(1, 9)).logits for kind, residual in RESIDUALS.items()}
    assert (logits["mhc"] - logits["hc"]).abs().max() > 1e-3 < (logits["mhc"] - logits["plain"]).abs().max()


def test_one_stream_needs_the_plain_residual():
    with pytest.raises(ConfigError, match="kind='plain'"):
        ResidualConfig(num_streams=1)
    with pytest.raises(ConfigError, match="mhc, hc, plain"):
        ResidualConfig(kind="dense")
    assert ResidualConfig(kind="plain", num_streams=1).streams == 1
    assert replace(RESIDUALS["plain"], num_streams=4).streams == 1
