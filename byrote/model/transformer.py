"""The model, top to bottom: embed → blocks on residual streams → read-out → norm → head. Read this first.

    tokens ──embed──► streams [B, T, R, D] ──► block 0 … block L−1 ──► read-out ──► norm ──► head ──► logits or losses
       │                                          ▲
       └──► memory.fetch ──► rows (unique vectors + index) ── read by the memory blocks

`Model` is a plain module for one device: no parallelism, no global state. The memory table is not a parameter; rows come in as
`rows` or are fetched here, once, for all memory layers. With `targets_BT` the head runs in chunks and `logits` stays None.

Shapes: B batch, T tokens, R streams, D model, V vocabulary.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from byrote.errors import CheckpointError, ConfigError
from byrote.kernels.cross_entropy import linear_cross_entropy, product_cross_entropy
from byrote.memory.conditional import Memory, Rows
from byrote.memory.ngram import NgramHash
from byrote.memory.place import MakeTable
from byrote.memory.table import DeviceTable
from byrote.model import roles
from byrote.model.batch import Batch, check_tokens, count_on
from byrote.model.block import Block, Notes
from byrote.model.config import EngramConfig, ModelConfig
from byrote.model.documents import document_runs, mask_padding
from byrote.model.hyper_connection import make_read_out
from byrote.model.init import initialise
from byrote.model.linear import Linear
from byrote.model.moe import MoE, balance_loss
from byrote.model.mtp import MTPModule, draft_tokens, follow, shift_targets, tokens_ahead
from byrote.model.norm import RMSNorm
from byrote.model.pack import Pack
from byrote.model.state import DecodeState, Tail, Track
from byrote.model.voice import listen, new_tails

_WANTED = ("hidden", "gates", "router", "token_losses", "streams", "mtp_logits", "mtp_losses")


class Output(NamedTuple):
    logits: Tensor | None  # [B, T, V]; None when targets were given
    losses: dict[str, Tensor]  # unweighted terms by name: next_token, mtp, balance, indexer
    loads: dict[str, Tensor]  # tokens per expert, by the name of the MoE module
    rows: Rows | None  # what was read from memory: the optimizer needs its leaf
    extras: dict[str, Tensor | list[Tensor]]  # what `want` named


class Model(nn.Module):
    """See `docs/architecture.md`, life of a batch. `seed` fixes every initial number, the table's included; None sets none."""

    def __init__(self, config: ModelConfig, *, seed: int | None = 0, table_state_dim: int = 1, make_table: MakeTable = DeviceTable) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.read_out = make_read_out(config.dim, config.residual, config.norm_eps)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size)
        self.mtp = nn.ModuleList(MTPModule(config, depth) for depth in range(config.mtp.depth if config.mtp else 0))
        if seed is not None:
            initialise(self, config.init_std, seed)
        self.memory = (
            None if config.engram is None else build_memory(config.engram, config.vocab_size, seed or 0, table_state_dim, make_table)
        )
        self.packs: dict[str, Pack] = {}  # memories put on from outside, in their order: `model/pack.py`

    # ── forward ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        document_BT: Tensor | None = None,
        position_BT: Tensor | None = None,
        state: DecodeState | None = None,
        rows: Rows | None = None,
        packs: Sequence[Iterable[str]] | None = None,
        targets_BT: Tensor | None = None,
        last: int | None = None,
        want: Iterable[str] = (),
    ) -> Output:
        """Logits, or with `targets_BT` (−100: not scored) the losses. `state` is appended to. `packs` names those of each sequence
        (for the whole of a text); absent: all that are attached speak to all. `last`: logits of so many last positions only (1 or more).

        Raises ConfigError for ids outside the vocabulary, shapes that disagree, or an unknown name in `want`.
        """
        want = self._checked(want)
        check_tokens(tokens_BT, self.config.vocab_size, targets_BT=targets_BT, document_BT=document_BT, position_BT=position_BT)
        batch = self._batch(tokens_BT, document_BT, position_BT, state, rows, packs)
        streams_BTRD, notes = self._body(batch)
        hidden_BTD = self.norm(self.read_out(streams_BTRD))
        if state is not None and state.drafts:
            follow(self._drafting(), state, self._mtp_input(hidden_BTD, streams_BTRD), tokens_BT, self._embed)
        output = Output(None, {}, _loads(notes, batch), batch.rows, _extras(want, hidden_BTD, streams_BTRD, notes))
        if targets_BT is None:
            return output._replace(logits=self.head(hidden_BTD if last is None else hidden_BTD[:, -last:]))
        return self._losses(output, hidden_BTD, streams_BTRD, targets_BT, batch, notes, want)

    def _checked(self, want: Iterable[str]) -> frozenset[str]:
        unknown = sorted(set(want) - set(_WANTED))
        if unknown:
            raise ConfigError(f"unknown extra {unknown[0]!r}; allowed: {', '.join(_WANTED)}")
        return frozenset(want)

    def _batch(
        self,
        tokens_BT: Tensor,
        document_BT: Tensor | None,
        position_BT: Tensor | None,
        state: DecodeState | None,
        rows: Rows | None,
        packs: Sequence[Iterable[str]] | None = None,
    ) -> Batch:
        if state is not None:
            state.check_room(*tokens_BT.shape)
        if rows is not None:
            self._check_rows(rows, tokens_BT)
        place_BT = count_on(tokens_BT, document_BT, state, None if state is None else state.places)
        if position_BT is None:
            position_BT = count_on(tokens_BT, document_BT, state, None if state is None else state.positions)
        if rows is None and self.memory is not None:
            rows = self.memory.fetch(tokens_BT, document_BT, state)
        voices = listen(self.packs, packs, tokens_BT, document_BT, state)
        keys_BS, keys = self._documents(document_BT, tokens_BT.shape[1], state)
        if state is not None:
            state.places.append(place_BT)
            state.positions.append(position_BT)
            state.canonical.append(tokens_BT if self.memory is None else self.memory.canonical(tokens_BT))
        return Batch(
            tokens_BT=tokens_BT,
            document_BT=None if keys_BS is None else keys_BS[:, keys - tokens_BT.shape[1] :],
            keys_document_BS=keys_BS,
            position_BT=position_BT,
            place_BT=place_BT,
            keys=keys,
            rows=rows,
            state=state,
            voices=voices,
        )

    @staticmethod
    def _documents(document_BT: Tensor | None, tokens: int, state: DecodeState | None) -> tuple[Tensor | None, int]:
        """Runs of all tokens so far, and how many tokens that is."""
        if state is not None:
            return state.fill_documents(document_BT, tokens), tokens + state.length
        return None if document_BT is None else mask_padding(document_runs(document_BT), document_BT), tokens

    def _check_rows(self, rows: Rows, tokens_BT: Tensor) -> None:
        if self.memory is None:
            raise ConfigError("rows were given to a model without memory (engram is none); leave them out")
        wanted = (*tokens_BT.shape, *self.memory.rows_per_token)
        if rows.inverse_BTLN.shape != wanted:
            raise ConfigError(
                f"rows index {tuple(rows.inverse_BTLN.shape)} reads, these tokens need {wanted}; give what memory.fetch returned for them"
            )

    def _body(self, batch: Batch) -> tuple[Tensor, dict[str, Notes]]:
        embedded_BTD = self._embed(batch.tokens_BT)
        streams_BTRD = embedded_BTD[:, :, None].expand(-1, -1, self.config.residual.streams, -1).contiguous()
        notes: dict[str, Notes] = {}
        for layer, block in enumerate(self.blocks):
            cache = None if batch.state is None else batch.state.caches[layer]
            for voice in batch.voices:
                streams_BTRD, gates_BTR = voice.speak(layer, streams_BTRD, batch)
                if gates_BTR is not None:
                    notes[f"packs.{voice.name}.{layer}"] = {"gates": gates_BTR}
            streams_BTRD, notes[f"blocks.{layer}"] = block(streams_BTRD, batch, cache)
        return streams_BTRD, notes

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        embedded_BTD = self.embed(tokens_BT)
        device = tokens_BT.device.type
        return embedded_BTD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else embedded_BTD

    # ── losses ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _losses(
        self,
        output: Output,
        hidden_BTD: Tensor,
        streams_BTRD: Tensor,
        targets_BT: Tensor,
        batch: Batch,
        notes: dict[str, Notes],
        want: frozenset[str],
    ) -> Output:
        losses, extras = dict(output.losses), dict(output.extras)
        losses["next_token"], token_losses_BT = self._cross_entropy(hidden_BTD, targets_BT)
        if "token_losses" in want:
            extras["token_losses"] = token_losses_BT
        if self.mtp and (self.training or want & {"mtp_logits", "mtp_losses"}):
            if batch.state is not None:
                raise ConfigError("multi-token prediction needs the whole text in one call; leave the state out, or call model.eval()")
            scored = self._mtp_sequences(targets_BT.shape[0])
            carried = self._mtp_input(hidden_BTD, streams_BTRD)[:scored]
            losses["mtp"], mtp_notes = self._mtp(carried, targets_BT[:scored], batch.without_memory(scored), want, extras)
            notes = notes | mtp_notes
        indexers = [note["indexer"] for note in notes.values() if "indexer" in note]
        if indexers:
            losses["indexer"] = torch.stack(indexers).sum()
        moe = self.config.moe
        if moe is not None and moe.balance_alpha > 0 and self.training:
            real_BT = None if batch.document_BT is None else batch.document_BT >= 0
            routed = [(n["scores"], n["experts"]) for n in notes.values() if "scores" in n]
            terms = [balance_loss(*pair, moe.balance_alpha, None if real_BT is None else real_BT[: len(pair[0])]) for pair in routed]
            if terms:
                losses["balance"] = torch.stack(terms).sum()
        return output._replace(losses=losses, loads=_loads(notes, batch), extras=extras)

    def _cross_entropy(self, hidden_BTD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        hidden_ND, targets_N = hidden_BTD.flatten(0, 1), targets_BT.flatten()
        if self.head.is_plain:
            loss, losses_N = linear_cross_entropy(hidden_ND, self.head.weight.to(hidden_ND.dtype), targets_N)
        else:
            loss, losses_N = product_cross_entropy(hidden_ND, self.head, targets_N)
        return loss, losses_N.view(targets_BT.shape)

    def _mtp_sequences(self, sequences: int) -> int:
        """How many of the batch's sequences MTP sees: all, except in training with `mtp.train_fraction`."""
        assert self.config.mtp is not None
        return max(1, round(sequences * self.config.mtp.train_fraction)) if self.training else sequences

    def _mtp_input(self, hidden_BTD: Tensor, streams_BTRD: Tensor) -> Tensor:
        """What the first MTP module goes on from: V3's the normed hidden state, V4's the streams."""
        return streams_BTRD if self.config.mtp is not None and self.config.mtp.form == "streams" else hidden_BTD

    def _mtp(
        self, carried: Tensor, targets_BT: Tensor, batch: Batch, want: frozenset[str], extras: dict[str, Tensor | list[Tensor]]
    ) -> tuple[Tensor, dict[str, Notes]]:
        """Mean loss over depths. The token k places on is the target k−1 places on; positions without one are not scored."""
        notes, terms, logits, per_token = {}, [], [], []
        for depth, module in enumerate(self.mtp):
            ahead_BT = tokens_ahead(batch.tokens_BT, targets_BT, batch.document_BT, depth + 1)
            carried, hidden_BTD, notes[f"mtp.{depth}.block"] = module(carried, self._embed(ahead_BT), batch)
            wanted_BT = shift_targets(targets_BT, batch.document_BT, depth + 1)
            loss, losses_BT = self._cross_entropy(hidden_BTD, wanted_BT)
            terms.append(loss)
            per_token.append(losses_BT)
            if "mtp_logits" in want:
                logits.append(self.head(hidden_BTD))
        if "mtp_logits" in want:
            extras["mtp_logits"] = logits
        if "mtp_losses" in want:
            extras["mtp_losses"] = per_token
        return torch.stack(terms).mean(), notes

    # ── around the forward ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def new_state(
        self,
        batch: int = 1,
        *,
        max_tokens: int | None = None,
        max_rollback: int = 16,
        dtype: torch.dtype | None = None,
        drafts: bool = False,
    ) -> DecodeState:
        """An empty memory of a text for `batch` rows; with `drafts` the MTP modules read along, so that `draft` can be asked."""
        c, engram, weight = self.config, self.config.engram, self.embed.weight
        if drafts and not self.mtp:
            raise ConfigError("this model has no MTP module to draft with (mtp is none); leave drafts out")
        shared: dict[str, Any] = {"dtype": dtype or weight.dtype, "device": weight.device, "max_rollback": max_rollback}
        tails: dict[Hashable, Tail | Track] = new_tails(self.packs, batch, **shared)
        if engram is not None and engram.conv_kernel:
            reach, streams = (engram.conv_kernel - 1) * engram.dilation, (c.residual.streams, c.dim)
            tails |= {slot: Tail(batch, streams, reach, **shared) for slot in range(len(engram.layers))}
        return DecodeState(
            batch=batch,
            caches=[block.attn.new_cache(batch, **shared) for block in self.blocks if isinstance(block, Block)],
            tails=tails,
            drafts=[module.new_cache(batch, **shared) for module in self._drafting()] if drafts else (),
            ngram_reach=0 if engram is None else engram.max_order - 1,
            pad=0 if self.memory is None else self.memory.hash.pad,
            device=weight.device,
            max_tokens=max_tokens,
            max_rollback=max_rollback,
        )

    @torch.no_grad()
    def draft(self, state: DecodeState, token_B1: Tensor, count: int = 1) -> Tensor:
        """int64 [B, count]: what MTP expects after `token_B1`, the token picked to follow all that `state` holds; greedy.

        The state stays as it is: give `token_B1` and the drafts to the next call, then roll back those that were not accepted.
        Raises ConfigError for a state made without `drafts`, and RequestError for more drafts than it could roll back.
        """
        return draft_tokens(self._drafting(), state, token_B1, count, self._embed, self.head)

    def _drafting(self) -> list[MTPModule]:
        return [module for module in self.mtp if isinstance(module, MTPModule)]

    def param_roles(self) -> dict[str, str]:
        """Name of every parameter → its role for the optimizer (`model/roles.py`)."""
        return roles.param_roles(self)

    def update_balance(self, loads: dict[str, Tensor]) -> None:
        """Move every router's bias by one balancing step, from loads summed over micro-batches and ranks."""
        for name, load_E in loads.items():
            module = self.get_submodule(name)
            assert isinstance(module, MoE)
            module.update_bias(load_E)

    def get_extra_state(self) -> Tensor:
        """The marker that stands in `state_dict()` for the table it does not hold."""
        return torch.tensor([0 if self.memory is None else self.memory.store.digest()])

    def set_extra_state(self, state: Tensor) -> None:
        if int(state[0]) != int(self.get_extra_state()[0]):
            raise CheckpointError(
                "this state_dict belongs to a model with other memory rows, and a state_dict carries no table; "
                "use byrote.save and byrote.load, or load the table first"
            )


def build_memory(config: EngramConfig, vocab_size: int, seed: int, state_dim: int = 1, make_table: MakeTable = DeviceTable) -> Memory:
    """Hash and table; `make_table` says where the rows live (memory/place.py). With `canonical_vocab` the tokenizer's map must follow
    through `set_canonical`."""
    classes = config.canonical_vocab or vocab_size
    hash_ = NgramHash(
        canonical_vocab=classes,
        rows_per_order=config.rows_per_order,
        max_order=config.max_order,
        num_heads=config.num_heads,
        layers=config.hash_ids,
        pad=config.pad_token if config.canonical_vocab is None else 0,
        seed=config.hash_seed,
    )
    table = make_table(
        sum(hash_.num_rows), config.head_dim, state_dim=state_dim, dtype=getattr(torch, config.table_dtype), std=config.table_std, seed=seed
    )
    return Memory(hash_, table, vocab_size=vocab_size, needs_canonical=config.canonical_vocab is not None, pad_token=config.pad_token)


def _loads(notes: dict[str, Notes], batch: Batch) -> dict[str, Tensor]:
    """int64 [E]: tokens per expert. Padding goes through experts as well, but must not steer their balance."""
    routed = {f"{name}.ffn": note for name, note in notes.items() if "load" in note}
    if batch.document_BT is None:
        return {name: note["load"] for name, note in routed.items()}
    real_BT = (batch.document_BT >= 0).to(torch.int64)
    return {name: _real_load(note["load"], note["experts"], real_BT) for name, note in routed.items()}


def _real_load(load_E: Tensor, experts_BTK: Tensor, real_BT: Tensor) -> Tensor:
    """MTP may have seen the first sequences only."""
    weights_BTK = real_BT[: len(experts_BTK), :, None].expand_as(experts_BTK)
    return torch.zeros_like(load_E).index_add_(0, experts_BTK.flatten(), weights_BTK.flatten())


def _extras(want: frozenset[str], hidden_BTD: Tensor, streams_BTRD: Tensor, notes: dict[str, Notes]) -> dict[str, Tensor | list[Tensor]]:
    extras: dict[str, Tensor | list[Tensor]] = {}
    if "hidden" in want:
        extras["hidden"] = hidden_BTD
    if "streams" in want:
        extras["streams"] = streams_BTRD
    if "gates" in want:
        extras["gates"] = [note["gates"] for note in notes.values() if "gates" in note]
    if "router" in want:
        extras["router"] = [note["experts"] for note in notes.values() if "experts" in note]
    return extras
