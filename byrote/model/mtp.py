"""Multi-token prediction (V3 §2.2): module k predicts, at position i, token i + k + 1.

    h'_i = W [ rms(Emb(t_{i+k})) ; rms(h^{k−1}_i) ]      order of the released weights
    h^k  = Block(h'),  logits = head( rms(h^k) )         embedding and head are the model's own

h^0 is the model's hidden state after its final norm, as the serving stacks feed the released module; h^{k} after this module's.

Shapes: B batch, T tokens, D model.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from byrote.kernels.cross_entropy import IGNORE
from byrote.model.batch import Batch
from byrote.model.block import Block, Notes
from byrote.model.config import ModelConfig
from byrote.model.hyper_connection import make_read_out
from byrote.model.linear import Linear
from byrote.model.norm import RMSNorm
from byrote.model.state import Track


class MTPModule(nn.Module):
    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        self.embed_norm = RMSNorm(dim, eps)
        self.hidden_norm = RMSNorm(dim, eps)
        self.project = Linear(2 * dim, dim)
        self.block = Block(config, config.num_layers + depth)
        self.read_out = make_read_out(dim, config.residual, eps)
        self.norm = RMSNorm(dim, eps)
        self.num_streams = config.residual.streams

    def forward(self, hidden_BTD: Tensor, embedded_BTD: Tensor, batch: Batch, cache: Track | None = None) -> tuple[Tensor, Notes]:
        """(normed hidden state [B, T, D], the block's notes). `embedded_BTD`: embedding of the token `depth + 1` places on."""
        joined = torch.cat((self.embed_norm(embedded_BTD), self.hidden_norm(hidden_BTD)), dim=-1)
        x_BTD = self.project(joined)
        streams_BTRD = x_BTD[:, :, None].expand(-1, -1, self.num_streams, -1).contiguous()
        streams_BTRD, notes = self.block(streams_BTRD, batch, cache)
        return self.norm(self.read_out(streams_BTRD)), notes


def tokens_ahead(tokens_BT: Tensor, targets_BT: Tensor, document_BT: Tensor | None, places: int) -> Tensor:
    """The token `places` further on, 0 where the row or the document ends before. A row's last target counts as a token of it.

    Tokens and not targets: a target may be masked (the prompt in fine-tuning), and later positions attend to what stands here.
    """
    length = tokens_BT.shape[1]
    follow = torch.cat((tokens_BT, targets_BT[:, -1:].clamp_min(0)), dim=1)[:, places:]
    ahead_BT = functional.pad(follow, (0, length - follow.shape[1]))
    if document_BT is None:
        return ahead_BT
    later = torch.cat((document_BT, document_BT[:, -1:]), dim=1)[:, places:]
    return ahead_BT * (functional.pad(later, (0, length - later.shape[1]), value=-2) == document_BT)


def shift_targets(targets_BT: Tensor, document_BT: Tensor | None, places: int) -> Tensor:
    """Targets `places` further on; IGNORE where the row or the document ends before."""
    shifted = torch.full_like(targets_BT, IGNORE)
    shifted[:, :-places] = targets_BT[:, places:]
    if document_BT is not None:
        same = torch.zeros_like(shifted, dtype=torch.bool)
        same[:, :-places] = document_BT[:, :-places] == document_BT[:, places:]
        shifted = shifted.masked_fill(~same, IGNORE)
    return shifted
