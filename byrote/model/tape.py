"""The tape of a decoding step: operations written once from a finished model (`tape_writer`), and the call that runs them in C."""

import ctypes
from dataclasses import replace

import torch
from torch import Tensor

from byrote.kernels import native
from byrote.kernels.decode_step import cpu
from byrote.model.batch import Batch
from byrote.model.config import DSAConfig, ModelConfig
from byrote.model.tape_sparse import latents_of, size_latents, with_room
from byrote.model.tape_writer import Writer, refuse
from byrote.model.transformer import Model


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
            refuse(
                f"the attention of block {layer}",
                type(kind).__name__,
                "a tape has one size and rope of latents for all blocks that have some",
            )
        if isinstance(kind, DSAConfig) and kind.index_fp8:
            refuse(f"the indexer of block {layer}", "rounded to FP8", "a tape computes in fp32")
    if c.residual.streams > cpu.MOST_STREAMS:
        refuse("residual.num_streams", c.residual.streams, f"a tape takes up to {cpu.MOST_STREAMS}")
    if c.moe is not None and c.moe.top_k > cpu.MOST_CHOSEN:
        refuse("moe.top_k", c.moe.top_k, f"a tape takes up to {cpu.MOST_CHOSEN}")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            refuse(f"a forward hook on {name or 'the model'}", "set", "a tape calls none")
    if model.embed.weight.device.type == "cpu" and cpu.library() is None:  # compiled only where it could serve
        refuse("its C library", "not at hand", str(native.status()["reason"]))


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
