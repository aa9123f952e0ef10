"""From a model to the tape of its decoding step: every module appends the operations that stand for it.

A module of another type than the ones below, an injected product (but that of int8 weights), a hook, weights that are not dense fp32 or
int8 in the memory of this machine: each is a ConfigError that names it. Buffers between operations are allocated here, once, for
MOST_ROWS rows.

Shapes: M rows = batch · tokens, D model, R streams, H heads, C latent, K rotary, N no-position and V value width, E experts, F width.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from byrote.errors import ConfigError
from byrote.kernels import native
from byrote.kernels.decode_step import cpu
from byrote.kernels.decode_step.cpu import MOST_ROWS, Code, Flag
from byrote.model.block import Block
from byrote.model.config import MoEConfig
from byrote.model.csa import V4Attention
from byrote.model.dsa import DSA
from byrote.model.engram import Engram
from byrote.model.hyper_connection import FreeSite, ManifoldReadOut, ManifoldSite, MeanReadOut, PlainReadOut, PlainSite
from byrote.model.linear import GroupedLinear, Linear
from byrote.model.mla import MLA
from byrote.model.moe import Experts, FeedForward, LocalSort, MoE
from byrote.model.norm import RMSNorm
from byrote.model.quantize import GroupedInt8Matmul, Int8Matmul
from byrote.model.tape_sparse import SparseLatents, WindowBlock, latents_of
from byrote.model.transformer import Model

_SHORT = {torch.float32: "fp32", torch.int8: "int8"}


def refuse(what: str, got: object, allowed: str) -> NoReturn:
    raise ConfigError(f"no captured step for this model: {what} is {got}; {allowed}. The model itself serves instead")


def expect(module: nn.Module, kind: type[nn.Module]) -> None:
    if type(module) is not kind:
        refuse(f"a {kind.__name__}", type(module).__name__, "a tape knows byrote's own modules alone")


def scale_of(layer: Linear | GroupedLinear, kind: type[Linear] | type[GroupedLinear] = Linear) -> Tensor | None:
    """The scales of a layer with int8 weights, None of a plain one; any other is refused."""
    expect(layer, kind)
    if isinstance(layer.matmul, Int8Matmul | GroupedInt8Matmul):
        return layer.matmul.scale_F
    if not layer.is_plain:
        refuse(f"{kind.__name__}.matmul", repr(layer.matmul), "a tape has the plain product, and that of int8 weights")
    return None


class Writer:
    """Collects operations and the tensors they point to."""

    def __init__(self, model: Model) -> None:
        self.config, self._model = model.config, model
        self.ops: list[cpu.Op] = []
        self.held: list[Tensor] = []
        self.longest_row = self.active_numbers = self.active_bytes = 0  # widest row that is normed; weights that one row reads
        self.sparse: dict[int, SparseLatents | WindowBlock] = {}  # blocks that prepare their own caches
        self._buffers: dict[str, Tensor] = {}
        self._made: dict[Hashable, Any] = {}
        self.streams = self.buffer("streams", model.config.residual.streams * model.config.dim)

    # ── operations ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def buffer(self, name: str, width: int) -> Tensor:
        """Room for MOST_ROWS rows of `width` numbers, shared by all layers that ask for it by this name and width."""
        key = f"{name} {width}"
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(MOST_ROWS, width, dtype=torch.float32, device="cpu")
        return self._buffers[key]

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once a tape."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    expect = staticmethod(expect)  # for `tape_sparse`, which this module imports

    def weight(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
        """Its address; the tape keeps it alive."""
        if not (tensor.device.type == "cpu" and tensor.dtype == dtype and tensor.is_contiguous()):
            name = next((name for name, part in self._model.named_parameters() if part is tensor), "a weight")
            gaps = "" if tensor.is_contiguous() else " with gaps"
            refuse(name, f"{tensor.dtype} on {tensor.device}{gaps}", f"a tape reads dense {_SHORT[dtype]} on the CPU")
        self.held.append(tensor.detach())  # its memory stays, whatever becomes of the parameter
        return tensor.data_ptr()

    def op(
        self,
        code: Code,
        *,
        x: Tensor | None = None,
        y: Tensor | None = None,
        w: Sequence[Tensor | None] = (),
        scale: Tensor | None = None,
        sync: bool = True,
        index: int = 0,
        width: int = 0,
        outputs: int = 0,
        flags: int = 0,
        eps: float = 0.0,
    ) -> None:
        """Append one; fields and their meaning: kernels/decode_step. With `scale`, of the int8 weight w[0], which becomes w[2]."""
        entry = cpu.Op(code, sync, index, width, outputs, flags, eps, x=native.address(x), y=native.address(y))
        for place, tensor in enumerate(w):
            if tensor is not None:
                entry.w[place] = self.weight(tensor, torch.int8 if place == 0 and scale is not None else torch.float32)
        if scale is not None:
            entry.w[2] = self.weight(scale)
        self.longest_row = max(self.longest_row, width)
        self.ops.append(entry)

    def gain(self, norm: RMSNorm) -> Tensor:
        expect(norm, RMSNorm)
        return norm.weight

    def linear(
        self,
        x: Tensor | None,
        layer: Linear,
        y: Tensor | None,
        *,
        norm: RMSNorm | None = None,
        flags: int = 0,
        sync: bool = True,
        index: int = 0,
    ) -> None:
        scale = scale_of(layer)
        self.product(x, layer.weight, y, scale=scale, norm=norm, flags=flags, sync=sync, index=index)

    def product(
        self,
        x: Tensor | None,
        weight_FD: Tensor,
        y: Tensor | None,
        *,
        scale: Tensor | None = None,
        norm: RMSNorm | None = None,
        flags: int = 0,
        sync: bool = True,
        index: int = 0,
        eps: float = 0.0,
    ) -> None:
        """y = x Wᵀ, of the normed x where there is a norm; with `scale` W is int8."""
        gain = None
        if norm is not None:
            expect(norm, RMSNorm)
            flags, gain, eps = flags | Flag.NORMED, norm.weight, norm.eps
        outputs, width = weight_FD.shape
        self.reads(weight_FD, scale)
        outputs = outputs // 2 if flags & Flag.GATES else outputs
        self.op(
            Code.LINEAR,
            x=x,
            y=y,
            w=(weight_FD, gain),
            scale=scale,
            sync=sync,
            index=index,
            width=width,
            outputs=outputs,
            flags=flags,
            eps=eps,
        )

    def reads(self, *tensors: Tensor | None, share: float = 1.0) -> None:
        """Count what one row reads of weights."""
        for tensor in (tensor for tensor in tensors if tensor is not None):
            self.active_numbers += round(share * tensor.numel())
            self.active_bytes += round(share * tensor.numel()) * tensor.element_size()

    # ── the model, top to bottom ───────────────────────────────────────────────────────────────────────────────────────────────

    def model(self) -> None:
        model, dim = self._model, self.config.dim
        turns = bool(latents_of(self.config))
        self.op(Code.EMBED, y=self.streams, w=(model.embed.weight,), sync=not turns)
        if turns:
            self.op(Code.TURN)
        for layer, block in enumerate(model.blocks):
            self.block(layer, block)
        x = self.read_out(model.read_out)
        self.op(Code.NORM, x=x, w=(model.norm.weight,), width=dim, eps=model.norm.eps)
        self.linear(None, model.head, None)

    def block(self, layer: int, block: Any) -> None:
        expect(block, Block)
        if block.engram is not None:
            self.memory(block.engram)
        x = self.enter(block.attn_site)
        self.attention(layer, block.attn, x, block.attn_norm)
        self.leave(block.attn_site)
        x = self.enter(block.ffn_site)
        feed = self.experts if isinstance(block.ffn, MoE) else self.feed_forward
        feed(block.ffn, x, block.ffn_norm)
        self.leave(block.ffn_site)

    def memory(self, engram: Engram) -> None:
        expect(engram, Engram)
        R, D = engram.stream_gain.shape
        value, keys = self.buffer("value", D), self.buffer("keys", R * D)
        self.linear(None, engram.value, value, flags=Flag.FROM_MEMORY, index=engram.slot, sync=False)
        self.linear(None, engram.key, keys, flags=Flag.FROM_MEMORY, index=engram.slot)
        conv = () if engram.conv is None else (engram.conv.weight, engram.conv.gain)
        w = (keys, engram.stream_gain, engram.key_gain, *conv)
        self.op(Code.MEMORY, x=value, y=self.streams, w=w, index=engram.slot, eps=engram.eps)

    # ── residual streams ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def enter(self, site: Any) -> Tensor:
        """What the sub-layer reads."""
        if type(site) is PlainSite:
            return self.streams
        x = self.buffer("x", self.config.dim)
        if type(site) is ManifoldSite:
            self.manifold(site, x)
        else:
            expect(site, FreeSite)
            w = (site.theta_pre, site.theta_post, site.theta_res, site.base_pre, site.base_post, site.base_res, site.scale)
            self.op(Code.FREE_ENTER, x=self.streams, y=x, w=w, eps=site.norm_eps)
        return x

    def manifold(self, site: ManifoldSite | ManifoldReadOut, x: Tensor) -> None:
        z = self.buffer("z", site.fn.shape[0])
        self.product(self.streams, site.fn, z, flags=Flag.NORMED, eps=site.norm_eps)
        self.op(Code.MANIFOLD_ENTER, x=z, y=x, w=(site.base, site.scale, self.streams), outputs=site.fn.shape[0])

    def leave(self, site: Any) -> None:
        if type(site) is not PlainSite:
            self.op(Code.LEAVE, x=self.result()[0], y=self.streams)

    def result(self) -> tuple[Tensor, int]:
        """Where a sub-layer writes, and whether it adds: the plain residual is the stream itself."""
        plain = self.config.residual.kind == "plain"
        return (self.streams, Flag.ADDS) if plain else (self.buffer("y", self.config.dim), Flag(0))

    def read_out(self, module: Any) -> Tensor:
        if type(module) is PlainReadOut:
            return self.streams
        x = self.buffer("x", self.config.dim)
        if type(module) is ManifoldReadOut:
            self.manifold(module, x)
        else:
            expect(module, MeanReadOut)
            self.op(Code.MEAN, x=self.streams, y=x)
        return x

    # ── sub-layers ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def attention(self, layer: int, attn: Any, x: Tensor, norm: RMSNorm) -> None:
        if type(attn) is V4Attention:
            self.sparse[layer] = WindowBlock(self, attn, x, norm)
        elif type(attn) is DSA:
            self.sparse[layer] = SparseLatents(self, layer, attn, x, norm)
        else:
            self.latent_attention(layer, attn, x, norm)

    def latent_attention(self, layer: int, attn: Any, x: Tensor, norm: RMSNorm) -> None:
        expect(attn, MLA)
        query, _ = self.latents(layer, attn, x, norm)
        heads, (out, flags) = self.buffer("heads", attn.config.num_heads * attn.config.v_head_dim), self.result()
        self.op(Code.ATTEND, x=query, y=heads, w=(attn.kv_b.weight,), index=layer)
        self.linear(heads, attn.o, out, flags=flags)

    def latents(self, layer: int, attn: MLA, x: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """(queries, what they are made of, not normed yet); what is kept goes to the cache."""
        expect(attn, MLA)
        c = attn.config
        kept, query = self.buffer("kept", c.kv_lora_rank + c.qk_rope_head_dim), self.buffer("query", c.num_heads * c.qk_head_dim)
        source = x if c.q_lora_rank is None else self.buffer("low", c.q_lora_rank)
        self.linear(x, *((attn.q, query) if c.q_lora_rank is None else (attn.q_a, source)), norm=norm, sync=False)
        self.linear(x, attn.kv_a, kept, norm=norm)
        if c.q_lora_rank is not None:
            self.linear(source, attn.q_b, query, norm=attn.q_a_norm, sync=False)
        expect(attn.kv_a_norm, RMSNorm)
        self.op(Code.LATENT, x=kept, w=(attn.kv_a_norm.weight,), index=layer, eps=attn.kv_a_norm.eps)
        scale_of(attn.kv_b)  # for its refusals alone: `weight` takes no int8 here
        return query, source

    def feed_forward(self, ffn: Any, x: Tensor, norm: RMSNorm) -> None:
        expect(ffn, FeedForward)
        hidden, (out, flags) = self.buffer("hidden", ffn.down.weight.shape[1]), self.result()
        self.linear(x, ffn.gate_up, hidden, norm=norm, flags=Flag.GATES)
        self.linear(hidden, ffn.down, out, flags=flags)

    def experts(self, moe: Any, x: Tensor, norm: RMSNorm) -> None:
        c, (out, flags) = self.check_experts(moe), self.result()
        logits, hidden = self.buffer("logits", c.num_experts), self.buffer("chosen", c.top_k * c.expert_hidden)
        self.product(x, moe.router, logits, norm=norm, sync=moe.shared is None)
        if moe.shared is not None:
            between = self.buffer("hidden", moe.shared.down.weight.shape[1])
            self.linear(x, moe.shared.gate_up, between, norm=norm, flags=Flag.GATES)
        self.op(Code.ROUTE, x=logits, w=(moe.bias,), sync=False)
        if moe.table_VK is not None:
            self.ops[-1].w[1] = self.table(moe.table_VK, c.num_experts)
        up, down = ((part.weight, scale_of(part, GroupedLinear)) for part in (moe.experts.gate_up, moe.experts.down))
        self.op(Code.EXPERTS_UP, x=x, y=hidden, w=(up[0], norm.weight), scale=up[1], width=self.config.dim, eps=norm.eps)
        if moe.shared is not None:
            self.linear(between, moe.shared.down, out, flags=flags, sync=False)
            flags = Flag.ADDS
        self.op(Code.EXPERTS_DOWN, x=hidden, y=out, w=(down[0],), scale=down[1], outputs=self.config.dim, flags=flags)
        self.reads(*up, *down, share=c.top_k / c.num_experts)

    def check_experts(self, moe: MoE) -> MoEConfig:
        expect(moe, MoE)
        expect(moe.experts, Experts)
        if type(moe.dispatcher) is not LocalSort:
            refuse("MoE.dispatcher", type(moe.dispatcher).__name__, "a tape has all experts at hand")
        return moe.config

    def table(self, table_VK: Tensor, num_experts: int) -> int:
        """The address of experts by token id."""
        low, high = (int(end) for end in torch.aminmax(table_VK))
        if table_VK.device.type != "cpu" or table_VK.dtype != torch.int64 or not table_VK.is_contiguous() or low < 0 or high >= num_experts:
            refuse("a table of experts", f"{low} .. {high} on {table_VK.device}", "a tape needs existing experts, side by side on the CPU")
        self.held.append(table_VK)
        return table_VK.data_ptr()
