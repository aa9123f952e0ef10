"""From a model to the tape of its decoding step: every module appends the operations that stand for it.

A module of another type than the ones below, an injected product, a hook, weights that are not dense fp32 in the memory of this
machine: each is a ConfigError that names it. Buffers between operations are allocated here, once, for MOST_ROWS rows.

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
from byrote.model.config import DSAConfig, MLAConfig, ModelConfig, MoEConfig
from byrote.model.csa import V4Attention
from byrote.model.dsa import DSA
from byrote.model.engram import Engram
from byrote.model.hyper_connection import FreeSite, ManifoldReadOut, ManifoldSite, MeanReadOut, PlainReadOut, PlainSite
from byrote.model.linear import GroupedLinear, Linear
from byrote.model.mla import MLA
from byrote.model.moe import Experts, FeedForward, LocalSort, MoE
from byrote.model.norm import RMSNorm
from byrote.model.rope import amplitude, frequencies, softmax_factor
from byrote.model.state import Track
from byrote.model.tape_sparse import SparseLatents, WindowBlock, rows_of
from byrote.model.transformer import Model


def write_tape(model: Model) -> "Tape":
    """The tape of a model as it stands. Raises ConfigError for what a tape cannot express."""
    _check(model)
    writer = _Writer(model)
    writer.model()
    return Tape(model, writer)


def _check(model: Model) -> None:
    c = model.config
    for layer, latent in _latents_of(c).items():
        kind = c.attention_of(layer)
        if latent != next(iter(_latents_of(c).values())):
            _refuse(f"the attention of block {layer}", type(kind).__name__, "a tape has one size and rope of latents for all blocks that have some")
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


def _latents_of(c: ModelConfig) -> dict[int, MLAConfig]:
    """The latent attention of every block that has one."""
    kinds = {layer: c.attention_of(layer) for layer in range(c.num_layers)}
    kinds |= {layer: kind.mla for layer, kind in kinds.items() if isinstance(kind, DSAConfig)}
    return {layer: kind for layer, kind in kinds.items() if isinstance(kind, MLAConfig)}


def _refuse(what: str, got: object, allowed: str) -> NoReturn:
    raise ConfigError(f"no captured step for this model: {what} is {got}; {allowed}. The model itself serves instead")


def _expect(module: nn.Module, kind: type[nn.Module]) -> None:
    if type(module) is not kind:
        _refuse(f"a {kind.__name__}", type(module).__name__, "a tape knows byrote's own modules alone")


def _check_linear(layer: Linear) -> None:
    _expect(layer, Linear)
    if not layer.is_plain:
        _refuse("Linear.matmul", repr(layer.matmul), "a tape has PyTorch's product alone")


class _Writer:
    """Collects operations and the tensors they point to."""

    def __init__(self, model: Model) -> None:
        self.config, self._model = model.config, model
        self.ops: list[cpu.Op] = []
        self.held: list[Tensor] = []
        self.longest_row = self.active_numbers = 0  # widest row that is normed; weights that one row reads
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

    def expect(self, module: nn.Module, kind: type[nn.Module]) -> None:
        """Refuse a module of any other type."""
        _expect(module, kind)

    def weight(self, tensor: Tensor) -> int:
        """Its address; the tape keeps it alive."""
        if not (tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()):
            name = next((name for name, part in self._model.named_parameters() if part is tensor), "a weight")
            gaps = "" if tensor.is_contiguous() else " with gaps"
            _refuse(name, f"{tensor.dtype} on {tensor.device}{gaps}", "a tape reads dense fp32 on the CPU")
        self.held.append(tensor.detach())  # its memory stays, whatever becomes of the parameter
        return tensor.data_ptr()

    def op(
        self,
        code: Code,
        *,
        x: Tensor | None = None,
        y: Tensor | None = None,
        w: Sequence[Tensor | None] = (),
        sync: bool = True,
        index: int = 0,
        width: int = 0,
        outputs: int = 0,
        flags: int = 0,
        eps: float = 0.0,
    ) -> None:
        """Append one; fields and their meaning: kernels/decode_step."""
        entry = cpu.Op(code, sync, index, width, outputs, flags, eps, x=native.address(x), y=native.address(y))
        entry.w[: len(w)] = [None if tensor is None else self.weight(tensor) for tensor in w]
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
        _check_linear(layer)
        self.product(x, layer.weight, y, norm=norm, flags=flags, sync=sync, index=index)

    def product(
        self,
        x: Tensor | None,
        weight_FD: Tensor,
        y: Tensor | None,
        *,
        norm: RMSNorm | None = None,
        flags: int = 0,
        sync: bool = True,
        index: int = 0,
        eps: float = 0.0,
    ) -> None:
        """y = x Wᵀ, of the normed x where there is a norm."""
        gain = None
        if norm is not None:
            _expect(norm, RMSNorm)
            flags, gain, eps = flags | Flag.NORMED, norm.weight, norm.eps
        outputs, width = weight_FD.shape
        self.active_numbers += weight_FD.numel()
        outputs = outputs // 2 if flags & Flag.GATES else outputs
        self.op(Code.LINEAR, x=x, y=y, w=(weight_FD, gain), sync=sync, index=index, width=width, outputs=outputs, flags=flags, eps=eps)

    # ── the model, top to bottom ───────────────────────────────────────────────────────────────────────────────────────────────

    def model(self) -> None:
        model, dim = self._model, self.config.dim
        turns = bool(_latents_of(self.config))
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
        _check_linear(attn.kv_b)
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
        up, down = moe.experts.gate_up.weight, moe.experts.down.weight
        self.op(Code.EXPERTS_UP, x=x, y=hidden, w=(up, norm.weight), width=self.config.dim, eps=norm.eps)
        if moe.shared is not None:
            self.linear(between, moe.shared.down, out, flags=flags, sync=False)
            flags = Flag.ADDS
        self.op(Code.EXPERTS_DOWN, x=hidden, y=out, w=(down,), outputs=self.config.dim, flags=flags)
        self.active_numbers += (up.numel() + down.numel()) // c.num_experts * c.top_k

    def check_experts(self, moe: MoE) -> MoEConfig:
        _expect(moe, MoE)
        _expect(moe.experts, Experts)
        for part in (moe.experts.gate_up, moe.experts.down):
            _expect(part, GroupedLinear)
            if not part.is_plain:
                _refuse("GroupedLinear.matmul", repr(part.matmul), "a tape has the plain product alone")
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

    def __init__(self, model: Model, writer: _Writer) -> None:
        self._config, self._held, self.active_numbers = model.config, writer, writer.active_numbers
        self._sizes, self._sparse = _sizes(model.config, writer), writer.sparse
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
            self._caches[layer] = self._sparse[layer].prepare(cache, batch) if layer in self._sparse else _with_room(cache, T)
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


def _with_room(cache: Track, tokens: int) -> cpu.Kept:
    cache.extend(tokens)
    return rows_of(cache)


def _sizes(c: ModelConfig, writer: _Writer) -> cpu.Sizes:
    m, e, r = c.moe, c.engram, c.residual
    sizes = cpu.Sizes(dim=c.dim, streams=r.streams, vocab=c.vocab_size, sinkhorn_iters=r.sinkhorn_iters, mix_eps=r.eps)
    for a in list(_latents_of(c).values())[:1]:  # `_check` has seen that all are the same
        _size_latents(sizes, a, writer)
    sizes.limit = float("inf") if c.swiglu_limit is None else c.swiglu_limit
    if m is not None:
        sizes.experts, sizes.top_k, sizes.hidden, sizes.route_scale = m.num_experts, m.top_k, m.expert_hidden, m.route_scale
        sizes.groups, sizes.top_groups = m.num_groups, m.top_groups
        sizes.normalize, sizes.softplus = m.normalize_gate, m.score == "sqrt_softplus"
    if e is not None:
        sizes.taps, sizes.dilation, sizes.hard = e.conv_kernel, e.dilation, e.gate == "hard"
    return sizes


def _size_latents(sizes: cpu.Sizes, a: MLAConfig, writer: _Writer) -> None:
    frequencies_K = frequencies(a.qk_rope_head_dim, a.rope)
    sizes.heads, sizes.latent, sizes.rope = a.num_heads, a.kv_lora_rank, a.qk_rope_head_dim
    sizes.nope, sizes.value, sizes.half = a.qk_nope_head_dim, a.v_head_dim, a.rope.layout == "half"
    sizes.attend_scale, sizes.turn_scale = a.qk_head_dim**-0.5 * softmax_factor(a.rope.yarn), amplitude(a.rope.yarn)
    sizes.frequencies, sizes.turn = writer.weight(frequencies_K), writer.buffer("turn", a.qk_rope_head_dim).data_ptr()
