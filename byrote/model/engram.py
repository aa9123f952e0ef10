"""Engram: memory rows speak into the residual streams (arXiv 2601.07372 §2.3–2.4).

    e = concatenated rows of the token [N·E numbers]
    v = W_V e                       one value for all streams
    k^m = W_K^m e                   a key per stream m
    Ṽ^m = α^m v                     α^m: gate of stream m against its key (`kernels.engram_gate`)
    Y  = SiLU(conv(rms(Ṽ))) + Ṽ     depthwise, causal, dilated, starting at zero, so Y = Ṽ at step 0
    h^m ← h^m + Y^m

The layer computes with the rows handed to it and knows no table. The convolution reads t, t−d, t−2d, … of the same document.

Shapes: B batch, T tokens, R streams, D model, E numbers of all rows of a token (d_mem), W taps.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from byrote.kernels.engram_gate import gate
from byrote.model.batch import Batch
from byrote.model.config import EngramConfig
from byrote.model.linear import Linear
from byrote.model.state import Tail


class ShortConv(nn.Module):
    """SiLU(depthwise causal convolution of the normed values). `weight` [R, D, W], tap j looks back j·dilation tokens."""

    def __init__(self, streams: int, dim: int, kernel: int, dilation: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(streams, dim, kernel))
        self.gain = nn.Parameter(torch.ones(streams, dim))
        self.kernel, self.dilation, self.eps = kernel, dilation, eps

    @property
    def reach(self) -> int:
        return (self.kernel - 1) * self.dilation

    def forward(self, value_BTRD: Tensor, batch: Batch, tail: Tail | None) -> Tensor:
        length = value_BTRD.shape[1]
        normed = value_BTRD.float()
        normed = (normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + self.eps) * self.gain).to(value_BTRD.dtype)
        padded = functional.pad(normed, (0, 0, 0, 0, self.reach, 0)) if tail is None else tail.append(normed).to(normed.dtype)
        taps = self.weight.to(normed.dtype)
        total = normed * taps[..., 0]
        for tap in range(1, self.kernel):
            back = tap * self.dilation
            part = padded[:, self.reach - back : self.reach - back + length]
            total = total + self._inside(part, back, batch) * taps[..., tap]
        return functional.silu(total)

    @staticmethod
    def _inside(part_BTRD: Tensor, back: int, batch: Batch) -> Tensor:
        """Zero where `back` tokens ago was another document."""
        if batch.document_BT is None or batch.keys_document_BS is None:
            return part_BTRD
        length = batch.document_BT.shape[1]
        before = functional.pad(batch.keys_document_BS, (back, 0), value=-2)
        before_BT = before[:, -(length + back) :][:, :length] if back else batch.document_BT
        return part_BTRD * (before_BT == batch.document_BT)[:, :, None, None].to(part_BTRD.dtype)


class Engram(nn.Module):
    """Weights of one memory layer. `slot` is its index among the memory layers."""

    def __init__(self, dim: int, streams: int, config: EngramConfig, eps: float, slot: int) -> None:
        super().__init__()
        self.value = Linear(config.memory_dim, dim)
        self.key = Linear(config.memory_dim, streams * dim)
        self.stream_gain = nn.Parameter(torch.ones(streams, dim))
        self.key_gain = nn.Parameter(torch.ones(streams, dim))
        self.conv = ShortConv(streams, dim, config.conv_kernel, config.dilation, eps) if config.conv_kernel else None
        self.streams, self.hard, self.eps, self.slot = streams, config.gate == "hard", eps, slot

    def forward(self, streams_BTRD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(streams with memory added, gates α [B, T, R])."""
        assert batch.rows is not None, "a model with memory layers needs rows"
        rows_BTE = batch.rows.layer(self.slot).to(streams_BTRD.dtype)
        keys_BTRD = self.key(rows_BTE).unflatten(-1, (self.streams, -1))
        gain_RD = self.stream_gain.float() * self.key_gain.float()
        alpha_NR = gate(streams_BTRD.flatten(0, 1), keys_BTRD.flatten(0, 1), gain_RD, eps=self.eps, hard=self.hard)
        alpha_BTR = alpha_NR.unflatten(0, rows_BTE.shape[:2])
        value_BTRD = alpha_BTR[..., None].to(streams_BTRD.dtype) * self.value(rows_BTE)[:, :, None].to(streams_BTRD.dtype)
        if self.conv is not None:
            tail = None if batch.state is None else batch.state.tails[self.slot]
            value_BTRD = value_BTRD + self.conv(value_BTRD, batch, tail)
        return streams_BTRD + value_BTRD, alpha_BTR
