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

from byrote.kernels.engram_gate import Conv, Extend, engram_add
from byrote.model.batch import Batch
from byrote.model.config import EngramConfig
from byrote.model.linear import Linear


class ShortConv(nn.Module):
    """Weights of the short convolution. `weight` [R, D, W], tap j looks back j·dilation tokens; `gain` belongs to its norm."""

    def __init__(self, streams: int, dim: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(streams, dim, kernel))
        self.gain = nn.Parameter(torch.ones(streams, dim))
        self.dilation = dilation

    def forward(self) -> Conv:
        return Conv(self.weight, self.gain, self.dilation)


class Engram(nn.Module):
    """Weights of one memory layer. `slot` is its index among the memory layers."""

    def __init__(self, dim: int, streams: int, config: EngramConfig, eps: float, slot: int) -> None:
        super().__init__()
        self.value = Linear(config.memory_dim, dim)
        self.key = Linear(config.memory_dim, streams * dim)
        self.stream_gain = nn.Parameter(torch.ones(streams, dim))
        self.key_gain = nn.Parameter(torch.ones(streams, dim))
        self.conv = ShortConv(streams, dim, config.conv_kernel, config.dilation) if config.conv_kernel else None
        self.streams, self.hard, self.eps, self.slot = streams, config.gate == "hard", eps, slot

    def forward(self, streams_BTRD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(streams with memory added, gates α [B, T, R])."""
        assert batch.rows is not None, "a model with memory layers needs rows"
        return self.speak(
            streams_BTRD,
            batch.rows.layer(self.slot),
            document_BS=None if batch.document_BT is None else batch.keys_document_BS,
            extend=None if self.conv is None or batch.state is None else batch.state.tails[self.slot].append,
        )

    def speak(
        self, streams_BTRD: Tensor, rows_BTE: Tensor, *, document_BS: Tensor | None = None, extend: Extend | None = None
    ) -> tuple[Tensor, Tensor]:
        """`forward` with all it needs handed to it; `document_BS` and `extend` as in `kernels.engram_gate`."""
        rows_BTE = rows_BTE.to(streams_BTRD.dtype)
        return engram_add(
            streams_BTRD,
            self.key(rows_BTE).unflatten(-1, (self.streams, -1)),
            self.value(rows_BTE),
            self.stream_gain.float() * self.key_gain.float(),
            None if self.conv is None else self.conv(),
            eps=self.eps,
            hard=self.hard,
            document_BS=document_BS,
            extend=extend,
        )
