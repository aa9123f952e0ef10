"""From a model to the tape of its decoding step: every module appends the operations that stand for it.

A module of another type than the ones below, an injected product (but that of int8 weights), a hook, weights that are not dense fp32 or
int8 in the memory of this machine: each is a ConfigError that names it. Buffers between operations are allocated here, once, for
MOST_ROWS rows.

Shapes: M rows = batch · tokens, D model, R streams, H heads, C latent, K rotary, N no-position and V value width, E experts, F width.
"""

import ctypes
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from byrote.errors import ConfigError
from byrote.kernels import native
from byrote.kernels.decode_step import cpu
from byrote.kernels.decode_step.cpu import MOST_ROWS, Code, Flag
from byrote.model.batch import Batch
from byrote.model.block import Block
from byrote.model.config import DSAConfig, ModelConfig, MoEConfig
from byrote.model.csa import V4Attention
from byrote.model.dsa import DSA
from byrote.model.engram import Engram
from byrote.model.hyper_connection import FreeSite, ManifoldReadOut, ManifoldSite, MeanReadOut, PlainReadOut, PlainSite
from byrote.model.linear import GroupedLinear, Linear
from byrote.model.mla import MLA
from byrote.model.moe import Experts, FeedForward, LocalSort, MoE
from byrote.model.norm import RMSNorm
from byrote.model.quantize import GroupedInt8Matmul, Int8Matmul
from byrote.model.tape_sparse import SparseLatents, WindowBlock, latents_of, size_latents, with_room
from byrote.model.transformer import Model

_SHORT = {torch.float32: "fp32", torch.int8: "int8"}


def write_tape(model: Model) -> "Tape":
    """The tape of a model as it stands. Raises ConfigError for what a tape cannot express."""
    _check(model)
    writer = Writer(model)
    writer.model()
    return Tape(model, writer)


def _check(model: Model) -> None:
    c = model.config
    for layer, latent in latents_of(c).items():
        kind = c.attention_of(layer)
        if latent != next(iter(latents_of(c).values())):
            _refuse(
                f"the attention of block {layer}",
                type(kind).__name__,
                "a tape has one size and rope of latents for all blocks that have some",
            )
        if isinstance(kind, DSAConfig) and kind.index_fp8:
            _refuse(f"the indexer of block {layer}", "rounded to FP8", "a tape computes in fp32")
    if c.residual.streams > cpu.MOST_STREAMS:
        _refuse("residual.num_streams", c.residual.streams, f"a tape takes up to {cpu.MOST_STREAMS}")
    if c.moe is not None and c.moe.top_k > cpu.MOST_CHOSEN:
        _refuse("moe.top_k", c.moe.top_k, f"a tape takes up to {cpu.MOST_CHOSEN}")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            _refuse(f"a forward hook on {name or 'the model'}", "set", "a tape calls none")
    if model.embed.weight.device.type == "cpu" and cpu.library() is None:  # compiled only where it could serve
        _refuse("its C library", "not at hand", str(native.status()["reason"]))


def _refuse(what: str, got: object, allowed: str) -> NoReturn:
    raise ConfigError(f"no captured step for this model: {what} is {got}; {allowed}. The model itself serves instead")


def _expect(module: nn.Module, kind: type[nn.Module]) -> None:
    if type(module) is not kind:
        _refuse(f"a {kind.__name__}", type(module).__name__, "a tape knows byrote's own modules alone")


def scale_of(layer: Linear | GroupedLinear, kind: type[Linear] | type[GroupedLinear] = Linear) -> Tensor | None:
    """The scales of a layer with int8 weights, None of a plain one; any other is refused."""
    _expect(layer, kind)
    if isinstance(layer.matmul, Int8Matmul | GroupedInt8Matmul):
        return layer.matmul.scale_F
    if not layer.is_plain:
        _refuse(f"{kind.__name__}.matmul", repr(layer.matmul), "a tape has the plain product, and that of int8 weights")
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

    expect = staticmethod(_expect)

    def weight(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
        """Its address; the tape keeps it alive."""
        if not (tensor.device.type == "cpu" and tensor.dtype == dtype and tensor.is_contiguous()):
            name = next((name for name, part in self._model.named_parameters() if part is tensor), "a weight")
            gaps = "" if tensor.is_contiguous() else " with gaps"
            _refuse(name, f"{tensor.dtype} on {tensor.device}{gaps}", f"a tape reads dense {_SHORT[dtype]} on the CPU")
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
        _expect(norm, RMSNorm)
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
            _expect(norm, RMSNorm)
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
        _expect(block, Block)
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
        _expect(engram, Engram)
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
            _expect(site, FreeSite)
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
            _expect(module, MeanReadOut)
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
        _expect(attn, MLA)
        query, _ = self.latents(layer, attn, x, norm)
        heads, (out, flags) = self.buffer("heads", attn.config.num_heads * attn.config.v_head_dim), self.result()
        self.op(Code.ATTEND, x=query, y=heads, w=(attn.kv_b.weight,), index=layer)
        self.linear(heads, attn.o, out, flags=flags)

    def latents(self, layer: int, attn: MLA, x: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """(queries, what they are made of, not normed yet); what is kept goes to the cache."""
        _expect(attn, MLA)
        c = attn.config
        kept, query = self.buffer("kept", c.kv_lora_rank + c.qk_rope_head_dim), self.buffer("query", c.num_heads * c.qk_head_dim)
        source = x if c.q_lora_rank is None else self.buffer("low", c.q_lora_rank)
        self.linear(x, *((attn.q, query) if c.q_lora_rank is None else (attn.q_a, source)), norm=norm, sync=False)
        self.linear(x, attn.kv_a, kept, norm=norm)
        if c.q_lora_rank is not None:
            self.linear(source, attn.q_b, query, norm=attn.q_a_norm, sync=False)
        _expect(attn.kv_a_norm, RMSNorm)
        self.op(Code.LATENT, x=kept, w=(attn.kv_a_norm.weight,), index=layer, eps=attn.kv_a_norm.eps)
        scale_of(attn.kv_b)
        return query, source

    def feed_forward(self, ffn: Any, x: Tensor, norm: RMSNorm) -> None:
        _expect(ffn, FeedForward)
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
        _expect(moe, MoE)
        _expect(moe.experts, Experts)
        if type(moe.dispatcher) is not LocalSort:
            _refuse("MoE.dispatcher", type(moe.dispatcher).__name__, "a tape has all experts at hand")
        return moe.config

    def table(self, table_VK: Tensor, num_experts: int) -> int:
        """The address of experts by token id."""
        low, high = (int(end) for end in torch.aminmax(table_VK))
        if table_VK.device.type != "cpu" or table_VK.dtype != torch.int64 or not table_VK.is_contiguous() or low < 0 or high >= num_experts:
            _refuse("a table of experts", f"{low} .. {high} on {table_VK.device}", "a tape needs existing experts, side by side on the CPU")
        self.held.append(table_VK)
        return table_VK.data_ptr()


# ── the tape ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Tape:
    """Operations, what they point to, and the call that runs them."""

    def __init__(self, model: Model, writer: Writer) -> None:
        self._config, self._held = model.config, writer
        self.active_numbers, self.active_bytes = writer.active_numbers, writer.active_bytes
        self._sizes, self._sparse = sizes_of(model.config, writer), writer.sparse
        self._ops = cpu.tape_of(writer.ops)
        self._own_numbers = cpu.own_numbers(writer.longest_row, model.config.moe.top_k if model.config.moe else 0)
        self._own = native.empty((0,), torch.float32)
        engram = model.config.engram
        slots = 0 if engram is None else len(engram.layers)
        self._num_tails = slots if engram is not None and engram.conv_kernel else 0
        self._caches, self._tails = (cpu.Kept * model.config.num_layers)(), (cpu.Tail * slots)()
        self._memory = (ctypes.c_void_p * slots)()

    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(final hidden state [B, T, D], logits [B, T, V]) of a prepared batch, which its state then holds."""
        state, (B, T) = batch.state, batch.tokens_BT.shape
        assert state is not None, "a captured step is one of decoding"
        if self._sparse:
            batch = replace(batch, place_BT=batch.place_BT.contiguous())  # C reads it where it lies
        for layer, cache in enumerate(state.caches):
            self._caches[layer] = self._sparse[layer].prepare(cache, batch) if layer in self._sparse else with_room(cache, T)
        tails = [state.tails[slot] for slot in range(self._num_tails)]
        fresh = [torch.empty_like(tail.values) for tail in tails]
        for slot, (tail, values) in enumerate(zip(tails, fresh, strict=True)):
            self._tails[slot] = cpu.Tail(tail.values.data_ptr(), values.data_ptr(), values.shape[1])
        read = [batch.rows.layer(slot).float().contiguous() for slot in range(len(self._memory))] if batch.rows is not None else []
        self._memory[:] = [rows_BTE.data_ptr() for rows_BTE in read]
        hidden_BTD, logits_BTV = (native.empty((B, T, width), torch.float32) for width in (self._config.dim, self._config.vocab_size))
        self._walk(batch, hidden_BTD, logits_BTV)
        for tail, values in zip(tails, fresh, strict=True):
            tail.values = values
        return hidden_BTD, logits_BTV

    def _walk(self, batch: Batch, hidden_BTD: Tensor, logits_BTV: Tensor) -> None:
        threads, T = native.threads_for(self.active_numbers), batch.tokens_BT.shape[1]
        if self._own.numel() < threads * self._own_numbers:
            self._own = native.empty((threads * self._own_numbers,), torch.float32)
        numbers = (batch.tokens_BT, batch.position_BT, batch.keys_document_BS)
        ids, positions, document = (None if part is None else part.to(torch.int64).contiguous() for part in numbers)
        call = cpu.Call(
            *(threads, *batch.tokens_BT.shape, batch.keys - T),
            *map(native.address, (ids, positions, document)),
            *(ctypes.addressof(array) for array in (self._memory, self._caches, self._tails)),
            *map(native.address, (hidden_BTD, logits_BTV, self._own)),
            self._own_numbers,
        )
        cpu.run(self._sizes, self._ops, call)


def sizes_of(c: ModelConfig, writer: Writer) -> cpu.Sizes:
    m, e, r = c.moe, c.engram, c.residual
    sizes = cpu.Sizes(dim=c.dim, streams=r.streams, vocab=c.vocab_size, sinkhorn_iters=r.sinkhorn_iters, mix_eps=r.eps)
    for a in list(latents_of(c).values())[:1]:  # `_check` has seen that all are the same
        size_latents(sizes, a, writer)
    sizes.limit = float("inf") if c.swiglu_limit is None else c.swiglu_limit
    if m is not None:
        sizes.experts, sizes.top_k, sizes.hidden, sizes.route_scale = m.num_experts, m.top_k, m.expert_hidden, m.route_scale
        sizes.groups, sizes.top_groups = m.num_groups, m.top_groups
        sizes.normalize, sizes.softplus = m.normalize_gate, m.score == "sqrt_softplus"
    if e is not None:
        sizes.taps, sizes.dilation, sizes.hard = e.conv_kernel, e.dilation, e.gate == "hard"
    return sizes
