"""Multi-head latent attention (V3 §2.1.1, Eq 1–11).

    c^KV = rms(W^DKV x)   [C numbers]          k^R = rope(W^KR x)   [K numbers, one head for all]
    q    = W^UQ rms(W^DQ x), or W^Q x          split per head into q^C (no position) and q^R (rotated)
    score = (q^C · W^UK c^KV + q^R · k^R) · scale,   out = W^O Σ softmax(score) · W^UV c^KV

Only c^KV and k^R are remembered: C + K numbers a token and layer. Two forms compute the same numbers. *Naive* expands keys and
values from the latents: right for training and long prefills. *Absorbed* moves W^UK to the query and W^UV to the output and
attends in latent space: right for decoding, where expanding S cached latents for one query would be waste.

Shapes: B batch, T queries, S keys, H heads, C latent, K rotary width, N no-position width, V value width.
"""

from functools import partial

import torch
from torch import Tensor, nn

from byrote.kernels.attention import attend
from byrote.kernels.rotary import assemble_qkv
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
        c = self.config
        q_BTX = self.q(x_BTD) if c.q_lora_rank is None else self.q_b(self.q_a_norm(self.q_a(x_BTD)))
        latent_BTC, k_rope_BTK = self.kv_a(x_BTD).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        attention = self._naive if cache is None else partial(self._cached, cache)
        return self.o(attention(q_BTX, self.kv_a_norm(latent_BTC), k_rope_BTK, batch).flatten(2))

    def _naive(self, q_BTX: Tensor, latent_BTC: Tensor, k_rope_BTK: Tensor, batch: Batch) -> Tensor:
        """[B, T, H, V] without a cache: keys and values of the same tokens, expanded."""
        c = self.config
        kv_BTY = self.kv_b(latent_BTC)
        q_BHTK, k_BHTK, v_BHTV = assemble_qkv(q_BTX, kv_BTY, k_rope_BTK, *batch.turn, heads=c.num_heads, layout=c.rope.layout)
        return attend(q_BHTK, k_BHTK, v_BHTV, scale=self.scale, mask_B1TS=batch.mask_B1TS, causal=batch.causal).transpose(1, 2)

    def _cached(self, cache: Track, q_BTX: Tensor, latent_BTC: Tensor, k_rope_BTK: Tensor, batch: Batch) -> Tensor:
        """[B, T, H, V]: T new tokens look at all that the cache holds after they were added; keys are kept rotated."""
        c = self.config
        q_nope_BTHN, q_rope_BTHK = q_BTX.unflatten(-1, (c.num_heads, c.qk_head_dim)).split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        q_rope_BTHK = rotate(q_rope_BTHK, batch.turn, c.rope.layout)
        k_rope_BTK = rotate(k_rope_BTK, batch.turn, c.rope.layout)
        kept_BSC = cache.append(torch.cat((latent_BTC, k_rope_BTK), dim=-1)).to(latent_BTC.dtype)
        if q_BTX.shape[1] <= ABSORB_UP_TO:
            return self._absorbed(q_nope_BTHN, q_rope_BTHK, kept_BSC, batch)
        latent_BSC, k_rope_BSK = kept_BSC.split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        return self._expanded(torch.cat((q_nope_BTHN, q_rope_BTHK), dim=-1), latent_BSC, k_rope_BSK, batch)

    def _expanded(self, q_BTHK: Tensor, latent_BSC: Tensor, k_rope_BSK: Tensor, batch: Batch) -> Tensor:
        """The naive form over cached latents, whose rotary keys are rotated already."""
        c = self.config
        kv_BSHX = self.kv_b(latent_BSC).unflatten(-1, (c.num_heads, c.qk_nope_head_dim + c.v_head_dim))
        k_nope_BSHN, v_BSHV = kv_BSHX.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)
        k_rope_BSHK = k_rope_BSK[:, :, None].expand(-1, -1, c.num_heads, -1)
        q_BHTK, k_BHSK = q_BTHK.transpose(1, 2), torch.cat((k_nope_BSHN, k_rope_BSHK), dim=-1).transpose(1, 2)
        out_BHTV = attend(q_BHTK, k_BHSK, v_BSHV.transpose(1, 2), scale=self.scale, mask_B1TS=batch.mask_B1TS, causal=batch.causal)
        return out_BHTV.transpose(1, 2)

    def _absorbed(self, q_nope_BTHN: Tensor, q_rope_BTHK: Tensor, kept_BSX: Tensor, batch: Batch) -> Tensor:
        """Attention in latent space over X = C + K kept numbers a token; all heads and queries share each product."""
        c, shape = self.config, q_nope_BTHN.shape[:2]
        up_HXC = self.kv_b.weight.to(q_nope_BTHN.dtype).unflatten(0, (c.num_heads, -1))
        up_key_HNC, up_value_HVC = up_HXC.split((c.qk_nope_head_dim, c.v_head_dim), dim=1)
        q_latent_HMC = torch.bmm(q_nope_BTHN.flatten(0, 1).transpose(0, 1), up_key_HNC)
        query_BTHX = torch.cat((q_latent_HMC.transpose(0, 1).unflatten(0, shape), q_rope_BTHK), dim=-1)
        scores_BQS = torch.bmm(query_BTHX.flatten(1, 2), kept_BSX.transpose(1, 2))
        scores_BQS = scores_BQS.to(torch.promote_types(scores_BQS.dtype, torch.float32)) * self.scale
        weights_BQS = self._absorbed_softmax(scores_BQS, batch)
        out_BQC = torch.bmm(weights_BQS.to(kept_BSX.dtype), kept_BSX[..., : c.kv_lora_rank])
        out_HMC = out_BQC.view(-1, c.num_heads, c.kv_lora_rank).transpose(0, 1)
        return torch.bmm(out_HMC, up_value_HVC.transpose(1, 2)).transpose(0, 1).unflatten(0, shape)

    def _absorbed_softmax(self, scores_BQS: Tensor, batch: Batch) -> Tensor:
        """Softmax over what each query may see; Q = T·H, heads inside. A padding query sees nothing and gets zeros."""
        length, mask_B1TS = scores_BQS.shape[1] // self.config.num_heads, batch.mask_B1TS
        if batch.causal and length > 1:
            mask_B1TS = torch.ones(length, length, dtype=torch.bool, device=scores_BQS.device).tril()[None, None]
        if mask_B1TS is None:
            return torch.softmax(scores_BQS, dim=-1)
        scores_BTHS = scores_BQS.unflatten(1, (length, self.config.num_heads)).masked_fill(~mask_B1TS.transpose(1, 2), float("-inf"))
        return torch.softmax(scores_BTHS, dim=-1).nan_to_num(0.0).flatten(1, 2)
