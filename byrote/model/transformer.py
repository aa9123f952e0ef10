"""The model, top to bottom: embed → blocks on residual streams → read-out → norm → head. Read this first.

    tokens ──embed──► streams [B, T, R, D] ──► block 0 … block L−1 ──► read-out ──► norm ──► head ──► logits or losses
       │                                          ▲
       └──► memory.fetch ──► rows (unique vectors + index) ── read by the memory blocks

`Model` is a plain module for one device: no parallelism, no global state. The memory table is not a parameter; rows come in as
`rows` or are fetched here, once, for all memory layers. With `targets_BT` the head runs in chunks and `logits` stays None.

Shapes: B batch, T tokens, R streams, D model, V vocabulary.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from byrote.errors import CheckpointError, ConfigError
from byrote.kernels.cross_entropy import linear_cross_entropy
from byrote.memory.conditional import Memory, Rows
from byrote.memory.ngram import NgramHash
from byrote.memory.table import DeviceTable
from byrote.model import roles
from byrote.model.batch import Batch, attention_mask, check_tokens, positions
from byrote.model.block import Block, Notes
from byrote.model.config import EngramConfig, MLAConfig, ModelConfig
from byrote.model.documents import document_runs, mask_padding
from byrote.model.hyper_connection import make_read_out
from byrote.model.init import initialise
from byrote.model.linear import Linear
from byrote.model.moe import MoE, balance_loss
from byrote.model.mtp import MTPModule, shift_targets, tokens_ahead
from byrote.model.norm import RMSNorm
from byrote.model.rope import amplitude, frequencies, rotation
from byrote.model.state import DecodeState

_WANTED = ("hidden", "gates", "router", "token_losses", "streams", "mtp_logits", "mtp_losses")


class Output(NamedTuple):
    logits: Tensor | None  # [B, T, V]; None when targets were given
    losses: dict[str, Tensor]  # unweighted terms by name: next_token, mtp, balance
    loads: dict[str, Tensor]  # tokens per expert, by the name of the MoE module
    rows: Rows | None  # what was read from memory: the optimizer needs its leaf
    extras: dict[str, Tensor | list[Tensor]]  # what `want` named


class Model(nn.Module):
    """See `docs/architecture.md`, life of a batch. `seed` fixes every initial number, the table's included."""

    def __init__(self, config: ModelConfig, *, seed: int = 0, table_state_dim: int = 1) -> None:
        super().__init__()
        if not isinstance(config.attention, MLAConfig):
            raise ConfigError("this model can be planned (`byrote plan`) but not built yet: only MLA attention is trainable")
        self.config, self._attention = config, config.attention
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.read_out = make_read_out(config.dim, config.residual, config.norm_eps)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size)
        self.mtp = nn.ModuleList(MTPModule(config, depth) for depth in range(config.mtp.depth if config.mtp else 0))
        initialise(self, config.init_std, seed)
        self._frequencies_K = frequencies(config.attention.qk_rope_head_dim, config.attention.rope)
        self.memory = None if config.engram is None else build_memory(config.engram, config.vocab_size, seed, table_state_dim)

    # ── forward ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        document_BT: Tensor | None = None,
        position_BT: Tensor | None = None,
        state: DecodeState | None = None,
        rows: Rows | None = None,
        targets_BT: Tensor | None = None,
        want: Iterable[str] = (),
    ) -> Output:
        """Logits, or with `targets_BT` (−100: not scored) the losses. `state` is appended to.

        Raises ConfigError for ids outside the vocabulary, shapes that disagree, or an unknown name in `want`.
        """
        want = self._checked(want)
        check_tokens(tokens_BT, self.config.vocab_size, targets_BT=targets_BT, document_BT=document_BT, position_BT=position_BT)
        batch = self._batch(tokens_BT, document_BT, position_BT, state, rows)
        streams_BTRD, notes = self._body(batch)
        hidden_BTD = self.norm(self.read_out(streams_BTRD))
        output = Output(None, {}, _loads(notes, batch), batch.rows, _extras(want, hidden_BTD, streams_BTRD, notes))
        if targets_BT is None:
            return output._replace(logits=self.head(hidden_BTD))
        return self._losses(output, hidden_BTD, targets_BT, batch, notes, want)

    def _checked(self, want: Iterable[str]) -> frozenset[str]:
        unknown = sorted(set(want) - set(_WANTED))
        if unknown:
            raise ConfigError(f"unknown extra {unknown[0]!r}; allowed: {', '.join(_WANTED)}")
        return frozenset(want)

    def _batch(
        self, tokens_BT: Tensor, document_BT: Tensor | None, position_BT: Tensor | None, state: DecodeState | None, rows: Rows | None
    ) -> Batch:
        if state is not None:
            state.check_room(*tokens_BT.shape)
        if rows is not None:
            self._check_rows(rows, tokens_BT)
        if position_BT is None:
            position_BT = positions(tokens_BT, document_BT, state)
        if rows is None and self.memory is not None:
            rows = self.memory.fetch(tokens_BT, document_BT, state)
        keys_BS, keys = self._documents(document_BT, tokens_BT.shape[1], state)
        document_BT = None if keys_BS is None else keys_BS[:, keys - tokens_BT.shape[1] :]
        if state is not None:
            state.positions.append(position_BT)
            state.canonical.append(tokens_BT if self.memory is None else self.memory.canonical(tokens_BT))
        mask_B1TS, causal = attention_mask(document_BT, keys_BS, tokens_BT.shape[1], keys, tokens_BT.device)
        self._frequencies_K = self._frequencies_K.to(tokens_BT.device)
        turn = rotation(position_BT, self._frequencies_K, amplitude(self._attention.rope.yarn))
        return Batch(tokens_BT, document_BT, keys_BS, position_BT, turn, mask_B1TS, causal, rows, state)

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
            cache = None if batch.state is None else batch.state.latents[layer]
            streams_BTRD, notes[f"blocks.{layer}"] = block(streams_BTRD, batch, cache)
        return streams_BTRD, notes

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        embedded_BTD = self.embed(tokens_BT)
        device = tokens_BT.device.type
        return embedded_BTD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else embedded_BTD

    # ── losses ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _losses(
        self, output: Output, hidden_BTD: Tensor, targets_BT: Tensor, batch: Batch, notes: dict[str, Notes], want: frozenset[str]
    ) -> Output:
        losses, extras = dict(output.losses), dict(output.extras)
        losses["next_token"], token_losses_BT = self._cross_entropy(hidden_BTD, targets_BT)
        if "token_losses" in want:
            extras["token_losses"] = token_losses_BT
        if self.mtp and (self.training or want & {"mtp_logits", "mtp_losses"}):
            if batch.state is not None:
                raise ConfigError("multi-token prediction needs the whole text in one call; leave the state out, or call model.eval()")
            scored = self._mtp_sequences(targets_BT.shape[0])
            losses["mtp"], mtp_notes = self._mtp(hidden_BTD[:scored], targets_BT[:scored], batch.without_memory(scored), want, extras)
            notes = notes | mtp_notes
        moe = self.config.moe
        if moe is not None and moe.balance_alpha > 0 and self.training:
            real_BT = None if batch.document_BT is None else batch.document_BT >= 0
            routed = [(n["scores"], n["experts"]) for n in notes.values() if "scores" in n]
            terms = [balance_loss(*pair, moe.balance_alpha, None if real_BT is None else real_BT[: len(pair[0])]) for pair in routed]
            if terms:
                losses["balance"] = torch.stack(terms).sum()
        return output._replace(losses=losses, loads=_loads(notes, batch), extras=extras)

    def _cross_entropy(self, hidden_BTD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        hidden_ND = hidden_BTD.flatten(0, 1)
        loss, losses_N = linear_cross_entropy(hidden_ND, self.head.weight.to(hidden_ND.dtype), targets_BT.flatten())
        return loss, losses_N.view(targets_BT.shape)

    def _mtp_sequences(self, sequences: int) -> int:
        """How many of the batch's sequences MTP sees: all, except in training with `mtp.train_fraction`."""
        assert self.config.mtp is not None
        return max(1, round(sequences * self.config.mtp.train_fraction)) if self.training else sequences

    def _mtp(
        self, hidden_BTD: Tensor, targets_BT: Tensor, batch: Batch, want: frozenset[str], extras: dict[str, Tensor | list[Tensor]]
    ) -> tuple[Tensor, dict[str, Notes]]:
        """Mean loss over depths. The token k places on is the target k−1 places on; positions without one are not scored."""
        notes, terms, logits, per_token = {}, [], [], []
        for depth, module in enumerate(self.mtp):
            ahead_BT = tokens_ahead(batch.tokens_BT, targets_BT, batch.document_BT, depth + 1)
            hidden_BTD, notes[f"mtp.{depth}.block"] = module(hidden_BTD, self._embed(ahead_BT), batch)
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
        self, batch: int = 1, *, max_tokens: int | None = None, max_rollback: int = 16, dtype: torch.dtype | None = None
    ) -> DecodeState:
        """An empty memory of a text for `batch` rows."""
        c, weight = self.config, self.embed.weight
        engram = c.engram
        tails = {}
        if engram is not None and engram.conv_kernel:
            reach = (engram.conv_kernel - 1) * engram.dilation
            tails = dict.fromkeys(range(len(engram.layers)), (reach, c.residual.streams, c.dim))
        return DecodeState(
            batch=batch,
            latent_dims=(self._attention.kv_lora_rank + self._attention.qk_rope_head_dim,) * c.num_layers,
            tail_shapes=tails,
            ngram_reach=0 if engram is None else engram.max_order - 1,
            pad=0 if self.memory is None else self.memory.hash.pad,
            dtype=dtype or weight.dtype,
            device=weight.device,
            max_tokens=max_tokens,
            max_rollback=max_rollback,
        )

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


def build_memory(config: EngramConfig, vocab_size: int, seed: int, state_dim: int = 1) -> Memory:
    """Hash and an in-memory table. With `canonical_vocab` the map of the tokenizer must follow through `set_canonical`."""
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
    table = DeviceTable(
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
