"""V4's attention: a window of single tokens, and entries that stand for many (arXiv 2606.19348 §2.3; the released layout).

    q_h = rope( unit( W^UQ_h rms(W^DQ x) ) )           unit: RMS without a gain, per head
    kv  = rope( rms(W^KV x) )                          one head, key and value at once, for all query heads
    seen by t:  the kv of the last `window` tokens  ∪  compressed entries
    o_h = rope⁻¹( Σ p k ),  p = exp(q·k / √K) / (exp a_h + Σ exp(q·k / √K))          a_h: sink, a logit that carries nothing
    y   = W^OB [ W^OA_1 o_group 1 ; … ; W^OA_G o_group G ]

Rotary channels are the last ones, in adjacent pairs; as values are keys, the output carries their positions and is turned back by the
query's. Compressed entries come in two sizes (`kernels.compress`):

    CSA, every 4 tokens      overlapping groups; an indexer with narrow entries of its own picks the best `index_top_k`
    HCA, every 128 tokens    groups side by side, all entries are read

Entry e of a document stands for its tokens [e·m, (e+1)·m), has the position of the first and is seen by tokens from the last on. So
the group that a query lies in reaches it through the window alone. Groups are counted by a token's place in its document: a
packed document, a left-padded and a lone one make the same entries. Blocks without entries turn by `rope`, the others, with all that
is in them, by `compress_rope`.

The choice has no gradient. As in V3.2 the indexer learns from a loss of its own, the KL from the attention over the entries that are
read to the softmax of its scores, on detached inputs (our choice: the report does not give V4's loss). Its stages are those of
`model.dsa`.

Remembered: the window ring, for each compressor the values and gates of open groups, and the entries.

Shapes: B batch, T tokens, S window keys, E entries, H heads, K head width, C query latent, G output groups, J index heads, I index width,
M = ratio, X = channels of a compressor before pooling.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from byrote.kernels.compress import compress
from byrote.kernels.rms_norm import rms_norm
from byrote.kernels.sparse_index import Chosen, Spans, attend_chosen, index_loss, select
from byrote.model.batch import Batch
from byrote.model.config import CSA_RATIO, V4AttentionConfig
from byrote.model.linear import Linear
from byrote.model.norm import RMSNorm
from byrote.model.rope import Rotation, rotate, rotation
from byrote.model.state import Drawers, Entries, Tail

Notes = dict[str, Tensor]
_LISTED = 1 << 22  # slots of a block of queries that read all entries


class Groups(NamedTuple):
    """Where the tokens of a call close groups of one ratio."""

    closes_BT: Tensor  # int64, 1 where a token is the last of its group
    last_BE: Tensor  # that token of every new entry, −1 where a row has fewer
    opens_BE: Tensor  # bool: the group is the first of its document
    turn: Rotation  # by the position of the group's first token
    spans: Spans  # the new entries that each token sees, counted from the first new one of its row


class Compressed(NamedTuple):
    entries_BEK: Tensor
    spans: Spans


class GroupedProjection(nn.Module):
    """G matrices [R, in], one for each part of the input, stacked in `weight` [G·R, in]."""

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.groups = nn.Parameter(torch.empty(groups * outputs, inputs)), groups

    def forward(self, x_BTY: Tensor) -> Tensor:
        parts = x_BTY.unflatten(-1, (self.groups, -1)).unbind(-2)
        return torch.cat(
            [functional.linear(part, weight) for part, weight in zip(parts, self.weight.chunk(self.groups), strict=True)], dim=-1
        )


class Compressor(nn.Module):
    """Projects tokens to values and gates and pools them into entries of `width`. `bias` [M, X] depends on the place in the group."""

    def __init__(self, dim: int, width: int, config: V4AttentionConfig, eps: float) -> None:
        super().__init__()
        self.config, self.width, self.overlaps = config, width, config.ratio == CSA_RATIO
        self.channels = 2 * width if self.overlaps else width
        self.kv, self.gate = Linear(dim, self.channels), Linear(dim, self.channels)
        self.bias = nn.Parameter(torch.zeros(config.ratio, self.channels))
        self.norm = RMSNorm(width, eps)

    def new_cache(self, batch: int, *, dtype: torch.dtype, device: torch.device, max_rollback: int) -> Drawers:
        """Values and gates of open groups (and of the group before, where groups overlap), and all entries."""
        reach = (2 if self.overlaps else 1) * self.config.ratio - 1
        open_ = Tail(batch, (2 * self.channels,), reach, max_rollback, dtype, device)
        return Drawers(open=open_, entries=Entries(batch, self.width, max_rollback, dtype, device))

    def forward(self, x_BTD: Tensor, batch: Batch, groups: Groups, cache: Drawers | None) -> Compressed:
        """All entries, those of a cache included, and which of them each token sees."""
        values_BTX, gates_BTX = self.kv(x_BTD), self.gate(x_BTD)
        if cache is None:
            return Compressed(self._pool(values_BTX, gates_BTX, groups, 0), groups.spans)
        both_BSY = cache["open"].append(torch.cat((values_BTX, gates_BTX), dim=-1)).to(values_BTX.dtype)
        values_BSX, gates_BSX = both_BSY.chunk(2, dim=-1)
        before_B1, limit = cache["entries"].counts_B[:, None], batch.keys // self.config.ratio
        new_BEK = self._pool(values_BSX, gates_BSX, groups, cache["open"].reach)
        entries_BEK = cache["entries"].append(new_BEK, groups.closes_BT, limit)[:, :limit].to(values_BTX.dtype)
        return Compressed(entries_BEK, Spans(groups.spans.first_BT + before_B1, groups.spans.end_BT + before_B1))

    def _pool(self, values_BSX: Tensor, gates_BSX: Tensor, groups: Groups, offset: int) -> Tensor:
        """New entries [B, E, K], normed and turned; token t of the call stands at `offset` + t."""
        if not groups.last_BE.numel():
            return values_BSX.new_empty(*groups.last_BE.shape, self.width)
        last_BE = torch.where(groups.last_BE < 0, -1, groups.last_BE + offset)
        pooled_BEK = self.norm(compress(values_BSX, gates_BSX, self.bias, last_BE, groups.opens_BE, overlap=self.overlaps))
        return _turn_last(pooled_BEK, groups.turn)


class Inputs(NamedTuple):
    """What a block's queries are made of, and they themselves."""

    x_BTD: Tensor
    latent_BTC: Tensor
    q_BTHK: Tensor  # rotated


class Indexer(nn.Module):
    """V4's lightning indexer: scores every entry by narrow queries and narrow entries of its own."""

    def __init__(self, dim: int, config: V4AttentionConfig, eps: float) -> None:
        super().__init__()
        self.config = config
        self.q_b = Linear(config.q_lora_rank, config.index_num_heads * config.index_head_dim)
        self.weights = Linear(dim, config.index_num_heads)
        self.compressor = Compressor(dim, config.index_head_dim, config, eps)

    def forward(self, x_BTD: Tensor, latent_BTC: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(queries [B, T, J, I], weights [B, T, J], at least fp32, that carry the scale of the scores)."""
        c = self.config
        q_BTJI = self.q_b(latent_BTC).unflatten(-1, (c.index_num_heads, c.index_head_dim))
        work = torch.promote_types(x_BTD.dtype, torch.float32)
        with torch.autocast(x_BTD.device.type, enabled=False):
            weight_BTJ = self.weights.matmul(x_BTD.to(work), self.weights.weight.to(work))
        scale = (c.index_num_heads * c.index_head_dim) ** -0.5
        return _turn_last(q_BTJI, batch.turn(c.rope_head_dim, c.compress_rope)), weight_BTJ * scale


class V4Attention(nn.Module):
    """`config` is a block's own, with one ratio. `stage` starts as the configuration says; training may move it on."""

    def __init__(self, dim: int, config: V4AttentionConfig, eps: float) -> None:
        super().__init__()
        c, width = config, config.num_heads * config.head_dim
        self.config, self.stage, self.num_heads = c, c.index_stage, c.num_heads
        self.scale, self.eps = c.head_dim**-0.5, eps
        self.rope = c.compress_rope if c.ratio else c.rope
        self.q_a, self.q_a_norm, self.q_b = Linear(dim, c.q_lora_rank), RMSNorm(c.q_lora_rank, eps), Linear(c.q_lora_rank, width)
        self.kv, self.kv_norm = Linear(dim, c.head_dim), RMSNorm(c.head_dim, eps)
        self.sink = nn.Parameter(torch.zeros(c.num_heads))
        self.o_a = GroupedProjection(c.o_groups, width // c.o_groups, c.o_lora_rank)
        self.o_b = Linear(c.o_groups * c.o_lora_rank, dim)
        self.compressor = Compressor(dim, c.head_dim, c, eps) if c.ratio else None
        self.indexer = Indexer(dim, c, eps) if c.ratio == CSA_RATIO else None

    def new_cache(self, batch: int, *, dtype: torch.dtype, device: torch.device, max_rollback: int) -> Drawers:
        window = Tail(batch, (self.config.head_dim,), self.config.sliding_window - 1, max_rollback, dtype, device)
        compressors = {"compressor": self.compressor, "indexer": None if self.indexer is None else self.indexer.compressor}
        made = {
            name: part.new_cache(batch, dtype=dtype, device=device, max_rollback=max_rollback)
            for name, part in compressors.items()
            if part is not None
        }
        return Drawers(window=window, **made)

    def forward(self, x_BTD: Tensor, batch: Batch, cache: Drawers | None = None) -> tuple[Tensor, Notes]:
        """([B, T, D], in training of a CSA block `indexer`: mean KL of the queries that see entries)."""
        c, turn = self.config, batch.turn(self.config.rope_head_dim, self.rope)
        latent_BTC = self.q_a_norm(self.q_a(x_BTD))
        q_BTHK = _turn_last(_unit(self.q_b(latent_BTC).unflatten(-1, (c.num_heads, c.head_dim)), self.eps), turn)
        keys_BSK, chosen = self._window(_turn_last(self.kv_norm(self.kv(x_BTD)), turn), batch, cache)
        notes: Notes = {}
        if self.compressor is not None:
            groups = batch.once(("groups", c.ratio, c.rope_head_dim, self.rope), lambda: find_groups(batch, c))
            entries = self.compressor(x_BTD, batch, groups, None if cache is None else cache["compressor"])
            read, notes = self._read(Inputs(x_BTD, latent_BTC, q_BTHK), batch, groups, entries, cache)
            out_BTHK = self._attend(q_BTHK, keys_BSK, chosen, entries.entries_BEK, read)
        else:
            out_BTHK = attend_chosen(q_BTHK, keys_BSK, chosen, scale=self.scale, sink_H=self.sink)
        return self.o_b(self.o_a(_turn_last(out_BTHK, turn.back()).flatten(2))), notes

    def _window(self, kv_BTK: Tensor, batch: Batch, cache: Drawers | None) -> tuple[Tensor, Chosen]:
        """Keys [B, S, K] of the call and of the window before it, and which of them each token sees."""
        keys_BSK = kv_BTK if cache is None else cache["window"].append(kv_BTK).to(kv_BTK.dtype)
        width, offset = self.config.sliding_window, keys_BSK.shape[1] - kv_BTK.shape[1]
        chosen: Chosen = batch.once(("window", width, offset), lambda: _see_window(batch, width, offset))
        return keys_BSK, chosen

    def _attend(self, q_BTHK: Tensor, keys_BSK: Tensor, near: Chosen, entries_BEK: Tensor, read: Chosen | Spans) -> Tensor:
        """[B, T, H, K] over window and entries. Whole spans of entries are listed for a block of queries at a time."""
        if isinstance(read, Chosen):
            entries_BEK, read = _narrowed(entries_BEK, read)
        offset, count, far = keys_BSK.shape[1], entries_BEK.shape[1], read
        keys_BSK = torch.cat((keys_BSK, entries_BEK), dim=1)

        def attend(part: slice) -> Tensor:
            listed = Chosen.everything(far.part(part), count) if isinstance(far, Spans) else far.part(part)
            chosen = near.part(part).joined(listed, offset=offset)
            return attend_chosen(q_BTHK[:, part], keys_BSK, chosen, scale=self.scale, sink_H=self.sink)

        tokens, size = q_BTHK.shape[1], max(1, _LISTED // max(1, len(q_BTHK) * count))
        if isinstance(far, Chosen) or tokens <= size:
            return attend(slice(tokens))
        blocks = (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))
        return torch.cat([checkpoint(attend, block, use_reentrant=False) for block in blocks], dim=1)

    def _read(
        self, inputs: Inputs, batch: Batch, groups: Groups, entries: Compressed, cache: Drawers | None
    ) -> tuple[Chosen | Spans, Notes]:
        """The entries that each query attends to, spans where it is all it sees, and the indexer's loss in training."""
        count = entries.entries_BEK.shape[1]
        chooses = self.indexer is not None and self.stage == "sparse" and count > self.config.index_top_k
        learns = self.training and torch.is_grad_enabled() and cache is None and self.stage != "dense" and count > 0
        if self.indexer is None or not (chooses or learns or cache is not None):
            return entries.spans, {}
        x_BTD = inputs.x_BTD.detach()
        own = self.indexer.compressor(x_BTD, batch, groups, None if cache is None else cache["indexer"])  # a cache wants them anyway
        if not (chooses or learns):
            return entries.spans, {}
        q_BTJI, weight_BTJ = self.indexer(x_BTD, inputs.latent_BTC.detach(), batch)
        read: Chosen | Spans = entries.spans
        if chooses:
            read = select(q_BTJI, own.entries_BEK, weight_BTJ, entries.spans, self.config.index_top_k)
        if not learns:
            return read, {}
        loss = index_loss(q_BTJI, own.entries_BEK, weight_BTJ, inputs.q_BTHK, entries.entries_BEK, read, scale=self.scale)
        return read, {"indexer": loss / (entries.spans.end_BT > entries.spans.first_BT).sum().clamp_min(1)}


def find_groups(batch: Batch, config: V4AttentionConfig) -> Groups:
    """Groups that close in this call, in the order of their tokens."""
    place_BT, length, ratio = batch.place_BT, batch.place_BT.shape[1], config.ratio
    closes_BT = (place_BT % ratio == ratio - 1).to(torch.int64)
    if batch.document_BT is not None:
        closes_BT = closes_BT * (batch.document_BT >= 0)
    so_far_BT = closes_BT.cumsum(1)
    is_lone = batch.document_BT is None and batch.state is None
    entries = length // ratio if is_lone or length == 0 else int(so_far_BT[:, -1].max())
    slot_BT = torch.where(closes_BT > 0, so_far_BT - 1, entries)
    last_BE = torch.full((len(place_BT), entries + 1), -1, device=place_BT.device)
    last_BE = last_BE.scatter_(1, slot_BT, torch.arange(length, device=place_BT.device).expand_as(slot_BT))[:, :entries]
    held_BE = last_BE.clamp_min(0)
    spans = _without_padding(Spans(so_far_BT - (place_BT + 1) // ratio, so_far_BT), batch)
    turn = rotation(batch.position_BT.gather(1, held_BE) - (ratio - 1), config.rope_head_dim, config.compress_rope)
    return Groups(closes_BT, last_BE, place_BT.gather(1, held_BE) < ratio, turn, spans)


def _see_window(batch: Batch, width: int, offset: int) -> Chosen:
    """Every token sees itself and up to `width` − 1 before it, of its document; token t of the call is key `offset` + t."""
    own_BT = offset + torch.arange(batch.place_BT.shape[1], device=batch.place_BT.device).expand_as(batch.place_BT)
    spans = _without_padding(Spans(own_BT - batch.place_BT.clamp_max(width - 1), own_BT + 1), batch)
    return Chosen.everything(spans, min(width, offset + own_BT.shape[1]))


def _narrowed(entries_BEK: Tensor, read: Chosen) -> tuple[Tensor, Chosen]:
    """Only the entries that are read, where few queries read few of many: in decoding a copy of all would grow with the text."""
    (B, T, slots), valid_BTK = read.index_BTK.shape, read.valid_BTK
    if T * slots >= entries_BEK.shape[1]:
        return entries_BEK, read
    index_BTK = torch.arange(T * slots, device=valid_BTK.device).view(T, slots).expand(B, -1, -1).masked_fill(~valid_BTK, 0)
    return read.gather(entries_BEK).flatten(1, 2), Chosen(index_BTK, valid_BTK)


def _without_padding(spans: Spans, batch: Batch) -> Spans:
    """Empty where there is padding."""
    if batch.document_BT is None:
        return spans
    return Spans(torch.where(batch.document_BT < 0, spans.end_BT, spans.first_BT), spans.end_BT)


def _unit(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square."""
    return rms_norm(x, torch.ones(x.shape[-1], device=x.device), eps)


def _turn_last(x: Tensor, turn: Rotation) -> Tensor:
    """Rotate the last channels, as many as `turn` has angles for."""
    width = 2 * turn.cos.shape[-1]
    still, turning = x.split((x.shape[-1] - width, width), dim=-1)
    return torch.cat((still, rotate(turning, turn, "interleaved")), dim=-1)
