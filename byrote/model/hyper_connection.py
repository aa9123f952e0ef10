"""The residual stream behind one interface: plain addition, hyper-connections (HC), manifold-constrained hyper-connections (mHC).

A block has two sites (attention, feed-forward). Each site does

    x, carry = site.enter(streams)        what the sub-layer reads
    streams  = site.leave(streams, F(x), carry)

on streams [B, T, R, D]; R is 1 for the plain residual. At the end `ReadOut` turns the streams into one vector, before the final norm.

mHC: equations in `kernels.hyper_mix`. HC (arXiv 2512.24880 Eq 5): x̃ = rms over D; H = α·tanh(θ x̃) + b for pre, post and res, none
constrained. Both start as the plain residual: every stream read with weight 1/R, written with 1, mixed by (almost) the identity.

Shapes: B batch, T tokens, N = B·T, R streams, D model.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from byrote.kernels.hyper_mix import hyper_enter, hyper_leave, hyper_read
from byrote.model.config import ResidualConfig

_DYNAMIC_STD = 1e-4  # breaks the symmetry between streams without moving step 0
_DYNAMIC_SCALE = 0.01  # α of the papers
_STAY = 5.0  # mixing logits off the diagonal start this far below it


class Site(Protocol):
    def enter(self, streams_BTRD: Tensor) -> tuple[Tensor, Any]: ...
    def leave(self, streams_BTRD: Tensor, y_BTD: Tensor, carry: Any) -> Tensor: ...


class PlainSite(nn.Module):
    def enter(self, streams_BTRD: Tensor) -> tuple[Tensor, None]:
        return streams_BTRD[:, :, 0], None

    def leave(self, streams_BTRD: Tensor, y_BTD: Tensor, carry: None) -> Tensor:
        return streams_BTRD + y_BTD[:, :, None]


class PlainReadOut(nn.Module):
    def forward(self, streams_BTRD: Tensor) -> Tensor:
        return streams_BTRD[:, :, 0]


class ManifoldSite(nn.Module):
    """mHC. `fn` [R(R+2), R·D], `base` [R(R+2)], `scale` [3], all fp32 (layout of v4_spec §3)."""

    def __init__(self, dim: int, config: ResidualConfig, norm_eps: float) -> None:
        super().__init__()
        streams = config.num_streams
        self.config, self.norm_eps = config, norm_eps
        self.fn = nn.Parameter(torch.empty(streams * (streams + 2), streams * dim))
        self.base = nn.Parameter(torch.empty(streams * (streams + 2)))
        self.scale = nn.Parameter(torch.empty(3))

    def reset(self, generator: torch.Generator | None = None) -> None:
        streams = self.config.num_streams
        self.fn.data.normal_(0, _DYNAMIC_STD, generator=generator)
        stay = _STAY * (torch.eye(streams) - 1)
        self.base.data.copy_(torch.cat((torch.full((streams,), -math.log(streams - 1)), torch.zeros(streams), stay.flatten())))
        self.scale.data.fill_(_DYNAMIC_SCALE)

    def enter(self, streams_BTRD: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        c = self.config
        x_ND, post_NR, comb_NRR = hyper_enter(
            streams_BTRD.flatten(0, 1), self.fn, self.base, self.scale, iters=c.sinkhorn_iters, eps=c.eps, norm_eps=self.norm_eps
        )
        return x_ND.unflatten(0, streams_BTRD.shape[:2]), (post_NR, comb_NRR)

    def leave(self, streams_BTRD: Tensor, y_BTD: Tensor, carry: tuple[Tensor, Tensor]) -> Tensor:
        return hyper_leave(streams_BTRD.flatten(0, 1), y_BTD.flatten(0, 1), *carry).view(streams_BTRD.shape)


class ManifoldReadOut(nn.Module):
    """`fn` [R, R·D], `base` [R], `scale` [1]."""

    def __init__(self, dim: int, config: ResidualConfig, norm_eps: float) -> None:
        super().__init__()
        self.config, self.norm_eps = config, norm_eps
        self.fn = nn.Parameter(torch.empty(config.num_streams, config.num_streams * dim))
        self.base = nn.Parameter(torch.empty(config.num_streams))
        self.scale = nn.Parameter(torch.empty(1))

    def reset(self, generator: torch.Generator | None = None) -> None:
        self.fn.data.normal_(0, _DYNAMIC_STD, generator=generator)
        self.base.data.fill_(-math.log(self.config.num_streams - 1))
        self.scale.data.fill_(_DYNAMIC_SCALE)

    def forward(self, streams_BTRD: Tensor) -> Tensor:
        x_ND = hyper_read(streams_BTRD.flatten(0, 1), self.fn, self.base, self.scale, eps=self.config.eps, norm_eps=self.norm_eps)
        return x_ND.unflatten(0, streams_BTRD.shape[:2])


class FreeSite(nn.Module):
    """Unconstrained HC: θ_pre, θ_post [D], θ_res [R, D], biases, three scalars α."""

    def __init__(self, dim: int, config: ResidualConfig, norm_eps: float) -> None:
        super().__init__()
        streams = config.num_streams
        self.norm_eps, self.num_streams = norm_eps, streams
        self.theta_pre = nn.Parameter(torch.empty(dim))
        self.theta_post = nn.Parameter(torch.empty(dim))
        self.theta_res = nn.Parameter(torch.empty(streams, dim))
        self.base_pre = nn.Parameter(torch.empty(streams))
        self.base_post = nn.Parameter(torch.empty(streams))
        self.base_res = nn.Parameter(torch.empty(streams, streams))
        self.scale = nn.Parameter(torch.empty(3))

    def reset(self, generator: torch.Generator | None = None) -> None:
        for theta in (self.theta_pre, self.theta_post, self.theta_res):
            theta.data.normal_(0, _DYNAMIC_STD, generator=generator)
        self.base_pre.data.fill_(1 / self.num_streams)
        self.base_post.data.fill_(1)
        self.base_res.data.copy_(torch.eye(self.num_streams))
        self.scale.data.fill_(_DYNAMIC_SCALE)

    def enter(self, streams_BTRD: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        with torch.autocast(streams_BTRD.device.type, enabled=False):
            wide = streams_BTRD.to(torch.promote_types(streams_BTRD.dtype, torch.float32))
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.norm_eps)
            pre_BTR = self.scale[0] * torch.tanh(normed @ self.theta_pre) + self.base_pre
            post_BTR = self.scale[1] * torch.tanh(normed @ self.theta_post) + self.base_post
            res_BTRQ = self.scale[2] * torch.tanh(normed @ self.theta_res.t()) + self.base_res
            x_BTD = (pre_BTR[..., None] * wide).sum(2)
        return x_BTD.to(streams_BTRD.dtype), (post_BTR, res_BTRQ)

    def leave(self, streams_BTRD: Tensor, y_BTD: Tensor, carry: tuple[Tensor, Tensor]) -> Tensor:
        post_BTR, res_BTRQ = carry
        return hyper_leave(streams_BTRD.flatten(0, 1), y_BTD.flatten(0, 1), post_BTR.flatten(0, 1), res_BTRQ.flatten(0, 1)).view(
            streams_BTRD.shape
        )


class MeanReadOut(nn.Module):
    def forward(self, streams_BTRD: Tensor) -> Tensor:
        return streams_BTRD.float().mean(2).to(streams_BTRD.dtype)


def make_site(dim: int, config: ResidualConfig, norm_eps: float) -> Site:
    if config.kind == "plain":
        return PlainSite()
    return (ManifoldSite if config.kind == "mhc" else FreeSite)(dim, config, norm_eps)


def make_read_out(dim: int, config: ResidualConfig, norm_eps: float) -> nn.Module:
    if config.kind == "plain":
        return PlainReadOut()
    return ManifoldReadOut(dim, config, norm_eps) if config.kind == "mhc" else MeanReadOut()
