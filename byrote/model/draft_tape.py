"""Drafting on a tape: a V3 module (model/mtp.py) as C operations, beside the tape of the model itself.

    follow    what fills the cache of the module's attention, for all tokens of a step at once: join, project, enter, keys
    draft     the whole module and the head's likely ids, a token of each text at a time; all drafts of a step in one call

A position that is only followed needs no more than its key, since nothing else of it is ever read. The state is kept exactly as
`mtp.follow` and `mtp.draft_tokens` keep it, so that the two ways may alternate.

Shapes: B batch, T tokens, S keys, D model, V vocabulary.
"""

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from byrote.errors import ConfigError
from byrote.kernels import native
from byrote.kernels.decode_step import cpu
from byrote.kernels.decode_step.cpu import Code
from byrote.model.mla import MLA
from byrote.model.mtp import MTPModule, likely_ids
from byrote.model.state import DecodeState
from byrote.model.tape import sizes_of
from byrote.model.tape_writer import Writer, scale_of
from byrote.model.transformer import Model


def write_draft_tape(model: Model) -> "DraftTape | None":
    """The tape of a captured model's one MTP module; None where there is none, or more, or one that a tape cannot express."""
    modules = [module for module in model.mtp if isinstance(module, MTPModule)]
    if len(modules) != 1 or modules[0].has_streams or type(modules[0].block.attn) is not MLA:
        return None
    try:
        return DraftTape(model, modules[0])
    except ConfigError:  # something injected into this module alone
        return None


class Ops(NamedTuple):
    tape: ctypes.Array[cpu.Op]
    numbers: int  # weights that one row reads

    @classmethod
    def of(cls, writer: Writer, write: Callable[[Writer, Model, MTPModule], None], model: Model, module: MTPModule) -> "Ops":
        before, writer.ops = writer.active_numbers, []
        write(writer, model, module)
        return cls(cpu.tape_of(writer.ops), writer.active_numbers - before)


def _follow_ops(writer: Writer, model: Model, module: MTPModule) -> None:
    _join(writer, model, module)
    attn, site = module.block.attn, module.block.attn_site
    assert isinstance(attn, MLA), "write_draft_tape looks"
    kept = writer.buffer("kept", attn.config.kv_lora_rank + attn.config.qk_rope_head_dim)
    writer.linear(writer.enter(site), attn.kv_a, kept, norm=module.block.attn_norm)
    writer.op(Code.LATENT, x=kept, w=(writer.gain(attn.kv_a_norm),), eps=attn.kv_a_norm.eps)


def _draft_ops(writer: Writer, model: Model, module: MTPModule) -> None:
    _join(writer, model, module)
    writer.block(0, module.block)
    x = writer.read_out(module.read_out)
    writer.op(Code.NORM, x=x, w=(writer.gain(module.norm),), width=model.config.dim, eps=module.norm.eps)
    likely, scale_V = likely_ids(model.config.vocab_size), scale_of(model.head)
    writer.product(None, model.head.weight[:likely], None, scale=None if scale_V is None else scale_V[:likely])


def _join(writer: Writer, model: Model, module: MTPModule) -> None:
    dim, gains = model.config.dim, (writer.gain(module.embed_norm), writer.gain(module.hidden_norm))
    joined, x = writer.buffer("joined", 2 * dim), writer.buffer("x", dim)
    writer.op(Code.TURN, sync=False)
    writer.op(Code.JOIN, y=joined, w=(model.embed.weight, *gains), width=dim, eps=module.embed_norm.eps)
    writer.linear(joined, module.project, x, sync=False)  # every thread spreads the columns that it has written
    writer.op(Code.SPREAD, x=x, y=writer.streams)


class DraftTape:
    """Serves fp32 states on the CPU, up to cpu.MOST_ROWS rows a call; the caller sees to that."""

    def __init__(self, model: Model, module: MTPModule) -> None:
        self._writer = writer = Writer(model)
        self._draft = Ops.of(writer, _draft_ops, model, module)
        self._follow = Ops.of(writer, _follow_ops, model, module)
        self._sizes = sizes_of(model.config, writer)
        self._own_numbers = cpu.own_numbers(writer.longest_row, self._sizes.top_k)
        self._own = native.empty((0,), torch.float32)
        self._hidden = writer.buffer("hidden out", model.config.dim)
        self._logits = writer.buffer("logits", likely_ids(model.config.vocab_size))
        self._cache, self._memory = (cpu.Kept * 1)(), (ctypes.c_void_p * 1)()

    def follow(self, state: DecodeState, hidden_BTD: Tensor, tokens_BT: Tensor) -> None:
        """As `mtp.follow`: the module reads what the tokens just appended to `state` make readable."""
        pending_BSD, end = state.drafts[0]["pending"].append(hidden_BTD), state.length - 1
        ready = min(tokens_BT.shape[1], end)
        if ready <= 0:
            return
        tokens_BT, runs_BS = tokens_BT[:, tokens_BT.shape[1] - ready :], state.numbered_runs()
        if runs_BS is not None:
            tokens_BT, runs_BS = tokens_BT * (runs_BS[:, end - ready : end] == runs_BS[:, end - ready + 1 :]), runs_BS[:, :end]
        position_BT = state.positions.all()[:, end - ready : end]
        self._run(self._follow, state, pending_BSD[:, -1 - ready : -1], tokens_BT, position_BT, runs_BS)

    def draft(self, state: DecodeState, token_B1: Tensor, count: int) -> Tensor:
        """As `mtp.draft_tokens`, whose conditions the caller has checked: int64 [B, count], the state as it was."""
        cache, runs_BS = state.drafts[0]["attention"], state.numbered_runs()
        inputs_B1D, position_B1 = state.drafts[0]["pending"].values[:, -1:], state.positions.all()[:, -1:]
        snapshot, at_once = cache.snapshot(), count if runs_BS is None else 1  # with every token the runs lie farther apart
        picked_NB = native.empty((count, len(token_B1)), torch.int64)
        for place in range(0, count, at_once):
            self._run(self._draft, state, inputs_B1D, token_B1, position_B1, runs_BS, picked_NB[place : place + at_once])
            if runs_BS is not None:
                inputs_B1D, token_B1, position_B1 = self._hidden[: len(token_B1), None], picked_NB[place, :, None], position_B1 + 1
                runs_BS = torch.cat((runs_BS, runs_BS[:, -1:]), dim=1)
        cache.restore(snapshot)
        return picked_NB.t()

    def _run(
        self,
        ops: Ops,
        state: DecodeState,
        inputs_BTD: Tensor,
        tokens_BT: Tensor,
        position_BT: Tensor,
        runs_BS: Tensor | None,
        picked_NB: Tensor | None = None,
    ) -> None:
        """Take the next positions in, or with `picked_NB` draft as many tokens as it has rows; the cache then holds all of them."""
        (B, T), cache, threads = tokens_BT.shape, state.drafts[0]["attention"], native.threads_for(ops.numbers)
        before = cache.length
        cache.extend(T if picked_NB is None else len(picked_NB))
        self._cache[0].start, self._cache[0].stride = cache.values.data_ptr(), cache.values.stride(0)
        if self._own.numel() < threads * self._own_numbers:
            self._own = native.empty((threads * self._own_numbers,), torch.float32)
        inputs_BTD, ids, positions = inputs_BTD.contiguous(), tokens_BT.long().contiguous(), position_BT.contiguous()
        document = None if runs_BS is None else runs_BS.contiguous()
        self._memory[0] = native.address(inputs_BTD)
        call = cpu.Call(
            *(threads, B, T, before),
            *map(native.address, (ids, positions, document)),
            *(ctypes.addressof(self._memory), ctypes.addressof(self._cache)),
            None,
            *map(native.address, (self._hidden, self._logits, self._own)),
            self._own_numbers,
        )
        if picked_NB is None:
            cpu.run(self._sizes, ops.tape, call)
        else:
            cpu.run_drafts(self._sizes, ops.tape, call, len(picked_NB), native.address(picked_NB))
