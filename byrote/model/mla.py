"""Multi-head latent attention (V3 §2.1.1, Eq 1–11).

    c^KV = rms(W^DKV x)   [C numbers]          k^R = rope(W^KR x)   [K numbers, one head for all]
    q    = W^UQ rms(W^DQ x), or W^Q x          split per head into q^C (no position) and q^R (rotated)
    score = (q^C · W^UK c^KV + q^R · k^R) · scale,   out = W^O Σ softmax(score) · W^UV c^KV

Only c^KV and k^R are remembered: C + K numbers a token and layer. Two forms compute the same numbers. *Naive* expands keys and
values from the latents: right for training and long prefills. *Absorbed* moves W^UK to the query and W^UV to the output and
attends in latent space: right for decoding, where expanding S cached latents for one query would be waste.

Shapes: B batch, T queries, S keys, H heads, C latent, K rotary width, N no-position width, V value width.
"""

import torch
from torch import Tensor, nn

from byrote.kernels.attention import attend
from byrote.model.batch import Batch
from byrote.model.config import MLAConfig
from byrote.model.linear import Linear
from byrote.model.norm import RMSNorm
from byrote.model.rope import rotate, softmax_factor
from byrote.model.state import Track

ABSORB_UP_TO = 16  # queries a call; beyond it expanding the latents is cheaper


class MLA(nn.Module):
    def __init__(self, dim: int, config: MLAConfig, eps: float) -> None:
        super().__init__()
        heads, c = config.num_heads, config
        eps = eps if c.latent_norm_eps is None else c.latent_norm_eps
        self.config = config
        self.scale = c.qk_head_dim**-0.5 * softmax_factor(c.rope.yarn)
        if c.q_lora_rank is None:
            self.q = Linear(dim, heads * c.qk_head_dim)
        else:
            self.q_a = Linear(dim, c.q_lora_rank)
            self.q_a_norm = RMSNorm(c.q_lora_rank, eps)
            self.q_b = Linear(c.q_lora_rank, heads * c.qk_head_dim)
        self.kv_a = Linear(dim, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_norm = RMSNorm(c.kv_lora_rank, eps)
        self.kv_b = Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o = Linear(heads * c.v_head_dim, dim)

    def forward(self, x_BTD: Tensor, batch: Batch, cache: Track | None = None) -> Tensor:
        """[B, T, D]. With a cache, its latents are attended too and the new ones appended."""
        q_nope_BTHN, q_rope_BTHK = self._query(x_BTD, batch)
        latent_BTC, k_rope_BTK = self._compress(x_BTD, batch)
        if cache is not None:
            kept_BSC = cache.append(torch.cat((latent_BTC, k_rope_BTK), dim=-1)).to(latent_BTC.dtype)
            latent_BTC, k_rope_BTK = kept_BSC.split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), dim=-1)
        absorb = cache is not None and x_BTD.shape[1] <= ABSORB_UP_TO
        attention = self._absorbed if absorb else self._naive
        return self.o(attention(q_nope_BTHN, q_rope_BTHK, latent_BTC, k_rope_BTK, batch).flatten(2))

    def _query(self, x_BTD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        c = self.config
        q = self.q(x_BTD) if c.q_lora_rank is None else self.q_b(self.q_a_norm(self.q_a(x_BTD)))
        q_nope_BTHN, q_rope_BTHK = q.unflatten(-1, (c.num_heads, c.qk_head_dim)).split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        return q_nope_BTHN, rotate(q_rope_BTHK, batch.turn, c.rope.layout)

    def _compress(self, x_BTD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        c = self.config
        latent_BTC, k_rope_BTK = self.kv_a(x_BTD).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        return self.kv_a_norm(latent_BTC), rotate(k_rope_BTK, batch.turn, c.rope.layout)

    def _naive(self, q_nope_BTHN: Tensor, q_rope_BTHK: Tensor, latent_BSC: Tensor, k_rope_BSK: Tensor, batch: Batch) -> Tensor:
        c = self.config
        kv_BSHX = self.kv_b(latent_BSC).unflatten(-1, (c.num_heads, c.qk_nope_head_dim + c.v_head_dim))
        k_nope_BSHN, v_BSHV = kv_BSHX.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)
        k_rope_BSHK = k_rope_BSK[:, :, None].expand(-1, -1, c.num_heads, -1)
        q_BHTK = torch.cat((q_nope_BTHN, q_rope_BTHK), dim=-1).transpose(1, 2)
        k_BHSK = torch.cat((k_nope_BSHN, k_rope_BSHK), dim=-1).transpose(1, 2)
        out_BHTV = attend(q_BHTK, k_BHSK, v_BSHV.transpose(1, 2), scale=self.scale, mask_B1TS=batch.mask_B1TS, causal=batch.causal)
        return out_BHTV.transpose(1, 2)

    def _absorbed(self, q_nope_BTHN: Tensor, q_rope_BTHK: Tensor, latent_BSC: Tensor, k_rope_BSK: Tensor, batch: Batch) -> Tensor:
        up_HXC = self.kv_b.weight.to(q_nope_BTHN.dtype).unflatten(0, (self.config.num_heads, -1))
        up_key_HNC, up_value_HVC = up_HXC.split((self.config.qk_nope_head_dim, self.config.v_head_dim), dim=1)
        q_latent_BTHC = torch.einsum("bthn,hnc->bthc", q_nope_BTHN, up_key_HNC)
        scores_BTHS = torch.einsum("bthc,bsc->bths", q_latent_BTHC, latent_BSC) + torch.einsum("bthk,bsk->bths", q_rope_BTHK, k_rope_BSK)
        scores_BTHS = scores_BTHS.float() * self.scale
        mask_B1TS = batch.mask_B1TS
        if batch.causal and scores_BTHS.shape[1] > 1:
            length = scores_BTHS.shape[1]
            mask_B1TS = torch.ones(length, length, dtype=torch.bool, device=scores_BTHS.device).tril()[None, None]
        if mask_B1TS is not None:
            scores_BTHS = scores_BTHS.masked_fill(~mask_B1TS.transpose(1, 2), float("-inf"))
        weights_BTHS = torch.softmax(scores_BTHS, dim=-1)
        if batch.document_BT is not None:
            weights_BTHS = weights_BTHS.nan_to_num(0.0)  # a padding query sees nothing
        out_BTHC = torch.einsum("bths,bsc->bthc", weights_BTHS.to(latent_BSC.dtype), latent_BSC)
        return torch.einsum("bthc,hvc->bthv", out_BTHC, up_value_HVC)
