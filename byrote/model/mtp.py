"""Multi-token prediction (V3 §2.2): module k predicts, at position i, token i + k + 1.

    joined (V3)       h'_i = W [ rms(Emb(t_{i+k})) ; rms(h^{k−1}_i) ]               order of the released weights
    streams (V4)      h'_i[r] = W_e rms(Emb(t_{i+k})) + W_h rms(s^{k−1}_i[r])       s: all residual streams
    both              s^k = Block(h'),  h^k = rms(read-out(s^k)),  logits = head(h^k)     embedding and head are the model's own

h^0 is the model's hidden state after its final norm, as the serving stacks feed the released module; h^{k} after this module's.
V4's modules go on from the streams instead, before the read-out.

**Drafting.** With a state, module k (0-based) reads along k + 1 tokens behind the model, since it needs the token after: of its
input a `pending` entry waits for it. `draft_tokens` lets the modules read the newest token and, one after the other, what they
themselves propose; beyond the last module it goes on from its own output. Then all is rolled back.

    tokens held      0 1 2 3 4 5       module 0 has read 0 … 4 (with tokens 1 … 5), module 1 has read 0 … 3
    draft(x)         module 0 reads 5 with x → y1; module 1 reads 4 with x and 5 with y1 → y2

Shapes: B batch, T tokens, R streams, D model.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from byrote.errors import ConfigError, RequestError
from byrote.kernels.cross_entropy import IGNORE
from byrote.model.batch import Batch
from byrote.model.block import Block, Notes
from byrote.model.config import ModelConfig
from byrote.model.hyper_connection import make_read_out
from byrote.model.linear import Linear
from byrote.model.norm import RMSNorm
from byrote.model.state import Cache, DecodeState, Drawers, Tail


class MTPModule(nn.Module):
    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        assert config.mtp is not None
        self.has_streams = config.mtp.form == "streams"
        self.embed_norm = RMSNorm(dim, eps)
        self.hidden_norm = RMSNorm(dim, eps)
        if self.has_streams:
            self.embed_project, self.hidden_project = Linear(dim, dim), Linear(dim, dim)
        else:
            self.project = Linear(2 * dim, dim)
        self.block = Block(config, config.num_layers + depth)
        self.read_out = make_read_out(dim, config.residual, eps)
        self.norm = RMSNorm(dim, eps)
        self.num_streams, self.dim = config.residual.streams, dim

    def new_cache(self, batch: int, *, dtype: torch.dtype, device: torch.device, max_rollback: int) -> Drawers:
        """What the block's attention keeps, and the newest inputs."""
        shape = (self.num_streams, self.dim) if self.has_streams else (self.dim,)
        attention = self.block.attn.new_cache(batch, dtype=dtype, device=device, max_rollback=max_rollback)
        return Drawers(attention=attention, pending=Tail(batch, shape, 1, max_rollback, dtype, device))

    def forward(self, carried: Tensor, embedded_BTD: Tensor, batch: Batch, cache: Cache | None = None) -> tuple[Tensor, Tensor, Notes]:
        """(what the next module goes on from, normed hidden state [B, T, D], the block's notes).

        `carried`: hidden states [B, T, D], or streams [B, T, R, D]. `embedded_BTD`: embedding of the token `depth + 1` places on.
        """
        if self.has_streams:
            streams_BTRD = self.embed_project(self.embed_norm(embedded_BTD))[:, :, None] + self.hidden_project(self.hidden_norm(carried))
        else:
            x_BTD = self.project(torch.cat((self.embed_norm(embedded_BTD), self.hidden_norm(carried)), dim=-1))
            streams_BTRD = x_BTD[:, :, None].expand(-1, -1, self.num_streams, -1).contiguous()
        streams_BTRD, notes = self.block(streams_BTRD, batch, cache)
        hidden_BTD = self.norm(self.read_out(streams_BTRD))
        return streams_BTRD if self.has_streams else hidden_BTD, hidden_BTD, notes


Embed = Callable[[Tensor], Tensor]


def follow(modules: Sequence[MTPModule], state: DecodeState, carried: Tensor, tokens_BT: Tensor, embed: Embed) -> None:
    """Let every module read what the tokens just appended to `state` make readable. `carried`: the model's output for them."""
    for depth, (module, cache) in enumerate(zip(modules, state.drafts, strict=True)):
        pending = cache["pending"].append(carried).to(carried.dtype)
        ready = min(tokens_BT.shape[1], max(state.length - 1 - depth, 0))
        inputs = pending[:, pending.shape[1] - 1 - ready : pending.shape[1] - 1]
        carried = inputs[:, :0]
        if ready:
            carried, _ = _read(module, depth, state, inputs, tokens_BT[:, tokens_BT.shape[1] - ready :], embed)


def draft_tokens(modules: Sequence[MTPModule], state: DecodeState, token_B1: Tensor, count: int, embed: Embed, head: nn.Module) -> Tensor:
    """See `Model.draft`."""
    check_draft(state, count)
    snapshot, picked = state.snapshot(), [token_B1]
    for step in range(count):
        state.pretend()
        hidden_B1D = _step(modules, state, min(step, len(modules) - 1), picked[-1], embed)
        logits_B1V = head(hidden_B1D)
        picked.append(logits_B1V[..., : likely_ids(logits_B1V.shape[-1])].argmax(-1))
    state.restore(snapshot)
    return torch.cat(picked[1:], dim=1)


def likely_ids(vocab_size: int) -> int:
    """Drafts are of the first ids alone: a tokenizer's merges are in order of frequency, and the head is most of what a draft reads.

    FR-Spec (arXiv 2502.14856) ranks ids by a corpus. Of held-out Python 87 % of tokens are among the first quarter of 32,768 ids.
    """
    return min(vocab_size, max(vocab_size // 4, 8192))


def check_draft(state: DecodeState, count: int) -> None:
    if not state.drafts:
        raise ConfigError("this state keeps nothing to draft from; make it with model.new_state(drafts=True)")
    if not 0 < count <= state.max_rollback or state.length == 0:
        held = f"the state holds {state.length} tokens and can roll back {state.max_rollback}"
        raise RequestError(f"cannot draft {count} tokens: {held}; ask for 1 to {state.max_rollback} after the prompt was read")


def _step(modules: Sequence[MTPModule], state: DecodeState, first: int, token_B1: Tensor, embed: Embed) -> Tensor:
    """Modules from `first` on read one more position each; returns the hidden state of the first, which predicts."""
    carried, predicts = None, None
    for depth in range(first, len(modules)):
        tail = state.drafts[depth]["pending"]
        input_ = tail.values[:, -1:] if carried is None else tail.append(carried)[:, :1]
        if state.length - 2 - depth < 0:  # this module has nothing to read yet
            break
        carried, hidden_B1D = _read(modules[depth], depth, state, input_.to(embed(token_B1).dtype), token_B1, embed)
        predicts = hidden_B1D if predicts is None else predicts
    if first == len(modules) - 1 and carried is not None:  # beyond the last module: on from its own output
        state.drafts[first]["pending"].append(carried)
    assert predicts is not None, "a state with tokens has a position for its first module"
    return predicts


def _read(module: MTPModule, depth: int, state: DecodeState, inputs: Tensor, tokens_BT: Tensor, embed: Embed) -> tuple[Tensor, Tensor]:
    """Run a module over its next positions, whose tokens `depth + 1` places on are `tokens_BT` (token 0 where a document ends)."""
    end, runs_BS = state.length - 1 - depth, state.numbered_runs()
    span = slice(end - tokens_BT.shape[1], end)
    if runs_BS is not None:
        tokens_BT = tokens_BT * (runs_BS[:, span] == runs_BS[:, span.start + depth + 1 : end + depth + 1])
    batch = Batch(
        tokens_BT=tokens_BT,
        document_BT=None if runs_BS is None else runs_BS[:, span],
        keys_document_BS=None if runs_BS is None else runs_BS[:, :end],
        position_BT=state.positions.all()[:, span],
        place_BT=state.places.all()[:, span],
        keys=end,
    )
    carried, hidden_BTD, _ = module(inputs, embed(tokens_BT), batch, state.drafts[depth]["attention"])
    return carried, hidden_BTD


def tokens_ahead(tokens_BT: Tensor, targets_BT: Tensor, document_BT: Tensor | None, places: int) -> Tensor:
    """The token `places` further on, 0 where the row or the document ends before. A row's last target counts as a token of it.

    Tokens and not targets: a target may be masked (the prompt in fine-tuning), and later positions attend to what stands here.
    """
    length = tokens_BT.shape[1]
    follow = torch.cat((tokens_BT, targets_BT[:, -1:].clamp_min(0)), dim=1)[:, places:]
    ahead_BT = functional.pad(follow, (0, length - follow.shape[1]))
    if document_BT is None:
        return ahead_BT
    later = torch.cat((document_BT, document_BT[:, -1:]), dim=1)[:, places:]
    return ahead_BT * (functional.pad(later, (0, length - later.shape[1]), value=-2) == document_BT)


def shift_targets(targets_BT: Tensor, document_BT: Tensor | None, places: int) -> Tensor:
    """Targets `places` further on; IGNORE where the row or the document ends before."""
    shifted = torch.full_like(targets_BT, IGNORE)
    shifted[:, :-places] = targets_BT[:, places:]
    if document_BT is not None:
        same = torch.zeros_like(shifted, dtype=torch.bool)
        same[:, :-places] = document_BT[:, :-places] == document_BT[:, places:]
        shifted = shifted.masked_fill(~same, IGNORE)
    return shifted
