"""Multi-head latent attention (V3 §2.1.1, Eq 1–11).

    c^KV = rms(W^DKV x)   [C numbers]          k^R = rope(W^KR x)   [K numbers, one head for all]
    q    = W^UQ rms(W^DQ x), or W^Q x          split per head into q^C (no position) and q^R (rotated)
    score = (q^C · W^UK c^KV + q^R · k^R) · scale,   out = W^O Σ softmax(score) · W^UV c^KV

Only c^KV and k^R are remembered: C + K numbers a token and layer. Two forms compute the same numbers. *Naive* expands keys and
values from the latents: right for training and long prefills. *Absorbed* moves W^UK to the query and W^UV to the output and
attends in latent space: right for decoding, where expanding S cached latents for one query would be waste.

Shapes: B batch, T queries, S keys, H heads, C latent, K rotary width, N no-position width, V value width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from byrote.kernels.attention import attend
from byrote.kernels.rotary import assemble_qkv
from byrote.model.batch import Batch
from byrote.model.config import MLAConfig
from byrote.model.linear import Linear
from byrote.model.norm import RMSNorm
from byrote.model.rope import Rotation, rotate, softmax_factor
from byrote.model.state import Track

ABSORB_UP_TO = 16  # queries a call; beyond it expanding the latents is cheaper


class Projected(NamedTuple):
    """The projections of the new tokens, before positions."""

    q_BTY: Tensor  # all heads side by side
    latent_BTC: Tensor
    k_rope_BTK: Tensor
    source_BTQ: Tensor  # what queries are made of: their normed latent, or x itself


class MLA(nn.Module):
    def __init__(self, dim: int, config: MLAConfig, eps: float) -> None:
        super().__init__()
        heads, c = config.num_heads, config
        eps = eps if c.latent_norm_eps is None else c.latent_norm_eps
        self.config, self.num_heads = config, heads
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

    def new_cache(self, batch: int, *, dtype: torch.dtype, device: torch.device, max_rollback: int) -> Track:
        """Latents and rotated rotary keys, C + K numbers a token."""
        return Track(batch, (self.config.kv_lora_rank + self.config.qk_rope_head_dim,), dtype, device)

    def forward(self, x_BTD: Tensor, batch: Batch, cache: Track | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """([B, T, D], no notes). With a cache, its latents are attended too and the new ones appended."""
        return self.attend(self.project(x_BTD), batch, cache), {}

    def project(self, x_BTD: Tensor) -> Projected:
        c = self.config
        source_BTQ = x_BTD if c.q_lora_rank is None else self.q_a_norm(self.q_a(x_BTD))
        q_BTY = self.q(source_BTQ) if c.q_lora_rank is None else self.q_b(source_BTQ)
        latent_BTC, k_rope_BTK = self.kv_a(x_BTD).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        return Projected(q_BTY, self.kv_a_norm(latent_BTC), k_rope_BTK, source_BTQ)

    def attend(self, new: Projected, batch: Batch, cache: Track | None = None) -> Tensor:
        """[B, T, D]: every query looks at all it may see."""
        out_BTHV = self._naive(new, batch) if cache is None else self._cached(new, batch, cache)
        return self.o(out_BTHV.flatten(2))

    def absorb(self, new: Projected, batch: Batch) -> tuple[Tensor, Tensor]:
        """(queries in latent space [B, T, H, X], what is kept of the new tokens [B, T, X]), X = C + K, both rotated."""
        q_nope_BTHN, q_rope_BTHK, kept_BTX = self._turned(new, batch)
        return self._queries_in_latent_space(q_nope_BTHN, q_rope_BTHK), kept_BTX

    def expand(self, out_BTHC: Tensor) -> Tensor:
        """[B, T, D] from what attention in latent space summed."""
        return self.o(self._values(out_BTHC).flatten(2))

    def _turn(self, batch: Batch) -> Rotation:
        return batch.turn(self.config.qk_rope_head_dim, self.config.rope)

    def _turned(self, new: Projected, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Queries without [B, T, H, N] and with position [B, T, H, K], and latents with rotary keys [B, T, C + K]."""
        c, turn = self.config, self._turn(batch)
        q_BTHX = new.q_BTY.unflatten(-1, (c.num_heads, c.qk_head_dim))
        q_nope_BTHN, q_rope_BTHK = q_BTHX.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        q_rope_BTHK, k_rope_BTK = (rotate(part, turn, c.rope.layout) for part in (q_rope_BTHK, new.k_rope_BTK))
        return q_nope_BTHN, q_rope_BTHK, torch.cat((new.latent_BTC, k_rope_BTK), dim=-1)

    def _naive(self, new: Projected, batch: Batch) -> Tensor:
        """[B, T, H, V] without a cache: keys and values of the same tokens, expanded."""
        c, (mask_B1TS, causal) = self.config, batch.mask()
        kv_BTY, turn = self.kv_b(new.latent_BTC), self._turn(batch)
        q_BHTK, k_BHTK, v_BHTV = assemble_qkv(new.q_BTY, kv_BTY, new.k_rope_BTK, *turn, heads=c.num_heads, layout=c.rope.layout)
        return attend(q_BHTK, k_BHTK, v_BHTV, scale=self.scale, mask_B1TS=mask_B1TS, causal=causal).transpose(1, 2)

    def _cached(self, new: Projected, batch: Batch, cache: Track) -> Tensor:
        """[B, T, H, V]: T new tokens look at all that the cache holds after they were added; keys are kept rotated."""
        c = self.config
        q_nope_BTHN, q_rope_BTHK, new_BTX = self._turned(new, batch)
        kept_BSX = cache.append(new_BTX).to(new_BTX.dtype)
        if q_nope_BTHN.shape[1] <= ABSORB_UP_TO:
            return self._absorbed(self._queries_in_latent_space(q_nope_BTHN, q_rope_BTHK), kept_BSX, batch)
        latent_BSC, k_rope_BSK = kept_BSX.split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        return self._expanded(torch.cat((q_nope_BTHN, q_rope_BTHK), dim=-1), latent_BSC, k_rope_BSK, batch)

    def _expanded(self, q_BTHK: Tensor, latent_BSC: Tensor, k_rope_BSK: Tensor, batch: Batch) -> Tensor:
        """The naive form over cached latents, whose rotary keys are rotated already."""
        c, (mask_B1TS, causal) = self.config, batch.mask()
        kv_BSHX = self.kv_b(latent_BSC).unflatten(-1, (c.num_heads, c.qk_nope_head_dim + c.v_head_dim))
        k_nope_BSHN, v_BSHV = kv_BSHX.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)
        k_rope_BSHK = k_rope_BSK[:, :, None].expand(-1, -1, c.num_heads, -1)
        q_BHTK, k_BHSK = q_BTHK.transpose(1, 2), torch.cat((k_nope_BSHN, k_rope_BSHK), dim=-1).transpose(1, 2)
        out_BHTV = attend(q_BHTK, k_BHSK, v_BSHV.transpose(1, 2), scale=self.scale, mask_B1TS=mask_B1TS, causal=causal)
        return out_BHTV.transpose(1, 2)

    def _up(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W^UK [H, N, C] and W^UV [H, V, C]."""
        c = self.config
        up_HXC = self.kv_b.weight.to(dtype).unflatten(0, (c.num_heads, -1))
        up_key_HNC, up_value_HVC = up_HXC.split((c.qk_nope_head_dim, c.v_head_dim), dim=1)
        return up_key_HNC, up_value_HVC

    def _queries_in_latent_space(self, q_nope_BTHN: Tensor, q_rope_BTHK: Tensor) -> Tensor:
        """[B, T, H, C + K]."""
        q_latent_HMC = torch.bmm(q_nope_BTHN.flatten(0, 1).transpose(0, 1), self._up(q_nope_BTHN.dtype)[0])
        return torch.cat((q_latent_HMC.transpose(0, 1).unflatten(0, q_nope_BTHN.shape[:2]), q_rope_BTHK), dim=-1)

    def _values(self, out_BTHC: Tensor) -> Tensor:
        """[B, T, H, V]."""
        out_HMC = out_BTHC.flatten(0, 1).transpose(0, 1)
        out_HMV = torch.bmm(out_HMC, self._up(out_BTHC.dtype)[1].transpose(1, 2))
        return out_HMV.transpose(0, 1).unflatten(0, out_BTHC.shape[:2])

    def _absorbed(self, query_BTHX: Tensor, kept_BSX: Tensor, batch: Batch) -> Tensor:
        """Attention in latent space over X = C + K kept numbers a token; all heads and queries share each product."""
        c = self.config
        scores_BQS = torch.bmm(query_BTHX.flatten(1, 2), kept_BSX.transpose(1, 2))
        scores_BQS = scores_BQS.to(torch.promote_types(scores_BQS.dtype, torch.float32)) * self.scale
        weights_BQS = self._absorbed_softmax(scores_BQS, batch)
        out_BQC = torch.bmm(weights_BQS.to(kept_BSX.dtype), kept_BSX[..., : c.kv_lora_rank])
        return self._values(out_BQC.unflatten(1, query_BTHX.shape[1:3]))

    def _absorbed_softmax(self, scores_BQS: Tensor, batch: Batch) -> Tensor:
        """Softmax over what each query may see; Q = T·H, heads inside. A padding query sees nothing and gets zeros."""
        length, (mask_B1TS, causal) = scores_BQS.shape[1] // self.config.num_heads, batch.mask()
        if causal and length > 1:
            mask_B1TS = torch.ones(length, length, dtype=torch.bool, device=scores_BQS.device).tril()[None, None]
        if mask_B1TS is None:
            return torch.softmax(scores_BQS, dim=-1)
        scores_BTHS = scores_BQS.unflatten(1, (length, self.config.num_heads)).masked_fill(~mask_B1TS.transpose(1, 2), float("-inf"))
        return torch.softmax(scores_BTHS, dim=-1).nan_to_num(0.0).flatten(1, 2)
