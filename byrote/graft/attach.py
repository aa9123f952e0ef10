"""Engram memory on a Hugging Face causal LM, from outside: by hooks, without editing its code or its weights.

    decoder(input_ids, cache …)     hook before: token ids → n-grams → rows, read once for all memory layers
      block 0
      block ℓ                       hook before each chosen block: hidden ← hidden + memory (`model/engram.py`, one stream)
      …

That is the paper's place for it (arXiv 2601.07372 §2.4: before attention). Memory depends on the token ids alone, so a model called
with `inputs_embeds` and no ids is refused. What must be remembered between calls lies in the cache of that text (`history.py`).

A memory whose rows are zero adds exactly zero. Detached, the model is the one it was: hooks are all there is.

`torch.compile`: the hooks that read rows and keep histories run outside the compiled graph (it breaks there), and attaching or detaching
makes compiled code be made again. Gradient checkpointing calls blocks again later, without their rows, and is refused.
"""

import contextlib
import inspect
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from byrote.checkpoint.huggingface import require_transformers
from byrote.checkpoint.packs import open_pack
from byrote.errors import ConfigError, MemoryPackError, RequestError
from byrote.graft.history import History, chunk_documents
from byrote.graft.host import base_fingerprint, find_host
from byrote.memory.conditional import Rows
from byrote.model.engram import Engram
from byrote.model.pack import Pack, check_fits

_GRAFTS = "_byrote_grafts"  # where a model keeps the list of its grafts, while there are any
_numbers = itertools.count()


class _Turn(NamedTuple):
    """What the blocks need of one call of the decoder."""

    rows: Rows
    document_BT: Tensor | None
    history: History | None
    border_BW: Tensor | None  # documents of what the convolution looks back on; None without a cache


class Graft:
    """A pack on a model. Made by `attach`; `detach` ends it."""

    def __init__(self, model: nn.Module, pack: Pack) -> None:
        self.pack, self.number = pack, next(_numbers)
        host = find_host(model)
        self._names = list(inspect.signature(host.decoder.forward).parameters)
        self._blocks = host.blocks
        self._turn: _Turn | None = None
        self._given: Rows | None = None
        self._gates: list[Tensor] | None = None
        self._reach = max(0, pack.config.conv_kernel - 1) * pack.config.dilation
        self._handles = [host.decoder.register_forward_pre_hook(self._before, with_kwargs=True)]
        self._handles += [host.decoder.register_forward_hook(self._after, always_call=True)]
        for slot, block in enumerate(pack.config.layers):
            engram: Any = pack.layers[str(block)]  # an Engram, or a control that speaks like one
            engram.to(next(host.blocks[block].parameters()).device)
            self._handles.append(host.blocks[block].register_forward_pre_hook(_Speaker(self, engram, slot), with_kwargs=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    # --- for training, editing and looking inside ---------------------------------------------------------------------

    @contextlib.contextmanager
    def reading(self, rows: Rows) -> Iterator[None]:
        """Inside, calls without a cache use these rows, which `pack.memory.fetch` returned for their tokens."""
        self._given = rows
        try:
            yield
        finally:
            self._given = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Inside, the gates of each memory layer, float32 [B, T, 1], are appended to the list at every call."""
        gates: list[Tensor] = []
        self._gates = gates
        try:
            yield gates
        finally:
            self._gates = None

    # --- hooks --------------------------------------------------------------------------------------------------------

    def _before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = dict(zip(self._names, args, strict=False)) | kwargs
        return (), self._read(decoder, call)

    @torch.compiler.disable
    def _read(self, decoder: Any, call: dict[str, Any]) -> dict[str, Any]:
        """The call with a cache where there will be one; `_turn` holds what the blocks need."""
        ids_BT = call.get("input_ids")
        if ids_BT is None:
            raise RequestError(
                "memory is looked up by token ids, and the model was called without: give input_ids, not inputs_embeds alone"
            )
        if decoder.training and torch.is_grad_enabled() and any(getattr(block, "gradient_checkpointing", False) for block in self._blocks):
            raise ConfigError("a grafted model cannot train with gradient checkpointing; call gradient_checkpointing_disable(), or eval()")
        cache, memory = _cache(decoder, call), self.pack.memory
        ids_BT = ids_BT.to(memory.store.device)
        history = None if cache is None else self._history(cache, ids_BT)
        document_BT = chunk_documents(call.get("attention_mask"), call.get("position_ids"), ids_BT, history)
        document_BT = None if document_BT is None else document_BT.to(ids_BT.device)
        rows = memory.fetch(ids_BT, document_BT, history) if self._given is None else self._given
        self._turn = _Turn(rows, document_BT, history, None if history is None else history.borders(self._reach))
        if history is not None and document_BT is not None:
            history.append(memory.canonical(ids_BT), document_BT)
        return call if cache is None else call | {"past_key_values": cache}

    def _history(self, cache: Any, ids_BT: Tensor) -> History:
        """This graft's layer of the cache, made at the first call."""
        found = [layer for layer in cache.layers if isinstance(layer, History) and layer.number == self.number]
        if not found:
            hash_ = self.pack.memory.hash
            found = [History(self.number, cache.layers[0], hash_.pad, hash_.max_order - 1)]
            cache.layers.append(found[0])
        found[0].go_on(ids_BT, int(cache.get_seq_length()))
        return found[0]

    def add(self, engram: Engram, slot: int, hidden_BTD: Tensor) -> Tensor:
        """The hidden states with what memory layer `slot` says."""
        turn, weight = self._turn, engram.value.weight
        assert turn is not None, "the blocks are called by their decoder"
        document_BS, extend = turn.document_BT, None
        if turn.history is not None and turn.border_BW is not None and document_BS is not None:
            document_BS = torch.cat((turn.border_BW, document_BS), dim=1)
            extend = _Extend(turn.history, slot, self._reach)
        rows_BTE = turn.rows.layer(slot).to(weight.device, weight.dtype)
        document_BS = None if document_BS is None else document_BS.to(weight.device)
        streams_BTRD, gates_BTR = engram.speak(hidden_BTD.to(weight.dtype)[:, :, None], rows_BTE, document_BS=document_BS, extend=extend)
        if self._gates is not None:
            self._gates.append(gates_BTR.detach())
        return streams_BTRD[:, :, 0].to(hidden_BTD.dtype)

    def _after(self, _decoder: nn.Module, _args: Any, _output: Any) -> None:
        self._turn = None


class _Speaker:
    """The hook before a chosen block."""

    def __init__(self, graft: Graft, engram: Engram, slot: int) -> None:
        self._graft, self._engram, self._slot = graft, engram, slot

    def __call__(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self._graft.add(self._engram, self._slot, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._graft.add(self._engram, self._slot, kwargs["hidden_states"])}


class _Extend:
    """`extend` of the convolution: the values of earlier calls before these."""

    def __init__(self, history: History, slot: int, reach: int) -> None:
        self._history, self._slot, self._reach = history, slot, reach

    @torch.compiler.disable
    def __call__(self, normed_BTRD: Tensor) -> Tensor:
        return self._history.extend(self._slot, self._reach, normed_BTRD)


def _cache(decoder: Any, call: dict[str, Any]) -> Any:
    """The cache this call will fill, made here if the decoder would make one; its attention layers are all there afterwards."""
    uses = call.get("use_cache")
    cache = call.get("past_key_values")
    if cache is None:
        if not (decoder.config.use_cache if uses is None else uses):
            return None
        cache = require_transformers().DynamicCache(config=decoder.config)
    if not hasattr(cache, "layers"):
        raise RequestError(f"past_key_values is a {type(cache).__name__}; memory keeps its history in a transformers Cache with layers")
    missing = decoder.config.get_text_config(decoder=True).num_hidden_layers - len(cache.layers)
    if missing > 0 and cache.layer_class_to_replicate is not None:
        cache.layers.extend(cache.layer_class_to_replicate() for _ in range(missing))
    return cache


# --- on and off -------------------------------------------------------------------------------------------------------


def attach(model: Any, pack: Pack | str | os.PathLike[str], *, any_base: bool = False, tokenizer: Any = None) -> Graft:
    """Let `pack` (or the one in a folder) speak into `model`, a transformers causal LM. Several packs add up.

    `any_base` allows other weights than the pack was trained on, such as a fine-tuned relative; a `tokenizer` (`HostText`) is compared with
    the pack's. Raises MemoryPackError, naming the field, for a pack that does not fit; nothing is changed then.
    """
    host = find_host(model)
    pack = pack if isinstance(pack, Pack) else open_pack(pack)
    if pack.streams != 1:
        raise MemoryPackError(
            f"the pack speaks into {pack.streams} residual streams; a Hugging Face model has one. It belongs to a byrote model"
        )
    check_fits(
        pack,
        dim=host.dim,
        streams=1,
        num_layers=len(host.blocks),
        vocab_size=host.vocab_size,
        tokenizer=None if tokenizer is None else tokenizer.fingerprint(),
        base=None if any_base else base_fingerprint(model),
    )
    graft = Graft(model, pack)
    model.__dict__[_GRAFTS] = [*grafts(model), graft]
    _forget_compiled()
    return graft


def detach(model: Any, graft: Graft | None = None) -> list[Pack]:
    """Take one graft, or all, off the model; returns their packs. Without grafts the model is bitwise what it was before."""
    if graft is not None and graft not in grafts(model):
        raise MemoryPackError("this graft is not on the model (taken off before?); byrote.graft.grafts(model) lists those that are")
    gone = grafts(model) if graft is None else [graft]
    left = [one for one in grafts(model) if one not in gone]
    for one in gone:
        one.remove()
    model.__dict__.pop(_GRAFTS, None)
    if left:
        model.__dict__[_GRAFTS] = left
    _forget_compiled()
    return [one.pack for one in gone]


def grafts(model: Any) -> list[Graft]:
    """The grafts on a model, in the order in which they speak."""
    return model.__dict__.get(_GRAFTS, [])


def _forget_compiled() -> None:
    """Compiled code does not notice new hooks."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
